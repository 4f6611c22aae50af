"""The training job: data, reference head, draft head, and what is written beside them."""

import json
import math
import time
import zlib
from collections import Counter
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from adaspec_eagle.allocator import keep_freed_memory
from adaspec_eagle.answers import answer_self
from adaspec_eagle.asks import Settings
from adaspec_eagle.callbacks import ProgressLine, StopGently, newest_checkpoint, say
from adaspec_eagle.data import Record, load_training, read_jsonl
from adaspec_eagle.distill import AnswerSet, Distiller, Objective
from adaspec_eagle.errors import UserError
from adaspec_eagle.feature_store import INDEX
from adaspec_eagle.features import MODES, choose_mode, row_width
from adaspec_eagle.head import DraftHead, HeadConfig, head_class, load_head, new_head, with_vocab
from adaspec_eagle.losses import loss_terms
from adaspec_eagle.onpolicy import OnPolicy
from adaspec_eagle.optim import OPTIMIZERS
from adaspec_eagle.paths import default_cache_dir, taken
from adaspec_eagle.plots import sheet, training_drawings
from adaspec_eagle.prepare import compute_features, compute_reference, draft_vocab, split_records
from adaspec_eagle.processes import (
    agreed,
    all_meet,
    is_main_process,
    join_processes,
    main_first,
    process_count,
)
from adaspec_eagle.record import environment, write_json, write_text
from adaspec_eagle.selection import check_selection, needs, parse_keep
from adaspec_eagle.targets import ATTENTIONS, DEFAULT_TARGET, Target, default_device, describe
from adaspec_eagle.zero import SplitTarget, gathered, zero_stage

METHODS: dict[str, dict[str, Any]] = {  # preset -> what it says where nothing else does
    "adaspec": {"select": "adaspec"},
    "distillspec": {"select": "none"},
    "mixed": {"select": "none", "shallow": 0.75},
}
SCHEDULES = {  # of the learning rate, behind its warm-up -> as the Trainer calls it
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}


