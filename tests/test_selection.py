"""Which tokens count: number, order, ties, and what never happens."""

from dataclasses import replace
from decimal import Decimal

import pytest
import torch

from adaspec_eagle.distill import AnswerSet, collate
from adaspec_eagle.errors import UserError
from adaspec_eagle.selection import (
    BY_COUNT,
    NEEDS,
    SELECTIONS,
    TokenStats,
    check_selection,
    chosen_weights,
    divisor,
    highest,
    keep_at,
    kept,
    needs,
    parse_keep,
    select,
)
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


def test_scores_are_compared_in_their_own_precision():
    score = torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64)
    assert highest(score, torch.ones(2, dtype=torch.bool), "0.5").tolist() == [False, True]


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


def stats(seed: int = 0, steps: int = 3, keep: str = "0.4") -> TokenStats:
    """Two rows with 6 and 4 supervised positions, the first of which nothing predicts at step 2."""
    draw = torch.Generator().manual_seed(seed)
    positions = torch.tensor([1, 2, 3, 4, 5, 6, 4, 5, 6, 7])
    shape = (steps, len(positions))
    return TokenStats(
        loss=torch.rand(shape, generator=draw),
        mask=step_masks(positions, steps),
        rows=torch.tensor([0] * 6 + [1] * 4),
        positions=positions,
        keep=Decimal(keep),
        generator=torch.Generator().manual_seed(seed),
        reference=torch.rand(shape, generator=draw),
        entropy=torch.rand(shape, generator=draw),
        flatness=torch.rand(shape, generator=draw),
        rank=torch.randint(0, 6, shape, generator=draw).float(),
        overlap=torch.rand(shape, generator=draw),
    )


@pytest.mark.parametrize("name", SELECTIONS)
def test_weights_lie_within_the_mask_and_count_what_they_are_divided_by(name):
    given = stats()
    weights = SELECTIONS[name](given)
    assert weights.shape == given.mask.shape
    assert not weights[~given.mask].any()
    assert ((weights >= 0) & (weights <= 1)).all()
    assert weights.sum() > 0
    wanted = given.mask.sum(1) if name in BY_COUNT else weights.sum(1)
    assert divisor(name, given.mask, given.keep).tolist() == wanted.tolist()


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_reads_no_more_than_it_says(name):
    given = stats()
    bare = dict.fromkeys(("entropy", "flatness", "rank", "overlap", "reference"))
    read = {"reference" if n == "average" else n: None for n in NEEDS.get(name, ())}
    kept_facts = {n: getattr(given, n) for n in read}
    assert torch.equal(
        SELECTIONS[name](replace(stats(), **(bare | kept_facts))), SELECTIONS[name](stats())
    )


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("adaspec", lambda s: s.loss - s.reference),
        ("largest", lambda s: s.loss),
        ("smallest", lambda s: -s.loss),
        ("entropy", lambda s: s.entropy),
        ("flatness", lambda s: s.flatness),
    ],
)
def test_a_fraction_k_is_the_one_with_the_largest_score(name, score):
    given = stats()
    weights, scores = SELECTIONS[name](given), score(given)
    for step in range(3):
        inside = scores[step][given.mask[step]]
        least = inside.sort(descending=True).values[kept(len(inside), "0.4") - 1]
        assert torch.equal(weights[step].bool(), given.mask[step] & (scores[step] >= least))


def test_random_tokens_follow_from_the_generator_alone():
    first, again, other = (SELECTIONS["random"](stats(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_gap_decides_how_many_count():
    given = stats()
    wanted = given.mask & (given.loss > given.reference)
    assert torch.equal(SELECTIONS["adaspec-gap"](given), wanted)


def test_earlier_steps_at_the_same_index_decide_what_is_reached():
    """Against a loop: step s at position p stands at index p - 1 - s, as step s - 1 at p - 1."""
    given = stats()
    where = {
        (int(r), int(p)): m
        for m, (r, p) in enumerate(zip(given.rows, given.positions, strict=True))
    }
    reached, best = SELECTIONS["reach"](given), SELECTIONS["top3"](given)
    for (row, p), m in where.items():
        for step in range(3):
            if not given.mask[step, m]:
                continue
            earlier = [(j, where.get((row, p - step + j))) for j in range(step)]
            chance, passed = 1.0, bool(given.rank[step, m] < 3)
            for j, at in earlier:
                if at is not None and all(where.get((row, p - n)) for n in range(step - j)):
                    chance *= float(given.overlap[j, at])
                    passed = passed and bool(given.rank[j, at] < 3)
            assert float(reached[step, m]) == pytest.approx(chance)
            assert bool(best[step, m]) == passed


def test_annealing_goes_from_all_tokens_to_the_fraction():
    keep = Decimal("0.4")
    assert [keep_at("adaspec-anneal", keep, t) for t in (0, 0.5, 1)] == [1, Decimal("0.7"), keep]
    assert keep_at("adaspec", keep, 0.0) == keep


def test_a_selection_of_ones_own_is_given_everything_and_divided_by_all_tokens(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def half(stats):\n    return 0.5 * stats.mask\n")
    name = f"{file}:half"
    check_selection(name)
    assert set(needs(name)) == {"entropy", "flatness", "rank", "overlap"}
    given = stats()
    assert divisor(name, given.mask, given.keep).tolist() == given.mask.sum(1).tolist()


def test_weights_of_a_users_own_count_within_the_mask_alone(tmp_path):
    file = tmp_path / "mine.py"
    body = "1 + 0.0 / stats.mask"  # NaN outside
    file.write_text(f"def mine(stats):\n    return {body}\n")
    given = stats()
    assert torch.equal(chosen_weights(f"{file}:mine", given), given.mask.float())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("0.5", "gave float"),
        ("stats.mask[0]", "not a tensor of weights"),
        ("-1.0 * stats.mask", "negative"),
    ],
)
def test_weights_that_are_none_are_refused(tmp_path, body, words):
    file = tmp_path / "mine.py"
    file.write_text(f"def mine(stats):\n    return {body}\n")
    given = stats()
    assert chosen_weights("none", given).shape == given.mask.shape
    with pytest.raises(UserError, match=words):
        chosen_weights(f"{file}:mine", given)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("adaspek", "--select"),
        ("mine.py", "--select"),
        ("", "--select"),
        ("nowhere.py:mine", "no file nowhere.py"),
        (f"{__file__}:nothing", "no function 'nothing'"),
    ],
)
def test_a_selection_that_is_none_is_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        check_selection(wrong)
