"""DraftTree: guessed tokens with their parents; node 0 is the last accepted token.

Legend: B rows, N nodes, D depth.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


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
    """The tree of the root and some of M candidates, such as the best ones (EAGLE-2's reranking).

    tokens, parents, scores `[B, M]`, depths `[M]`, chosen `[B, K]`: places among the candidates, in
    any order. parents are such places, too, -1 for the root's children. Every candidate comes after
    its parent, and a chosen node's parent must be chosen. The root's token is left 0: the caller
    puts it there.
    """
    b, m = tokens.shape
    k = chosen.shape[1]
    chosen = chosen.sort(dim=1).values
    place = torch.zeros(b, m + 1, dtype=torch.long, device=tokens.device)  # column m: the root
    place.scatter_(1, chosen, torch.arange(1, k + 1, device=tokens.device).expand(b, k))
    old_parents = parents.gather(1, chosen)  # [B, K]
    new_parents = place.gather(1, torch.where(old_parents < 0, m, old_parents))

    def below_root(values: Tensor) -> Tensor:
        return functional.pad(values, (1, 0))

    return DraftTree(
        below_root(tokens.gather(1, chosen)),
        below_root(new_parents),
        below_root(depths[chosen]),
        below_root(scores.gather(1, chosen)),
    )
