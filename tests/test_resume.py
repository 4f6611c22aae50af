"""A run that is stopped and resumed is the run that was not stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaspec_eagle.distill import Distiller
from adaspec_eagle.errors import UserError
from adaspec_eagle.record import write_json
from adaspec_eagle.selection import needs
from adaspec_eagle.train import TrainConfig, run_training
from tests.records import answers_file
from tests.tiny import tiny_target_folder

LAST = "checkpoints/head/checkpoint-12/model.safetensors"  # the last step, best or not


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two epochs of a plain head, so that the second epoch's order matters."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_target_folder(folder / "target")
    return TrainConfig(
        target=str(folder / "target"),
        data=[answers_file(folder / "answers.jsonl")],
        method="distillspec",
        draft_vocab=60,
        epochs=2,
        evaluations=2,
        batch_size=6,
    )


@pytest.fixture(scope="module")
def plain(config, tmp_path_factory):
    """The folder of a run that was not stopped."""
    out = tmp_path_factory.mktemp("plain")
    run_training(config, out)
    return out


@pytest.mark.parametrize(
    ("select", "step"),
    [("none", 2), ("none", 9), ("random", 8), ("adaspec-anneal", 8), ("adaspec-ema", 8)],
)
def test_ctrl_c_finishes_the_step_and_resume_gives_the_same_weights(
    config, plain, tmp_path, monkeypatch, select, step
):
    """Draws, k's way down and the moving average go on where they were, too."""
    out = plain
    if select != "none":
        reference = str(plain / "head") if "reference" in needs(select) else None
        config, out = replace(config, select=select, reference=reference), tmp_path / "whole"
        run_training(config, out)
    whole = load_file(out / LAST)
    seen, compute = [], Distiller.compute_loss

    def interrupt(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return compute(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Distiller, "compute_loss", interrupt)
    with pytest.raises(UserError, match=f"step {step} of 12 .*--resume"):
        run_training(config, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "stopped" / "head").exists()
    monkeypatch.setattr(Distiller, "compute_loss", compute)
    run_training(TrainConfig(), tmp_path / "stopped", resume=True)
    again = load_file(tmp_path / "stopped" / LAST)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_resumed_run_takes_no_other_options_and_no_damaged_notes(tmp_path):
    write_json(tmp_path / "run.json", {"config": asdict(TrainConfig(lr=0.5))})
    with pytest.raises(UserError, match="--lr 0.1: .* begun with 0.5"):
        run_training(TrainConfig(lr=0.1), tmp_path, resume=True)
    for text in ("{", "{}", '{"config": {"later": 1}}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match="run.json is damaged"):
            run_training(TrainConfig(), tmp_path, resume=True)


def test_a_run_goes_on_with_as_many_processes_as_it_began_with(config, plain, monkeypatch):
    monkeypatch.setattr("adaspec_eagle.train.process_count", lambda: 2)
    with pytest.raises(UserError, match="begun with 1 processes, here are 2"):
        run_training(TrainConfig(), plain, resume=True)


def test_the_best_checkpoint_is_kept_and_taken_in_a_folder_that_was_moved(
    config, tmp_path, monkeypatch
):
    """The best is the first of four; the run is stopped behind it and its folder moved."""
    settings = replace(config, evaluations=4, take="best")
    evaluate = Distiller.evaluate

    def falling(self, *args, **kwargs):
        metrics = evaluate(self, *args, **kwargs)
        metrics["eval_tau_sim"] = 3 - self.state.global_step / 12
        return metrics

    monkeypatch.setattr(Distiller, "evaluate", falling)
    compute = Distiller.compute_loss

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(Distiller, "compute_loss", interrupt)
    with pytest.raises(UserError, match="step 5 of 12"):
        run_training(settings, tmp_path / "begun")
    monkeypatch.setattr(Distiller, "compute_loss", compute)
    moved = (tmp_path / "begun").rename(tmp_path / "moved")
    head = run_training(TrainConfig(), moved, resume=True)
    assert json.loads((head / "train.json").read_text())["best_step"] == 3
    best = load_file(moved / "checkpoints/head/checkpoint-3/model.safetensors")
    found = load_file(head / "model.safetensors")
    assert all(torch.equal(found[name], best[f"head.{name}"]) for name in found)

    shutil.rmtree(head)
    shutil.rmtree(moved / "checkpoints/head/checkpoint-3")
    with pytest.raises(UserError, match="checkpoint-3, the best by tau_sim, is missing"):
        run_training(TrainConfig(), moved, resume=True)


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        run_training(TrainConfig(), tmp_path / "none", resume=True)


def checkpoints(out: Path) -> set[Path]:
    """The checkpoint folders of a run."""
    return set(out.glob("checkpoints/*/checkpoint-*"))


def wait_for_moment(process: subprocess.Popen, out: Path, writing: bool, pause: float) -> None:
    """Until a new checkpoint is being written, or is there and `pause` seconds have passed."""
    seen = checkpoints(out)
    while process.poll() is None:
        if writing and any(out.glob("checkpoints/*/writing/checkpoint-*/*")):
            return
        if not writing and checkpoints(out) - seen:
            return time.sleep(pause)
        time.sleep(0.0005)


@pytest.mark.parametrize("take", ["last", "best"])
def test_a_run_that_was_killed_behind_its_last_step_takes_no_further_one(config, tmp_path, take):
    """Inside an epoch, that is; only the head was not saved yet."""
    settings = replace(config, epochs=1.5, take=take, lr=0.01, schedule="constant")
    whole = run_training(settings, tmp_path / "out")
    wanted = load_file(whole / "model.safetensors")
    before = checkpoints(tmp_path / "out")
    shutil.rmtree(whole)
    run_training(TrainConfig(), tmp_path / "out", resume=True)
    found = load_file(whole / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert checkpoints(tmp_path / "out") == before


@pytest.mark.parametrize(
    "kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.long)]
)
def test_a_run_killed_at_random_moments_gives_the_weights_of_an_unbroken_one(tmp_path, kills):
    """SIGKILL, in turn while a checkpoint is written and anywhere else; then to the end.

    Both stages' last checkpoints are equal to the bit, and every folder named checkpoint is whole.
    """
    target = tiny_target_folder(tmp_path / "target")
    data = answers_file(tmp_path / "answers.jsonl", records=80)
    script = [sys.executable, str(Path(__file__).parents[1] / "scripts" / "train_head.py")]
    first = [*script, "--target", target, "--data", data, "--draft-vocab", "60", "--epochs", "8"]
    first += ["--batch-size", "6", "--evaluations", "24"]
    subprocess.run([*first, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    draw, out, done, broken = random.Random(0), tmp_path / "killed", 0, 0
    command = [*first, "--out", str(out)]
    while not (out / "head" / "train.json").exists():
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if done < kills:
            for old in out.glob("checkpoints/*/writing"):
                shutil.rmtree(old)
            wait_for_moment(process, out, done % 2 == 0, draw.uniform(0, 0.3))
            if process.poll() is None:
                process.kill()
                done += 1
        process.wait()
        broken += any(out.glob("checkpoints/*/writing/checkpoint-*"))
        for found in checkpoints(out):
            json.loads((found / "trainer_state.json").read_text())
            load_file(found / "model.safetensors")
            torch.load(found / "optimizer.pt", weights_only=True)
        command = [*script, "--out", str(out), "--resume"]
    assert done == kills
    assert broken or kills < 20  # some kill fell into the writing
    assert json.loads((out / "run.json").read_text())["config"]["epochs"] == 8
    assert set(asdict(TrainConfig())) == set(json.loads((out / "run.json").read_text())["config"])
    last = "checkpoints/{}/checkpoint-96/model.safetensors"
    for stage in ("reference", "head"):
        whole, killed = (load_file(p / last.format(stage)) for p in (tmp_path / "whole", out))
        assert all(torch.equal(whole[name], killed[name]) for name in whole)
        assert len([p for p in checkpoints(out) if p.parent.name == stage]) <= 2
