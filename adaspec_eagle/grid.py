"""A grid of training runs that are compared: (arm, task, seed), each a cell of its own.

Cells are independent files, so that any number of workers, on any number of machines, can share the
folder (its file system must know locks): a cell is done where its file is.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from adaspec_eagle.acceptance import acceptance_figures
from adaspec_eagle.alike import check_alike, facts
from adaspec_eagle.bench import Source, read_source
from adaspec_eagle.callbacks import say
from adaspec_eagle.data import load_training
from adaspec_eagle.errors import UserError
from adaspec_eagle.head import head_class, load_head, new_head
from adaspec_eagle.paths import taken
from adaspec_eagle.prepare import write_store
from adaspec_eagle.record import environment, sha256, write_json
from adaspec_eagle.selection import needs
from adaspec_eagle.storage import read_json
from adaspec_eagle.targets import Target
from adaspec_eagle.train import (
    TrainConfig,
    Workshop,
    filled,
    head_sizes,
    kind_of,
    read_records,
    run_training,
    unrolling,
)
from adaspec_eagle.work import forward_flops

BACKWARD = 2  # a backward pass costs two forward passes
RELATED = ("head", "draft_vocab", "train_output", "data", "max_length", "held_back",
           "init", "gradient_checkpointing")  # fmt: skip
OF_TASKS = ("max_length",)  # what a task may say over every arm: it costs no FLOPs
GIVEN = ("target", "seed", "take", "dtype", "device", "attn", "reference_epochs")  # not an arm's
NAME = re.compile(r"[\w.+-]+")  # of an arm: it names files

FLOPS = (
    "head FLOPs in forward passes of the arm's own head over one answer token of the training "
    "data, unrolled as often as its kind does by itself (EAGLE-3: 3 times), its prompt's share of "
    "the work included: 3 a token and epoch (forward 1, backward 2); where it is unrolled more or "
    "less often, as in --shallow steps, in proportion to the FLOPs of products, counted on a text "
    "of the task's mean lengths; AdaSPEC's reference stage the same, and 1 "
    "for the reference head's losses, which are computed once (in every epoch with --on-policy and "
    "--features recompute); a moving average 1 a token and epoch; an answer that the head writes "
    "two passes unrolled once, counted likewise. An arm with data of its own makes as many passes "
    "over answer tokens as it would over the baseline's, whose tokens are counted; so are those of "
    "the answers that on-policy ones, which can be shorter, replace. Comparable between heads of "
    "the same form only. The target's own work is not in it: one pass a task, shared by all arms, "
    "but another output layer in every step for losses and selections that need its full "
    "vocabulary, and with --on-policy a pass over all answers in every epoch"
)


@dataclass(frozen=True)
class CellArm:
    """One way to train a head."""

    name: str
    config: dict[str, Any]  # TrainConfig fields
    reference: str | None = None  # the arm whose head, of the same seed, is the reference head
    match: str | None = None  # train for as many head FLOPs as that arm takes


@dataclass(frozen=True)
class Plan:
    """What an arms file says: arms, in the order of work, and what is compared."""

    arms: dict[str, CellArm]
    primary: tuple[str, str]  # fixed beforehand: (arm, everyone's baseline); ("", baseline): none
    seeds: dict[str, int] = field(default_factory=dict)  # by arm; others as many as --seeds
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)  # OF_TASKS
    # Forward work of an arm's unroll steps and of the first alone, over that of its kind's own
    # number of them: of arms that unroll otherwise or write answers, on one task (`on_task`).
    work: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """The arm that all others are compared with."""
        return self.primary[1]

    def against(self, name: str) -> "Plan":
        """The same with another baseline, and no contrast that was fixed beforehand."""
        if name not in self.arms:
            raise UserError(f"--against {name}: there is no such arm; {', '.join(self.arms)}")
        return replace(self, primary=("", name))

    def arm(self, name: str, task: str) -> CellArm:
        """An arm with a task's own settings."""
        arm = self.arms[name]
        return replace(arm, config=arm.config | self.tasks.get(task, {}))

    def cost(self, name: str, epochs: float) -> float:
        """Head FLOPs of an arm at a given budget, as FLOPS defines them."""
        arm, own = self.arms[name], self.epochs(name, epochs)
        found = self._each(name) * own
        written = config_of(arm, {}).on_policy * max(0, math.ceil(own) - 1)
        found += 2 * self._work(name)[1] * written
        if arm.reference:
            found += self._scoring(name) * (min(1.0, own) if self._scored_once(name) else own)
            found += self.cost(arm.reference, epochs)
        return found

    def _each(self, name: str) -> float:
        """What an epoch costs, the reference head's part left out."""
        config = config_of(self.arms[name], {})
        shallow, (whole, first) = unrolling(config)[1], self._work(name)
        passes = 1 + BACKWARD + ("average" in needs(config.selection))
        return passes * (shallow * first + (1 - shallow) * whole)

    def _scoring(self, name: str) -> float:
        """What the reference head's losses cost an epoch."""
        return self._work(name)[0]

    def _work(self, name: str) -> tuple[float, float]:
        """As in `work`; as if all steps were alike where no task says more."""
        config = config_of(self.arms[name], {})
        usual = head_class(config.head).default_unroll
        return self.work.get(name, (unrolling(config)[0] / usual, 1 / usual))

    def uncounted(self, name: str) -> list[str]:
        """Of an arm and those that its budget depends on: whose work is still to be counted."""
        arm, config = self.arms[name], config_of(self.arms[name], {})
        unroll, shallow = unrolling(config)
        usual = head_class(config.head).default_unroll
        other = shallow or config.on_policy or unroll != usual
        found = [name] if other and name not in self.work else []
        for link in filter(None, (arm.reference, arm.match)):
            found += self.uncounted(link)
        return found

    def _scored_once(self, name: str) -> bool:
        """Whether the reference head's losses are kept; else they are computed in every epoch."""
        config = config_of(self.arms[name], {})
        return not config.on_policy and config.features != "recompute"

    def epochs(self, name: str, epochs: float) -> float:
        """How many passes over its data an arm makes at a given budget."""
        arm, each = self.arms[name], self._each(name)
        if not arm.match:
            return epochs * float(arm.config.get("epochs", 1))
        left = self.cost(arm.match, epochs)
        if not arm.reference:
            return left / each
        left -= self.cost(arm.reference, epochs)
        scoring = self._scoring(name)
        made = left / (each + scoring)  # where every epoch scores with the reference head, too
        return max(made, (left - scoring) / each) if self._scored_once(name) else made

    def check(self) -> None:
        """Raise UserError where arms cannot be what they say."""
        for name, arm in self.arms.items():
            config = config_of(arm, {})
            if not isinstance(arm.config.get("data", []), list):
                raise UserError(f"arm {name}: data is a list of files, data: [FILE, ...]")
            if ("reference" in needs(config.selection)) != bool(arm.reference):
                raise UserError(
                    f"arm {name}, selection {config.selection}: `reference: ARM` goes with "
                    "selections that need a reference head, and only with those"
                )
            if arm.match and ("epochs" in arm.config or config.on_policy):
                raise UserError(f"arm {name}: `match` sets the epochs, and knows no on_policy")
            if arm.reference:
                theirs = config_of(self.arms[arm.reference], {})
                if unrolling(config)[0] != unrolling(theirs)[0]:
                    raise UserError(
                        f"arms {name} and {arm.reference} differ in unroll: a reference "
                        "head's losses are those of the same unroll steps"
                    )
            for other in filter(None, (arm.reference, arm.match)):
                theirs = config_of(self.arms[other], {})
                for key in RELATED:
                    if getattr(config, key) != getattr(theirs, key):
                        raise UserError(
                            f"arms {name} and {other} differ in {key}: their heads or FLOPs cannot "
                            "be related"
                        )
            if self.epochs(name, 1.0) <= 0:
                raise UserError(f"arm {name}: nothing is left to train after its reference stage")


