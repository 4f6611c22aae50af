"""Losses of many tokens without their logits: output layer, loss and gradient chunk by chunk.

Legend: S unroll steps, M tokens, R tokens of a chunk, H hidden, Vd draft vocabulary. losses.py has
the plain definitions; here stand their gradients with respect to the draft logits, written out.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaspec_eagle.attention import exact_dtype

CHUNK_NUMBERS = 1 << 21  # logits a product makes for one step: enough rows to keep it busy
CHUNK_ROWS = 256  # but not fewer rows than that, however large the vocabulary
CACHED_NUMBERS = 1 << 18  # logits worked on at a time: small enough to stay in a core's cache

Shared = tuple[Tensor, ...]
Result = tuple[Tensor, Tensor | None]  # values [R], gradient with respect to the logits [R, Vd]


@dataclass(frozen=True)
class Output:
    """A linear output layer: rows `[Vd, H]`, and a bias `[Vd]` or none."""

    rows: Tensor
    bias: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., H]` -> `[..., Vd]`, in the dtype of the rows."""
        flat = hidden.to(self.rows.dtype).reshape(-1, hidden.shape[-1])  # one flat product: a
        # batched one, which linear takes for what is not contiguous, is far slower on CPU
        return functional.linear(flat, self.rows, self.bias).unflatten(0, hidden.shape[:-1])


def chunks(count: int, width: int) -> list[slice]:
    """Places of 0 .. count in pieces whose logits over `width` ids are worth one product."""
    return _pieces(count, max(CHUNK_ROWS, CHUNK_NUMBERS // width))


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]


# ---- values and gradients ------------------------------------------------------------------------
# share(target logits, target's logsumexp or None) -> what all steps and both heads have in common;
# apply(log q, that, whether a gradient is wanted) -> Result. log q is theirs to overwrite.


def _share_forward_kl(logits: Tensor, lse: Tensor | None) -> Shared:
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    return p, log_p.mul_(p).sum(-1)


def _forward_kl(log_q: Tensor, shared: Shared, wanted: bool) -> Result:
    p, negative_entropy = shared
    value = negative_entropy - (p * log_q).sum(-1)
    return value, log_q.exp_().sub_(p) if wanted else None


def _share_reverse_kl(logits: Tensor, lse: Tensor | None) -> Shared:
    return (logits.log_softmax(-1),)


def _reverse_kl(log_q: Tensor, shared: Shared, wanted: bool) -> Result:
    gap = log_q - shared[0]
    q = log_q.exp_()
    value = (q * gap).sum(-1)
    return value, gap.sub_(value[:, None]).mul_(q) if wanted else None


def _share_jensen_shannon(logits: Tensor, lse: Tensor | None) -> Shared:
    log_p = logits.log_softmax(-1)
    return log_p, log_p.exp()


def _jensen_shannon(log_q: Tensor, shared: Shared, wanted: bool) -> Result:
    log_p, p = shared
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))
    gap = log_q - log_m
    q = log_q.exp_()
    from_q = (q * gap).sum(-1)
    value = 0.5 * ((p * (log_p - log_m)).sum(-1) + from_q)
    return value, gap.sub_(from_q[:, None]).mul_(q).mul_(0.5) if wanted else None


def _share_total_variation(logits: Tensor, lse: Tensor | None) -> Shared:
    if lse is None:
        lse = logits.logsumexp(-1)
    return ((logits - lse[:, None]).exp_(),)


def _total_variation(log_q: Tensor, shared: Shared, wanted: bool) -> Result:
    p, q = shared[0], log_q.exp_()
    value = 1 - torch.minimum(p, q).sum(-1)
    if not wanted:
        return value, None
    below = (q < p).to(q.dtype).add_(q == p, alpha=0.5)  # d min(p, q) / d q
    return value, (below * q).sum(-1, keepdim=True).sub(below).mul_(q)


RULES: dict[str, tuple[Callable[..., Shared], Callable[..., Result]]] = {
    "fkl": (_share_forward_kl, _forward_kl),
    "rkl": (_share_reverse_kl, _reverse_kl),
    "jsd": (_share_jensen_shannon, _jensen_shannon),
    "tv": (_share_total_variation, _total_variation),
}  # by the names of losses.LOSSES


