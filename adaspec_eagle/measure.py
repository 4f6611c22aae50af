"""Measure decoding: arms that alternate over the same prompts, timed, counted and summed up.

An *arm* is one way to decode: `generate` (transformers' own), `loop` (ours without a draft),
`chain` and `tree`. A *unit* is one batch of prompts, decoded by every arm before the next unit
starts; the order of the arms rotates from unit to unit, so that drift of the machine cancels.

Legend: B rows, T time, P units, A arms, R bootstrap resamples.
"""

import argparse
import hashlib
import json
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files as package_files
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from adaspec_eagle import data
from adaspec_eagle.errors import UserError, explain_out_of_memory
from adaspec_eagle.generate import generate
from adaspec_eagle.head import DraftHead, load_head
from adaspec_eagle.hub import task_prompts
from adaspec_eagle.record import environment, interval, resampled_sums, sha256, shown
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.targets import DEFAULT_TARGET, Target

BASELINES = ("generate", "loop")
PARTS = ("prefill", "draft", "verify", "rest")
RATIOS = (
    "tokens_per_s",
    "decode_tokens_per_s",
    "tau",
    "speedup_vs_generate",
    "speedup_vs_loop",
    "decode_speedup_vs_generate",
    "decode_speedup_vs_loop",
)
DEFINITIONS = {
    "tokens_per_s": "emitted tokens, trimmed at the end token, / wall seconds, prefill of target "
    "and head included; sums over prompts",
    "decode_tokens_per_s": "emitted tokens but the first of each answer / (wall - prefill) seconds",
    "speedup_vs_X": "tokens_per_s of the arm / tokens_per_s of arm X; same prompts, dtype, process",
    "decode_speedup_vs_X": "the same with decode_tokens_per_s",
    "tau": "acceptance length: tokens after the first / live (row, round) pairs; bonus token "
    "included, no drafting = 1",
    "alpha_by_depth": "chains only: P(depth d accepted | depth d-1 accepted), d = 1, 2, ...",
    "acceptance_by_depth": "P(depth d accepted) over live (row, round) pairs, d = 1, 2, ...",
    "greedy_alpha": "chains only: accepted / (accepted + rejected) draft tokens",
    "histogram": "histogram[a]: live (row, round) pairs that accepted a draft tokens",
    "ci95": "95 % percentile bootstrap, 2,000 resamples of units (batches of prompts), paired "
    "between arms, ratio of sums in each resample",
    "matched": "answers equal to those of arm generate, token by token, of `total`",
    "seconds": "wall seconds by part; their sum is the arm's wall time; transformers' generate is "
    "split into prefill and rest only",
    "peak_memory_bytes": "CUDA: peak allocated while the arm ran; CPU: peak resident set of the "
    "process while the arm ran",
    "generate": "transformers' model.generate, do_sample=False, no penalties, stock attention",
    "loop": "this package's decoding loop without a draft",
}


# ---- what is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the target."""

    id: str
    task: str
    source: str  # file or task name, as given
    messages: list[dict[str, str]]
    ids: list[int]


@dataclass(frozen=True)
class Source:
    """A prompt file (or a task's prompts) and how much of it is used."""

    name: str
    sha256: str
    prompts: list[Prompt]

    def describe(self) -> dict[str, Any]:
        """What a result says about it."""
        return {"file": self.name, "sha256": self.sha256, "prompts": len(self.prompts)}


@dataclass(frozen=True)
class HeadChoice:
    """Which draft head is measured, and why that one."""

    folder: Path
    why: str


@dataclass(frozen=True)
class Bench:
    """Everything that a measurement needs, loaded and checked."""

    target: Target
    head: DraftHead
    choice: HeadChoice
    sources: list[Source]
    max_new_tokens: int
    batch_size: int
    allow_other_target: bool = False

    def units(self) -> list[list[Prompt]]:
        """Batches of prompts of one source each, in the order given."""
        size = self.batch_size
        starts = [(s.prompts, i) for s in self.sources for i in range(0, len(s.prompts), size)]
        return [prompts[i : i + size] for prompts, i in starts]