@dataclass
class TrainConfig:
    """Every default of `scripts/train_head.py`; written to OUT/run.json."""

    target: str = DEFAULT_TARGET
    data: list[str] = field(default_factory=list)  # answer files; none: the target writes them
    tokens: int = 200_000  # answer tokens to write where no file is given
    method: str = "adaspec"
    loss: str | None = None  # None: what the head asks for
    select: str | None = None  # None: by method
    keep: str = "0.4"
    reference: str | None = None  # folder of a reference head to use instead of training one
    init: str | None = None  # folder of a head to start the draft head from
    fresh_vocab: bool = False  # count the draft vocabulary of --init anew, from the data
    start: str = "target"  # fresh weights: the target's last layer where it fits, or random
    head: str = "eagle3"
    unroll: int | None = None  # None: what the head asks for
    shallow: float | None = None  # share of steps that unroll once only; None: by method, or none
    decay: float = 0.8
    draft_vocab: int | None = None  # None: what the head asks for
    train_output: bool = False
    mask_oov: bool = False
    epochs: float = 3.0
    reference_epochs: float | None = None  # None: as many as epochs
    optimizer: str | None = None  # None: muon, under ZeRO adamw
    lr: float | None = None  # None: what suits the optimiser
    schedule: str = "cosine"  # of the learning rate, a key of SCHEDULES
    batch_size: int = 8
    accumulate: int = 1
    gradient_checkpointing: bool = False
    max_length: int = 512
    held_back: int = 64  # records kept for evaluation (at most a tenth)
    evaluations: int = 6  # a stage
    take: str = "best"  # which weights a stage ends with: best by tau_sim, or last
    on_policy: float = 0.0  # share of the answers that the head rewrites, from the second epoch on
    features: str | None = None  # memory, disk, recompute, a store's folder; None: by size
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    attn: str | None = None  # the target's attention; None: what transformers takes
    report_to: list[str] = field(default_factory=list)  # trackers; none: tensorboard

    def __post_init__(self) -> None:
        parse_keep(self.keep)
        loss_terms(self.loss or "fkl")
        check_selection(self.selection if self.method in METHODS else "none")
        choices = (
            ("method", self.method, METHODS),
            ("optimizer", self.optimizer, (None, *OPTIMIZERS)),
            ("schedule", self.schedule, SCHEDULES),
            ("start", self.start, ("target", "random")),
            ("take", self.take, ("best", "last")),
            ("attn", self.attn, (None, *ATTENTIONS)),
        )
        for name, value, known in choices:
            if value not in known:
                raise UserError(
                    f"unknown --{name} {value!r}; choose one of {', '.join(map(str, known))}"
                )
        if self.features not in (None, *MODES) and not Path(str(self.features), INDEX).exists():
            raise UserError(
                f"--features {self.features}: neither {', '.join(MODES)} nor the folder of a "
                "feature store (make_data.py --write-features)"
            )
        least = {"batch_size": 1, "accumulate": 1, "max_length": 4, "tokens": 1, "evaluations": 1}
        least |= {"held_back": 1, "unroll": 1, "draft_vocab": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {low}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: must be at least 0 and below 2**32")
        if self.shallow is not None and not 0 <= self.shallow <= 1:
            raise UserError(f"--shallow {self.shallow:g}: a share of the steps, from 0 to 1")
        self._check_on_policy()
        for name in self.report_to:
            if name not in (there := get_available_reporting_integrations()):
                raise UserError(
                    f"--report-to {name}: not known or not installed; here are {', '.join(there)}"
                )
        for name in ("epochs", "reference_epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {value}: must be above 0, and finite")
        if not 0 <= self.decay < math.inf:
            raise UserError(f"--decay {self.decay}: must be at least 0, and finite")
        if self.init and (self.train_output or self.start != TrainConfig.start):
            raise UserError(
                "--train-output and --start are for fresh heads; --init goes on with one as it is"
            )
        if self.reference and "reference" not in needs(self.selection):
            raise UserError(
                f"--reference {self.reference}: --select {self.selection} reads no reference head; "
                "leave it out, or begin with that head by --init"
            )
        if self.fresh_vocab and not self.init:
            raise UserError("--fresh-vocab is for --init; a fresh head's is counted anyway")

    def _check_on_policy(self) -> None:
        flag = f"--on-policy {self.on_policy:g}"
        if not 0 <= self.on_policy <= 1:
            raise UserError(f"{flag}: a share of the answers, from 0 to 1")
        if self.on_policy and self.epochs <= 1:
            raise UserError(f"{flag} rewrites answers from the second epoch on: raise --epochs")
        if self.on_policy and "text" in loss_terms(self.loss or "fkl"):
            raise UserError(f"{flag} with --loss {self.loss} would train on the head's own words")

    @property
    def selection(self) -> str:
        """The selection in force."""
        return self.select or METHODS[self.method]["select"]


def kind_of(option: Field) -> type:
    """What a value of this setting is, where there is one: int, float, or str for all others."""
    known = option.type.__name__ if isinstance(option.type, type) else str(option.type)
    return {"int": int, "float": float}.get(known.split(" ")[0], str)


@dataclass
class Prepared:
    """Data, ready to train on."""

    train: AnswerSet
    held_back: AnswerSet
    vocab: torch.Tensor  # [Vd] target ids
    facts: dict[str, Any]  # about data, vocabulary and features, for train.json


@dataclass
class Job:
    """A training run on its way: what its stages share."""

    config: TrainConfig
    out: Path
    target: Target
    sizes: HeadConfig
    data: Prepared


@dataclass
class Workshop:
    """What runs in one process share: the target, and the data prepared last, by what they need."""

    target: Target
    wanted: tuple = ()
    data: Prepared | None = None
    own_vocab: bool = False  # whether the draft vocabulary was chosen from the data, not given


def run_training(
    config: TrainConfig, out: Path, resume: bool = False, workshop: Workshop | None = None
) -> Path:
    """Train OUT/reference (where the selection needs one) and OUT/head; the latter's folder.

    Under `accelerate launch` all processes call this. A finished stage is not run again when
    resuming. workshop: for several runs one after the other (eval/compare.py). Raises UserError for
    bad input, and when Ctrl-C stopped it after a checkpoint.
    """
    _optimizer(config)
    keep_freed_memory()
    begun = _begun(out / "run.json").device if resume and (out / "run.json").is_file() else None
    device = join_processes(config.device or begun)
    _check_half(config.dtype, device)
    with main_first():
        config = _settle(config, out, resume)
    config.device = device or config.device
    unrolling(config)  # an unknown head, and what it cannot do, before the target is loaded
    if workshop is None:
        more = {"attn_implementation": config.attn} if config.attn else {}
        target = Target.load(config.target, config.dtype, config.device, **more)
        say(describe(target))
        workshop = Workshop(SplitTarget(target) if zero_stage() == 3 else target)
    target = workshop.target
    if zero_stage():
        say(f"ZeRO {zero_stage()}: the optimiser is AdamW (Muon needs whole weight matrices)")
    config = filled(config, target)
    assert config.draft_vocab is not None
    assert config.loss is not None
    assert config.unroll is not None
    assert config.shallow is not None
    given = _given_heads(config, target)
    sizes = head_sizes(config, target)
    data = _prepare(config, out, workshop, given)
    _note_seen(config.init, data.facts)
    sizes = replace(sizes, draft_vocab_size=len(data.vocab))
    job = Job(config, out, target, sizes, data)
    objective = Objective(
        config.loss,
        config.selection,
        parse_keep(config.keep),
        config.unroll,
        config.decay,
        config.mask_oov,
        config.shallow,
    )
    reference = None
    if "reference" in needs(config.selection):
        reference = given.get("reference") or _reference(job, objective)
    return _stage(job, "head", objective, config.epochs, reference)


def filled(config: TrainConfig, target: Target) -> TrainConfig:
    """The same with what it leaves to the head, the target and the optimiser."""
    kind, optimizer = head_class(config.head), _optimizer(config)
    unroll, shallow = unrolling(config)
    return replace(
        config,
        dtype=str(target.dtype).removeprefix("torch."),
        optimizer=optimizer,
        lr=config.lr or OPTIMIZERS[optimizer],
        loss=config.loss or kind.default_loss,
        unroll=unroll,
        shallow=shallow,
        draft_vocab=config.draft_vocab or kind.default_draft_vocab or target.vocab_size,
    )


def head_sizes(config: TrainConfig, target: Target) -> HeadConfig:
    """The sizes of the head that a `filled` config trains."""
    assert config.draft_vocab is not None
    assert config.unroll is not None
    return HeadConfig.for_target(
        config.head,
        target,
        config.draft_vocab,
        train_output=config.train_output,
        steps=config.unroll,
    )


def unrolling(config: TrainConfig) -> tuple[int, float]:
    """(unroll steps, share of optimiser steps that unroll once only), as they will be.

    Raises UserError for a head that has nothing to leave out.
    """
    kind, preset = head_class(config.head), METHODS[config.method]
    unroll = config.unroll or kind.default_unroll
    shallow = preset.get("shallow", 0.0) if config.shallow is None else config.shallow
    if shallow and (unroll == 1 or not kind.reads_tokens):
        raise UserError(
            f"--method {config.method} with --shallow {shallow:g} leaves out unroll steps on the "
            f"head's own hidden states, which a {config.head} head does not have with --unroll "
            f"{unroll}: take --method distillspec"
        )
    return unroll, shallow


def _optimizer(config: TrainConfig) -> str:
    """The optimiser in force; Muon needs whole matrices, which ZeRO cuts into pieces."""
    if not zero_stage():
        return config.optimizer or "muon"
    if config.optimizer == "muon":
        raise UserError(
            "--optimizer muon needs whole weight matrices, which DeepSpeed ZeRO splits: take "
            "--optimizer adamw, or launch with scripts/accelerate/data_parallel.yaml"
        )
    return "adamw"


def _check_half(dtype: str | None, device: str | None) -> None:
    """Raise UserError for float16 on a CPU, where the scaled gradients that it needs are not."""
    if dtype == "float16" and (device or default_device().type) == "cpu":
        raise UserError("--dtype float16 trains on CUDA alone; on CPU give bfloat16 or float32")


def _check_split(config: TrainConfig) -> None:
    """Raise UserError for what one process does alone with a target that ZeRO 3 splits."""
    alone = not config.data or config.features == "disk" or config.on_policy
    if alone and zero_stage() == 3:
        raise UserError(
            "ZeRO 3 splits the target, so that no process can write answers or features alone: "
            "give --data (make_data.py), --features memory, recompute or a store, and no "
            "--on-policy; or launch with scripts/accelerate/zero2.yaml"
        )


def _given_heads(config: TrainConfig, target: Target) -> dict[str, DraftHead]:
    """The heads of --reference and --init; they must share one draft vocabulary."""
    named = {"reference": config.reference, "init": config.init}
    found = {name: load_head(folder, target) for name, folder in named.items() if folder}
    init = found.get("init")
    if init is not None and init.config.head != config.head:
        raise UserError(f"--init {config.init} is a {init.config.head} head, not {config.head}")
    layers = head_class(config.head).feature_layers(target.num_layers)
    for name, head in found.items():
        if head.config.feature_layers != layers:
            raise UserError(
                f"--{name} {named[name]} reads hidden states {head.config.feature_layers}, a "
                f"{config.head} head reads {layers}; give a head that reads the same"
            )
    own = init is not None and (init.config.train_output or init.config.lm)
    if config.fresh_vocab and own:
        raise UserError(f"--fresh-vocab: head {config.init} has output rows of its own")
    if (
        len(found) == 2
        and not config.fresh_vocab
        and not _same_vocab(found["reference"], found["init"])
    ):
        raise UserError("--reference and --init differ in draft vocabulary; drop one")
    return found


def _note_seen(init: str | None, facts: dict) -> None:
    """Say so if the head of --init was trained on another split, and on what is held back now."""
    notes = Path(init or ".") / "train.json"
    if init is None or not notes.is_file():
        return
    earlier = json.loads(notes.read_text()).get("data", {})
    if any(earlier.get(name) != facts[name] for name in ("files", "records", "held_back")):
        say(
            f"note: {init} was trained on other files or another split of them, and may have seen "
            "records that are held back now: tau_sim and overlap on them come out too high"
        )


def _same_vocab(one: DraftHead, other: DraftHead) -> bool:
    """Whether two heads' draft vocabularies are the same ids."""
    if one.draft_ids is None or other.draft_ids is None:
        return one.draft_ids is other.draft_ids
    return torch.equal(one.draft_ids, other.draft_ids)


def _reference(job: Job, objective: Objective) -> DraftHead:
    """The reference head, trained first: by the same objective, on all tokens."""
    plain = replace(objective, select="none", keep=Objective.keep)
    epochs = job.config.reference_epochs or job.config.epochs
    return load_head(_stage(job, "reference", plain, epochs, None), job.target)


def _settle(config: TrainConfig, out: Path, resume: bool) -> TrainConfig:
    """Write the config beside the result; when resuming take the one that is there."""
    path = out / "run.json"
    if resume:
        if not path.exists():
            raise UserError(
                f"nothing to resume in {out}: {path} is missing; start without --resume"
            )
        saved = _begun(path)
        _check_split(saved)
        processes = json.loads(path.read_text(encoding="utf-8")).get("processes", process_count())
        if processes != process_count():
            raise UserError(
                f"{out} was begun with {processes} processes, here are {process_count()}: its "
                "steps would hold other records; launch as many, or start again with another --out"
            )
        for option in fields(TrainConfig):
            given, begun = getattr(config, option.name), getattr(saved, option.name)
            if given not in (getattr(TrainConfig(), option.name), begun):
                flag = option.name.replace("_", "-")
                raise UserError(
                    f"--{flag} {given}: {out} was begun with {begun}, and --resume goes on as it "
                    f"was; leave --{flag} out, or start again with another --out"
                )
        return saved
    _check_split(config)
    if path.exists() and ((out / "checkpoints").exists() or (out / "head").exists()):
        raise UserError(
            f"{out} holds a run already; go on with it (--resume), or choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    begun = {"config": asdict(config), "environment": environment(), "processes": process_count()}
    write_json(path, begun)
    return config


def _begun(path: Path) -> TrainConfig:
    """The config of a run.json; UserError if that file is damaged."""
    try:
        return TrainConfig(**json.loads(path.read_text(encoding="utf-8"))["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged or of another version ({error!r}), so that the run cannot be gone "
            "on with: start again with another --out"
        ) from error


def _prepare(
    config: TrainConfig, out: Path, workshop: Workshop, given: dict[str, DraftHead]
) -> Prepared:
    """Read or make the data, choose the draft vocabulary, compute the features."""
    target = workshop.target
    with main_first():
        config.data = config.data or [str(_self_written(config, target, out))]
    # A given head brings its vocabulary along.
    fixed = given.get("reference", None if config.fresh_vocab else given.get("init"))
    if fixed is not None:
        config.draft_vocab = fixed.config.draft_vocab_size
    fixed_ids = None if fixed is None else fixed.draft_ids
    layers = head_class(config.head).feature_layers(target.num_layers)
    rewritten = bool(config.on_policy)  # features are then kept in memory or not at all
    sizes = (config.draft_vocab, config.max_length, config.held_back)
    wanted = (config.data, layers, sizes, rewritten, config.features)
    if workshop.data is None or workshop.wanted != wanted or not _has_vocab(workshop, fixed_ids):
        workshop.data = None  # lets go of its features first
        made = _read(config, target, fixed_ids)
        workshop.data, workshop.wanted = made, wanted
        workshop.own_vocab = fixed_ids is None
        lengths = AnswerSet([*made.train.records, *made.held_back.records]).lengths()
        if config.features is None:
            width = row_width(target, layers)
            config.features = agreed(choose_mode(lengths, width, target.dtype, out))
            if config.features == "disk" and (config.on_policy or zero_stage() == 3):
                config.features = "recompute"  # of no use; one process alone would write them
        made.facts["features"] = config.features
        _pin(config, out, made)
        if config.features != "recompute":
            _fill(made, target, layers, out, config.features)
        return made
    config.features = workshop.data.facts["features"]
    _pin(config, out, workshop.data)
    return workshop.data


def _has_vocab(workshop: Workshop, ids: torch.Tensor | None) -> bool:
    """Whether the data prepared last have this draft vocabulary (None: one of their own)."""
    assert workshop.data is not None
    return workshop.own_vocab if ids is None else torch.equal(workshop.data.vocab, ids.cpu())


def read_records(config: TrainConfig, target: Target) -> tuple[list[Record], list[Record]]:
    """(training, held back) of the data files."""
    records = load_training(config.data, target, min(config.max_length, target.context))
    return split_records(records, config.held_back)


def _read(config: TrainConfig, target: Target, fixed_ids: torch.Tensor | None) -> Prepared:
    """The records of the data files, split, and their draft vocabulary; no features yet."""
    train, held = read_records(config, target)
    assert config.draft_vocab is not None
    vocab, coverage = draft_vocab(train, target, config.draft_vocab, fixed_ids)
    answers = sum(len(record.answer_ids) for record in train)
    say(
        f"{len(train)} records, {answers:,} answer tokens to train on, {len(held)} held back; "
        f"draft vocabulary {len(vocab):,} of {target.vocab_size:,} covers {coverage:.2%} of "
        "answer tokens"
    )
    facts = {
        "files": config.data,
        "records": len(train),
        "held_back": len(held),
        "answer_tokens": answers,
        "tasks": dict(Counter(record.task for record in train)),
        "draft_vocab": len(vocab),
        "coverage": coverage,
        "draft_ids": zlib.crc32(vocab.numpy().tobytes()),
    }
    return Prepared(AnswerSet(train), AnswerSet(held), vocab, facts)


def _fill(made: Prepared, target: Target, layers: list[int], out: Path, mode: str) -> None:
    """Compute the features of all records."""
    begin, cut = time.perf_counter(), len(made.train)
    records = [*made.train.records, *made.held_back.records]
    table = compute_features(target, records, layers, out, mode)
    made.train.table, made.held_back.table = table.split(cut)
    made.facts["feature_seconds"] = time.perf_counter() - begin


def _pin(config: TrainConfig, out: Path, data: Prepared) -> None:
    """Write what was chosen automatically; when resuming refuse data that have changed since."""
    facts = data.facts
    saved = json.loads((out / "run.json").read_text())
    for name in ("records", "answer_tokens", "draft_ids"):
        if "data" in saved and saved["data"][name] != facts[name]:
            raise UserError(
                f"the data of {out} have changed since it began ({name} {saved['data'][name]}, now "
                f"{facts[name]}); put them back, or start again with another --out"
            )
    if is_main_process():
        write_json(out / "run.json", saved | {"config": asdict(config), "data": facts})


def _self_written(config: TrainConfig, target: Target, out: Path) -> Path:
    """Data that the target writes itself; kept in the user's cache, the run's share in OUT."""
    cached = default_cache_dir() / "data" / f"self-{target.fingerprint}-seed{config.seed}.jsonl"
    cached.parent.mkdir(parents=True, exist_ok=True)
    say(f"no --data: {target.name} writes {config.tokens:,} answer tokens to {cached}")
    with taken(cached.with_suffix(".lock"), wait=True):  # of another run that wants the same
        answer_self(target, cached, Settings(tokens=config.tokens, seed=config.seed), say)
    share, tokens, long = [], 0, 0
    for item in read_jsonl(cached):
        if tokens >= config.tokens:
            break
        if len(item["prompt_ids"]) >= config.max_length:  # leaves no token to learn
            long += 1
            continue
        share.append(json.dumps(item, ensure_ascii=False) + "\n")
        tokens += len(item["answer_ids"])
    if long:
        say(f"left out {long} answers, whose prompts fill --max-length {config.max_length}")
    if not share:
        raise UserError(f"--max-length {config.max_length} holds no prompt and answer: raise it")
    return write_text(out / "data.jsonl", "".join(share))


def _stage(
    job: Job, name: str, objective: Objective, epochs: float, reference: DraftHead | None
) -> Path:
    """Train one head to OUT/NAME, from its last checkpoint if there is one."""
    folder = job.out / name
    if (folder / "train.json").exists():
        say(f"{folder} is finished already")
        return folder
    head = _fresh_head(job, name)
    size = sum(weight.numel() for weight in head.parameters()) / 1e6
    say(f"training {folder}: {size:.1f} M weights, selection {objective.select}, {epochs:g} epochs")
    checkpoints = job.out / "checkpoints" / name
    assert job.config.optimizer is not None
    train, reference_seconds = _training_answers(job, objective, epochs, reference)
    trainer = Distiller(
        head,
        target=job.target,
        objective=objective,
        reference=reference,
        optimizer=job.config.optimizer,
        recompute=job.config.gradient_checkpointing,
        args=_arguments(job, checkpoints, epochs),
        train_dataset=train,
        eval_dataset=job.data.held_back,
        callbacks=[stop := StopGently(), ProgressLine()],
    )
    trainer.remove_callback(PrinterCallback)
    if job.config.on_policy:
        share, written = job.config.on_policy, job.out / "on-policy" / name
        own = OnPolicy(job.target, head, train, share, objective.unroll, written, trainer.watch)
        trainer.add_callback(own)
    last = newest_checkpoint(checkpoints)
    begin = time.perf_counter()
    with stop.listening():
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.state.global_step < trainer.state.max_steps:
        raise UserError(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} of {name}; "
            f"go on by train_head.py --out {job.out} --resume, or by the command that began it"
        )
    notes = {
        "config": asdict(job.config),
        "stage": name,
        "objective": asdict(objective) | {"keep": str(objective.keep)},
        "data": job.data.facts,
        "epochs": epochs,
        "steps": trainer.state.max_steps,
        "answer_token_passes": round(
            job.data.facts["answer_tokens"]
            * epochs_made(trainer.state.max_steps, len(job.data.train), _window(job.config))
        ),
        "best_tau_sim": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        "seconds_since_last_start": time.perf_counter() - begin,
        "reference_seconds": reference_seconds,
        "environment": environment(),
        "curves": trainer.state.log_history,
    }
    made = whole_head(head)
    if is_main_process():
        curves = training_drawings({"curves": trainer.state.log_history})
        sheet(curves, job.out / f"{name}.png")
        made.eval().to(job.target.dtype).save(folder, notes)
    all_meet()
    return folder


def epochs_made(steps: int, records: int, window: int) -> float:
    """Passes over the records in `steps` of `window` records; an epoch's last may have fewer."""
    whole, more = divmod(steps, -(-records // window))
    return whole + min(1.0, more * window / records)


def _window(config: TrainConfig) -> int:
    """Records of an optimiser step, over all processes."""
    return config.batch_size * config.accumulate * process_count()


def _training_answers(
    job: Job, objective: Objective, epochs: float, reference: DraftHead | None
) -> tuple[AnswerSet, float | None]:
    """What a stage trains on, and the seconds that the reference head's losses took.

    Those are taken beforehand where they will not change, else in every step (None).
    """
    train = job.data.train
    if job.config.on_policy:  # answers of the stage's own; new ones have no rows on disk
        kept = train.table if job.config.features == "memory" else None
        return AnswerSet(train.records, kept), None
    alone = process_count() == 1  # else each would make the others' share of the pass, too
    if reference is not None and train.table is not None and epochs >= 1 and alone:
        begin = time.perf_counter()
        train = compute_reference(job.target, reference, train, objective)
        return train, time.perf_counter() - begin
    return train, None


def whole_head(head: DraftHead) -> DraftHead:
    """An unbound copy of a head whose weights may be split over the processes."""
    made = new_head(head.config)
    with gathered(head):
        made.load_state_dict({name: t.detach().cpu() for name, t in head.state_dict().items()})
    return made


def _fresh_head(job: Job, name: str) -> DraftHead:
    """A bound head in training mode: new weights, or those of --init for the draft head."""
    config, target = job.config, job.target
    if config.init and name == "head":
        head = load_head(config.init, target)
        if config.fresh_vocab:
            head = with_vocab(head, job.data.vocab)
    else:
        head = new_head(job.sizes, config.seed)
        head.set_draft_vocab(job.data.vocab)
        if config.start == "target":
            with gathered(target.model):
                head.start_from(target)
        if config.train_output:
            with torch.no_grad():
                head.lm_head.weight.copy_(target.output_rows[job.data.vocab])
    full = target.dtype in (torch.bfloat16, torch.float16)
    return head.train().to(torch.float32 if full else target.dtype).bind(target)


def _arguments(job: Job, folder: Path, epochs: float) -> TrainingArguments:
    """The Trainer's arguments for one stage."""
    config = job.config
    assert config.lr is not None
    # As the Trainer counts them: an epoch's last step may have fewer records.
    steps = math.ceil(epochs * math.ceil(len(job.data.train) / _window(config)))
    every = math.ceil(steps / config.evaluations)
    made = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        lr_scheduler_type=SCHEDULES[config.schedule],
        warmup_steps=max(1, steps // 50),
        max_grad_norm=1.0,
        bf16=job.target.dtype == torch.bfloat16,
        fp16=job.target.dtype == torch.float16,
        use_cpu=job.target.device.type == "cpu",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=config.take == "best",
        metric_for_best_model="tau_sim",
        greater_is_better=True,
        logging_steps=min(20, every),
        report_to=config.report_to or ["tensorboard"],
        remove_unused_columns=False,
        label_names=[],
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=False,
        seed=config.seed,
    )
    made._n_gpu = min(made.n_gpu, 1)  # no DataParallel: one process uses the target's device
    return made
