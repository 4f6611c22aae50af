"""Packed linear layers: the same products, the model untouched, changed weights seen."""

import gc
import weakref

import pytest
import torch
from torch import nn

from adaspec_eagle import generate
from adaspec_eagle.packed import PackedLinear, Part, packing, weights_state
from tests.tiny import tiny_head, tiny_target

if not torch.backends.mkldnn.is_available():
    pytest.skip("this build of torch has no oneDNN", allow_module_level=True)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The types that are packed, where the machine has them."""
    if request.param == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 products on this machine")
    return request.param


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within rounding: of bfloat16, or what torch takes float32 to have."""
    room = {"atol": 0.04, "rtol": 0.01} if wanted.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, wanted, **room)


def model_of(dtype: torch.dtype, *layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*layers).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_packed_product_is_the_plain_one_within_rounding(dtype, rows, bias):
    model = model_of(dtype, nn.Linear(576, 192, bias=bias))
    x = torch.randn(2, rows, 576, dtype=dtype)
    wanted = nn.functional.linear(
        x.double(), model[0].weight.double(), model[0].bias.double() if bias else None
    )
    with packing(model).active():
        assert isinstance(model[0], PackedLinear)
        got = model(x)
    scale = wanted.abs().max()
    assert got.dtype == dtype
    room = 2**-8 if dtype == torch.bfloat16 else 2**-19  # float32: rounding of some hundred sums
    assert (got.double() - wanted).abs().max() < room * scale


class Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, n, bias=bias) for n in (64, 32, 32))

    def forward(self, x: torch.Tensor, order: str) -> dict[str, torch.Tensor]:
        return {name: getattr(self, f"{name}_proj")(x) for name in order}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", ["qkv", "vqk", "k"])
@torch.no_grad()
def test_layers_of_one_input_are_computed_together_in_any_order(dtype, bias, order):
    model = model_of(dtype, Attention(bias))[0]
    first, second = torch.randn(2, 3, 64, dtype=dtype)
    for x in (first, second, second):  # nothing of one input is given for another
        wanted = model(x, order)
        with packing(model).active():
            assert type(model.q_proj) is Part
            got = model(x, order)
        for name in order:
            assert_close(got[name], wanted[name])


@torch.no_grad()
def test_a_result_is_given_once(dtype):
    """So that an input which was written to in between is not answered with old results."""
    model = model_of(dtype, Attention(False))[0]
    x = torch.randn(3, 64, dtype=dtype)
    with packing(model).active():
        model.k_proj(x)
        x.zero_()
        assert not model.k_proj(x).any()
        model.q_proj(x), model.v_proj(x)
        assert model.q_proj.together.last == (None, {})


@torch.no_grad()
def test_layers_that_differ_in_form_stand_alone(dtype):
    model = model_of(dtype, Attention(False))[0]
    model.k_proj = nn.Linear(64, 32, bias=True, dtype=dtype)
    with packing(model).active():
        assert type(model.q_proj) is PackedLinear


@torch.no_grad()
def test_output_rows_of_a_head_are_packed_and_packed_again(dtype):
    head = tiny_head(tiny_target(dtype=dtype))
    hidden = torch.randn(3, head.config.hidden_size, dtype=dtype)
    before = head.logits(hidden)
    with packing(head).active():
        assert isinstance(head.projection, PackedLinear)
        assert_close(head.logits(hidden), before)
    head.output_rows.mul_(2)
    with packing(head).active():
        assert_close(head.logits(hidden), 2 * before)


@pytest.mark.parametrize("name", ["lm:layers=2", "eagle3"])
@torch.no_grad()
def test_output_rows_of_a_heads_own_layer_are_packed_where_they_are_used(dtype, name):
    target = tiny_target(dtype=dtype)
    head = tiny_head(target, name, train_output=name == "eagle3")
    hidden = torch.randn(3, head.config.hidden_size, dtype=dtype)
    before = head.logits(hidden)
    with packing(head).active():
        assert type(head.lm_head) is nn.Linear
        assert_close(head.logits(hidden), before)


@torch.no_grad()
def test_model_has_its_own_layers_back_even_behind_an_error(dtype):
    model = model_of(dtype, nn.Linear(8, 8), nn.Linear(8, 8))
    layers, names = list(model), set(model.__dict__)
    with pytest.raises(RuntimeError, match="inside"), packing(model).active():
        raise RuntimeError("inside")
    assert all(a is b for a, b in zip(model, layers, strict=True))
    assert set(model.__dict__) == names


@torch.no_grad()
def test_a_block_within_a_block_leaves_the_packed_layers_in_place(dtype):
    model = model_of(dtype, nn.Linear(8, 8))
    own = model[0]
    with packing(model).active():
        with packing(model).active():
            pass
        assert isinstance(model[0], PackedLinear)
    assert model[0] is own


