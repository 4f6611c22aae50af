"""Which tokens count: what is known of a micro-batch's tokens -> a weight a token and step.

Legend: S unroll steps, M supervised target positions. A selection takes `TokenStats` and gives
weights `[S, M]`, 0 where the mask is False. AdaSPEC's: Hu et al., "AdaSPEC: Selective Knowledge
Distillation for Efficient Speculative Decoders", arXiv 2510.19779, section 3. One of a user's own
goes by `path.py:name`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor

from adaspec_eagle.errors import UserError
from adaspec_eagle.plugins import function_of, is_function_path


@dataclass(frozen=True)
class TokenStats:
    """What a selection may look at. What its entry in NEEDS does not name may be None.

    Position p at step s is what the head predicts of token p + 1 from index i = p - 1 - s.
    """

    loss: Tensor  # [S, M] L_draft
    mask: Tensor  # [S, M] booleans: which count at all
    rows: Tensor  # [M] batch row, ascending
    positions: Tensor  # [M] position p, ascending in a row
    keep: Decimal  # k
    generator: torch.Generator  # randomness that belongs to this micro-batch, on the CPU
    reference: Tensor | None = None  # [S, M] L_ref of the reference head, or of the average
    entropy: Tensor | None = None  # [S, M] of the target on the draft vocabulary, nats
    flatness: Tensor | None = None  # [S, M] cosine of the target's p and the uniform one
    rank: Tensor | None = None  # [S, M] of the text's own token in the draft, 0 its best
    overlap: Tensor | None = None  # [S, M] sum min(p, q)


Selection = Callable[[TokenStats], Tensor]
OBSERVED = ("entropy", "flatness", "rank", "overlap")


# ---- a fraction k --------------------------------------------------------------------------------


def parse_keep(keep: str | float | Decimal) -> Decimal:
    """The fraction k as the decimal that was typed; UserError outside (0, 1]."""
    try:
        value = Decimal(str(keep))
    except ArithmeticError as error:
        raise UserError(f"keep {keep!r} is not a number; give a fraction in (0, 1]") from error
    if value.is_nan() or not 0 < value <= 1:
        raise UserError(f"keep {keep} is outside (0, 1]: the fraction of tokens to train on")
    return value


def kept(count: int, keep: str | float | Decimal) -> int:
    """ceil(k n), exact in decimals (in floating point ceil(0.55 * 100) is 56)."""
    return int((parse_keep(keep) * count).to_integral_value(ROUND_CEILING))


def highest(score: Tensor, mask: Tensor, keep: str | float | Decimal) -> Tensor:
    """The ceil(k n) of the n tokens in `mask` with the largest score.

    score: one value a token, any shape; mask: booleans of that shape. Ties go to the earlier
    position; a score that is not a number counts as the smallest. Returns booleans of that shape,
    never True outside the mask; keep = 1 gives the mask itself.
    """
    flat, allowed = score.detach().flatten(), mask.flatten().bool()
    count = kept(int(allowed.sum()), keep)
    flat = flat.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = flat.sort(descending=True, stable=True).indices
    order = order[allowed[order]][:count]
    chosen = torch.zeros_like(allowed)
    chosen[order] = True
    return chosen.view(mask.shape)


def select(
    loss_draft: Tensor, loss_ref: Tensor, mask: Tensor, keep: str | float | Decimal
) -> Tensor:
    """AdaSPEC: the ceil(k n) tokens in `mask` whose dL = L_draft - L_ref is largest (`highest`)."""
    return highest(loss_draft - loss_ref, mask, keep)


def _highest_by_step(score: Tensor, stats: TokenStats) -> Tensor:
    """`highest` in each step: booleans `[S, M]`."""
    pairs = zip(score, stats.mask, strict=True)
    return torch.stack([highest(values, mask, stats.keep) for values, mask in pairs])


# ---- selections ----------------------------------------------------------------------------------


def everything(stats: TokenStats) -> Tensor:
    """Every token: plain distillation."""
    return stats.mask


def adaspec(stats: TokenStats) -> Tensor:
    """AdaSPEC: in each step the fraction k with the largest dL = L_draft - L_ref."""
    assert stats.reference is not None
    columns = zip(stats.loss, stats.reference, stats.mask, strict=True)
    return torch.stack([select(d, r, m, stats.keep) for d, r, m in columns])


def adaspec_gap(stats: TokenStats) -> Tensor:
    """Tokens with dL > 0, however many: k follows the measured gap and shrinks as it closes."""
    assert stats.reference is not None
    return stats.mask & (stats.loss.detach() > stats.reference)


def uniform(stats: TokenStats) -> Tensor:
    """A fraction k drawn at random, anew in each micro-batch."""
    draw = torch.rand(stats.loss.shape, generator=stats.generator)
    return _highest_by_step(draw.to(stats.mask.device), stats)


def largest_loss(stats: TokenStats) -> Tensor:
    """The fraction k with the largest L_draft."""
    return _highest_by_step(stats.loss, stats)


def smallest_loss(stats: TokenStats) -> Tensor:
    """The fraction k with the smallest L_draft."""
    return _highest_by_step(-stats.loss, stats)


def target_entropy(stats: TokenStats) -> Tensor:
    """The fraction k where the target's distribution has the largest entropy."""
    assert stats.entropy is not None
    return _highest_by_step(stats.entropy, stats)


