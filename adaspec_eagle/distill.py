"""Distiller: training a draft head on a frozen target.

Legend: S unroll steps, B rows, T positions, H hidden, M supervised target positions of a batch.
"""

import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from adaspec_eagle.attention import exact_dtype
from adaspec_eagle.data import Record
from adaspec_eagle.errors import UserError
from adaspec_eagle.feature_store import StoredRows
from adaspec_eagle.features import FeatureTable, padded_rows, split_rows, target_rows
from adaspec_eagle.fused import Output, chunked_losses, chunks
from adaspec_eagle.head import DraftHead, new_head
from adaspec_eagle.losses import (
    FEATURE,
    feature_regression,
    loss_terms,
    needs_full_vocabulary,
    overlap,
    token_loss,
)
from adaspec_eagle.optim import make_optimizer
from adaspec_eagle.processes import all_meet
from adaspec_eagle.selection import (
    AVERAGE_DECAY,
    OBSERVED,
    TokenStats,
    chosen_weights,
    divisor,
    keep_at,
    needs,
)
from adaspec_eagle.targets import Target, by_length
from adaspec_eagle.unroll import Batch, needed, step_masks, step_states, supervised, unroll
from adaspec_eagle.watch import Watch, frequency_bands
from adaspec_eagle.zero import split_frozen, zero_stage

GOLDEN = (5**0.5 - 1) / 2  # its multiples, less their whole parts, lie evenly in [0, 1)


@dataclass(frozen=True)
class Objective:
    """What a training stage minimises."""

    loss: str = "fkl"  # as losses.loss_terms reads it
    select: str = "none"  # a name in SELECTIONS, or path.py:name
    keep: Decimal = Decimal("0.4")  # k, for selections of a fraction
    unroll: int = 3  # S
    decay: float = 0.8  # weight of step s: decay^s
    mask_oov: bool = False  # leave out tokens whose target argmax is outside the draft vocabulary
    shallow: float = 0.0  # share of the optimiser steps that unroll once only

    def at(self, step: int) -> "Objective":
        """The objective of an optimiser step: this one, or its first unroll step alone."""
        return replace(self, unroll=1) if step * GOLDEN % 1 < self.shallow else self

    @property
    def needs_full(self) -> bool:
        """Whether training needs the target's logits over its full vocabulary."""
        return self.mask_oov or needs_full_vocabulary(self.loss) or "overlap" in self.watch

    @property
    def watch(self) -> tuple[str, ...]:
        """What the selection asks for beside the losses, names in fused.OBSERVATIONS."""
        return tuple(name for name in OBSERVED if name in needs(self.select))


@dataclass
class TargetTokens:
    """The target at the supervised positions, shared by all steps and by both heads."""

    hidden: Tensor  # [M, H] in the target's dtype
    output: Output  # its output layer over the draft vocabulary
    lse: Tensor | None  # [M] logsumexp over the full vocabulary, if asked for
    argmax: Tensor | None  # [M] target id of the largest logit, if asked for
    labels: Tensor  # [M] the text's own token as a draft id, -1 outside the draft vocabulary

    def logits(self, place: slice = slice(None)) -> Tensor:
        """Logits over the draft vocabulary `[R, Vd]`, float32 (float64 for float64 targets)."""
        logits = self.output.logits(self.hidden[place])
        return logits.to(exact_dtype(logits.dtype))


