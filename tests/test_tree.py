"""Trees: ancestors, order, selection of nodes; attention against its plain twin."""

import pytest
import torch

from adaspec_eagle import attention, generate
from adaspec_eagle.attention import (
    Unrolled,
    by_fused_kernel,
    by_products,
    grouped_attention,
    hide,
    tree_mask,
)
from adaspec_eagle.draft import Auto, Drafter, Dynamic, Sampled, chain, parse_shape, static_tree
from adaspec_eagle.errors import UserError
from adaspec_eagle.sampling import Row, Sampler
from adaspec_eagle.tree import DraftTree, ancestor_mask, select_nodes
from adaspec_eagle.verify import match
from tests.tiny import tiny_head, tiny_target


def walk_up(parents: list[int], node: int) -> set[int]:
    seen = {node}
    while node:
        node = parents[node]
        seen.add(node)
    return seen


def test_ancestor_mask_equals_walking_up():
    parents = [0, 0, 0, 1, 1, 2, 5, 6, 6]
    mask = ancestor_mask(torch.tensor([parents]), depth=4)[0]
    for node in range(len(parents)):
        assert set(mask[node].nonzero()[:, 0].tolist()) == walk_up(parents, node)


@pytest.mark.parametrize("shape", [chain(4), static_tree(9), Dynamic(9, 4, 3)])
def test_grown_trees_are_in_order_and_siblings_differ(shape):
    target = tiny_target()
    drafter = Drafter(tiny_head(target), shape)
    ids = torch.randint(8, 97, (3, 9))
    features = torch.randn(3, 8, 96, dtype=torch.float64)
    with torch.no_grad():
        drafter.prefill(features, ids, torch.tensor([8, 5, 2]))
        tree, _ = drafter.grow(torch.tensor([9, 10, 11]))
    assert tree.tokens[:, 0].tolist() == [9, 10, 11]
    for row in range(3):
        parents, depths = tree.parents[row].tolist(), tree.depths[row].tolist()
        assert all(
            parents[n] < n and depths[n] == depths[parents[n]] + 1 for n in range(1, len(parents))
        )
        named = list(zip(parents[1:], tree.tokens[row, 1:].tolist(), strict=True))
        assert len(set(named)) == len(named)


def test_dynamic_tree_holds_the_most_probable_paths():
    """Against brute force: the scores of all paths, each token by a forward of its own."""
    target = tiny_target()
    head = tiny_head(target)
    ids = torch.randint(8, 97, (1, 9))
    features = torch.randn(1, 8, 96, dtype=torch.float64)
    shape = Dynamic(nodes=10, depth=3, width=40)  # a beam as wide as the vocabulary: no pruning
    with torch.no_grad():
        drafter = Drafter(head, shape)
        drafter.prefill(features, ids, torch.tensor([8]))
        tree, _ = drafter.grow(torch.tensor([9]))
        first = drafter.logits.float().log_softmax(-1)[0]
        best = head.to_target(first.topk(1).indices)
        assert int(tree.tokens[0, tree.depths[0] == 1][0]) == int(best)
        paths = {(int(head.to_target(torch.tensor(t))),): float(first[t]) for t in range(40)}
        seconds = {}
        for t in first.topk(12).indices.tolist():
            token = head.to_target(torch.tensor([[t]]))
            itself = torch.ones(1, 1, 1, dtype=torch.bool)
            mask = tree_mask(drafter.cache.lengths, drafter.cache.start, itself, torch.float64)
            hidden, _ = drafter._forward(drafter.hidden[:, None], token, 0, mask, 1)
            drafter.cache.rollback()
            inner = head.logits(hidden).float().log_softmax(-1)[0, 0]
            for u in inner.topk(12).indices.tolist():
                pair = (int(token), int(head.to_target(torch.tensor(u))))
                seconds[pair] = float(first[t] + inner[u])
    shallow = {k for k, d in enumerate(tree.depths[0].tolist()) if 0 < d < 3}
    found = set()
    for node in shallow:
        up = sorted(walk_up(tree.parents[0].tolist(), node) - {0})
        found.add(tuple(tree.tokens[0, up].tolist()))
    scores = {**paths, **seconds}
    ranked = sorted(scores, key=lambda path: -scores[path])[: len(found)]
    assert found == set(ranked)


