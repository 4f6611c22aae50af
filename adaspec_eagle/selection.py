"""Which tokens count: AdaSPEC's dL = L_draft - L_ref -> mask.

Hu et al., "AdaSPEC: Selective Knowledge Distillation for Efficient Speculative Decoders",
arXiv 2510.19779, section 3.
"""

from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor

from adaspec_eagle.errors import UserError


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


def select(
    loss_draft: Tensor, loss_ref: Tensor, mask: Tensor, keep: str | float | Decimal
) -> Tensor:
    """The ceil(k n) of the n tokens in `mask` whose dL = L_draft - L_ref is largest.

    loss_draft, loss_ref: one value a token, any shape; mask: booleans of that shape. Ties go to
    the earlier position; a dL that is not a number counts as the smallest. Returns booleans of that
    shape, never True outside the mask; keep = 1 gives the mask itself.
    """
    gap = (loss_draft - loss_ref).detach().float().flatten()
    allowed = mask.flatten().bool()
    count = kept(int(allowed.sum()), keep)
    gap = gap.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = gap.sort(descending=True, stable=True).indices
    order = order[allowed[order]][:count]
    chosen = torch.zeros_like(allowed)
    chosen[order] = True
    return chosen.view(mask.shape)