def config_of(arm: CellArm, given: dict[str, Any]) -> TrainConfig:
    """The arm's TrainConfig with some fields given; UserError for one that there is not."""
    known = {option.name: kind_of(option) for option in fields(TrainConfig)}
    values = {name: value for name, value in arm.config.items() if name != "epochs"} | given
    for name, value in arm.config.items():
        if name not in known:
            raise UserError(f"arm {arm.name}: {name!r} is no setting of scripts/train_head.py")
        if name in GIVEN:
            raise UserError(f"arm {arm.name}: {name} is the grid's to say, not an arm's")
        if isinstance(value, str) and known[name] in (int, float):
            raise UserError(
                f"arm {arm.name}: {name} {value!r} is text to YAML, which reads numbers like 3.0e-4"
            )
    try:
        return TrainConfig(**values)
    except UserError as error:
        raise UserError(f"arm {arm.name}: {error}") from error


def read_plan(path: Path) -> Plan:
    """An arms file (YAML): `train`, `arms`, `primary`, and if wanted `seeds` and `tasks`.

    An arm has the settings of scripts/train_head.py, over those of `train`, and may have
    `reference: ARM`, `match: ARM` and `epochs: FACTOR` (of the budget). What `tasks` says of a task
    (OF_TASKS) is over that of every arm. Raises UserError where
    something is unknown, or an arm comes before the one that it needs.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        shared, given = found.get("train") or {}, found["arms"]
        arms: dict[str, CellArm] = {}
        for name, settings in given.items():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise UserError(f"{path}: arm {name!r}: a name is text of letters, digits and .+-_")
            values = shared | (settings or {})
            links = {key: values.pop(key, None) for key in ("reference", "match")}
            arms[name] = CellArm(name, values, **links)
            for other in filter(None, links.values()):
                if other not in arms:
                    raise UserError(f"{path}: arm {name} needs {other!r}; put that before it")
        plan = Plan(
            arms, tuple(found["primary"]), found.get("seeds") or {}, found.get("tasks") or {}
        )
        if len(plan.primary) != 2:
            raise UserError(f"{path}: primary is two arms, the second the baseline of all")
        for name in (*plan.primary, *plan.seeds):
            if name not in arms:
                raise UserError(f"{path}: there is no arm {name!r}")
        for name, count in plan.seeds.items():
            if not isinstance(count, int) or count < 1:
                raise UserError(f"{path}: seeds of {name}: {count!r} is no number of seeds")
        for task, own in plan.tasks.items():
            unknown = sorted(set(own) - set(OF_TASKS)) if isinstance(own, dict) else [str(own)]
            if unknown:
                raise UserError(
                    f"{path}: task {task}: {', '.join(unknown)}: a task's own settings are "
                    f"{{{', '.join(OF_TASKS)}: ...}}"
                )
            for name in plan.arms:
                config_of(plan.arm(name, task), {})
        plan.check()
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        why = str(error) if isinstance(error, yaml.YAMLError) else repr(error)  # with its line
        raise UserError(f"{path} is no arms file: {why}; see eval/arms.yaml") from error
    return plan


@dataclass(frozen=True)
class GridSettings:
    """What all cells of a grid have in common."""

    target: str
    data: str  # answer file of a task, with {task}
    prompts: str  # prompts to measure on, with {task}
    budget: str  # "best", or epochs: "3" ends with the last weights
    most_epochs: float  # where the budget is "best"
    limit: int  # prompts a task
    max_new_tokens: int
    depth: int
    dtype: str | None = None

    @property
    def epochs(self) -> float:
        """The budget in epochs."""
        return self.most_epochs if self.budget == "best" else float(self.budget)


@dataclass(frozen=True)
class Cell:
    """One run of one arm."""

    task: str
    arm: str
    seed: int

    def within(self, folder: Path, settings: GridSettings) -> Path:
        """Where it lies in a folder of cells, without an ending."""
        return folder / settings.budget / self.task / f"{self.arm}-seed{self.seed}"


def cells_of(plan: Plan, tasks: Sequence[str], seeds: int, only: Sequence[str] = ()) -> list[Cell]:
    """All cells, seed by seed and task by task, so that what is there is always comparable.

    only: these arms alone, and the reference arms that they need.
    """
    if unknown := set(only) - set(plan.arms):
        raise UserError(f"--only: there is no arm {', '.join(sorted(unknown))}")
    wanted = set(only or plan.arms)
    count = {name: plan.seeds.get(name, seeds) for name in plan.arms}
    for name in reversed(plan.arms):  # an arm comes after its reference
        if name in wanted and (needed := plan.arms[name].reference):
            wanted.add(needed)
            count[needed] = max(count[needed], count[name])
    return [
        Cell(task, arm, seed)
        for seed in range(max(count[name] for name in wanted))
        for task in tasks
        for arm in plan.arms
        if arm in wanted and seed < count[arm]
    ]


# ---- work ----------------------------------------------------------------------------------------


def run_grid(
    plan: Plan,
    cells: Sequence[Cell],
    settings: GridSettings,
    workshop: Workshop,
    out: Path,
    work: Path,
) -> int:
    """Train and measure every cell that is not done and not taken; how many were done here.

    Records go to OUT/cells, runs (heads, checkpoints) to WORK. A cell whose reference head another
    worker is training waits; whoever has nothing else to do looks again. A reference head that is
    gone, as where records came from another machine, is trained again.
    """
    environment()  # notes what code runs, before it is changed
    _check_arms(plan, cells, settings)
    to_do = [cell for cell in cells if not _record(cell, out, settings).exists()]
    _check_files(plan, to_do, settings)
    plans = {
        task: on_task(plan, task, {c.arm for c in cells if c.task == task}, settings, workshop)
        for task in dict.fromkeys(cell.task for cell in cells)
    }
    _check_made(plans, cells, settings, workshop, out)
    done, began = 0, time.monotonic()
    while open_cells := [cell for cell in cells if not _record(cell, out, settings).exists()]:
        before = done
        for cell in [*_lost(open_cells, plan, settings, out, work), *open_cells]:
            if not _ready(cell, plan, work, settings):
                continue
            path = _record(cell, out, settings)
            with taken(path.with_suffix(".lock")) as mine:
                if not mine or (path.exists() and cell in open_cells):
                    continue
                made = run_cell(plans[cell.task], cell, settings, workshop, work)
                if not path.exists():
                    write_json(path, made)
            done += 1
            left = sum(not _record(c, out, settings).exists() for c in cells)
            minutes = left * (time.monotonic() - began) / done / 60
            say(f"{cell}: done; {left} of {len(cells)} left, {minutes:.0f} minutes for one worker")
        if done == before:
            time.sleep(5)
    return done


def on_task(
    plan: Plan, task: str, names: Collection[str], settings: GridSettings, workshop: Workshop
) -> Plan:
    """The plan with the work of these arms' unroll steps, where it has to be counted.

    Counted on a text of the mean lengths of the arm's training records. Where a file of those is
    not here the plan stays without.
    """
    work = dict(plan.work)
    for name in dict.fromkeys(other for one in names for other in plan.uncounted(one)):
        files = data_files(plan.arms[name], task, settings)
        if not all(Path(file).is_file() for file in files):
            continue
        config = filled(config_of(plan.arm(name, task), {"data": files}), workshop.target)
        train, _ = read_records(config, workshop.target)
        prompt = max(1, round(fmean(len(record.prompt_ids) for record in train)))
        answer = max(1, round(fmean(len(record.answer_ids) for record in train)))
        usual = head_class(config.head).default_unroll
        steps = unrolling(config)[0]
        head = new_head(head_sizes(replace(config, unroll=max(steps, usual)), workshop.target))
        head.eval().bind(workshop.target)
        own, first, unit = (forward_flops(head, n, prompt, answer) for n in (steps, 1, usual))
        work[name] = (own / unit, first / unit)
    return replace(plan, work=work)


def _check_made(
    plans: dict[str, Plan],
    cells: Sequence[Cell],
    settings: GridSettings,
    workshop: Workshop,
    out: Path,
) -> None:
    """Raise UserError if what is on record of these tasks and what these cells are, or will be,
    could not stand in one table."""
    digest = cache(sha256)  # arms share files
    for task in dict.fromkeys(cell.task for cell in cells):
        of_task = [cell for cell in cells if cell.task == task]
        folder = _record(of_task[0], out, settings).parent
        made = [(str(path), facts(read_json(path))) for path in sorted(folder.glob("*.json"))]
        open_cells = any(not _record(cell, out, settings).exists() for cell in of_task)
        source = prompts_of(task, settings, workshop.target) if open_cells else None
        for cell in {cell.arm: cell for cell in of_task}.values():
            to_make = _to_make(plans[task], cell, settings, workshop.target, source, digest)
            made.append((f"this command for arm {cell.arm}", facts(to_make)))
        check_alike(made)


def _to_make(
    plan: Plan,
    cell: Cell,
    settings: GridSettings,
    target: Target,
    source: Source | None,
    digest: Callable[[Path], str],
) -> dict[str, Any]:
    """What a cell's record will say, as far as it is known before any work."""
    arm = plan.arm(cell.arm, cell.task)
    given = _given(plan, cell, settings, 1.0)
    config = asdict(filled(config_of(arm, given), target))
    counted = not plan.uncounted(cell.arm)
    if "data" in arm.config or not counted:  # these depend on how long its texts are
        del config["epochs"], config["evaluations"]
    if arm.reference or config["init"]:
        del config["draft_vocab"]  # that head's
    files = [Path(name) for name in given["data"]]
    return {
        "arm": cell.arm,
        "settings": asdict(settings),
        "target_fingerprint": target.fingerprint,
        "config": config,
        "as_planned": _as_planned(arm),
        "head_flops": plan.cost(cell.arm, settings.epochs) if counted else None,
        "prompts": source.describe() if source else {},
        "data_sha256": [digest(file) for file in files] if all(map(Path.is_file, files)) else None,
    }


