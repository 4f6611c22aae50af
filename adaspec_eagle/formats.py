"""Layouts of draft heads elsewhere: EAGLE, SGLang/SpecForge, vLLM and speculators, both ways.

A layout is a config.json and tensor names. `to_layout` makes one of this package's fields
(HeadConfig as a dictionary) and state_dict, `from_layout` reads one back. What the readers want:

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
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import LlamaConfig
from transformers import __version__ as transformers_version

from adaspec_eagle.errors import UserError
from adaspec_eagle.storage import read_json, read_pickled, read_weights
from adaspec_eagle.targets import ALIASES, DEFAULT_TARGET, Target

Fields = dict[str, Any]  # HeadConfig's
State = dict[str, Tensor]

TOKEN_MAP = "hot_token_id.pt"  # target ids [Vd]; SGLang's --speculative-token-map for EAGLE-1
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
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
NEWER = ("norm_before_fc", "fc_norm", "norm_output")  # EAGLE-3.1 and gpt-oss heads


@dataclass
class Layout:
    """What goes into a folder."""

    config: dict[str, Any]
    tensors: State
    token_map: Tensor | None = None  # [Vd] int64


# ---- out -----------------------------------------------------------------------------------------


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
    ids = _draft_ids(tensors)
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
        return "speculators trains and runs no EAGLE-1 heads since 0.4; take eagle, sglang or vllm"
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
    if fields["attention_bias"] and to == "eagle" and state[_o_bias(kind)].any():
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
        shifted = [i - 1 for i in layers]
        config["eagle_config"] = {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": shifted,
        }
    elif to == "vllm":
        config |= {"eagle_config": {"use_aux_hidden_state": True}}
        config |= {"eagle_aux_hidden_state_layer_ids": layers}
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
        "eagle_aux_hidden_state_layer_ids": fields["feature_layers"],
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
    }


# ---- in ------------------------------------------------------------------------------------------


def is_ours(config: dict[str, Any]) -> bool:
    """Whether a config.json is of this package's own layout."""
    return "head" in config and "target_fingerprint" in config


def from_layout(
    folder: Path, target: Target | None, wanted: str | None = None
) -> tuple[Fields, State]:
    """(HeadConfig's fields, state_dict) of a head in another layout, found by its config.

    wanted: one of FORMATS, if the folder must hold that one. Raises UserError for an unknown or
    another layout, weights or a config that cannot be read, no target or one that does not fit, and
    heads that are more than this package computes. Names and shapes are checked by who loads it.
    """
    config, path = read_json(folder / "config.json"), folder / "config.json"
    tensors = read_weights(folder)
    found, kind = detect(folder, config, tensors)
    if wanted not in (None, found):
        raise UserError(f"{folder} holds a head in layout {found!r}, not {wanted!r}")
    if target is None:
        raise UserError(
            f"{folder} holds a head in layout {found!r}, which leaves out what the target has: "
            "load it with its target, load_head(folder, target)"
        )
    settings = config.get("transformer_layer_config", {}) if found == "speculators" else config
    llama = _llama(path, settings)
    _refuse_unknown(path, config, llama, target)
    state = _renamed(tensors, kind)
    _refuse_missing(folder, found, kind, config, state)
    _settle_biases(state, kind)
    _drop_embedding(folder, state, target)
    ids = _read_vocabulary(folder, kind, state, config, llama.vocab_size)
    own_output = _own_output(folder, kind, state, ids, target)
    rope = llama.to_dict()["rope_parameters"]
    theta = rope.pop("rope_theta")
    ours = config.get(OURS) or {}
    verifier = (config.get("speculators_config") or {}).get("verifier") or {}
    fields = {name: getattr(llama, name) for name in SIZES} | {
        "head": kind,
        "target": ours.get("target") or verifier.get("name_or_path") or target.name,
        "target_fingerprint": ours.get("target_fingerprint") or target.fingerprint,
        "draft_vocab_size": llama.vocab_size if ids is None else len(ids),
        "rope_theta": theta,
        "feature_layers": _feature_layers(path, found, kind, config, target.num_layers),
        "train_output": own_output,
        "fc_bias": "fc.bias" in state,
        "attention_bias": _o_bias(kind) in state,
        "norm_before_residual": bool(config.get("norm_before_residual")),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }
    return fields, state


