"""Identities of the losses; chunked against whole."""

import json
import math

import pytest
import torch

from adaspec_eagle import fused
from adaspec_eagle.fused import Output, chunked_losses
from adaspec_eagle.losses import LOSSES, overlap
from eval import bench_loss


def logits(seed: int, rows: int = 7, vocab: int = 11) -> torch.Tensor:
    return 3 * torch.randn(
        rows, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_zero_for_equal_distributions_and_positive_otherwise(name):
    p, q = logits(0), logits(1)
    torch.testing.assert_close(LOSSES[name](p + 5, p), torch.zeros(7, dtype=torch.float64))
    assert (LOSSES[name](q, p) > 0).all()
    assert LOSSES[name](q, p).shape == (7,)


def test_forward_kl_is_its_definition():
    p, q = logits(0).softmax(-1), logits(1).softmax(-1)
    wanted = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(LOSSES["fkl"](logits(1), logits(0)), wanted)


def test_reverse_kl_is_forward_kl_swapped():
    torch.testing.assert_close(
        LOSSES["rkl"](logits(1), logits(0)), LOSSES["fkl"](logits(0), logits(1))
    )


def test_jensen_shannon_is_symmetric_and_bounded():
    found = LOSSES["jsd"](logits(1), logits(0))
    torch.testing.assert_close(found, LOSSES["jsd"](logits(0), logits(1)))
    assert (found <= math.log(2)).all()


def test_total_variation_is_half_the_l1_distance_on_a_full_vocabulary():
    p, q = logits(0).softmax(-1), logits(1).softmax(-1)
    torch.testing.assert_close(LOSSES["tv"](logits(1), logits(0)), (p - q).abs().sum(-1) / 2)


def test_acceptance_uses_the_full_vocabulary_and_divergences_do_not():
    """A draft vocabulary that holds half of p's mass cannot overlap by more than that."""
    p, q = logits(0), logits(1)
    lse = p.logsumexp(-1) + math.log(2)
    assert (overlap(q, p, target_lse=lse) <= 0.5 + 1e-12).all()
    torch.testing.assert_close(overlap(p, p, target_lse=lse), torch.full((7,), 0.5).double())
    for name in ("fkl", "rkl", "jsd"):
        torch.testing.assert_close(LOSSES[name](q, p, target_lse=lse), LOSSES[name](q, p))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_chunked_losses_equal_plain_ones_in_value_and_gradient(name, trained, bias, monkeypatch):
    """In float64, with chunks and pieces that do not divide the tokens, and a weight a token."""
    monkeypatch.setattr(fused, "CHUNK_NUMBERS", 3 * 11)
    monkeypatch.setattr(fused, "CHUNK_ROWS", 1)
    monkeypatch.setattr(fused, "CACHED_NUMBERS", 2 * 11)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, rows = draw(2, 7, 5).requires_grad_(), draw(11, 5).requires_grad_(trained)
    draft = Output(rows, draw(11) if bias else None)
    target, target_hidden = Output(draw(11, 5), draw(11) if bias else None), draw(7, 5)
    known, weights = target.logits(target_hidden), draw(2, 7)
    for lse in (None, known.logsumexp(-1) + 0.3):
        found = chunked_losses(name, hidden, draft, target_hidden, target, lse)
        wanted = torch.stack(
            [LOSSES[name](draft.logits(step), known, target_lse=lse) for step in hidden]
        )
        torch.testing.assert_close(found, wanted)
        inputs = [hidden, rows] if trained else [hidden]
        ours = torch.autograd.grad((found * weights).sum(), inputs)
        plain = torch.autograd.grad((wanted * weights).sum(), inputs)
        torch.testing.assert_close(ours, plain)
        with torch.no_grad():
            again = chunked_losses(name, hidden, draft, target_hidden, target, lse)
        assert torch.equal(again, found)


def test_every_loss_has_its_gradient_written_out():
    assert fused.RULES.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_losses_are_those_of_their_logits(name):
    """Only products are in bfloat16: of the logits that they give, losses are exact."""
    draft, target = (Output(3 * torch.randn(200, 16).bfloat16()) for _ in range(2))
    hidden, known = torch.randn(1, 9, 16).bfloat16(), torch.randn(9, 16).bfloat16()
    found = chunked_losses(name, hidden, draft, known, target)[0]
    wanted = LOSSES[name](draft.logits(hidden[0]).float(), target.logits(known).float())
    torch.testing.assert_close(found, wanted)


@pytest.mark.slow
def test_the_loss_benchmark_reports_what_fits(capsys):
    """Plain, 4,096 tokens by 60,000 ids do not go into 3 GB of addresses; in chunks they do."""
    given = ["--tokens", "4096", "--vocab", "60000", "--hidden", "8", "--steps", "1"]
    assert bench_loss.main([*given, "--times", "1", "--runs", "1", "--limit-gb", "3"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]
    assert found["plain"] is None
    assert found["chunked"]["tokens_per_s"] > 0
