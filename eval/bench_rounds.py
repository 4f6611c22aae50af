"""What a round costs beside the forwards of target and head, as the context grows.

    python eval/bench_rounds.py
    python eval/bench_rounds.py --contexts 256 1024 4096 7900 --rounds 40 --out results/rounds

Decodes behind prompts of random tokens (their text does not matter here) and takes the time inside
the forwards of target and head away from that of the rounds. Contexts alternate; the figure is a
median over answers, of each its mean over rounds. The tree is a dynamic one, for which every round
drafts as many levels and verifies as many nodes: an auto tree drafts deeper behind a longer
context, where a forward of the target costs more, so that its rounds differ by more than that.
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
    add("--tree", default="dynamic", help="as in eval/speedup.py, or chain:K (%(default)s)")
    add("--dtype", help="bfloat16, float32, float64; by default what the device computes natively")
    add("--out", type=Path, metavar="DIR", help="folder for result.json")
    return made


def own_costs(
    target: Target, head: DraftHead, context: int, tokens: int, tree: str
) -> tuple[int, dict[str, float]]:
    """Of an answer behind `context` random tokens: its rounds, and what one of them is, on average.

    Seconds of its own, all seconds, depth and nodes of the verified tree.
    """
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(3, target.vocab_size, (1, context), generator=generator)
    new = min(tokens, target.context - context)
    stats = generate(
        target, head, ids.to(target.device), tree=tree, max_new_tokens=new, ignore_eos=True
    ).stats
    wall = sum(stats.seconds.values()) - stats.seconds["prefill"]
    sums = {
        "own_seconds": wall - stats.forward_seconds,
        "round_seconds": wall,
        "depth": sum(stats.offered),
        "nodes": stats.nodes,
    }
    return stats.rounds, {name: part / stats.rounds for name, part in sums.items()}


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
    answers: dict[int, list[dict[str, float]]] = {context: [] for context in args.contexts}
    own_costs(target, head, min(args.contexts), 4, args.tree)  # warm-up
    while min(rounds.values()) < args.rounds:
        for context in args.contexts:
            made, costs = own_costs(target, head, context, ANSWER, args.tree)
            rounds[context] += made
            answers[context].append(costs)
    middle = {
        context: {name: median(costs[name] for costs in made) for name in made[0]}
        for context, made in answers.items()
    }
    first = middle[args.contexts[0]]["own_seconds"]
    rows = [
        [
            f"{context:,}",
            str(rounds[context]),
            f"{costs['depth']:.1f}",
            f"{costs['nodes']:.1f}",
            f"{1e3 * costs['round_seconds']:.1f}",
            f"{1e3 * costs['own_seconds']:.2f}",
            f"{costs['own_seconds'] / first:.2f}",
        ]
        for context, costs in middle.items()
    ]
    titles = [
        "context",
        "rounds",
        "depth",
        "nodes",
        "ms a round",
        "ms of its own",
        "against the first",
    ]
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
            "answers": answers,  # of each what one of its rounds is
            "tree": args.tree,
            "environment": environment(),
        }
        write_json(args.out / "result.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