# ---- chunks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one call computes losses of, but for the draft's hidden states and rows."""

    loss: str  # a name in RULES
    bias: Tensor | None  # [Vd] of the draft's output layer, a constant
    target: Output
    target_hidden: Tensor  # [M, H]
    target_lse: Tensor | None  # [M]


def chunked_losses(
    loss: str,
    hidden: Tensor,
    draft: Output,
    target_hidden: Tensor,
    target: Output,
    target_lse: Tensor | None = None,
) -> Tensor:
    """LOSSES[loss] of every step and token, without ever holding `[M, Vd]` numbers: `[S, M]`.

    hidden `[S, M, H]`: what the draft's output layer reads; target_hidden `[M, H]`: the target's at
    the same tokens; target: its output rows over the same ids; target_lse `[M]` as in losses.py.
    Equal to the plain loss of both logits, value and gradient, which reaches `hidden` and, if they
    ask for one, `draft.rows`. Products are in the dtype of the rows; softmax, loss and sums in
    float32 (float64 for float64). A chunk's target logits serve all steps. The gradient of `hidden`
    is taken at once while the logits are there; rows that are trained need the weights of the loss,
    so that logits are computed again in the backward pass.
    """
    work = Work(loss, draft.bias, target, target_hidden, target_lse)
    return _Chunked.apply(hidden.to(draft.rows.dtype), draft.rows, work)


def _walk(
    hidden: Tensor, rows: Tensor, work: Work, wanted: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each chunk its place, values `[S, R]`, and gradient by the logits `[S, R, Vd]`."""
    share, apply = RULES[work.loss]
    steps, count, _ = hidden.shape
    width, exact = len(rows), exact_dtype(rows.dtype)
    draft = Output(rows, work.bias)
    for place in chunks(count, width):
        logits = draft.logits(hidden[:, place])  # [S, R, Vd]; gradients take its place
        known = work.target.logits(work.target_hidden[place])  # [R, Vd]
        lse = None if work.target_lse is None else work.target_lse[place]
        values = torch.empty(logits.shape[:2], dtype=exact, device=rows.device)
        size = max(1, CACHED_NUMBERS // width) if rows.device.type == "cpu" else len(known)
        for part in _pieces(len(known), size):
            shared = share(known[part].to(exact), None if lse is None else lse[part])
            for step in range(steps):
                log_q = torch.log_softmax(logits[step, part], -1, dtype=exact)
                values[step, part], gradient = apply(log_q, shared, wanted)
                if gradient is not None:
                    logits[step, part] = gradient
        yield place, values, logits


class _Chunked(torch.autograd.Function):
    """(hidden `[S, M, H]`, rows `[Vd, H]`, work) -> losses `[S, M]`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, work: Work) -> Tensor:
        ctx.work = work
        at_once = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        losses = torch.empty(hidden.shape[:2], dtype=exact_dtype(rows.dtype), device=rows.device)
        gradients = torch.empty_like(hidden) if at_once else None
        for place, values, by_logits in _walk(hidden, rows, work, at_once):
            losses[:, place] = values
            if gradients is not None:
                gradients[:, place] = _product(by_logits, rows)
        if gradients is not None:
            ctx.save_for_backward(gradients)
        else:
            ctx.save_for_backward(hidden, rows)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        weights = upstream[0]  # [S, M]
        if not ctx.needs_input_grad[1]:
            (gradients,) = ctx.saved_tensors
            return (gradients * weights[..., None]).to(gradients.dtype), None, None
        hidden, rows = ctx.saved_tensors
        return *_weighted(hidden, rows, ctx.work, weights), None


def _product(by_logits: Tensor, rows: Tensor) -> Tensor:
    """`[S, R, Vd]` times `[Vd, H]`, as one flat product."""
    return (by_logits.flatten(0, 1) @ rows).unflatten(0, by_logits.shape[:2])


def _weighted(hidden: Tensor, rows: Tensor, work: Work, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and rows of the sum of losses x weights `[S, M]`."""
    by_hidden = torch.empty_like(hidden)
    by_rows = torch.zeros_like(rows, dtype=exact_dtype(rows.dtype))
    for place, _, by_logits in _walk(hidden, rows, work, wanted=True):
        by_logits *= weights[:, place, None].to(by_logits.dtype)
        by_hidden[:, place] = _product(by_logits, rows)
        by_rows += by_logits.flatten(0, 1).t() @ hidden[:, place].flatten(0, 1)
    return by_hidden, by_rows.to(rows.dtype)
