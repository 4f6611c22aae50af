"""Medusa: independent heads, whose tree is a part of the product of their best tokens."""

import pytest
import torch

from adaspec_eagle import generate
from adaspec_eagle.draft import Drafter, Dynamic, chain, static_paths
from adaspec_eagle.errors import UserError
from adaspec_eagle.features import split_rows, target_rows
from adaspec_eagle.head import HeadConfig, new_head
from tests.tiny import tiny_head, tiny_target

PATHS = [(0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 0, 0), (2, 0, 1)]


def drafter(shape) -> tuple[Drafter, torch.Tensor]:
    """A drafter behind eight random tokens, and the feature of the last: `[1, H]`."""
    target = tiny_target()
    head = tiny_head(target, "medusa")
    torch.manual_seed(4)
    ids, features = torch.randint(8, 97, (1, 8)), torch.randn(1, 8, 32, dtype=torch.float64)
    made = Drafter(head, shape)
    made.prefill(features, ids, torch.tensor([8]))
    return made, features[:, -1]


@torch.no_grad()
def test_a_tree_is_a_part_of_the_product_of_the_heads_best_tokens():
    """Every node's token is its head's r-th best, whatever its parent is: by hand."""
    made, feature = drafter(static_paths(PATHS))
    tree, _ = made.grow(torch.tensor([9]))
    shape, head = made.shape, made.head
    for node in range(1, len(PATHS) + 1):
        block = head.blocks[shape.depths[node] - 1]
        own = feature + torch.nn.functional.silu(block(feature))
        best = head.project(own).topk(3).indices[0, shape.ranks[node]]
        assert int(tree.tokens[0, node]) == int(head.to_target(best))


@torch.no_grad()
def test_one_forward_a_level_is_enough_for_heads_that_read_no_tokens(monkeypatch):
    made, _ = drafter(static_paths(PATHS))
    seen = []
    forward = Drafter._forward

    def watch(self, hidden, *more):
        seen.append(hidden.shape[1])
        return forward(self, hidden, *more)

    monkeypatch.setattr(Drafter, "_forward", watch)
    made.grow(torch.tensor([9]))
    assert seen == [1, 1]


def test_a_fresh_head_begins_with_the_targets_own_next_token():
    target = tiny_target()
    head = new_head(HeadConfig.for_target("medusa", target, target.vocab_size)).double()
    head.start_from(target)
    head.eval().bind(target)
    ids = torch.randint(8, 97, (1, 6))
    _, hidden = split_rows(target_rows(target, ids, [6]), target, [6])
    with torch.no_grad():
        for step in range(4):
            state = head(head.fuse(hidden), ids, ids, None, None, step)
            torch.testing.assert_close(head.logits(state), target.logits(hidden))


def test_a_draft_is_as_deep_as_there_are_heads():
    """Trees that are bounded by depth stop there; a shape that asks for more is refused."""
    target = tiny_target()
    head = tiny_head(target, "medusa", steps=2)
    ids = torch.randint(8, 97, (1, 6))
    for tree in ("auto", Dynamic(nodes=30, depth=5, width=4)):
        for blocks in (1, 2):
            shallow = tiny_head(target, "medusa", steps=blocks)
            found = generate(target, shallow, ids, tree=tree, max_new_tokens=12)
            assert found.stats.depth <= blocks
    with pytest.raises(UserError, match="drafts 2 tokens deep"):
        generate(target, head, ids, tree=chain(3), max_new_tokens=12)
