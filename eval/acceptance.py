"""How much of a draft does the target accept? Per task: alpha by depth, greedy alpha, overlap.

    python eval/acceptance.py                              default target and head, chains of 5
    python eval/acceptance.py --prompts gsm8k.jsonl mbpp.jsonl --chain 5 --out results/acceptance

Three figures with three names. alpha_d: share of greedy chain drafts accepted at depth d, of those
accepted to d - 1. Greedy alpha: accepted / (accepted + rejected) draft tokens. Overlap: the mean of
sum_v min(p_v, q_v) on the target's own greedy answers, teacher-forced, for each unrolled step. The
last line of stdout is the result as JSON.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adaspec_eagle.bench import Bench, Source, add_arguments, describe_bench, open_bench, positive
from adaspec_eagle.data import Record
from adaspec_eagle.distill import teacher_forced
from adaspec_eagle.errors import run_main
from adaspec_eagle.figures import DEFINITIONS as COMMON
from adaspec_eagle.figures import acceptance_figures, total, units_of
from adaspec_eagle.measure import Arm, Unit, build_arms, run_arms
from adaspec_eagle.record import one_line, with_interval, write_json

PROMPTS = Path(__file__).with_name("prompts.jsonl")
DEFINITIONS = {name: COMMON[name] for name in ("tau", "acceptance_by_depth", "ci95")} | {
    "alpha_by_depth": "P(depth d accepted | depth d-1 accepted), d = 1, 2, ..., greedy chains",
    "greedy_alpha": "accepted / (accepted + rejected) draft tokens, greedy chains",
    "overlap": "mean over positions of sum_v min(p_v, q_v), p over the target's full vocabulary, "
    "by unrolled step, teacher-forced on the answers decoded here",
    "match": "share of positions where the head's top token is the target's, by unrolled step",
    "tau_sim": "1 + mean over positions of sum_s prod_{j<=s} match_j, teacher-forced",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--chain", type=positive, default=5, metavar="K", help="draft length; default: 5"
    )
    add_arguments(made, PROMPTS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Decode, score, print, record."""
    args = parser().parse_args(argv)
    bench = by_task(open_bench(args))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"head: {bench.choice.folder} ({bench.choice.why})", markup=False, soft_wrap=True)
    (arm,) = build_arms(bench, {"chain": f"chain:{args.chain}"})[2:]
    units = run_arms(bench, [arm], "decoding")
    names = [source.name for source in bench.sources]
    tasks = {name: figures(bench, arm, units_of(units, name), args) for name in names}
    result = {
        "kind": "acceptance",
        **describe_bench(bench, args),
        "tasks": tasks,
        "all": figures(bench, arm, units, args) if len(names) > 1 else tasks[names[0]],
        "definitions": DEFINITIONS,
    }
    console.print(table(result))
    if args.out:
        write_json(args.out / "result.json", result)
    print(one_line(result))
    return 0


def by_task(bench: Bench) -> Bench:
    """The same prompts with a source for each task: files that hold several tasks are split."""
    sources = []
    for source in bench.sources:
        tasks = list(dict.fromkeys(prompt.task for prompt in source.prompts))
        for task in tasks:
            name = source.name if len(tasks) == 1 else f"{source.name}: {task}"
            prompts = [replace(p, source=name) for p in source.prompts if p.task == task]
            sources.append(Source(name, source.sha256, prompts))
    return replace(bench, sources=sources)


def figures(
    bench: Bench, arm: Arm, units: Sequence[Unit], args: argparse.Namespace
) -> dict[str, Any]:
    """Acceptance while decoding these units, and teacher-forced on the answers that came out."""
    stats = [unit.outcomes[arm.key].stats for unit in units]
    records = [record for unit in units for record in answers(bench, arm, unit)]
    forced = teacher_forced(bench.target, bench.head, records, args.chain, args.batch_size)
    summed = total(stats)
    return {
        "prompts": len(records),
        "new_tokens": summed.new_tokens,
        "rounds": summed.rounds,
        "tau": summed.tau,
        **acceptance_figures(stats, arm, args.seed),
        **{name: forced[name] for name in ("overlap", "match", "tau_sim")},
    }


def answers(bench: Bench, arm: Arm, unit: Unit) -> list[Record]:
    """The unit's greedy answers as training records."""
    target = bench.target
    return [
        Record(p.id, p.task, p.messages, p.ids, answer, target.name, target.fingerprint, 0.0)
        for p, answer in zip(unit.prompts, unit.outcomes[arm.key].answers, strict=True)
    ]


def table(result: dict[str, Any]) -> Table:
    """One row a task."""
    made = Table(title=f"chains of {result['arguments']['chain']}, greedy", title_justify="left")
    made.add_column("task")
    for name in ("n", "tau", "greedy alpha", "alpha by depth", "overlap by step"):
        made.add_column(name, justify="right")
    for name, one in [*result["tasks"].items(), ("all", result["all"])]:
        alpha = with_interval(one["greedy_alpha"], one["greedy_alpha_ci95"], 3)
        lists = (one["alpha_by_depth"], one["overlap"])
        cells = [" ".join(f"{value:.2f}" for value in values) for values in lists]
        made.add_row(Path(name).name, str(one["prompts"]), f"{one['tau']:.2f}", alpha, *cells)
    return made


if __name__ == "__main__":
    sys.exit(run_main(main))