def detect(folder: Path, config: dict[str, Any], names: Any) -> tuple[str, str]:
    """(layout, head) of a foreign folder; UserError says what was looked for and what was found."""
    kind = "eagle3" if any(n.endswith("hidden_norm.weight") for n in names) else "eagle1"
    speculators = {"eagle": "eagle1", "eagle3": "eagle3"}
    given = config.get("speculators_model_type")
    if given in speculators:
        return "speculators", speculators[given]
    architectures = config.get("architectures") or []
    if given is None and any(n in names for n in ("fc.weight", "model.fc.weight")):
        for name in architectures:
            if name.startswith("Eagle"):
                return "vllm", kind
            if name.endswith(("ForCausalLMEagle", "ForCausalLMEagle3")):
                return "sglang", kind
            if name.endswith("ForCausalLM"):
                return "eagle", kind
    some = sorted(names)[:6] + (["..."] if len(names) > 6 else [])
    raise UserError(
        f"{folder / 'config.json'} is of no layout that is known here. Looked for `head` and "
        "`target_fingerprint` (this package), speculators_model_type eagle or eagle3, or fc.weight "
        "with architectures ...ForCausalLMEagle, ...ForCausalLMEagle3 (SGLang), Eagle... (vLLM), "
        f"...ForCausalLM (EAGLE). Found: keys {sorted(config)[:8]}, speculators_model_type "
        f"{given!r}, architectures {architectures}, tensors {some}"
    )


def _llama(path: Path, settings: dict[str, Any]) -> LlamaConfig:
    """The sizes that a config gives, with transformers' defaults for what it leaves out."""
    try:
        known = {name: value for name, value in settings.items() if name != "model_type"}
        return LlamaConfig(**known)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not the config of a Llama layer: {error}") from error


