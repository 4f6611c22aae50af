"""EAGLE-1 head: one layer over fc([embedding, feature]) that predicts the target's next feature.

Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", arXiv 2401.15077.
Tensor names are those of the published heads; like theirs, the layer has no input norm and nothing
follows it but the target's output layer.
"""

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from adaspec_eagle.head import (
    DraftHead,
    HeadConfig,
    Rotary,
    Target,
    Unrolled,
    copy_layer,
    pass_through,
    remember_text,
)


class Head(DraftHead):
    """EAGLE-1: regression onto the target's last hidden state beside the distillation loss."""

    default_loss = "feature=1,fkl=0.1"  # the paper's weights
    default_unroll = 1
    default_draft_vocab = None

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        layer = config.layer_config()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList([LlamaDecoderLayer(layer, layer_idx=0)])
        self.layers[0].input_layernorm = nn.Identity()
        self.rotary = Rotary(layer)

    @staticmethod
    def feature_layers(num_layers: int) -> list[int]:
        """The last hidden state, which the output layer reads."""
        return [num_layers]

    def start_from(self, target: Target) -> None:
        """The target's last layer, over the feature."""
        copy_layer(self.layers[0], target, {})
        pass_through(self.fc)

    def fuse(self, features: Tensor) -> Tensor:
        """The feature itself."""
        return features

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | Unrolled | None,
        cache: Cache | None,
        step: int,
    ) -> Tensor:
        """fc([embedding, hidden]) through one Llama layer: the predicted next feature."""
        return self.layers[0](
            self._join(hidden, tokens),
            position_embeddings=self.rotary(hidden, positions),
            attention_mask=mask,
            past_key_values=cache,
        )

    def remember(self, hidden: Tensor, tokens: Tensor, positions: Tensor, cache: Cache) -> None:
        """Keys and values alone."""
        joined, rotary = self._join(hidden, tokens), self.rotary(hidden, positions)
        remember_text(self.layers[0].self_attn, joined, rotary, cache)

    def _join(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return self.fc(torch.cat([self.embed(tokens).to(hidden.dtype), hidden], dim=-1))
