"""The feature store: what heads read from the target, written to disk once and streamed back.

A folder of shards in safetensors and `index.jsonl`: a line about the target and the form of the
rows, then a line a shard with its records and their checksums. A shard is written aside, renamed,
and only then named by the index, so that a kill loses no more than the shard in hand. A record is
known by its token ids: any files can be trained on whose records are in the store.

Legend: T tokens of a record, W width of a row (features.py).
"""

import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import reduce
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adaspec_eagle.data import Record, append_jsonl, mend_jsonl, numbered_lines
from adaspec_eagle.errors import UserError, first_line
from adaspec_eagle.features import row_width, target_batches, target_pass
from adaspec_eagle.record import one_line, write_text
from adaspec_eagle.targets import Target, parse_dtype

INDEX = "index.jsonl"
FORMS = ("bfloat16", "int8")  # int8: with a scale for every GROUP numbers of a row
GROUP = 64
SHARD_BYTES = 1 << 28


@dataclass(frozen=True)
class Form:
    """What all rows of a store have in common; the first line of its index."""

    target: str
    fingerprint: str
    layers: list[int]  # hidden_states indices, as features.target_rows takes them
    dtype: str  # int8, or a torch dtype by name


@dataclass(frozen=True)
class Shard:
    """One file of a store; a line of its index."""

    file: str
    bytes: int
    keys: list[str]  # of its records
    names: list[str]  # their ids in the files of answers
    checksums: list[int]  # CRC-32 of each record's tensors


def record_key(ids: Sequence[int]) -> str:
    """A digest of the token ids."""
    return blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=12).hexdigest()


def token_bytes(target: Target, layers: Sequence[int], dtype: str) -> int:
    """Bytes that a token takes in a store of that form."""
    width = row_width(target, layers)
    if dtype == "int8":
        return width + 2 * (width // math.gcd(width, GROUP))
    found = parse_dtype(dtype)
    assert found is not None
    return width * found.itemsize


# ---- rows and their form on disk -----------------------------------------------------------------


def pack(rows: Tensor, dtype: str) -> dict[str, Tensor]:
    """Rows `[T, W]` as a store keeps them: `rows`, and for int8 `scales` (bfloat16)."""
    if dtype != "int8":
        return {"rows": rows.to(parse_dtype(dtype)).contiguous()}
    groups = rows.float().unflatten(-1, (-1, math.gcd(rows.shape[-1], GROUP)))
    scales = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30).bfloat16()
    whole = (groups / scales.float()).round().clamp(-127, 127).to(torch.int8)
    return {"rows": whole.flatten(1), "scales": scales[..., 0]}


