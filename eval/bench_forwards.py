"""What a forward of the target and a level of drafting cost, by how many tokens they take in.

    python eval/bench_forwards.py
    python eval/bench_forwards.py --target qwen3-4b --head runs/mine/head --rows 8 --compile
    python eval/bench_forwards.py --random phi-2 --out results/forwards-phi2

These seconds are what trees live on: n tokens verified at once have to cost less than n forwards.
--random builds a model of real size with random weights, where its own cannot be had: its times are
right, and nothing else is. Sizes alternate; a figure is the median of all turns.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PhiConfig, PreTrainedConfig

from adaspec_eagle import load_head
from adaspec_eagle.auto import SIZES, time_draft, time_target
from adaspec_eagle.bench import find_head, positive
from adaspec_eagle.compiled import check_compiler, decoding_mode, target_call
from adaspec_eagle.errors import UserError, command_line, explain_out_of_memory, run_main
from adaspec_eagle.head import DraftHead, HeadConfig, new_head
from adaspec_eagle.record import check_folder, environment, markdown_table, one_line, write_json
from adaspec_eagle.targets import (
    DEFAULT_TARGET,
    Target,
    default_device,
    default_dtype,
    describe,
    parse_dtype,
)

WIDTHS = (1, 4, 8, 16)  # nodes of a level
DRAFT_VOCAB = 32_000  # of a head with random weights, as EAGLE-3's are
REAL_SIZES: dict[str, PreTrainedConfig] = {
    "phi-2": PhiConfig(
        vocab_size=51_200,
        hidden_size=2560,
        intermediate_size=10_240,
        num_hidden_layers=32,
        num_attention_heads=32,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.4,
        },
        max_position_embeddings=2048,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=131_072,
    ),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    add = made.add_argument
    add("--target", default=DEFAULT_TARGET, help="alias, hub id or folder (%(default)s)")
    add("--random", metavar="NAME|DIR", help="instead: random weights in the size of "
        f"{', '.join(REAL_SIZES)}, or of the config.json in a folder")  # fmt: skip
    add("--head", type=Path, metavar="DIR", help="default: the newest for this target; with "
        "--random an EAGLE-3 head with random weights")  # fmt: skip
    add("--rows", type=positive, default=1, help="sequences at once (%(default)s)")
    add("--turns", type=positive, default=3, help="of all sizes, one after the other (%(default)s)")
    add("--compile", action="store_true", help="compiled forwards (CPU), CUDA graphs (GPU)")
    add("--dtype", help="bfloat16, float32, float64; by default what the device computes natively")
    add("--out", type=Path, metavar="DIR", help="folder for result.json")
    return made


def random_target(name: str, dtype: str | None) -> Target:
    """A target of real size whose weights are drawn; UserError for a size that is not known."""
    config = REAL_SIZES.get(name)
    if config is None:
        if not (Path(name) / "config.json").is_file():
            known = ", ".join(REAL_SIZES)
            raise UserError(f"--random {name}: give {known}, or a folder with a config.json")
        config = AutoConfig.from_pretrained(name)
    place = default_device()
    with torch.device(place), torch.random.fork_rng():
        torch.manual_seed(0)
        wanted = parse_dtype(dtype) or default_dtype(place)
        model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    return Target.wrap(model, name=f"{Path(name).name} (random weights)")


def random_head(target: Target) -> DraftHead:
    """An EAGLE-3 head for the target, drawn too."""
    ids = torch.arange(min(DRAFT_VOCAB, target.vocab_size))
    head = new_head(HeadConfig.for_target("eagle3", target, len(ids)))
    head.set_draft_vocab(ids)
    return head.to(target.dtype).eval().bind(target)


def measure(
    target: Target, head: DraftHead, rows: int, turns: int, compiled: bool
) -> tuple[dict[int, float], dict[int, float]]:
    """Median seconds of a forward by new tokens a row, and of a level by its width."""
    forward = target_call(target, tuple(head.config.feature_layers), compiled)
    forwards: dict[int, list[float]] = {size: [] for size in SIZES}
    levels: dict[int, list[float]] = {width: [] for width in WIDTHS}
    with decoding_mode(target.device, compiled):
        for _ in range(turns):
            for size, found in forwards.items():
                found.append(time_target(target, forward, rows, size))
            for width, found in levels.items():
                found.append(time_draft(head, rows, width, compiled))
    return (
        {size: median(found) for size, found in forwards.items()},
        {width: median(found) for width, found in levels.items()},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record."""
    args = parser().parse_args(argv)
    if args.out:
        check_folder(args.out)
    if args.compile:
        check_compiler(default_device())
    with explain_out_of_memory("Take a smaller model or fewer --rows"):
        if args.random:
            target = random_target(args.random, args.dtype)
        else:
            target = Target.load(args.target, dtype=args.dtype)
        if args.random and not args.head:
            head = random_head(target)
        else:
            head = load_head(args.head or find_head(target).folder, target)
        print(describe(target))
        forwards, levels = measure(target, head, args.rows, args.turns, args.compile)
    read = sum(w.numel() * w.element_size() for w in target.model.parameters())
    result = {
        "kind": "forwards",
        "target": target.name,
        "random_weights": bool(args.random),
        "dtype": str(target.dtype).removeprefix("torch."),
        "rows": args.rows,
        "compiled": args.compile,
        "weight_bytes": read,
        "head_weights": sum(weight.numel() for weight in head.parameters()),
        "forward_seconds": forwards,
        "level_seconds": levels,
        "environment": environment(),
    }
    one = forwards[1]
    rows = [
        [n, f"{1e3 * t:.2f}", f"{t / one:.2f}", f"{n * one / t:.2f}"] for n, t in forwards.items()
    ]
    console = Console()
    titles = ["tokens a row", "forward, ms", "t(n) / t(1)", "n t(1) / t(n)"]
    console.print(markdown_table(titles, rows), markup=False, soft_wrap=True)
    rows = [[n, f"{1e3 * t:.2f}", f"{t / one:.2f}"] for n, t in levels.items()]
    titles = ["nodes of a level", "level, ms", "of a forward"]
    console.print("\n" + markdown_table(titles, rows), markup=False, soft_wrap=True)
    marked = " Weights are random: times only." if args.random else ""
    console.print(
        f"\n{read / 1e9:.2f} GB of weights, read at {read / one / 1e9:.0f} GB/s by a forward of "
        f"one token.{marked}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if args.out:
        write_json(args.out / "result.json", result)
    print(one_line(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