def test_selected_nodes_keep_their_parents():
    tokens = torch.tensor([[0, 5, 6, 7, 8, 9]])
    parents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    scores = torch.tensor([[0.0, -1.0, -2.0, -1.5, -4.0, -2.5]])
    depths = torch.tensor([0, 1, 1, 2, 2, 2])
    tree = select_nodes(tokens, parents, depths, scores, scores.topk(4).indices)
    assert tree.tokens.tolist() == [[0, 5, 6, 7]]
    assert tree.parents.tolist() == [[0, 0, 0, 1]]
    assert tree.depths.tolist() == [[0, 1, 1, 2]]


def test_match_follows_the_agreeing_child_only():
    """Node 3 agrees with its parent's pick, but its parent is not on the accepted path."""
    tree = DraftTree(
        torch.tensor([[1, 10, 11, 20, 21]]),
        torch.tensor([[0, 0, 0, 1, 2]]),
        torch.tensor([[0, 1, 1, 2, 2]]),
    )
    picks = torch.tensor([[11, 20, 21, 30, 31]])
    verdict = match(tree, picks, ancestor_mask(tree.parents, 2))
    assert verdict.length.tolist() == [3]
    assert verdict.path[0, :3].tolist() == [0, 2, 4]
    assert verdict.bonus.tolist() == [31]
    assert verdict.tokens[0, :3].tolist() == [11, 21, 31]


@pytest.mark.parametrize("agree", [0, 1, 2, 3])
def test_accepts_never_sometimes_always(agree):
    tree = DraftTree(
        torch.tensor([[1, 5, 6, 7]]), torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 1, 2, 3]])
    )
    picks = torch.tensor([[5, 6, 7, 8]])
    picks[0, agree:] += 50
    verdict = match(tree, picks, ancestor_mask(tree.parents, 3))
    assert verdict.length.tolist() == [agree + 1]