def _as_planned(arm: CellArm) -> dict[str, Any]:
    """What the arms file says of an arm."""
    links = {"reference": arm.reference, "match": arm.match}
    return arm.config | {name: other for name, other in links.items() if other}


def _check_arms(plan: Plan, cells: Sequence[Cell], settings: GridSettings) -> None:
    """Raise UserError for arms that this budget cannot train, and for chains that are deeper than
    an arm's head drafts, or than its answers."""
    if settings.max_new_tokens <= settings.depth:
        raise UserError(
            f"--max-new-tokens {settings.max_new_tokens}: too few for chains of --depth "
            f"{settings.depth} behind a first token"
        )
    for name in dict.fromkeys(cell.arm for cell in cells):
        config = config_of(plan.arms[name], {"epochs": plan.epochs(name, settings.epochs)})
        kind = head_class(config.head)
        deepest = unrolling(config)[0]
        if not kind.reads_tokens and settings.depth > deepest:
            raise UserError(
                f"arm {name}: its head drafts {deepest} tokens deep; give --depth {deepest}, or "
                f"the arm unroll: {settings.depth}"
            )


def _check_files(plan: Plan, cells: Sequence[Cell], settings: GridSettings) -> None:
    """Raise UserError for an answer file that is not there."""
    needed = [(cell.task, arm) for cell in cells for arm in (cell.arm, plan.baseline)]
    for task, arm in dict.fromkeys(needed):
        for name in data_files(plan.arms[arm], task, settings):
            if not Path(name).is_file():
                raise UserError(
                    f"task {task}: there is no {name}; make it (scripts/make_data.py --out "
                    f"{name}), or say where it is with --data PATTERN"
                )


