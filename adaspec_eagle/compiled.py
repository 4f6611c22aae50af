"""The forwards of a decode round, as they are or compiled: one call of the target, one of the head.

As they are: the modules with packed weights (packed.py). Compiled: the same modules traced by
torch.compile on CPU, where one graph serves every number of nodes and every length, or replayed as
CUDA graphs, one for each (rows, nodes, cache) and step of the head. The eager path is the
reference (tests).

Legend: B rows, N tokens, T key columns, L layers, H key heads, C capacity, D head size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache

from adaspec_eagle.attention import grouped
from adaspec_eagle.cache import TreeCache
from adaspec_eagle.errors import UserError
from adaspec_eagle.head import DraftHead
from adaspec_eagle.packed import hooks, packing, weights_state
from adaspec_eagle.targets import Target

Step = Callable[..., Any]  # (*inputs, mask, columns, buffer, *more) -> tensors
Call = Callable[..., tuple[Tensor, Any]]  # (*inputs, mask, cache, *more) -> two tensors
MOST_GRAPHS = 64  # CUDA graphs kept; all are dropped when there are more


@contextmanager
def decoding_mode(device: torch.device, compiled: bool) -> Iterator[None]:
    """Without gradients, and a CUDA device as the current one: events and graphs are made there.

    As they are, forwards are 7 % faster on CPU in torch's inference mode. Compiled ones have few
    small operations left; they stay in the mode they were measured in.
    """
    place = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with place, torch.no_grad() if compiled else torch.inference_mode():
        yield


def target_call(target: Target, layers: tuple[int, ...], compiled: bool = False) -> Call:
    """(tokens, positions, mask, cache) -> logits `[B, N, V]`, features `[B, N, F H]` or None."""
    if compiled:

        def make() -> Call:
            return static_target(target, _wrapped(target_step(target, layers), target.device))

        return _known(target.compiled, target.model, layers, make)
    packed = packing(target.model)

    def call(
        tokens: Tensor, positions: Tensor, mask: Tensor, cache: TreeCache
    ) -> tuple[Tensor, Any]:
        with packed.active():
            out = target.forward(tokens, positions, mask, cache, layers)
        assert out.logits is not None
        return out.logits, out.features

    return call


def head_call(head: DraftHead, compiled: bool = False) -> Call:
    """(hidden, tokens, positions, mask, cache, step) -> hidden `[B, N, H]`, logits `[B, N, Vd]`."""
    if compiled:
        return _known(head.compiled, head, head.bound_to or (), partial(_compiled_head, head))
    packed = packing(head)

    def call(
        hidden: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, cache: TreeCache, step: int
    ) -> tuple[Tensor, Tensor]:
        with packed.active():
            hidden = head(hidden, tokens, positions, mask, cache, step)
            return hidden, head.logits(hidden)

    return call


def graphs_made() -> int:
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check_compiler(device: torch.device) -> None:
    """Raise UserError where `torch.compile` would find no C++ compiler."""
    from torch._inductor import cpp_builder, exc  # heavy, and needed here only

    if device.type != "cpu":
        return
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise UserError(
            "compiling needs a C++ compiler and none was found: install g++ (apt install g++), "
            "name one in the environment variable CXX, or go without compiled=True"
        ) from error


class Columns(Cache):
    """A TreeCache as a traced forward sees it: tensors only, its new columns given."""

    def __init__(self, buffer: Tensor, columns: Tensor, width: int) -> None:
        super().__init__(layers=[])
        _, _, b, h, c, _ = buffer.shape
        self.buffer = buffer  # [L, 2, B, H, C, D]
        self.flat = buffer.flatten(0, -2)
        firsts = torch.arange(b * h, device=buffer.device)[:, None] * c
        self.places = (firsts + columns).flatten()  # [B H N], in `flat`, of the first layer's keys
        self.size = b * h * c
        self.width = width

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write `[B, H, N, D]` to the columns; return the first `width` columns.

        One write to the whole buffer each, which a compiler does in place; writes to views of it
        would copy the buffer.
        """
        for n, states in enumerate((key_states, value_states), 2 * layer_idx):
            self.flat.index_copy_(0, self.places + n * self.size, states.flatten(0, -2))
        both = self.flat.view(self.buffer.shape)[layer_idx, :, :, :, : self.width]
        return both[0], both[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not asked for where positions are given."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(key columns, offset) as transformers' mask builders ask for them."""
        return self.width, 0


def target_step(target: Target, layers: tuple[int, ...]) -> Step:
    """A forward as a function of tensors: (tokens, positions, mask, columns, buffer)."""

    def step(
        tokens: Tensor, positions: Tensor, mask: Tensor, columns: Tensor, buffer: Tensor
    ) -> tuple[Tensor | None, Any]:
        cache = Columns(buffer, columns, mask.shape[-1])
        out = target.forward(tokens, positions, mask, cache, layers)
        return out.logits, out.features

    return step


def static_target(target: Target, fast: Step) -> Call:
    """A call of the target by a function of `target_step`'s arguments."""

    def call(
        tokens: Tensor, positions: Tensor, mask: Tensor, cache: TreeCache
    ) -> tuple[Tensor, Any]:
        with grouped(target.config):
            return _padded(fast, (tokens, positions), mask, cache)

    return call


def _compiled_head(head: DraftHead) -> Call:
    def step(
        hidden: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, columns: Tensor,
        buffer: Tensor, depth: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        cache = Columns(buffer, columns, mask.shape[-1])
        hidden = head(hidden, tokens, positions, mask, cache, depth)
        return hidden, head.logits(hidden)

    fast = _wrapped(step, head.embed_rows.device)
    inside = head.decoder_config  # its attention is set from outside the graph

    def call(
        hidden: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, cache: TreeCache, step: int
    ) -> tuple[Tensor, Any]:
        with nullcontext() if inside is None else grouped(inside):
            return _padded(fast, (hidden, tokens, positions), mask, cache, step)

    return call


def _padded(
    fast: Step, inputs: tuple[Tensor, ...], mask: Tensor, cache: TreeCache, *more: int
) -> tuple[Tensor, Any]:
    """Run with at least two nodes, so that one graph serves one node too; a second is cut off."""
    n = mask.shape[2]
    # One column is always left over: a mask as wide as the capacity would be a graph of its own.
    columns = cache.reserve(n, spare=1 + (n == 1))[:-1]
    if n == 1:
        inputs = tuple(x.expand(-1, 2, *x.shape[2:]) for x in inputs)
        mask = functional.pad(mask, (0, 1), value=torch.finfo(mask.dtype).min)
        mask = mask.expand(-1, -1, 2, -1)
    tensors = [x.contiguous() for x in (*inputs, mask, columns)]
    first, second = fast(*tensors, cache.buffer, *more)
    return first[:, :n], None if second is None else second[:, :n]


def _wrapped(step: Step, device: torch.device) -> Step:
    """`step(*tensors, mask, columns, buffer, *more)` compiled for the device."""
    if device.type == "cuda":
        return _Graphs(step)
    check_compiler(device)
    assert isinstance(step, FunctionType)
    step.__code__ = step.__code__.replace()  # graphs are kept by code object: one of its own
    made = torch.compile(step, options={"guard_filter_fn": _input_guards})

    def call(*arguments: Any) -> Any:
        *inputs, mask, columns, buffer = [x for x in arguments if isinstance(x, Tensor)]
        sizes = [(x, 1) for x in inputs] + [(mask, 2), (mask, 3), (columns, 0), (buffer, 4)]
        for x, dim in sizes:
            torch._dynamo.maybe_mark_dynamic(x, dim)
        with frozen_weights():
            return made(*arguments)

    return call


def frozen_weights() -> Any:
    """A context in which torch.compile makes weights constants, in oneDNN's packed layout."""
    from torch._inductor import config  # takes seconds to import

    return config.patch({"freezing": True, "cpp.enable_concat_linear": True})


def _input_guards(entries: Any) -> list[bool]:
    """Keep the guards on inputs and their sizes; those on the modules cost more than they say.

    The compiled call belongs to one state of its weights (`_known`).
    """
    return [
        entry.guard_type == "SHAPE_ENV"
        or (entry.guard_type == "TENSOR_MATCH" and not isinstance(entry.value, nn.Parameter))
        or "depth" in entry.name
        for entry in entries
    ]


class _Graphs:
    """CUDA graphs of a step, one for each set of shapes and each buffer.

    A graph reads and writes the buffer that it was captured with, so that the mask is widened to
    the buffer's capacity. Run on an imitated device only (tests/imitated.py), not on a GPU yet.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.graphs: dict[tuple, tuple[list[Tensor], Any, torch.cuda.CUDAGraph]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The step's outputs, which the next call with these shapes overwrites."""
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        *inputs, mask, columns, buffer = tensors
        more = arguments[len(tensors) :]
        mask = widened(mask, buffer.shape[4])
        given = [*inputs, mask, columns]
        key = (*(x.shape for x in (*given, buffer)), buffer.data_ptr(), *more)
        if key not in self.graphs:
            if len(self.graphs) >= MOST_GRAPHS:
                self.graphs.clear()
            self.graphs[key] = self._capture(given, buffer, more)
        static, outputs, graph = self.graphs[key]
        for mine, new in zip(static, given, strict=True):
            mine.copy_(new)
        graph.replay()
        return outputs

    def _capture(
        self, given: list[Tensor], buffer: Tensor, more: tuple[int, ...]
    ) -> tuple[list[Tensor], Any, torch.cuda.CUDAGraph]:
        static = [x.clone() for x in given]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are chosen and memory is taken before capturing
            for _ in range(2):
                self.step(*static, buffer, *more)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.step(*static, buffer, *more)
        return static, outputs, graph


def widened(mask: Tensor, capacity: int) -> Tensor:
    """An additive mask `[B, 1, N, T]` over all columns of a cache: `[B, 1, N, C]`."""
    value = torch.finfo(mask.dtype).min
    return functional.pad(mask, (0, capacity - mask.shape[-1]), value=value)


def _known(
    calls: dict[tuple, tuple[list, Call]], module: nn.Module, key: tuple, make: Callable[[], Call]
) -> Call:
    """The call of that key, made on first use and again when weights or hooks have changed."""
    state = weights_state((*module.parameters(), *module.buffers()))
    state += [hooked for part in module.modules() if (hooked := hooks(part))]
    if key not in calls or calls[key][0] != state:
        calls[key] = (state, make())
    return calls[key][1]
