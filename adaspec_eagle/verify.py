"""What a round accepts and emits; `match`, where the target's own token is known at every node.

That is off the CPU; on it `sampling.Sampler.walk` asks for the tokens on its way alone, which
`match` is the tested reference for.

Legend: B rows, N nodes, D depth.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adaspec_eagle.tree import DraftTree


@dataclass
class Verdict:
    """What one round accepts and emits."""

    path: Tensor  # [B, D + 1] nodes from the root down; past `length` the root
    length: Tensor  # [B] nodes on the path, the root included: accepted draft tokens + 1
    bonus: Tensor  # [B] the target's own token behind the path
    tokens: Tensor  # [B, D + 1] accepted draft tokens, the bonus token; `length` of them count


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
    bonus = picks.gather(1, leaf[:, None])  # [B, 1]
    tokens = tree.tokens.gather(1, torch.roll(path, -1, dims=1))
    tokens.scatter_(1, length[:, None] - 1, bonus)
    return Verdict(path, length, bonus[:, 0], tokens)
