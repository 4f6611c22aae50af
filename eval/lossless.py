"""Is decoding with a draft head lossless? Compare with `model.generate`, token by token.

    python eval/lossless.py --dtype float32 --prompts a.jsonl
    python eval/lossless.py --dtype bfloat16 --tree --chain 4 --limit 20 --out results/lossless

float64: every answer must be equal. float32: equal, but for first differences where the target's
own top two logits lie within 1e-4 of each other (they are listed). bfloat16 and float16: every
emitted token, rescored by the target one token at a time, must lie within --margin of the largest
logit. Exit status 1 if that does not hold. The last line of stdout is the result as JSON.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import DynamicCache

from adaspec_eagle import measure
from adaspec_eagle.errors import explain_out_of_memory, run_main
from adaspec_eagle.record import one_line, write_json
from adaspec_eagle.targets import Target

PROMPTS = Path(__file__).with_name("prompts.jsonl")
TIE = 1e-4  # float32: top-two logits closer than this are a tie that rounding decides
MARGIN = 0.5  # four units in the last place of a bfloat16 logit between 16 and 32
HALF = (torch.bfloat16, torch.float16)
DEFINITIONS = {
    "matched": "answers equal to model.generate's (greedy, no penalties), of `total`",
    "position": "index in the answer of the first token that differs",
    "margin": "top-two margin of the target's logits there, by one forward on the common prefix",
    "gap": "largest logit there minus the logit of the token that was emitted",
    "rescored": "each emitted token, the answers fed to the target one token at a time: "
    "largest logit minus the emitted token's; match: share of tokens where that is 0",
}


@dataclass(frozen=True)
class Difference:
    """Where an answer leaves the reference's for the first time; logits by one plain forward."""

    id: str
    source: str
    position: int
    reference_token: int
    token: int
    margin: float  # top-two margin of the target's logits
    gap: float  # largest logit minus that of `token`

    @property
    def tie(self) -> bool:
        """Whether both tokens are as good as each other in float32."""
        return self.margin < TIE and self.gap < TIE


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measure.add_draft_arguments(made)
    made.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        help="bfloat16 and float16: allowed gap to the largest logit; default: %(default)s",
    )
    measure.add_arguments(made, PROMPTS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print, record; 1 if an answer is not the target's own."""
    args = parser().parse_args(argv)
    bench = measure.open_bench(args)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    console.print(f"head: {bench.choice.folder} ({bench.choice.why})", markup=False)
    shapes = measure.draft_shapes(args.tree, args.chain)
    modes = compare(bench, shapes, args.margin)
    result = {
        "kind": "lossless",
        **measure.describe_bench(bench, args),
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


def compare(bench: measure.Bench, shapes: dict[str, str], margin: float) -> dict[str, dict]:
    """Mode -> matches, first differences and, in half precision, gaps of all emitted tokens."""
    found: dict[str, list[Difference]] = {key: [] for key in shapes}
    gaps: dict[str, list[float]] = {key: [] for key in shapes}
    units = track(bench.units(), "comparing", console=Console(stderr=True))
    with explain_out_of_memory("Use a smaller --batch-size or --max-new-tokens"):
        for prompts in units:
            ids, mask = measure.left_padded(prompts, bench.target)
            new = bench.max_new_tokens
            wanted, _ = measure.greedy_baseline(bench.target, new, ids, mask)
            for key, shape in shapes.items():
                answers, _ = measure.decode(bench, shape, ids, mask)
                for prompt, one, answer in zip(prompts, wanted, answers, strict=True):
                    if one != answer:
                        found[key].append(difference(bench.target, prompt, one, answer))
                    if bench.target.dtype in HALF:
                        gaps[key] += token_gaps(bench.target, prompt.ids, answer)
    total = sum(len(source.prompts) for source in bench.sources)
    dtype = bench.target.dtype
    return {k: judge(s, dtype, found[k], gaps[k], total, margin) for k, s in shapes.items()}


def judge(
    shape: str,
    dtype: torch.dtype,
    found: list[Difference],
    gaps: list[float],
    total: int,
    margin: float,
) -> dict[str, Any]:
    """One mode's record; `passed` by the rule of its dtype (see the top of this file)."""
    ties = sum(one.tie for one in found)
    rescored = rescoring(gaps, margin) if dtype in HALF else None
    if rescored:
        passed = rescored["gap_max"] <= margin
    else:
        passed = not found or (dtype == torch.float32 and ties == len(found))
    return {
        "shape": shape,
        "matched": total - len(found),
        "total": total,
        "ties": ties,
        "rescored": rescored,
        "passed": passed,
        "differences": [asdict(one) for one in found],
    }


def rescoring(gaps: list[float], margin: float) -> dict[str, Any]:
    """How far emitted tokens lie below the largest logit when the target rescores them."""
    values = np.array(gaps)
    return {
        "tokens": len(gaps),
        "match": float((values == 0).mean()),
        "gap_p99": float(np.percentile(values, 99)),
        "gap_max": float(values.max()),
        "margin": margin,
    }


@torch.no_grad()
def difference(
    target: Target, prompt: measure.Prompt, wanted: list[int], answer: list[int]
) -> Difference:
    """The first token in which two unequal answers differ, judged on their common prefix."""
    pairs = enumerate(zip(wanted, answer, strict=False))
    place = next(i for i, (reference, token) in pairs if reference != token)
    prefix = torch.tensor([prompt.ids + wanted[:place]], device=target.device)
    logits = target.model(prefix, logits_to_keep=1, use_cache=False).logits[0, -1]  # [V]
    logits = logits.to(torch.float64)
    first, second = logits.topk(2).values.tolist()
    gap = first - logits[answer[place]].item()
    tokens = (wanted[place], answer[place])
    return Difference(prompt.id, prompt.source, place, *tokens, first - second, gap)


@torch.no_grad()
def token_gaps(target: Target, prompt: list[int], answer: list[int]) -> list[float]:
    """For each token of an answer: the target's largest logit minus that token's, one at a time."""
    cache, gaps, new = DynamicCache(config=target.model.config), [], prompt
    for token in answer:
        ids = torch.tensor([new], device=target.device)
        out = target.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[0, -1].float()  # [V]
        gaps.append((logits.max() - logits[token]).item())
        new = [token]
    return gaps


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
