"""Several processes train as one that accumulates as many micro-batches."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaspec_eagle import train as training
from adaspec_eagle import zero
from adaspec_eagle.callbacks import newest_checkpoint
from adaspec_eagle.errors import UserError
from adaspec_eagle.record import write_json
from adaspec_eagle.train import TrainConfig, run_training
from tests.records import answers_file
from tests.several import train
from tests.tiny import tiny_target_folder

REPOSITORY = Path(__file__).parents[1]


def launch(*arguments: str, config: str = "data_parallel") -> None:
    """`accelerate launch` with a config of scripts/accelerate, in the repository's root."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", port]
    command += ["--config_file", f"scripts/accelerate/{config}.yaml", *arguments]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("kind", "installed", "config", "words"),
    [
        ("FSDP", True, {}, "FSDP is not supported.*ZeRO"),
        ("DEEPSPEED", False, {}, "not installed: pip install deepspeed, or .*data_parallel"),
        ("DEEPSPEED", True, {"optimizer": "muon"}, "muon needs whole weight.*--optimizer adamw"),
    ],
)
def test_what_a_launch_cannot_have_is_refused_by_name(
    tmp_path, monkeypatch, kind, installed, config, words
):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    monkeypatch.setattr(zero, "deepspeed_installed", lambda: installed)
    with pytest.raises(UserError, match=words):
        run_training(TrainConfig(**config), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "changes", [{"data": []}, {"features": "disk"}, {"on_policy": 0.5}], ids=str
)
def test_what_one_process_does_alone_is_refused_under_zero_3(
    tmp_path, monkeypatch, changes, resume
):
    """The others would wait for it, and it for their shares of the target: for ever."""
    config = TrainConfig(**{"data": ["answers.jsonl"]} | changes)
    out = tmp_path / "out"
    if resume:
        write_json(out / "run.json", {"config": asdict(config)})
    before = [path.read_bytes() for path in out.glob("*")]
    monkeypatch.setattr(training, "zero_stage", lambda: 3)
    with pytest.raises(UserError, match="alone: give --data .*--features memory.*zero2.yaml"):
        run_training(TrainConfig() if resume else config, out, resume)
    assert [path.read_bytes() for path in out.glob("*")] == before


def test_weights_of_several_dtypes_are_refused_under_zero_3():
    mixed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())
    with pytest.raises(UserError, match="torch.bfloat16, torch.float32: .*--dtype.*zero2.yaml"):
        zero.split_frozen(mixed)


def test_features_too_large_for_memory_are_recomputed_under_zero_3(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "choose_mode", lambda *_: "disk")
    monkeypatch.setattr(training, "SplitTarget", lambda target: target)
    monkeypatch.setattr(training, "zero_stage", lambda: 3)
    settings, _ = job(tmp_path, epochs=0.5)
    made = run_training(TrainConfig(**settings), tmp_path / "out")
    assert json.loads((made / "train.json").read_text())["config"]["features"] == "recompute"
    assert not (tmp_path / "out" / "features").exists()


@pytest.mark.slow
@pytest.mark.parametrize("select", ["none", "adaspec"])
def test_two_processes_equal_one_that_accumulates_two_micro_batches(tmp_path, select):
    """Gradients of the first step and weights after two, in float32, to a relative 1e-5."""
    launch("tests/several.py", str(tmp_path / "two"), select)
    two, one = load_file(tmp_path / "two"), train(select)
    assert two.keys() - one.keys() == {"processes"}
    assert any(name.startswith("gradient.") for name in one)
    assert_same(two, one)


def assert_same(two: dict, one: dict) -> None:
    """Two processes' weights and gradients, those of one to a relative 1e-5."""
    assert int(two.pop("processes")) == 2
    for name in (name for name in two if not name.startswith("held.")):
        assert torch.isfinite(two[name]).all(), name
        difference = (two[name] - one[name]).norm() / one[name].norm()
        assert difference < 1e-5, name


@pytest.mark.long
@pytest.mark.parametrize("select", ["none", "adaspec"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_equals_one_process_that_accumulates(tmp_path, stage, select):
    """Weights after two steps; ZeRO 3 leaves each process half of the frozen weights."""
    pytest.importorskip("deepspeed")
    launch("tests/several.py", str(tmp_path / "two"), select, "adamw", config=f"zero{stage}")
    two, one = load_file(tmp_path / "two"), train(select, "adamw")
    assert_same(two, one)
    for name in ("held.target", "held.reference"):
        share = float(two[name] / one[name])
        assert share == pytest.approx(0.5 if stage == 3 else 1, rel=0.1), name


def job(tmp_path: Path, **changes) -> tuple[dict, list[str]]:
    """Settings of a short run, as TrainConfig takes them and as flags of train_head.py."""
    settings = {
        "target": tiny_target_folder(tmp_path / "target"),
        "data": [answers_file(tmp_path / "answers.jsonl")],
        "method": "distillspec",
        "draft_vocab": 60,
        "epochs": 2.0,
        "evaluations": 2,
        "batch_size": 3,
    } | changes
    flags = ["scripts/train_head.py"]
    for name, value in settings.items():
        words = value if isinstance(value, list) else [str(value)]
        flags += ["--" + name.replace("_", "-"), *words]
    return settings, flags


@pytest.mark.parametrize(
    "features",
    [pytest.param("memory", marks=pytest.mark.slow), pytest.param("disk", marks=pytest.mark.long)],
)
def test_the_whole_job_in_two_processes_equals_the_one_that_accumulates(tmp_path, features):
    """Data, features, evaluation, checkpoints, the saved head; from inside an epoch again, too."""
    settings, flags = job(tmp_path, features=features, evaluations=4, take="last")
    one = run_training(TrainConfig(**settings, accumulate=2), tmp_path / "one")
    command, out = [*flags, "--out", str(tmp_path / "two")], tmp_path / "two"
    launch(*command)
    assert_same_head(one, out / "head")
    shutil.rmtree(out / "head")
    shutil.rmtree(out / "checkpoints" / "head" / "checkpoint-12")
    assert newest_checkpoint(out / "checkpoints" / "head").name == "checkpoint-9"  # of 6 an epoch
    launch(*command, "--resume")
    assert_same_head(one, out / "head")


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_the_whole_job_under_zero_equals_the_one_that_accumulates(tmp_path, stage):
    """Reference and draft head; then again from a checkpoint in the middle."""
    pytest.importorskip("deepspeed")
    settings, flags = job(tmp_path, method="adaspec", optimizer="adamw", dtype="float32")
    one = run_training(TrainConfig(**settings, accumulate=2), tmp_path / "one")
    command, out = [*flags, "--out", str(tmp_path / "two")], tmp_path / "two"
    launch(*command, config=f"zero{stage}")
    assert_same_head(one, out / "head")
    shutil.rmtree(out / "head")
    checkpoints = out / "checkpoints" / "head"
    shutil.rmtree(max(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name[11:])))
    launch(*command, "--resume", config=f"zero{stage}")
    assert_same_head(one, out / "head")


def assert_same_head(one: Path, two: Path) -> None:
    """The same number of steps, and weights that differ by rounding at most."""
    wanted, found = (load_file(folder / "model.safetensors") for folder in (one, two))
    steps, ours = (json.loads((f / "train.json").read_text())["steps"] for f in (one, two))
    assert steps == ours
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
