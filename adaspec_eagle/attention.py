"""Masks, and attention for a few query tokens over a long key cache.

Legend: B rows, N query tokens, T key columns, Hq and Hk query and key heads, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "adaspec_grouped"
FEW_QUERIES = 64  # above this many query tokens the stock kernel is as fast, and needs less memory


@dataclass(frozen=True)
class Unrolled:
    """The mask of an unrolled training step, without its mostly empty matrix.

    The key columns are those of step 0, `first` of them, then `n` a further step up to this one.
    Query i (counted from `begin`) sees step 0 up to and including position begin + i, and of every
    later step the column i.
    """

    first: int
    begin: int


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask `[B, N, T]` (True = may look) into an additive one `[B, 1, N, T]`.

    The only place where masks become numbers: a boolean 4-D mask is silently wrong with eager
    attention.
    """
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)[:, None]  # [B, 1, N, T]


def tree_mask(lengths: Tensor, start: int, ancestors: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask for new nodes that see their row's history and their own ancestors.

    lengths `[B]`: committed tokens a row; start: the first scratch column, the largest of them;
    ancestors `[B, N, M]`: which of the M scratch columns each of the N new nodes sees, itself
    included. Returns `[B, 1, N, start + M]`. A single row has no stale columns to hide, so that its
    mask costs next to nothing however long the history.
    """
    b, n, m = ancestors.shape
    mask = torch.zeros(b, 1, n, start + m, dtype=dtype, device=lengths.device)
    mask[..., start:] = additive_mask(ancestors, dtype)
    if b > 1:
        columns = torch.arange(start, device=lengths.device)
        history = columns[None, None, :] < lengths[:, None, None]  # [B, 1, start]
        mask[..., :start] = additive_mask(history, dtype)
    return mask


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Unrolled | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention in which the query heads of a group share their keys without a copy of them.

    query `[B, Hq, N, D]`, key and value `[B, Hk, T, D]`, additive mask `[B, 1, N, T]`. The stock
    path repeats keys and values Hq / Hk times and runs a kernel made for many queries; for a few
    queries two batched products are several times as fast on CPU. The softmax is in float32 (or
    float64 for float64 input). Without a mask, or for more than FEW_QUERIES tokens, this is the
    stock path. Returns `[B, N, Hq, D]`, as transformers' attention functions do.
    """
    b, hq, n, d = query.shape
    if isinstance(attention_mask, Unrolled):
        return unrolled_attention(query, key, value, attention_mask, scaling), None
    if attention_mask is None or n > FEW_QUERIES or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    hk, t = key.shape[1], key.shape[2]
    scale = d**-0.5 if scaling is None else scaling
    folded = (query * scale).reshape(b * hk, (hq // hk) * n, d)  # [B Hk, G N, D]
    scores = torch.matmul(folded, key.flatten(0, 1).transpose(1, 2))  # [B Hk, G N, T]
    scores = scores.view(b, hq, n, t) + attention_mask
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = scores.softmax(-1, dtype=exact).to(value.dtype)
    out = torch.matmul(weights.view(b * hk, (hq // hk) * n, t), value.flatten(0, 1))
    return out.view(b, hq, n, d).transpose(1, 2), None


def unrolled_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Unrolled, scaling: float | None = None
) -> Tensor:
    """Attention of one unrolled step: causal over step 0, diagonal over the later steps.

    query `[B, Hq, N, D]`; key, value `[B, Hk, first + S N, D]`, S the number of later steps. Costs
    N x first scores and S a query, where a dense mask costs N x (first + S N). Returns
    `[B, N, Hq, D]`; equal to dense attention under the same mask.
    """
    b, hq, n, d = query.shape
    hk, g, first = key.shape[1], hq // key.shape[1], mask.first
    query = query.view(b, hk, g, n, d) * (d**-0.5 if scaling is None else scaling)
    later = (b, hk, 1, -1, n, d)
    key_late, value_late = key[:, :, first:].view(later), value[:, :, first:].view(later)
    near = (query[:, :, :, None] * key_late).sum(-1).transpose(-1, -2)  # [B, Hk, G, N, S]
    far = torch.matmul(query.flatten(2, 3), key[:, :, :first].transpose(-1, -2))
    columns = torch.arange(first, device=query.device)
    rows = torch.arange(mask.begin, mask.begin + n, device=query.device)
    hidden = columns[None, :] > rows[:, None]  # [N, first]
    far = far.view(b, hk, g, n, first).masked_fill(hidden, torch.finfo(query.dtype).min)
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = torch.cat([far, near], -1).softmax(-1, dtype=exact).to(value.dtype)
    out = torch.matmul(weights[..., :first].flatten(2, 3), value[:, :, :first])
    out = out.view(b, hk, g, n, d)
    late_weights = weights[..., first:].transpose(-1, -2)[..., None]  # [B, Hk, G, S, N, 1]
    out = out + (late_weights * value_late).sum(3)
    return out.flatten(1, 2).transpose(1, 2)


def register() -> None:
    """Make `grouped_attention` known to transformers under the name GROUPED (idempotent)."""
    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def grouped(config: PreTrainedConfig) -> Iterator[None]:
    """Let the model that owns `config` attend by `grouped_attention` inside the block only."""
    register()
    before = config._attn_implementation
    config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = before
