"""Trees that pay: what a planner decides from known costs, and that it changes no output."""

import importlib
import json
import math
import random

import pytest
import torch

from adaspec_eagle import generate
from adaspec_eagle.auto import PATIENCE, Costs, Planner, costs_of, measure_costs
from adaspec_eagle.draft import Auto, Drafter
from adaspec_eagle.generate import Answers, decode
from adaspec_eagle.sampling import Row, Sampler
from tests.test_lossless import oracle, prompts
from tests.tiny import tiny_head, tiny_target

generate_module = importlib.import_module("adaspec_eagle.generate")  # the function hides it
SIZES = [1, 2, 4, 8, 16, 32, 64]


def flat(draft: float = 0.0, slope: float = 0.0) -> Costs:
    """A target whose forward takes 1 s, and `slope` more for each further token."""
    return Costs(SIZES, [1 + slope * (n - 1) for n in SIZES], draft)


def test_costs_between_sizes_are_interpolated():
    costs = Costs([1, 4, 8], [1.0, 4.0, 4.0], 0.1)
    assert costs.of_target(1) == 1.0
    assert costs.of_target(2) == 2.0
    assert costs.of_target(6) == 4.0
    assert costs.of_target(16) == 4.0


def test_nodes_are_verified_exactly_while_they_pay():
    """Nodes pay if their chances exceed rate x the seconds that they add; in timed numbers."""
    planner = Planner(flat(slope=0.1), rows=1, most_nodes=60)
    planner.tokens, planner.seconds = 2.0, 1.0  # 2 tokens/s: a node must bring 0.2 tokens
    chances = torch.tensor([[0.9, 0.5, 0.3, 0.25, 0.19, 0.1]])
    planner.timed = set(range(64))
    assert planner.nodes(chances.log(), torch.ones(1, 6, dtype=torch.long)) == 4
    planner.timed = {2, 4, 6}  # tokens of a forward, the root's included
    assert planner.nodes(chances.log(), torch.ones(1, 6, dtype=torch.long)) == 5
    planner.timed = {2, 4, 16}
    assert planner.nodes(chances.log(), torch.ones(1, 6, dtype=torch.long)) == 3
    assert Planner(flat(slope=9.0), 1, 60).nodes(chances.log(), torch.ones(1, 6).long()) == 1
    assert Planner(flat(), 1, 6).nodes(chances.log(), torch.ones(1, 6).long()) == 6


def test_levels_are_drafted_while_they_pay():
    beam = torch.tensor([[0.5, 0.2]]).log()
    assert Planner(flat(draft=0.01), 1, 60).wide(1, beam) == 2
    assert Planner(flat(draft=1.0), 1, 60).wide(1, beam) == 0
    assert Planner(flat(draft=0.01), 1, 60).wide(1, torch.tensor([[1e-3]]).log()) == 0


def test_only_nodes_that_are_worth_verifying_have_children():
    """By what a rank brings in all rows; one at least where a level pays for all of them."""
    planner = Planner(flat(draft=0.01, slope=0.1), 1, 60)
    planner.tokens, planner.seconds = 2.0, 1.0  # 2 tokens/s: a node must bring 0.2 tokens
    chances = torch.tensor([[0.5, 0.3, 0.15, 0.04]])
    assert planner.wide(1, chances.log()) == 2
    assert planner.wide(1, torch.full((1, 8), 0.19).log()) == 1
    for rows in (2, 8):  # more rows at more tokens a second, each of these as dear
        planner = Planner(flat(draft=0.01, slope=0.1), rows, 60)
        planner.tokens, planner.seconds = 2.0 * rows, 1.0
        assert planner.wide(1, chances.log().expand(rows, -1)) == 2


def test_drafting_that_pays_a_little_is_seldom_given_up():
    """Of 40 answers of 400 rounds, of one to four tokens, 1.15 times as fast as plain decoding."""
    numbers, given_up = random.Random(0), 0
    for _ in range(40):
        planner = Planner(flat(draft=0.2, slope=0.05), 1, 60)  # a round takes 2 s, brings 2.3
        for _ in range(400):
            accepted = numbers.choices([0, 1, 2, 3], [30, 30, 20, 20])[0]
            planner.learn([[-0.7] * 4], [[1, 2, 3, 4]], [accepted], 3, 4)
            if not planner.pays():
                given_up += 1
                break
    assert planner.costs.draft * 4 + planner.costs.of_target(5) == pytest.approx(2)
    assert given_up <= 2