class AnswerSet(Dataset):
    """Records as the Trainer reads them: ids, loss mask; target rows, reference losses if given.

    `reference`: of each record the reference head's losses `[T, S]` by position (prepare.py).
    """

    def __init__(
        self,
        records: Sequence[Record],
        table: FeatureTable | StoredRows | None = None,
        reference: Sequence[Tensor] | None = None,
    ) -> None:
        self.records = records
        self.table = table
        self.reference = reference
        self.rewritten: dict[int, tuple[Record, Tensor | None]] = {}

    def rewrite(self, answers: Mapping[int, list[int]], rows: Mapping[int, Tensor]) -> None:
        """Give these answers, and target rows, instead of the records' own (onpolicy.py).

        By number of the record; all others are as they were given. `lengths` stays, so that the
        batches hold the same records as without.
        """
        self.rewritten = {
            i: (replace(self.records[i], answer_ids=answer), rows.get(i))
            for i, answer in answers.items()
        }

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows: Tensor | Future[Tensor] | None
        if index in self.rewritten:
            record, rows = self.rewritten[index]
        else:
            record, rows = self.records[index], None if self.table is None else self.table[index]
        ids = torch.tensor(record.ids)
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[len(record.prompt_ids) :] = True
        item: dict[str, Any] = {"input_ids": ids, "loss_mask": mask}
        if rows is not None:
            item["target_rows"] = rows
        if self.reference is not None:
            item["reference"] = self.reference[index]
        return item

    def lengths(self) -> list[int]:
        """Tokens of each record, prompt included."""
        return [len(record.ids) for record in self.records]


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pad on the right with zeros: ids and loss_mask `[B, T]`, target_rows `[B, T, W]`, ...

    Rows that are still being read stay a list; `make_batch` waits for them.
    """

    def together(parts: list[Any]) -> Any:
        ready = all(isinstance(part, Tensor) for part in parts)
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) if ready else parts

    return {name: together([item[name] for item in items]) for name in items[0]}


def target_tokens(target: Target, head: DraftHead, batch: Batch, full: bool) -> TargetTokens:
    """The target's output on the draft vocabulary; with `full` what needs the whole vocabulary."""
    hidden = batch.hidden[batch.rows, batch.positions].to(target.dtype)  # [M, H]
    lse = argmax = None
    if full:
        lse = torch.empty(len(hidden), dtype=exact_dtype(target.dtype), device=hidden.device)
        argmax = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        for place in chunks(len(hidden), target.vocab_size):
            logits = target.logits(hidden[place])  # [R, V]
            lse[place] = logits.to(lse.dtype).logsumexp(-1)
            argmax[place] = logits.max(-1).indices  # faster than argmax on CPU
    labels = head.to_draft(batch.input_ids[batch.rows, batch.positions + 1])
    return TargetTokens(hidden, target_output(target, head), lse, argmax, labels)


def target_output(target: Target, head: DraftHead) -> Output:
    """The target's output layer over the draft vocabulary of a bound head."""
    if not head.config.train_output:
        return Output(head.output_rows.to(target.dtype), head.output_bias)
    ids = slice(None) if head.draft_ids is None else head.draft_ids
    return Output(target.output_rows.detach()[ids], head.output_bias)


@torch.no_grad()
def make_batch(target: Target, head: DraftHead, item: Mapping[str, Any]) -> Batch:
    """A collated item with the target's features: from the table, or by running the target."""
    layers = head.config.feature_layers
    ids = item["input_ids"].to(target.device)
    if "target_rows" in item:
        rows = padded_rows(item["target_rows"]).to(target.device)
    else:
        rows = target_rows(target, ids, layers)
    features, hidden = split_rows(rows, target, layers)
    row, position = supervised(item["loss_mask"].to(target.device))
    known = item.get("reference")
    if known is not None:
        known = known.to(target.device)[row, position].t()  # [S, M]
    return Batch(ids, row, position, features, hidden, known)


@dataclass
class Forced:
    """What a head does on given answers, as sums of each of R records."""

    sums: Tensor  # [R, 3, S] of loss, overlap and match over the supervised positions
    counts: Tensor  # [R, S] supervised positions
    products: Tensor  # [R] sums over indices of sum_s prod_{j <= s} match_j
    indices: Tensor  # [R] indices at which all S steps count

    def figures(self) -> dict[str, Any]:
        """`loss`, `overlap`, `match` a step, and `tau_sim`: ratios of sums over the records."""
        means = (self.sums.sum(0) / self.counts.sum(0).clamp(min=1)).tolist()
        tau_sim = 1 + float(self.products.sum() / self.indices.sum().clamp(min=1))
        return dict(zip(("loss", "overlap", "match"), means, strict=True)) | {"tau_sim": tau_sim}


def teacher_forced(
    target: Target,
    head: DraftHead,
    answers: "AnswerSet | Sequence[Record]",
    steps: int,
    batch_size: int = 8,
    loss: str = "fkl",
) -> dict[str, Any]:
    """Figures of a bound head on given answers: `loss`, `overlap`, `match` a step, and `tau_sim`.

    Overlap is sum_v min(p, q) with the target's full-vocabulary p; match is whether head and target
    have the same most probable token; both are means over the supervised positions. tau_sim = 1 +
    mean of sum_s prod_{j <= s} match_j over the indices at which all steps count: the tokens
    of a round of `steps` drafts that began at any index alike. On the target's own greedy answers
    each match is what a greedy chain would find there; the mean lies above the acceptance length
    tau, whose rounds begin more often where drafts fail.
    """
    return forced_counts(target, head, answers, steps, batch_size, loss).figures()


