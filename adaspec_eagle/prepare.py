"""From records to what training reads: split, draft vocabulary, features, reference losses."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from adaspec_eagle.callbacks import say
from adaspec_eagle.data import Record
from adaspec_eagle.distill import (
    AnswerSet,
    Objective,
    collate,
    make_batch,
    step_losses,
    target_tokens,
)
from adaspec_eagle.errors import UserError
from adaspec_eagle.feature_store import (
    FeatureStore,
    StoredRows,
    check_room,
    missing_records,
    open_for_writing,
    token_bytes,
    write_features,
)
from adaspec_eagle.features import FeatureTable, length_batches, make_table
from adaspec_eagle.head import DraftHead
from adaspec_eagle.processes import is_main_process, main_first
from adaspec_eagle.targets import Target
from adaspec_eagle.watch import token_counts

Found = TypeVar("Found")


def split_records(records: list[Record], held_back: int) -> tuple[list[Record], list[Record]]:
    """(training, held back): at most `held_back` records and at most a tenth.

    Drawn by the number of records alone: runs with other seeds hold the same ones back. Records
    whose prompt is that of one held back are in neither.
    """
    count = min(held_back, len(records) // 10) or 1
    if len(records) < 2:
        raise UserError("one record is too few: training needs some, evaluation needs others")
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    held = sorted(order[:count])
    chosen = set(held)
    prompts = {tuple(records[i].prompt_ids) for i in held}
    rest = [r for i, r in enumerate(records) if i not in chosen]
    train = [r for r in rest if tuple(r.prompt_ids) not in prompts]
    if not train:
        raise UserError("all records have the prompts of those held back: training needs others")
    return train, [records[i] for i in held]


def draft_vocab(
    records: Sequence[Record], target: Target, size: int, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """The `size` most frequent answer tokens as ids `[Vd]`, and the share of answers they cover.

    End tokens are always in; ties and what is left over go to the lower id. `ids`, if given, it is.
    """
    counts = token_counts((record.answer_ids for record in records), target.vocab_size)
    total = int(counts.sum())
    ranked = counts.clone()
    ranked[target.eos_token_ids] = total + 1
    best = ranked.sort(descending=True, stable=True).indices[: min(size, target.vocab_size)]
    chosen = best.sort().values if ids is None else ids.cpu()
    return chosen, float(counts[chosen].sum()) / total


def compute_features(
    target: Target, records: list[Record], layers: list[int], out: Path, where: str
) -> FeatureTable | StoredRows:
    """The features of all records: in memory, on disk under OUT/features, or from a store.

    Those on disk are there already when a run is resumed.
    """
    if where == "memory":
        ids = [record.ids for record in records]
        return _watched("features", sum(map(len, ids)), make_table(target, ids, layers))
    store = FeatureStore(where) if where != "disk" else None
    if store is None:
        with main_first():  # one process writes the folder, the others open it
            if is_main_process():
                dtype = str(target.dtype).removeprefix("torch.")
                write_store(target, records, layers, out / "features", dtype)
        store = FeatureStore(out / "features")
    store.check_form(target, layers)
    store.check_sizes()
    return store.rows_of(records, target)


def write_store(
    target: Target, records: Sequence[Record], layers: Sequence[int], folder: Path, dtype: str
) -> FeatureStore:
    """Write what the store in `folder` does not have yet, with its size told beforehand.

    Damaged shards of a store that is there are found and written again.
    """
    store = open_for_writing(folder, target, layers, dtype)
    for fault in store.mend():
        say(fault)
    missing = missing_records(store, records)
    tokens = sum(len(record.ids) for record in missing.values())
    needed = tokens * token_bytes(target, layers, dtype)
    say(
        f"{folder}: {len(missing)} records to add, {tokens:,} tokens, {needed / 2**30:.2f} GiB in "
        f"{dtype}; the disk has {shutil.disk_usage(folder).free / 2**30:.2f} GiB"
    )
    check_room(folder, needed)
    if not missing:
        return store
    return _watched("features", tokens, write_features(store, target, records))


@torch.no_grad()
def reference_losses(
    target: Target,
    reference: DraftHead,
    answers: AnswerSet,
    objective: Objective,
    batch_tokens: int = 4096,
) -> Iterator[tuple[int, list[Tensor]]]:
    """The reference head's losses: (tokens done, what is known) after every batch.

    At last one `[T, S]` a record. Row p holds the losses of the S steps at position p, which
    predicts token p + 1 (float32, or float64 for float64 targets); rows that nothing supervises are
    zero. Head and records are frozen, so that every epoch would compute the same. Records of like
    length run together, always the same ones: a run that is resumed finds the same numbers.
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


def compute_reference(
    target: Target, reference: DraftHead, answers: AnswerSet, objective: Objective
) -> AnswerSet:
    """The same records with the reference head's losses, with a progress bar."""
    steps = reference_losses(target, reference, answers, objective)
    known = _watched("reference losses", sum(answers.lengths()), steps)
    return AnswerSet(answers.records, answers.table, known)


def _watched(what: str, total: int, steps: Iterator[tuple[int, Found]]) -> Found:
    """The last thing that `steps` of (tokens done, thing) yields, under a progress bar."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("tokens, left"))
    console, shown = Console(stderr=True), 0
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=total)
        for done, filled in steps:
            bar.update(task, completed=done)
            if not console.is_terminal and done * 10 // total > shown:  # a log gets ten lines
                shown = done * 10 // total
                bar.console.print(f"{what}: {done:,} of {total:,} tokens", highlight=False)
            found = filled
    return found
