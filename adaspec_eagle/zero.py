"""DeepSpeed ZeRO: optimiser state, gradients and weights split over the processes.

Stages 1 and 2 split the head's optimiser state and gradients. Stage 3 also splits weights: those of
the head that is trained, by the Trainer's engine, and here those of the frozen target and reference
head, as engines of their own without an optimiser. deepspeed is imported only where it is used.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaspec_eagle.errors import UserError
from adaspec_eagle.targets import Target


def zero_stage() -> int:
    """The stage that `accelerate launch` was told: 1, 2 or 3, and 0 without DeepSpeed.

    Raises UserError where DeepSpeed is asked for and not installed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return 0
    if not deepspeed_installed():
        raise UserError(
            "this launch asks for DeepSpeed, which is not installed: pip install deepspeed, or "
            "launch with scripts/accelerate/data_parallel.yaml"
        )
    from accelerate.utils import DeepSpeedPlugin

    return int(DeepSpeedPlugin().zero_stage)


def deepspeed_installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("deepspeed") is not None


def split_frozen(module: nn.Module) -> None:
    """Leave each process a share of a frozen module's weights, all of one dtype.

    They are gathered for every layer's forward, so that all processes must make the same calls.
    Raises UserError for weights of several dtypes.
    """
    dtype, *others = sorted({weight.dtype for weight in module.parameters()}, key=str)
    if others:
        raise UserError(
            f"weights in {', '.join(map(str, (dtype, *others)))}: ZeRO 3 splits those of one dtype "
            "only; give --dtype, or launch with scripts/accelerate/zero2.yaml"
        )
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    deepspeed.initialize(model=module.requires_grad_(False), config=config)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside the block all processes see the whole of weights that are split."""
    split = [weight for weight in module.parameters() if hasattr(weight, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield


class SplitTarget(Target):
    """A target whose layers are split over the processes (ZeRO 3).

    Embedding and output rows are taken out beforehand and stay whole: heads borrow them, and logits
    are made in chunks whose number differs from process to process, so that nothing may be gathered
    for them.
    """

    def __init__(self, target: Target) -> None:
        self.__dict__.update(target.__dict__)
        bias = target.output_bias
        self.borrowed = (  # their memory stays when the weights are split
            target.embedding.detach(),
            target.output_rows.detach(),
            None if bias is None else bias.detach(),
        )
        split_frozen(self.model.base_model)

    @property
    def embedding(self) -> Tensor:
        """The input embedding's rows `[V, H]`."""
        return self.borrowed[0]

    @property
    def output_rows(self) -> Tensor:
        """The output layer's rows `[V, H]`."""
        return self.borrowed[1]

    @property
    def output_bias(self) -> Tensor | None:
        """The output layer's bias `[V]`, for targets that have one (Phi)."""
        return self.borrowed[2]

    def logits(self, hidden: Tensor) -> Tensor:
        """As Target's, from the rows that stayed whole."""
        return functional.linear(hidden, self.output_rows, self.output_bias)