def test_a_narrowed_tree_is_a_part_of_the_whole_one(monkeypatch):
    """Its nodes have the parents, tokens and scores that they have where all the beam is grown."""
    target = tiny_target()
    head = tiny_head(target)
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 97, (2, 9), generator=numbers)
    features = torch.randn(2, 8, 96, generator=numbers, dtype=torch.float64)

    def grown(wide):
        monkeypatch.setattr(Planner, "wide", lambda self, depth, beam: wide[depth])
        monkeypatch.setattr(Planner, "nodes", lambda self, scores, depths: scores.shape[1])
        drafter = Drafter(head, Auto(width=4, depth=4), planner=Planner(flat(), 2, 63))
        with torch.no_grad():
            drafter.prefill(features, ids, torch.tensor([8, 6]))
            tree, _ = drafter.grow(torch.tensor([9, 10]))
        found = {}
        for row in range(2):
            paths = {0: (row,)}
            for n in range(1, tree.tokens.shape[1]):
                paths[n] = (*paths[int(tree.parents[row, n])], int(tree.tokens[row, n]))
                found[paths[n]] = float(tree.scores[row, n])
        return found

    whole, narrowed = grown([0, 4, 4, 4]), grown([0, 3, 2, 1])
    assert len(narrowed) == 2 * 4 * (1 + 3 + 2 + 1)
    assert max(map(len, narrowed)) == 5
    assert set(narrowed) <= set(whole)
    for path, score in narrowed.items():
        assert whole[path] == pytest.approx(score, abs=1e-6)


def test_probabilities_are_corrected_by_what_was_accepted():
    """A head that promises 0.8 and is accepted every other round is trusted 0.5 / 0.8."""
    planner = Planner(flat(draft=0.01), 1, 60)
    for turn in range(400):
        planner.learn([[math.log(0.8)]], [[1]], [turn % 2], 1, 1)
    assert planner.trust(1) == pytest.approx(0.5 / 0.8, abs=0.06)
    assert planner.trust(2) == 1.0
    assert planner.rate == pytest.approx(1.5 / 1.02, rel=0.05)


def test_rows_that_have_left_are_not_counted_against_drafting():
    """What drafting brings a row, against what it would have without, stays as it was."""
    planner = Planner(flat(draft=0.01), 4, 60)
    scores, depths = [[math.log(0.9)]] * 4, [[1]] * 4
    for _ in range(2 * PATIENCE):
        planner.learn(scores, depths, [1, 1, 1, 1], 1, 1)
    before = planner.rate / planner.plain_rate
    planner.keep(1)
    assert planner.rate / planner.plain_rate == pytest.approx(before)
    for _ in range(PATIENCE):
        planner.learn(scores[:1], depths[:1], [1], 1, 1)
    assert planner.pays()
    assert planner.rate / planner.plain_rate == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("rows", [4, 10])
def test_a_row_is_drafted_for_while_it_pays_whatever_becomes_of_the_others(rows):
    """They leave the batch, or stand at rest in it, after five tokens."""
    target = tiny_target("qwen3")
    ids, mask = prompts(1)
    head = oracle(target, ids, mask, depth=3)
    prompt, shape = ids[0][mask[0].bool()], Auto(width=2, costs=flat(draft=0.02, slope=0.01))
    tau = []
    for count in (1, rows):
        answers = Answers(60, frozenset(), [[] for _ in range(count)])
        answers.stops = lambda row, answer: row in range(1, 4) and len(answer) >= 5
        sampler = Sampler([Row(row, prompt.tolist(), len(prompt)) for row in range(count)])
        decode(target, head.bind(target), [prompt] * count, shape, sampler, answers)
        assert answers.by_row[0].undrafted == 0
        tau.append(answers.by_row[0].tau)
    assert tau[1] == pytest.approx(tau[0], rel=0.15)


