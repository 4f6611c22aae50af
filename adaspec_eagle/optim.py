"""The optimiser: Muon for matrices, AdamW for the rest.

Muon (Jordan et al. 2024; scaled as in Liu et al., arXiv 2502.16982, so that AdamW's learning rates
serve) orthogonalises the momentum of each weight matrix. At equal tokens it brings a draft head
much further than AdamW does (results/LOG.md).
"""

from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS = {"muon": 3e-3, "adamw": 1e-3}  # name -> learning rate by default
BETAS = (0.9, 0.95)


def make_optimizer(
    name: str, model: nn.Module, lr: float, dtype: torch.dtype
) -> torch.optim.Optimizer:
    """An optimiser of OPTIMIZERS over the model's trainable weights, without weight decay.

    dtype: what the target computes in, on which Muon's products depend: bfloat16, or the weights'
    own type.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(weights, lr=lr, betas=BETAS, weight_decay=0.0)
    matrices = {
        id(m.weight)
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear) and path.rpartition(".")[2] != "lm_head"
    }
    inner = [p for p in weights if id(p) in matrices]
    others = [p for p in weights if id(p) not in matrices]
    parts: list[torch.optim.Optimizer] = []
    if inner:
        kind = torch.optim.Muon if dtype == torch.bfloat16 else MuonInOwnType
        parts.append(kind(inner, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    if others:
        parts.append(torch.optim.AdamW(others, lr=lr, betas=BETAS, weight_decay=0.0))
    return Together(parts)


class MuonInOwnType(torch.optim.Muon):
    """Muon whose Newton-Schulz products are of the momentum's own type; state as torch's.

    torch's are always in bfloat16, which a CPU that has no units for it multiplies some 400 times
    slower than float32: minutes a step. Scales as `adjust_lr_fn="match_rms_adamw"` alone.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                kept = state["momentum_buffer"]
                kept.lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(kept, group["momentum"]) if group["nesterov"] else kept
                made = newton_schulz(
                    ahead, group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * max(weight.shape) ** 0.5
                weight.add_(made, alpha=-group["lr"] * scale)


def newton_schulz(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, `[M, N]` in the type of `matrix` `[M, N]`.

    X <- a X + (b A + c A A) X with A = X X^T, from X = matrix / its Frobenius norm: singular values
    that are not tiny go to between 0.7 and 1.2 (Jordan et al. 2024).
    """
    a, b, c = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T


class Together(torch.optim.Optimizer):
    """Several optimisers over different weights that step, save and load as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each; a closure is not supported."""
        assert closure is None
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The parts' own, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
