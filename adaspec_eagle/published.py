"""Heads that others published, in any layout of formats.py -> this package's fields and tensors.

Whatever a reader elsewhere borrows from the target is checked against the target and dropped, so
that a random embedding, a wrong output layer or a map of ids instead of offsets does not pass.

Legend: V vocabulary, Vd draft vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import LlamaConfig

from adaspec_eagle.errors import UserError, first_line
from adaspec_eagle.formats import (
    LAYER_IDS,
    OURS,
    SIZES,
    Fields,
    State,
    default_layers,
    draft_ids,
    o_bias,
)
from adaspec_eagle.storage import TOKEN_MAP, read_json, read_pickled, read_weights
from adaspec_eagle.targets import Target

ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
OBJECTS = (  # fields of a config that hold fields, where they are given
    ("eagle_config",),
    ("transformer_layer_config",),
    (OURS,),
    ("speculators_config",),
    ("speculators_config", "verifier"),
)
NEWER = ("norm_before_fc", "fc_norm", "norm_output")  # EAGLE-3.1 and gpt-oss heads


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
    _refuse_types(folder, state)
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
        "attention_bias": o_bias(kind) in state,
        "norm_before_residual": bool(config.get("norm_before_residual")),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }
    return fields, state


def check_fields(path: Path, config: Fields) -> None:
    """Raise UserError for fields of a foreign config that are not of the type that they have."""
    for keys in OBJECTS:
        found: Any = config
        for key in keys:
            found = found.get(key) or {}
        if not isinstance(found, dict):
            raise UserError(f"{path}: {'.'.join(keys)} must be an object, not {found!r}")
    nested = config.get("eagle_config") or {}
    lists = [("architectures", config, str), (LAYER_IDS, config, int), (LAYER_IDS, nested, int)]
    for key, holder, kind in lists:
        found = holder.get(key) or []
        if not isinstance(found, list) or any(type(item) is not kind for item in found):
            raise UserError(f"{path}: {key} must be a list of {kind.__name__}, not {found!r}")


def detect(folder: Path, config: dict[str, Any], names: Any) -> tuple[str, str]:
    """(layout, head) of a foreign folder; UserError says what was looked for and what was found."""
    check_fields(folder / "config.json", config)
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


def _refuse_types(folder: Path, state: State) -> None:
    """Raise UserError for weights that are not floats, and a map that is not of whole numbers."""
    for name, tensor in state.items():
        whole = not tensor.is_floating_point()
        if whole != (name in ("d2t", "t2d")):
            raise UserError(
                f"{folder}: {name} is of {tensor.dtype}, which no weight of a head has (quantised "
                "heads are not read)"
                if whole
                else f"{folder}: {name} is of {tensor.dtype}, but holds whole numbers"
            )


def _refuse_missing(folder: Path, found: str, kind: str, config: Fields, state: State) -> None:
    """Raise UserError for tensors that the layout's own reader would make up at random."""
    missing = {
        "fc.bias": found == "eagle" and kind == "eagle1" and config.get("bias") is True,
        "lm_head.weight": found in ("eagle", "vllm") and kind == "eagle3",
        "d2t": "t2d" in state,
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
    for name in ("fc.bias", o_bias(kind)):
        if name in state and not state[name].any():
            del state[name]
    if o_bias(kind).replace("o_proj", "q_proj") in state:
        weight = state["fc.weight"]
        state.setdefault(o_bias(kind), torch.zeros(len(weight), dtype=weight.dtype))


def _drop_embedding(folder: Path, state: State, target: Target) -> None:
    """Drop the embedding if it is the target's; raise UserError if it is not."""
    rows = state.pop("embed_tokens.weight", None)
    if rows is not None and not _close(rows, target.embedding):
        raise UserError(
            f"{folder}: embed_tokens.weight is not the embedding of target {target.name!r}: the "
            "head is another target's, or was written with random rows"
        )


def _read_vocabulary(
    folder: Path, kind: str, state: State, config: Fields, vocab: int
) -> Tensor | None:
    """Target ids `[Vd]` of a reduced draft vocabulary, with d2t and t2d put right in `state`."""
    if kind == "eagle1" and (folder / TOKEN_MAP).is_file():
        hot = _token_map(folder / TOKEN_MAP)
        state["d2t"] = hot - torch.arange(len(hot))
    ids, given = draft_ids(state), config.get("draft_vocab_size")
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


def _token_map(path: Path) -> Tensor:
    """Target ids `[Vd]` of EAGLE-1's map; UserError if the file holds something else."""
    found = read_pickled(path)
    try:
        ids = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds no list of token ids: {first_line(error)}") from error
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(f"{path} holds no list of token ids, but {ids.dtype} of {ids.dim()} axes")
    return ids.long()


def _own_output(folder: Path, kind: str, state: State, ids: Tensor | None, target: Target) -> bool:
    """Whether a head has output rows of its own; the target's are dropped from `state`."""
    rows = state.get("lm_head.weight")
    if rows is None:
        return False
    theirs = target.output_rows if ids is None else target.output_rows[ids.to(target.device)]
    same = _close if kind == "eagle1" else _equal  # EAGLE-1 has no rows of its own
    if same(rows, theirs):
        del state["lm_head.weight"]
        return False
    if kind == "eagle1":
        raise UserError(f"{folder}: lm_head.weight is not the output layer of {target.name!r}")
    return True


def _feature_layers(
    path: Path, found: str, kind: str, config: Fields, num_layers: int
) -> list[int]:
    """hidden_states indices: the input of layer i is i; ids in SGLang's place name outputs."""
    if kind == "eagle1":
        return [num_layers]
    nested = (config.get("eagle_config") or {}).get(LAYER_IDS)
    shift = 1 if found == "sglang" and not config.get(LAYER_IDS) else 0
    layers = [i + shift for i in config.get(LAYER_IDS) or nested or []]
    if not layers:
        return default_layers(num_layers)
    if min(layers) < 0 or max(layers) >= num_layers:
        raise UserError(
            f"{path}: the head reads the inputs of layers {layers}, of which the target has "
            f"{num_layers}; load the target that the head was trained for"
        )
    return layers


def _equal(rows: Tensor, theirs: Tensor) -> bool:
    """Whether they are the same rows, in the coarser of the two dtypes."""
    if rows.shape != theirs.shape:
        return False
    coarser = max(rows.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(rows.to(coarser), theirs.detach().cpu().to(coarser))


def _close(rows: Tensor, theirs: Tensor) -> bool:
    """Whether they are the same rows but for rounding, to float16 or bfloat16 or both."""
    if rows.shape != theirs.shape:
        return False
    return torch.allclose(rows.float(), theirs.detach().cpu().float(), rtol=0.01, atol=1e-6)
