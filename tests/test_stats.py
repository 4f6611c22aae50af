"""Identities of the acceptance figures."""

import json

import pytest

from adaspec_eagle.stats import AcceptanceStats


def chain_stats() -> AcceptanceStats:
    """Ten rounds of chains of 3: 4 accepted none, 3 one, 1 two, 2 all three."""
    return AcceptanceStats(
        accepted=[4, 3, 1, 2], offered=[10, 10, 10], rounds=10, tokens=21, new_tokens=22, nodes=40
    )


def test_tau_is_tokens_over_rounds_and_one_without_rounds():
    assert chain_stats().tau == pytest.approx(2.1)
    assert AcceptanceStats().tau == 1.0
    assert AcceptanceStats(accepted=[7], rounds=7, tokens=7).tau == 1.0


def test_one_plus_acceptance_by_depth_is_tau_when_nothing_is_trimmed():
    stats = chain_stats()
    assert stats.acceptance_by_depth == pytest.approx([0.6, 0.3, 0.2])
    assert 1 + sum(stats.acceptance_by_depth) == pytest.approx(stats.tau)


def test_products_of_alpha_are_the_acceptance_by_depth_of_chains():
    stats = chain_stats()
    product = 1.0
    for alpha, share in zip(stats.alpha_by_depth, stats.acceptance_by_depth, strict=True):
        product *= alpha
        assert product == pytest.approx(share)


def test_greedy_alpha_counts_one_rejection_for_each_round_that_stopped_early():
    stats = chain_stats()
    accepted, rejected = 0 * 4 + 1 * 3 + 2 * 1 + 3 * 2, 4 + 3 + 1
    assert stats.greedy_alpha == pytest.approx(accepted / (accepted + rejected))


def test_alpha_asks_only_drafts_that_offered_a_token():
    """Five drafts of length 1 all accepted, five of length 2 rejected at once."""
    stats = AcceptanceStats(accepted=[5, 5], offered=[10, 5], rounds=10)
    assert stats.alpha_by_depth == pytest.approx([0.5, 0.0])


def test_without_a_draft_there_is_no_alpha():
    loop = AcceptanceStats(accepted=[7], offered=[], rounds=7, tokens=7, new_tokens=8)
    assert loop.alpha_by_depth == []
    assert loop.acceptance_by_depth == []
    assert loop.greedy_alpha == 0.0


def test_nothing_accepted_leaves_only_the_first_alpha():
    stats = AcceptanceStats(accepted=[6], offered=[6, 6], rounds=6, tokens=6)
    assert stats.alpha_by_depth == [0.0]
    assert stats.acceptance_by_depth == [0.0, 0.0]


def test_adding_is_a_ratio_of_sums_and_pads_the_shorter_histogram():
    short = AcceptanceStats([1, 1], [2], 2, 3, 4, 4, {"draft": 1.0})
    total = chain_stats() + short
    assert total.accepted == [5, 4, 1, 2]
    assert total.offered == [12, 10, 10]
    assert total.tau == pytest.approx((21 + 3) / (10 + 2))
    assert total.seconds == {"draft": 1.0}
    assert total == short + chain_stats()


def test_json_round_trip_gives_the_same_counts():
    stats = chain_stats()
    data = json.loads(json.dumps(stats.to_dict() | {"tau": stats.tau}))
    assert AcceptanceStats.from_dict(data) == stats
