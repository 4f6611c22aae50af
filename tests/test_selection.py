"""Which tokens count: number, order, ties, and what never happens."""

import pytest
import torch

from adaspec_eagle.distill import AnswerSet, collate
from adaspec_eagle.errors import UserError
from adaspec_eagle.selection import kept, parse_keep, select
from adaspec_eagle.unroll import step_masks, supervised
from tests.records import record


@pytest.mark.parametrize(
    ("count", "keep", "wanted"),
    [(100, "0.55", 55), (10, 0.4, 4), (11, "0.4", 5), (1, "0.01", 1), (7, 1, 7), (0, "0.4", 0)],
)
def test_exactly_ceil_k_n_tokens(count, keep, wanted):
    """0.55 x 100 is 55 tokens: in floating point its ceiling is 56."""
    assert kept(count, keep) == wanted
    gap = torch.randn(count + 5)
    mask = torch.arange(count + 5) < count
    assert int(select(gap, torch.zeros(count + 5), mask, keep).sum()) == wanted


def test_the_largest_gaps_are_chosen_and_masked_tokens_never():
    draft = torch.tensor([5.0, 1.0, 9.0, 2.0, 3.0])
    ref = torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0])
    mask = torch.tensor([True, True, False, True, True])
    assert select(draft, ref, mask, "0.5").tolist() == [True, False, False, False, True]


def test_ties_go_to_the_earlier_position():
    chosen = select(torch.ones(6), torch.zeros(6), torch.ones(6, dtype=torch.bool), "0.5")
    assert chosen.tolist() == [True] * 3 + [False] * 3


def test_keep_one_is_the_mask_itself():
    mask = torch.rand(4, 9) > 0.5
    gap = torch.randn(4, 9)
    gap[0, 0] = torch.nan
    assert torch.equal(select(gap, torch.zeros(4, 9), mask, 1), mask)


@pytest.mark.parametrize("wrong", ["0", "-0.1", "1.01", "much", "nan"])
def test_keep_outside_its_range_is_refused(wrong):
    with pytest.raises(UserError, match="keep"):
        parse_keep(wrong)


def test_position_i_counts_at_step_s_exactly_if_token_i_2_s_is_an_answer_token():
    item = collate([AnswerSet([record(3, 5)])[0], AnswerSet([record(1, 4)])[0]])
    rows, positions = supervised(item["loss_mask"])
    mask = step_masks(positions, 3)
    for step in range(3):
        found = {
            (int(b), int(p) - 1 - step)
            for b, p in zip(rows[mask[step]], positions[mask[step]], strict=True)
        }
        wanted = {
            (b, i)
            for b in range(2)
            for i in range(8)
            if i + 2 + step < 8 and item["loss_mask"][b, i + 2 + step]
        }
        assert found == wanted
