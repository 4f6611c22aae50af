"""Features from a store against features computed again: seconds an epoch, GiB, memory, tau_sim.

    python eval/bench_features.py --data runs/data/gsm8k.jsonl.gz

Plain distillation of a head on the first --records records, in a process for each arm, one after
the other: `recompute` runs the target for every batch, `memory` once before the first epoch,
`bfloat16` and `int8` read stores that make_data.py's writer made in a process before that (its
seconds are the arm's `beforehand`, its memory does not count). An epoch's seconds are those of the
training loop, one evaluation and two checkpoints included, over --epochs. Memory is the highest
resident size of the process. tau_sim is that of the trained head on held-back answers with features
that the target computes: what int8 costs. The last line of stdout is the result as JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from adaspec_eagle.bench import positive
from adaspec_eagle.data import append_jsonl, load_training, read_jsonl
from adaspec_eagle.distill import teacher_forced
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.feature_store import FORMS
from adaspec_eagle.head import head_class, load_head
from adaspec_eagle.prepare import split_records, write_store
from adaspec_eagle.record import environment, markdown_table, one_line, write_json
from adaspec_eagle.targets import DEFAULT_TARGET, Target
from adaspec_eagle.train import TrainConfig, run_training
from adaspec_eagle.watch import peak_bytes

ARMS = ("recompute", "memory", *FORMS)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--target", default=DEFAULT_TARGET, help="alias, hub id or folder (%(default)s)")
    add("--data", required=True, metavar="FILE", help="answers of this target")
    add("--records", type=positive, default=96, help="the first so many (%(default)s)")
    add("--head", default="eagle3", help="(%(default)s)")
    add("--epochs", type=positive, default=2, help="(%(default)s)")
    add("--held-back", type=positive, default=8, help="records (%(default)s)")
    add("--max-length", type=positive, default=512, help="(%(default)s)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="(all)")
    add("--out", type=Path, metavar="FILE", help="write the result as JSON")
    add("--worker", nargs=3, metavar=("TASK", "ARM", "DIR"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def write(args: argparse.Namespace, arm: str, folder: Path) -> dict:
    """The store of an arm in a folder that has data.jsonl: its figures."""
    target = Target.load(args.target)
    data = folder / "data.jsonl"
    records = load_training([data], target, min(args.max_length, target.context))
    layers = head_class(args.head).feature_layers(target.num_layers)
    began = time.perf_counter()
    write_store(target, records, layers, folder / arm, arm)
    return {"beforehand_s": time.perf_counter() - began}


def train(args: argparse.Namespace, arm: str, folder: Path) -> dict:
    """One arm in a folder that has data.jsonl, and the store where it reads one: its figures."""
    data, store, beforehand = folder / "data.jsonl", folder / arm, 0.0
    config = TrainConfig(
        target=args.target,
        data=[str(data)],
        method="distillspec",
        head=args.head,
        epochs=float(args.epochs),
        evaluations=1,
        held_back=args.held_back,
        max_length=args.max_length,
        features=str(store) if arm in FORMS else arm,
    )
    made = run_training(config, folder / f"run-{arm}")
    peak = peak_bytes(torch.device("cpu"))
    notes = json.loads((made / "train.json").read_text())
    files = [file.stat().st_size for file in store.glob("*")] if arm in FORMS else []
    if arm == "memory":
        beforehand = notes["data"]["feature_seconds"]
    return {
        "beforehand_s": beforehand,
        "epoch_s": notes["seconds_since_last_start"] / args.epochs,
        "gib": sum(files) / 2**30,
        "peak_gb": peak / 1e9,
        "answer_tokens": notes["data"]["answer_tokens"],
        "tau_sim": exact_tau(args, made, data),
    }


def exact_tau(args: argparse.Namespace, made: Path, data: Path) -> float:
    """tau_sim on the held-back records, the target computing their features."""
    target = Target.load(args.target)
    records = load_training([data], target, min(args.max_length, target.context))
    _, held = split_records(records, args.held_back)
    return teacher_forced(target, load_head(made, target), held, 3)["tau_sim"]


TASKS = {"write": write, "train": train}


def run(task: str, arm: str, given: list[str], folder: str) -> dict:
    """The figures of one task in a process of its own, whose memory is the task's alone."""
    command = [sys.executable, __file__, *given, "--worker", task, arm, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"arm {arm} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the arms one after the other, print the table."""
    args = parse(argv)
    if args.worker:
        task, arm, place = args.worker
        print(one_line(TASKS[task](args, arm, Path(place))))
        return 0
    given, arms = list(sys.argv[1:] if argv is None else argv), {}
    with tempfile.TemporaryDirectory() as folder:
        append_jsonl(Path(folder, "data.jsonl"), islice(read_jsonl(args.data), args.records))
        for arm in args.arms:
            written = run("write", arm, given, folder) if arm in FORMS else {}
            arms[arm] = run("train", arm, given, folder) | written
    result = {
        "kind": "bench_features",
        "arms": arms,
        "pays_from_epoch": pays_from(arms),
        "settings": {k: str(v) for k, v in vars(args).items() if k not in ("out", "worker")},
        "environment": environment(),
    }
    if args.out:
        write_json(args.out, result)
    print(table(result))
    print(one_line(result))
    return 0


def pays_from(arms: dict) -> dict[str, float]:
    """Epochs from which each arm, its seconds beforehand included, is faster than recomputing."""
    again = arms.get("recompute", {}).get("epoch_s", 0.0)
    return {
        name: arm["beforehand_s"] / (again - arm["epoch_s"])
        for name, arm in arms.items()
        if again > arm["epoch_s"]
    }


def table(result: dict) -> str:
    """The result as Markdown."""
    rows = [
        [
            name,
            f"{arm['beforehand_s']:.1f}",
            f"{arm['epoch_s']:.1f}",
            f"{arm['gib']:.3f}" if arm["gib"] else "-",
            f"{arm['peak_gb']:.2f}",
            f"{arm['tau_sim']:.3f}",
            f"{result['pays_from_epoch'][name]:.1f}" if name in result["pays_from_epoch"] else "-",
        ]
        for name, arm in result["arms"].items()
    ]
    header = ["features", "s beforehand", "s an epoch", "GiB on disk", "peak GB", "tau_sim"]
    return markdown_table([*header, "pays from epoch"], rows)


if __name__ == "__main__":
    sys.exit(run_main(main))