@dataclass(frozen=True)
class Arm:
    """One way to decode. `decode(ids [B, T], mask [B, T])` gives trimmed answers and counts."""

    key: str
    shape: str | None  # what it drafts, as `generate` takes it; None without a draft
    decode: Callable[[Tensor, Tensor], tuple[list[list[int]], AcceptanceStats]]


@dataclass(frozen=True)
class Outcome:
    """What one arm did with one unit; `stats.seconds` has PARTS, which add up to the wall time."""

    answers: list[list[int]]
    stats: AcceptanceStats
    peak_bytes: int

    @property
    def wall(self) -> float:
        """Wall seconds, prefill included."""
        return sum(self.stats.seconds.values())


@dataclass(frozen=True)
class Unit:
    """One batch after all arms decoded it: outcome by arm key, in the order in which they ran."""

    prompts: list[Prompt]
    outcomes: dict[str, Outcome]


# ---- choosing: arguments, target, head, prompts --------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, prompts: Path) -> None:
    """The options that every measuring script has; `prompts` is the default prompt file."""
    add = parser.add_argument
    add("--target", default=DEFAULT_TARGET, help="alias, hub id or folder (default: %(default)s)")
    add("--head", type=Path, metavar="DIR", help="draft head; default: the newest runs/*/head that "
        "was trained for this target, else the one that ships")  # fmt: skip
    add("--prompts", nargs="+", action="extend", metavar="FILE|TASK",
        help=f"prompt files (JSON Lines) or task names; default: {prompts.name}")  # fmt: skip
    add("--limit", type=positive, metavar="N", help="use the first N prompts of each file")
    add("--max-new-tokens", type=positive, default=128, metavar="N", help="default: %(default)s")
    add("--batch-size", type=positive, default=1, metavar="B", help="default: %(default)s")
    add("--dtype", help="bfloat16, float32, float64; default: bfloat16 where the device computes "
        "it natively, else float32")  # fmt: skip
    add("--seed", type=int, default=0, help="of the bootstrap (decoding is greedy); default: 0")
    add("--out", type=Path, metavar="DIR", help="folder for result.json")
    add("--allow-other-target", action="store_true",
        help="measure a head that was trained for other weights")  # fmt: skip
    parser.set_defaults(default_prompts=prompts)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def add_draft_arguments(parser: argparse.ArgumentParser) -> None:
    """`--tree` and `--chain`."""
    add = parser.add_argument
    add("--tree", nargs="?", const="dynamic", choices=("dynamic", "static"),
        help="draft trees (dynamic unless named); alone it also runs a chain of 4")  # fmt: skip
    add("--chain", type=positive, metavar="K", help="draft chains of K tokens")


def draft_shapes(tree: str | None, chain: int | None) -> dict[str, str]:
    """Arm key -> shape. With neither option the same as a bare `--tree`."""
    if tree is None and chain is None:
        tree = "dynamic"
    shapes = {"chain": f"chain:{chain or 4}"} if chain or tree else {}
    return shapes | ({"tree": tree} if tree else {})


def open_bench(args: argparse.Namespace) -> Bench:
    """Load target, head and prompts as the arguments say. Raises UserError on anything unfit."""
    target = Target.load(args.target, dtype=args.dtype)
    choice = HeadChoice(args.head, "--head") if args.head else find_head(target)
    head = load_head(choice.folder, target, allow_other_target=args.allow_other_target)
    names = list(dict.fromkeys(args.prompts or [shown(args.default_prompts)]))
    sources = [read_source(name, target, args.limit, args.max_new_tokens) for name in names]
    sizes = (args.max_new_tokens, args.batch_size)
    return Bench(target, head, choice, sources, *sizes, args.allow_other_target)


