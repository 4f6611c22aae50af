"""Identities of the losses; chunked against whole."""

import math

import pytest
import torch

from adaspec_eagle import losses
from adaspec_eagle.losses import LOSSES, overlap, per_token


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


@pytest.mark.parametrize("name", LOSSES)
def test_chunked_losses_equal_whole_ones_in_value_and_gradient(name, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 3 * 11)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    rows, target, weights = torch.randn(11, 5).double(), logits(0), torch.rand(7).double()

    def loss_of(chunk, place):
        return LOSSES[name](chunk @ rows.t(), target[place])

    found = per_token(hidden, loss_of, width=11)
    wanted = loss_of(hidden, slice(None))
    torch.testing.assert_close(found, wanted)
    gradient = torch.autograd.grad((found * weights).sum(), hidden)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad((wanted * weights).sum(), hidden)[0])
    with torch.no_grad():
        torch.testing.assert_close(per_token(hidden, loss_of, width=11), wanted.detach())