def data_files(arm: CellArm, task: str, settings: GridSettings) -> list[str]:
    """The answer files that an arm is trained on."""
    return [for_task(str(name), task) for name in arm.config.get("data", [settings.data])]


def for_task(pattern: str, task: str) -> str:
    """A pattern with the task's name put in; UserError for one with another field."""
    try:
        return pattern.format(task=task)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{pattern!r}: {{task}} is the only field that a pattern has") from error


def _lost(
    open_cells: Sequence[Cell], plan: Plan, settings: GridSettings, out: Path, work: Path
) -> list[Cell]:
    """Cells that are on record, but whose head is not here and is a reference that others need."""
    needed = [
        Cell(cell.task, name, cell.seed)
        for cell in open_cells
        if (name := plan.arms[cell.arm].reference)
    ]
    return [
        cell
        for cell in dict.fromkeys(needed)
        if _record(cell, out, settings).exists() and not _trained(cell, work, settings)
    ]


def _record(cell: Cell, out: Path, settings: GridSettings) -> Path:
    path = cell.within(out / "cells", settings)
    return path.with_name(path.name + ".json")


def _ready(cell: Cell, plan: Plan, work: Path, settings: GridSettings) -> bool:
    """Whether its reference head, if it needs one, is there."""
    needed = plan.arms[cell.arm].reference
    return needed is None or _trained(Cell(cell.task, needed, cell.seed), work, settings)


