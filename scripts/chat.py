"""Chat with a target and its draft head; accepted draft tokens are green, the target's own plain.

    python scripts/chat.py
    python scripts/chat.py --target phi-2 --head runs/phi-2-mine/head --temperature 0.7
    echo "Why is the sky blue?" | python scripts/chat.py --no-draft

Ctrl-C stops an answer, Ctrl-D (the end of the input) the program.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from adaspec_eagle.bench import HeadChoice, find_head, positive
from adaspec_eagle.chat import Chat
from adaspec_eagle.draft import Shape, parse_shape
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.head import load_head
from adaspec_eagle.sampling import Sampler, warpers
from adaspec_eagle.targets import DEFAULT_TARGET, Target, describe


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    add = made.add_argument
    add("--target", default=DEFAULT_TARGET, help="alias, hub id or folder (default: %(default)s)")
    add(
        "--head",
        type=Path,
        metavar="DIR",
        help="default: the newest under runs/ for this target, else the one that ships",
    )
    add("--no-draft", action="store_true", help="decode without a head, for comparison")
    add("--tree", default="auto", help="auto, dynamic, static, chain:K (default: %(default)s)")
    add("--max-new-tokens", type=positive, default=256, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--system", help="a system message to begin with")
    add("--dtype", help="bfloat16, float32, float64")
    add("--allow-other-target", action="store_true", help="use a head made for other weights")
    return made


def lines(console: Console) -> Iterator[str]:
    """Questions: from the keyboard with a prompt, else the lines of standard input."""
    while True:
        try:
            line = (
                console.input("\n[bold]> [/bold]") if sys.stdin.isatty() else sys.stdin.readline()
            )
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n(Ctrl-D ends the program)", style="dim")
            continue
        if not sys.stdin.isatty() and not line:
            return
        yield line


def check(args: argparse.Namespace) -> Shape:
    """The tree; raises UserError for options out of range."""
    shape = parse_shape(args.tree)
    if shape.sampled and args.temperature == 0:
        raise UserError(f"--tree {args.tree} samples its drafts: give a --temperature above 0")
    warpers(args.temperature, top_p=args.top_p)
    Sampler([], seed=args.seed)
    return shape


def main(argv: list[str] | None = None) -> int:
    """Load, then answer until the input ends."""
    args = parser().parse_args(argv)
    shape, console = check(args), Console(highlight=False)
    target = Target.load(args.target, dtype=args.dtype)
    console.print(describe(target), style="dim", markup=False)
    head = None
    if not args.no_draft:
        choice = HeadChoice(args.head, "--head") if args.head else find_head(target)
        head = load_head(choice.folder, target, args.allow_other_target)
        console.print(f"head: {choice.folder} ({choice.why})", style="dim", markup=False)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "allow_other_target": args.allow_other_target,
    }
    messages = [{"role": "system", "content": args.system}] if args.system else []
    chat = Chat(target, head, shape, console, options, messages)
    chat.check()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text: told, and go on
    chat.run(lines(console))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
