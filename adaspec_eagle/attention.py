"""Masks, and attention for a few query tokens over a long key cache.

Legend: B rows, N query tokens, T key columns, Hq and Hk query and key heads, D head size.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "adaspec_grouped"
FEW_QUERIES = 64  # above this many query tokens the stock kernel is as fast, and needs less memory
QUERY_BLOCK = 32  # queries that torch's fused kernel for CPU works on at a time
AMX = torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Unrolled:
    """The mask of a training step, without its mostly empty matrix.

    The key columns are those of the whole text at step 0, `first` of them, then N a step, from step
    0 to this one. Query n stands at index at[b, n]: it sees the text before that index and, of
    every step, the column n.
    """

    first: int
    at: Tensor  # [B, N]


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and losses: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hide(mask: Tensor, allowed: Tensor) -> Tensor:
    """Hide in an additive mask `[B, 1, N, T]`, in place, what a boolean one `[B, N, T]` forbids.

    The only place where a boolean mask becomes numbers: left boolean, a 4-D mask is silently wrong
    with eager attention.
    """
    return mask.masked_fill_(~allowed[:, None], torch.finfo(mask.dtype).min)


def tree_mask(lengths: Tensor, start: int, ancestors: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask for new nodes that see their row's history and their own ancestors.

    lengths `[B]`: committed tokens a row; start: the first scratch column, the largest of them;
    ancestors `[B, N, M]`: which of the M scratch columns each of the N new nodes sees, itself
    included. Returns `[B, 1, N, start + M]`. A single row has no stale columns to hide, so that its
    mask costs next to nothing however long the history.
    """
    b, n, m = ancestors.shape
    mask = torch.zeros(b, 1, n, start + m, dtype=dtype, device=lengths.device)
    if m:
        hide(mask[..., start:], ancestors)
    if b > 1:
        columns = torch.arange(start, device=lengths.device)
        history = columns[None, None, :] < lengths[:, None, None]  # [B, 1, start]
        hide(mask[..., :start], history)
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

    query `[B, Hq, N, D]`, key and value `[B, Hk, T, D]`, additive mask `[B, 1, N, T]`. Under a mask
    transformers' own path copies keys and values Hq / Hk times. torch's fused kernel for CPU takes
    them as they are; elsewhere these are two batched products. The softmax is in float32 (or
    float64 for float64 input). Without a mask of that kind, and off the CPU for more than
    FEW_QUERIES tokens, this is the stock path. Returns `[B, N, Hq, D]`, as transformers' attention
    functions do.
    """
    if isinstance(attention_mask, Unrolled):
        return unrolled_attention(query, key, value, attention_mask, scaling), None
    on_cpu = query.device.type == "cpu"
    if (
        attention_mask is None
        or attention_mask.dtype == torch.bool  # one of transformers' own
        or dropout
        or (query.shape[2] > FEW_QUERIES and not on_cpu)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = by_fused_kernel if on_cpu else by_products
    return attend(query, key, value, attention_mask, scale).transpose(1, 2), None


def by_fused_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """`grouped_attention` in one call of torch's kernel for CPU: `[B, Hq, N, D]`.

    Queries too few to fill one of the kernel's blocks stand beside the others of their group; all
    do in a compiled call, which would else be one graph for few and one for many. A lone query does
    where that pays: in bfloat16 without AMX (a third of the time behind 1,000 columns; elsewhere it
    is as fast alone).
    """
    b, hq, n, d = query.shape
    hk = key.shape[1]
    least = 1 if query.dtype == torch.bfloat16 and not AMX else 2
    if least <= n < QUERY_BLOCK or torch.compiler.is_compiling():
        query = query.reshape(b, hk, -1, d)  # [B, Hk, G N, D]
        mask = torch.cat([mask] * (hq // hk), dim=2)
    out = functional.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=True
    )
    return out.reshape(b, hq, n, d)


def by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`grouped_attention` as two batched products and a softmax: `[B, Hq, N, D]`."""
    b, hq, n, d = query.shape
    hk, t = key.shape[1], key.shape[2]
    folded = (query * scale).reshape(b * hk, (hq // hk) * n, d)  # [B Hk, G N, D]
    scores = torch.matmul(folded, key.flatten(0, 1).transpose(1, 2))  # [B Hk, G N, T]
    scores = scores.view(b, hq, n, t) + mask
    weights = scores.softmax(-1, dtype=exact_dtype(query.dtype)).to(value.dtype)
    out = torch.matmul(weights.view(b * hk, (hq // hk) * n, t), value.flatten(0, 1))
    return out.view(b, hq, n, d)


def unrolled_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Unrolled, scaling: float | None = None
) -> Tensor:
    """Attention of one unrolled step: causal over the text, diagonal over the steps.

    query `[B, Hq, N, D]`; key, value `[B, Hk, first + S N, D]`, S the steps so far. Costs N x first
    scores and S a query, where a dense mask costs N x (first + S N). Scores are not kept for the
    backward pass but computed again, on CPU a row at a time so that they stay in a core's cache.
    Softmax in float32 (float64 for float64). Returns `[B, N, Hq, D]`; equal to dense attention
    under the same mask, value and gradient.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _UnrolledAttention.apply(query * scale, key, value, mask)


class _UnrolledAttention(torch.autograd.Function):
    """(scaled query, key, value, mask) -> output, as `unrolled_attention`.

    The softmax over all columns is that over the text, `far`, times its share of the whole, and
    beside it the weights of the steps, `near`. G is Hq / Hk.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Unrolled) -> Tensor:
        b, hq, n, d = query.shape
        hk, exact = key.shape[1], exact_dtype(query.dtype)
        q, late = query.view(b, hk, hq // hk, n, d), (b, hk, 1, -1, n, d)
        k_late, v_late = key[:, :, mask.first :].view(late), value[:, :, mask.first :].view(late)
        near = (q[:, :, :, None] * k_late).sum(-1, dtype=exact).transpose(-1, -2)
        out = torch.empty_like(q)  # [B, Hk, G, N, D]
        lse = torch.empty(q.shape[:-1], dtype=exact, device=q.device)
        for rows, columns in _parts(mask):
            weights = _far_scores(q[rows], key[rows, :, columns], mask.at[rows])
            highest = weights.amax(-1)
            weights = weights.softmax(-1)
            lse[rows] = highest - weights.amax(-1).log()
            out[rows] = _over_columns(weights, value[rows, :, columns])
        whole = torch.logaddexp(lse, near.logsumexp(-1))
        share, near = (lse - whole).exp_(), (near - whole[..., None]).exp_()  # [.., N, S]
        out *= share[..., None].to(out.dtype)
        out += (near.to(out.dtype).transpose(-1, -2)[..., None] * v_late).sum(3)
        ctx.mask = mask
        ctx.save_for_backward(q, key, value, share, near, out)
        return out.flatten(1, 2).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, key, value, share, near, out = ctx.saved_tensors
        mask, first = ctx.mask, ctx.mask.first
        b, hk, g, n, d = q.shape
        by_out = upstream[0].transpose(1, 2).reshape(q.shape)  # [B, Hk, G, N, D]
        mean = (by_out * out).sum(-1, dtype=share.dtype)  # [B, Hk, G, N]
        by_q, by_key, by_value = (torch.zeros_like(t) for t in (q, key, value))
        shared, far_mean = by_out * share[..., None].to(q.dtype), mean * share
        for rows, columns in _parts(mask):
            keys = key[rows, :, columns]
            weights = _far_scores(q[rows], keys, mask.at[rows]).softmax(-1)
            scores = _against_columns(shared[rows], value[rows, :, columns])  # by the weights
            by_value[rows, :, columns] = _by_columns(weights, shared[rows])
            scores = (scores - far_mean[rows][..., None]).mul_(weights).to(q.dtype)
            by_q[rows] = _over_columns(scores, keys)
            by_key[rows, :, columns] = _by_columns(scores, q[rows])
        late = (b, hk, -1, n, d)
        k_late, v_late = key[:, :, first:].view(late), value[:, :, first:].view(late)
        by_near = (by_out[:, :, :, None] * v_late[:, :, None]).sum(-1, dtype=near.dtype)
        by_near = (near.transpose(-1, -2) * (by_near - mean[:, :, :, None])).to(q.dtype)
        near = near.to(q.dtype).transpose(-1, -2)  # [B, Hk, G, S, N], as by_near
        by_q += (by_near[..., None] * k_late[:, :, None]).sum(3)
        by_key[:, :, first:] = (by_near[..., None] * q[:, :, :, None]).sum(2).flatten(2, 3)
        by_late = (near[..., None] * by_out[:, :, :, None]).sum(2)
        by_value[:, :, first:] = by_late.flatten(2, 3)
        return by_q.flatten(1, 2), by_key, by_value, None


def _parts(mask: Unrolled) -> list[tuple[slice, slice]]:
    """Rows to work on at a time and the text's columns that they see: a row on CPU, else all."""
    if mask.at.device.type != "cpu":
        return [(slice(None), slice(mask.first))]
    seen = mask.at.amax(1).clamp(min=1).tolist()
    return [(slice(row, row + 1), slice(end)) for row, end in enumerate(seen)]


def _far_scores(query: Tensor, key: Tensor, at: Tensor) -> Tensor:
    """Scores of the text's columns `[B, Hk, G, N, T]`; finite, so that a query may see none."""
    hidden = torch.arange(key.shape[2], device=key.device) >= at[..., None]  # [B, N, T]
    scores = _against_columns(query, key).to(exact_dtype(query.dtype))
    return scores.masked_fill_(hidden[:, None, None], torch.finfo(scores.dtype).min)


def _against_columns(x: Tensor, columns: Tensor) -> Tensor:
    """`[B, Hk, G, N, D]` and `[B, Hk, T, D]` -> products `[B, Hk, G, N, T]`."""
    b, _, g, _, _ = x.shape
    flat = torch.bmm(_of_group(x), rearrange(columns, "b k t d -> (b k) d t"))
    return rearrange(flat, "(b k) (g n) t -> b k g n t", b=b, g=g)


def _over_columns(weights: Tensor, columns: Tensor) -> Tensor:
    """`[B, Hk, G, N, T]` and `[B, Hk, T, D]` -> sums over the columns `[B, Hk, G, N, D]`."""
    b, _, g, _, _ = weights.shape
    flat = torch.bmm(_of_group(weights.to(columns.dtype)), columns.flatten(0, 1))
    return rearrange(flat, "(b k) (g n) d -> b k g n d", b=b, g=g)


def _by_columns(weights: Tensor, x: Tensor) -> Tensor:
    """`[B, Hk, G, N, T]` and `[B, Hk, G, N, D]` -> sums over G and N `[B, Hk, T, D]`."""
    flat = torch.bmm(_of_group(weights.to(x.dtype)).transpose(1, 2), _of_group(x))
    return flat.unflatten(0, weights.shape[:2])


def _of_group(x: Tensor) -> Tensor:
    """All queries of a group of heads in one matrix: `[B, Hk, G, N, X]` -> `[B Hk, G N, X]`."""
    return rearrange(x, "b k g n x -> (b k) (g n) x")


_LOCK = threading.Lock()
_INSIDE: dict[int, tuple[frozenset, str]] = {}  # by id of a config: the blocks, what it had before


def register() -> None:
    """Make `grouped_attention` known to transformers under the name GROUPED (idempotent)."""
    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def grouped(config: PreTrainedConfig) -> Iterator[None]:
    """Let the model that owns `config` attend by `grouped_attention` inside the block only.

    Several threads may be inside at once; the last one that leaves puts things back.
    """
    register()
    me, own = object(), (frozenset[object](), config._attn_implementation)
    try:  # from the first change on: Ctrl-C may come at any of them
        with _LOCK:
            inside, before = _INSIDE.get(id(config), own)
            _INSIDE[id(config)] = (inside | {me}, before)
            config._attn_implementation = GROUPED
        yield
    finally:
        with _LOCK:
            inside, before = _INSIDE.pop(id(config), own)
            if inside - {me}:
                _INSIDE[id(config)] = (inside - {me}, before)
            else:
                config._attn_implementation = before
