"""Sampled decoding: the same tokens whatever was drafted, and the target's law."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from adaspec_eagle import generate
from adaspec_eagle.draft import Dynamic
from adaspec_eagle.errors import UserError
from adaspec_eagle.sampling import (
    ACCEPT,
    DRAFT,
    PICK,
    Row,
    Sampler,
    draw,
    greatest,
    uniforms,
    warpers,
)
from adaspec_eagle.tree import DraftTree
from tests.test_lossless import prompts
from tests.tiny import ARCHITECTURES, VOCAB, tiny_head, tiny_target

TREES = {
    "chain": "chain:3",
    "auto": "auto",
    "static": "static",
    "dynamic": Dynamic(nodes=12, depth=4, width=4),
}
CUTS = {
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 1.0, "top_k": 20},
    "top_p": {"temperature": 1.3, "top_p": 0.7},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "top_p and min_p": {"temperature": 1.0, "top_p": 0.9, "min_p": 0.05},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.4},
    "least": {"temperature": 1.0, "min_new_tokens": 12},
}


def batch(rows: int) -> tuple[Tensor, Tensor]:
    """Ragged prompts of 9, 6, 3, 9, ... tokens, padded on the left."""
    torch.manual_seed(4)
    ids = torch.randint(8, VOCAB, (rows, 9))
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, : 3 * (row % 3)] = mask[row, : 3 * (row % 3)] = 0
    return ids, mask


# ---- the first test: trees change nothing --------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sampled_tree_output_equals_sampling_without_a_draft(arch, tree, rows):
    target = tiny_target(arch)
    head = tiny_head(target)
    ids, mask = batch(rows)
    options = {"max_new_tokens": 20, "temperature": 0.7, "seed": 3}
    plain = generate(target, None, ids, mask, **options)
    found = generate(target, head, ids, mask, tree=TREES[tree], **options)
    assert found.answers == plain.answers
    assert found.stats.tau > 1.0 or tree != "dynamic" or rows < 8  # some drafts are accepted


@pytest.mark.parametrize("cut", CUTS)
def test_processors_change_nothing_about_that(cut):
    target = tiny_target()
    head = tiny_head(target)
    ids, mask = batch(3)
    options = {"max_new_tokens": 20, "seed": 5, **CUTS[cut]}
    plain = generate(target, None, ids, mask, **options)
    for tree in TREES.values():
        assert generate(target, head, ids, mask, tree=tree, **options).answers == plain.answers


@pytest.mark.parametrize("tree", [*TREES.values(), "sampled:3"])
def test_a_row_draws_alone_what_it_draws_in_a_batch(tree):
    target = tiny_target("qwen3")
    head = tiny_head(target)
    ids, mask = batch(8)
    options = {"tree": tree, "max_new_tokens": 16, "temperature": 1.0, "seed": 2}
    together = generate(target, head, ids, mask, **options)
    for row in range(8):
        alone = ids[row][mask[row].bool()][None]
        found = generate(target, head, alone, row_keys=[row], **options)
        assert found.answers[0] == together.answers[row]


@pytest.mark.parametrize("vocab", [256, 1024, 300], ids=["block", "blocks", "no-blocks"])
def test_the_greatest_is_that_of_max_ties_and_nan_included(vocab):
    torch.manual_seed(0)
    for turn in range(40):
        logits = torch.randn(1 + turn % 3, vocab).to(torch.bfloat16)
        if turn % 2:
            logits = logits.round()  # many ties
        if turn % 5 == 4:
            logits[-1, torch.randint(vocab, (2,))] = float("nan")
        for found, wanted in zip(greatest(logits), logits.max(-1), strict=True):
            assert torch.equal(found.nan_to_num(9.0), wanted.nan_to_num(9.0))


def test_seeds_differ_and_repeat():
    target = tiny_target()
    ids, mask = batch(3)
    run = partial(generate, target, None, ids, mask, max_new_tokens=20, temperature=1.0)
    assert run(seed=1).answers == run(seed=1).answers
    assert run(seed=1).answers != run(seed=2).answers


# ---- greedy with processors, and stopping, as model.generate has them ----------------------------


@pytest.mark.parametrize("tree", TREES)
def test_greedy_with_processors_equals_generate(tree):
    target = tiny_target()
    ids, mask = batch(1)
    found = generate(
        target, tiny_head(target), ids, mask, tree=TREES[tree], max_new_tokens=24,
        repetition_penalty=1.5, min_new_tokens=10,
    )  # fmt: skip
    wanted = target.model.generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0,
        repetition_penalty=1.5, min_new_tokens=10,
    )  # fmt: skip
    assert torch.equal(found.sequences, wanted)


def test_several_end_tokens_end_an_answer():
    target = tiny_target()
    ids, mask = prompts(1)
    free = generate(target, None, ids, mask, max_new_tokens=24, ignore_eos=True).answers[0]
    target.eos_token_ids = [free[9], free[5]]
    found = generate(target, tiny_head(target), ids, mask, max_new_tokens=24).answers[0]
    assert found == free[: min(free.index(free[9]), free.index(free[5])) + 1]


# ---- the law -------------------------------------------------------------------------------------

SIZE = 6  # vocabulary of the toy target, a table: the next token depends on the last one


def toy(seed: int) -> Tensor:
    """Logits `[SIZE, SIZE]` of the next token behind each token."""
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).double() * 1.5


def shape_tree(kind: str, last: Tensor, q: Tensor, sampler: Sampler):
    """A draft below the last tokens `[B]`: (tree, distributions for sampled chains)."""
    b = len(last)
    if kind.startswith("sampled"):
        depth, tokens, drafts = int(kind[-1]), [last], []
        for d in range(depth):
            drafts.append(q[tokens[-1]])
            numbers = sampler.numbers(range(b), d, DRAFT)
            tokens.append(draw(drafts[-1], numbers))
        steps = torch.arange(depth + 1).expand(b, -1)
        return DraftTree(torch.stack(tokens, 1), (steps - 1).clamp(min=0), steps), drafts
    if kind == "static":  # the two best, and the best below each
        best = q.argsort(-1, descending=True)
        first, second = best[last, 0], best[last, 1]
        tokens = torch.stack([last, first, second, best[first, 0], best[second, 0]], 1)
        parents, depths = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 1, 1, 2, 2])
    else:  # dynamic: the shape depends on the row
        best = q.argsort(-1, descending=True)
        first, second = best[last, 0], best[last, 1]
        deep = (last % 2 == 0)[:, None]
        tokens = torch.where(
            deep,
            torch.stack([last, first, best[first, 0], best[first, 1]], 1),
            torch.stack([last, first, second, best[second, 0]], 1),
        )
        parents = torch.where(deep, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 2]))
        depths = torch.where(deep, torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
    return DraftTree(tokens, parents.expand(b, -1), depths.expand(b, -1)), None


def emit(kind: str, processors: LogitsProcessorList, draws: int, length: int):
    """`length` tokens of each of many rows, round by round: (tokens, accepted, asked)."""
    p, q = toy(1), toy(2).softmax(-1)
    if kind == "sampled-near2":
        q = (toy(1) + 0.5 * toy(2)).softmax(-1)
    sampler = Sampler([Row(n, [0], 1, processors) for n in range(draws)], sample=True, seed=9)
    answers: list[list[int]] = [[0] for _ in range(draws)]
    accepted = asked = 0
    while min(map(len, answers)) <= length:
        last = torch.tensor([answer[-1] for answer in answers])
        tree, drafts = shape_tree(kind, last, q, sampler)
        depth = int(tree.depths.max())
        verdict, _ = sampler.walk(tree, p[tree.tokens], depth, [True] * draws, drafts)
        accepted += int((verdict.length > 1).sum())
        asked += draws
        for n, (row, count) in enumerate(
            zip(verdict.tokens.tolist(), verdict.length.tolist(), strict=True)
        ):
            answers[n] += row[:count]
            sampler.extend(n, row[:count])
    return torch.tensor([answer[1 : length + 1] for answer in answers]), accepted, asked


def expected_joint(processors: LogitsProcessorList) -> Tensor:
    """P(t1, t2) `[SIZE, SIZE]` behind token 0, by the definition of the processors."""
    p, joint = toy(1), torch.zeros(SIZE, SIZE).double()
    first = processors(torch.tensor([[0]]), p[:1].clone()).softmax(-1)[0]
    for one in range(SIZE):
        ids = torch.tensor([[0, one]])
        joint[one] = first[one] * processors(ids, p[one : one + 1].clone()).softmax(-1)[0]
    return joint


def assert_law(kind: str, processors: LogitsProcessorList, draws: int, law=None) -> None:
    law = processors if law is None else law
    tokens, *_ = emit(kind, processors, draws, 2)
    counts = torch.bincount(tokens[:, 0] * SIZE + tokens[:, 1], minlength=SIZE * SIZE).double()
    wanted = expected_joint(law).flatten() * draws
    possible = wanted > 1e-9
    assert counts[~possible].sum() == 0
    statistic = float(((counts - wanted)[possible] ** 2 / wanted[possible]).sum())
    assert chi_square_tail(statistic, int(possible.sum()) - 1) > 1e-4


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(chi-square >= statistic): the regularised upper incomplete gamma function."""
    half = torch.tensor([degrees / 2, statistic / 2]).double()
    return float(torch.special.gammaincc(half[0], half[1]))


