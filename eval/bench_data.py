"""Is our answering loop faster than `model.generate`? Same prompts, batches, process, weights.

    python eval/bench_data.py                       256 self-written prompts, batches of 64
    python eval/bench_data.py --ignore-eos          every answer equally long: nothing to drop
    python eval/bench_data.py --dtype float32       answers must be equal, or the exit status is 1

Arms: `generate` is transformers' own loop (greedy, stock attention, DynamicCache, left padding), to
which ended rows cost as much as running ones; `ours` is `adaspec_eagle.generate` without a head.
Both decode batch by batch in turn (A B, B A, ...) after a short warm-up. tokens/s counts answer
tokens up to the end token over wall time, prefill included; the ratio has a 95 % bootstrap interval
over batches. In float32 an answer may differ where the target's two largest logits are within 1e-4
of each other: such ties are counted apart. The last line of stdout is the result as JSON.
"""

import argparse
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from adaspec_eagle import bench
from adaspec_eagle.asks import Ask, Settings, batches, tokenise
from adaspec_eagle.data import Prompt, read_prompts
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.generate import generate
from adaspec_eagle.measure import greedy_baseline
from adaspec_eagle.record import bootstrap_ratio, environment, one_line, write_json
from adaspec_eagle.rescore import Difference, difference
from adaspec_eagle.selfdata import write_prompts
from adaspec_eagle.targets import DEFAULT_TARGET, Target, describe, left_padded

WARM_UP = 4  # tokens
EXACT = (torch.float32, torch.float64)