@torch.no_grad()
def forced_counts(
    target: Target,
    head: DraftHead,
    answers: "AnswerSet | Sequence[Record]",
    steps: int,
    batch_size: int = 8,
    loss: str = "fkl",
) -> Forced:
    """What `teacher_forced` is made of, record by record, float64 on the CPU."""
    answers = answers if isinstance(answers, AnswerSet) else AnswerSet(answers)
    objective = Objective(loss, unroll=steps)
    lengths = answers.lengths()
    records = len(lengths)
    sums = torch.zeros(records, 3, steps, dtype=torch.float64)
    counts = torch.zeros(records, steps, dtype=torch.float64)
    products, indices = torch.zeros(2, records, dtype=torch.float64)
    for chosen in by_length(lengths, batch_size):
        batch = make_batch(target, head, collate([answers[i] for i in chosen]))
        tokens = target_tokens(target, head, batch, full=True)
        figures, mask = _figures(head, objective, batch, tokens), step_masks(batch.positions, steps)
        record = torch.tensor(chosen)[batch.rows.cpu()]  # [M]
        shown = torch.where(mask, figures, 0.0).cpu().double()  # [3, S, M]
        sums.index_add_(0, record, shown.permute(2, 0, 1))
        counts.index_add_(0, record, mask.t().cpu().double())
        first = whole_indices(batch, steps)  # [I]
        run = torch.stack([(figures[2] * mask)[s, first + s] for s in range(steps)]).cumprod(0)
        place = record[first.cpu()]
        products.index_add_(0, place, run.sum(0).cpu().double())
        indices.index_add_(0, place, torch.ones(len(place)).double())
    return Forced(sums, counts, products, indices)


def _figures(head: DraftHead, objective: Objective, batch: Batch, tokens: TargetTokens) -> Tensor:
    """(loss, overlap, match) of every step and supervised position: `[3, S, M]`."""
    window = needed(batch, objective.unroll)
    states = unroll(head, batch.features, batch.input_ids, objective.unroll, window)
    assert tokens.argmax is not None
    assert tokens.lse is not None
    picked, loss_of = step_states(states, batch, window), token_loss(objective.loss)
    found = tokens.lse.new_empty(3, len(picked), len(tokens.hidden))
    for place in chunks(len(tokens.hidden), head.config.draft_vocab_size):
        known, lse, labels = tokens.logits(place), tokens.lse[place], tokens.labels[place]
        for step, hidden in enumerate(picked):
            logits = head.logits(hidden[place]).to(known.dtype)
            loss = loss_of(logits, known, target_lse=lse, labels=labels)
            shared = overlap(logits, known, target_lse=lse)
            match = head.to_target(logits.max(-1).indices) == tokens.argmax[place]
            found[:, step, place] = torch.stack([loss, shared, match.to(loss.dtype)])
    return found


def whole_indices(batch: Batch, steps: int) -> Tensor:
    """Where the head's index i = p - 1 - s counts at all S steps: the m of step 0, `[I]`.

    Step s of that index stands at m + s, because an answer is contiguous.
    """
    rows, positions = batch.rows, batch.positions
    flat = rows * (batch.input_ids.shape[1] + steps) + positions  # [M], ascending
    whole = flat[steps - 1 :] - flat[: max(len(flat) - steps + 1, 0)] == steps - 1
    first = whole.nonzero()[:, 0]
    return first[positions[first] >= 1]


@dataclass
class StepLosses:
    """Of every supervised position at every step, `[S, M]` each."""

    distilled: Tensor  # what selection compares: the losses of tokens
    total: Tensor  # what is trained on: the same, and the feature regression if the loss has it
    observed: dict[str, Tensor] = field(default_factory=dict)  # by name, as the objective asks


