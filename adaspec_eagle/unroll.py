"""unroll(head, ...): training steps on the head's own hidden states, and which tokens count.

Legend: S unroll steps, B rows, T positions, H hidden, M supervised target positions of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adaspec_eagle.attention import Unrolled
from adaspec_eagle.cache import TreeCache
from adaspec_eagle.head import DraftHead


@dataclass
class Batch:
    """One micro-batch with what the target says about it."""

    input_ids: Tensor  # [B, T], right-padded
    rows: Tensor  # [M] batch row of each supervised target position
    positions: Tensor  # [M] position p whose next token p + 1 is an answer token
    features: Tensor  # [B, T, F * H]
    hidden: Tensor  # [B, T, H], the target's last hidden states
    reference: Tensor | None = None  # [S, M] losses of the reference head, if known beforehand


def supervised(loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(row, position) `[M]` each of all p whose next token is an answer token."""
    rows, positions = loss_mask[:, 1:].nonzero(as_tuple=True)
    return rows, positions


def step_masks(positions: Tensor, steps: int) -> Tensor:
    """`[S, M]`: whether position p counts at step s.

    The head's index at step s is i = p - 1 - s, so that i counts at step s exactly if token
    i + 2 + s = p + 1 is an answer token; it must exist, which fails only for very short prompts.
    """
    return positions[None] - 1 - torch.arange(steps, device=positions.device)[:, None] >= 0


def unroll(
    head: DraftHead,
    features: Tensor,
    input_ids: Tensor,
    steps: int,
    window: Tensor | None = None,
    recompute: bool = False,
) -> list[Tensor]:
    """Run the head `steps` times on its own hidden states, next tokens given (teacher forcing).

    Step s pairs index i with token i + 1 + s, takes the hidden state of step s - 1 at i (the fused
    features at s = 0), and attends causally to step 0 and to its own earlier steps at i: what the
    decoder sees when it drafts token i + 2 + s. Training-time test, EAGLE-3 (arXiv 2503.01840,
    section 3.2); HASS (arXiv 2408.15766). window `[B, N]`: the consecutive indices that are wanted
    in each row, None for all; what step 0 leaves at the others is only looked at. Tokens behind the
    text's end, which nothing supervises, are those of its start. recompute: keep of a step for the
    backward pass only what it begins with (gradient checkpointing). Returns S hidden states
    `[B, N, H]`.
    """
    length = input_ids.shape[1]
    if window is None:
        window = torch.arange(length, device=input_ids.device).expand_as(input_ids)

    def run(step: int, given: Tensor, *seen: Tensor) -> tuple[Tensor, ...]:
        """One step from features or hidden states, and keys and values so far: new ones of both."""
        cache = TrainingCache(seen)
        if step == 0:
            after = torch.cat([input_ids, input_ids[:, :1]], 1)
            return head.prefill(given, after, cache, window), *cache.tensors()
        tokens = input_ids.gather(1, (window + 1 + step) % length)
        hidden = head(given, tokens, window + step, Unrolled(length, window), cache, step)
        return hidden, *cache.tensors()

    states: list[Tensor] = []
    seen: list[Tensor] = []
    hidden = features
    for step in range(steps):
        if recompute and torch.is_grad_enabled():
            hidden, *seen = checkpoint(run, step, hidden, *seen, use_reentrant=False)
        else:
            hidden, *seen = run(step, hidden, *seen)
        states.append(hidden)
    return states


class TrainingCache(TreeCache):
    """Keys and values of the unrolled steps, appended so that gradients flow through them."""

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        super().__init__(num_layers=0)
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        self.layers_seen: dict[int, tuple[Tensor, Tensor]] = dict(enumerate(pairs))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, H, N, D]`; give all steps' columns."""
        if layer_idx in self.layers_seen:
            keys, values = self.layers_seen[layer_idx]
            key_states = torch.cat([keys, key_states], dim=2)
            value_states = torch.cat([values, value_states], dim=2)
        self.layers_seen[layer_idx] = key_states, value_states
        return key_states, value_states

    def tensors(self) -> list[Tensor]:
        """Keys and values of layer 0, of layer 1, ...; what another cache can begin with."""
        return [tensor for layer in sorted(self.layers_seen) for tensor in self.layers_seen[layer]]


def needed(batch: Batch, steps: int) -> Tensor:
    """The window of a batch `[B, N]`: in every row as many indices as its longest answer needs.

    Index p - 1 - s for all supervised p and steps s; N is at least 1.
    """
    rows, length = batch.input_ids.shape
    first, last = batch.rows.new_full((rows,), length), batch.rows.new_zeros(rows)
    first = first.scatter_reduce(0, batch.rows, batch.positions, "amin") - steps
    last = last.scatter_reduce(0, batch.rows, batch.positions, "amax") - 1
    first = first.clamp(min=0)
    size = max(1, int((last - first).max()) + 1)
    begin = first.clamp(max=length - size)
    return begin[:, None] + torch.arange(size, device=begin.device)


def step_states(states: list[Tensor], batch: Batch, window: Tensor) -> list[Tensor]:
    """Of each step's hidden states those that predict the supervised positions: S x `[M, H]`.

    Positions without an index (step_masks) give some other row; their mask drops them.
    """
    picked = []
    for step, hidden in enumerate(states):
        index = batch.positions - 1 - step - window[batch.rows, 0]
        picked.append(hidden[batch.rows, index.clamp(min=0)])
    return picked