def _refuse_unknown(path: Path, config: Fields, llama: LlamaConfig, target: Target) -> None:
    """Raise UserError for what would load and compute something else, or does not fit."""
    sizes = (llama.hidden_size, config.get("target_hidden_size") or llama.hidden_size)
    if sizes != (target.hidden_size, target.hidden_size) or llama.vocab_size != target.vocab_size:
        raise UserError(
            f"{path}: hidden size {sizes[0]} (features {sizes[1]}) and vocabulary "
            f"{llama.vocab_size} do not fit target {target.name!r} with {target.hidden_size} and "
            f"{target.vocab_size}; load the target that the head was trained for"
        )
    newer = [name for name in NEWER if config.get(name)]
    use_aux = (config.get("eagle_config") or {}).get("use_aux_hidden_state", True)
    rope = llama.to_dict()["rope_parameters"]["rope_type"]
    reasons = {
        f"{', '.join(newer)}: norms that this package's EAGLE-3 does not have": bool(newer),
        f"{llama.num_hidden_layers} layers, not one": llama.num_hidden_layers != 1,
        f"hidden_act {llama.hidden_act!r}, not silu": llama.hidden_act != "silu",
        f"rope_type {rope!r}, not one of {sorted(ROPE_TYPES)}": rope not in ROPE_TYPES,
        f"logit_scale {config.get('logit_scale')}": config.get("logit_scale", 1.0) != 1.0,
        "eagle_config.use_aux_hidden_state is false": not use_aux,
        f"target {target.name!r} has an output bias": target.output_bias is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{path}: the head cannot be computed here: {reason}")


def _renamed(tensors: State, kind: str) -> State:
    """Tensors under this package's names."""
    renamed: State = {}
    for name, tensor in tensors.items():
        ours = name.removeprefix("model.")
        for theirs, our in (("fusion_fc.", "fc."), ("transformer.", "layers.0.")):
            ours = our + ours.removeprefix(theirs) if ours.startswith(theirs) else ours
        if kind == "eagle3" and ours.startswith("layers.0."):
            ours = "midlayer." + ours.removeprefix("layers.0.")
        ours = "d2t" if ours == "draft_id_to_target_id" else ours
        if not ours.endswith("rotary_emb.inv_freq"):
            renamed[ours] = tensor
    return renamed


def _refuse_missing(folder: Path, found: str, kind: str, config: Fields, state: State) -> None:
    """Raise UserError for tensors that the layout's own reader would make up at random."""
    missing = {
        "fc.bias": found == "eagle" and kind == "eagle1" and config.get("bias") is True,
        "lm_head.weight": found in ("eagle", "vllm") and kind == "eagle3",
        "d2t": found != "speculators" and "t2d" in state,
    }
    for name, wanted in missing.items():
        if wanted and name not in state:
            raise UserError(f"{folder} holds no whole {kind} head in layout {found!r}: no {name}")
    if "hot_vocab_size" in config and not (folder / TOKEN_MAP).is_file():
        raise UserError(f"{folder} has hot_vocab_size in its config, but no {TOKEN_MAP}")


def _settle_biases(state: State, kind: str) -> None:
    """Drop zero biases, which some readers want where a head has none; give o_proj its own.

    This package's attention has all four biases or none; EAGLE's qkv_bias leaves out o_proj's.
    """
    for name in ("fc.bias", _o_bias(kind)):
        if name in state and not state[name].any():
            del state[name]
    if _o_bias(kind).replace("o_proj", "q_proj") in state:
        weight = state["fc.weight"]
        state.setdefault(_o_bias(kind), torch.zeros(len(weight), dtype=weight.dtype))


def _drop_embedding(folder: Path, state: State, target: Target) -> None:
    """Drop the embedding if it is the target's; raise UserError if it is not."""
    rows = state.pop("embed_tokens.weight", None)
    if rows is not None and not _equal(rows, target.embedding):
        raise UserError(
            f"{folder}: embed_tokens.weight is not the embedding of target {target.name!r}: the "
            "head is another target's, or was written with random rows"
        )


def _read_vocabulary(
    folder: Path, kind: str, state: State, config: Fields, vocab: int
) -> Tensor | None:
    """Target ids `[Vd]` of a reduced draft vocabulary, with d2t and t2d put right in `state`."""
    if kind == "eagle1" and (folder / TOKEN_MAP).is_file():
        hot = torch.as_tensor(read_pickled(folder / TOKEN_MAP)).long()
        state["d2t"] = hot - torch.arange(len(hot))
    ids, given = _draft_ids(state), config.get("draft_vocab_size")
    if ids is None:
        state.pop("t2d", None)
        return None
    if given not in (None, len(ids)):
        raise UserError(f"{folder}: draft_vocab_size is {given}, but d2t has {len(ids)} entries")
    inside = (ids >= 0) & (ids < vocab)
    if ids.dim() != 1 or not inside.all() or len(ids.unique()) < len(ids):
        raise UserError(
            f"{folder}: d2t does not give {len(ids)} different ids below {vocab}; it holds offsets "
            "(target id = i + d2t[i]), not ids"
        )
    marked = torch.zeros(vocab, dtype=torch.bool)
    marked[ids] = True
    if "t2d" in state and not torch.equal(state["t2d"].bool(), marked):
        raise UserError(f"{folder}: t2d does not mark the ids that d2t gives (i + d2t[i])")
    if len(ids) == vocab:
        if not torch.equal(ids, torch.arange(vocab)):
            raise UserError(f"{folder}: d2t reorders the whole vocabulary, which is not supported")
        del state["d2t"]
        state.pop("t2d", None)
        return None
    state["d2t"], state["t2d"] = state["d2t"].long(), marked
    return ids


def _own_output(folder: Path, kind: str, state: State, ids: Tensor | None, target: Target) -> bool:
    """Whether a head has output rows of its own; the target's are dropped from `state`."""
    rows = state.get("lm_head.weight")
    if rows is None:
        return False
    theirs = target.output_rows if ids is None else target.output_rows[ids.to(target.device)]
    if _equal(rows, theirs):
        del state["lm_head.weight"]
        return False
    if kind == "eagle1":
        raise UserError(f"{folder}: lm_head.weight is not the output layer of {target.name!r}")
    return True


def _feature_layers(
    path: Path, found: str, kind: str, config: Fields, num_layers: int
) -> list[int]:
    """hidden_states indices: the input of layer i is i; SGLang's ids name outputs."""
    if kind == "eagle1":
        return [num_layers]
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    layers = config.get("eagle_aux_hidden_state_layer_ids") or nested
    if not layers:
        return default_layers(num_layers)
    layers = [i + 1 for i in layers] if found == "sglang" else list(layers)
    if min(layers) < 0 or max(layers) >= num_layers:
        raise UserError(
            f"{path}: the head reads the inputs of layers {layers}, of which the target has "
            f"{num_layers}; load the target that the head was trained for"
        )
    return layers


# ---- both ----------------------------------------------------------------------------------------


def _draft_ids(state: State) -> Tensor | None:
    """Target ids `[Vd]` of d2t; None where there is none."""
    d2t = state.get("d2t")
    return None if d2t is None else torch.arange(len(d2t)) + d2t.cpu()


def _layer(kind: str) -> str:
    return "midlayer" if kind == "eagle3" else "layers.0"


def _o_bias(kind: str) -> str:
    return f"{_layer(kind)}.self_attn.o_proj.bias"


def _copy(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the target as a head's own tensor."""
    return rows.to("cpu", dtype, copy=True).contiguous()


def _equal(rows: Tensor, theirs: Tensor) -> bool:
    """Whether they are the same rows, in the coarser of the two dtypes."""
    if rows.shape != theirs.shape:
        return False
    coarser = min(rows.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(rows.to(coarser), theirs.detach().cpu().to(coarser))
