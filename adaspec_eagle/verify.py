"""Verification: the target's own token at every node, then the walk that follows it.

Legend: B rows, N nodes, V vocabulary, D depth.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adaspec_eagle.tree import DraftTree


@dataclass
class Verdict:
    """What one round accepts."""

    path: Tensor  # [B, D + 1] nodes from the root down; past `length` any node
    length: Tensor  # [B] nodes on the path, the root included: accepted draft tokens + 1
    bonus: Tensor  # [B] the target's own token behind the path


def pick(
    logits: Tensor,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The target's next token behind each node: `[B, N, V]` -> `[B, N]`.

    Greedy at temperature 0; else a sample of softmax(logits / temperature), cut to the smallest set
    of tokens whose probability reaches top_p (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.flatten(0, 1).float() / temperature).softmax(-1)  # [B N, V]
    cdf = probs.cumsum(-1)
    picks = torch.zeros_like(probs[:, :1], dtype=torch.long)  # [B N, 1]
    rows = torch.arange(len(picks), device=picks.device)
    while len(rows):  # no sorting: a token is in the nucleus if those above it do not reach top_p
        spot = torch.rand(len(cdf), 1, generator=generator, device=cdf.device) * cdf[:, -1:]
        drawn = torch.searchsorted(cdf, spot, right=True).clamp(max=cdf.shape[1] - 1)
        picks[rows] = drawn[rows]
        above = (probs * (probs > probs.gather(1, picks))).sum(-1)
        rows = (above >= top_p).nonzero()[:, 0] if top_p < 1 else rows[:0]
    return picks.view(logits.shape[:-1])


def match(tree: DraftTree, picks: Tensor, ancestors: Tensor) -> Verdict:
    """Follow the child that equals the target's pick, as deep as it goes.

    picks `[B, N]`, ancestors `[B, N, N]` (tree.ancestor_mask). Exact for any tree: the emitted
    tokens are picks only, and siblings differ, so at most one child matches.
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
