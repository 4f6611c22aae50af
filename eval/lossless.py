"""Is decoding with a draft head lossless? Compare with `model.generate`, token by token.

    python eval/lossless.py --dtype float32 --prompts a.jsonl
    python eval/lossless.py --dtype bfloat16 --tree --chain 4 --limit 20 --out results/lossless

float64: every answer must be equal. float32: equal, or at the first difference (listed) the
target's own top two logits lie within 1e-4 of each other, and every token behind it within 1e-4 of
the largest. bfloat16 and float16: every token, rescored by the target one at a time, must lie
within --margin of the largest logit; so must an end token where an answer stops short. Exit status
1 if that does not hold. The last line of stdout is the result as JSON.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from adaspec_eagle.bench import (
    add_arguments,
    add_draft_arguments,
    at_least_zero,
    describe_bench,
    draft_shapes,
    open_bench,
)
from adaspec_eagle.errors import command_line, run_main
from adaspec_eagle.record import one_line, write_json
from adaspec_eagle.rescore import MARGIN, compare
from adaspec_eagle.targets import Target

PROMPTS = Path(__file__).with_name("prompts.jsonl")
DEFINITIONS = {
    "matched": "answers equal to model.generate's (greedy, no penalties), of `total`",
    "position": "index in the answer of the first token that differs",
    "margin": "top-two margin of the target's logits there, by one forward on the common prefix",
    "gap": "largest logit there minus the logit of the token that was emitted",
    "rescored": "each emitted token, the answers fed to the target one token at a time: "
    "largest logit minus the emitted token's; match: share of tokens where that is 0",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    add_draft_arguments(made)
    made.add_argument(
        "--margin",
        type=at_least_zero,
        default=MARGIN,
        help="bfloat16 and float16: allowed gap to the largest logit; default: %(default)s",
    )
    add_arguments(made, PROMPTS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print, record; 1 if an answer is not the target's own."""
    args = parser().parse_args(argv)
    bench = open_bench(args)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    console.print(f"head: {bench.choice.folder} ({bench.choice.why})", markup=False)
    shapes = draft_shapes(args.tree, args.chain)
    modes = compare(bench, shapes, args.margin)
    result = {
        "kind": "lossless",
        **describe_bench(bench, args),
        "modes": modes,
        "passed": all(mode["passed"] for mode in modes.values()),
        "definitions": DEFINITIONS,
    }
    for key, mode in modes.items():
        for line in report(key, mode, bench.target):
            console.print(line, markup=False)
    if args.out:
        write_json(args.out / "result.json", result)
    print(one_line(result))
    return 0 if result["passed"] else 1


def report(key: str, mode: dict[str, Any], target: Target) -> list[str]:
    """Lines for the terminal."""
    verdict = "passed" if mode["passed"] else "FAILED"
    lines = [f"{key} ({mode['shape']}): {mode['matched']}/{mode['total']} equal, {verdict}"]
    for one in mode["differences"]:
        words = [_word(target, one[name]) for name in ("reference_token", "token")]
        lines.append(
            f"  {one['id']} at token {one['position']}: generate {words[0]}, here {words[1]}; "
            f"top-two margin {one['margin']:.2g}, gap {one['gap']:.2g}"
        )
    if mode["rescored"]:
        facts = mode["rescored"]
        lines.append(
            f"  {facts['tokens']} tokens rescored one at a time: {facts['match']:.2%} are the "
            f"maximum, gap at the 99th percentile {facts['gap_p99']:.3g}, at most "
            f"{facts['gap_max']:.3g} (allowed {facts['margin']:g})"
        )
    return lines


def _word(target: Target, token: int) -> str:
    text = target.tokenizer.decode([token]) if target.tokenizer else ""
    return f"{token} {text!r}"


if __name__ == "__main__":
    sys.exit(run_main(main))
