"""How fast is training, and how near to what the machine can multiply?

    python eval/bench_training.py                              plain and AdaSPEC steps
    python eval/bench_training.py --speculators DIR            and the `speculators` package, whose
                                                               environment is made in DIR if needed

Random features of a real target, rows of --length tokens, all supervised, through the Distiller
itself: data loading, optimiser and logging are in the step. Each arm is a process of its own that
stands still while another one trains: they take turns, --steps at a time, after a warm-up. Arms:
`plain`; `adaspec`, the reference head's pass in every step; `adaspec ahead`, that pass made once
before the first epoch, as train_head.py does (its seconds, shared by --epochs, are in the rate).

useful FLOP a token counts a plain step's matrix products of head and output rows (2 a weight
forward, 2 for each gradient that is needed), attention left out; for every arm the same number, so
that a reference pass is no useful work. The matrix rate is that of bfloat16 products of the output
layer's shape, measured between the turns. The last line of stdout is the result as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TextIO

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from adaspec_eagle.allocator import keep_freed_memory
from adaspec_eagle.bench import positive
from adaspec_eagle.data import Record
from adaspec_eagle.distill import AnswerSet, Distiller, Objective
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.features import FeatureTable, row_width
from adaspec_eagle.head import DraftHead, HeadConfig, head_class, new_head
from adaspec_eagle.prepare import reference_losses
from adaspec_eagle.record import environment, markdown_table, one_line, write_json
from adaspec_eagle.targets import DEFAULT_TARGET, Target

ARMS = ("plain", "adaspec", "adaspec ahead")
WARM_UP = 3  # steps
NEEDED = ("loguru", "pydantic-settings", "openai", "aiohttp", "httpx", "datasets", "accelerate")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--target", default=DEFAULT_TARGET, help="alias, hub id or folder (%(default)s)")
    add("--head", default="eagle3", help="(%(default)s)")
    add("--rows", type=positive, default=8, help="rows of a step (%(default)s)")
    add("--length", type=positive, default=256, help="tokens of a row (%(default)s)")
    add("--draft-vocab", type=positive, default=8192, help="(%(default)s)")
    add("--unroll", type=positive, default=3, help="training steps of the head (%(default)s)")
    add("--loss", default="fkl", help="(%(default)s)")
    add("--dtype", default="bfloat16", help="(%(default)s)")
    add("--epochs", type=positive, default=3, help="that share one reference pass (%(default)s)")
    add("--steps", type=positive, default=4, help="steps of a turn (%(default)s)")
    add("--turns", type=positive, default=4, help="turns of every arm (%(default)s)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="of ours (all)")
    add("--speculators", type=Path, metavar="DIR", help="virtual environment of that package")
    add("--out", type=Path, metavar="FILE", help="write the result as JSON")
    add("--worker", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---- our arms ------------------------------------------------------------------------------------


class Turns(TrainerCallback):
    """Trains as many steps as each line of stdin asks for; the seconds of each go to `answers`."""

    def __init__(self, answers: TextIO) -> None:
        self.answers = answers
        self.left, self.seconds, self.began = 0, [], 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Wait for a line if none is being worked on."""
        if not self.left:
            self.left, self.seconds = int(sys.stdin.readline() or 0), []
            if not self.left:
                sys.exit(0)
            self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Note the step's end; answer after the last one."""
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.left, self.began = self.left - 1, now
        if not self.left:
            print(json.dumps(self.seconds), file=self.answers, flush=True)


