"""Distillation losses: (draft logits, target logits) -> one value a token.

Each takes draft_logits `[N, Vd]`, target_logits `[N, Vd]` over the same ids and, as a keyword, the
target's logsumexp over its full vocabulary `[N]` (None: the ids are the full vocabulary), and
returns `[N]` in nats. Divergences renormalise the target on the draft vocabulary; what is about
acceptance uses the target's full-vocabulary p. Masking, weighting and reduction happen elsewhere.
Training takes them chunk by chunk with gradients written out (fused.py), which equal these.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[..., Tensor]


def forward_kl(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Tensor | None = None
) -> Tensor:
    """KL(p || q), the distillation loss of DistillSpec (arXiv 2310.08461) and AdaSPEC."""
    log_p, log_q = target_logits.log_softmax(-1), draft_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Tensor | None = None
) -> Tensor:
    """KL(q || p): forward KL with the two swapped."""
    return forward_kl(target_logits, draft_logits)


def jensen_shannon(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Tensor | None = None
) -> Tensor:
    """Half of KL(p || m) and half of KL(q || m), m the mean of p and q; at most log 2."""
    log_p, log_q = target_logits.log_softmax(-1), draft_logits.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    halves = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return 0.5 * halves.sum(-1)


def overlap(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Tensor | None = None
) -> Tensor:
    """sum_v min(p_v, q_v): the chance that a token sampled from q is accepted. No loss itself."""
    lse = target_logits.logsumexp(-1) if target_lse is None else target_lse
    p = (target_logits - lse[:, None]).exp()
    return torch.minimum(p, draft_logits.softmax(-1)).sum(-1)


def total_variation(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Tensor | None = None
) -> Tensor:
    """1 - sum_v min(p_v, q_v): the chance of rejection (Leviathan et al., arXiv 2211.17192)."""
    return 1 - overlap(draft_logits, target_logits, target_lse=target_lse)


def feature_regression(predicted: Tensor, feature: Tensor) -> Tensor:
    """EAGLE-1's smooth L1 between predicted and true feature `[N, H]`, mean over H: `[N]`."""
    return functional.smooth_l1_loss(predicted, feature, reduction="none").mean(-1)


LOSSES: dict[str, Loss] = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
    "tv": total_variation,
}
FULL_VOCABULARY = {"tv"}  # losses that need target_lse
