"""Distillation losses: (draft logits, target logits) -> one value a token.

Each takes draft_logits `[N, Vd]`, target_logits `[N, Vd]` over the same ids and, as keywords, the
target's logsumexp over its full vocabulary `[N]` (None: the ids are the full vocabulary) and the
text's own tokens as places among these ids `[N]` (-1: not among them), and returns `[N]` in nats.
Divergences renormalise the target on the draft vocabulary; what is about acceptance uses the
target's full-vocabulary p. Masking, weighting and reduction happen elsewhere. Training takes them
chunk by chunk with gradients written out (fused.py), which equal these. A loss of a user's own has
the same arguments and goes by `path.py:name`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from adaspec_eagle.errors import UserError
from adaspec_eagle.plugins import function_of, is_function_path

Loss = Callable[..., Tensor]
Given = Tensor | None


def forward_kl(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Given = None, labels: Given = None
) -> Tensor:
    """KL(p || q), the distillation loss of DistillSpec (arXiv 2310.08461) and AdaSPEC."""
    log_p, log_q = target_logits.log_softmax(-1), draft_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Given = None, labels: Given = None
) -> Tensor:
    """KL(q || p): forward KL with the two swapped."""
    return forward_kl(target_logits, draft_logits)


def jensen_shannon(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Given = None, labels: Given = None
) -> Tensor:
    """Half of KL(p || m) and half of KL(q || m), m the mean of p and q; at most log 2."""
    log_p, log_q = target_logits.log_softmax(-1), draft_logits.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    halves = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return 0.5 * halves.sum(-1)


def overlap(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Given = None, labels: Given = None
) -> Tensor:
    """sum_v min(p_v, q_v): the chance that a token sampled from q is accepted. No loss itself."""
    lse = target_logits.logsumexp(-1) if target_lse is None else target_lse
    p = (target_logits - lse[:, None]).exp()
    return torch.minimum(p, draft_logits.softmax(-1)).sum(-1)


def total_variation(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Given = None, labels: Given = None
) -> Tensor:
    """1 - sum_v min(p_v, q_v): the chance of rejection (Leviathan et al., arXiv 2211.17192)."""
    return 1 - overlap(draft_logits, target_logits, target_lse=target_lse)


def negative_log_acceptance(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Given = None, labels: Given = None
) -> Tensor:
    """-log sum_v min(p_v, q_v): total variation whose gradient grows where little is accepted.

    LK-alpha of the LK losses (arXiv 2602.23881).
    """
    shared = overlap(draft_logits, target_logits, target_lse=target_lse)
    return -shared.clamp(min=torch.finfo(shared.dtype).tiny).log()


LK_SHARPNESS = 3.0


def lk_hybrid(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Given = None, labels: Given = None
) -> Tensor:
    """lambda KL(p || q) + (1 - lambda) TV, lambda = exp(-3 alpha), alpha the token's overlap.

    lambda is a constant for the gradient: far from the target KL leads, close to it what is
    accepted (LK-lambda of the LK losses, arXiv 2602.23881).
    """
    rejected = total_variation(draft_logits, target_logits, target_lse=target_lse)
    weight = (-LK_SHARPNESS * (1 - rejected.detach())).exp()
    return weight * forward_kl(draft_logits, target_logits) + (1 - weight) * rejected


def cross_entropy(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Given = None, labels: Given = None
) -> Tensor:
    """-log q of the target's most probable token among the ids: what greedy decoding accepts."""
    return functional.cross_entropy(draft_logits, target_logits.argmax(-1), reduction="none")


def text_likelihood(
    draft_logits: Tensor, target_logits: Tensor, *, target_lse: Given = None, labels: Given = None
) -> Tensor:
    """-log q of the text's own token, 0 where that is outside the draft vocabulary.

    The black-box loss: it asks the target for nothing but its text.
    """
    assert labels is not None
    found = functional.cross_entropy(draft_logits, labels.clamp(min=0), reduction="none")
    return torch.where(labels >= 0, found, 0.0)


def feature_regression(predicted: Tensor, feature: Tensor) -> Tensor:
    """EAGLE-1's smooth L1 between predicted and true feature `[N, H]`, mean over H: `[N]`."""
    return functional.smooth_l1_loss(predicted, feature, reduction="none").mean(-1)


LOSSES: dict[str, Loss] = {
    "fkl": forward_kl,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
    "tv": total_variation,
    "nla": negative_log_acceptance,
    "lk": lk_hybrid,
    "ce": cross_entropy,
    "text": text_likelihood,
}
FULL_VOCABULARY = {"tv", "nla", "lk"}  # losses that need target_lse
FEATURE = "feature"  # feature_regression, which a sum may have beside losses of tokens


def loss_terms(text: str) -> dict[str, float]:
    """Weights by name of `fkl`, of a sum like `feature=1,fkl=0.1`, or of `path.py:name=0.5,...`.

    Raises UserError for a name that is not known, a file or function that is not there, a weight
    that is not above 0, or no loss of tokens at all.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = part.strip().partition("=")
        try:
            found[name] = float(weight) if equals else 1.0
        except ValueError as error:
            raise UserError(
                f"--loss {text!r}: {weight!r} is no weight; give a weight, as {name}=0.5"
            ) from error
        if not 0 < found[name] < math.inf:
            raise UserError(f"--loss {text!r}: the weight of {name} must be above 0")
        if is_function_path(name):
            function_of(name)
        elif name not in (*LOSSES, FEATURE):
            known = ", ".join((*LOSSES, FEATURE))
            raise UserError(
                f"unknown --loss {name!r}; one of {known}, path.py:name, or a sum a=1,b=1"
            )
    if found.keys() == {FEATURE}:
        raise UserError(f"--loss {text!r} says nothing about tokens; add one: feature=1,fkl=0.1")
    return found


def token_terms(text: str) -> dict[str, float]:
    """`loss_terms` but for the feature regression."""
    return {name: weight for name, weight in loss_terms(text).items() if name != FEATURE}


def needs_full_vocabulary(text: str) -> bool:
    """Whether a loss needs target_lse; one of a user's own may."""
    return any(name in FULL_VOCABULARY or name not in LOSSES for name in token_terms(text))


def find_loss(name: str) -> Loss:
    """A loss of tokens by its name, or a function of a user's own."""
    return LOSSES[name] if name in LOSSES else function_of(name)


def token_loss(text: str) -> Loss:
    """The weighted sum of the losses of tokens that `text` names."""
    terms = [(find_loss(name), weight) for name, weight in token_terms(text).items()]

    def summed(draft_logits: Tensor, target_logits: Tensor, **known: Given) -> Tensor:
        values = [weight * loss(draft_logits, target_logits, **known) for loss, weight in terms]
        return torch.stack(values).sum(0)

    return summed