def work(args: argparse.Namespace) -> None:
    """One of our arms, until stdin ends. What libraries print does not reach its answers."""
    answers_out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    keep_freed_memory()
    target = Target.load(args.target, dtype=args.dtype)
    layers = head_class(args.head).feature_layers(target.num_layers)
    count, width = 4 * args.rows, row_width(target, layers)
    torch.manual_seed(0)
    ids = torch.randint(args.draft_vocab, (count, args.length)).tolist()
    records = [Record("", "random", [], row[:1], row[1:], "", None, None) for row in ids]
    rows = torch.randn(count * args.length, width).to(target.dtype)
    table = FeatureTable(rows, [i * args.length for i in range(count + 1)])
    adaspec = args.worker != "plain"
    objective = Objective(args.loss, "adaspec" if adaspec else "none", Decimal("0.4"), args.unroll)
    reference = made_head(args, target, 1).to(target.dtype).eval().bind(target) if adaspec else None
    known, began = None, time.perf_counter()
    if args.worker == "adaspec ahead":
        answers = AnswerSet(records, table)
        *_, (_, known) = reference_losses(target, reference, answers, objective)
    ahead = (time.perf_counter() - began) / count  # seconds a record
    head = made_head(args, target, 0)
    facts = {"useful_flop": useful_flop(head, args), "ahead": ahead}
    print(json.dumps(facts), file=answers_out, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Distiller(
            head,
            target=target,
            objective=objective,
            reference=reference,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=1_000_000,
                per_device_train_batch_size=args.rows,
                learning_rate=1e-3,
                bf16=target.dtype == torch.bfloat16,
                use_cpu=target.device.type == "cpu",
                report_to=[],
                remove_unused_columns=False,
                label_names=[],
                dataloader_pin_memory=False,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=AnswerSet(records, table, known),
            callbacks=[Turns(answers_out)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def made_head(args: argparse.Namespace, target: Target, seed: int) -> DraftHead:
    """A fresh head over the first ids of the vocabulary, trained in float32."""
    head = new_head(HeadConfig.for_target(args.head, target, args.draft_vocab), seed)
    head.set_draft_vocab(torch.arange(args.draft_vocab))
    return head.train().float().bind(target)


def useful_flop(head: DraftHead, args: argparse.Namespace) -> int:
    """FLOP a token of a plain step's matrix products."""
    layers = [m.weight.numel() for m in head.modules() if isinstance(m, torch.nn.Linear)]
    once = head.fc.weight.numel() if args.head == "eagle3" else 0  # its input needs no gradient
    output = head.output_weight.numel()
    each_step = 6 * (sum(layers) - once) + 4 * output
    return args.unroll * each_step + 4 * once + 2 * output


# ---- all arms ------------------------------------------------------------------------------------


class Arm:
    """A process that trains a number of steps when told to."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.facts = self._answer()

    def turn(self, steps: int) -> list[float]:
        """Seconds of as many steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self):
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"arm {self.name} ended with status {self.process.wait()}")
        return json.loads(line)


def matrix_rate(rows: int, size: int, width: int, seconds: float = 0.5) -> float:
    """bfloat16 FLOP a second of `[rows, size]` times `[size, width]`: the median product."""
    left, right = torch.randn(rows, size).bfloat16(), torch.randn(width, size).bfloat16()
    times: list[float] = []
    while sum(times) < seconds:
        began = time.perf_counter()
        torch.nn.functional.linear(left, right)
        times.append(time.perf_counter() - began)
    return 2 * rows * size * width / statistics.median(times[1:] or times)


def speculators_command(args: argparse.Namespace) -> list[str]:
    """The command of that package's arm; its environment is made if it is not there."""
    python = args.speculators / "bin" / "python"
    if not python.exists():
        print(f"making the environment of speculators in {args.speculators}", file=sys.stderr)
        venv.create(args.speculators, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        version = torch.__version__.split("+")[0]
        subprocess.run([*pip, f"torch=={version}", "transformers<5.16", *NEEDED], check=True)
        packages = ["speculators==0.9.0", "hs-connectors==0.9.0"]  # without torchvision and so on
        subprocess.run([*pip, "--no-deps", *packages], check=True)
    target = Target.load(args.target, dtype=args.dtype)
    layers = head_class(args.head).feature_layers(target.num_layers)
    numbers = [args.rows, args.length, args.draft_vocab, args.unroll, *layers]
    arm = Path(__file__).with_name("speculators_arm.py")
    return [str(python), str(arm), str(target.model.name_or_path), *map(str, numbers)]


def main(argv: Sequence[str] | None = None) -> int:
    """Start the arms, let them take turns, print the table."""
    args = parse(argv)
    if args.worker:
        work(args)
        return 0
    if args.steps * args.turns < 2:
        raise UserError("--steps 1 --turns 1 is one step, which shows no spread: raise one of them")
    given = list(sys.argv[1:] if argv is None else argv)
    arms = [
        Arm(name, [sys.executable, __file__, *given, "--worker", name])  # one by one: each loads
        for name in args.arms
    ]
    if args.speculators:
        arms.append(Arm("speculators", speculators_command(args)))
    size = Target.load(args.target, dtype=args.dtype).hidden_size
    rates = []
    for arm in arms:
        arm.turn(WARM_UP)
    for turn in range(args.turns):
        for arm in arms if turn % 2 == 0 else arms[::-1]:
            arm.seconds += arm.turn(args.steps)
            rates.append(matrix_rate(args.rows * args.length, size, args.draft_vocab))
    result = result_of(args, arms, statistics.median(rates))
    for arm in arms:
        arm.close()
    if args.out:
        write_json(args.out, result)
    print(table(result))
    print(one_line(result))
    return 0


HIDDEN = ("out", "worker", "speculators")  # no settings of a measurement: folders, one's own task


def result_of(args: argparse.Namespace, arms: list[Arm], rate: float) -> dict:
    """tokens/s (supervised ones: all of a row but the first) and shares of the matrix rate."""
    tokens = args.rows * (args.length - 1)
    useful = next(arm.facts["useful_flop"] for arm in arms if "useful_flop" in arm.facts)
    found = {}
    for arm in arms:
        extra = args.rows * arm.facts.get("ahead", 0.0) / args.epochs
        low, middle, high = (
            tokens / (seconds + extra)
            for seconds in statistics.quantiles(arm.seconds, n=10, method="inclusive")[::4]
        )
        found[arm.name] = {
            "tokens_per_s": middle,
            "p10_p90": [high, low],
            "share_of_matrix_rate": middle * useful / rate,
            "seconds": arm.seconds,
        } | arm.facts
    return {
        "kind": "bench_training",
        "arms": found,
        "matrix_rate": rate,
        "useful_flop_per_token": useful,
        "settings": {k: str(v) for k, v in vars(args).items() if k not in HIDDEN},
        "environment": environment(),
    }


def table(result: dict) -> str:
    """The result as Markdown."""
    rows = [
        [
            name,
            f"{arm['tokens_per_s']:,.0f} [{arm['p10_p90'][0]:,.0f}, {arm['p10_p90'][1]:,.0f}]",
            f"{arm['share_of_matrix_rate']:.0%}",
        ]
        for name, arm in result["arms"].items()
    ]
    rate = f"share of {result['matrix_rate'] / 1e9:,.0f} GFLOP/s"
    return markdown_table(["arm", "tokens/s, median [p10, p90]", rate], rows)


if __name__ == "__main__":
    sys.exit(run_main(main))