@pytest.mark.parametrize("attend", [by_fused_kernel, by_products])
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_attention_of_groups_equals_attention_over_repeated_keys(attend, queries):
    torch.manual_seed(0)
    query = torch.randn(2, 6, queries, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 11, 8, dtype=torch.float64)
    mask = hide(torch.zeros(2, 1, queries, 11).double(), torch.rand(2, queries, 11) > 0.3)
    wide = [x.repeat_interleave(3, dim=1) for x in (key, value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(query, *wide, attn_mask=mask)
    torch.testing.assert_close(attend(query, key, value, mask, 8**-0.5), wanted)
    found, _ = grouped_attention(torch.nn.Module(), query, key, value, mask)
    torch.testing.assert_close(found, wanted.transpose(1, 2))


@pytest.mark.parametrize("amx", [False, True])
def test_a_lone_query_in_bfloat16_attends_beside_its_group_or_alone(amx, monkeypatch):
    monkeypatch.setattr(attention, "AMX", amx)
    torch.manual_seed(0)
    query = torch.randn(2, 6, 1, 8, dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, 2, 11, 8, dtype=torch.bfloat16)
    mask = hide(torch.zeros(2, 1, 1, 11).bfloat16(), torch.rand(2, 1, 11) > 0.3)
    wide = [x.repeat_interleave(3, dim=1).double() for x in (key, value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.double(), *wide, attn_mask=mask.double()
    )
    found = by_fused_kernel(query, key, value, mask, 8**-0.5)
    torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_unrolled_attention_equals_a_dense_mask_in_value_and_gradient(steps):
    torch.manual_seed(0)
    first, n = 9, 5
    at = torch.tensor([[0], [3]]) + torch.arange(n)  # the first query of the first row sees no text
    query = torch.randn(2, 6, n, 8, dtype=torch.float64, requires_grad=True)
    both = torch.randn(2, 2, 2, first + steps * n, 8, dtype=torch.float64, requires_grad=True)
    key, value = both
    before = torch.arange(first) < at[..., None]
    own = torch.eye(n, dtype=torch.bool).expand(2, -1, -1)
    allowed = torch.cat([before, *[own] * steps], dim=2)
    mask = hide(torch.zeros(2, 1, *allowed.shape[1:]).double(), allowed)
    found, _ = grouped_attention(torch.nn.Module(), query, key, value, Unrolled(first, at))
    wide = [x.repeat_interleave(3, dim=1) for x in (key, value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(query, *wide, attn_mask=mask)
    wanted = wanted.transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(wanted)
    ours, plain = (
        torch.autograd.grad((out * weights).sum(), (query, both)) for out in (found, wanted)
    )
    torch.testing.assert_close(ours, plain)


def test_a_walk_ends_where_a_match_at_all_nodes_ends():
    """Over random trees of few tokens, rows at rest and logits that are no numbers included."""
    numbers = torch.Generator().manual_seed(0)
    b, n = 200, 9
    parents = torch.zeros(b, n, dtype=torch.long)
    depths = torch.zeros(b, n, dtype=torch.long)
    for node in range(2, n):
        parents[:, node] = torch.randint(0, node, (b,), generator=numbers)
    for node in range(1, n):
        depths[:, node] = depths.gather(1, parents[:, node : node + 1])[:, 0] + 1
    tokens = torch.arange(n).expand(b, -1) % 4 + 4 * (parents % 2)  # twins get other tokens below
    later = torch.arange(n)[:, None] > torch.arange(n)
    twin = (tokens[:, :, None] == tokens[:, None]) & (parents[:, :, None] == parents[:, None])
    tokens = torch.where((twin & later).any(2), 7 + torch.arange(n), tokens)
    logits = torch.randn(b, n, 16, generator=numbers)
    logits.scatter_add_(2, tokens.roll(-1, 1)[:, :, None], torch.full((b, n, 1), 2.0))
    logits[torch.rand(b, n, generator=numbers) < 0.05] = torch.nan
    tree, running = DraftTree(tokens, parents, depths), [row % 5 > 0 for row in range(b)]
    verdict, host = Sampler([Row(row, [], 0) for row in range(b)]).walk(tree, logits, n, running)
    best, picks = logits.max(-1)
    wanted = match(tree, picks, ancestor_mask(parents, n))
    good = best.isfinite().gather(1, wanted.path).all(1)
    went = torch.tensor(running)
    finite = torch.tensor([row[2] for row in host])
    assert torch.equal(finite[went], good[went])
    assert bool(finite[~went].all())
    assert sum(wanted.length[went & good] > 2) > 10
    for part in ("length", "bonus"):
        assert torch.equal(*(getattr(v, part)[went & good] for v in (verdict, wanted)))
    assert torch.equal(verdict.path[:, :n][went & good], wanted.path[went & good])
    for row in (went & good).nonzero()[:, 0].tolist():
        length, depth, _, *new = host[row]
        assert (length, depth) == (int(wanted.length[row]), int(depths[row].max()))
        assert new == verdict.tokens[row, :length].tolist() == wanted.tokens[row, :length].tolist()


@pytest.mark.parametrize("wrong", ["tree", "chain:0", "chain:x", "chain:", "sampled:", "beam"])
def test_unknown_shapes_are_refused(wrong):
    with pytest.raises(UserError, match="chain"):
        parse_shape(wrong)


@pytest.mark.parametrize(
    "make",
    [lambda: Dynamic(nodes=0), lambda: Auto(width=0), lambda: Sampled(0), lambda: static_tree(0)],
)
def test_trees_without_nodes_are_refused(make):
    with pytest.raises(UserError, match="at least 1"):
        make()


def test_a_tree_deeper_than_its_head_is_refused_before_any_work(monkeypatch):
    target = tiny_target()
    monkeypatch.setattr(target, "forward", None)  # would be the first work
    with pytest.raises(UserError, match="drafts 4 tokens deep, the tree is 6 deep"):
        generate(target, tiny_head(target, "medusa"), torch.tensor([[9, 10]]), tree="chain:6")
