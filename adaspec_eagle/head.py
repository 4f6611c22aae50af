"""DraftHead: the contract of a plug-in, its config, load and save.

Legend: B rows, N tokens, H hidden, F number of feature layers, V vocabulary, Vd draft vocabulary.
"""

import importlib
import pkgutil
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from adaspec_eagle.attention import GROUPED, Unrolled, register
from adaspec_eagle.card import model_card, publishable, target_licence
from adaspec_eagle.errors import UserError
from adaspec_eagle.packed import Projection
from adaspec_eagle.plugins import check_code, module_of, remember_code
from adaspec_eagle.published import from_layout, is_ours
from adaspec_eagle.storage import (
    check_push,
    local_folder,
    push_folder,
    read_json,
    read_weights,
    weights_file,
    write_head,
)
from adaspec_eagle.targets import Target


@dataclass
class HeadConfig:
    """Everything that a head's shape depends on; `config.json` of a head's folder."""

    head: str  # file name in heads/ (and what it is told: `lm:NAME`), a dotted module, or a path.py
    target: str
    target_fingerprint: str
    vocab_size: int  # V, of the target
    draft_vocab_size: int  # Vd; equal to vocab_size if not reduced
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    feature_layers: list[int]  # hidden_states indices: i is the input of layer i
    output_bias: bool = False  # whether the target's output layer has a bias, which is borrowed
    train_output: bool = False  # output rows of the head's own instead of the target's
    lm: dict[str, Any] | None = None  # what heads/lm.py must know of its model
    steps: int = 4  # depths, of a head with weights for each (Medusa)
    # What published heads may have; heads that are trained here have none of it.
    fc_bias: bool = False
    attention_bias: bool = False  # of the q, k, v and o projections
    norm_before_residual: bool = False  # EAGLE-3: the residual is the normed hidden state
    rope_scaling: dict[str, Any] | None = None  # as in transformers' rope_parameters

    @classmethod
    def for_target(cls, head: str, target: Target, draft_vocab_size: int, **more: Any):
        """The sizes that fit a target; Llama-style layers whatever the target's are."""
        config = target.config
        rope = getattr(config, "rope_parameters", None) or {}
        kind = head_class(head)
        made = cls(
            head=head,
            target=target.name,
            target_fingerprint=target.fingerprint,
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size,
            hidden_size=target.hidden_size,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * target.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=target.key_heads,
            head_dim=target.head_size,
            rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", 10000.0),
            max_position_embeddings=target.context,
            feature_layers=kind.feature_layers(target.num_layers),
            output_bias=target.output_bias is not None,
            **more,
        )
        return kind.completed(made, target)

    def layer_config(self) -> LlamaConfig:
        """The config of one Llama layer, with attention for few queries (attention.py)."""
        register()
        config = LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.rms_norm_eps,
            max_position_embeddings=self.max_position_embeddings,
            attention_bias=self.attention_bias,
            rope_parameters={"rope_type": "default", **(self.rope_scaling or {})}
            | {"rope_theta": self.rope_theta},
        )
        config._attn_implementation = GROUPED
        return config


class Rotary(LlamaRotaryEmbedding):
    """Rotary embedding whose frequencies stay in float32 when a head is cast, as transformers' do.

    Rounded to bfloat16 they are off by up to 0.4 %: a quarter of a radian at a distance of 200.
    """

    def _apply(self, fn, recurse=True):
        exact = self.inv_freq
        super()._apply(fn, recurse)
        self.register_buffer("inv_freq", exact.to(self.inv_freq.device), persistent=False)
        return self


