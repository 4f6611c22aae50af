"""Losses of many tokens without their logits: output layer, loss and gradient chunk by chunk.

Legend: S unroll steps, M tokens, R tokens of a chunk, H hidden, Vd draft vocabulary. losses.py has
the plain definitions; here stand their gradients with respect to the draft logits, written out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaspec_eagle.attention import exact_dtype
from adaspec_eagle.losses import LK_SHARPNESS, find_loss, token_terms

CHUNK_NUMBERS = 1 << 21  # logits a product makes for one step: enough rows to keep it busy
CHUNK_ROWS = 256  # but not fewer rows than that, however large the vocabulary
CACHED_NUMBERS = 1 << 18  # logits worked on at a time: small enough to stay in a core's cache

Shared = tuple[Any, ...]
Result = tuple[Tensor, Tensor | None]  # values [R], gradient with respect to the logits [R, Vd]
Rule = tuple[Callable[..., Shared], Callable[..., Result]]


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
# share(what is known of the target) -> what all steps have in common; apply(log q, that, whether a
# gradient is wanted) -> Result. log q is theirs to overwrite.


@dataclass(frozen=True)
class Known:
    """What is known of some tokens but for the draft: the arguments of a loss (losses.py)."""

    logits: Tensor  # [R, Vd]
    lse: Tensor | None  # [R]
    labels: Tensor | None  # [R]

    def p(self) -> Tensor:
        """The target's probabilities, of its full vocabulary `[R, Vd]`."""
        lse = self.logits.logsumexp(-1) if self.lse is None else self.lse
        return (self.logits - lse[:, None]).exp_()


def _share_forward_kl(known: Known) -> Shared:
    log_p = known.logits.log_softmax(-1)
    p = log_p.exp()
    return p, log_p.mul_(p).sum(-1)


def _forward_kl(log_q: Tensor, shared: Shared, wanted: bool) -> Result:
    p, negative_entropy = shared
    value = negative_entropy - (p * log_q).sum(-1)
    return value, log_q.exp_().sub_(p) if wanted else None


def _share_reverse_kl(known: Known) -> Shared:
    return (known.logits.log_softmax(-1),)


def _reverse_kl(log_q: Tensor, shared: Shared, wanted: bool) -> Result:
    gap = log_q - shared[0]
    q = log_q.exp_()
    value = (q * gap).sum(-1)
    return value, gap.sub_(value[:, None]).mul_(q) if wanted else None


def _share_jensen_shannon(known: Known) -> Shared:
    log_p = known.logits.log_softmax(-1)
    return log_p, log_p.exp()


def _jensen_shannon(log_q: Tensor, shared: Shared, wanted: bool) -> Result:
    log_p, p = shared
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))
    gap = log_q - log_m
    q = log_q.exp_()
    from_q = (q * gap).sum(-1)
    value = 0.5 * ((p * (log_p - log_m)).sum(-1) + from_q)
    return value, gap.sub_(from_q[:, None]).mul_(q).mul_(0.5) if wanted else None


def _share_acceptance(known: Known) -> Shared:
    return (known.p(),)


def _overlap(log_q: Tensor, shared: Shared, wanted: bool) -> Result:
    p, q = shared[0], log_q.exp_()
    value = torch.minimum(p, q).sum(-1)
    if not wanted:
        return value, None
    below = (q < p).to(q.dtype).add_(q == p, alpha=0.5)  # d min(p, q) / d q
    return value, below.sub((below * q).sum(-1, keepdim=True)).mul_(q)


def _total_variation(log_q: Tensor, shared: Shared, wanted: bool) -> Result:
    value, gradient = _overlap(log_q, shared, wanted)
    return 1 - value, None if gradient is None else gradient.neg_()


def _negative_log_acceptance(log_q: Tensor, shared: Shared, wanted: bool) -> Result:
    value, gradient = _overlap(log_q, shared, wanted)
    value = value.clamp(min=torch.finfo(value.dtype).tiny)
    return -value.log(), None if gradient is None else gradient.div_(-value[:, None])


def _share_lk(known: Known) -> Shared:
    return *_share_forward_kl(known), known.p()


def _lk_hybrid(log_q: Tensor, shared: Shared, wanted: bool) -> Result:
    divergence, by_divergence = _forward_kl(log_q.clone(), shared[:2], wanted)
    rejected, by_rejected = _total_variation(log_q, shared[2:], wanted)
    weight = (-LK_SHARPNESS * (1 - rejected)).exp()
    value = weight * divergence + (1 - weight) * rejected
    if by_divergence is None or by_rejected is None:
        return value, None
    return value, by_rejected.lerp_(by_divergence, weight[:, None])


