"""A small causal LM of the target's tokenizer as the draft: AdaSPEC's own form.

Hu et al., "AdaSPEC: Selective Knowledge Distillation for Efficient Speculative Decoders", arXiv
2510.19779. `lm:NAME` is a model by alias, hub id or folder; `lm:layers=4` (or `lm`) is the target's
embedding, first layers, final norm and output rows, copied. All its weights are trained and saved,
but for a bias of the output layer, which stays as it was.

It reads text, and no features. Index i, which pairs feature i with token i + 1, is here token i + 1
at position i + 1, behind token 0, which no pair has and which `prefill` takes in. A later step of
the unroll sees the tokens that step 0 saw one index further on, so that its states are those, and
training on more steps than one would count the same losses again.
"""

import copy
import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Cache

from adaspec_eagle.head import DraftHead, HeadConfig, Target, Unrolled, UserError

LAYERS = "layers="


class Head(DraftHead):
    """`lm` is transformers' own decoder; its output rows are its embedding's where they are tied.

    A draft vocabulary that is a part of the target's has output rows of its own in any case.
    """

    default_unroll = 1
    default_draft_vocab = None
    leading = 1

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        assert config.lm is not None
        fields = dict(config.lm["model"])
        model = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.lm: Any = AutoModel.from_config(model, dtype=torch.float32)
        self.context = getattr(model, "max_position_embeddings", config.max_position_embeddings)
        self.cached_layers = model.num_hidden_layers
        self.decoder_config = model.get_text_config()
        rows, width = config.draft_vocab_size, model.hidden_size
        tied = config.lm["tied"] and rows == config.vocab_size
        self.lm_head = None if tied else nn.Linear(width, rows, bias=False)
        bias = torch.zeros(rows) if config.lm["bias"] else None
        self.register_buffer("lm_bias", bias)

    @classmethod
    def completed(cls, config: HeadConfig, target: Target) -> HeadConfig:
        """With the model's own config, its vocabulary that of the target."""
        if config.train_output:
            raise UserError("--train-output: a draft LM has output rows of its own anyway")
        model = named_model(config, target)
        check_tokens(config, model, target)
        own = model is not target
        fields = json.loads(model.config.to_json_string()) if own else first_layers(config, target)
        known = {
            "model": fields | {"vocab_size": target.vocab_size},
            "tied": model.output_rows.data_ptr() == model.embedding.data_ptr(),
            "bias": model.output_bias is not None,
        }
        return replace(config, lm=known)

    @staticmethod
    def feature_layers(num_layers: int) -> list[int]:
        """None."""
        return []

    @torch.no_grad()
    def start_from(self, target: Target) -> None:
        """The model's weights, or those of the target's first layers."""
        model = named_model(self.config, target)
        given = dict(model.model.base_model.named_parameters())
        embedding = self.lm.get_input_embeddings().weight
        for name, weight in self.lm.named_parameters():
            found = given.get(name)
            if found is None or (found.shape != weight.shape and weight is not embedding):
                raise UserError(f"{self.config.head}: {model.name} has no weights for {name}")
            rows = min(
                len(weight), len(found)
            )  # of an embedding padded otherwise than the target's
            weight.zero_()
            weight[:rows] = found[:rows]
        ids = slice(0, self.config.vocab_size) if self.draft_ids is None else self.draft_ids
        if self.lm_head is not None:
            self.lm_head.weight.copy_(model.output_rows[ids])
        if model.output_bias is not None:
            self.lm_bias.copy_(model.output_bias[ids])

    def fuse(self, features: Tensor) -> Tensor:
        """Zeros: an LM reads the text alone."""
        return features.new_zeros(*features.shape[:2], self.lm.config.hidden_size)

    def prefill(
        self, features: Tensor, tokens: Tensor, cache: Cache | None, window: Tensor | None = None
    ) -> Tensor:
        """The whole text, its first token included."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = self(features, tokens, positions, None, cache, 0)[:, 1:]
        return hidden if window is None else hidden.take_along_dim(window[..., None], 1)

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | Unrolled | None,
        cache: Cache | None,
        step: int,
    ) -> Tensor:
        """The LM's last hidden states at these tokens, final norm included."""
        if isinstance(mask, Unrolled):
            return hidden.roll(-1, dims=1)  # the step before, one index further on
        places = positions.clamp(max=self.context - 1)  # as the target's are
        return Target.run_decoder(self.lm, tokens, places, mask, cache).last_hidden_state

    @property
    def output_weight(self) -> Tensor:
        """The LM's own output rows `[Vd, H]`."""
        tied = self.lm_head is None
        return self.lm.get_input_embeddings().weight if tied else self.lm_head.weight

    @property
    def logit_bias(self) -> Tensor | None:
        """The LM's own."""
        return self.lm_bias

    def _apply(self, fn, recurse=True):
        """Casting leaves rotary frequencies as they are (as in head.Rotary)."""
        exact = {name: t for name, t in self.lm.named_buffers() if name.endswith("inv_freq")}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            owner, _, kind = name.rpartition(".")
            module = self.lm.get_submodule(owner)
            setattr(module, kind, buffer.to(getattr(module, kind).device))
        return self


def named_model(config: HeadConfig, target: Target) -> Target:
    """The model that `lm:NAME` names, loaded as a target is; the target itself for its layers."""
    name = config.head.partition(":")[2]
    if not name or name.startswith(LAYERS):
        return target
    return Target.load(name, dtype=target.dtype, device=target.device)


def first_layers(config: HeadConfig, target: Target) -> dict[str, Any]:
    """The target's own config (transformers'), with its first layers only."""
    wanted = config.head.partition(LAYERS)[2] or "4"
    if not wanted.isdigit() or not 0 < int(wanted) <= target.num_layers:
        raise UserError(f"{config.head}: {target.name} has layers from 1 to {target.num_layers}")
    model = copy.deepcopy(target.config)
    model.num_hidden_layers = int(wanted)
    fields = json.loads(model.to_json_string())
    whole = {name: value for name, value in fields.items() if isinstance(value, list)}
    lists = {n: v[: int(wanted)] for n, v in whole.items() if len(v) == target.num_layers}
    return fields | lists  # lists with an entry for each layer


def check_tokens(config: HeadConfig, model: Target, target: Target) -> None:
    """Raise UserError if the model's ids do not mean what the target's mean."""
    if model.vocab_size < config.draft_vocab_size:
        raise UserError(
            f"--head {config.head}: it has {model.vocab_size} output rows, {target.name} has "
            f"{target.vocab_size}; give --draft-vocab {model.vocab_size} or less"
        )
    if target.tokenizer is None or model is target:
        return
    ours, theirs = target.tokenizer.get_vocab(), model.tokenizer.get_vocab()
    other = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    if other:
        raise UserError(
            f"--head {config.head}: its tokenizer is not that of {target.name}: {len(other)} "
            f"tokens differ, as {other[0]!r} (id {theirs.get(other[0])} there, "
            f"{ours.get(other[0])} here); choose a model of the same tokenizer, or lm:layers=4"
        )