def unpack(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Rows `[T, W]` of what `pack` gave."""
    if "scales" not in parts:
        return parts["rows"].to(dtype, copy=True)
    scales = parts["scales"].float()[..., None]  # [T, groups, 1]
    groups = parts["rows"].unflatten(-1, (scales.shape[1], -1))
    return (groups * scales).flatten(1).to(dtype)


def checksum(parts: Mapping[str, Tensor]) -> int:
    """CRC-32 of the tensors' bytes, in the order of their names."""
    views = [parts[name].view(torch.uint8).numpy() for name in sorted(parts)]
    return reduce(lambda found, view: zlib.crc32(view.data, found), views, 0)


# ---- the store -----------------------------------------------------------------------------------


class FeatureStore:
    """A store that is there. Raises UserError for a folder without one."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        if not index.exists():
            raise UserError(
                f"no feature store in {folder} ({INDEX} is missing); write one: python "
                f"scripts/make_data.py --write-features {folder} --data FILES"
            )
        lines = [item for _, item in numbered_lines(index)]
        self.form = Form(**lines[0])
        self._take([Shard(**line) for line in lines[1:]])

    def _take(self, shards: list[Shard]) -> None:
        self.shards = shards
        self.places = {key: (shard, n) for shard in shards for n, key in enumerate(shard.keys)}

    def check_sizes(self) -> None:
        """Raise UserError for a shard that is missing or cut short: all that is seen at a look."""
        for shard in self.shards:
            path = self.folder / shard.file
            if not path.exists() or path.stat().st_size != shard.bytes:
                raise UserError(self._damaged(shard, "missing or cut short"))

    def check_form(self, target: Target, layers: Sequence[int]) -> None:
        """Raise UserError if the rows are another target's, or of other layers."""
        if self.form.fingerprint != target.fingerprint:
            raise UserError(
                f"the features in {self.folder} are those of {self.form.target} with weights "
                f"{self.form.fingerprint}; target {target.name} has weights {target.fingerprint}. "
                "Write a store for it in another folder"
            )
        if self.form.layers != list(layers):
            raise UserError(
                f"the features in {self.folder} are hidden states {self.form.layers}, this head "
                f"reads {list(layers)}; write a store with its --head in another folder"
            )

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """Rows `[T, W]` of a record, checked. Raises UserError if the shard is damaged."""
        shard, n = self.places[key]
        try:
            with safe_open(self.folder / shard.file, "pt") as file:
                names = ["rows", "scales"] if self.form.dtype == "int8" else ["rows"]
                parts = {name: file.get_tensor(f"{key}.{name}") for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(self._damaged(shard, first_line(error))) from error
        if checksum(parts) != shard.checksums[n]:
            raise UserError(self._damaged(shard, f"wrong checksum of record {shard.names[n]}"))
        return unpack(parts, dtype)

    def rows_of(self, records: Sequence[Record], target: Target) -> "StoredRows":
        """Their rows, for training. Raises UserError if the store does not have them all."""
        keys = [record_key(record.ids) for record in records]
        missing = [r.id for r, key in zip(records, keys, strict=True) if key not in self.places]
        if missing:
            raise UserError(
                f"{self.folder} has no features of {len(missing)} of {len(records)} records "
                f"({_listed(missing)}); add them: python scripts/make_data.py --write-features "
                f"{self.folder} --data FILES, with the --max-length of the training"
            )
        return StoredRows(self, keys, target.dtype)

    def mend(self) -> list[str]:
        """Read all, forget and delete damaged shards; what was wrong with each."""
        wrong = {shard.file: self._fault(shard) for shard in self.shards}
        found = [text for text in wrong.values() if text]
        if found:
            whole = [shard for shard in self.shards if not wrong[shard.file]]
            lines = [one_line(asdict(self.form)), *(one_line(asdict(shard)) for shard in whole)]
            write_text(self.folder / INDEX, "\n".join(lines) + "\n")
            for file in (name for name, fault in wrong.items() if fault):
                (self.folder / file).unlink(missing_ok=True)
            self._take(whole)
        return found

    def _fault(self, shard: Shard) -> str | None:
        try:
            for key in shard.keys:
                self.read(key, torch.float32)
        except UserError as error:
            return str(error)
        return None

    def _damaged(self, shard: Shard, why: str) -> str:
        return (
            f"{self.folder / shard.file} is damaged ({why}). The features of its "
            f"{len(shard.keys)} records ({_listed(shard.names)}) must be written again: run the "
            f"make_data.py --write-features {self.folder} command as before, which redoes just them"
        )

    def append(self, parts: Mapping[str, dict[str, Tensor]], names: Mapping[str, str]) -> None:
        """A further shard of packed rows by key, with the records' names."""
        number = max((int(s.file.split("-")[1].split(".")[0]) for s in self.shards), default=0) + 1
        path, aside = (self.folder / f"shard-{number:05}.safetensors", self.folder / "writing.tmp")
        tensors = {f"{key}.{name}": t for key, found in parts.items() for name, t in found.items()}
        save_file(tensors, aside, metadata={"format": "pt"})
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        sums = [checksum(found) for found in parts.values()]
        shard = Shard(path.name, path.stat().st_size, list(parts), [names[k] for k in parts], sums)
        append_jsonl(self.folder / INDEX, [asdict(shard)])
        self.shards.append(shard)
        self.places |= {key: (shard, n) for n, key in enumerate(shard.keys)}


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass
class StoredRows:
    """Rows of some records of a store, read in a thread: training goes on while they come.

    The loader asks for a batch while the one before it is trained on, so that memory holds the
    batches of a step and one more, however large the store.
    """

    store: FeatureStore
    keys: list[str]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="features")

    def __getitem__(self, index: int) -> Future[Tensor]:
        """`[T, W]` of record `index`, to come."""
        return self.reader.submit(self.store.read, self.keys[index], self.dtype)

    def split(self, count: int) -> "tuple[StoredRows, StoredRows]":
        """The first `count` records, and the others."""
        first, rest = self.keys[:count], self.keys[count:]
        return StoredRows(self.store, first, self.dtype), StoredRows(self.store, rest, self.dtype)


# ---- writing -------------------------------------------------------------------------------------


def open_for_writing(
    folder: Path, target: Target, layers: Sequence[int], dtype: str
) -> FeatureStore:
    """A store to write to: a new one, or the one that is there if its form is the same."""
    if not mend_jsonl(folder / INDEX):
        form = Form(target.name, target.fingerprint, list(layers), dtype)
        write_text(folder / INDEX, one_line(asdict(form)) + "\n")
    store = FeatureStore(folder)
    store.check_form(target, layers)
    if store.form.dtype != dtype:
        raise UserError(
            f"{folder} holds features in {store.form.dtype}, not {dtype}; choose another folder"
        )
    return store


def missing_records(store: FeatureStore, records: Sequence[Record]) -> dict[str, Record]:
    """Records that the store does not have, by key."""
    found = {record_key(record.ids): record for record in records}
    return {key: record for key, record in found.items() if key not in store.places}


def check_room(folder: Path, needed: int) -> None:
    """Raise UserError if the disk has less than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the features need {needed / 2**30:.2f} GiB, the disk of {folder} has "
            f"{free / 2**30:.2f}; write them elsewhere or as int8, train with --features "
            "recompute, or take fewer records"
        )


def write_features(
    store: FeatureStore,
    target: Target,
    records: Sequence[Record],
    batch_tokens: int = 4096,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[tuple[int, FeatureStore]]:
    """Add the rows of those records that are missing; yields (tokens written, store).

    The records of one command run through the target in the same batches whether or not it was
    killed in between, so that the rows are the same to the bit.
    """
    found = {record_key(record.ids): record for record in records}
    keys, ids = list(found), [record.ids for record in found.values()]
    pending: dict[str, dict[str, Tensor]] = {}
    size = done = 0
    for batch in target_batches(ids, batch_tokens):
        wanted = [i for i in batch if keys[i] not in store.places]
        if not wanted:
            continue
        rows = target_pass(target, [ids[i] for i in batch], store.form.layers)
        made = zip(batch, rows, strict=True)
        pending |= {keys[i]: pack(row, store.form.dtype) for i, row in made if i in wanted}
        tokens = sum(len(ids[i]) for i in wanted)
        done, size = done + tokens, sum(t.nbytes for p in pending.values() for t in p.values())
        if size >= shard_bytes:
            store.append(pending, {key: found[key].id for key in pending})
            pending = {}
        yield done, store
    if pending:
        store.append(pending, {key: found[key].id for key in pending})
    yield done, store
