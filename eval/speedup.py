"""How much faster is a target with its draft head? End to end, over two baselines, with intervals.

    python eval/speedup.py --tree                          default target, newest or shipped head
    python eval/speedup.py --tree --prompts a.jsonl b.jsonl --out results/mine
    python eval/speedup.py --target phi-2 --head runs/mine/head --chain 5
    python eval/speedup.py --baselines all medusa=runs/medusa/head eagle2=runs/eagle1/head@auto
    python eval/speedup.py --arm my_decoder.py:forward
    python eval/speedup.py --tree --compile                all arms compiled, transformers' too
    python eval/speedup.py --tree --temperature 1          sampled answers

Four arms decode the same prompts in one process, alternating prompt by prompt: `generate`
(transformers), `loop` (this package without a draft), `chain` and `tree`. Other methods join them
with --baselines, a decoder of one's own with --arm (docs/add_your_method.md). Tables come first;
the last line of stdout is the result as JSON, without per-prompt data.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from adaspec_eagle import baselines, foreign, plots, speed_tables
from adaspec_eagle.baselines import METHODS, build_baselines, parse_asks
from adaspec_eagle.bench import (
    add_arguments,
    add_draft_arguments,
    at_least_zero,
    draft_shapes,
    open_bench,
)
from adaspec_eagle.compiled import check_compiler, graphs_made
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.figures import speedup_result, without_prompts
from adaspec_eagle.measure import build_arms, run_units, warm_up
from adaspec_eagle.record import one_line, write_json
from adaspec_eagle.rescore import agreement
from adaspec_eagle.targets import default_device

PROMPTS = Path(__file__).with_name("prompts.jsonl")
SIDE_BY_SIDE = 6  # arms that a table has room for as columns
WIDTH = 120  # columns of a table that does not go to a terminal


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    add_draft_arguments(made)
    made.add_argument(
        "--baselines",
        nargs="+",
        default=[],
        metavar="NAME[=WHAT][@TREE]",
        help=f"all, or some of {', '.join(METHODS)}; WHAT: folder or hub id of a head, or name of "
        "assisted's small model; without it the newest fitting head under runs/ is taken. TREE: "
        "auto, dynamic, static or chain:K instead of the paper's",
    )
    made.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="FILE.py:NAME",
        help="a decoder with Spec-Bench's signature as a further arm; can be repeated",
    )
    made.add_argument(
        "--compile",
        action="store_true",
        help="compile the forwards of all arms but `generate`, and add generate-compiled: "
        "model.generate with a static cache and torch.compile. On CPU it takes a C++ compiler and "
        "some minutes before the timed runs; another number of rows is another graph",
    )
    made.add_argument(
        "--temperature",
        type=at_least_zero,
        default=0.0,
        metavar="T",
        help="of sampling; the package's arms draw with the same numbers. default: 0, greedy",
    )
    add_arguments(made, PROMPTS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record."""
    args = parser().parse_args(argv)
    asks = parse_asks(args.baselines)
    if args.temperature and (asks or args.arm):
        raise UserError(
            f"--temperature {args.temperature:g}: --baselines and --arm decode greedily; leave one "
            "of the two out"
        )
    for text in args.arm:
        foreign.check_decoder(text)
    if args.compile:
        check_compiler(default_device())
    bench = replace(open_bench(args), compiled=args.compile, temperature=args.temperature)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(f"head: {bench.choice.folder} ({bench.choice.why})", markup=False, soft_wrap=True)
    others = build_baselines(bench, asks)
    for line in speed_tables.baseline_lines(others.facts):
        console.print(line, markup=False, soft_wrap=True)
    arms = build_arms(bench, draft_shapes(args.tree, args.chain)) + others.arms
    arms += [foreign.decoder_arm(bench, text) for text in args.arm]
    check_keys([arm.key for arm in arms])
    first = warm_up(bench, arms)
    graphs = graphs_made()
    units = run_units(bench, arms, "measuring")
    made = {"seconds": first, "graphs": graphs, "graphs_while_timed": graphs_made() - graphs}
    result = speedup_result(bench, args, arms, units) | {"baselines": others.facts}
    result["compiled"] = made if args.compile else None
    result["definitions"] = result["definitions"] | baselines.DEFINITIONS | foreign.DEFINITIONS
    if args.out:  # what was timed; where answers differ takes its time to find out
        write_json(args.out / "result.json", result)
    judged = {} if bench.temperature else agreement(bench.target, units, list(result["arms"]))
    for key, found in judged.items():
        result["arms"][key] |= found
    show(console, result)
    if args.out:
        write_json(args.out / "result.json", result)
        plots.speedup_png(result, args.out / "speedup.png")
        files = f"{args.out / 'result.json'}, {args.out / 'speedup.png'}"
        console.print(f"written: {files}", markup=False, soft_wrap=True)
    print(one_line(without_prompts(result)))
    return 0


def check_keys(keys: Sequence[str]) -> None:
    """Raise UserError if two arms have one name."""
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"two arms are called {key!r}: give the function of --arm another name")


def show(console: Console, result: dict) -> None:
    """Tables and the headline."""
    few = len(result["arms"]) <= SIDE_BY_SIDE and not result["baselines"]
    console.print(speed_tables.arms_table(result) if few else speed_tables.methods_table(result))
    if len(result["files"]) > 1:
        console.print(speed_tables.files_table(result))
    if result["target"]["dtype"] in ("bfloat16", "float16"):
        console.print(
            f"In {result['target']['dtype']} answers differ from {result['matched_with']}'s by "
            "rounding; eval/lossless.py shows by how much greedy ones do."
        )
    console.print(result["headline"]["sentence"], style="bold", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
