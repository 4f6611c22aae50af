"""The reference head's losses over all training records, computed once a stage.

The reference head is frozen and so are the records, so that every epoch would compute the same.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from adaspec_eagle.distill import (
    AnswerSet,
    Objective,
    collate,
    make_batch,
    step_losses,
    target_tokens,
)
from adaspec_eagle.features import length_batches
from adaspec_eagle.head import DraftHead
from adaspec_eagle.targets import Target


@torch.no_grad()
def reference_losses(
    target: Target,
    reference: DraftHead,
    answers: AnswerSet,
    objective: Objective,
    batch_tokens: int = 4096,
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yields (tokens done, what is known) after every batch; at last one `[T, S]` a record.

    Row p holds the losses of the S steps at position p, which predicts token p + 1 (float32, or
    float64 for float64 targets); rows that nothing supervises are zero. Records of like length run
    together, always the same ones, so that a run that is resumed finds the same numbers.
    """
    lengths = answers.lengths()
    found = [torch.empty(0)] * len(lengths)
    done = 0
    for chosen in length_batches(lengths, batch_tokens):
        batch = make_batch(target, reference, collate([answers[i] for i in chosen]))
        tokens = target_tokens(target, reference, batch, objective.needs_full)
        losses = step_losses(reference, objective, batch, tokens).distilled  # [S, M]
        table = losses.new_zeros(*batch.input_ids.shape, len(losses))  # [B, T, S]
        table[batch.rows, batch.positions] = losses.t()
        for row, i in zip(table.cpu(), chosen, strict=True):
            found[i] = row[: lengths[i]].clone()
            done += lengths[i]
        yield done, found