DRAFTS = ["static", "dynamic", "sampled1", "sampled3", "sampled-near2"]
LAWS = {
    "none": LogitsProcessorList(),
    "temperature": warpers(0.6),
    "top_k": warpers(1.0, top_k=3),
    "top_p": warpers(1.0, top_p=0.8),
    "min_p": warpers(1.0, min_p=0.2),
    "top_p, min_p": warpers(1.3, top_p=0.9, min_p=0.1),
    "repetition": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0)]),
}


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("law", ["none", "top_p", "repetition"])
def test_emitted_pairs_follow_the_law_in_a_few_thousand_draws(kind, law):
    assert_law(kind, LAWS[law], 4_000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAFTS)
def test_emitted_pairs_follow_the_law(kind):
    assert_law(kind, LAWS["top_p"], 100_000)


@pytest.mark.long
@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("law", LAWS)
def test_emitted_pairs_follow_every_law(kind, law):
    assert_law(kind, LAWS[law], 200_000)


@pytest.mark.parametrize("kind", ["sampled1", "sampled-near2"])
def test_sampled_drafts_are_accepted_as_often_as_theory_says(kind):
    """One round behind token 0: accepted with probability sum min(p, q)."""
    draws = 20_000
    p, q = toy(1).softmax(-1), toy(2).softmax(-1)
    if kind == "sampled-near2":
        q = (toy(1) + 0.5 * toy(2)).softmax(-1)
    sampler = Sampler([Row(n, [0], 1) for n in range(draws)], sample=True, seed=1)
    tree, drafts = shape_tree(kind, torch.zeros(draws, dtype=torch.long), q, sampler)
    verdict, _ = sampler.walk(tree, toy(1)[tree.tokens], int(kind[-1]), [True] * draws, drafts)
    found = float((verdict.length > 1).double().mean())
    wanted = float(torch.minimum(p[0], q[0]).sum())
    assert abs(found - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / draws)


