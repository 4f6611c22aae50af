"""Make training data: prompts from files, hub sets or the target itself, answered by the target.

    python scripts/make_data.py --target smollm2-135m --prompts self --out self.jsonl
    python scripts/make_data.py --prompts a.jsonl.gz --exclude eval/prompts.jsonl --out data.jsonl
    python scripts/make_data.py --data data.jsonl more.jsonl.gz --write-features runs/features

Run the same command again after a kill: it goes on where it was. --write-features writes what heads
read from the target (chosen layers, last hidden state), for train_head.py --features; no logits.
"""

import argparse
import math
import sys
from pathlib import Path

from adaspec_eagle.answers import answer_prompts, answer_self, give_answers
from adaspec_eagle.apart import Measured
from adaspec_eagle.asks import Settings, Tally
from adaspec_eagle.data import Prompt, load_training, read_prompts
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.feature_store import FORMS
from adaspec_eagle.head import head_class
from adaspec_eagle.hub import HUB_SETS, task_prompts
from adaspec_eagle.prepare import write_store
from adaspec_eagle.sampling import MAX_SEED
from adaspec_eagle.targets import DEFAULT_TARGET, Target, describe
from adaspec_eagle.train import TrainConfig

SELF_TOKENS = 200_000


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--target", default=DEFAULT_TARGET, help="alias, hub id or folder (%(default)s)")
    add("--prompts", nargs="+", default=["self"], metavar="FILE|TASK|self", help="(self)")
    add("--out", type=Path, help="JSON Lines file to write or to go on with")
    add("--answers", choices=["target", "given"], default="target", help="(%(default)s)")
    add("--tokens", type=int, help=f"stop at so many answer tokens ({SELF_TOKENS} for self)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    add("--max-new-tokens", type=int, default=224, help="per answer (%(default)s)")
    add("--max-prompt-tokens", type=int, help="drop longer prompts (what the context allows)")
    add("--batch-size", type=int, default=64, help="rows decoded together (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--exclude", nargs="+", default=[], metavar="FILE", help="measuring files to stay clear of")
    add("--limit", type=int, help="use the first so many prompts of each source")
    add("--dtype", help="bfloat16, float32, float64 (by device)")
    add("--write-features", type=Path, metavar="DIR", help="of --out, or of --data, to a store")
    add("--data", nargs="+", default=[], metavar="FILE", help="answers that are there already")
    add("--feature-dtype", choices=FORMS, default=FORMS[0], help="int8 is half (%(default)s)")
    add(
        "--max-length",
        type=int,
        default=TrainConfig.max_length,
        help="as for training (%(default)s)",
    )
    add("--head", default=TrainConfig.head, help="whose layers to write (%(default)s)")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    for name in ("tokens", "max_new_tokens", "max_prompt_tokens", "batch_size", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature must be 0 or more, and finite, not {args.temperature}")
    if not 0 <= args.seed < MAX_SEED:
        raise UserError(f"--seed must be from 0 to {MAX_SEED - 1}, not {args.seed}")
    tokens = SELF_TOKENS if args.tokens is None and "self" in args.prompts else args.tokens
    return Settings(
        tokens=tokens,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
        exclude=Measured(args.exclude) if args.exclude else None,
    )


def prompts_of(source: str, limit: int | None) -> list[Prompt]:
    """Prompts of a file, or of a hub set's training part by its task name."""
    if source in HUB_SETS and not Path(source).is_file():
        return task_prompts(source, limit, split="train")
    if not Path(source).exists() and not Path(source).suffix:
        raise UserError(
            f"--prompts {source}: no such file, and not one of self, {', '.join(HUB_SETS)}"
        )
    return read_prompts(source, limit)


def make(args: argparse.Namespace, settings: Settings) -> Tally:
    if "self" in args.prompts:
        if len(args.prompts) > 1 or args.answers == "given" or args.limit:
            raise UserError(
                "--prompts self stands alone, is answered by the target, has no --limit"
            )
        target = load(args)
        return answer_self(target, args.out, settings, print)
    prompts = [prompt for source in args.prompts for prompt in prompts_of(source, args.limit)]
    run = give_answers if args.answers == "given" else answer_prompts
    return run(load(args), prompts, args.out, settings, print)


def load(args: argparse.Namespace) -> Target:
    target = Target.load(args.target, dtype=args.dtype)
    print(describe(target))
    return target


def features(args: argparse.Namespace) -> None:
    target = load(args)
    layers = head_class(args.head).feature_layers(target.num_layers)
    length = min(args.max_length, target.context)
    records = load_training(args.data or [args.out], target, length)
    store = write_store(target, records, layers, args.write_features, args.feature_dtype)
    print(f"{store.folder}: train on it with --features {store.folder} --max-length {length}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.data and not (args.write_features and args.out is None):
        raise UserError("--data goes with --write-features and without --out")
    if not args.data and args.out is None:
        raise UserError("give --out FILE to write answers to, or --data FILES --write-features DIR")
    if args.out:
        tally = make(args, settings_of(args))
        print(f"{args.out}: {tally.records} records, {tally.tokens:,} answer tokens")
        if tally.seconds:
            print(
                f"this run: {tally.new_records} records, {tally.ended} ended by themselves,"
                f" {tally.new_tokens / tally.seconds:.0f} tokens/s"
            )
    if args.write_features:
        features(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
