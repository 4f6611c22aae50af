"""What training needs from the target, computed once, read many times; here: in memory.

Legend: T tokens of a record, W width of a table row, F number of feature layers, H hidden size.
"""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from adaspec_eagle.processes import process_count
from adaspec_eagle.targets import Target

MODES = ("memory", "disk", "recompute")


def row_width(target: Target, layers: Sequence[int]) -> int:
    """Numbers kept a token: the chosen layers and, unless it is among them, the last hidden."""
    extra = 0 if target.num_layers in layers else 1
    return (len(layers) + extra) * target.hidden_size


@torch.no_grad()
def target_rows(target: Target, input_ids: Tensor, layers: Sequence[int]) -> Tensor:
    """One causal pass over right-padded ids `[B, T]` -> features and last hidden `[B, T, W]`."""
    positions = torch.arange(input_ids.shape[1], device=target.device).expand_as(input_ids)
    wanted = list(layers) if target.num_layers in layers else [*layers, target.num_layers]
    out = target.forward(
        input_ids.to(target.device), positions, feature_layers=wanted, logits=False
    )
    return out.features


def split_rows(rows: Tensor, target: Target, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows `[B, T, W]` -> what the head fuses `[B, T, F H]`, last hidden states `[B, T, H]`."""
    features = rows[..., : len(layers) * target.hidden_size]
    where = layers.index(target.num_layers) if target.num_layers in layers else len(layers)
    hidden = rows[..., where * target.hidden_size : (where + 1) * target.hidden_size]
    return features, hidden


def target_pass(
    target: Target, ids: Sequence[Sequence[int]], layers: Sequence[int]
) -> list[Tensor]:
    """Rows `[T, W]` of each of these records, on the CPU, by one pass over all of them."""
    padded = pad_sequence([torch.tensor(record) for record in ids], batch_first=True)
    rows = target_rows(target, padded, layers).cpu()
    return [found[: len(record)] for found, record in zip(rows, ids, strict=True)]


@dataclass
class FeatureTable:
    """Rows of all records one after the other, in memory."""

    rows: Tensor  # [tokens of all records, W], in the target's dtype
    offsets: list[int]  # record i: rows offsets[i] .. offsets[i + 1]

    def __getitem__(self, index: int) -> Tensor:
        """`[T, W]` of record `index`."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]]

    def split(self, count: int) -> "tuple[FeatureTable, FeatureTable]":
        """The first `count` records, and the others."""
        first, rest = self.offsets[: count + 1], self.offsets[count:]
        return FeatureTable(self.rows, first), FeatureTable(self.rows, rest)


def padded_rows(rows: Tensor | Sequence[Tensor | Future[Tensor]]) -> Tensor:
    """A batch's rows `[B, T, W]`, once those are there that are still being read."""
    if isinstance(rows, Tensor):
        return rows
    there = [row if isinstance(row, Tensor) else row.result() for row in rows]
    return torch.nn.utils.rnn.pad_sequence(there, batch_first=True)


def choose_mode(lengths: Sequence[int], width: int, dtype: torch.dtype, folder: Path) -> str:
    """Where features fit: a third of the free memory, else half of the free disk, else nowhere."""
    size = sum(lengths) * width * dtype.itemsize
    if size < psutil.virtual_memory().available / 3 / process_count():
        return "memory"
    return "disk" if size < shutil.disk_usage(folder).free / 2 else "recompute"


def make_table(
    target: Target, ids: Sequence[Sequence[int]], layers: Sequence[int], batch_tokens: int = 4096
) -> Iterator[tuple[int, FeatureTable]]:
    """Fill a table in memory for the records' token ids; yields (tokens done, table)."""
    offsets, done = [0, *accumulate(len(record) for record in ids)], 0
    rows = torch.empty(offsets[-1], row_width(target, layers), dtype=target.dtype)
    table = FeatureTable(rows, offsets)
    for batch in target_batches(ids, batch_tokens):
        found = target_pass(target, [ids[i] for i in batch], layers)
        for i, row in zip(batch, found, strict=True):
            table[i].copy_(row)
            done += len(row)
        yield done, table


def target_batches(ids: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of records of like length that run through the target together.

    The same batches for the same records in whatever order they come: rounding depends on them.
    """
    order = sorted(range(len(ids)), key=lambda i: list(ids[i]))
    for batch in length_batches([len(ids[i]) for i in order], batch_tokens):
        yield [order[i] for i in batch]


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices grouped by length, the longest first, at most `batch_tokens` padded tokens each."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
