"""Speed-up of chain and tree, once for each kind of head and task of a grid.

How fast a head decodes follows from its shape and its acceptance; arms of one kind of head differ
in acceptance alone, which every cell measures on more prompts than could be timed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaspec_eagle.bench import Bench, HeadChoice, draft_shapes
from adaspec_eagle.callbacks import say
from adaspec_eagle.figures import summarize
from adaspec_eagle.grid import Cell, GridSettings, Plan, config_of, head_folder, prompts_of
from adaspec_eagle.head import load_head
from adaspec_eagle.measure import build_arms, run_arms
from adaspec_eagle.paths import taken
from adaspec_eagle.record import environment, write_json
from adaspec_eagle.targets import Target


def measure_speed(
    plan: Plan, tasks: Sequence[str], settings: GridSettings, target: Target, out: Path, work: Path
) -> None:
    """Write OUT/speed/BUDGET/TASK/ARM.json for the first arm of each kind of head that is there.

    One prompt at a time, arms alternating; what is written already is left. Where nobody else works
    on the machine, this wants to be run alone: other processes make its times worthless.
    """
    for task in tasks:
        for arm in first_of_each_head(plan):
            folder = head_folder(Cell(task, arm, 0), work, settings)
            path = out / "speed" / settings.budget / task / f"{arm}.json"
            with taken(out / "speed.lock", wait=True):  # workers of one machine, one by one
                if path.exists() or not (folder / "train.json").exists():
                    continue
                source = prompts_of(task, settings, target)
                head, choice = load_head(folder, target), HeadChoice(folder, "seed 0 of the grid")
                bench = Bench(target, head, choice, [source], settings.max_new_tokens, batch_size=1)
                arms = build_arms(bench, draft_shapes([], None))
                say(f"{task}: speed of {arm}")
                figures = summarize(run_arms(bench, arms, "decoding"), arms, seed=0)
                write_json(path, _record(task, arm, plan, figures, source.describe()))


def first_of_each_head(plan: Plan) -> list[str]:
    """The first arm of every kind of head."""
    found: dict[str, str] = {}
    for name, arm in plan.arms.items():
        found.setdefault(config_of(arm, {}).head, name)
    return list(found.values())


def _record(
    task: str, arm: str, plan: Plan, figures: dict[str, Any], prompts: dict[str, Any]
) -> dict[str, Any]:
    return {
        "kind": "compare_speed",
        "task": task,
        "arm": arm,
        "head": config_of(plan.arms[arm], {}).head,
        "arms": figures,
        "prompts": prompts,
        "environment": environment(),
    }