@torch.no_grad()
def test_changed_weights_are_packed_again(dtype):
    model = model_of(dtype, nn.Linear(16, 4, bias=False))
    x = torch.ones(1, 16, dtype=dtype)
    first = packing(model)
    assert packing(model) is first
    model[0].weight.mul_(2)
    with packing(model).active():
        doubled = model(x)
    room = {} if dtype == torch.float32 else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(doubled, model(x), **room)


@torch.no_grad()
def test_weights_written_to_behind_torchs_back_are_packed_again(dtype):
    """As merged adapters are; and a bias that was replaced."""
    model = nn.Sequential(nn.Linear(64, 32, dtype=dtype))
    first = packing(model)
    model[0].weight.data += 0.5
    second = packing(model)
    assert second is not first
    model[0].bias = nn.Parameter(torch.ones(32, dtype=dtype))
    assert packing(model) is not second


@pytest.mark.parametrize(("rows", "columns"), [(64, 16), (16, 64), (8, 8), (1, 8), (8, 1), (2, 3)])
def test_one_row_or_column_written_to_behind_torchs_back_is_seen(rows, columns):
    weight = torch.zeros(rows, columns)
    before = weights_state([weight])
    for place in [*((row,) for row in range(rows)), *((slice(None), n) for n in range(columns))]:
        weight.data[place] = 1
        assert weights_state([weight]) != before
        weight.data.zero_()
    assert weights_state([weight]) == before


def test_a_number_alone_has_a_state_too():
    number = torch.tensor(1.0)
    before = weights_state([number])
    number.data += 1
    assert weights_state([number]) != before


@torch.no_grad()
def test_a_layer_with_a_hook_is_not_packed(dtype):
    """Whenever it comes, and whether its layer stands alone or together with others."""
    model = model_of(dtype, Attention(False))[0]
    x = torch.randn(3, 64, dtype=dtype)
    plain = model(x, "qkv")
    assert packing(model).places
    hook = model.k_proj.register_forward_hook(lambda layer, given, out: out + 1)
    with packing(model).active():
        assert type(model.q_proj) is PackedLinear
        steered = model(x, "qkv")
    for name, more in (("q", 0), ("k", 1), ("v", 0)):
        assert_close(steered[name], plain[name] + more)
    hook.remove()
    with packing(model).active():
        assert type(model.k_proj) is Part
        assert model.k_proj.weight.shape == (32, 64)


@torch.no_grad()
def test_a_forward_of_its_own_is_kept(dtype):
    model = model_of(dtype, nn.Linear(8, 8))
    model[0].forward = lambda x: 2 * x
    with packing(model).active():
        assert torch.equal(model(torch.ones(1, 8, dtype=dtype)), torch.full((1, 8), 2.0).to(dtype))


def test_layer_used_twice_is_packed_once(dtype):
    shared = nn.Linear(8, 8)
    twins = [twin for *_, twin in packing(model_of(dtype, shared, nn.ReLU(), shared)).places]
    assert len(twins) == 2
    assert twins[0] is twins[1]


def test_packing_dies_with_its_model(dtype):
    model = model_of(dtype, nn.Linear(8, 8))
    seen = weakref.ref(packing(model).places[0][3])
    del model
    gc.collect()
    assert seen() is None


def test_what_is_exact_is_not_packed():
    assert packing(model_of(torch.float64, nn.Linear(8, 8))).places == []


def test_nothing_is_packed_where_memory_is_short(dtype, monkeypatch):
    monkeypatch.setattr("adaspec_eagle.packed.ROOM", 1e12)
    assert packing(model_of(dtype, nn.Linear(8, 8))).places == []


def test_generation_leaves_target_and_head_as_they_were(dtype):
    target = tiny_target(dtype=dtype)
    head = tiny_head(target)
    modules = [id(m) for m in (*target.model.modules(), *head.modules())]
    generate(target, head, torch.tensor([[5, 6, 7]]), max_new_tokens=6)
    assert packing(target.model).places
    assert [id(m) for m in (*target.model.modules(), *head.modules())] == modules


def test_a_steered_target_is_followed():
    """A hook set behind the first decode counts in every round, drafted or not."""
    target = tiny_target(dtype=torch.float32)
    head, ids = tiny_head(target), torch.tensor([[5, 6, 7]])
    before = generate(target, head, ids, max_new_tokens=12).sequences
    layer = target.model.model.layers[0].self_attn.o_proj
    hook = layer.register_forward_hook(lambda layer, given, out: 3 - 2 * out)
    wanted = target.model.generate(ids, max_new_tokens=12, do_sample=False)
    assert not torch.equal(wanted, before)
    for drafted in (head, None):
        assert torch.equal(generate(target, drafted, ids, max_new_tokens=12).sequences, wanted)
    hook.remove()
    assert torch.equal(generate(target, head, ids, max_new_tokens=12).sequences, before)
