"""The feature table: what training needs from the target, computed once, read many times.

Legend: T tokens of a record, W width of a table row, F number of feature layers, H hidden size.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adaspec_eagle.errors import UserError
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


@dataclass
class FeatureTable:
    """Rows of all records one after the other, in memory or in one mapped file."""

    rows: Tensor  # [tokens of all records, W], in the target's dtype
    offsets: list[int]  # record i: rows offsets[i] .. offsets[i + 1]

    def __getitem__(self, index: int) -> Tensor:
        """`[T, W]` of record `index`."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]]


def choose_mode(lengths: Sequence[int], width: int, dtype: torch.dtype, folder: Path) -> str:
    """Where features fit: a third of the free memory, else half of the free disk, else nowhere."""
    size = table_bytes(lengths, width, dtype)
    if size < free_memory() / 3 / process_count():
        return "memory"
    return "disk" if size < shutil.disk_usage(folder).free / 2 else "recompute"


def table_bytes(lengths: Sequence[int], width: int, dtype: torch.dtype) -> int:
    """Size of a table in bytes."""
    return sum(lengths) * width * dtype.itemsize


def free_memory() -> int:
    """Bytes of memory that can still be had (Linux); elsewhere a guess of 4 GB."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return 4 * 10**9
    lines = dict(line.split(":") for line in info.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def make_table(
    target: Target,
    ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    file: Path | None = None,
    batch_tokens: int = 4096,
) -> Iterator[tuple[int, FeatureTable]]:
    """Fill a table for the records' token ids; yields (tokens done, table) after every batch.

    In memory, or in `file` if given (mapped; made anew). Records of like length run together.
    """
    table, done = open_table(target, ids, layers, file), 0
    for batch in length_batches([len(record) for record in ids], batch_tokens):
        longest = max(len(ids[i]) for i in batch)
        padded = torch.zeros(len(batch), longest, dtype=torch.long)
        for b, i in enumerate(batch):
            padded[b, : len(ids[i])] = torch.tensor(ids[i])
        rows = target_rows(target, padded, layers).cpu()
        for b, i in enumerate(batch):
            table[i].copy_(rows[b, : len(ids[i])])
            done += len(ids[i])
        yield done, table


def open_table(
    target: Target, ids: Sequence[Sequence[int]], layers: Sequence[int], file: Path | None = None
) -> FeatureTable:
    """The table of these records: empty in memory, or as it is in `file`."""
    offsets = [0]
    for record in ids:
        offsets.append(offsets[-1] + len(record))
    shape = (offsets[-1], row_width(target, layers))
    return FeatureTable(_storage(shape, target.dtype, file), offsets)


def _storage(shape: tuple[int, int], dtype: torch.dtype, file: Path | None) -> Tensor:
    if file is None:
        return torch.empty(shape, dtype=dtype)
    count = shape[0] * shape[1]
    free = shutil.disk_usage(file.parent).free + (file.stat().st_size if file.exists() else 0)
    if count * dtype.itemsize > free:
        raise UserError(
            f"{file} needs {count * dtype.itemsize / 1e9:.1f} GB for features, the disk has "
            f"{free / 1e9:.1f} GB; use --features recompute, or fewer records"
        )
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)


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