def step_losses(
    head: DraftHead,
    objective: Objective,
    batch: Batch,
    tokens: TargetTokens,
    recompute: bool = False,
) -> StepLosses:
    """Unroll the head (recompute: as `unroll`) and compare it with the target."""
    window = needed(batch, objective.unroll)
    states = unroll(head, batch.features, batch.input_ids, objective.unroll, window, recompute)
    picked = head.readout(torch.stack(step_states(states, batch, window)))  # [S, M, H]
    distilled, observed = chunked_losses(
        objective.loss,
        picked,
        draft_output(head),
        tokens.hidden,
        tokens.output,
        tokens.lse,
        tokens.labels,
        objective.watch,
    )
    found = StepLosses(distilled, distilled, dict(zip(objective.watch, observed, strict=True)))
    weight = loss_terms(objective.loss).get(FEATURE)
    if weight is not None:
        feature = batch.hidden[batch.rows, batch.positions].to(distilled.dtype)
        regression = [feature_regression(hidden.to(feature.dtype), feature) for hidden in picked]
        found.total = distilled + weight * torch.stack(regression)
    return found


def draft_output(head: DraftHead) -> Output:
    """The head's output layer; in autocast's dtype where that is on, as a linear layer would be."""
    rows, kind = head.output_weight, head.output_weight.device.type
    if torch.is_autocast_enabled(kind):
        rows = rows.to(torch.get_autocast_dtype(kind))
    return Output(rows, head.logit_bias)


class Student(nn.Module):
    """The head and its objective as one module: what the Trainer wraps, casts and synchronises.

    average: where the selection asks for it, the head's moving average, which takes the reference
    head's place; it travels with the checkpoints. recompute: gradient checkpointing (unroll.py).
    """

    def __init__(
        self, head: DraftHead, objective: Objective, target: Target, recompute: bool = False
    ) -> None:
        super().__init__()
        self.head = head
        self.objective = objective
        self.recompute = recompute
        self.average: DraftHead | None = None
        if "average" in needs(objective.select):
            self.average = new_head(head.config).train().to(next(head.parameters()).dtype)
            self.average.load_state_dict(head.state_dict())
            self.average.bind(target, allow_other_target=True).requires_grad_(False)

    def forward(self, batch: Batch, tokens: TargetTokens) -> StepLosses:
        """The losses of the head."""
        return step_losses(self.head, self.objective, batch, tokens, self.recompute)

    @torch.no_grad()
    def update_average(self) -> None:
        """average <- b average + (1 - b) head, b = AVERAGE_DECAY; at the start of every step."""
        if self.average is not None:
            pairs = zip(self.average.parameters(), self.head.parameters(), strict=True)
            for mean, weight in pairs:
                mean.lerp_(weight, 1 - AVERAGE_DECAY)


