"""Identities of the acceptance figures, their intervals and their records."""

import json

import numpy as np
import pytest

from adaspec_eagle.errors import UserError
from adaspec_eagle.record import (
    bootstrap_ratio,
    environment,
    markdown_table,
    resampled_sums,
    write_json,
)
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
    short = AcceptanceStats([1, 1], [2], 2, 3, 4, 4, {"draft": 1.0}, forward_seconds=0.75)
    total = chain_stats() + short
    assert total.accepted == [5, 4, 1, 2]
    assert total.offered == [12, 10, 10]
    assert total.tau == pytest.approx((21 + 3) / (10 + 2))
    assert total.seconds == {"draft": 1.0}
    assert total.forward_seconds == 0.75
    assert total == short + chain_stats()


def test_json_round_trip_gives_the_same_counts():
    stats = chain_stats()
    data = json.loads(json.dumps(stats.to_dict() | {"tau": stats.tau}))
    assert AcceptanceStats.from_dict(data) == stats


# ---- intervals and records -----------------------------------------------------------------------


def tokens_and_seconds(prompts: int) -> np.ndarray:
    """`[prompts, 4]`: tokens of two arms (equal), then seconds; the second is twice as fast."""
    rng = np.random.default_rng(5)
    tokens, speed = rng.integers(20, 130, prompts), rng.uniform(20, 40, prompts)
    return np.stack([tokens, tokens, tokens / speed, tokens / speed / 2], axis=1)


def speedup(sums: np.ndarray) -> float:
    """Tokens/s of the second arm over the first."""
    return (sums[1] / sums[3]) / (sums[0] / sums[2])


def test_an_equal_ratio_in_every_prompt_leaves_no_spread():
    """Pairing by prompt: the arms' speeds vary twofold between prompts, their ratio does not."""
    assert bootstrap_ratio(tokens_and_seconds(40), speedup) == pytest.approx([2.0, 2.0])


def test_interval_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(1).normal(10, 3, 400)
    columns = np.stack([values, np.ones(400)], axis=1)
    low, high = bootstrap_ratio(columns, lambda sums: sums[0] / sums[1])
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)


def test_the_same_seed_draws_the_same_prompts():
    columns = tokens_and_seconds(10)
    assert (resampled_sums(columns, seed=1) == resampled_sums(columns, seed=1)).all()
    assert (resampled_sums(columns, seed=1) != resampled_sums(columns, seed=2)).any()
    alone = resampled_sums(columns[:, :1], seed=1)
    assert (alone[:, 0] == resampled_sums(columns, seed=1)[:, 0]).all()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_json(tmp_path / "new" / "result.json", {"a": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_record_holds_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "result.json", {"tau": float("nan")})


def test_the_environment_is_json_and_names_versions():
    where = json.loads(json.dumps(environment()))
    assert where["packages"]["torch"]
    assert where["threads"] >= 1


def test_a_markdown_table_has_a_cell_for_each_column():
    lines = markdown_table(["arm", "tau"], [["tree", 2.5], ["chain", 1.9]]).splitlines()
    assert lines == ["| arm | tau |", "| :--- | ---: |", "| tree | 2.5 |", "| chain | 1.9 |"]
