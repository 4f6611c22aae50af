"""Linear layers in the layout that oneDNN wants, for decoding on CPU in bfloat16 and float32.

A forward over a few tokens takes as long as its weights take to read. Packed, in bfloat16 they are
read about 1.6 times as fast as in the plain layout; in float32, with AVX2, 2 to 32 tokens take 0.6
to 0.8 of the time and one 1.1 (results/LOG.md), for a second copy of them in memory. The
products are sums of the same products in float32, perhaps in another order. Layers with hooks are
left as they are.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

ROWS = 16  # rows that the layout is made for; any number works
ROOM = 3  # pack only where memory has this many times the model's size free


# Layers of a module that are given the same input, one after the other, by their names in it.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Projection(nn.Module):
    """A linear layer whose weight and bias are its owner's `output_weight` and `logit_bias`."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return functional.linear(x, weight, bias)


class PackedLinear(nn.Module):
    """A linear layer over a packed copy of its weight; without gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor | None = None  # the plain one, for those who ask
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def forward(self, x: Tensor, *_: Tensor | None) -> Tensor:
        """`[..., in]` -> `[..., out]`; a Projection's further arguments are what was packed."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Together:
    """Linear layers that are given the same input, as one product.

    The first of them that sees an input computes all; the others, given the same tensor, take what
    is theirs. Each result is given once, so that none is taken for that of a later call.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        biases = [layer.bias for layer in layers]
        bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
        self.whole = PackedLinear(torch.cat([layer.weight.detach() for layer in layers]), bias)
        self.sizes = [layer.out_features for layer in layers]
        # The last input, and its results that nobody has asked for yet: one value, so that threads
        # which decode at the same time cannot take each other's.
        self.last: tuple[Tensor | None, dict[int, Tensor]] = (None, {})

    def take(self, index: int, x: Tensor) -> Tensor:
        """The result of layer `index` for x."""
        given, ready = self.last
        if x is not given or index not in ready:
            ready = dict(enumerate(self.whole(x).split(self.sizes, dim=-1)))
            self.last = (x, ready)
        mine = ready.pop(index)
        if not ready:
            self.last = (None, {})
        return mine


class Part(nn.Module):
    """One of several layers that are computed together."""

    def __init__(self, together: Together, index: int) -> None:
        super().__init__()
        self.weight: Tensor | None = None  # the plain ones, for those who ask
        self.bias: Tensor | None = None
        self.together, self.index = together, index

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`, a view of all results."""
        return self.together.take(self.index, x)


class Packing:
    """Packed twins of a model's linear layers, which stand in for them inside `active` only."""

    def __init__(self, model: nn.Module) -> None:
        self.state = weights_state(_linear_weights(model))
        self.is_active = False
        self.places = []  # (the parent's children, name, the layer, its twin)
        twins: dict[tuple[int, int], PackedLinear | Part] = {}  # by the weight and bias
        parents = list(model.modules()) if _fits(model) else []
        # A layer that lends its weight to a Projection is asked for it, not called.
        lending = {id(p.output_weight) for p in parents if _projects(p)}
        for parent in parents:
            merged = _merged(parent)
            for name, child in parent._modules.items():
                owned = _weights(parent, child)
                lends = type(child) is nn.Linear and id(child.weight) in lending
                if owned is None or lends or not _can_pack(owned[0]):
                    continue
                key = (id(owned[0]), id(owned[1]))
                if key not in twins:
                    twins[key] = merged.get(name) or PackedLinear(*owned)
                    twins[key].weight, twins[key].bias = owned
                self.places.append((parent._modules, name, child, twins[key]))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute with the packed layers inside the block; the model's own are back behind it.

        Inside another such block this is nothing.
        """
        if self.is_active:
            yield
            return
        try:  # from the first change on: Ctrl-C may come at any of them
            self.is_active = True
            for children, name, _, twin in self.places:
                children[name] = twin
            yield
        finally:
            for children, name, layer, _ in self.places:
                children[name] = layer
            self.is_active = False


_PACKINGS: WeakKeyDictionary[nn.Module, Packing] = WeakKeyDictionary()


def packing(model: nn.Module, look: bool = True) -> Packing:
    """The model's packing, made on first use and again whenever its weights have changed.

    look False: as the last look found them, for one that was a moment ago.
    """
    found = _PACKINGS.get(model)
    if found is not None and (found.is_active or not look):
        return found
    if found is None or found.state != weights_state(_linear_weights(model)):
        found = _PACKINGS[model] = Packing(model)
    return found


def weights_state(weights: Iterable[Tensor]) -> list[tuple]:
    """Changes whenever one of them is replaced, moved or written to.

    Writes to `.data`, as those of merged adapters, are not counted by torch: on CPU they show in a
    sample of each tensor's values, which has some of every row and of every column.
    """
    return [
        (w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version, _sample(w)) for w in weights
    ]


def _sample(weight: Tensor) -> float | None:
    """The sum of values that are spread over a tensor; None off the CPU."""
    if weight.device.type != "cpu" or not weight.numel() or not weight.is_contiguous():
        return None
    flat = weight.detach().view(-1)
    return float(flat[:: _stride(*weight.shape[-2:])].double().sum())


@lru_cache(maxsize=1024)
def _stride(rows: int = 1, columns: int = 1) -> int:
    """A step through a matrix, row by row, that meets each of its rows and columns.

    It is below a row's length, so that none is passed over, and has no factor in common with it, so
    that all columns come in turn; and below the number of rows, so that there are steps for that.
    """
    step = max(1, min(rows, columns) - 1)
    while math.gcd(step, columns) > 1:
        step -= 1
    return step


def _linear_weights(model: nn.Module) -> list[Tensor]:
    found = [_weights(p, child) for p in model.modules() for child in p._modules.values()]
    return [t for owned in found if owned for t in owned if t is not None]


def _weights(parent: nn.Module, child: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer; None for other modules and for those with hooks."""
    if child is None or hooks(child):
        return None
    if type(child) is nn.Linear:
        return child.weight, child.bias
    if type(child) is Projection:
        return parent.output_weight, parent.logit_bias  # type: ignore[return-value]
    return None


def hooks(module: nn.Module) -> tuple[int, ...]:
    """What of others' code runs when a module is called: hooks, and a `forward` set on itself.

    Those by which transformers collects outputs do nothing else, and come with the first forward.
    """
    found = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    found = [f for f in found if not str(getattr(f, "__module__", "")).startswith("transformers.")]
    return tuple(map(id, [*found, *filter(None, [vars(module).get("forward")])]))


def _projects(parent: nn.Module) -> bool:
    return any(type(child) is Projection for child in parent._modules.values())


def _merged(parent: nn.Module) -> dict[str, Part]:
    """Twins of those children that are computed together, by name."""
    found: dict[str, Part] = {}
    for names in TOGETHER:
        layers = [parent._modules.get(name) for name in names]
        linear = [layer for layer in layers if type(layer) is nn.Linear and _weights(parent, layer)]
        alike = len({(layer.in_features, layer.bias is None) for layer in linear}) == 1
        fits = all(_can_pack(layer.weight) for layer in linear)
        if len(linear) == len(names) and len(set(linear)) == len(names) and alike and fits:
            together = Together(linear)
            found |= {name: Part(together, index) for index, name in enumerate(names)}
    return found


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has products in this weight's type on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def _fits(model: nn.Module) -> bool:
    """Whether a second copy of the weights leaves room."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return ROOM * size < psutil.virtual_memory().available
