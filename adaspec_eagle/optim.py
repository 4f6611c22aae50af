"""The optimiser: Muon for matrices, AdamW for the rest.

Muon (Jordan et al. 2024; scaled as in Liu et al., arXiv 2502.16982, so that AdamW's learning rates
serve) orthogonalises the momentum of each weight matrix. At equal tokens it brings a draft head
much further than AdamW does (results/LOG.md).
"""

from typing import Any

import torch
from torch import nn

OPTIMIZERS = {"muon": 3e-3, "adamw": 1e-3}  # name -> learning rate by default
BETAS = (0.9, 0.95)


def make_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """An optimiser of OPTIMIZERS over the model's trainable weights, without weight decay."""
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
        muon = torch.optim.Muon(inner, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        parts.append(muon)
    if others:
        parts.append(torch.optim.AdamW(others, lr=lr, betas=BETAS, weight_decay=0.0))
    return Together(parts)


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
