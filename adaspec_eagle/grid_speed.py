"""Speed-up of chain and tree, once for each kind of head and task of a grid.

How fast a head decodes follows from its shape and its acceptance; arms of one kind of head differ
in acceptance alone, which every cell measures on more prompts than could be timed.
"""

from collections.abc import Sequence
from pathlib import Path

from adaspec_eagle.bench import Bench, HeadChoice, draft_shapes
from adaspec_eagle.callbacks import say
from adaspec_eagle.figures import summarize
from adaspec_eagle.grid import Cell, GridSettings, Plan, config_of, head_folder, prompts_of
from adaspec_eagle.head import load_head
from adaspec_eagle.measure import build_arms, run_arms
from adaspec_eagle.paths import taken
from adaspec_eagle.record import environment, write_json
from adaspec_eagle.storage import read_json
from adaspec_eagle.targets import Target


def measure_speed(
    plan: Plan, tasks: Sequence[str], settings: GridSettings, target: Target, out: Path, work: Path
) -> None:
    """Write OUT/speed/BUDGET/TASK/ARM.json for the first arm of each kind of head that is there.

    One prompt at a time, arms alternating; what is written already is left. Where nobody else works
    on the machine, this wants to be run alone: other processes make its times worthless.
    """
    for task in tasks:
        for kind, cell in heads_there(plan, task, settings, work).items():
            path = out / "speed" / settings.budget / task / f"{cell.arm}.json"
            with taken(out / "speed.lock", wait=True):  # workers of one machine, one by one
                if kind in [read_json(done)["head"] for done in path.parent.glob("*.json")]:
                    continue
                folder = head_folder(cell, work, settings)
                source = prompts_of(task, settings, target)
                head, choice = load_head(folder, target), HeadChoice(folder, "seed 0 of the grid")
                bench = Bench(target, head, choice, [source], settings.max_new_tokens, batch_size=1)
                arms = build_arms(bench, draft_shapes([], None))
                say(f"{task}: speed of {cell.arm}")
                made = {
                    "kind": "compare_speed",
                    "task": task,
                    "arm": cell.arm,
                    "head": kind,
                    "arms": summarize(run_arms(bench, arms, "decoding"), arms, seed=0),
                    "prompts": source.describe(),
                    "environment": environment(),
                }
                write_json(path, made)


def heads_there(plan: Plan, task: str, settings: GridSettings, work: Path) -> dict[str, Cell]:
    """By kind of head the first arm of the plan whose head of seed 0 lies under WORK."""
    found: dict[str, Cell] = {}
    for name, arm in plan.arms.items():
        cell = Cell(task, name, 0)
        if (head_folder(cell, work, settings) / "train.json").exists():
            found.setdefault(config_of(arm, {}).head, cell)
    return found
