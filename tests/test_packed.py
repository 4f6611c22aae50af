"""Packed linear layers: the same products, the model untouched, changed weights seen."""

import gc
import weakref

import pytest
import torch
from torch import nn

from adaspec_eagle import generate
from adaspec_eagle.packed import PackedLinear, _can_pack, packing
from tests.tiny import tiny_head, tiny_target

if not _can_pack(torch.zeros(1, dtype=torch.bfloat16)):
    pytest.skip("oneDNN has no bfloat16 products on this machine", allow_module_level=True)


def model_of(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*layers).to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_packed_product_is_the_plain_one_within_rounding(rows, bias):
    model = model_of(nn.Linear(576, 192, bias=bias))
    x = torch.randn(2, rows, 576, dtype=torch.bfloat16)
    wanted = nn.functional.linear(
        x.double(), model[0].weight.double(), model[0].bias.double() if bias else None
    )
    with packing(model).active():
        assert isinstance(model[0], PackedLinear)
        got = model(x)
    scale = wanted.abs().max()
    assert got.dtype == torch.bfloat16
    assert (got.double() - wanted).abs().max() < 2**-8 * scale


@torch.no_grad()
def test_model_has_its_own_layers_back_even_behind_an_error():
    model = model_of(nn.Linear(8, 8), nn.Linear(8, 8))
    layers, names = list(model), set(model.__dict__)
    with pytest.raises(RuntimeError, match="inside"), packing(model).active():
        raise RuntimeError("inside")
    assert all(a is b for a, b in zip(model, layers, strict=True))
    assert set(model.__dict__) == names


@torch.no_grad()
def test_changed_weights_are_packed_again():
    model = model_of(nn.Linear(16, 4, bias=False))
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    first = packing(model)
    assert packing(model) is first
    model[0].weight.mul_(2)
    with packing(model).active():
        doubled = model(x)
    assert torch.equal(doubled, model(x))


@torch.no_grad()
def test_weights_written_to_behind_torchs_back_are_packed_again():
    """As merged adapters are; and a bias that was replaced."""
    model = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16))
    first = packing(model)
    model[0].weight.data += 0.5
    second = packing(model)
    assert second is not first
    model[0].bias = nn.Parameter(torch.ones(32, dtype=torch.bfloat16))
    assert packing(model) is not second


def test_layer_used_twice_is_packed_once():
    shared = nn.Linear(8, 8)
    twins = [twin for *_, twin in packing(model_of(shared, nn.ReLU(), shared)).places]
    assert len(twins) == 2
    assert twins[0] is twins[1]


def test_packing_dies_with_its_model():
    model = model_of(nn.Linear(8, 8))
    seen = weakref.ref(packing(model).places[0][3])
    del model
    gc.collect()
    assert seen() is None


def test_only_bfloat16_on_cpu_is_packed():
    assert packing(model_of(nn.Linear(8, 8)).float()).places == []


def test_nothing_is_packed_where_memory_is_short(monkeypatch):
    monkeypatch.setattr("adaspec_eagle.packed.ROOM", 1e12)
    assert packing(model_of(nn.Linear(8, 8))).places == []


def test_generation_leaves_target_and_head_as_they_were():
    target = tiny_target(dtype=torch.bfloat16)
    head = tiny_head(target)
    modules = [id(m) for m in (*target.model.modules(), *head.modules())]
    generate(target, head, torch.tensor([[5, 6, 7]]), max_new_tokens=6)
    assert packing(target.model).places
    assert [id(m) for m in (*target.model.modules(), *head.modules())] == modules