class DraftHead(nn.Module):
    """Base of all heads; a file in heads/ defines its subclass under the name `Head`.

    A subclass gives `feature_layers`, `fuse`, `forward` and, if its output has a norm, `readout`.
    The embedding and, unless `train_output`, the output rows are borrowed from the target by
    `bind`: they are no part of `state_dict`, and NaN until then, so that a forgotten bind shows.
    """

    default_loss: ClassVar[str] = "fkl"  # as losses.loss_terms reads it
    default_unroll: ClassVar[int] = 3  # training steps of self-unroll
    default_draft_vocab: ClassVar[int | None] = 8192  # None: the target's whole vocabulary
    cached_layers: int = 1  # layers that keep keys and values
    leading: ClassVar[int] = 0  # columns of the cache before that of the first pair
    reads_tokens: ClassVar[bool] = True  # False: drafts depend on the feature alone (Medusa)
    decoder_config: PreTrainedConfig | None = None  # of a model of transformers inside, if any

    embed_rows: Tensor  # [V, H]
    output_rows: Tensor  # [Vd, H], unless train_output
    output_bias: Tensor | None  # [Vd]
    d2t: Tensor  # [Vd], where the draft vocabulary is a part of the target's
    t2d: Tensor  # [V]

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.compiled: dict = {}  # what compiled.py made of it
        self.bound_to: tuple | None = None  # weights, dtype and device of the rows borrowed
        self.projection = Projection()
        nan = torch.full((1, config.hidden_size), float("nan"))
        self.register_buffer("embed_rows", nan, persistent=False)  # [V, H] once bound
        self.register_buffer("output_bias", None, persistent=False)  # [Vd] once bound
        if config.train_output:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        else:
            self.register_buffer("output_rows", nan.clone(), persistent=False)  # [Vd, H]
        if config.draft_vocab_size < config.vocab_size:
            zeros = torch.zeros(config.draft_vocab_size, dtype=torch.long)
            self.register_buffer("d2t", zeros)  # [Vd], an offset: target id = i + d2t[i]
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @staticmethod
    def feature_layers(num_layers: int) -> list[int]:
        """Which `hidden_states` of a target with that many layers the head reads."""
        raise NotImplementedError

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features `[B, N, F * H]` -> what `forward` takes as hidden `[B, N, H]`.

        A head that hands more from step to step than a hidden state has wider ones, here and in
        `forward` alike; `readout` then narrows them.
        """
        raise NotImplementedError

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        mask: "Tensor | Unrolled | None",
        cache: Cache | None,
        step: int,
    ) -> Tensor:
        """Hidden `[B, N, H]` and the tokens that follow `[B, N]` -> next hidden `[B, N, H]`.

        mask: additive `[B, 1, N, T]`; None for causal; `Unrolled` for a training step.
        step: 0 where hidden comes from the target's features, s for the head's own hidden states s
        tokens further on. The same call serves training and decoding.
        """
        raise NotImplementedError

    def prefill(
        self, features: Tensor, tokens: Tensor, cache: Cache | None, window: Tensor | None = None
    ) -> Tensor:
        """Step 0 over a text from its start: hidden states of all pairs, or of those of a window.

        features `[B, T, F * H]`; tokens `[B, T + 1]`, of which the first, which no pair has, is for
        heads that read the text itself (they count it in `leading`). window `[B, N]`: in training,
        consecutive indices; the other pairs are only looked at. Returns `[B, T, H]` or `[B, N, H]`.
        """
        hidden, following = self.fuse(features), tokens[:, 1:]
        positions = torch.arange(following.shape[1], device=tokens.device).expand_as(following)
        if window is None:
            return self(hidden, following, positions, None, cache, 0)
        assert cache is not None
        self.remember(hidden, following, positions, cache)
        mask = Unrolled(following.shape[1], window)
        hidden = hidden.take_along_dim(window[..., None], 1)
        return self(hidden, following.gather(1, window), window, mask, cache, 0)

    def remember(self, hidden: Tensor, tokens: Tensor, positions: Tensor, cache: Cache) -> None:
        """What `forward` leaves in the cache at the start of a text, its output not wanted.

        Arguments as for `forward`. A head that can fill the cache with less work says how.
        """
        self(hidden, tokens, positions, None, cache, 0)

    @property
    def deepest(self) -> int | None:
        """How many tokens deep the head can draft; None without a limit."""
        return None

    def readout(self, hidden: Tensor) -> Tensor:
        """What stands between `forward`'s hidden states and the output rows; nothing, here."""
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft logits `[..., Vd]` of hidden states `[..., H]` that `forward` gave."""
        return self.project(self.readout(hidden))

    def project(self, hidden: Tensor) -> Tensor:
        """The output rows, and the bias where there is one: `[..., H]` -> `[..., Vd]`."""
        return self.projection(hidden, self.output_weight, self.logit_bias)

    @property
    def output_weight(self) -> Tensor:
        """The output rows `[Vd, H]`: the head's own if they are trained, else the target's."""
        return self.lm_head.weight if self.config.train_output else self.output_rows

    @property
    def logit_bias(self) -> Tensor | None:
        """The bias of the draft logits `[Vd]`: the target's, for targets that have one."""
        return self.output_bias

    def embed(self, tokens: Tensor) -> Tensor:
        """The target's embedding of tokens `[B, N]` -> `[B, N, H]`."""
        return functional.embedding(tokens, self.embed_rows)

    @property
    def draft_ids(self) -> Tensor | None:
        """Target ids of the draft vocabulary `[Vd]`; None where it is the whole vocabulary."""
        if self.config.draft_vocab_size == self.config.vocab_size:
            return None
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def to_target(self, ids: Tensor) -> Tensor:
        """Draft ids -> target ids, same shape."""
        if self.config.draft_vocab_size == self.config.vocab_size:
            return ids
        return ids + self.d2t.take(ids)

    def to_draft(self, ids: Tensor) -> Tensor:
        """Target ids -> draft ids, same shape; -1 outside the draft vocabulary."""
        known = self.draft_ids
        if known is None:
            return ids
        place = torch.full((self.config.vocab_size,), -1, device=ids.device)
        place[known] = torch.arange(len(known), device=ids.device)
        return place[ids]

    def set_draft_vocab(self, ids: Tensor) -> None:
        """Take the given target ids `[Vd]` as the draft vocabulary, in ascending order."""
        if self.draft_ids is None:
            return
        ids = ids.sort().values
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))
        self.t2d.zero_()
        self.t2d[ids] = True

    @classmethod
    def completed(cls, config: HeadConfig, target: Target) -> HeadConfig:
        """The config with what only this kind of head can tell; as it is, here."""
        return config

    def start_from(self, target: Target) -> None:
        """Fill fresh weights with what the target can give, the vocabulary set; nothing, here."""

    def bind(self, target: Target, allow_other_target: bool = False) -> "DraftHead":
        """Borrow the target's rows and take its device (and, out of training, its dtype).

        Raises UserError if the sizes differ, or the weights do and `allow_other_target` is not set.
        """
        wanted = (target.fingerprint, target.dtype, target.device, self.training)
        check_target(self.config, target, allow_other_target)
        if self.bound_to == wanted:
            return self
        self.to(target.device)
        if not self.training:
            self.to(target.dtype)
        ids = self.draft_ids
        self.embed_rows = target.embedding.detach()
        if not self.config.train_output:
            rows = target.output_rows.detach()
            self.output_rows = rows if ids is None else rows[ids].contiguous()
        bias = target.output_bias
        self.output_bias = None if bias is None else (bias if ids is None else bias[ids]).detach()
        self.bound_to = wanted
        return self

    @classmethod
    def from_pretrained(
        cls, name: str | Path, target: Target | None = None, allow_other_target: bool = False
    ) -> "DraftHead":
        """The head of a folder or hub id: `load_head`."""
        return load_head(name, target, allow_other_target)

    def save_pretrained(
        self, folder: str | Path, notes: dict[str, Any] | None = None, licence: str | None = None
    ) -> None:
        """`save`, with a card; licence: of the target, None to look it up."""
        licence = licence or target_licence(self.config.target)
        self.save(folder, notes, model_card(asdict(self.config), notes, licence))

    def push_to_hub(
        self, repo: str, notes: dict[str, Any] | None = None, licence: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to OWNER/NAME; returns the address.

        Raises UserError for a bad id, without a login, or where the target's licence is not known.
        """
        licence = publishable(self.config.target, licence)
        check_push(repo)
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(Path(scratch) / "head", notes, licence)
            return push_folder(Path(scratch) / "head", repo)

    def save(
        self, folder: str | Path, notes: dict[str, Any] | None = None, card: str | None = None
    ) -> None:
        """Write config.json, model.safetensors and, if given, train.json (notes) and README.md.

        All or nothing.
        """
        state = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        write_head(Path(folder), asdict(self.config), state, card, notes)


@torch.no_grad()
def copy_layer(layer: nn.Module, target: Target, norms: dict[str, str]) -> None:
    """Copy what a head's layer shares, by name, with the last layer of the target.

    A matrix that is wider than the target's (attention over [embedding, hidden]) takes it over its
    last columns and keeps half of its own draw in the others. norms: name of a norm in the head's
    layer -> name in the target's. What the target does not have, or has in another shape (Phi,
    GPT-NeoX), stays as it was drawn.
    """
    owner = dict(target.model.named_modules())
    stacks = [m for m in owner.values() if isinstance(m, nn.ModuleList)]
    last = next((m[-1] for m in stacks if len(m) == target.num_layers), None)
    given = {} if last is None else {name: p.float() for name, p in last.named_parameters()}
    for name, weight in layer.named_parameters():
        module, _, kind = name.rpartition(".")
        found = given.get(f"{norms.get(module, module)}.{kind}")
        if found is None or found.shape[0] != weight.shape[0] or found.dim() != weight.dim():
            continue
        if found.shape == weight.shape:
            weight.copy_(found)
        elif weight.dim() == 2 and weight.shape[1] > found.shape[1]:
            weight.mul_(0.5)
            weight[:, -found.shape[1] :] = found


@torch.no_grad()
def pass_through(fc: nn.Linear) -> None:
    """Let a fusing layer begin close to the identity on the last of its inputs."""
    fc.weight.mul_(0.1)
    fc.weight[:, -fc.out_features :] += torch.eye(fc.out_features, device=fc.weight.device)


def remember_text(
    attention: LlamaAttention, inputs: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache
) -> None:
    """Put what an attention layer would keep of `inputs` `[B, N, W]` in the cache, and no more."""
    shape = (*inputs.shape[:-1], -1, attention.head_dim)
    key, value = (
        layer(inputs).view(shape).transpose(1, 2) for layer in (attention.k_proj, attention.v_proj)
    )
    key, _ = apply_rotary_pos_emb(key, key, *rotary)
    cache.update(key, value, attention.layer_idx)


def count_columns(cache: Cache | None, hidden: Tensor) -> None:
    """What a head without attention does with its cache: columns without content keep the count.

    hidden `[B, N, H]`: what `forward` is given; cache None: nothing to do.
    """
    if cache is not None:
        nothing = hidden.new_empty(hidden.shape[0], 1, hidden.shape[1], 0)
        cache.update(nothing, nothing, 0)


def built_in_heads() -> list[str]:
    """The names of the files in heads/."""
    package = importlib.import_module("adaspec_eagle.heads")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def head_class(name: str) -> type[DraftHead]:
    """The class `Head` of heads/NAME.py (also as NAME:..., which it reads), of a dotted module, or
    of a file path.py. The name is the user's: saved heads with this code load from now on."""
    found = _class_of(name)
    if not _is_built_in(name):
        remember_code(name)
    return found


