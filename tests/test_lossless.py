"""The output is the target's own, in float64, for every head, tree, architecture and batch."""

import gc
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adaspec_eagle import compiled, generate, packed
from adaspec_eagle.attention import GROUPED, grouped
from adaspec_eagle.cache import TreeCache
from adaspec_eagle.draft import Drafter, Dynamic, Static, chain
from adaspec_eagle.errors import UserError
from adaspec_eagle.head import DraftHead, HeadConfig, built_in_heads
from tests.tiny import ARCHITECTURES, VOCAB, tiny_head, tiny_target

TREES = ["chain:3", "static", "auto", Dynamic(nodes=12, depth=4, width=4)]


def prompts(rows: int) -> tuple[Tensor, Tensor]:
    """Ragged prompts, padded on the left: ids and attention mask `[B, 9]`."""
    torch.manual_seed(11)
    ids = torch.randint(8, VOCAB, (rows, 9))
    mask = torch.ones_like(ids)
    for row, gap in enumerate([0, 3, 6][:rows]):
        ids[row, :gap] = mask[row, :gap] = 0
    return ids, mask


def reference(target, ids, mask, new=24):
    return target.model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tree", TREES, ids=["chain", "static", "auto", "dynamic"])
@pytest.mark.parametrize("name", built_in_heads())
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_output_equals_the_targets_own(arch, name, tree, rows):
    target = tiny_target(arch)
    head = tiny_head(target, name, draft_vocab=None if rows == 1 else 40)
    ids, mask = prompts(rows)
    found = generate(target, head, ids, mask, tree=tree, max_new_tokens=24)
    assert torch.equal(found.sequences, reference(target, ids, mask))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_plain_loop_equals_generate_and_has_tau_one(arch):
    target = tiny_target(arch)
    ids, mask = prompts(3)
    found = generate(target, None, ids, mask, max_new_tokens=24)
    assert torch.equal(found.sequences, reference(target, ids, mask))
    assert found.stats.tau == 1.0


def test_right_padding_gives_the_same_answers():
    target = tiny_target()
    head = tiny_head(target)
    ids, mask = prompts(3)
    left = generate(target, head, ids, mask, max_new_tokens=16)
    rolled = torch.stack([row.roll(-int((m == 0).sum())) for row, m in zip(ids, mask, strict=True)])
    order = mask.sort(dim=1, descending=True).values
    right = generate(target, head, rolled, order, max_new_tokens=16)
    assert left.answers == right.answers


class Oracle(DraftHead):
    """Drafts the known continuation down to `depth`, and something else below."""

    def __init__(self, config: HeadConfig, truth: list[list[int]], depth: int) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(1))
        self.truth, self.depth = truth, depth

    @staticmethod
    def feature_layers(num_layers):
        return [num_layers]

    def fuse(self, features):
        return features

    def forward(self, hidden, tokens, positions, mask, cache, step):
        keys = torch.zeros(tokens.shape[0], 1, tokens.shape[1], 1, dtype=hidden.dtype)
        cache.update(keys, keys, 0)
        guess = torch.zeros_like(hidden)
        for b, row in enumerate(tokens.tolist()):
            for n, token in enumerate(row):
                place = int(positions[b, n]) + 1  # where `token` stands
                known = [t for t in self.truth if len(t) > place + 1 and t[place] == token]
                following = known[0][place + 1] if known else 0
                guess[b, n, 0] = following if step < self.depth else (following + 1) % VOCAB
        return guess

    def logits(self, hidden):
        return 30 * nn.functional.one_hot(hidden[..., 0].long(), VOCAB).to(hidden.dtype)


