"""Answers that the head rewrites between epochs: from the right law, repeatable, and resumable."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaspec_eagle.distill import AnswerSet, Distiller, LengthBuckets
from adaspec_eagle.errors import UserError
from adaspec_eagle.features import split_rows, target_rows
from adaspec_eagle.onpolicy import OnPolicy, draft_answers
from adaspec_eagle.sampling import DRAFT, draw, uniforms
from adaspec_eagle.train import TrainConfig, run_training
from adaspec_eagle.unroll import unroll
from tests.records import answers_file, record
from tests.tiny import tiny_head, tiny_target, tiny_target_folder

PROMPTS = [[1, 20, 21, 22, 23], [1, 30], [1, 40, 41]]
LIMITS, KEYS, SEED = [17, 12, 14], [5, 0, 9], 3


@pytest.mark.parametrize("name", ["eagle1", "eagle3", "lm"])
@pytest.mark.parametrize("arch", ["llama", "phi"])
def test_every_token_is_drawn_from_what_training_sees_at_its_step(arch, name):
    """Drawn again, alone, from the unroll over the whole text: the same token at every place."""
    target = tiny_target(arch)
    head = tiny_head(target, name)
    steps = 3 if head.config.feature_layers else 1
    found = draft_answers(target, head, PROMPTS, LIMITS, KEYS, steps, SEED)
    layers, judged = head.config.feature_layers, 0
    for prompt, answer, limit, key in zip(PROMPTS, found, LIMITS, KEYS, strict=True):
        assert len(answer) == limit or answer[-1] in target.eos_token_ids
        assert not set(answer[:-1]) & set(target.eos_token_ids)
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            features, _ = split_rows(target_rows(target, ids, layers), target, layers)
            states = unroll(head, features, ids, steps)
        for t, token in enumerate(answer):
            step = t % steps
            q = head.logits(states[step][:, len(prompt) + t - 2 - step]).double().softmax(-1)
            number = uniforms(SEED, [key], [len(prompt) + t], DRAFT)
            assert int(head.to_target(draw(q, number))) == token
            judged += 1
    assert judged > 12


def test_a_row_is_written_the_same_alone_and_in_a_batch():
    target = tiny_target()
    head = tiny_head(target)
    together = draft_answers(target, head, PROMPTS, LIMITS, KEYS, 3, SEED)
    for place in range(3):
        one = slice(place, place + 1)
        alone = draft_answers(target, head, PROMPTS[one], LIMITS[one], KEYS[one], 3, SEED)
        assert alone == together[one]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three epochs of six steps of a plain head that rewrites half of its answers."""
    folder = tmp_path_factory.mktemp("onpolicy")
    tiny_target_folder(folder / "target")
    return {
        "target": str(folder / "target"),
        "data": [answers_file(folder / "answers.jsonl")],
        "method": "distillspec",
        "draft_vocab": 60,
        "epochs": 3,
        "evaluations": 3,
        "batch_size": 6,
        "on_policy": 0.5,
    }


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole")
    run_training(TrainConfig(**config), out)
    return out


def last_weights(out):
    return load_file(out / "checkpoints" / "head" / "checkpoint-18" / "model.safetensors")


def test_half_of_the_answers_are_rewritten_anew_each_epoch(whole):
    written = [
        {
            item["record"]: item["answer_ids"]
            for item in map(json.loads, path.read_text().splitlines())
        }
        for path in sorted((whole / "on-policy" / "head").iterdir())
    ]
    notes = json.loads((whole / "head" / "train.json").read_text())
    assert [len(answers) for answers in written] == [round(notes["data"]["records"] / 2)] * 2
    assert set(written[0]) != set(written[1])


def test_steps_mix_answers_of_both_kinds(monkeypatch):
    """What is rewritten does not depend on the order in which the batches hold the records."""
    answers = AnswerSet([record(2, 3, seed=n) for n in range(2000)])
    target = tiny_target()

    def nothing(target, head, prompts, *_):
        return [[] for _ in prompts]

    monkeypatch.setattr("adaspec_eagle.onpolicy.draft_answers", nothing)
    writer = OnPolicy(target, tiny_head(target), answers, 0.5, 3, Path(), watch=None)
    for epoch in (1, 2):
        written = {item["record"] for item in writer.write(0, epoch)}
        assert len(written) == 1000
        order = list(LengthBuckets(answers.lengths(), 8, 0, lambda epoch=epoch: epoch))
        steps = [sum(i in written for i in order[n : n + 8]) for n in range(0, 2000, 8)]
        assert sum(count in (0, 8) for count in steps) < 10  # of 250; two are to be expected


@pytest.mark.parametrize("step", [6, 14])
def test_resuming_reads_what_was_written_and_gives_the_same_weights(
    config, whole, tmp_path, monkeypatch, step
):
    """Stopped at the end of an epoch, where the next one is not yet written, and inside one."""
    seen, compute = [], Distiller.compute_loss

    def interrupt(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(Distiller, "compute_loss", interrupt)
    with pytest.raises(UserError, match=f"step {step} of 18 .*--resume"):
        run_training(TrainConfig(**config), tmp_path / "stopped")
    monkeypatch.setattr(Distiller, "compute_loss", compute)
    run_training(TrainConfig(), tmp_path / "stopped", resume=True)
    first, second = last_weights(whole), last_weights(tmp_path / "stopped")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_rewritten_is_trained_on(config, whole, tmp_path):
    """The first epoch is that of an offline run, to the bit; the others are not.

    Where features are kept changes nothing.
    """
    run_training(TrainConfig(**config | {"on_policy": 0.0}), tmp_path / "offline")
    lines = [
        [
            entry["loss"]
            for entry in json.loads((out / "head" / "train.json").read_text())["curves"]
            if "loss" in entry
        ]
        for out in (whole, tmp_path / "offline")
    ]
    assert lines[0][0] == lines[1][0]
    assert lines[0][-1] != lines[1][-1]
    run_training(TrainConfig(**config | {"features": "recompute"}), tmp_path / "again")
    first, second = last_weights(whole), last_weights(tmp_path / "again")
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-3)


def test_a_share_that_is_no_whole_answer_rewrites_none(config, tmp_path):
    run_training(TrainConfig(**config | {"on_policy": 0.001, "epochs": 2}), tmp_path)
    assert (tmp_path / "on-policy" / "head" / "epoch-1.jsonl").read_text() == ""


def test_adaspec_and_a_draft_lm_rewrite_too(config, tmp_path):
    changes = {"method": "adaspec", "head": "lm:layers=2", "epochs": 2, "evaluations": 1}
    run_training(TrainConfig(**config | changes), tmp_path)
    for stage in ("reference", "head"):
        assert (tmp_path / "on-policy" / stage / "epoch-1.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"on_policy": 1.5}, "from 0 to 1"),
        ({"epochs": 1}, "raise --epochs"),
        ({"loss": "fkl=1,text=0.1"}, "own words"),
    ],
)
def test_on_policy_is_refused_where_it_means_nothing(config, changes, reason):
    with pytest.raises(UserError, match=reason):
        TrainConfig(**config | changes)
