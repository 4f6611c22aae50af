"""Muon with AdamW as one optimiser; fresh heads that start from the target's last layer."""

import pytest
import torch
from torch import nn

from adaspec_eagle.head import HeadConfig, built_in_heads, new_head
from adaspec_eagle.optim import OPTIMIZERS, MuonInOwnType, make_optimizer, newton_schulz
from tests.tiny import ARCHITECTURES, tiny_target


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds) -> None:
    for seed in seeds:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_state_goes_on_to_the_bit(name):
    whole, cut = model_of(), model_of()
    steps(whole, make_optimizer(name, whole, 1e-2, torch.bfloat16), range(6))
    first = make_optimizer(name, cut, 1e-2, torch.bfloat16)
    steps(cut, first, range(3))
    second = make_optimizer(name, cut, 1e-2, torch.bfloat16)
    second.load_state_dict(first.state_dict())
    steps(cut, second, range(3, 6))
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_muon_in_its_own_type_is_torchs_but_for_rounding(shape, nesterov):
    """Also where one goes on from the state of the other."""
    torch.manual_seed(0)
    given = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    given |= {"nesterov": nesterov}
    start, grads = torch.randn(shape), torch.randn(4, *shape)
    ends = []
    for kinds in ([torch.optim.Muon] * 2, [MuonInOwnType] * 2, [torch.optim.Muon, MuonInOwnType]):
        weight, state = nn.Parameter(start.clone()), None
        for kind, half in zip(kinds, grads.split(2), strict=True):
            optimizer = kind([weight], **given)
            if state:
                optimizer.load_state_dict(state)
            for grad in half:
                weight.grad = grad.clone()
                optimizer.step()
            state = optimizer.state_dict()
        ends.append(weight.detach())
    wanted = ends[0]
    assert (wanted - start).abs().mean() > 0.02
    for found in ends[1:]:
        assert (found - wanted).abs().max() < 0.02 * (wanted - start).abs().max()


def test_newton_schulz_brings_singular_values_near_one():
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = ((3.4445, -4.775, 2.0315), 5, 1e-7)
    found = newton_schulz(matrix, *given)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert ((left.T @ found @ right.T).diagonal() > 0.6).all()  # the same directions
    assert torch.allclose(newton_schulz(matrix.T, *given), found.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_computes_in_bfloat16_where_the_target_does(dtype):
    """Whatever the machine: cells of one dtype are trained alike."""
    muon, _ = make_optimizer("muon", model_of(), 0.1, dtype).parts
    assert type(muon) is (torch.optim.Muon if dtype == torch.bfloat16 else MuonInOwnType)


def test_muon_takes_matrices_and_adamw_the_rest():
    model = model_of()
    optimizer = make_optimizer("muon", model, 0.5, torch.bfloat16)
    muon, adamw = optimizer.parts
    assert {id(p) for p in muon.param_groups[0]["params"]} == {
        id(model[0].weight),
        id(model[2].weight),
    }
    assert len(adamw.param_groups[0]["params"]) == 4
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    optimizer.param_groups[0]["lr"] = 0.0  # what a schedule does
    before = model[0].weight.clone()
    steps(model, optimizer, [0])
    assert torch.equal(model[0].weight, before)


def test_output_rows_are_left_to_adamw():
    model = nn.ModuleDict(
        {"fc": nn.Linear(3, 3, bias=False), "lm_head": nn.Linear(3, 5, bias=False)}
    )
    muon, adamw = make_optimizer("muon", model, 0.1, torch.float32).parts
    assert adamw.param_groups[0]["params"] == [model["lm_head"].weight]


def test_head_starts_from_the_last_layer():
    target = tiny_target("llama")
    last = target.model.model.layers[-1]
    config = HeadConfig.for_target("eagle3", target, 40)
    head, drawn = new_head(config, seed=1), new_head(config, seed=1)
    head.start_from(target)
    assert torch.equal(head.midlayer.mlp.up_proj.weight, last.mlp.up_proj.weight.float())
    wide, narrow = head.midlayer.self_attn.k_proj.weight, last.self_attn.k_proj.weight.float()
    assert torch.equal(wide[:, 32:], narrow)
    assert torch.equal(wide[:, :32], drawn.midlayer.self_attn.k_proj.weight[:, :32] / 2)
    assert torch.equal(head.midlayer.hidden_norm.weight, last.input_layernorm.weight.float())
    assert torch.equal(head.norm.weight, target.model.model.norm.weight.float())
    untouched = head.midlayer.input_layernorm.weight
    assert torch.equal(untouched, torch.ones_like(untouched))


def test_fusing_layer_starts_near_the_identity_on_its_last_input():
    target = tiny_target("llama")
    for name in ("eagle1", "eagle3"):
        head = new_head(HeadConfig.for_target(name, target, 40), seed=1)
        head.start_from(target)
        inputs = torch.zeros(1, head.fc.in_features)
        inputs[:, -32:] = torch.randn(1, 32)
        assert torch.allclose(head.fc(inputs), inputs[:, -32:], atol=0.3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", built_in_heads())
def test_any_target_can_be_started_from(arch, name):
    target = tiny_target(arch)
    head = new_head(HeadConfig.for_target(name, target, 40), seed=1)
    head.start_from(target)
    assert all(torch.isfinite(weight).all() for weight in head.parameters())