def _trained(cell: Cell, work: Path, settings: GridSettings) -> bool:
    return (head_folder(cell, work, settings) / "train.json").exists()


def head_folder(cell: Cell, work: Path, settings: GridSettings) -> Path:
    """Where a cell's trained head lies."""
    return cell.within(work, settings) / "head"


def prompts_of(task: str, settings: GridSettings, target: Target) -> Source:
    """The prompts that a task is measured on."""
    room = settings.max_new_tokens + settings.depth
    return read_source(for_task(settings.prompts, task), target, settings.limit, room)


def run_cell(
    plan: Plan, cell: Cell, settings: GridSettings, workshop: Workshop, work: Path
) -> dict[str, Any]:
    """Train one head, going on from its last checkpoint, and measure it; the cell's record."""
    arm, folder = plan.arm(cell.arm, cell.task), cell.within(work, settings)
    given = _given(plan, cell, settings, _longer(plan, cell, settings, workshop))
    if arm.reference:
        needed = Cell(cell.task, arm.reference, cell.seed)
        given["reference"] = str(head_folder(needed, work, settings))
    config = config_of(arm, given)
    resumed = (folder / "run.json").exists()
    if resumed:
        _check_same(folder, config)
    if config.features is None:  # never computed again: FLOPS counts what is kept
        config.features = shared_features(config, workshop.target, work) or "memory"
    begun = replace(config, features=None) if resumed else config  # the run knows where they are
    trained = run_training(begun, folder, resumed, workshop)
    head = load_head(trained, workshop.target)
    source = prompts_of(cell.task, settings, workshop.target)
    ids = [prompt.ids for prompt in source.prompts]
    found = acceptance_figures(
        workshop.target, head, ids, settings.max_new_tokens, settings.depth, cell.seed
    )
    notes = json.loads((trained / "train.json").read_text())
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    speeds = [line["tokens_per_s"] for line in notes["curves"] if "tokens_per_s" in line]
    per_prompt = found.pop("per_prompt")
    return {
        "kind": "compare_cell",
        "task": cell.task,
        "arm": cell.arm,
        "seed": cell.seed,
        "budget": settings.budget,
        "settings": asdict(settings),
        "target_fingerprint": workshop.target.fingerprint,
        "config": notes["config"],
        "as_planned": _as_planned(arm),
        "epochs": notes["epochs"],
        "steps": notes["steps"],
        "step_taken": notes["best_step"] if settings.budget == "best" else notes["steps"],
        "answer_token_passes": notes["answer_token_passes"],
        "answer_tokens": notes["data"]["answer_tokens"],
        "head_flops": plan.cost(cell.arm, settings.epochs),
        "weights": sum(weight.numel() for weight in head.parameters()),
        "train_seconds": None if resumed else notes["seconds_since_last_start"],
        "train_tokens_per_s": sum(speeds) / len(speeds) if speeds else None,
        "held_back_tau_sim": _held_back(notes, given["take"]),
        "prompts": source.describe() | {"ids": [prompt.id for prompt in source.prompts]},
        "data_sha256": [sha256(file) for file in given["data"]],
        "figures": found,
        "per_prompt": per_prompt,
        "environment": environment(),
    }