class Distiller(Trainer):
    """transformers.Trainer that distils a frozen target into a draft head.

    The loss is sum over steps s of decay^s x (sum over the selected tokens of the accumulation
    window and of all processes) / (their number): AdaSPEC's Eq. 10 for each step, so that without
    selection 8 x 1 and 1 x 8 batches give the same gradient. (The released AdaSPEC code divides by
    all answer tokens, selected or not: a factor k. selection.divisor says which selections here are
    divided so, too.) Selection is per step, micro-batch and process, as published, over answer
    tokens only; AdaSPEC's needs a reference head.
    """

    def __init__(
        self,
        head: DraftHead,
        *,
        target: Target,
        objective: Objective,
        reference: DraftHead | None = None,
        optimizer: str = "muon",
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        if "reference" in needs(objective.select) and reference is None:
            raise UserError(f"--select {objective.select} needs a reference head (--reference DIR)")
        width = head.output_weight.shape[-1]
        if FEATURE in loss_terms(objective.loss) and width != target.hidden_size:
            raise UserError(
                f"--loss {objective.loss}: this head's hidden states are {width} wide, those of "
                f"{target.name} {target.hidden_size}; leave `feature` out"
            )
        self.student = Student(head, objective, target, recompute)
        super().__init__(model=self.student, data_collator=collate, **kwargs)
        self.add_callback(FindBest())
        self.head = head
        self.target = target
        self.objective: Objective = objective
        self.reference = reference
        if zero_stage() == 3:
            self._check_split()
            if reference is not None:
                split_frozen(reference)
        self.optimizer_name = optimizer
        answers = self.train_dataset
        assert isinstance(answers, AnswerSet)
        bands = frequency_bands((r.answer_ids for r in answers.records), target.vocab_size)
        self.watch = Watch(bands.to(target.device), objective.unroll)
        self.aside: str | None = None  # where a checkpoint is being written
        # The loss is divided by the counts of get_batch_samples: no further division (the second
        # name is that of earlier versions of transformers).
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True

    def _check_split(self) -> None:
        """Raise UserError for weights that are read apart from the layers, which ZeRO 3 splits."""
        heads = [head for head in (self.head, self.reference) if head is not None]
        own = [h for h in heads if any(h.output_weight is w for w in h.parameters())]
        if own or self.student.average is not None:
            what = self.objective.select
            if own:
                what = f"the {own[0].config.head} head with output rows of its own"
            raise UserError(
                f"{what} reads weights apart from its layers, where ZeRO 3 has them split; launch "
                "with scripts/accelerate/zero2.yaml"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Muon or AdamW (optim.py), without weight decay."""
        if self.optimizer is None:
            wrapped = model or self.model
            assert wrapped is not None
            rate = self.args.learning_rate
            self.optimizer = make_optimizer(self.optimizer_name, wrapped, rate, self.target.dtype)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """The accumulation window's micro-batches, and what each step is divided by `[S]`.

        No micro-batches for a run that was resumed behind its last step, inside an epoch.
        """
        window: list[dict[str, Any]] = []
        objective = self.student.objective = self.objective.at(self.state.global_step)
        if 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
            return [], torch.zeros(objective.unroll)
        self.student.update_average()
        counts = torch.zeros(objective.unroll, dtype=torch.long, device=device)
        progress = self.state.global_step / max(self.state.max_steps, 1)
        keep = keep_at(objective.select, objective.keep, progress)
        for place, item in enumerate(itertools.islice(epoch_iterator, num_batches)):
            batch = make_batch(self.target, self.head, item)
            tokens = target_tokens(self.target, self.head, batch, objective.needs_full)
            mask = step_masks(batch.positions, objective.unroll)  # [S, M]
            if objective.mask_oov and self.head.draft_ids is not None:
                assert tokens.argmax is not None
                mask = mask & self.head.t2d[tokens.argmax]
            draw = self._draw(place)
            window.append(
                {"batch": batch, "tokens": tokens, "mask": mask, "keep": keep, "draw": draw}
            )
            counts += divisor(objective.select, mask, keep)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return window, counts

    def _draw(self, place: int) -> int:
        """The seed of a micro-batch: the same whether processes share a window or one has it."""
        number = self.state.global_step * self.args.gradient_accumulation_steps + place
        number = number * self.args.world_size + self.args.process_index
        return 1_000_003 * self.args.seed + number

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The objective on one micro-batch; num_items_in_batch `[S]` as get_batch_samples gives."""
        batch, mask = inputs["batch"], inputs["mask"]
        losses = model(batch, inputs["tokens"])
        if not bool(losses.total.detach().isfinite()[mask].all()):
            raise UserError(self._not_finite(inputs))
        weights = self.choose(losses, inputs)  # [S, M]
        chosen = weights > 0
        self.watch.add(batch.input_ids[batch.rows, batch.positions + 1], mask, chosen)
        assert isinstance(num_items_in_batch, Tensor)
        sums = torch.where(chosen, weights * losses.total, 0.0).sum(1)  # [S]
        steps = torch.arange(len(sums), device=sums.device, dtype=sums.dtype)
        loss = (self.objective.decay**steps * sums / num_items_in_batch.clamp(min=1)).sum()
        return loss * self.accelerator.num_processes  # gradients are averaged over processes

    def _not_finite(self, inputs: Mapping[str, Any]) -> str:
        """Save the batch whose loss is not finite; what to say about it."""
        batch, step = inputs["batch"], self.state.global_step + 1
        path = (
            Path(str(self.args.output_dir))
            / f"bad-batch-{step}-{self.args.process_index}.safetensors"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {f.name: getattr(batch, f.name) for f in fields(batch)} | {"mask": inputs["mask"]}
        alone = {k: v.cpu().contiguous().clone() for k, v in kept.items() if v is not None}
        save_file(alone, path)  # features and hidden may be one tensor
        return (
            f"the loss of step {step} is not finite; no step was taken with it. Its batch is in "
            f"{path} (fields of unroll.Batch). Look for values there that are not finite or very "
            "large; a lower --lr, or --resume from the last checkpoint, may help"
        )

    @torch.no_grad()
    def choose(self, losses: StepLosses, inputs: Mapping[str, Any]) -> Tensor:
        """The weight of every token at every step `[S, M]`."""
        batch, reference = inputs["batch"], inputs["batch"].reference
        other = self.student.average if self.student.average is not None else self.reference
        if reference is None and other is not None:
            averaged = other is self.student.average  # in float32, as the head that is trained
            with self.accelerator.autocast() if averaged else nullcontext():
                found = step_losses(other, self.student.objective, batch, inputs["tokens"])
            reference = found.distilled
        if reference is not None:
            reference = reference[: len(losses.distilled)]  # one known beforehand has all steps
        stats = TokenStats(
            losses.distilled.detach(),
            inputs["mask"],
            batch.rows,
            batch.positions,
            inputs["keep"],
            torch.Generator().manual_seed(inputs["draw"]),
            reference,
            **losses.observed,
        )
        return chosen_weights(self.objective.select, stats)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Teacher-forced figures on held-back answers; `eval_tau_sim` picks the best checkpoint."""
        answers = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(answers, AnswerSet)
        began = time.perf_counter()
        self.head.eval()
        with self.accelerator.autocast():
            found = teacher_forced(
                self.target,
                self.head,
                answers,
                self.objective.unroll,
                self.args.per_device_eval_batch_size,
                loss=self.objective.loss,
            )
        self.head.train()
        self.watch.pause(time.perf_counter() - began)
        metrics = {f"{metric_key_prefix}_tau_sim": found["tau_sim"]}
        for name in ("loss", "overlap", "match"):
            for step, value in enumerate(found[name]):
                metrics[f"{metric_key_prefix}_{name}_{step}"] = value
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """A line of the log; those about training carry what was watched."""
        super().log(logs | self.watch.take() if "loss" in logs else logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self.aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written aside and renamed when it is whole: a kill leaves no part of a checkpoint."""
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        whole = folder / name
        self.aside = str(folder / "writing")
        if self.args.should_save:
            shutil.rmtree(self.aside, ignore_errors=True)
        all_meet()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            made, self.aside = Path(self.aside) / name, None
        all_meet()
        if self.state.best_global_step:
            self.state.best_model_checkpoint = best_folder(self.args, self.state)
        if self.args.should_save:
            self.state.save_to_json(str(made / "trainer_state.json"))
            shutil.rmtree(whole, ignore_errors=True)
            made.rename(whole)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), self.args.save_total_limit, best, use_mtime=True)
        all_meet()

    def _load_best_model(self) -> None:
        """The weights of the best step; UserError where its checkpoint is gone."""
        best = best_folder(self.args, self.state)
        if not Path(best).is_dir():
            raise UserError(
                f"{best}, the best by tau_sim, is missing: put it back, or train again with "
                "another --out"
            )
        super()._load_best_model()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        answers = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(answers, AnswerSet)
        rows = self.args.per_device_train_batch_size * self.accelerator.num_processes
        rows *= self.args.gradient_accumulation_steps  # as many processes or micro-batches: alike
        seed = self.args.data_seed or self.args.seed
        return LengthBuckets(answers.lengths(), rows, seed, lambda: int(self.state.epoch or 0))


def best_folder(args: TrainingArguments, state: TrainerState) -> str:
    """The best checkpoint, where the run's folder is now: it may have been moved."""
    return str(Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}")


class FindBest(TrainerCallback):
    """Looks for the best checkpoint there; the Trainer forgets one that is not where it was."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Behind the loading of a checkpoint's state."""
        if state.best_global_step:
            state.best_model_checkpoint = best_folder(args, state)


class LengthBuckets(Sampler):
    """Shuffled windows of records of like length; the order follows from (seed, epoch) alone.

    batch_size: records of a window, that is of all micro-batches and processes of a step. epoch: is
    asked when a pass begins. (The Trainer's set_epoch does not reach a sampler behind batches that
    are skipped, where one of several processes goes on inside an epoch.)
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch())
        order = torch.randperm(len(self.lengths), generator=generator)
        batches: list[Tensor] = []
        for pool in order.split(32 * self.batch_size):
            ranked = pool[self.lengths[pool].argsort(descending=True)]
            batches += ranked.split(self.batch_size)
        whole = len(order) // self.batch_size  # only the last batch can be short: it stays last
        mixed = torch.randperm(whole, generator=generator).tolist()
        for place in [*mixed, *range(whole, len(batches))]:
            yield from batches[place].tolist()