def find_head(target: Target, runs: Path = Path("runs")) -> HeadChoice:
    """The newest `runs/*/head` trained for these weights, else the shipped head for them."""
    trained = [c for c in runs.glob("*/head/config.json") if _fits(c, target)]
    if trained:
        newest = max(trained, key=lambda config: config.stat().st_mtime)
        return HeadChoice(newest.parent, f"the newest under {runs}/ for this target")
    shipped = Path(str(package_files("adaspec_eagle.heads"))) / "pretrained"
    for config in sorted(shipped.glob("*/config.json")):
        if _fits(config, target):
            return HeadChoice(config.parent, "shipped with the package")
    raise UserError(
        f"no draft head for target {target.name!r} (weights {target.fingerprint}): none under "
        f"{runs}/*/head and none ships. Train one (python scripts/train_head.py --target "
        f"{target.name}) or name one (--head DIR)"
    )


def _fits(config: Path, target: Target) -> bool:
    """Whether the head with this config.json was trained for these weights (unreadable: no)."""
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.get("target_fingerprint") == target.fingerprint


def read_source(name: str, target: Target, limit: int | None, max_new_tokens: int) -> Source:
    """Prompts of a file, or of a task by its name, as token ids; too long ones are refused."""
    path = Path(name)
    if path.exists():
        records, digest = data.read_prompts(path, limit), sha256(path)
    elif path.suffix or len(path.parts) > 1:
        raise UserError(f"prompt file {name} does not exist")
    else:
        records = task_prompts(name, limit)
        digest = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
    prompts = [_prompt(record, name, target) for record in records]
    if not prompts:
        raise UserError(f"{name} has no prompts")
    for prompt in prompts:
        _check_length(prompt, target, max_new_tokens)
    return Source(name, digest, prompts)


def _prompt(record: dict[str, Any], source: str, target: Target) -> Prompt:
    messages = data.prompt_messages(record["messages"])  # the first turn only
    ids = target.chat_ids(messages)
    return Prompt(record["id"], record.get("task") or "", source, messages, ids)


def _check_length(prompt: Prompt, target: Target, max_new_tokens: int) -> None:
    need = len(prompt.ids) + max_new_tokens
    if need > target.context:
        raise UserError(
            f"prompt {prompt.id} of {prompt.source} has {len(prompt.ids)} tokens; with "
            f"{max_new_tokens} new ones that is {need}, over the target's context of "
            f"{target.context}. Lower --max-new-tokens or leave the prompt out"
        )


# ---- arms ----------------------------------------------------------------------------------------


def build_arms(bench: Bench, shapes: dict[str, str]) -> list[Arm]:
    """The two baselines, then an arm for each shape (`draft_shapes`)."""
    baseline = partial(greedy_baseline, bench.target, bench.max_new_tokens)
    ours: dict[str, str | None] = {"loop": None, **shapes}
    arms = [Arm(key, shape, partial(decode, bench, shape)) for key, shape in ours.items()]
    return [Arm("generate", None, baseline), *arms]


def decode(
    bench: Bench, shape: str | None, ids: Tensor, mask: Tensor
) -> tuple[list[list[int]], AcceptanceStats]:
    """This package's greedy decoding, ids and mask `[B, T]`; shape None: without a draft."""
    made = generate(
        bench.target,
        bench.head if shape else None,
        ids,
        mask,
        tree=shape or "chain",
        max_new_tokens=bench.max_new_tokens,
        allow_other_target=bench.allow_other_target,
    )
    return made.answers, made.stats


class FirstToken(LogitsProcessor):
    """Notes when the first token's logits are there, which is when prefill has ended."""

    def __init__(self) -> None:
        self.time: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Give the scores back as they are."""
        if self.time is None:
            synchronize(scores.device)
            self.time = perf_counter()
        return scores


def greedy_baseline(
    target: Target, max_new_tokens: int, ids: Tensor, mask: Tensor
) -> tuple[list[list[int]], AcceptanceStats]:
    """Plain `model.generate`: ids and mask `[B, T]`, left-padded. Trimmed answers and counts."""
    clock = FirstToken()
    with plain_greedy(target):
        start = perf_counter()
        sequences = target.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
            logits_processor=LogitsProcessorList([clock]),
        )  # [B, T + new]  # fmt: skip
    ends = set(target.eos_token_ids)
    answers = [trim(row, ends) for row in sequences[:, ids.shape[1] :].tolist()]
    new = sum(len(answer) for answer in answers)
    after = new - len(answers)
    prefill = (clock.time or start) - start
    stats = AcceptanceStats([after], [], after, after, new, 0, {"prefill": prefill})
    return answers, stats


@contextmanager
def plain_greedy(target: Target) -> Iterator[None]:
    """Inside the block `target.model.generate` is the argmax: no penalty from the model's folder.

    Models ship generation defaults (Qwen2.5 a repetition penalty) that would make two baselines
    answer differently.
    """
    before = target.model.generation_config
    target.model.generation_config = GenerationConfig(
        eos_token_id=target.eos_token_ids or None, pad_token_id=target.pad_token_id
    )
    try:
        yield
    finally:
        target.model.generation_config = before


def trim(tokens: Sequence[int], ends: set[int]) -> list[int]:
    """Tokens up to and including the first end token."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return list(tokens[: stop + 1])