def _given(plan: Plan, cell: Cell, settings: GridSettings, longer: float) -> dict[str, Any]:
    """What the grid says of a cell's training, beside its arm; longer: see `_longer`."""
    epochs = plan.epochs(cell.arm, settings.epochs) * longer
    given: dict[str, Any] = {
        "target": settings.target,
        "dtype": settings.dtype,
        "epochs": epochs,
        "seed": cell.seed,
        "take": "last",
        "data": data_files(plan.arms[cell.arm], cell.task, settings),
    }
    if settings.budget == "best":  # a candidate an epoch
        given |= {"take": "best", "evaluations": math.ceil(epochs)}
    return given


def _longer(plan: Plan, cell: Cell, settings: GridSettings, workshop: Workshop) -> float:
    """Answer tokens of the baseline's training records over those of the arm's: 1 for one data."""
    arms = [plan.arm(name, cell.task) for name in (cell.arm, plan.baseline)]
    files = [data_files(arm, cell.task, settings) for arm in arms]
    if files[0] == files[1]:
        return 1.0
    tokens = []
    for arm, names in zip(arms, files, strict=True):
        train, _ = read_records(config_of(arm, {"data": names}), workshop.target)
        tokens.append(sum(len(record.answer_ids) for record in train))
    return tokens[1] / tokens[0]