def test_a_law_that_is_a_little_off_is_found_out():
    with pytest.raises(AssertionError):
        assert_law("static", warpers(1.1), 20_000, law=LAWS["none"])


def test_numbers_are_uniform_and_belong_to_their_place():
    rows, positions = [n // 300 for n in range(90_000)], [n % 300 for n in range(90_000)]
    one = uniforms(7, rows, positions)
    assert torch.equal(one, uniforms(7, rows, positions))
    assert torch.equal(one[301:302], uniforms(7, [1], [1]))
    counts = torch.histc(one.float(), 100, 0, 1)
    assert chi_square_tail(float(((counts - 900) ** 2 / 900).sum()), 99) > 1e-4
    for other in (uniforms(8, rows, positions), uniforms(7, rows, positions, ACCEPT)):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1]) < 0.02
    assert PICK != ACCEPT


def test_a_draw_never_gives_an_impossible_token():
    weights = torch.tensor([[0.0, 1.0, 0.0]])
    for number in (0.0, 0.5, 1 - 2**-53):
        assert draw(weights, torch.tensor([number]).double()).item() == 1


def nucleus(top_p: float, seed: int = 0) -> Sampler:
    """Of one row, whose number follows from the seed."""
    processors = LogitsProcessorList([TopPLogitsWarper(top_p)])
    return Sampler([Row(0, [], 0, processors)], sample=True, seed=seed)