# ---- running -------------------------------------------------------------------------------------


def run_arms(bench: Bench, arms: Sequence[Arm], title: str) -> list[Unit]:
    """Decode every unit with every arm, alternating, with a progress bar on stderr.

    Each arm first decodes the longest unit once; those runs warm up and are not counted.
    """
    units = bench.units()
    longest = max(units, key=lambda unit: max(len(prompt.ids) for prompt in unit))
    console = Console(stderr=True)
    with explain_out_of_memory("Use a smaller --batch-size or --max-new-tokens"):
        for arm in track(arms, "warming up", console=console, transient=True):
            run_arm(arm, bench.target, longest)
        turns = track(list(enumerate(units)), title, console=console)
        return [_run_unit(bench.target, rotate(arms, turn), unit) for turn, unit in turns]


def rotate(arms: Sequence[Arm], turn: int) -> list[Arm]:
    """The arms, starting from a later one each turn."""
    first = turn % len(arms)
    return [*arms[first:], *arms[:first]]


def _run_unit(target: Target, arms: Sequence[Arm], prompts: list[Prompt]) -> Unit:
    return Unit(prompts, {arm.key: run_arm(arm, target, prompts) for arm in arms})


def run_arm(arm: Arm, target: Target, prompts: list[Prompt]) -> Outcome:
    """Time one arm on one unit; what the arm does not name as a part is `rest`."""
    ids, mask = left_padded(prompts, target)
    reset_peak(target.device)
    synchronize(target.device)
    start = perf_counter()
    answers, stats = arm.decode(ids, mask)
    synchronize(target.device)
    wall = perf_counter() - start
    parts = {part: stats.seconds.get(part, 0.0) for part in PARTS if part != "rest"}
    seconds = parts | {"rest": max(wall - sum(parts.values()), 0.0)}
    return Outcome(answers, replace(stats, seconds=seconds), peak_bytes(target.device))


