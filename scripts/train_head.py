"""Train a draft head for a target: reference head first, then the draft head (AdaSPEC).

    python scripts/train_head.py --target phi-2
    python scripts/train_head.py --data answers.jsonl.gz --epochs 3 --out runs/mine
    python scripts/train_head.py --out runs/mine --resume

Without --data the target writes its own prompts and answers. After Ctrl-C or a kill, --resume goes
on from the last checkpoint.
"""

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path

from adaspec_eagle.errors import command_line, run_main
from adaspec_eagle.head import read_config
from adaspec_eagle.losses import LOSSES
from adaspec_eagle.selection import SELECTIONS
from adaspec_eagle.targets import ALIASES
from adaspec_eagle.train import METHODS, SCHEDULES, TrainConfig, kind_of, run_training

HELP = {
    "target": f"one of {', '.join(ALIASES)}; a hub id; a folder",
    "data": "JSON Lines of answers (make_data.py); without it the target writes them itself",
    "tokens": "answer tokens to write where no --data is given",
    "method": f"preset of --select and --shallow: {', '.join(METHODS)}",
    "loss": f"{', '.join(LOSSES)}, feature; a sum fkl=1,tv=0.5; or path.py:name (by the head)",
    "select": f"{', '.join(SELECTIONS)}, or path.py:name; by default as the method says",
    "keep": "the fraction k of tokens that a selection trains on",
    "reference": "folder of a reference head to use instead of training one",
    "init": "folder of a head to start the draft head from",
    "fresh_vocab": "count the draft vocabulary of --init anew, from the data",
    "head": "eagle1, eagle3, medusa; lm:NAME, a small LM of the same tokenizer; lm:layers=4, the "
    "target's first layers; a dotted module or a path.py",
    "unroll": "training steps on the head's own hidden states (eagle3 3, eagle1 1); medusa: "
    "blocks (4)",
    "shallow": "share of the optimiser steps that unroll once only, for 0.4 to 0.5 of the work",
    "decay": "weight of step s is decay^s",
    "draft_vocab": "size of the draft vocabulary",
    "train_output": "output rows of the head's own instead of the target's, frozen",
    "mask_oov": "leave out tokens whose target argmax is outside the draft vocabulary (EAGLE)",
    "epochs": "passes over the data for the draft head",
    "reference_epochs": "passes for the reference head (as many as --epochs)",
    "start": "target: a fresh head takes the target's last layer where it fits; or random",
    "optimizer": "muon (AdamW for what is no matrix; the default), or adamw (under ZeRO)",
    "lr": "peak learning rate (muon 3e-3, adamw 1e-3)",
    "schedule": f"of the learning rate behind its warm-up: {', '.join(SCHEDULES)}",
    "batch_size": "records of a micro-batch",
    "accumulate": "micro-batches of a step",
    "gradient_checkpointing": "compute a step's activations again for its gradient: less memory",
    "max_length": "tokens of a record, prompt included; longer answers are cut",
    "held_back": "records kept for evaluation, at most a tenth",
    "report_to": "trackers of the Trainer: tensorboard (the default), wandb, mlflow, ...",
    "evaluations": "evaluations and checkpoints of a stage",
    "take": "the weights that a stage ends with: best (by tau_sim on held-back records) or last",
    "on_policy": "share of the answers that the head rewrites, anew each epoch from the second on",
    "features": "memory, disk, recompute or a folder of make_data.py --write-features; by size",
    "seed": "of weights, batches and self-written data",
    "dtype": "bfloat16, float32 or float64; by default what the device computes natively",
    "device": "cpu, cuda, cuda:1, ...",
    "attn": "attention of the target: sdpa, eager, flash_attention_2 (needs flash-attn)",
}


def parser() -> argparse.ArgumentParser:
    """One flag a field of TrainConfig."""
    made = command_line(__doc__)
    for option in fields(TrainConfig):
        flag, note = "--" + option.name.replace("_", "-"), HELP[option.name]
        default = getattr(TrainConfig(), option.name)
        if isinstance(default, bool):
            made.add_argument(flag, action="store_true", help=note)
        elif isinstance(default, list):
            made.add_argument(flag, nargs="+", default=[], help=note)
        else:
            shown = "" if default is None else f" (default {default})"
            made.add_argument(flag, type=kind_of(option), default=default, help=note + shown)
    made.add_argument("--out", type=Path, help="folder of the run (runs/TARGET-HEAD-METHOD)")
    made.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return made


def main(argv: list[str] | None = None) -> int:
    """Train; print the draft head's folder on the last line."""
    options = vars(parser().parse_args(argv))
    out, resume = options.pop("out"), options.pop("resume")
    config = TrainConfig(**options)
    if out is None:
        name = Path(config.target).name
        out = Path("runs") / f"{name}-{Path(config.head).stem.replace(':', '-')}-{config.method}"
    folder = run_training(config, out, resume)
    trained = read_config(folder).target  # a run that is resumed names it, and no option does
    words = [] if trained == TrainConfig.target else ["--target", trained]
    words = shlex.join([*words, "--head", str(folder)])
    print(f"head: {folder}\nmeasure it: python eval/speedup.py --tree {words}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