@pytest.mark.parametrize("top_p", [0.0, 1e-4, 0.3, 0.9])
def test_a_draw_from_a_nucleus_ends_and_is_within_it(top_p):
    """Also where hardly a draw from the whole vocabulary would be: tokens of nearly one chance."""
    scores = torch.linspace(0, 1, 3000, dtype=torch.float64)[None]
    kept = TopPLogitsWarper(top_p)(None, scores).isfinite()
    assert torch.equal(nucleus(top_p).distribution([0], scores) > 0, kept)
    for seed in range(20):
        assert kept[0, nucleus(top_p, seed)._choose([0], scores, 0)]


def test_the_sorted_nucleus_has_the_law_of_repeated_draws(monkeypatch):
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0, 3.5]])
    law = nucleus(0.7).distribution([0], scores)[0]
    for tries in (0, 1, 50):
        monkeypatch.setattr("adaspec_eagle.sampling.TRIES", tries)
        drawn = [int(nucleus(0.7, seed)._choose([0], scores, 0)) for seed in range(2000)]
        shares = torch.bincount(torch.tensor(drawn), minlength=5) / 2000
        assert (shares - law).abs().max() < 0.05


def test_tokens_that_tie_at_the_border_are_all_in_the_nucleus():
    """Of a draw and of the distribution that the ratio test compares with alike."""
    scores = torch.tensor([[2.0, 0.0, 0.0, 0.0, -5.0]])
    sampler = nucleus(0.8)
    support = sampler.distribution([0], scores)[0] > 0
    assert support.tolist() == [True, True, True, True, False]
    drawn = {int(nucleus(0.8, seed)._choose([0], scores, 0)) for seed in range(300)}
    assert drawn == {0, 1, 2, 3}


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": 1e-39}, "temperature 1e-39"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty inf"),
        ({"row_keys": [1, 2]}, "row_keys"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask of shape"),
        ({"tree": "chain:600"}, "no room in a context"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p 0.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k 0"),
        ({"temperature": 1.0, "min_p": 2.0}, "min_p 2.0"),
        ({"temperature": 1.0, "seed": -1}, "seed -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"min_new_tokens": 99}, "min_new_tokens 99"),
        ({"tree": "sampled:2"}, "temperature"),
    ],
)
def test_values_out_of_range_are_refused(options, named):
    target = tiny_target()
    with pytest.raises(UserError, match=named):
        generate(target, tiny_head(target), torch.tensor([[9, 10]]), max_new_tokens=8, **options)


def test_processors_without_a_tree_form_are_refused_by_name():
    processors = LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])
    with pytest.raises(UserError, match="NoRepeatNGramLogitsProcessor"):
        Sampler([Row(0, [], 0, processors)])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_reported_with_layer_and_token(temperature):
    target = tiny_target()
    embedding = target.model.get_input_embeddings().weight
    embedding.data[50] = float("nan")
    ids = torch.tensor([[9, 10, 50, 11]])
    with pytest.raises(UserError, match=r"hidden state 0, at token 2 \(id 50\)"):
        generate(target, tiny_head(target), ids, max_new_tokens=8, temperature=temperature)
