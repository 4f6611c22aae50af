"""A head as EAGLE, SGLang/SpecForge, vLLM and speculators read it: config.json and tensors.

`to_layout` makes a layout of this package's fields (HeadConfig as a dictionary) and state_dict;
published.py reads one. What the readers want:

| | eagle | sglang | vllm | speculators |
|---|---|---|---|---|
| EAGLE-3's layer | midlayer. | midlayer. | layers.0. | layers.0. |
| EAGLE-3's lm_head | written | written | written | written |
| embed_tokens | the target's | the target's | the target's | written |
| EAGLE-1's fc.bias | `bias`, true if unsaid | always there | never | no EAGLE-1 |
| EAGLE-1, reduced vocabulary | no | token map | no | no EAGLE-1 |
| feature layer i (its input) | not stated | i - 1 | i | i |

Draft vocabularies are d2t `[Vd]` int64, an offset (target id = i + d2t[i]), and t2d `[V]` bool.
Output rows are never tied to the embedding. Sources: EAGLE's cnets.py and cnets1.py, SGLang's and
vLLM's llama_eagle.py and llama_eagle3.py, speculators 0.9 (EAGLE-1: 0.3).

Legend: V vocabulary, Vd draft vocabulary, H hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import __version__ as transformers_version

from adaspec_eagle.errors import UserError
from adaspec_eagle.targets import ALIASES, DEFAULT_TARGET, Target

Fields = dict[str, Any]  # HeadConfig's
State = dict[str, Tensor]

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
OURS = "adaspec_eagle"  # our own entry in an exported config: which target's weights

ARCHITECTURES = {
    "eagle": {"eagle1": "LlamaForCausalLM", "eagle3": "LlamaForCausalLM"},
    "sglang": {"eagle1": "LlamaForCausalLMEagle", "eagle3": "LlamaForCausalLMEagle3"},
    "vllm": {"eagle1": "EagleLlamaForCausalLM", "eagle3": "Eagle3LlamaForCausalLM"},
    "speculators": {"eagle1": "EagleSpeculator", "eagle3": "Eagle3Speculator"},
}
FORMATS = tuple(ARCHITECTURES)

# Targets whose features the engine hands to a head; speculators' heads are served by vLLM.
_VLLM = {"llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "minicpm"}
TARGETS = {
    "eagle": {"llama", "mixtral", "qwen2", "qwen3"},
    "sglang": {"llama", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"},
    "vllm": _VLLM,
    "speculators": _VLLM,
}
SIZES = (  # fields with the same name everywhere
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
)
FC_BIAS = {("eagle", "eagle1"), ("sglang", "eagle1"), ("sglang", "eagle3")}
ATTENTION_BIAS = {(name, "eagle1") for name in FORMATS} | {
    ("vllm", "eagle3"),
    ("speculators", "eagle3"),
}


@dataclass
class Layout:
    """What goes into a folder."""

    config: dict[str, Any]
    tensors: State
    token_map: Tensor | None = None  # [Vd] int64


def to_layout(to: str, fields: Fields, state: State, target: Target) -> Layout:
    """A head as another engine reads it; borrowed output rows are written where it has its own.

    Raises UserError, with the reason, for what that engine cannot run.
    """
    if to not in FORMATS:
        raise UserError(f"unknown layout {to!r}; give one of {', '.join(FORMATS)}")
    if reason := cannot_run(to, fields, state, target):
        raise UserError(f"a head cannot be exported as {to!r}: {reason}")
    kind = fields["head"]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    ids = draft_ids(tensors)
    layout = Layout(_config(to, fields, target, dtype), tensors)
    if kind == "eagle1":
        tensors.pop("d2t", None)
        tensors.pop("t2d", None)
        layout.token_map = ids
        if to == "eagle":
            tensors.pop("layers.0.self_attn.o_proj.bias", None)  # zeros: cannot_run has looked
        if to == "sglang" and "fc.bias" not in tensors:
            tensors["fc.bias"] = torch.zeros(fields["hidden_size"], dtype=dtype)
        return layout
    if "lm_head.weight" not in tensors:
        rows = target.output_rows.detach()
        tensors["lm_head.weight"] = _copy(rows if ids is None else rows[ids], dtype)
    if to == "sglang" and fields["fc_bias"]:  # its `bias` gives o_proj one too, unset if not read
        tensors["midlayer.self_attn.o_proj.bias"] = torch.zeros(fields["hidden_size"], dtype=dtype)
    if to == "speculators":
        tensors["embed_tokens.weight"] = _copy(target.embedding.detach(), dtype)
    if to in ("vllm", "speculators"):
        layout.tensors = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}
    return layout


def cannot_run(to: str, fields: Fields, state: State, target: Target) -> str | None:
    """Why the engine could not run the head as it is; None if it can."""
    kind, layers = fields["head"], fields["feature_layers"]
    if kind not in ARCHITECTURES[to]:
        return f"there is no layout for {kind!r} heads, only for {', '.join(ARCHITECTURES[to])}"
    if (to, kind) == ("speculators", "eagle1"):
        return "speculators 0.9 has no EAGLE-1 heads (0.3 had); take eagle, sglang or vllm"
    if target.output_bias is not None:
        return (
            "its target's output layer has a bias, which the head borrows; engines add none to a "
            "head's logits, so that it would draft other tokens"
        )
    if target.config.model_type not in TARGETS[to]:
        known = ", ".join(sorted(TARGETS[to]))
        return f"it has no EAGLE for {target.config.model_type!r} targets, only for {known}"
    if fields["train_output"] and kind == "eagle1":
        return "it has output rows of its own; engines give EAGLE-1 heads the target's"
    if kind == "eagle1" and fields["draft_vocab_size"] < fields["vocab_size"] and to != "sglang":
        return "EAGLE-1 heads have the target's whole vocabulary there; sglang takes a token map"
    if fields["fc_bias"] and (to, kind) not in FC_BIAS:
        return "its fc has a bias, there it has none"
    if fields["attention_bias"] and (to, kind) not in ATTENTION_BIAS:
        return "its attention has biases, there it has none"
    if fields["attention_bias"] and to == "eagle" and state[o_bias(kind)].any():
        return "its o_proj has a bias; there only q, k and v have one (qkv_bias)"
    if fields["norm_before_residual"] and to in ("eagle", "sglang"):
        return "its residual is the normed hidden state (norm_before_residual)"
    if to == "eagle" and fields["rope_scaling"] not in (None, {}):
        return f"it has rope_scaling {fields['rope_scaling']}, of which EAGLE reads other kinds"
    size = fields["num_attention_heads"] * fields["head_dim"]
    if (to, kind) == ("eagle", "eagle1") and size != fields["hidden_size"]:
        return f"its attention is {size} wide, there always as wide as the hidden size"
    return _cannot_capture(to, kind, layers, target.num_layers)


def _cannot_capture(to: str, kind: str, layers: list[int], num_layers: int) -> str | None:
    """Why the engine could not hand over these features; None if it can."""
    if kind == "eagle1":
        return None if layers == [num_layers] else f"EAGLE-1 reads layer {num_layers}, not {layers}"
    if to == "eagle" and layers != default_layers(num_layers):
        return f"it reads layers {layers}, there always {default_layers(num_layers)}"
    if len(layers) != 3 or sorted(set(layers)) != layers:
        return f"it reads layers {layers}; engines capture three, each once, in ascending order"
    if layers[0] < 1 or layers[-1] >= num_layers:
        return f"it reads layers {layers}; engines capture the inputs of 1 to {num_layers - 1}"
    return None


def default_layers(num_layers: int) -> list[int]:
    """What published EAGLE-3 heads read: the inputs of layers 2, L / 2 and L - 3."""
    return [2, num_layers // 2, num_layers - 3]


def hub_id(name: str) -> str:
    """What an engine calls a target of ours: a hub id for an alias, else the name itself."""
    if name == DEFAULT_TARGET:
        return ALIASES["smollm2-135m-hub"]
    return ALIASES.get(name, name)


def _config(to: str, fields: Fields, target: Target, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a layout."""
    kind, reduced = fields["head"], fields["draft_vocab_size"] < fields["vocab_size"]
    ours = {"target": fields["target"], "target_fingerprint": fields["target_fingerprint"]}
    layer = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,  # a reader that ties would lose lm_head
        "rope_theta": fields["rope_theta"],
        "rope_scaling": fields["rope_scaling"],
        "bos_token_id": target.config.bos_token_id,
        "eos_token_id": target.config.eos_token_id,
        "pad_token_id": target.pad_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": transformers_version,
    }
    layer |= {name: fields[name] for name in SIZES}
    biases = {"attention_bias": fields["attention_bias"], "mlp_bias": False}
    config: dict[str, Any] = {"architectures": [ARCHITECTURES[to][kind]], OURS: ours}
    if to == "speculators":
        return config | _speculators_config(fields, target) | {
            "transformer_layer_config": layer | biases
        }  # fmt: skip
    if to == "eagle":
        biases = {"bias": fields["fc_bias"], "qkv_bias": fields["attention_bias"]}
    elif to == "sglang":  # `bias` is fc's in EAGLE-3 only; elsewhere it is the attention's
        biases["bias"] = fields["fc_bias"] and kind == "eagle3"
    config |= layer | biases
    if kind == "eagle1":
        return config | ({"hot_vocab_size": fields["draft_vocab_size"]} if reduced else {})
    config["draft_vocab_size"] = fields["draft_vocab_size"]
    layers = fields["feature_layers"]
    if to == "sglang":  # there the output of layer i is i, which is the input of layer i + 1
        nested = {"use_aux_hidden_state": True, LAYER_IDS: [i - 1 for i in layers]}
        config["eagle_config"] = nested
    elif to == "vllm":
        config |= {"eagle_config": {"use_aux_hidden_state": True}, LAYER_IDS: layers}
        config |= {"norm_before_residual": fields["norm_before_residual"]}
    return config


def _speculators_config(fields: Fields, target: Target) -> dict[str, Any]:
    """The entries that only speculators has."""
    model = target.model
    verifier = {
        "name_or_path": hub_id(fields["target"]),
        "architectures": model.config.architectures or [type(model).__name__],
    }
    return {
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "default_proposal_method": "greedy",
            "verifier": verifier,
        },
        "draft_vocab_size": fields["draft_vocab_size"],
        "norm_before_residual": fields["norm_before_residual"],
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "target_hidden_size": None,
        LAYER_IDS: fields["feature_layers"],
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
    }


def draft_ids(state: State) -> Tensor | None:
    """Target ids `[Vd]` of d2t; None where there is none."""
    d2t = state.get("d2t")
    return None if d2t is None else torch.arange(len(d2t)) + d2t.cpu()


def o_bias(kind: str) -> str:
    """The name of o_proj's bias."""
    return f"{'midlayer' if kind == 'eagle3' else 'layers.0'}.self_attn.o_proj.bias"


def _copy(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the target as a head's own tensor."""
    return rows.to("cpu", dtype, copy=True).contiguous()
