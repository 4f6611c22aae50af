"""Long tier: runs that are killed at any moment; the sampling law at full size."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaspec_eagle.train import TrainConfig
from tests.records import answers_file
from tests.tiny import tiny_target_folder

pytestmark = pytest.mark.long
REPOSITORY = Path(__file__).parents[1]
LAST = "checkpoints/{}/checkpoint-96/model.safetensors"


def checkpoints(out: Path) -> set[Path]:
    """The checkpoint folders of a run, whole or not."""
    return set(out.glob("checkpoints/*/checkpoint-*"))


def test_a_run_killed_at_random_moments_gives_the_weights_of_an_unbroken_one(tmp_path):
    """SIGKILL, ten times at most, then to the end: both stages' last checkpoints are equal."""
    target = tiny_target_folder(tmp_path / "target")
    data = answers_file(tmp_path / "answers.jsonl", records=80)
    script = [sys.executable, str(REPOSITORY / "scripts" / "train_head.py")]
    first = [*script, "--target", target, "--data", data, "--draft-vocab", "60", "--epochs", "8"]
    first += ["--batch-size", "6", "--evaluations", "12"]
    subprocess.run([*first, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    draw, out, kills, seen = random.Random(0), tmp_path / "killed", 0, set()
    command = [*first, "--out", str(out)]
    while not (out / "head" / "train.json").exists():
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and (kills == 10 or not checkpoints(out) - seen):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))  # anywhere between two checkpoints, or in one
        seen |= checkpoints(out)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        command = [*script, "--out", str(out), "--resume"]
    assert kills > 2
    assert json.loads((out / "run.json").read_text())["config"]["epochs"] == 8
    assert set(asdict(TrainConfig())) == set(json.loads((out / "run.json").read_text())["config"])
    for stage in ("reference", "head"):
        whole, killed = (load_file(p / LAST.format(stage)) for p in (tmp_path / "whole", out))
        assert all(torch.equal(whole[name], killed[name]) for name in whole)
