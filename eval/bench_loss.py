"""The loss in chunks against the plain one: seconds, peak memory, and what fits.

    python eval/bench_loss.py                                        the default sizes
    python eval/bench_loss.py --vocab 131072 --tokens 4096 --hidden 2048 --steps 1 --limit-gb 8

Value and gradient of hidden states -> draft logits -> loss against the target's logits, for all
unroll steps. `plain` makes all logits and leaves the gradient to autograd; `chunked` is
fused.chunked_losses. Each run is a process of its own, alternating; memory is the highest resident
size while it works, less what it had before. With --limit-gb a run may not map more than that: one
that asks for more is reported as not fitting. The last line of stdout is the result as JSON.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from adaspec_eagle.bench import positive
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.fused import Output, chunked_losses
from adaspec_eagle.losses import LOSSES
from adaspec_eagle.record import environment, markdown_table, one_line, write_json
from adaspec_eagle.watch import peak_bytes

ARMS = ("plain", "chunked")
TOO_LARGE = 3  # exit status of a run that does not fit


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--tokens", type=positive, default=2040, help="supervised tokens (%(default)s)")
    add("--hidden", type=positive, default=576, help="hidden size (%(default)s)")
    add("--vocab", type=positive, default=8192, help="draft vocabulary (%(default)s)")
    add("--steps", type=positive, default=3, help="unroll steps (%(default)s)")
    add("--loss", choices=LOSSES, default="fkl", help="(%(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)")
    add("--times", type=positive, default=5, help="in one run (%(default)s)")
    add("--runs", type=positive, default=3, help="of each arm (%(default)s)")
    add("--limit-gb", type=float, help="address space of a run")
    add("--out", type=Path, metavar="FILE", help="write the result as JSON")
    add("--arm", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def plain_losses(
    loss: str,
    hidden: torch.Tensor,
    draft: Output,
    known: torch.Tensor,
    target: Output,
    labels: torch.Tensor,
) -> torch.Tensor:
    """All logits at once, as losses.py defines it: `[S, M]`."""
    logits, rule = target.logits(known).float(), LOSSES[loss]
    return torch.stack([rule(draft.logits(s).float(), logits, labels=labels) for s in hidden])


def work(args: argparse.Namespace) -> dict:
    """One run: the seconds of each time, and the memory it took (MB)."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.steps, args.tokens, args.hidden).to(dtype).requires_grad_()
    known, rows = torch.randn(args.tokens, args.hidden), torch.randn(args.vocab, args.hidden)
    known, output = known.to(dtype), Output((args.hidden**-0.5 * rows).to(dtype))
    labels = torch.randint(args.vocab, (args.tokens,))
    del rows
    before, seconds = psutil.Process().memory_info().rss, []
    if args.limit_gb:
        resource.setrlimit(resource.RLIMIT_AS, (int(args.limit_gb * 1e9),) * 2)
    for _ in range(args.times):
        began = time.perf_counter()
        given = (args.loss, hidden, output, known, output)
        if args.arm == "plain":
            losses = plain_losses(*given, labels)
        else:
            losses = chunked_losses(*given, labels=labels)[0]
        losses.sum().backward()
        seconds.append(time.perf_counter() - began)
    peak = peak_bytes(torch.device("cpu"))
    return {"seconds": seconds[1:] or seconds, "mb": max(0.0, peak - before) / 1e6}


def run(arm: str, given: list[str]) -> dict | None:
    """The result of one run in a process of its own; None if it does not fit."""
    command = [sys.executable, __file__, *given, "--arm", arm]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == TOO_LARGE:
        return None
    if done.returncode:
        raise UserError(f"arm {arm} ended with status {done.returncode}")
    return json.loads(done.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the arms in turn, print the table."""
    args = parse(argv)
    if args.arm:
        try:
            print(json.dumps(work(args)))
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                raise
            return TOO_LARGE
        return 0
    given = list(sys.argv[1:] if argv is None else argv)
    runs = [(arm, run(arm, given)) for _ in range(args.runs) for arm in ARMS]
    arms: dict[str, dict | None] = {}
    for arm in ARMS:
        mine = [found for name, found in runs if name == arm and found]
        arms[arm] = None
        if mine:
            middle = statistics.median([s for found in mine for s in found["seconds"]])
            peak = max(found["mb"] for found in mine)
            arms[arm] = {"tokens_per_s": args.tokens / middle, "seconds": middle, "mb": peak}
    result = {
        "kind": "bench_loss",
        "arms": arms,
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "arm")},
        "environment": environment(),
    }
    if args.out:
        write_json(args.out, result)
    cells = [
        [name, *(f"{arm[key]:,.0f}" for key in ("tokens_per_s", "mb"))]
        if arm
        else [name, "does not fit", ""]
        for name, arm in arms.items()
    ]
    print(markdown_table(["loss", "tokens/s", "peak MB"], cells))
    print(one_line(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