@dataclass
class Arm:
    """One way to decode: ids and mask `[B, T]`, new tokens -> trimmed answers."""

    name: str
    decode: Callable[[Tensor, Tensor, int], list[list[int]]]
    seconds: list[float] = field(default_factory=list)  # by batch
    answers: list[list[list[int]]] = field(default_factory=list)  # by batch

    @property
    def tokens(self) -> list[int]:
        """Answer tokens by batch."""
        return [sum(map(len, batch)) for batch in self.answers]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--target", default=DEFAULT_TARGET, help="alias, hub id or folder (%(default)s)")
    add("--prompts", help="JSON Lines file (default: the target writes them)")
    add("--limit", type=bench.positive, default=256, help="number of prompts (%(default)s)")
    add("--batch-size", type=bench.positive, default=64, help="(%(default)s)")
    add("--max-new-tokens", type=bench.positive, default=224, help="(%(default)s)")
    add("--ignore-eos", action="store_true", help="no answer ends before --max-new-tokens")
    add("--dtype", help="bfloat16, float32, float64 (by device)")
    add("--seed", type=int, default=0, help="of self-written prompts (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="write the result as JSON, batch by batch")
    return parser.parse_args(argv)


def prompts_for(args: argparse.Namespace, target: Target) -> list[Prompt]:
    """As many different prompts as asked for."""
    if args.prompts:
        prompts = read_prompts(args.prompts, args.limit)
    else:
        prompts, seen, number = [], set(), 0
        while len(prompts) < args.limit and number < 2 + 2 * args.limit // 64:
            prompts += write_prompts(target, number, seen, seed=args.seed).kept
            number += 1
    if len(prompts) < args.limit:
        raise UserError(f"{len(prompts)} prompts, {args.limit} wanted: lower --limit")
    return prompts[: args.limit]


def make_arms(target: Target) -> list[Arm]:
    """transformers' loop and ours."""
    return [
        Arm("generate", lambda ids, mask, new: greedy_baseline(target, new, ids, mask)[0]),
        Arm("ours", lambda ids, mask, new: generate(target, None, ids, mask, "chain", new).answers),
    ]


def endless(target: Target) -> Target:
    """The same target, to which no token is an end token."""
    made = copy.copy(target)
    made.eos_token_ids = []
    return made


def run(arms: list[Arm], target: Target, plan: list[list[Ask]], new: int) -> None:
    """Decode every batch with every arm, in alternating order."""
    for arm in arms:
        arm.decode(*left_padded(target, [ask.ids for ask in plan[0]]), WARM_UP)
    console = Console(stderr=True)
    for turn, batch in enumerate(track(plan, "batches", console=console)):
        ids, mask = left_padded(target, [ask.ids for ask in batch])  # [B, T]
        for arm in arms if turn % 2 == 0 else arms[::-1]:
            began = time.perf_counter()
            arm.answers.append(arm.decode(ids, mask, new))
            arm.seconds.append(time.perf_counter() - began)


def differences(target: Target, plan: list[list[Ask]], arms: list[Arm]) -> list[Difference]:
    """The first difference of each answer that differs."""
    stock, ours = ([row for batch in arm.answers for row in batch] for arm in arms)
    asks = [ask for batch in plan for ask in batch]
    found = []
    for ask, a, b in zip(asks, stock, ours, strict=True):
        if a != b:
            asked = bench.Prompt(ask.prompt["id"], ask.prompt["task"], "", [], ask.ids)
            found.append(difference(target, asked, a, b))
    return found


def result_of(
    args: argparse.Namespace, target: Target, arms: list[Arm], apart: list[Difference]
) -> dict:
    """Everything that is reported; `apart` has an entry for each answer that differs."""
    stock, ours = arms
    lengths = [len(answer) for batch in stock.answers for answer in batch]
    columns = np.array([stock.tokens, stock.seconds, ours.tokens, ours.seconds]).T  # [batches, 4]
    p10, p50, p90 = np.percentile(lengths, [10, 50, 90])
    return {
        "kind": "bench_data",
        "target": target.name,
        "fingerprint": target.fingerprint,
        "dtype": str(target.dtype).removeprefix("torch."),
        "prompts": len(lengths),
        "prompts_from": args.prompts or f"self, seed {args.seed}",
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "ignore_eos": args.ignore_eos,
        "answer_tokens": {"p10": p10, "p50": p50, "p90": p90},
        "arms": {
            arm.name: {
                "tokens_per_s": sum(arm.tokens) / sum(arm.seconds),
                "tokens": arm.tokens,
                "seconds": arm.seconds,
            }
            for arm in arms
        },
        "ratio": float(ratio(columns.sum(0))),
        "ratio_ci95": bootstrap_ratio(columns, ratio),
        "matched": len(lengths) - len(apart),
        "ties": sum(one.tie for one in apart),
        "total": len(lengths),
        "margins_at_first_difference": [one.margin for one in apart],
        "environment": environment(),
    }


def ratio(sums: np.ndarray) -> float:
    """Our tokens/s over transformers', from sums of (tokens, seconds, our tokens, our seconds)."""
    return (sums[2] / sums[3]) / (sums[0] / sums[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Load, decode, print, record."""
    args = parse(argv)
    target = Target.load(args.target, dtype=args.dtype)
    print(describe(target))
    settings = Settings(max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
    prompts = prompts_for(args, target)
    decoded = endless(target) if args.ignore_eos else target
    plan = list(batches(tokenise(target, prompts, settings, Counter()), settings))
    arms = make_arms(decoded)
    run(arms, decoded, plan, args.max_new_tokens)
    result = result_of(args, target, arms, differences(target, plan, arms))
    for arm in arms:
        print(f"{arm.name:>9}: {result['arms'][arm.name]['tokens_per_s']:8.1f} tokens/s")
    low, high = result["ratio_ci95"]
    print(f"    ratio: {result['ratio']:8.2f} [{low:.2f}, {high:.2f}]")
    ties = f", {result['ties']} more but for a tie" if target.dtype in EXACT else ""
    print(f"    equal: {result['matched']} of {result['total']} answers{ties}")
    if args.out:
        write_json(args.out, result)
    print(one_line(result))
    wrong = result["total"] - result["matched"] - result["ties"]
    return 1 if wrong and target.dtype in EXACT else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