def test_drafting_that_cannot_pay_is_given_up_and_counted(monkeypatch):
    monkeypatch.setattr("adaspec_eagle.auto._KNOWN", {})
    module = "adaspec_eagle.auto.measure_costs"
    monkeypatch.setattr(module, lambda *_: flat(draft=5.0, slope=1.0))
    target = tiny_target()
    ids, mask = prompts(1)
    options = {"max_new_tokens": 100, "ignore_eos": True}
    plain = generate(target, None, ids, mask, **options)
    found = generate(target, tiny_head(target), ids, mask, tree="auto", **options)
    assert found.answers == plain.answers
    assert 100 - 2 * PATIENCE - 5 < found.stats.undrafted < 100 - PATIENCE + 1


def test_a_good_head_is_given_deep_trees(monkeypatch):
    monkeypatch.setattr("adaspec_eagle.auto._KNOWN", {})
    monkeypatch.setattr("adaspec_eagle.auto.measure_costs", lambda *_: flat(draft=0.02, slope=0.01))
    target = tiny_target("qwen3")
    ids, mask = prompts(1)
    head = oracle(target, ids, mask, depth=6)
    options = {"max_new_tokens": 50, "ignore_eos": True}
    found = generate(target, head, ids, mask, tree=Auto(width=2), **options)
    assert found.answers == generate(target, None, ids, mask, **options).answers
    assert found.stats.tau > 4
    assert found.stats.undrafted == 0


def test_trees_shaped_ahead_follow_what_the_last_rounds_had():
    """Deep and large while the head is sure and right, one level that is not worth it when not."""
    planner = Planner(flat(draft=0.01, slope=0.05), 1, 60, ahead=True)
    sizes = []
    for turn in range(100):
        sure, levels, nodes = turn < 40, min(planner.levels, Auto.depth), planner.count
        scores = [-0.05 * n if sure else -9.0 for n in range(60)]
        depths = [1 + n * levels // 60 for n in range(60)]
        passed = min(levels, depths[nodes - 1]) if sure else 0
        planner.learn([scores], [depths], [passed], levels, nodes)
        sizes.append((levels, nodes))
    assert sizes[39][0] > 5
    assert sizes[39][1] > 30
    assert sizes[99][0] == 1
    assert sizes[99][1] < 8
    assert {nodes + 1 for _, nodes in sizes[1:]} <= {*SIZES, 61}


def test_a_large_batch_is_timed_with_small_trees_alone(monkeypatch):
    target = tiny_target()
    seen = []
    monkeypatch.setattr("adaspec_eagle.auto.time_draft", lambda *_: 0.1)
    monkeypatch.setattr(
        "adaspec_eagle.auto.time_target",
        lambda _, forward, rows, size: seen.append(rows * size) or 0.1 * size,
    )
    costs = measure_costs(target, tiny_head(target), 100, 8)
    assert costs.sizes == [1, 2, 4]
    assert max(seen) <= 512
    planner = Planner(costs, rows=100, most_nodes=63)
    assert planner.nodes(torch.zeros(100, 40), torch.ones(100, 40, dtype=torch.long)) <= 3
    assert measure_costs(target, tiny_head(target), 999, 8).sizes == [1, 2]


def test_costs_are_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setattr("adaspec_eagle.auto._KNOWN", {})
    monkeypatch.setattr("adaspec_eagle.auto.default_cache_dir", lambda: tmp_path)
    target = tiny_target()
    head = tiny_head(target)
    measured = []

    def measure(*args):
        measured.append(args)
        return measure_costs(*args)

    monkeypatch.setattr("adaspec_eagle.auto.measure_costs", measure)
    costs = costs_of(target, head, 2, 8)
    assert all(seconds > 0 for seconds in [*costs.target, costs.draft])
    assert costs.target == sorted(costs.target)
    monkeypatch.setattr("adaspec_eagle.auto._KNOWN", {})
    assert costs_of(target, head, 2, 8) == costs
    (file,) = (tmp_path / "costs").glob("*.json")
    assert json.loads(file.read_text())["facts"]["rows"] == 2
    costs_of(target, head, 3, 8)
    assert len(measured) == 2
    file.write_text("{")  # a damaged file is measured again
    monkeypatch.setattr("adaspec_eagle.auto._KNOWN", {})
    costs_of(target, head, 2, 8)
    assert len(measured) == 3