def _held_back(notes: dict[str, Any], take: str) -> float:
    """tau_sim on held-back answers, of the weights that the run ended with."""
    if take == "best":
        return notes["best_tau_sim"]
    return [line["eval_tau_sim"] for line in notes["curves"] if "eval_tau_sim" in line][-1]


def _check_same(folder: Path, config: TrainConfig) -> None:
    """Raise UserError if the run that was begun in `folder` is of another arm than it is now."""
    begun = read_json(folder / "run.json")["config"]
    for name, value in asdict(config).items():
        if name not in begun or name == "features":
            continue  # a setting that came later; where features are kept changes nothing
        if value is not None and begun[name] != value:
            raise UserError(
                f"{folder} was begun with {name} {begun[name]!r}, the arm now has {value!r}: put "
                "the arm back, or delete that folder"
            )


def shared_features(config: TrainConfig, target: Target, work: Path) -> str | None:
    """A store under WORK/features with what heads of this kind read of the data, for all cells.

    None for heads that read no features.
    """
    layers = head_class(config.head).feature_layers(target.num_layers)
    if not layers:
        return None
    folder = work / "features" / "-".join(map(str, layers))
    records = load_training(config.data, target, min(config.max_length, target.context))
    with taken(folder.with_suffix(".lock"), wait=True):
        write_store(target, records, layers, folder, str(target.dtype).removeprefix("torch."))
    return str(folder)
