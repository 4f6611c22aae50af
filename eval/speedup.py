"""How much faster is a target with its draft head? End to end, over two baselines, with intervals.

    python eval/speedup.py --tree                          default target, newest or shipped head
    python eval/speedup.py --tree --prompts a.jsonl b.jsonl --out results/mine
    python eval/speedup.py --target phi-2 --head runs/mine/head --chain 5

Four arms decode the same prompts in one process, alternating prompt by prompt: `generate`
(transformers), `loop` (this package without a draft), `chain` and `tree`. Tables come first; the
last line of stdout is the result as JSON, without per-prompt data.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from adaspec_eagle import plots
from adaspec_eagle.bench import add_arguments, add_draft_arguments, draft_shapes, open_bench
from adaspec_eagle.errors import run_main
from adaspec_eagle.figures import speedup_result, without_prompts
from adaspec_eagle.measure import build_arms, run_arms
from adaspec_eagle.record import one_line, write_json

PROMPTS = Path(__file__).with_name("prompts.jsonl")
WIDTH = 120  # columns of a table that does not go to a terminal


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_draft_arguments(made)
    add_arguments(made, PROMPTS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record."""
    args = parser().parse_args(argv)
    bench = open_bench(args)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(f"head: {bench.choice.folder} ({bench.choice.why})", markup=False, soft_wrap=True)
    arms = build_arms(bench, draft_shapes(args.tree, args.chain))
    units = run_arms(bench, arms, "measuring")
    result = speedup_result(bench, args, arms, units)
    show(console, result)
    if args.out:
        write_json(args.out / "result.json", result)
        plots.speedup_png(result, args.out / "speedup.png")
        files = f"{args.out / 'result.json'}, {args.out / 'speedup.png'}"
        console.print(f"written: {files}", markup=False, soft_wrap=True)
    print(one_line(without_prompts(result)))
    return 0


def show(console: Console, result: dict) -> None:
    """Tables and the headline."""
    console.print(plots.arms_table(result))
    if len(result["files"]) > 1:
        console.print(plots.files_table(result))
    if result["target"]["dtype"] in ("bfloat16", "float16"):
        console.print(
            f"In {result['target']['dtype']} answers differ from generate's by rounding; "
            "eval/lossless.py shows by how much."
        )
    console.print(result["headline"]["sentence"], style="bold", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
