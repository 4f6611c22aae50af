"""A grid of training runs that are compared: (arm, task, seed), each a cell of its own.

Cells are independent files, so that any number of workers, on any number of machines, can share the
folder: a cell is done where its file is, and taken while its lock is fresh.
"""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from adaspec_eagle.acceptance import acceptance_figures
from adaspec_eagle.bench import Source, read_source
from adaspec_eagle.callbacks import say
from adaspec_eagle.errors import UserError
from adaspec_eagle.head import load_head
from adaspec_eagle.record import environment, sha256, write_json
from adaspec_eagle.selection import needs
from adaspec_eagle.targets import Target
from adaspec_eagle.train import TrainConfig, Workshop, run_training

HEARTBEAT = 30.0  # seconds between touches of a lock
STALE = 10 * HEARTBEAT  # a lock older than that is nobody's
BACKWARD = 2  # a backward pass costs two forward passes

FLOPS = (
    "head FLOPs in forward passes of the head over one answer token of the training data: 3 a "
    "token and epoch (forward 1, backward 2); AdaSPEC's reference stage the same, and 1 for the "
    "reference head's losses, which are computed once; a moving average 1 a token and epoch. The "
    "target's own pass, the same for all arms, is not in it"
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
    primary: tuple[str, str]  # the contrast fixed beforehand
    baseline: str  # the arm that all others are compared with
    seeds: dict[str, int] = field(default_factory=dict)  # by arm; others as many as --seeds

    def cost(self, name: str, epochs: float) -> float:
        """Head FLOPs of an arm at a given budget, as FLOPS defines them."""
        arm = self.arms[name]
        config = config_of(arm, {})
        own = (1 + BACKWARD) * self.epochs(name, epochs)
        if "average" in needs(config.selection):
            own += self.epochs(name, epochs)
        if arm.reference:
            own += 1 + self.cost(arm.reference, epochs)
        return own

    def epochs(self, name: str, epochs: float) -> float:
        """How many passes over its data an arm makes at a given budget."""
        arm = self.arms[name]
        if arm.match:
            return self.cost(arm.match, epochs) / (1 + BACKWARD)
        return epochs * float(arm.config.get("epochs", 1))


def config_of(arm: CellArm, given: dict[str, Any]) -> TrainConfig:
    """The arm's TrainConfig with some fields given; UserError for one that there is not."""
    known = {f.name for f in fields(TrainConfig)}
    values = {name: value for name, value in arm.config.items() if name != "epochs"} | given
    for name in values:
        if name not in known:
            raise UserError(f"arm {arm.name}: {name!r} is no setting of scripts/train_head.py")
    return TrainConfig(**values)


def read_plan(path: Path) -> Plan:
    """An arms file (YAML): `train`, `arms`, `primary`, `baseline`, `seeds`.

    An arm has the settings of scripts/train_head.py, over those of `train`, and may have
    `reference: ARM`, `match: ARM` and `epochs: FACTOR` (of the budget). Raises UserError where
    something is unknown, or an arm comes before the one that it needs.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        shared, given = found.get("train") or {}, found["arms"]
        arms: dict[str, CellArm] = {}
        for name, settings in given.items():
            values = shared | (settings or {})
            links = {key: values.pop(key, None) for key in ("reference", "match")}
            arms[name] = CellArm(name, values, **links)
            for other in filter(None, links.values()):
                if other not in arms:
                    raise UserError(f"{path}: arm {name} needs {other!r}; put that before it")
            selection = config_of(arms[name], {}).selection
            if ("reference" in needs(selection)) != bool(links["reference"]):
                raise UserError(
                    f"{path}: arm {name}, selection {selection}: `reference: ARM` goes with "
                    "selections that need a reference head, and only with those"
                )
        plan = Plan(arms, tuple(found["primary"]), found["baseline"], found.get("seeds") or {})
        for name in (*plan.primary, plan.baseline, *plan.seeds):
            if name not in arms:
                raise UserError(f"{path}: there is no arm {name!r}")
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no arms file: {error!r}; see eval/arms.yaml") from error
    return plan


@dataclass(frozen=True)
class Settings:
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

    def within(self, folder: Path, settings: Settings) -> Path:
        """Where it lies in a folder of cells, without an ending."""
        return folder / settings.budget / self.task / f"{self.arm}-seed{self.seed}"


def cells_of(plan: Plan, tasks: Sequence[str], seeds: int, only: Sequence[str] = ()) -> list[Cell]:
    """All cells, seed by seed and task by task, so that what is there is always comparable.

    only: these arms alone, and the reference arms that they need.
    """
    if unknown := set(only) - set(plan.arms):
        raise UserError(f"--only: there is no arm {', '.join(sorted(unknown))}")
    wanted = set(only or plan.arms)
    for name in reversed(plan.arms):  # an arm comes after its reference
        if name in wanted and (needed := plan.arms[name].reference):
            wanted.add(needed)
    return [
        Cell(task, arm, seed)
        for seed in range(max([seeds, *plan.seeds.values()]))
        for task in tasks
        for arm in plan.arms
        if arm in wanted and seed < plan.seeds.get(arm, seeds)
    ]


# ---- taking turns --------------------------------------------------------------------------------


@contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Whether this worker holds the lock file inside the block; kept fresh while it does.

    A lock that has not been touched for STALE seconds, or whose process on this machine is gone, is
    taken over.
    """
    if _is_dead(path):
        path.unlink(missing_ok=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
    except FileExistsError:
        yield False
        return
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT):
            path.touch()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        path.unlink(missing_ok=True)


def _is_dead(path: Path) -> bool:
    try:
        holder, age = json.loads(path.read_text()), time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return path.exists() and time.time() - path.stat().st_mtime > STALE
    if holder["host"] == socket.gethostname():
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return age > STALE


# ---- work ----------------------------------------------------------------------------------------


def run_grid(
    plan: Plan, cells: Sequence[Cell], settings: Settings, workshop: Workshop, out: Path, work: Path
) -> int:
    """Train and measure every cell that is not done and not taken; how many were done here.

    Records go to OUT/cells, runs (heads, checkpoints) to WORK. A cell whose reference head another
    worker is training waits; whoever has nothing else to do looks again. A reference head that is
    gone, as where records came from another machine, is trained again.
    """
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
                made = run_cell(plan, cell, settings, workshop, work)
                if not path.exists():
                    write_json(path, made)
            done += 1
            left = sum(not _record(c, out, settings).exists() for c in cells)
            minutes = left * (time.monotonic() - began) / done / 60
            say(f"{cell}: done; {left} of {len(cells)} left, {minutes:.0f} minutes for one worker")
        if done == before:
            time.sleep(5)
    return done


def _lost(
    open_cells: Sequence[Cell], plan: Plan, settings: Settings, out: Path, work: Path
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


def _record(cell: Cell, out: Path, settings: Settings) -> Path:
    path = cell.within(out / "cells", settings)
    return path.with_name(path.name + ".json")


def _ready(cell: Cell, plan: Plan, work: Path, settings: Settings) -> bool:
    """Whether its reference head, if it needs one, is there."""
    needed = plan.arms[cell.arm].reference
    return needed is None or _trained(Cell(cell.task, needed, cell.seed), work, settings)


def _trained(cell: Cell, work: Path, settings: Settings) -> bool:
    return (head_folder(cell, work, settings) / "train.json").exists()


def head_folder(cell: Cell, work: Path, settings: Settings) -> Path:
    """Where a cell's trained head lies."""
    return cell.within(work, settings) / "head"


def prompts_of(task: str, settings: Settings, target: Target) -> Source:
    """The prompts that a task is measured on."""
    room = settings.max_new_tokens + settings.depth
    return read_source(settings.prompts.format(task=task), target, settings.limit, room)


def run_cell(
    plan: Plan, cell: Cell, settings: Settings, workshop: Workshop, work: Path
) -> dict[str, Any]:
    """Train one head, going on from its last checkpoint, and measure it; the cell's record."""
    arm, folder = plan.arms[cell.arm], cell.within(work, settings)
    given: dict[str, Any] = {
        "target": settings.target,
        "dtype": settings.dtype,
        "epochs": plan.epochs(cell.arm, settings.epochs),
        "seed": cell.seed,
        "take": "best" if settings.budget == "best" else "last",
    }
    if "data" not in arm.config:
        given["data"] = [settings.data.format(task=cell.task)]
    else:
        given["data"] = [str(name).format(task=cell.task) for name in arm.config["data"]]
    if arm.reference:
        needed = Cell(cell.task, arm.reference, cell.seed)
        given["reference"] = str(head_folder(needed, work, settings))
    config = config_of(arm, given)
    began = time.perf_counter()
    trained = run_training(config, folder, (folder / "run.json").exists(), workshop)
    seconds = time.perf_counter() - began
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
        "config": notes["config"],
        "epochs": notes["epochs"],
        "steps": notes["steps"],
        "answer_token_passes": notes["answer_token_passes"],
        "answer_tokens": notes["data"]["answer_tokens"],
        "head_flops": plan.cost(cell.arm, settings.epochs),
        "weights": sum(weight.numel() for weight in head.parameters()),
        "train_seconds": seconds,
        "train_tokens_per_s": sum(speeds) / len(speeds) if speeds else None,
        "held_back_tau_sim": notes["best_tau_sim"],
        "prompts": source.describe() | {"ids": [prompt.id for prompt in source.prompts]},
        "data_sha256": [sha256(file) for file in given["data"]],
        "figures": found,
        "per_prompt": per_prompt,
        "environment": environment(),
    }
