"""A run that is stopped and resumed is the run that was not stopped."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from adaspec_eagle.distill import Distiller
from adaspec_eagle.errors import UserError
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


@pytest.mark.parametrize("step", [2, 9])
def test_ctrl_c_finishes_the_step_and_resume_gives_the_same_weights(
    config, tmp_path, monkeypatch, step
):
    run_training(config, tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / LAST)
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


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        run_training(TrainConfig(), tmp_path / "none", resume=True)
