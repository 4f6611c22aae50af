"""Greedy verification: the target's own token at every node, then the walk that follows it.

Legend: B rows, N nodes, D depth.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adaspec_eagle.tree import DraftTree

LEAST_IDS, MOST_IDS = 128, 1024  # whose greatest logit is found at a time, on CPU


@dataclass
class Verdict:
    """What one round accepts."""

    path: Tensor  # [B, D + 1] nodes from the root down; past `length` the root
    length: Tensor  # [B] nodes on the path, the root included: accepted draft tokens + 1
    bonus: Tensor  # [B] the target's own token behind the path


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest logit of every node and the first id that has it: `[B, N, V]` -> `[B, N]` each.

    As `logits.max(-1)`, in half its time on CPU, where a greatest value is found many times as fast
    as its place: first that of every block of ids, then the place in the best block alone.
    """
    size = math.gcd(logits.shape[-1], MOST_IDS)
    if logits.device.type != "cpu" or size < LEAST_IDS:
        return logits.max(-1)
    blocks = logits.unflatten(-1, (-1, size))  # [B, N, V / size, size]
    best, block = blocks.amax(-1).max(-1)
    inside = blocks.gather(2, block[..., None, None].expand(-1, -1, 1, size))[:, :, 0]
    return best, block * size + inside.max(-1).indices


def match(tree: DraftTree, picks: Tensor, ancestors: Tensor) -> Verdict:
    """Follow the child that equals the target's pick, as deep as it goes.

    picks `[B, N]`: the argmax at every node; ancestors `[B, N, N]` (tree.ancestor_mask). Exact for
    any tree: the emitted tokens are picks only, and siblings differ, so at most one child matches.
    """
    agrees = tree.tokens == picks.gather(1, tree.parents)  # [B, N]
    agrees[:, 0] = True
    accepted = (agrees[:, None] | ~ancestors).all(-1)  # [B, N]: itself and all its ancestors agree
    leaf = (tree.depths * accepted).argmax(1)  # [B]
    length = tree.depths.gather(1, leaf[:, None])[:, 0] + 1
    on_path = ancestors.gather(1, leaf[:, None, None].expand(-1, 1, ancestors.shape[2]))[:, 0]
    nodes = torch.arange(tree.tokens.shape[1], device=picks.device).expand_as(tree.tokens)
    path = torch.zeros_like(tree.tokens)
    path.scatter_add_(1, tree.depths, nodes * on_path)  # one node of the path a depth
    return Verdict(path, length, picks.gather(1, leaf[:, None])[:, 0])


def emitted(tree: DraftTree, verdict: Verdict) -> Tensor:
    """The tokens that a round gives: `[B, D + 1]`; row b's first `length[b]` count.

    Accepted draft tokens, then the bonus token.
    """
    after_root = torch.roll(verdict.path, -1, dims=1)
    tokens = tree.tokens.gather(1, after_root)
    return tokens.scatter(1, verdict.length[:, None] - 1, verdict.bonus[:, None])