def oracle(target, ids, mask, depth) -> Oracle:
    long = generate(target, None, ids, mask, max_new_tokens=60, ignore_eos=True)
    truth = [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
    truth = [t + answer for t, answer in zip(truth, long.answers, strict=True)]
    config = HeadConfig.for_target("eagle1", target, target.vocab_size)
    return Oracle(config, truth, depth).eval()


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_a_draft_that_is_right_to_a_known_depth_is_accepted_to_that_depth(depth):
    target = tiny_target("qwen3")
    ids, mask = prompts(1)
    head = oracle(target, ids, mask, depth)
    found = generate(target, head, ids, mask, tree=chain(4), max_new_tokens=31, ignore_eos=True)
    assert found.stats.accepted == [0] * depth + [found.stats.rounds]
    assert found.stats.rounds == -(-30 // (depth + 1))
    plain = generate(target, None, ids, mask, max_new_tokens=31, ignore_eos=True)
    assert torch.equal(found.sequences, plain.sequences)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_draft_at_which_the_target_breaks_down_is_only_not_taken(temperature):
    """NaN at one node is NaN at all of its round, which is then taken without a draft."""
    target = tiny_target("qwen3")
    ids, mask = prompts(1)
    options = {"max_new_tokens": 31, "ignore_eos": True, "temperature": temperature}
    plain = generate(target, None, ids, mask, **options)
    head = oracle(target, ids, mask, depth=0)  # every draft is the token behind the right one
    head.truth = [ids[0][mask[0].bool()].tolist() + plain.answers[0]]
    seen = {token for row in head.truth for token in row}
    drafted = {(token + 1) % VOCAB for token in plain.answers[0][1:]} - seen
    assert drafted
    target.model.get_input_embeddings().weight.data[list(drafted)] = float("nan")
    seen = []

    def watch(tree, verdict):
        seen.append(tree.tokens.shape[1])

    found = generate(target, head, ids, mask, tree=chain(3), watch_tree=watch, **options)
    assert found.answers == plain.answers
    assert 1 in seen  # a round taken without its draft, which counts as verified all the same
    assert len(seen) == found.stats.rounds
    assert found.stats.nodes == 3 * found.stats.rounds
    assert found.stats.undrafted == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("first", [0, 1], ids=["at-once", "below-the-first-level"])
@pytest.mark.parametrize("tree", TREES, ids=["chain", "static", "auto", "dynamic"])
def test_a_head_that_gives_no_numbers_drafts_in_vain(tree, first, temperature):
    target = tiny_target()
    torch.manual_seed(0)
    ids = torch.randint(5, VOCAB, (1, 12))
    head = tiny_head(target, draft_vocab=40)
    forward = head.forward

    def broken(hidden, tokens, positions, mask, cache, step):
        out = forward(hidden, tokens, positions, mask, cache, step)
        return out * float("nan") if step >= first else out

    head.forward = broken
    options = {"max_new_tokens": 40, "ignore_eos": True, "temperature": temperature}
    plain = generate(target, None, ids, **options)
    assert generate(target, head, ids, tree=tree, **options).answers == plain.answers


@pytest.mark.parametrize("tree", [Dynamic(12, 4, 3), Dynamic(60, 10, 8)], ids=["small", "large"])
def test_a_head_of_enormous_logits_drafts_whole_trees(tree):
    """In float32 a child's score may be its parent's: the child would be chosen alone."""
    target = tiny_target()
    head = tiny_head(target, draft_vocab=40)
    logits, trees = head.logits, []
    head.logits = lambda hidden: 1e5 * logits(hidden)
    options = {"max_new_tokens": 60, "ignore_eos": True}
    ids = torch.randint(5, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    plain = generate(target, None, ids, **options)
    found = generate(
        target, head, ids, tree=tree, watch_tree=lambda made, _: trees.append(made), **options
    )
    assert found.answers == plain.answers
    for made in trees:
        above = made.depths.gather(1, made.parents)
        assert torch.equal(made.depths[:, 1:], above[:, 1:] + 1)
    assert sum(made.tokens.shape[1] for made in trees) > len(trees)


def test_wiped_scratch_leaves_history_alone():
    cache = TreeCache(1, 16)
    keys = torch.ones(1, 1, 3, 2)
    cache.update(keys, keys, 0)
    cache.commit_prefix(torch.tensor([3]))
    cache.update(keys * float("nan"), keys * float("nan"), 0)
    cache.wipe()
    assert cache.get_seq_length() == 3
    assert cache.buffer[..., :3, :].eq(1).all()
    assert cache.buffer[..., 3:, :].eq(0).all()


def test_a_static_tree_wider_than_the_draft_vocabulary_is_refused():
    target = tiny_target()
    with pytest.raises(UserError, match="draft vocabulary has 2 tokens"):
        generate(target, tiny_head(target, draft_vocab=2), prompts(1)[0], tree="static")


def test_threads_leave_the_model_as_it_was():
    """Each attends in its own way inside, and the last one out puts things back."""
    config = tiny_target().config
    before, inside, leave = config._attn_implementation, threading.Event(), threading.Event()

    def other():
        with grouped(config):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with grouped(config):
        thread.start()
        inside.wait(10)
    assert config._attn_implementation == GROUPED
    leave.set()
    thread.join()
    assert config._attn_implementation == before


@pytest.mark.parametrize("tree", TREES, ids=["chain", "static", "auto", "dynamic"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_accepted_nodes_are_committed_in_ragged_rows(arch, tree):
    """Rows accept unequal numbers and end at unequal times; every row is what it is alone."""
    target = tiny_target(arch)
    ids, mask = prompts(3)
    head = oracle(target, ids, mask, depth=3)
    found = generate(target, head, ids, mask, tree=tree, max_new_tokens=24)
    assert torch.equal(found.sequences, reference(target, ids, mask))
    assert found.stats.tau > 1.5
    for row in range(3):
        alone = ids[row][mask[row].bool()][None]
        assert generate(target, head, alone, max_new_tokens=24).answers[0] == found.answers[row]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_row_of_a_batch_equals_its_output_alone(rows, temperature):
    """Ragged prompts; the oracle knows some rows' answers, the others end later."""
    target = tiny_target()
    torch.manual_seed(5)
    ids = torch.randint(8, VOCAB, (rows, 9))
    mask = (torch.arange(9) >= torch.tensor([0, 3, 6, 1, 8, 2, 5, 7])[:rows, None]).long()
    head = oracle(target, ids[:4], mask[:4], depth=3)
    options = {"max_new_tokens": 16, "temperature": temperature, "seed": 6}
    for tree in TREES:
        found = generate(target, head, ids, mask, tree=tree, **options)
        for row in range(rows):
            alone = ids[row][mask[row].bool()][None]
            one = generate(target, head, alone, tree=tree, row_keys=[row], **options)
            assert one.answers[0] == found.answers[row]
    assert temperature or found.stats.tau > 1.2


def test_rows_at_rest_in_a_large_batch_change_nothing():
    """More than eight rows: those that have ended stay in the batch until a quarter has.

    The first version looked up the last accepted pair of a row that had accepted none.
    """
    target = tiny_target("qwen3")
    torch.manual_seed(1)
    ids = torch.randint(8, VOCAB, (12, 6))
    mask = torch.ones_like(ids)
    head = oracle(target, ids[:5], mask[:5], depth=3)  # knows five rows: they end first
    found = generate(target, head, ids, mask, tree="chain:3", max_new_tokens=20)
    assert torch.equal(found.sequences, reference(target, ids, mask, new=20))


def test_growing_the_cache_changes_nothing(monkeypatch):
    target = tiny_target()
    head = tiny_head(target)
    ids, mask = prompts(1)
    grown, grow = [], TreeCache._grow

    def watch(self, needed):
        grown.append(needed)
        grow(self, needed)

    monkeypatch.setattr(TreeCache, "_grow", watch)
    monkeypatch.setattr(sys.modules[generate.__module__], "FIRST_CAPACITY", 12)
    found = generate(target, head, ids, mask, max_new_tokens=200)
    assert len(grown) >= 2
    assert torch.equal(found.sequences, reference(target, ids, mask, new=200))


def test_a_long_prompt_leaves_room_for_its_answer(monkeypatch):
    """A cache that a prompt has filled would be copied in the first round."""
    target = tiny_target()
    head = tiny_head(target)
    ids = torch.randint(8, VOCAB, (1, 100))
    monkeypatch.setattr(sys.modules[generate.__module__], "FIRST_CAPACITY", 64)
    monkeypatch.setattr(TreeCache, "_grow", None)
    assert len(generate(target, head, ids, max_new_tokens=20, ignore_eos=True).answers[0]) == 20


def test_the_heads_cache_after_ragged_rounds_is_that_of_a_fresh_prefill():
    """Rows take in 3, 1 and no pairs, then one row leaves: state and next tree are as if new."""
    target = tiny_target()
    head = tiny_head(target)
    torch.manual_seed(2)
    ids = torch.randint(8, VOCAB, (3, 11))
    features = torch.randn(3, 10, 96, dtype=torch.float64)
    lengths, gained = torch.tensor([6, 4, 5]), torch.tensor([3, 1, 0])
    with torch.no_grad():
        drafter = Drafter(head, Dynamic(nodes=8, depth=3, width=3))
        drafter.prefill(features, ids, lengths)
        drafter.grow(ids[:, 0])
        rows = lengths[:, None] + torch.arange(3)
        pairs = features.gather(1, rows[:, :, None].expand(-1, -1, 96))
        drafter.advance(pairs, ids.gather(1, rows + 1), gained, longest=9)
        drafter.keep(torch.tensor([0, 1]))
        tree, _ = drafter.grow(ids[:2, 0])
        for row in range(2):
            fresh = Drafter(head, Dynamic(nodes=8, depth=3, width=3))
            total = (lengths + gained)[row : row + 1]
            fresh.prefill(features[row : row + 1, :total], ids[row : row + 1, : total + 1], total)
            torch.testing.assert_close(drafter.hidden[row], fresh.hidden[0])
            wanted, _ = fresh.grow(ids[row : row + 1, 0])
            assert torch.equal(tree.tokens[row], wanted.tokens[0])
            assert torch.equal(tree.parents[row], wanted.parents[0])


@pytest.mark.parametrize("rows", [1, 2])
def test_what_the_head_made_of_a_prompt_is_freed_before_the_rounds(rows):
    """What is kept is the last state of each row: a view of it would hold the whole prompt's."""
    head = tiny_head(tiny_target())
    drafter = Drafter(head, Dynamic(nodes=8, depth=3, width=3))
    features = torch.randn(rows, 10, 96, dtype=torch.float64)
    with torch.no_grad():
        drafter.prefill(features, torch.randint(8, VOCAB, (rows, 11)), torch.tensor([10, 7][:rows]))
    assert drafter.hidden.untyped_storage().nbytes() == drafter.hidden.nbytes
    assert drafter.hidden.shape == (rows, head.config.hidden_size)


def test_forwards_of_rounds_are_timed_apart_from_the_loops_own_work():
    target = tiny_target()
    head = tiny_head(target)

    def slow(call, seconds):
        def slowed(*args, **options):
            time.sleep(seconds)
            return call(*args, **options)

        return slowed

    target.forward, head.forward = slow(target.forward, 0.03), slow(head.forward, 0.02)
    stats = generate(target, head, torch.randint(8, 97, (1, 9)), tree="chain:2").stats
    least = stats.rounds * (0.03 + 2 * 0.02)  # behind what was accepted, and for one level more
    in_rounds = sum(stats.seconds.values()) - stats.seconds["prefill"]
    assert least <= stats.forward_seconds < in_rounds
    assert in_rounds - stats.forward_seconds < least / 2


def test_what_comes_before_the_first_token_counts_as_prefill(monkeypatch):
    """As the look at the target's weights does, whether they are still those that were packed."""
    target = tiny_target()

    def looked(model, **options):
        time.sleep(1.0)
        return packed.packing(model, **options)

    monkeypatch.setattr(compiled, "packing", looked)
    ids, _ = prompts(1)
    seconds = generate(
        target, tiny_head(target), ids, tree="chain:2", max_new_tokens=4
    ).stats.seconds
    assert seconds["prefill"] > 1.0
    assert sum(seconds.values()) - seconds["prefill"] < 1.0


def test_generation_leaves_the_model_as_it_was():
    target = tiny_target()
    head = tiny_head(target)
    before = target.model.config._attn_implementation, set(vars(target.model))
    ids, mask = prompts(1)
    generate(target, head, ids, mask, max_new_tokens=8)
    assert (target.model.config._attn_implementation, set(vars(target.model))) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_and_head_can_be_trained_after_decoding(dtype):
    """Decoding runs in inference mode, whose tensors autograd refuses: none may be left behind."""
    target = tiny_target(dtype=dtype)
    head = tiny_head(target)
    ids, mask = prompts(1)
    sequences = generate(target, head, ids, mask, tree="auto", max_new_tokens=8).sequences
    sequences[:, 0] += 0  # in place, which tensors of that mode forbid
    model, places = target.model.requires_grad_(True), torch.arange(9)[None]
    states = model(ids, output_hidden_states=True).hidden_states
    features = torch.cat([states[layer] for layer in head.config.feature_layers], -1)
    hidden = head(head.fuse(features), ids.roll(-1, 1), places, None, None, 0)
    head.logits(hidden).float().logsumexp(-1).sum().backward()
    for weights in (model.get_input_embeddings().weight, head.fc.weight):
        assert bool(weights.grad.abs().sum() > 0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5: must be a whole"),
        ({"min_new_tokens": 1.5}, "min_new_tokens 1.5: must be a whole"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k 2.5: must be a whole"),
        ({"temperature": 1.0, "seed": 1.5}, "seed 1.5: must be a whole"),
        ({"temperature": 1.0, "row_keys": [2**65]}, "row_keys"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"stop_strings": [3]}, "stop_strings"),
        ({"input_ids": [[5, 6]]}, "input_ids of type list"),
        ({"input_ids": torch.ones(1, 3)}, "input_ids of type torch.float32"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int16)}, "input_ids of type torch.int16"),
        ({"attention_mask": [[1, 1, 1, 1]]}, "attention_mask of type list"),
        ({"temperature": "0.7"}, "temperature '0.7': must be a number"),
        ({"temperature": 1.0, "top_p": None}, "top_p None: must be a number"),
        ({"stop_strings": 5}, "stop_strings|stop strings"),
        ({"temperature": 1.0, "row_keys": 5}, "row_keys 5"),
        ({"tree": "chain:²"}, "unknown tree"),
        ({"tree": 5}, "unknown tree"),
        ({"max_new_tokens": 9999}, "context"),
        ({"tree": "chain:0"}, "chain of 0"),
        ({"tree": "bush"}, "unknown tree"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"temperature": 1.0, "seed": -1}, "seed -1"),
        ({"temperature": 1.0, "top_p": 2.0}, "top_p 2"),
        ({"min_new_tokens": 99}, "min_new_tokens 99"),
        ({"head": "other"}, "trained for"),
        ({"poison": float("nan")}, "hidden state 0, at token 2"),
        ({"poison": float("inf")}, "hidden state 0, at token 2"),
    ],
    ids=str,
)
def test_a_refused_input_leaves_the_model_unharmed(options, named):
    """The message names the value; no attribute, hook or cache stays; good input works again."""
    target = tiny_target()
    head, ids = tiny_head(target), torch.tensor([[9, 10, 50, 11]])
    wanted = generate(target, head, ids, max_new_tokens=8).answers
    row = target.embedding.data[50].clone()
    if "poison" in options:
        target.embedding.data[50] = options["poison"]
    wrong = tiny_head(tiny_target("qwen3")) if options.get("head") else head
    before = facts(target)
    given = {k: v for k, v in options.items() if k not in ("head", "poison")}
    with pytest.raises(UserError, match=named):
        generate(target, wrong, **{"input_ids": ids, "max_new_tokens": 8} | given)
    gc.collect()
    assert facts(target) == before
    target.embedding.data[50] = row
    assert generate(target, head, ids, max_new_tokens=8).answers == wanted


def test_numbers_of_numpy_are_numbers():
    target = tiny_target()
    given = {"top_k": np.int64(5), "top_p": np.float32(0.9), "min_new_tokens": np.int64(3)}
    own = {"top_k": 5, "top_p": float(np.float32(0.9)), "min_new_tokens": 3}
    answers = [
        generate(target, None, prompts(1)[0], temperature=1.0, max_new_tokens=8, **options).answers
        for options in (given, own)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("parents", "ranks"),
    [((0, 2, 0), (0, 0, 0)), ((0, 0), (0,)), ((0, 0), (1, 0)), ((0, 0), (0, -1)), ((), ())],
)
def test_what_is_no_static_tree_is_refused(parents, ranks):
    with pytest.raises(UserError, match="a parent and a rank for each node"):
        Static(parents, ranks)


def test_sizes_of_a_tree_are_whole():
    with pytest.raises(UserError, match="must be whole"):
        Dynamic(nodes=2.5)


def facts(target) -> tuple:
    """What a call must leave as it was: attributes, layers, hooks, attention; caches in memory."""
    modules = [
        (name, type(m).__name__, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in target.model.named_modules()
    ]
    caches = sum(type(thing) is TreeCache for thing in gc.get_objects())
    return modules, target.config._attn_implementation, target.model.training, caches
