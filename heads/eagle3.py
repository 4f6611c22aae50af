"""EAGLE-3 head: fused low, middle and high features, one layer widened to [embedding, hidden].

Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time
Test", arXiv 2503.01840. Tensor names are those of the published heads.
"""

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

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


class WideLayer(nn.Module):
    """A Llama layer whose attention reads [normed embedding, normed hidden], 2 H wide."""

    def __init__(self, config: LlamaConfig, norm_before_residual: bool) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        size, bias = config.hidden_size, config.attention_bias
        self.self_attn = LlamaAttention(config, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            setattr(self.self_attn, name, nn.Linear(2 * size, narrow.out_features, bias=bias))
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(size, config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(size, config.rms_norm_eps)

    def widen(self, embedding: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """embedding, hidden `[B, N, H]` -> what attention reads `[B, N, 2 H]`, the residual."""
        normed = self.hidden_norm(hidden)
        wide = torch.cat([self.input_layernorm(embedding), normed], dim=-1)
        return wide, normed if self.norm_before_residual else hidden

    def forward(self, embedding: Tensor, hidden: Tensor, **attention) -> Tensor:
        """embedding, hidden `[B, N, H]` -> `[B, N, H]`."""
        wide, residual = self.widen(embedding, hidden)
        hidden = residual + self.self_attn(wide, **attention)[0]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Head(DraftHead):
    """EAGLE-3: `fc` fuses three features; `norm` and the output rows give draft logits."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        layer = config.layer_config()
        inputs = len(config.feature_layers) * config.hidden_size
        self.fc = nn.Linear(inputs, config.hidden_size, bias=config.fc_bias)
        self.midlayer = WideLayer(layer, config.norm_before_residual)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(layer)

    @staticmethod
    def feature_layers(num_layers: int) -> list[int]:
        """The inputs of layers 2, L / 2 and L - 3, as in the published heads."""
        return [min(2, num_layers), num_layers // 2, max(num_layers - 3, 0)]

    def start_from(self, target: Target) -> None:
        """The target's last layer and final norm, behind the highest of the features."""
        copy_layer(self.midlayer, target, {"hidden_norm": "input_layernorm", "input_layernorm": ""})
        pass_through(self.fc)
        norm = getattr(target.model.base_model, "norm", None)
        if isinstance(norm, LlamaRMSNorm):
            self.norm.load_state_dict(norm.state_dict())

    def fuse(self, features: Tensor) -> Tensor:
        """`[B, N, 3 H]` -> `[B, N, H]`."""
        return self.fc(features)

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | Unrolled | None,
        cache: Cache | None,
        step: int,
    ) -> Tensor:
        """One layer; its output is fed back without the final norm."""
        return self.midlayer(
            self.embed(tokens).to(hidden.dtype),
            hidden,
            position_embeddings=self.rotary(hidden, positions),
            attention_mask=mask,
            past_key_values=cache,
        )

    def remember(self, hidden: Tensor, tokens: Tensor, positions: Tensor, cache: Cache) -> None:
        """Keys and values alone: two of the layer's seven products."""
        wide, _ = self.midlayer.widen(self.embed(tokens).to(hidden.dtype), hidden)
        remember_text(self.midlayer.self_attn, wide, self.rotary(hidden, positions), cache)

    def readout(self, hidden: Tensor) -> Tensor:
        """The final norm."""
        return self.norm(hidden)
