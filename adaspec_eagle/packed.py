"""Linear layers in the layout that oneDNN wants, for decoding on CPU in bfloat16.

A forward over a few tokens takes as long as its weights take to read. Packed, they are read about
1.6 times as fast as in the plain layout (results/LOG.md), for a second copy of them in memory. The
products are sums of the same bfloat16 products in float32, perhaps in another order.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn

ROWS = 16  # rows that the layout is made for; any number works
SAMPLE = 256  # values by which a tensor's content is known
ROOM = 3  # pack only where memory has this many times the model's size free


class PackedLinear(nn.Module):
    """`nn.Linear` over a packed copy of its weight; without gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Packing:
    """Packed twins of a model's linear layers, which stand in for them inside `active` only."""

    def __init__(self, model: nn.Module) -> None:
        twins: dict[nn.Module, PackedLinear] = {}
        self.state = weights_state(_linear_weights(model))
        self.places = []  # (the parent's children, name, the layer, its twin)
        for parent in model.modules() if _fits(model) else ():
            for name, child in parent._modules.items():
                if type(child) is nn.Linear and _can_pack(child.weight):
                    if child not in twins:
                        twins[child] = PackedLinear(child)
                    self.places.append((parent._modules, name, child, twins[child]))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute with the packed layers inside the block; the model's own are back behind it."""
        for children, name, _, twin in self.places:
            children[name] = twin
        try:
            yield
        finally:
            for children, name, layer, _ in self.places:
                children[name] = layer


_PACKINGS: WeakKeyDictionary[nn.Module, Packing] = WeakKeyDictionary()


def packing(model: nn.Module) -> Packing:
    """The model's packing, made on first use and again whenever its weights have changed."""
    found = _PACKINGS.get(model)
    if found is None or found.state != weights_state(_linear_weights(model)):
        found = _PACKINGS[model] = Packing(model)
    return found


def weights_state(weights: Iterable[Tensor]) -> list[tuple]:
    """Changes whenever one of them is replaced, moved or written to.

    Writes to `.data`, as those of merged adapters, are not counted by torch: on CPU they show in a
    sample of each tensor's values.
    """
    return [
        (w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version, _sample(w)) for w in weights
    ]


def _sample(weight: Tensor) -> float | None:
    """The sum of some hundred values that are spread over a tensor; None off the CPU."""
    if weight.device.type != "cpu" or not weight.numel() or not weight.is_contiguous():
        return None
    some = weight.detach().view(-1)[:: max(1, weight.numel() // SAMPLE)]
    return float(some.double().sum())


def _linear_weights(model: nn.Module) -> list[Tensor]:
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    return [t for m in layers for t in (m.weight, m.bias) if t is not None]


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has bfloat16 products for this weight on this machine."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _fits(model: nn.Module) -> bool:
    """Whether a second copy of the weights leaves room."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return ROOM * size < psutil.virtual_memory().available
