"""An accelerator that is imitated on the CPU, to find what a GPU would refuse or wait for.

Tensors say that they are on another device and compute with the CPU's kernels. Operations on
tensors of two devices are refused; so are reads and sends while a graph is captured, which is then
replayed as a CUDA graph is: the same operations on the same memory. Reads and sends are counted.
Kernels, streams and times are not imitated.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from adaspec_eagle import compiled

NAME = "imitated"
DEVICE = "privateuseone:0"  # torch's place for devices that others bring; called NAME once known
aten = torch.ops.aten
READS = {  # give values to the host, or shapes that follow from values
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Traffic:
    """What went between host and device, and the graph that is being captured."""

    reads = 0
    sends = 0
    captured: list[tuple] | None = None

    @classmethod
    def count(cls, reads: bool, what: Any) -> None:
        """Note a read or a send; a graph holds neither."""
        if cls.captured is not None:
            raise RuntimeError(f"{what}: host and device meet while a graph is captured")
        if reads:
            cls.reads += 1
        else:
            cls.sends += 1


class Remote(Tensor):
    """A tensor on the imitated device; its numbers are those of `held`, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "Remote":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device(DEVICE),
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """Also those that have no tensor yet."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch does in C++ before an operation can be seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _there(kwargs.get("device")):
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if args and isinstance(args[0], Remote):
            if func is Tensor.__getitem__:
                args = (args[0], tree_map(_index, args[1], is_leaf=lambda x: isinstance(x, list)))
            if func is Tensor.tolist:
                return args[0].cpu().tolist()
            if func is functional.scaled_dot_product_attention:
                return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _index(key: Any) -> Any:
    return torch.tensor(key) if isinstance(key, list) else key


def _there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Remote) else x


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation: refused, counted, computed on the CPU, remembered for the graph."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with _Operations():
            return func.decompose(*args, **kwargs)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    remote = any(isinstance(x, Remote) for x in tensors)
    there = _there(kwargs["device"]) if kwargs.get("device") is not None else remote
    if func in (aten._to_copy.default, aten.copy_.default):
        source = args[func is aten.copy_.default]
        if isinstance(source, Remote) != there:
            Traffic.count(not there, func)
    elif remote:
        _check(func, args, tensors)
    given, options = tree_map(_held, (args, kwargs))
    if there and "device" in options:
        options["device"] = torch.device("cpu")
    made = func(*given, **options)
    if not there:
        return made
    if Traffic.captured is not None:
        Traffic.captured.append((func, given, options, made))
    wrapped = tree_map(lambda x: Remote(x) if isinstance(x, Tensor) else x, made)
    crossed = func is aten._to_copy.default and not remote
    return wrapped if crossed else return_and_correct_aliasing(func, args, kwargs, wrapped)


def _check(func: Any, args: tuple, tensors: list[Tensor]) -> None:
    """Refuse tensors on the CPU, but single numbers and indices; count what the host waits for."""
    masks = (torch.bool, torch.uint8)
    by_mask = func in INDEXED and any(x is not None and x.dtype in masks for x in args[1])
    if func in READS or by_mask:
        Traffic.count(True, func)
    for x in tensors:
        if x.dim() and not isinstance(x, Remote):
            if func not in INDEXED or x is args[0]:
                shapes = [(type(t).__name__, tuple(t.shape)) for t in tensors]
                raise RuntimeError(f"{func}: tensors on two devices: {shapes}")
            Traffic.count(False, func)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention, whose kernel torch chooses by the device."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


class _Graph:
    """A CUDA graph: the captured operations on the memory that they had."""

    def __init__(self) -> None:
        self.operations: list[tuple] = []

    def replay(self) -> None:
        """Compute all of them again, results to where they were."""
        for func, args, kwargs, made in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def _captured(graph: _Graph) -> Iterator[None]:
    Traffic.captured = graph.operations
    try:
        yield
    finally:
        Traffic.captured = None


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        """Nothing runs beside anything else."""


class _Nothing:
    """A module of the device that says it is not there: nobody is to choose it by himself."""

    def is_available(self) -> bool:
        return False

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        pass


_KEPT: list[Any] = []  # what is registered with torch, once a process


@contextmanager
def imitated(monkeypatch: Any) -> Iterator[type[Traffic]]:
    """Inside the block there is a device NAME; compiled forwards on it go by its graphs."""
    if not _KEPT:
        torch.utils.rename_privateuse1_backend(NAME)
        torch._register_device_module(NAME, _Nothing())
        guard = backend_registration._DummyDeviceGuard()
        hook = backend_registration._DummyPrivateUse1Hook()
        torch._C._acc.register_python_privateuseone_device_guard(guard)
        torch._C._acc.register_python_privateuseone_hook(hook)
        _KEPT.extend((guard, hook))
    monkeypatch.setattr(compiled, "_wrapped", lambda step, device: compiled._Graphs(step))
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", _captured)
    Traffic.reads = Traffic.sends = 0
    # On this thread alone: what is imitated is not there on others.
    with torch.autograd.set_multithreading_enabled(False), _Functions(), _Operations():
        yield Traffic


def moved(module: nn.Module) -> nn.Module:
    """The module, its weights and buffers on the imitated device, shared ones still shared."""
    there: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                new = nn.Parameter(Remote(weight.data), weight.requires_grad)
                part._parameters[name] = there.setdefault(id(weight), new)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Remote(buffer)
    return module
