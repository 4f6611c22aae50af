"""Identities of the losses; chunked against whole."""

import json
import math

import pytest
import torch

from adaspec_eagle import fused
from adaspec_eagle.errors import UserError
from adaspec_eagle.fused import Output, chunked_losses
from adaspec_eagle.losses import LOSSES, loss_terms, overlap, token_loss
from eval import bench_loss


def logits(seed: int, rows: int = 7, vocab: int = 11) -> torch.Tensor:
    return 3 * torch.randn(
        rows, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


DIVERGENCES = [name for name in LOSSES if name not in ("ce", "text")]
OWN = f"{__file__}:squared"  # a loss of a user's own
SHIFTED, SUMMED = f"{__file__}:shifted", f"{__file__}:summed"


def squared(draft_logits, target_logits, *, target_lse=None, labels=None):
    """Squared difference of the probabilities."""
    return (draft_logits.softmax(-1) - target_logits.softmax(-1)).square().sum(-1)


def shifted(draft_logits, target_logits, *, target_lse=None, labels=None):
    """Mean squared difference of the logits: adding a constant to them changes it."""
    return (draft_logits - target_logits).square().mean(-1)


def summed(draft_logits, target_logits, *, target_lse=None, labels=None):
    """A loss whose gradient is one number, expanded."""
    return draft_logits.sum(-1)


@pytest.mark.parametrize("name", DIVERGENCES)
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
    same = logits(0).double()
    torch.testing.assert_close(LOSSES["jsd"](same, same), torch.zeros(len(same)).double())
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
@pytest.mark.parametrize(
    "name",
    [
        *LOSSES,
        "fkl=0.5,tv=2,ce=1",
        OWN,
        f"{OWN}=2,jsd=1",
        SHIFTED,
        f"fkl=0.5,{SHIFTED}=2,jsd=1",
        f"{SUMMED}=2,fkl=1",
    ],
)
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
    labels = torch.tensor([0, 10, -1, 3, 3, -1, 7])
    for lse in (None, known.logsumexp(-1) + 0.3):
        more = {"target_lse": lse, "labels": labels}
        found, _ = chunked_losses(name, hidden, draft, target_hidden, target, lse, labels)
        wanted = torch.stack(
            [token_loss(name)(draft.logits(step), known, **more) for step in hidden]
        )
        torch.testing.assert_close(found, wanted)
        inputs = [hidden, rows] if trained else [hidden]
        ours = torch.autograd.grad((found * weights).sum(), inputs)
        plain = torch.autograd.grad((wanted * weights).sum(), inputs)
        torch.testing.assert_close(ours, plain)
        with torch.no_grad():
            again, _ = chunked_losses(name, hidden, draft, target_hidden, target, lse, labels)
        assert torch.equal(again, found)


def test_negative_log_acceptance_is_minus_the_log_of_the_overlap():
    p, q = logits(0), logits(1)
    torch.testing.assert_close(LOSSES["nla"](q, p), -overlap(q, p).log())


def test_the_lk_hybrid_lies_between_its_two_losses_by_the_overlap():
    p, q = logits(0), logits(1)
    weight = (-3 * overlap(q, p)).exp()
    wanted = weight * LOSSES["fkl"](q, p) + (1 - weight) * LOSSES["tv"](q, p)
    torch.testing.assert_close(LOSSES["lk"](q, p), wanted)


def test_the_lk_weight_is_no_path_for_the_gradient():
    p, q = logits(0), logits(1).requires_grad_()
    weight = (-3 * overlap(q, p)).exp().detach()
    by_parts = torch.autograd.grad((weight * LOSSES["fkl"](q, p)).sum(), q)[0]
    by_parts += torch.autograd.grad(((1 - weight) * LOSSES["tv"](q, p)).sum(), q)[0]
    torch.testing.assert_close(torch.autograd.grad(LOSSES["lk"](q, p).sum(), q)[0], by_parts)


def test_likelihood_losses_are_those_of_one_token():
    p, q = logits(0), logits(1)
    log_q, rows = q.log_softmax(-1), torch.arange(7)
    torch.testing.assert_close(LOSSES["ce"](q, p), -log_q[rows, p.argmax(-1)])
    labels = torch.tensor([3, 0, -1, 10, 5, -1, 2])
    found = LOSSES["text"](q, p, labels=labels)
    assert found[[2, 5]].tolist() == [0, 0]
    inside = labels >= 0
    torch.testing.assert_close(found[inside], -log_q[rows[inside], labels[inside]])


@pytest.mark.parametrize(
    "wrong",
    [
        "kl",
        "fkl=",
        "fkl=0",
        "fkl=-1",
        "fkl=nan",
        "fkl=much",
        "fkl,kl=1",
        "",
        "feature",
        "nowhere.py:mine",
        f"{__file__}:nothing",
    ],
)
def test_a_loss_that_is_none_is_refused(wrong):
    words = "there is no file|has no function" if ".py:" in wrong else "--loss"
    with pytest.raises(UserError, match=words):
        loss_terms(wrong)


def test_what_is_watched_is_what_it_says():
    generator = torch.Generator().manual_seed(0)
    hidden, known = (torch.randn(2, 7, 5, generator=generator).double() for _ in range(2))
    rows = 3 * torch.randn(11, 5, generator=generator).double()
    labels = torch.tensor([3, 0, -1, 10, 5, -1, 2])
    watch = ("entropy", "flatness", "rank", "overlap")
    draft, target = hidden @ rows.t(), (known @ rows.t())[0]
    lse = target.logsumexp(-1) + 0.2
    losses, seen = chunked_losses(
        "fkl", hidden, Output(rows), known[0], Output(rows), lse, labels, watch
    )
    assert torch.equal(
        losses, chunked_losses("fkl", hidden, Output(rows), known[0], Output(rows))[0]
    )
    p = target.softmax(-1)
    entropy, flat, rank, shared = seen
    torch.testing.assert_close(entropy[1], -(p * p.log()).sum(-1))
    even = torch.full_like(p, 1 / 11)
    torch.testing.assert_close(flat[1], torch.cosine_similarity(p, even))
    for step in range(2):
        torch.testing.assert_close(shared[step], overlap(draft[step], target, target_lse=lse))
        for m, label in enumerate(labels.tolist()):
            order = draft[step, m].argsort(descending=True).tolist()
            assert rank[step, m] == (order.index(label) if label >= 0 else 11)


def test_every_loss_has_its_gradient_written_out():
    assert fused.RULES.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_losses_are_those_of_their_logits(name):
    """Only products are in bfloat16: of the logits that they give, losses are exact."""
    draft, target = (Output(3 * torch.randn(200, 16).bfloat16()) for _ in range(2))
    hidden, known = torch.randn(1, 9, 16).bfloat16(), torch.randn(9, 16).bfloat16()
    labels = torch.arange(9) - 1
    found, _ = chunked_losses(name, hidden, draft, known, target, labels=labels)
    pair = draft.logits(hidden[0]).float(), target.logits(known).float()
    torch.testing.assert_close(found[0], LOSSES[name](*pair, labels=labels))


@pytest.mark.slow
def test_the_loss_benchmark_reports_what_fits(capsys):
    """Plain, 2,048 tokens by 60,000 ids do not go into 2.6 GB of addresses; in chunks they do."""
    given = ["--tokens", "2048", "--vocab", "60000", "--hidden", "8", "--dtype", "float32"]
    given += ["--steps", "1", "--times", "1", "--runs", "1", "--limit-gb", "2.6"]
    assert bench_loss.main(given) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]
    assert found["plain"] is None
    assert found["chunked"]["tokens_per_s"] > 0
