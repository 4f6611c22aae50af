"""How much of a draft does the target accept? Per task: alpha by depth, greedy alpha, overlap.

    python eval/acceptance.py                              default target and head, chains of 5
    python eval/acceptance.py --prompts gsm8k.jsonl mbpp.jsonl --chain 5 --out results/acceptance

Figures with names of their own (adaspec_eagle/acceptance.py). alpha_d: share of greedy chain drafts
accepted at depth d, of those accepted to d - 1. Greedy alpha: accepted / (accepted + rejected)
draft tokens. alpha_t1: the same of sampled chains at temperature 1. Overlap: the mean of
sum_v min(p_v, q_v) on the target's own greedy answers, teacher-forced, for each unrolled step. The
last line of stdout is the result as JSON, without the counts of single prompts.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adaspec_eagle import acceptance
from adaspec_eagle.bench import Bench, Source, add_arguments, describe_bench, open_bench, positive
from adaspec_eagle.errors import UserError, command_line, explain_out_of_memory, run_main
from adaspec_eagle.figures import DEFINITIONS as COMMON
from adaspec_eagle.figures import draft_figures, without_prompts
from adaspec_eagle.record import one_line, write_json
from adaspec_eagle.speed_tables import terminal_table

PROMPTS = Path(__file__).with_name("prompts.jsonl")
DEFINITIONS = {name: COMMON[name] for name in ("tau", "acceptance_by_depth", "ci95")}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    made.add_argument(
        "--chain", type=positive, default=5, metavar="K", help="draft length; default: 5"
    )
    add_arguments(made, PROMPTS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Decode, score, print, record."""
    args = parser().parse_args(argv)
    bench = by_task(open_bench(args))
    if args.chain > (bench.head.deepest or args.chain):
        raise UserError(
            f"--chain {args.chain}: this head drafts {bench.head.deepest} tokens deep; give "
            f"--chain {bench.head.deepest}"
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"head: {bench.choice.folder} ({bench.choice.why})", markup=False, soft_wrap=True)
    tasks = {}
    with explain_out_of_memory("Use a smaller --batch-size or --max-new-tokens"):
        for source in bench.sources:
            tasks[source.name] = task_counts(bench, source, args)
    every = [counts for rows in tasks.values() for counts in rows]
    result = {
        "kind": "acceptance",
        **describe_bench(bench, args),
        "tasks": {name: figures(rows, args.seed) for name, rows in tasks.items()},
        "all": figures(every, args.seed),
        "definitions": DEFINITIONS | acceptance.DEFINITIONS,
        "per_prompt": tasks,
    }
    console.print(table(result))
    if args.out:
        write_json(args.out / "result.json", result)
    print(one_line(without_prompts(result)))
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


def task_counts(bench: Bench, source: Source, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The raw counts of each of the source's prompts."""
    found = acceptance.acceptance_figures(
        bench.target,
        bench.head,
        [prompt.ids for prompt in source.prompts],
        args.max_new_tokens,
        args.chain,
        args.seed,
        args.batch_size,
        args.allow_other_target,
    )
    return [
        {"id": prompt.id} | counts
        for prompt, counts in zip(source.prompts, found["per_prompt"], strict=True)
    ]


def figures(per_prompt: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Acceptance over these prompts, with intervals for what was counted while decoding."""
    greedy = draft_figures(acceptance.stats_of(per_prompt, "greedy"), True, seed)
    sampled = draft_figures(acceptance.stats_of(per_prompt, "sampled"), True, seed)
    low_high = {"alpha_t1_ci95": sampled["greedy_alpha_ci95"]}
    return acceptance.summarized(per_prompt) | greedy | low_high


def table(result: dict[str, Any]) -> Table:
    """One row a task."""
    title = f"chains of {result['arguments']['chain']}"
    return terminal_table(title, acceptance.HEADER, acceptance.table_rows(result))


if __name__ == "__main__":
    sys.exit(run_main(main))