def left_padded(prompts: list[Prompt], target: Target) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both `[B, T]`, on the target's device."""
    width = max(len(prompt.ids) for prompt in prompts)
    rows = [[target.pad_token_id] * (width - len(p.ids)) + p.ids for p in prompts]
    mask = [[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts]
    return torch.tensor(rows, device=target.device), torch.tensor(mask, device=target.device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget the peak memory so far, where the system allows it (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # then the peak is that of the whole process so far


def peak_bytes(device: torch.device) -> int:
    """Peak memory since `reset_peak`: CUDA's allocated bytes, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- figures -------------------------------------------------------------------------------------


def summarize(units: Sequence[Unit], arms: Sequence[Arm], seed: int) -> dict[str, dict[str, Any]]:
    """Arm key -> its figures over these units: ratios of sums, each with its interval."""
    keys = [arm.key for arm in arms]
    rows = [[_columns(unit.outcomes[key]) for key in keys] for unit in units]
    table = np.array(rows)  # [P, A, 5]
    points = ratios(table.sum(0), keys)
    draws = resampled_sums(table.reshape(len(units), -1), seed=seed)  # [R, A * 5]
    spread = ratios(draws.reshape(len(draws), *table.shape[1:]), keys)
    return {
        arm.key: _counts(units, arm)
        | _ratio_fields({n: points[n][i] for n in RATIOS}, {n: spread[n][:, i] for n in RATIOS})
        | acceptance_figures([unit.outcomes[arm.key].stats for unit in units], arm, seed)
        for i, arm in enumerate(arms)
    }


def _columns(outcome: Outcome) -> list[float]:
    """What ratios are made of: new tokens, wall, tokens after the first, decode time, rounds."""
    stats = outcome.stats
    decode = outcome.wall - stats.seconds["prefill"]
    return [stats.new_tokens, outcome.wall, stats.tokens, decode, stats.rounds]


def ratios(sums: np.ndarray, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """RATIOS by name, `[..., A]`, from sums `[..., A, 5]` of `_columns`; nan where undefined."""
    new, wall, after, decode, rounds = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)  # [..., A]
    with np.errstate(divide="ignore", invalid="ignore"):
        speed, decode_speed = new / wall, after / decode
        made = {"tokens_per_s": speed, "decode_tokens_per_s": decode_speed}
        made["tau"] = np.where(rounds > 0, after / rounds, 1.0)
        for base in BASELINES:
            at = [keys.index(base)]
            made[f"speedup_vs_{base}"] = speed / speed[..., at]
            made[f"decode_speedup_vs_{base}"] = decode_speed / decode_speed[..., at]
    return made


def _ratio_fields(points: dict[str, Any], spread: dict[str, np.ndarray]) -> dict[str, Any]:
    """`name` and `name_ci95` for each ratio; None where it is not a number."""
    fields: dict[str, Any] = {}
    for name, value in points.items():
        finite = spread[name][np.isfinite(spread[name])]
        fields[name] = float(value) if np.isfinite(value) else None
        fields[f"{name}_ci95"] = interval(finite) if len(finite) and np.isfinite(value) else None
    return fields


def _counts(units: Sequence[Unit], arm: Arm) -> dict[str, Any]:
    """An arm's sums: tokens, rounds, seconds by part, matches, memory."""
    outcomes = [unit.outcomes[arm.key] for unit in units]
    stats = total([outcome.stats for outcome in outcomes])
    pairs = [(unit.outcomes["generate"].answers, unit.outcomes[arm.key].answers) for unit in units]
    return {
        "shape": arm.shape,
        "new_tokens": stats.new_tokens,
        "tokens_after_first": stats.tokens,
        "rounds": stats.rounds,
        "nodes": stats.nodes,
        "wall_s": sum(outcome.wall for outcome in outcomes),
        "seconds": stats.seconds,
        "matched": sum(a == b for left, right in pairs for a, b in zip(left, right, strict=True)),
        "total": sum(len(left) for left, _ in pairs),
        "peak_memory_bytes": max(outcome.peak_bytes for outcome in outcomes),
    }


def acceptance_figures(stats: Sequence[AcceptanceStats], arm: Arm, seed: int) -> dict[str, Any]:
    """Acceptance by depth, and for chains alpha, each with intervals over the units' counts.

    An arm that is no chain has an empty `alpha_by_depth`: alpha is defined on chains.
    """
    names = ["acceptance_by_depth"]
    if arm.key == "chain":
        names += ["alpha_by_depth", "greedy_alpha"]
    summed = total(stats)
    fields: dict[str, Any] = {"histogram": summed.accepted, "alpha_by_depth": []}
    draws = resampled_stats(stats, seed) if arm.shape else []
    for name in names:
        value = getattr(summed, name)
        fields[name] = value
        if not isinstance(value, list):
            fields[f"{name}_ci95"] = interval([getattr(draw, name) for draw in draws])
            continue
        lists = [getattr(draw, name) for draw in draws]
        depths = range(len(value))
        fields[f"{name}_ci95"] = [interval([v[d] for v in lists if len(v) > d]) for d in depths]
    return fields


def resampled_stats(stats: Sequence[AcceptanceStats], seed: int) -> list[AcceptanceStats]:
    """Bootstrap draws of the units' counts, summed; only the counts of acceptance are set."""
    wide = total(stats)
    split = len(wide.accepted)
    columns = np.zeros((len(stats), split + len(wide.offered) + 1))  # [P, accepted + offered + 1]
    for row, one in zip(columns, stats, strict=True):
        row[: len(one.accepted)] = one.accepted
        row[split : split + len(one.offered)] = one.offered
        row[-1] = one.rounds
    draws = resampled_sums(columns, seed=seed).tolist()
    return [AcceptanceStats(d[:split], d[split:-1], d[-1]) for d in draws]


def total(stats: Sequence[AcceptanceStats]) -> AcceptanceStats:
    """The sum of several counts."""
    return sum(stats, AcceptanceStats())


# ---- the result ----------------------------------------------------------------------------------


def describe_bench(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """The part of a result that says what was measured, with what, and where."""
    target, folder = bench.target, bench.choice.folder
    dtype = str(target.dtype).removeprefix("torch.")
    given = {name: value for name, value in vars(args).items() if name != "default_prompts"}
    arguments = {name: _plain(value) for name, value in given.items()}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": arguments,
        "target": {
            "name": target.name,
            "fingerprint": target.fingerprint,
            "dtype": dtype,
            "device": str(target.device),
        },
        "head": {
            "folder": shown(folder),
            "chosen": bench.choice.why,
            "sha256": sha256(folder / "model.safetensors"),
            "config": asdict(bench.head.config),
        },
        "prompts": [source.describe() for source in bench.sources],
        "turns": "first",
        "environment": environment(),
    }


def _plain(value: Any) -> Any:
    """An argument as JSON takes it."""
    return str(value) if isinstance(value, Path) else value


def speedup_result(
    bench: Bench, args: argparse.Namespace, arms: Sequence[Arm], units: Sequence[Unit]
) -> dict[str, Any]:
    """Everything that `eval/speedup.py` reports, ready for JSON."""
    figures = summarize(units, arms, args.seed)
    files = {
        source.name: source.describe()
        | {"arms": summarize(units_of(units, source.name), arms, args.seed)}
        for source in bench.sources
    }
    return {
        "kind": "speedup",
        **describe_bench(bench, args),
        "headline": headline(figures),
        "arms": figures,
        "files": files,
        "definitions": DEFINITIONS,
        "per_prompt": [_raw(unit) for unit in units],
    }


def units_of(units: Sequence[Unit], source: str) -> list[Unit]:
    """The units whose prompts come from the source of that name."""
    return [unit for unit in units if unit.prompts[0].source == source]


def _raw(unit: Unit) -> dict[str, Any]:
    """One unit's raw counts and seconds, arms in the order in which they ran."""
    reference = unit.outcomes["generate"].answers
    return {
        "ids": [prompt.id for prompt in unit.prompts],
        "file": unit.prompts[0].source,
        "prompt_tokens": [len(prompt.ids) for prompt in unit.prompts],
        "arms": {
            key: outcome.stats.to_dict()
            | {
                "answer_tokens": [len(answer) for answer in outcome.answers],
                "matched": [a == b for a, b in zip(outcome.answers, reference, strict=True)],
            }
            for key, outcome in unit.outcomes.items()
        },
    }


def headline(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The speed-up over the faster of the two baselines, of the tree if there is one."""
    arm = "tree" if "tree" in figures else "chain"
    base = max(BASELINES, key=lambda key: figures[key]["tokens_per_s"])
    name = f"speedup_vs_{base}"
    value, bounds = figures[arm][name], figures[arm][f"{name}_ci95"]
    speeds = ", ".join(f"{key} {figures[key]['tokens_per_s']:.1f}" for key in (*BASELINES, arm))
    sentence = (
        f"{arm} decodes {value:.2f} times (95 % interval {bounds[0]:.2f} to {bounds[1]:.2f}) as "
        f"fast as `{base}`, the faster of the two baselines (tokens/s: {speeds})."
    )
    return {"arm": arm, "over": base, "speedup": value, "ci95": bounds, "sentence": sentence}


def without_prompts(result: dict[str, Any]) -> dict[str, Any]:
    """A result without its per-prompt data."""
    return {key: value for key, value in result.items() if key != "per_prompt"}
