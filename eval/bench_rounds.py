"""What a round costs beside the forwards of target and head, as the context grows.

    python eval/bench_rounds.py
    python eval/bench_rounds.py --contexts 256 1024 4096 7900 --rounds 40 --out results/rounds

Decodes behind prompts of random tokens (their text does not matter here) with the auto tree and
takes the time inside the forwards of target and head away from that of the rounds. Contexts
alternate; the figure is a median over answers, of each its mean over rounds.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from adaspec_eagle import generate, load_head
from adaspec_eagle.bench import find_head, positive
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.head import DraftHead
from adaspec_eagle.record import (
    check_folder,
    environment,
    markdown_table,
    sha256,
    shown,
    write_json,
)
from adaspec_eagle.storage import weights_file
from adaspec_eagle.targets import DEFAULT_TARGET, Target, describe

ANSWER = 40  # tokens of an answer: fewer rounds than after which drafting may be given up


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


def own_costs(
    target: Target, head: DraftHead, context: int, tokens: int, tree: str
) -> tuple[int, float, float]:
    """Of an answer behind `context` random tokens: rounds, own seconds and all seconds of one."""
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(3, target.vocab_size, (1, context), generator=generator)
    new = min(tokens, target.context - context)
    stats = generate(
        target, head, ids.to(target.device), tree=tree, max_new_tokens=new, ignore_eos=True
    ).stats
    wall = sum(stats.seconds.values()) - stats.seconds["prefill"]
    own = wall - stats.forward_seconds
    return stats.rounds, own / stats.rounds, wall / stats.rounds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record."""
    args = parser().parse_args(argv)
    if args.out:
        check_folder(args.out)
    target = Target.load(args.target, dtype=args.dtype)
    room = target.context - max(args.contexts)
    if room < 16:
        raise UserError(
            f"--contexts {max(args.contexts)}: leaves {room} tokens of the target's context of "
            f"{target.context}; at least 16 are needed"
        )
    folder = args.head or find_head(target).folder
    head = load_head(folder, target)
    print(describe(target))
    print(f"head {folder}")
    rounds = dict.fromkeys(args.contexts, 0)
    own: dict[int, list[float]] = {context: [] for context in args.contexts}
    walls: dict[int, list[float]] = {context: [] for context in args.contexts}
    own_costs(target, head, min(args.contexts), 4, args.tree)  # warm-up
    while min(rounds.values()) < args.rounds:
        for context in args.contexts:
            made, costs, time = own_costs(target, head, context, ANSWER, args.tree)
            rounds[context] += made
            own[context].append(costs)
            walls[context].append(time)
    first = median(own[args.contexts[0]])
    rows = [
        [
            f"{context:,}",
            str(rounds[context]),
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
            "target": {
                "name": target.name,
                "fingerprint": target.fingerprint,
                "dtype": str(target.dtype).removeprefix("torch."),
            },
            "head": {"folder": shown(folder), "sha256": sha256(weights_file(folder))},
            "rounds": rounds,
            "own_seconds": own,  # of one round, by answer
            "round_seconds": walls,
            "tree": args.tree,
            "environment": environment(),
        }
        write_json(args.out / "result.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
