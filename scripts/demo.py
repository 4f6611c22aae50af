"""The whole pipeline on the default target: data, reference head, draft head, measurement.

    python scripts/demo.py

Every step is one of this repository's own commands, printed before it runs. What is there already
is used again; after a kill, run the same command. Sized to stay within 20 minutes on two CPU cores,
downloads not counted: where the machine is slow, less data is written.
"""

import shlex
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import torch

from adaspec_eagle.data import mend_jsonl, read_jsonl
from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.features import target_rows
from adaspec_eagle.targets import Target, describe

HERE = Path(__file__).resolve().parents[1]
OUT = Path("runs") / "demo"
TOKENS, FIRST = 200_000, 10_000  # answer tokens wanted; made first, to see how fast it goes
SECONDS = 770  # for data and training
EPOCHS, BATCH = 2, 2  # so few records want many small steps
PROMPTS, NEW_TOKENS = 8, 64  # one measuring prompt of each kind

# Cost of an answer token in training, in target forwards of one token (measured on two CPU cores
# with the default head): reference head 1.9, draft head with its reference pass 3.2.
PASSES = 1.9 + 3.2


def main(argv: list[str] | None = None) -> int:
    """Run all steps; the last thing printed is where everything lies and what to try next."""
    command_line(__doc__).parse_args(argv)
    begin = time.perf_counter()
    target = Target.load("smollm2-135m")
    print(describe(target))
    OUT.mkdir(parents=True, exist_ok=True)
    speed = forward_speed(target)
    del target
    data = OUT / "data.jsonl"
    make_data(data, speed)
    train(data, speed, SECONDS - (time.perf_counter() - begin))
    shipped = Path(str(files("adaspec_eagle.heads"))) / "pretrained" / "smollm2-135m-eagle3-long"
    if (shipped / "config.json").exists():
        print("\nThe head that ships with the package, which saw a fuller training:")
        measure(shipped, OUT / "shipped")
    print("\nThe head that was trained just now:")
    measure(OUT / "head", OUT / "speedup")
    print(f"\ndone in {(time.perf_counter() - begin) / 60:.1f} minutes\n{ENDING}")
    return 0


ENDING = f"""
  python    {sys.executable}
  result    {OUT}/speedup/result.json
  plot      {OUT}/speedup/speedup.png
  head      {OUT}/head (curves: tensorboard --logdir {OUT}/checkpoints)

Next: more data (python scripts/make_data.py --tokens 1000000 --out more.jsonl), your own target
(python scripts/train_head.py --target NAME), other trees (python eval/speedup.py --chain 5),
proof that nothing is lost (python eval/lossless.py --tree --dtype float32)."""


def make_data(file: Path, speed: float) -> None:
    """Prompts and answers by the target: TOKENS, or what SECONDS allow with EPOCHS of training."""
    make = ["scripts/make_data.py", "--prompts", "self", "--out", str(file)]
    make += ["--exclude", str(HERE / "eval" / "prompts.jsonl")]
    if answer_tokens(file) >= TOKENS or (OUT / "run.json").exists():
        print(f"{file} is there: {answer_tokens(file):,} answer tokens")
        return
    before, begin = answer_tokens(file), time.perf_counter()
    run([*make, "--tokens", str(before + FIRST)])
    rate = (answer_tokens(file) - before) / (time.perf_counter() - begin)
    each = 1 / rate + (features(file) / answer_tokens(file) + EPOCHS * PASSES) / speed  # seconds
    wanted = max(min(TOKENS, int(SECONDS / each)), answer_tokens(file))
    if wanted < TOKENS:
        print(f"{rate:.0f} tokens/s: {wanted:,} answer tokens instead of {TOKENS:,}")
    run([*make, "--tokens", str(wanted)])


def train(data: Path, speed: float, seconds: float) -> None:
    """Reference head and draft head, as many epochs as the seconds allow."""
    if (OUT / "head" / "train.json").exists():
        print(f"{OUT / 'head'} is there")
        return
    script = ["scripts/train_head.py", "--out", str(OUT)]
    if (OUT / "run.json").exists():
        run([*script, "--resume"])
        return
    left = seconds - features(data) / speed
    epochs = min(3.0, max(0.3, left * speed / (answer_tokens(data) * PASSES)))
    script += ["--data", str(data), "--epochs", f"{epochs:.1f}", "--batch-size", str(BATCH)]
    run([*script, "--evaluations", "3"])


def measure(head: Path, out: Path) -> None:
    """The table of eval/speedup.py for one head."""
    limits = ["--limit", str(PROMPTS), "--max-new-tokens", str(NEW_TOKENS)]
    table = ["eval/speedup.py", "--tree", "--head", str(head), *limits, "--out", str(out)]
    run(table, last_line=False)


def run(command: list[str], last_line: bool = True) -> None:
    """One of the repository's scripts, shown as a user would type it.

    last_line False holds back the last line of its output, which is JSON for programs. Ctrl-C goes
    to the script alone, which saves what it has.
    """
    print(f"\n$ python {shlex.join(command)}", flush=True)
    script, *arguments = command
    process = subprocess.Popen(
        [sys.executable, str(HERE / script), *arguments], stdout=subprocess.PIPE, text=True
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert process.stdout is not None
    held: list[str] = []
    for line in process.stdout:
        held.append(line)
        if len(held) > 1 or last_line:
            sys.stdout.write(held.pop(0))
            sys.stdout.flush()
    status = process.wait()
    signal.signal(signal.SIGINT, before)
    if status:
        raise UserError(f"{script} stopped with status {status}; run the demo again to go on")


def records(file: Path) -> list[dict]:
    """The records of a data file; none where there is no file."""
    if not file.exists():
        return []
    mend_jsonl(file)  # a kill may have torn the last line
    return list(read_jsonl(file))


def answer_tokens(file: Path) -> int:
    """Answer tokens in a data file."""
    return sum(len(record["answer_ids"]) for record in records(file))


def features(file: Path) -> int:
    """Tokens that the target reads once before training: prompts and answers."""
    return sum(len(record["prompt_ids"]) + len(record["answer_ids"]) for record in records(file))


def forward_speed(target: Target) -> float:
    """Tokens a second of the target's forward, on eight rows of 256."""
    ids = torch.randint(0, target.vocab_size, (8, 256))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        target_rows(target, ids, [target.num_layers])
        seconds.append(time.perf_counter() - begin)
    return ids.numel() / min(seconds)


if __name__ == "__main__":
    sys.exit(run_main(main))
