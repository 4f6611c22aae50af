"""Compiled forwards give what the eager ones give."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler

from adaspec_eagle import compiled as forwards
from adaspec_eagle import generate
from adaspec_eagle.attention import tree_mask
from adaspec_eagle.compiled import decoding_mode, static_target, target_call, target_step, widened
from adaspec_eagle.errors import UserError
from tests.test_sampling import batch
from tests.tiny import VOCAB, tiny_head, tiny_target


@pytest.fixture
def counted(monkeypatch):
    """How many graphs torch.compile has made."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters["stats"]


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_decoding_gives_the_tokens_of_the_eager_path(rows, counted):
    """In float64, with and without a draft, and without a new graph for every length."""
    target = tiny_target()
    head = tiny_head(target)
    ids, mask = batch(rows)
    wanted = generate(target, None, ids, mask, max_new_tokens=24)
    for tree in ("chain:3", "dynamic"):
        found = generate(target, head, ids, mask, tree=tree, max_new_tokens=24, compiled=True)
        assert found.answers == wanted.answers
    assert rows > 1 or counted["unique_graphs"] <= 6


@pytest.mark.long
@pytest.mark.parametrize("name", ["eagle3", "medusa", "lm:layers=2"])
def test_compiled_heads_draft_what_eager_ones_draft(name, counted):
    """Every node of every round; Medusa has other weights at each step."""
    target = tiny_target()
    head = tiny_head(target, name)
    head.start_from(target)
    for block in getattr(head, "blocks", ()):
        torch.nn.init.normal_(block.weight)
    ids, mask = batch(3)
    for tree in ("chain:3", "dynamic"):
        drafts = {False: [], True: []}
        for compiled, seen in drafts.items():
            generate(
                target, head, ids, mask, tree, 24, compiled=compiled,
                watch_tree=lambda made, _, seen=seen: seen.append(made.tokens.tolist()),
            )  # fmt: skip
        assert drafts[True] == drafts[False]
    assert counted["unique_graphs"] <= 12


def test_a_cuda_device_is_the_current_one_while_it_decodes(monkeypatch):
    """Streams, events and graphs of another would not wait for its work."""
    current = []
    monkeypatch.setattr(torch.cuda, "device", lambda place: nullcontext(current.append(place)))
    for compiled in (False, True):
        with decoding_mode(torch.device("cuda:1"), compiled):
            assert torch.is_inference_mode_enabled() != compiled
            assert not torch.is_grad_enabled()
        with decoding_mode(torch.device("cpu"), compiled):
            pass
    assert current == [torch.device("cuda:1")] * 2


@pytest.mark.long
def test_a_hook_set_behind_the_first_decode_is_compiled_in(counted):
    target = tiny_target()
    ids, mask = batch(1)
    before = generate(target, None, ids, mask, max_new_tokens=12, compiled=True).answers
    layer = target.model.model.layers[0].self_attn.o_proj
    with layer.register_forward_hook(lambda layer, given, out: 3 - 2 * out):
        wanted = generate(target, None, ids, mask, max_new_tokens=12).answers
        found = generate(target, None, ids, mask, max_new_tokens=12, compiled=True).answers
    assert found == wanted != before
    assert generate(target, None, ids, mask, max_new_tokens=12, compiled=True).answers == before


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    target = tiny_target()
    with pytest.raises(UserError, match=r"C\+\+ compiler.*g\+\+"):
        generate(target, tiny_head(target), torch.tensor([[9, 10]]), compiled=True)


@pytest.mark.parametrize("kind", ["weight", "norm", "buffer"])
def test_a_call_is_made_again_when_anything_it_holds_has_changed(kind):
    """Compiled graphs hold weights, norms and buffers as constants."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model.register_buffer("scale", torch.ones(4))
    made, calls = [], {}
    for _ in range(2):
        forwards._known(calls, model, (), lambda: made.append(0))
    assert len(made) == 1
    changed = {"weight": model[0].weight, "norm": model[1].weight, "buffer": model.scale}[kind]
    with torch.no_grad():
        changed.mul_(2)
    for _ in range(2):
        forwards._known(calls, model, (), lambda: made.append(0))
    assert len(made) == 2


@pytest.mark.parametrize("nodes", [1, 5])
def test_fixed_shapes_give_what_the_cache_gives(nodes):
    """What a CUDA graph computes: columns given, the mask as wide as the capacity, padded nodes."""
    target = tiny_target()
    layers = (1, 3)
    ids = torch.randint(8, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(12).expand(2, 12)
    results = []
    for make in (target_call, fixed):
        cache = target.new_cache(16)
        target.forward(ids[:, :6], positions[:, :6], None, cache, logits=False)
        cache.commit_prefix(torch.tensor([6, 4]), 6)
        causal = torch.ones(nodes, nodes).bool().tril().expand(2, -1, -1)
        mask = tree_mask(cache.lengths, cache.start, causal, torch.float64)
        place = cache.lengths[:, None] + torch.arange(nodes)
        out = make(target, layers)(ids[:, 6 : 6 + nodes], place, mask, cache)
        cache.commit(torch.arange(nodes).expand(2, -1), torch.tensor([nodes, 1]))
        results.append([*out, cache.buffer[..., :4, :], cache.lengths])
    for eager, static in zip(*results, strict=True):
        torch.testing.assert_close(static, eager)


def fixed(target, layers):
    """The compiled call, its step run as it is over the whole capacity."""

    def run(*arguments):
        *inputs, mask, columns, buffer = arguments
        return step(*inputs, widened(mask, buffer.shape[4]), columns, buffer)

    step = target_step(target, layers)
    return static_target(target, run)
