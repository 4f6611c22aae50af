"""What the log says about speed and selection."""

import torch

from adaspec_eagle.plots import sheet, training_drawings
from adaspec_eagle.watch import BANDS, Watch, frequency_bands


def test_bands_follow_the_rank_of_a_token_among_the_answers():
    answers = [[7] * 3 + [5] * 2, [9], [5] * 2]
    bands = frequency_bands(answers, 12_000)
    assert bands[[5, 7, 9]].tolist() == [0, 0, 0]
    assert torch.bincount(bands).tolist() == [100, 900, 9_000, 2_000]
    assert list(BANDS.values()) == [100, 1000, 10_000]


def test_shares_of_the_selection_are_counted_by_step_and_by_band():
    watch = Watch(torch.tensor([0, 0, 1, 3]), steps=2)
    tokens = torch.tensor([0, 1, 2, 3])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    chosen = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]]).bool()
    watch.add(tokens, mask, chosen)
    watch.pause(-100.0)  # as if it had taken a hundred seconds
    found = watch.take()
    assert abs(found["tokens_per_s"] - 0.04) < 0.001
    assert (found["kept_step_0"], found["kept_step_1"]) == (0.75, 0.25)
    kept = [found[f"kept_{name}"] for name in (*BANDS, "rest")]
    assert kept == [0.25, 0.25, 0.0, 0.5]
    torch.testing.assert_close(found["all_top_100"], 3 / 7)
    assert watch.take()["tokens_per_s"] == 0
    watch.add(tokens, mask, mask)
    assert "kept_step_0" not in watch.take()  # nothing was selected


def test_curves_are_drawn_of_any_history(tmp_path):
    sheet(training_drawings({"curves": []}), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    line = {"step": 1, "loss": 2.0, "tokens_per_s": 9.0, "eval_match_0": 0.5, "eval_match_1": 0.4}
    curves = [line, line | {"step": 2, "eval_tau_sim": 1.4}]
    drawn = training_drawings({"curves": curves})
    assert [one.name for one in drawn] == ["loss", "match", "tau_sim", "throughput"]
    sheet(drawn, tmp_path / "some.png")
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
