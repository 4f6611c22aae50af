"""Medusa-1 heads: one residual block a depth over the target's last hidden state, no attention.

Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
arXiv 2401.10774, section 3.1.1: head s predicts the token s + 2 behind its position from that
position alone, whatever was drafted in between, so that a tree of its drafts is a part of the
Cartesian product of the heads' best tokens. The paper's heads end in output rows of their own; here
they share the target's, or one trained copy (`train_output`), as in TGI's second Medusa layout.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache

from adaspec_eagle.head import DraftHead, HeadConfig, Target, Unrolled, UserError, count_columns


class Head(DraftHead):
    """A state is [the target's hidden state, the step's prediction], 2 H wide."""

    default_unroll = 4  # a step of training trains the block of that depth; lambda_k = 0.8^k
    reads_tokens = False

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.blocks = nn.ModuleList([nn.Linear(size, size) for _ in range(config.steps)])

    @staticmethod
    def feature_layers(num_layers: int) -> list[int]:
        """The last hidden state, which the output layer reads."""
        return [num_layers]

    @property
    def deepest(self) -> int:
        """One level a block."""
        return self.config.steps

    def start_from(self, target: Target) -> None:
        """Blocks of zeros, as in the paper: every depth begins with the target's own next token."""
        for weight in self.blocks.parameters():
            nn.init.zeros_(weight)

    def fuse(self, features: Tensor) -> Tensor:
        """`[B, N, H]` -> `[B, N, 2 H]`: nothing is predicted yet."""
        return torch.cat([features, features], dim=-1)

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | Unrolled | None,
        cache: Cache | None,
        step: int,
    ) -> Tensor:
        """h + SiLU(W_s h + b_s) of the position's feature h, which is handed on beside it."""
        if step >= self.deepest:
            raise UserError(
                f"this medusa head has {self.deepest} blocks, so that it drafts {self.deepest} "
                f"tokens deep; ask for a tree of that depth, or train it with --unroll {step + 1}"
            )
        count_columns(cache, hidden)
        feature = hidden[..., : self.config.hidden_size]
        return torch.cat([feature, feature + functional.silu(self.blocks[step](feature))], dim=-1)

    def remember(self, hidden: Tensor, tokens: Tensor, positions: Tensor, cache: Cache) -> None:
        """The count alone."""
        count_columns(cache, hidden)

    def readout(self, hidden: Tensor) -> Tensor:
        """The prediction: `[..., 2 H]` -> `[..., H]`."""
        return hidden[..., self.config.hidden_size :]