def _share_cross_entropy(known: Known) -> Shared:
    return (known.logits.argmax(-1),)


def _share_text(known: Known) -> Shared:
    assert known.labels is not None
    return (known.labels,)


def _likelihood(log_q: Tensor, shared: Shared, wanted: bool) -> Result:
    (labels,) = shared
    inside, place = labels >= 0, labels.clamp(min=0)[:, None]
    value = torch.where(inside, -log_q.gather(-1, place)[:, 0], 0.0)
    if not wanted:
        return value, None
    q = log_q.exp_()
    return value, q.scatter_add_(-1, place, q.new_full(place.shape, -1.0)).mul_(inside[:, None])


RULES: dict[str, Rule] = {
    "fkl": (_share_forward_kl, _forward_kl),
    "rkl": (_share_reverse_kl, _reverse_kl),
    "jsd": (_share_jensen_shannon, _jensen_shannon),
    "tv": (_share_acceptance, _total_variation),
    "nla": (_share_acceptance, _negative_log_acceptance),
    "lk": (_share_lk, _lk_hybrid),
    "ce": (_share_cross_entropy, _likelihood),
    "text": (_share_text, _likelihood),
}  # by the names of losses.LOSSES


def _rule(name: str) -> Rule:
    """The rule of a loss; of a user's own one, given logits for log q, with autograd's gradient."""
    if name in RULES:
        return RULES[name]
    loss = find_loss(name)

    def apply(logits: Tensor, shared: Shared, wanted: bool) -> Result:
        known = Known(*shared)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_(wanted)
            value = loss(leaf, known.logits, target_lse=known.lse, labels=known.labels)
            if not wanted:
                return value, None
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient.contiguous()  # ours to overwrite, whatever the loss

    return (lambda known: (known.logits, known.lse, known.labels)), apply


def _apply(
    terms: Sequence[tuple[str, Rule, float]],
    logits: Tensor,
    log_q: Tensor,
    shared: Sequence[Shared],
    wanted: bool,
) -> Result:
    """The weighted sum of several losses; one of them alone with weight 1 is itself."""
    (name, rule, weight), *others = terms
    if name in RULES:
        given = log_q.clone() if others else log_q
    else:
        given = logits.to(log_q.dtype)  # a constant added to them may matter
    value, gradient = rule[1](given, shared[0], wanted)
    value = weight * value
    if gradient is not None and weight != 1:
        gradient.mul_(weight)
    if others:
        more, by_more = _apply(others, logits, log_q, shared[1:], wanted)
        value = value + more
        if gradient is not None and by_more is not None:
            gradient += by_more
    return value, gradient


# ---- what selections look at ---------------------------------------------------------------------


def _entropy(log_q: Tensor, known: Known) -> Tensor:
    log_p = known.logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _flatness(log_q: Tensor, known: Known) -> Tensor:
    return known.logits.softmax(-1).norm(dim=-1).mul(math.sqrt(known.logits.shape[-1])).reciprocal()


def _rank(log_q: Tensor, known: Known) -> Tensor:
    assert known.labels is not None
    own = log_q.gather(-1, known.labels.clamp(min=0)[:, None])
    higher = (log_q > own).sum(-1)
    return torch.where(known.labels >= 0, higher, log_q.shape[-1]).to(log_q.dtype)


def _shared_mass(log_q: Tensor, known: Known) -> Tensor:
    return _overlap(log_q.clone(), _share_acceptance(known), wanted=False)[0]


OBSERVATIONS: dict[str, Callable[[Tensor, Known], Tensor]] = {
    "entropy": _entropy,  # of the target on the draft vocabulary, nats
    "flatness": _flatness,  # cosine of the target's probabilities and the uniform ones
    "rank": _rank,  # of the text's own token in the draft: 0 is its best; Vd if outside
    "overlap": _shared_mass,  # sum min(p, q)
}


# ---- chunks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one call computes losses of, but for the draft's hidden states and rows."""

    loss: str  # as losses.loss_terms reads it; its feature regression is not computed here
    bias: Tensor | None  # [Vd] of the draft's output layer, a constant
    target: Output
    target_hidden: Tensor  # [M, H]
    target_lse: Tensor | None  # [M]
    labels: Tensor | None  # [M]
    watch: tuple[str, ...]  # K names in OBSERVATIONS

    def known(self, place: slice, part: slice, logits: Tensor) -> Known:
        """What is known of a part of the tokens at `place`, whose target logits are `logits`."""
        vectors = (self.target_lse, self.labels)
        return Known(logits, *(None if v is None else v[place][part] for v in vectors))


