"""Train and measure several methods at equal compute; the table that says which head is better.

    python eval/compare.py --data 'data/{task}.jsonl.gz' --prompts 'dev/{task}.test.jsonl'
    python eval/compare.py --tasks gsm8k,alpaca --arms mine.yaml --seeds 5 --out results/compare
    python eval/compare.py --out results/compare --tables-only
    python eval/compare.py --out results/compare --tables-only --against distillspec

A grid of cells (arm, task, seed). Run the same command again after a kill, or at the same time in
several processes or on several machines that share the folders: cells are independent. Prompts of
--prompts are decoded once a cell, at its end; checkpoints are chosen on held-back training records.
The last line of stdout is JSON: the seeds that are there, by task and arm.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from adaspec_eagle.bench import positive
from adaspec_eagle.compare_tables import markdown, summary, write_tables
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.grid import GridSettings, cells_of, read_plan, run_grid
from adaspec_eagle.grid_speed import measure_speed
from adaspec_eagle.hub import HUB_SETS
from adaspec_eagle.record import one_line
from adaspec_eagle.targets import DEFAULT_TARGET, Target, describe
from adaspec_eagle.train import Workshop

ARMS = Path(__file__).with_name("arms.yaml")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    add = made.add_argument
    add("--target", default=DEFAULT_TARGET, help="alias, hub id or folder (default: %(default)s)")
    add("--tasks", default=",".join(HUB_SETS), help="default: %(default)s")
    add("--data", default="runs/data/{task}.jsonl", metavar="PATTERN",
        help="answers to train on (make_data.py); default: %(default)s")  # fmt: skip
    add("--prompts", default="{task}", metavar="PATTERN",
        help="prompts to measure on, files or hub sets; default: the hub's test split")  # fmt: skip
    add("--arms", type=Path, default=ARMS, metavar="FILE", help="default: eval/arms.yaml")
    add("--only", help="these arms of the file alone, and the reference arms that they need")
    add("--seeds", type=positive, default=5, help="default: %(default)s")
    add("--epochs", default="3", help="epochs of an arm, or best: chosen by acceptance on "
        "held-back records among --most-epochs; default: %(default)s")  # fmt: skip
    add("--most-epochs", type=float, default=6.0, help="default: %(default)s")
    add("--limit", type=positive, default=64, help="prompts a task; default: %(default)s")
    add("--max-new-tokens", type=positive, default=128, help="default: %(default)s")
    add("--depth", type=positive, default=5, help="of the chains; default: %(default)s")
    add("--dtype", help="bfloat16, float32, float64; default: what the device computes natively")
    add("--out", type=Path, default=Path("results/compare"), help="default: %(default)s")
    add("--work", type=Path, default=Path("runs/compare"),
        help="heads and checkpoints; default: %(default)s")  # fmt: skip
    add("--speed", type=positive, metavar="N", help="after the cells also time chain and tree on N "
        "prompts a task, once for each kind of head; wants the machine to itself")  # fmt: skip
    add("--tables-only", action="store_true", help="tables and plot from what is there")
    add("--against", metavar="ARM", help="tables with the differences to this arm instead of the "
        "plan's baseline, under a name of their own; with --tables-only")  # fmt: skip
    return made


def settings_of(args: argparse.Namespace) -> GridSettings:
    """What all cells have in common; UserError for a budget that is none."""
    try:
        if args.epochs != "best":
            args.epochs = f"{float(args.epochs):g}"  # 3 and 3.0 are the same cells
        good = args.epochs == "best" or float(args.epochs) > 0
    except ValueError:
        good = False
    if not good or args.most_epochs <= 0:
        raise UserError(f"--epochs {args.epochs}: give a number above 0, or best")
    given = vars(args) | {"budget": args.epochs}
    return GridSettings(**{field.name: given[field.name] for field in fields(GridSettings)})


def main(argv: Sequence[str] | None = None) -> int:
    """Work on the grid, then write the tables."""
    args = parser().parse_args(argv)
    plan, settings = read_plan(args.arms), settings_of(args)
    if args.against and not args.tables_only:
        raise UserError("--against goes with --tables-only: it changes what is shown, not the grid")
    if not args.tables_only:
        only = args.only.split(",") if args.only else []
        cells = cells_of(plan, args.tasks.split(","), args.seeds, only)
        target = Target.load(args.target, args.dtype)
        print(describe(target), file=sys.stderr)
        run_grid(plan, cells, settings, Workshop(target), args.out, args.work)
        if args.speed:
            timed = replace(settings, limit=args.speed)
            measure_speed(plan, args.tasks.split(","), timed, target, args.out, args.work)
    plan = plan.against(args.against) if args.against else plan
    found = summary(args.out, plan, settings.budget)
    write_tables(found, args.out)
    print(markdown(found))
    tasks = found["tasks"].items()
    seeds = {task: {name: arm["seeds"] for name, arm in arms.items()} for task, arms in tasks}
    print(one_line({"cells": seeds}))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
