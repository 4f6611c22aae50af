"""What a round costs beside the forwards of target and head, as the context grows.

    python eval/bench_rounds.py
    python eval/bench_rounds.py --contexts 256 1024 4096 7900 --rounds 40 --out results/rounds

Decodes behind prompts of random tokens (their text does not matter here) with the auto tree and
takes the time inside the forwards of target and head away from the time of a round. Contexts
alternate; the figure is a median over rounds.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from adaspec_eagle import generate, load_head
from adaspec_eagle.bench import find_head, positive
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.head import DraftHead
from adaspec_eagle.record import environment, markdown_table, write_json
from adaspec_eagle.targets import DEFAULT_TARGET, Target, describe
from adaspec_eagle.watch import synchronize


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    add = made.add_argument
    add("--target", default=DEFAULT_TARGET, help="alias, hub id or folder (%(default)s)")
    add("--head", type=Path, metavar="DIR", help="default: the newest for this target")
    add("--contexts", type=positive, nargs="+", default=[256, 1024, 4096, 7900], metavar="N")
    add("--rounds", type=positive, default=40, help="at least so many each (%(default)s)")
    add("--tree", default="auto", help="as in eval/speedup.py, or chain:K (%(default)s)")
    add("--dtype", help="bfloat16, float32, float64; by default what the device computes natively")
    add("--out", type=Path, metavar="DIR", help="folder for result.json")
    return made


class Inside:
    """Seconds spent inside a callable that it stands in for."""

    def __init__(self, call: Callable[..., Any], device: torch.device) -> None:
        self.call, self.device, self.seconds = call, device, 0.0

    def __call__(self, *args: Any, **more: Any) -> Any:
        """The call itself, timed; on CUDA from and to a moment at which all work is done."""
        synchronize(self.device)
        begin = time.perf_counter()
        try:
            return self.call(*args, **more)
        finally:
            synchronize(self.device)
            self.seconds += time.perf_counter() - begin


def own_costs(
    target: Target, head: DraftHead, context: int, rounds: int, tree: str
) -> tuple[list[float], list[float]]:
    """Of each round behind `context` random tokens: (own seconds, all seconds)."""
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(3, target.vocab_size, (1, context), generator=generator)
    calls = (target.forward, head.forward, head.logits, head.fuse)
    timers = [Inside(call, target.device) for call in calls]
    marks: list[tuple[float, float]] = []

    def watch(row: int, tokens: list[int], drafted: int) -> None:
        marks.append((time.perf_counter(), sum(timer.seconds for timer in timers)))

    target.forward, head.forward, head.logits, head.fuse = timers  # type: ignore[method-assign]
    try:
        new = min(8 * rounds, target.context - context)
        generate(
            target, head, ids.to(target.device), tree=tree, max_new_tokens=new, ignore_eos=True,
            watch=watch,
        )  # fmt: skip
    finally:
        del target.forward, head.forward, head.logits, head.fuse
    walls = [b[0] - a[0] for a, b in zip(marks, marks[1:], strict=False)]
    forwards = [b[1] - a[1] for a, b in zip(marks, marks[1:], strict=False)]
    return [w - f for w, f in zip(walls, forwards, strict=True)], walls


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record."""
    args = parser().parse_args(argv)
    target = Target.load(args.target, dtype=args.dtype)
    room = target.context - max(args.contexts)
    if room < 16:
        raise UserError(
            f"--contexts {max(args.contexts)}: leaves {room} tokens of the target's context of "
            f"{target.context}; at least 16 are needed"
        )
    head = load_head(args.head or find_head(target).folder, target)
    print(describe(target))
    own: dict[int, list[float]] = {context: [] for context in args.contexts}
    walls: dict[int, list[float]] = {context: [] for context in args.contexts}
    own_costs(target, head, min(args.contexts), 4, args.tree)  # warm-up
    while min(map(len, own.values())) < args.rounds:
        for context in args.contexts:
            costs, times = own_costs(target, head, context, max(1, args.rounds // 2), args.tree)
            own[context] += costs
            walls[context] += times
    first = median(own[args.contexts[0]])
    rows = [
        [
            f"{context:,}",
            str(len(own[context])),
            f"{1e3 * median(walls[context]):.1f}",
            f"{1e3 * median(own[context]):.2f}",
            f"{median(own[context]) / first:.2f}",
        ]
        for context in args.contexts
    ]
    titles = ["context", "rounds", "ms a round", "ms of its own", "against the first"]
    Console().print(markdown_table(titles, rows), markup=False, soft_wrap=True)
    if args.out:
        result = {
            "kind": "rounds",
            "own_seconds": own,
            "round_seconds": walls,
            "tree": args.tree,
            "environment": environment(),
        }
        write_json(args.out / "result.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