def target_flatness(stats: TokenStats) -> Tensor:
    """The fraction k where the target is flattest, by cos(p, uniform) (SFDD, arXiv 2601.18902)."""
    assert stats.flatness is not None
    return _highest_by_step(stats.flatness, stats)


TOP = 3


def top3(stats: TokenStats) -> Tensor:
    """Where the text's own token is among the head's best 3, in this step and those before.

    Token-alignable training of GRIFFIN (arXiv 2502.11018).
    """
    assert stats.rank is not None
    passed = (stats.rank < TOP).float()
    return _earlier(passed, stats) * passed * stats.mask


def reach(stats: TokenStats) -> Tensor:
    """Weights prod_{j < s} overlap_j at the same index: the chance that drafting gets to step s.

    The idea of D-PACE: later steps matter as much as they are reached.
    """
    assert stats.overlap is not None
    return _earlier(stats.overlap, stats) * stats.mask


def _earlier(passed: Tensor, stats: TokenStats) -> Tensor:
    """prod_{j < s} passed_j at the same index of the head, of values `[S, M]`: `[S, M]`.

    Step s at p and step s - 1 at p - 1 have the same index. Steps whose token is no answer token
    say nothing and count as passed.
    """
    follows = torch.zeros_like(stats.rows, dtype=torch.bool)
    follows[1:] = (stats.rows[1:] == stats.rows[:-1]) & (
        stats.positions[1:] == stats.positions[:-1] + 1
    )
    found = [torch.ones_like(passed[0])]
    for before in passed[:-1]:
        found.append(torch.where(follows, (found[-1] * before).roll(1), 1.0))
    return torch.stack(found)


SELECTIONS: dict[str, Selection] = {
    "none": everything,
    "adaspec": adaspec,
    "adaspec-anneal": adaspec,
    "adaspec-gap": adaspec_gap,
    "adaspec-ema": adaspec,
    "random": uniform,
    "largest": largest_loss,
    "smallest": smallest_loss,
    "entropy": target_entropy,
    "flatness": target_flatness,
    "top3": top3,
    "reach": reach,
}
NEEDS: dict[str, tuple[str, ...]] = {  # reference: a reference head; average: of the draft head
    "adaspec": ("reference",),
    "adaspec-anneal": ("reference",),
    "adaspec-gap": ("reference",),
    "adaspec-ema": ("average",),
    "entropy": ("entropy",),
    "flatness": ("flatness",),
    "top3": ("rank",),
    "reach": ("overlap",),
}
BY_COUNT = {"adaspec-gap", "top3", "reach"}  # how many count is not known before the losses are
AVERAGE_DECAY = 0.99  # of adaspec-ema


def check_selection(name: str) -> None:
    """Raise UserError for a selection that is not known, or whose file or function is not there."""
    if is_function_path(name):
        function_of(name)
    elif name not in SELECTIONS:
        raise UserError(
            f"unknown --select {name!r}; choose one of {', '.join(SELECTIONS)}, or path.py:name"
        )


def chosen_weights(name: str, stats: TokenStats) -> Tensor:
    """The weights `[S, M]` that a selection gives; UserError if a user's own gives none.

    What a user's own gives to tokens outside the mask does not count.
    """
    if name in SELECTIONS:
        return SELECTIONS[name](stats)
    made = function_of(name)(stats)
    wanted = tuple(stats.mask.shape)
    if not isinstance(made, Tensor) or tuple(made.shape) != wanted:
        got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise UserError(f"--select {name} gave {got}, not a tensor of weights {wanted}")
    made = made.masked_fill(~stats.mask, 0)
    if not bool((made.isfinite() & (made >= 0)).all()):
        raise UserError(f"--select {name} gave weights that are negative or not finite")
    return made


def needs(name: str) -> tuple[str, ...]:
    """What a selection reads of TokenStats; one of a user's own is given all but a reference."""
    return NEEDS.get(name, ()) if name in SELECTIONS else OBSERVED


def keep_at(name: str, keep: Decimal, progress: float) -> Decimal:
    """k at a point of training, progress in [0, 1].

    k itself, but for adaspec-anneal: k_t = 1 - (1 - k) t, from all tokens down to the fraction k,
    since a gap between a reference and a head that knows nothing yet says little.
    """
    if name != "adaspec-anneal":
        return keep
    return 1 - (1 - keep) * Decimal(str(progress))


def divisor(name: str, mask: Tensor, keep: Decimal) -> Tensor:
    """What each step's sum of losses is divided by, of those in its mask `[S, M]`: `[S]`.

    The number of tokens that count. Where that depends on the losses (BY_COUNT, a user's own
    function) the number of all tokens instead, so that what is left out makes the loss smaller:
    the sum over an accumulation window has to be divided before the losses are there.
    """
    numbers = mask.sum(1)
    if name == "none" or name in BY_COUNT or name not in SELECTIONS:
        return numbers
    return torch.tensor([kept(int(number), keep) for number in numbers], device=mask.device)
