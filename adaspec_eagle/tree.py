"""DraftTree: guessed tokens with their parents; node 0 is the last accepted token.

Legend: B rows, N nodes, D depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DraftTree:
    """A tree per row, all of the same size; parents come before children; a chain is a tree."""

    tokens: Tensor  # [B, N]
    parents: Tensor  # [B, N], node index; the root's is 0
    depths: Tensor  # [B, N], 0 for the root
    scores: Tensor | None = None  # [B, N] log-probability of the path to a node, where known


def lone_root(tokens: Tensor) -> DraftTree:
    """The tree of plain decoding: the last token `[B]` and no draft."""
    zero = torch.zeros_like(tokens)[:, None]  # [B, 1]
    return DraftTree(tokens[:, None], zero, zero)


def node_depths(parents: Sequence[int]) -> list[int]:
    """Depth of each node of a tree, from parents as in DraftTree."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


def ancestor_mask(parents: Tensor, depth: int) -> Tensor:
    """`[B, N, N]` booleans: entry (n, m) says that m is n or one of n's ancestors.

    parents `[B, N]` as in DraftTree; depth: at least the depth of the deepest node. Takes `depth`
    steps for the whole batch: after step d each node knows its ancestors up to d levels above.
    """
    n = parents.shape[1]
    itself = torch.eye(n, dtype=torch.bool, device=parents.device)  # [N, N]
    mask = itself.expand(parents.shape[0], n, n)
    above = parents[:, :, None].expand(-1, -1, n)  # [B, N, N]
    for _ in range(depth):
        mask = itself | mask.gather(1, above)
    return mask


def select_nodes(
    tokens: Tensor, parents: Tensor, depths: Tensor, scores: Tensor, chosen: Tensor
) -> DraftTree:
    """The tree of some of M candidates, such as the best ones (EAGLE-2's reranking).

    tokens, parents, scores `[B, M]`, depths `[M]`, chosen `[B, K]`: places among the candidates, in
    any order. Candidate 0 is the root, its own parent, and must be chosen; the others come after
    their parents, and a chosen node's parent must be chosen.
    """
    chosen = chosen.sort(dim=1).values
    return DraftTree(
        tokens.gather(1, chosen),
        torch.searchsorted(chosen, parents.gather(1, chosen)),  # places among the chosen
        depths.take(chosen),
        scores.gather(1, chosen),
    )
