"""Acceptance of a head by every definition: what it equals, and what it does not depend on."""

import pytest
import torch
from tiny import tiny_head, tiny_target

from adaspec_eagle.acceptance import acceptance_figures, stats_of, summarized
from adaspec_eagle.data import Record
from adaspec_eagle.distill import forced_counts, teacher_forced
from adaspec_eagle.generate import generate
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.targets import by_length

PROMPTS = [[1, 20, 21, 22], [1, 30], [1, 40, 41, 42, 43, 44, 45], [1, 50, 51]]


@pytest.fixture(scope="module")
def pair():
    target = tiny_target()
    return target, tiny_head(target)


def test_figures_are_those_of_decoding_and_of_teacher_forcing(pair):
    target, head = pair
    found = acceptance_figures(target, head, PROMPTS, max_new_tokens=20, depth=3)
    alone = [
        generate(target, head, torch.tensor([ids]), tree="chain:3", max_new_tokens=20)
        for ids in PROMPTS
    ]
    counts = sum((made.stats for made in alone), AcceptanceStats())
    assert found["tau"] == counts.tau
    assert found["greedy_alpha"] == counts.greedy_alpha
    assert found["alpha_by_depth"] == counts.alpha_by_depth
    records = [
        Record("", "", [], ids, made.answers[0], "", None, 0.0)
        for ids, made in zip(PROMPTS, alone, strict=True)
    ]
    forced = teacher_forced(target, head, records, steps=3)
    for name in ("overlap", "match", "tau_sim"):
        assert found[name] == pytest.approx(forced[name], abs=1e-6)


def test_a_prompts_counts_are_the_same_alone_and_in_a_batch(pair):
    one, four = (
        acceptance_figures(*pair, PROMPTS, max_new_tokens=16, depth=3, seed=5, batch_size=size)
        for size in (1, 4)
    )
    for left, right in zip(one["per_prompt"], four["per_prompt"], strict=True):
        for way in ("greedy", "sampled"):
            assert left[way] == right[way]
            for name, values in left[f"{way}_forced"].items():
                assert torch.allclose(
                    torch.tensor(values), torch.tensor(right[f"{way}_forced"][name]), atol=1e-5
                )


def test_batches_hold_rows_of_like_length_and_every_row_once():
    lengths = [10, 90, 70, 100, 30, 66, 21, 100, 67]
    batches = by_length(lengths, most=3)
    assert sorted(place for batch in batches for place in batch) == [*range(len(lengths))]
    assert batches == [[3, 7, 1], [2, 8, 5], [4, 6], [0]]


def test_figures_of_a_resample_are_those_of_its_sums(pair):
    found = acceptance_figures(*pair, PROMPTS, max_new_tokens=16, depth=3)
    rows = found.pop("per_prompt")
    assert summarized(rows) == found
    twice = summarized([*rows, *rows])
    assert twice["overlap_t1"] == pytest.approx(found["overlap_t1"])
    assert twice["rounds_t1"] == 2 * found["rounds_t1"]
    assert sum(stats_of(rows, "sampled"), AcceptanceStats()).tau == found["tau_t1"]


def test_sampled_chains_are_accepted_as_often_as_head_and_target_overlap():
    """Chains of one token from every position of long answers: the law of speculative sampling."""
    target = tiny_target()
    head = tiny_head(target, draft_vocab=None)
    prompts = [[1, 8 + i] for i in range(40)]
    found = acceptance_figures(target, head, prompts, max_new_tokens=48, depth=1, batch_size=40)
    judged = found["rounds_t1"]
    assert judged > 800
    error = (found["overlap_t1"][0] * (1 - found["overlap_t1"][0]) / judged) ** 0.5
    assert abs(found["alpha_t1"] - found["overlap_t1"][0]) < 4 * error


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_answers_shorter_than_the_unroll_have_no_index_at_which_all_steps_count(pair, length):
    """An answer of three tokens used to stop an unroll of five with a mismatch of shapes."""
    record = Record("", "", [], [1, 20, 21], [30] * length, "", None, 0.0)
    forced = forced_counts(*pair, [record], steps=5)
    assert forced.indices.tolist() == [0]
    assert forced.figures()["tau_sim"] == 1