def _is_built_in(name: str) -> bool:
    file = name.partition(":")[0]
    return not name.endswith(".py") and ("." not in file or file.startswith("adaspec_eagle."))


def _class_of(name: str) -> type[DraftHead]:
    try:
        if name.endswith(".py"):
            module = module_of(name)
        else:
            file = name.partition(":")[0]
            module = importlib.import_module(file if "." in file else f"adaspec_eagle.heads.{file}")
        found = module.Head
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(
            f"unknown head {name!r} ({error}); give one of {', '.join(built_in_heads())}, "
            "a dotted module or a path.py that defines a class named Head"
        ) from error
    if not issubclass(found, DraftHead):
        raise UserError(f"{name!r}: its Head is no subclass of adaspec_eagle.DraftHead")
    return found


def new_head(config: HeadConfig, seed: int = 0) -> DraftHead:
    """A head with freshly drawn weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _class_of(config.head)(config)


def check_target(config: HeadConfig, target: Target, allow_other: bool = False) -> None:
    """Raise UserError if a head with this config does not fit the target."""
    ours = (config.vocab_size, config.hidden_size)
    theirs = (target.vocab_size, target.hidden_size)
    if ours != theirs or max([0, *config.feature_layers]) > target.num_layers:
        raise UserError(
            f"this head was made for {config.target!r} with vocabulary and hidden size {ours} and "
            f"feature layers {config.feature_layers}; target {target.name!r} has {theirs} and "
            f"{target.num_layers} layers. Load the head's own target, or train a head for this one"
        )
    if config.target_fingerprint != target.fingerprint and not allow_other:
        raise UserError(
            f"this head was trained for {config.target!r} with weights "
            f"{config.target_fingerprint}; target {target.name!r} has weights "
            f"{target.fingerprint}. Load the same weights, or, where they are only to be tried, "
            "allow the mismatch (measuring and chat: --allow-other-target; allow_other_target=True)"
        )


def read_config(folder: str | Path) -> HeadConfig:
    """The config of a head's folder in this package's layout; UserError says what is wrong."""
    path = Path(folder) / "config.json"
    data = read_json(path)
    try:
        known = {f.name for f in fields(HeadConfig)}
        config = HeadConfig(**{name: value for name, value in data.items() if name in known})
    except TypeError as error:
        raise UserError(f"{path} is not a config of this package: {error}") from error
    for name, kind in get_type_hints(HeadConfig).items():
        value = getattr(config, name)
        try:
            type_validator(name, value, int | float if kind is float else kind)
        except TypeError as error:
            raise UserError(f"{path}: {error}") from error
        if kind is int and value < 1:
            raise UserError(f"{path}: Field '{name}' must be at least 1, not {value}")
    return config


def load_head(
    folder: str | Path, target: Target | None = None, allow_other_target: bool = False
) -> DraftHead:
    """A head from its folder or hub id, in evaluation mode; bound to the target if one is given.

    Other layouts (published.py) need the target. Raises UserError for a missing or unknown config,
    weights that cannot be read, names or shapes that do not fit, a vocabulary map that points
    outside, or another target's head.
    """
    folder = local_folder(folder)
    if is_ours(read_json(folder / "config.json")):
        config = read_config(folder)
        if target is not None:
            check_target(config, target, allow_other_target)
        head = build_head(config, read_weights(folder), weights_file(folder))
    else:
        found, state = from_layout(folder, target)
        head = build_head(HeadConfig(**found), state, weights_file(folder))
    return head if target is None else head.bind(target, allow_other_target)


def check_head(head: object) -> DraftHead:
    """The same; UserError for what is no head, such as the folder of one."""
    if not isinstance(head, DraftHead):
        raise UserError(f"head {head!r} is no draft head: give what load_head(FOLDER) makes")
    return head


def build_head(config: HeadConfig, state: dict[str, Tensor], path: Path) -> DraftHead:
    """A head in evaluation mode with these weights; UserError names `path` if they do not fit, or
    if the config names code that the user has not named (plugins.py)."""
    if not _is_built_in(config.head):
        check_code(config.head, path.parent)
    head = _class_of(config.head)(config)
    wanted = {name: tuple(t.shape) for name, t in head.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if wanted != found:
        missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        both = sorted(wanted.keys() & found.keys())
        sizes = [f"{n}: {found[n]}, not {wanted[n]}" for n in both if found[n] != wanted[n]]
        raise UserError(
            f"{path} does not hold a {config.head} head of this config: missing {missing}, "
            f"unexpected {extra}, other shapes {sizes}"
        )
    floats = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    head.to(floats[0]).load_state_dict(state)
    _check_vocab_map(head, path)
    return head.eval()


def with_vocab(head: DraftHead, ids: Tensor) -> DraftHead:
    """An unbound copy of a head that borrows its output rows, for draft vocabulary `ids` `[Vd]`."""
    made = new_head(replace(head.config, draft_vocab_size=len(ids)))
    maps = ("d2t", "t2d")
    made.load_state_dict(
        {name: t.cpu() for name, t in head.state_dict().items() if name not in maps}, strict=False
    )
    made.set_draft_vocab(ids)
    return made


def _check_vocab_map(head: DraftHead, path: Path) -> None:
    """Raise UserError if the draft vocabulary is not a set of the target's ids."""
    ids = head.draft_ids
    if ids is None:
        return
    inside = bool((ids >= 0).all() and (ids < head.config.vocab_size).all())
    if not inside or len(ids.unique()) < len(ids) or not bool(head.t2d[ids].all()):
        raise UserError(f"{path}: d2t (offsets) and t2d do not describe a part of the vocabulary")