def chunked_losses(
    loss: str,
    hidden: Tensor,
    draft: Output,
    target_hidden: Tensor,
    target: Output,
    target_lse: Tensor | None = None,
    labels: Tensor | None = None,
    watch: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """token_loss(loss) of every step and token without ever holding `[M, Vd]` numbers: `[S, M]`.

    hidden `[S, M, H]`: what the draft's output layer reads; target_hidden `[M, H]`: the target's at
    the same tokens; target: its output rows over the same ids; target_lse, labels `[M]` as in
    losses.py. Equal to the plain loss of both logits, value and gradient, which reaches `hidden`
    and, if they ask for one, `draft.rows`. Also returns what `watch` names in OBSERVATIONS
    `[K, S, M]`, without gradient.

    Products are in the dtype of the rows; softmax, loss and sums in float32 (float64 for float64).
    A chunk's target logits serve all steps. The gradient of `hidden` is taken at once while the
    logits are there; rows that are trained need the weights of the loss, so that logits are
    computed again in the backward pass.
    """
    work = Work(loss, draft.bias, target, target_hidden, target_lse, labels, tuple(watch))
    return _Chunked.apply(hidden.to(draft.rows.dtype), draft.rows, work)


@dataclass
class Piece:
    """What a chunk gives."""

    place: slice  # in M
    losses: Tensor  # [S, R]
    observed: Tensor  # [K, S, R]
    by_logits: Tensor  # [S, R, Vd], the gradient, if it was wanted


def _walk(hidden: Tensor, rows: Tensor, work: Work, wanted: bool) -> Iterator[Piece]:
    """All tokens, chunk by chunk."""
    terms = [(name, _rule(name), weight) for name, weight in token_terms(work.loss).items()]
    watchers = [OBSERVATIONS[name] for name in work.watch]
    steps, count, _ = hidden.shape
    width, exact = len(rows), exact_dtype(rows.dtype)
    draft = Output(rows, work.bias)
    for place in chunks(count, width):
        logits = draft.logits(hidden[:, place])  # [S, R, Vd]; gradients take its place
        target_logits = work.target.logits(work.target_hidden[place])  # [R, Vd]
        found = torch.empty(1 + len(watchers), *logits.shape[:2], dtype=exact, device=rows.device)
        size = max(1, CACHED_NUMBERS // width) if rows.device.type == "cpu" else count
        for part in _pieces(len(target_logits), size):
            known = work.known(place, part, target_logits[part].to(exact))
            shared = [rule[0](known) for _, rule, _ in terms]
            for step in range(steps):
                here = logits[step, part]  # [R, Vd]
                log_q = torch.log_softmax(here, -1, dtype=exact)
                for k, watcher in enumerate(watchers):
                    found[1 + k, step, part] = watcher(log_q, known)
                found[0, step, part], gradient = _apply(terms, here, log_q, shared, wanted)
                if gradient is not None:
                    here.copy_(gradient)
        yield Piece(place, found[0], found[1:], logits)


class _Chunked(torch.autograd.Function):
    """(hidden `[S, M, H]`, rows `[Vd, H]`, work) -> losses `[S, M]`, observed `[K, S, M]`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, work: Work) -> tuple[Tensor, Tensor]:
        ctx.work = work
        at_once = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        shape = (1 + len(work.watch), *hidden.shape[:2])
        found = torch.empty(shape, dtype=exact_dtype(rows.dtype), device=rows.device)
        gradients = torch.empty_like(hidden) if at_once else None
        for piece in _walk(hidden, rows, work, at_once):
            found[0, :, piece.place], found[1:, :, piece.place] = piece.losses, piece.observed
            if gradients is not None:
                gradients[:, piece.place] = _product(piece.by_logits, rows)
        if gradients is not None:
            ctx.save_for_backward(gradients)
        else:
            ctx.save_for_backward(hidden, rows)
        losses, observed = found[0].clone(), found[1:].clone()
        ctx.mark_non_differentiable(observed)
        return losses, observed

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
    for piece in _walk(hidden, rows, work, wanted=True):
        by_logits = piece.by_logits * weights[:, piece.place, None].to(piece.by_logits.dtype)
        by_hidden[:, piece.place] = _product(by_logits, rows)
        by_rows += by_logits.flatten(0, 1).t() @ hidden[:, piece.place].flatten(0, 1)
    return by_hidden, by_rows.to(rows.dtype)
