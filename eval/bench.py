"""Measure a head on a public suite: EAGLE's six sets, Spec-Bench by category, AdaSPEC's five tasks.

    python eval/bench.py --suite eagle --data-root DIR --out results/eagle
    python eval/bench.py --suite specbench --data-root Spec-Bench/data --temperature 0 --limit 10
    python eval/bench.py --suite adaspec --sets gsm8k mbpp      fetched by name

Arms and figures are those of eval/speedup.py; prompts of two turns are answered in two turns, the
second behind the arm's own first answer. The tables have the layout of EAGLE-3's Table 1, of
Spec-Bench's leaderboard and of AdaSPEC's Table 1, with published figures beside ours. A result
holds ids and hashes of the prompts, not their texts. With --out every finished set is kept, and the
same command goes on behind it. The last line of stdout is the result as JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adaspec_eagle import plots
from adaspec_eagle.bench import (
    Bench,
    Source,
    add_arguments,
    add_draft_arguments,
    at_least_zero,
    describe_bench,
    draft_shapes,
    open_bench,
)
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.figures import DEFINITIONS, measured_figures, without_prompts
from adaspec_eagle.measure import Arm, Outcome, Unit, build_arms, run_arms
from adaspec_eagle.record import one_line, write_json
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.suite_tables import TableData, suite_tables
from adaspec_eagle.suites import SUITES, chosen_sets, read_sets
from adaspec_eagle.targets import Target
from adaspec_eagle.trace import trace_arms


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    add = made.add_argument
    add("--suite", choices=SUITES, required=True)
    add("--sets", nargs="+", metavar="SET", help="only these sets of the suite")
    add("--data-root", type=Path, metavar="DIR", help="folder with the suite's files; default: "
        "they are fetched from where they are published")  # fmt: skip
    add("--temperature", type=at_least_zero, nargs="+", default=[0.0, 1.0], metavar="T",
        help="one run for each; default: 0 1")  # fmt: skip
    add_draft_arguments(made)
    add_arguments(made, None)
    return made


def sources(args: argparse.Namespace, target: Target) -> list[Source]:
    """The suite's prompts as the arguments say."""
    sets = chosen_sets(args.suite, args.sets)
    return read_sets(sets, args.data_root, target, args.limit, args.max_new_tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record."""
    args = parser().parse_args(argv)
    bench = open_bench(args, sources)
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(f"head: {bench.choice.folder} ({bench.choice.why})", markup=False, soft_wrap=True)
    heats = list(dict.fromkeys(args.temperature))
    runs = [run(replace(bench, temperature=heat), args) for heat in heats]
    result = {
        "kind": "bench",
        "suite": args.suite,
        **describe_bench(bench, args),
        "turns": "all, each behind the arm's own answer",
        "runs": runs,
        "traces": trace_arms(bench, build_arms(bench, draft_shapes(args.tree, args.chain))),
        "definitions": DEFINITIONS,
    }
    for table in suite_tables(result):
        console.print(shown(table))
        console.print(table.note, soft_wrap=True)
    for one in runs:
        line = f"temperature {one['temperature']:g}: {one['headline']['sentence']}"
        console.print(line, style="bold", highlight=False, soft_wrap=True)
    if args.out:
        write_json(args.out / "result.json", result)
        for one in runs:
            view = {"target": result["target"], "prompts": result["prompts"], **one}
            plots.speedup_png(view, args.out / f"speedup-{one['temperature']:g}.png")
        console.print(f"written: {args.out / 'result.json'}", markup=False, soft_wrap=True)
    brief = [without_prompts(one) for one in runs]
    print(one_line(without_prompts(result) | {"runs": brief}))
    return 0


def run(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All sets at the bench's temperature."""
    arms = build_arms(bench, draft_shapes(args.tree, args.chain))
    units = [unit for source in bench.sources for unit in measure_set(bench, source, arms, args)]
    return measured_figures(bench, arms, units)


def measure_set(
    bench: Bench, source: Source, arms: Sequence[Arm], args: argparse.Namespace
) -> list[Unit]:
    """One set, from the folder of finished sets if it is there and was measured the same way."""
    here = replace(bench, sources=[source])
    title = f"{source.name}, temperature {bench.temperature:g}"
    if not args.out:
        return run_arms(here, arms, title)
    path = args.out / "sets" / f"{source.name}-{bench.temperature:g}.json"
    setup = fixed_facts(here, arms, args)
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in setup if kept["setup"].get(name) != setup[name]]
        if other:
            changed = ", ".join(other)
            raise UserError(f"{path} was measured with another {changed}; name another --out")
        return [kept_unit(unit, row) for unit, row in zip(here.units(), kept["units"], strict=True)]
    units = run_arms(here, arms, title)
    write_json(path, {"setup": setup, "units": [unit_row(unit) for unit in units]})
    return units


def fixed_facts(bench: Bench, arms: Sequence[Arm], args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for a finished set to count."""
    facts = describe_bench(bench, args)
    where = facts["environment"]
    return {
        "target": facts["target"],
        "head": facts["head"]["sha256"],
        "arms": {arm.key: arm.shape for arm in arms},
        "prompts": [prompt.sha256 for prompt in bench.sources[0].prompts],
        "sizes": [bench.max_new_tokens, bench.batch_size, bench.temperature, bench.seed],
        "machine": [where[name] for name in ("cpu", "threads", "cuda", "packages")],
        "code": where["git"],
    }


def unit_row(unit: Unit) -> dict[str, Any]:
    """A unit as JSON takes it; `kept_unit` gives it back."""
    return {
        key: {"answers": one.answers, "stats": one.stats.to_dict(), "peak_bytes": one.peak_bytes}
        for key, one in unit.outcomes.items()
    }


def kept_unit(prompts: list, row: dict[str, Any]) -> Unit:
    """The unit of these prompts from its row."""
    outcomes = {
        key: Outcome(one["answers"], AcceptanceStats.from_dict(one["stats"]), one["peak_bytes"])
        for key, one in row.items()
    }
    return Unit(prompts, outcomes)


def shown(data: TableData) -> Table:
    """A table for the terminal; what is published is dim."""
    table = Table(title=data.title, title_justify="left")
    for place, name in enumerate(data.header):
        left = place < 4  # who, method, target, hardware
        table.add_column(name, justify="left" if left else "right", no_wrap=not left)
    for row in data.rows:
        table.add_row(*row, style="dim" if row[0] == "published" else None)
    return table


if __name__ == "__main__":
    sys.exit(run_main(main))
