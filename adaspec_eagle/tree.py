"""DraftTree: guessed tokens with their parents; node 0 is the last accepted token.

Legend: B rows, N nodes, D depth.
"""

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


def select_nodes(tokens: Tensor, parents: Tensor, scores: Tensor, keep: int) -> DraftTree:
    """Root plus the `keep` best of M candidates, as a tree (EAGLE-2's reranking).

    tokens, parents, scores `[B, M]`; parents are candidate indices, -1 for the root's children, and
    every candidate comes after its parent. A score must be lower than its parent's, so that a
    chosen node's parent is chosen too. The root's token is left 0: the caller puts it there.
    """
    b, m = tokens.shape
    chosen = scores.topk(min(keep, m), dim=1).indices.sort(dim=1).values  # [B, K]
    k = chosen.shape[1]
    place = torch.zeros(b, m + 1, dtype=torch.long, device=tokens.device)  # column m: the root
    place.scatter_(1, chosen, torch.arange(1, k + 1, device=tokens.device).expand(b, k))
    old_parents = parents.gather(1, chosen)  # [B, K]
    new_parents = place.gather(1, torch.where(old_parents < 0, m, old_parents))
    root = torch.zeros(b, 1, dtype=torch.long, device=tokens.device)
    new_parents = torch.cat([root, new_parents], dim=1)  # [B, K + 1]
    new_scores = torch.cat([root.to(scores), scores.gather(1, chosen)], dim=1)
    new_tokens = torch.cat([root, tokens.gather(1, chosen)], dim=1)
    return DraftTree(new_tokens, new_parents, root, new_scores)
