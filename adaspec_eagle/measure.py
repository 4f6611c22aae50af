"""Measure decoding: arms that alternate over the same prompts, timed and counted.

An *arm* is one way to decode: `generate` (transformers' own), `loop` (ours without a draft),
`chain` and `tree`. A *unit* is one batch of prompts, decoded by every arm before the next unit
starts; the order of the arms rotates from unit to unit, so that drift of the machine cancels.

Legend: B rows, T time.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList

from adaspec_eagle.bench import Bench, Prompt, next_turn
from adaspec_eagle.draft import Shape
from adaspec_eagle.errors import explain_out_of_memory
from adaspec_eagle.generate import generate
from adaspec_eagle.stats import AcceptanceStats
from adaspec_eagle.targets import Target, left_padded
from adaspec_eagle.watch import peak_bytes, synchronize

PARTS = ("prefill", "draft", "verify", "rest")
LESS = "Use a smaller --batch-size or --max-new-tokens"


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


# ---- arms ----------------------------------------------------------------------------------------


def build_arms(bench: Bench, shapes: dict[str, str]) -> list[Arm]:
    """The two baselines, then an arm for each shape (`draft_shapes`)."""
    ours: dict[str, str | None] = {"loop": None, **shapes}
    arms = [Arm(key, shape, partial(decode, bench, shape)) for key, shape in ours.items()]
    return [Arm("generate", None, partial(baseline, bench)), *arms]


def decode(
    bench: Bench, shape: str | Shape | None, ids: Tensor, mask: Tensor
) -> tuple[list[list[int]], AcceptanceStats]:
    """This package's decoding, ids and mask `[B, T]`; shape None: without a draft."""
    made = generate(
        bench.target,
        bench.head if shape else None,
        ids,
        mask,
        tree=shape or "chain",
        max_new_tokens=bench.max_new_tokens,
        temperature=bench.temperature,
        seed=bench.seed,
        row_keys=_row_keys(ids, mask),
        compiled=bench.compiled,
        allow_other_target=bench.allow_other_target,
    )
    return made.answers, made.stats


def _row_keys(ids: Tensor, mask: Tensor) -> list[int]:
    """A number for each prompt `[B, T]` that tells its random numbers from other prompts'."""
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    return [zlib.crc32(str(row).encode()) for row in rows]


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
    return _plain_generate(target, max_new_tokens, ids, mask, **_choice(0.0))


def baseline(
    bench: Bench, ids: Tensor, mask: Tensor, **how: Any
) -> tuple[list[list[int]], AcceptanceStats]:
    """The same at the bench's temperature, from the whole distribution, with torch's numbers."""
    torch.manual_seed(bench.seed + _row_keys(ids, mask)[0])
    how |= _choice(bench.temperature)
    return _plain_generate(bench.target, bench.max_new_tokens, ids, mask, **how)


def _choice(temperature: float) -> dict[str, Any]:
    """How `model.generate` is to choose tokens."""
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def compiled_baseline(
    bench: Bench, ids: Tensor, mask: Tensor
) -> tuple[list[list[int]], AcceptanceStats]:
    """The same, compiled transformers' own way: a static cache, decoding steps by torch.compile.

    The cache has room for every prompt of the bench, so that one graph serves all; its steps attend
    over all of that room. Weights are not frozen, as in our own graphs: freezing takes a static
    cache for a constant, too.
    """
    how: Any = CompileConfig()
    how._compile_all_devices = True  # else transformers compiles on accelerators only
    room = max(len(p.ids) for unit in bench.units() for p in unit) + bench.max_new_tokens
    static: Any = {"cache_implementation": "static", "max_cache_len": room}
    return baseline(bench, ids, mask, compile_config=how, **static)


def _plain_generate(
    target: Target, max_new_tokens: int, ids: Tensor, mask: Tensor, **how: Any
) -> tuple[list[list[int]], AcceptanceStats]:
    clock = FirstToken()
    with plain_greedy(target):
        start = perf_counter()
        sequences = target.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([clock]), **how,
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
    """Inside the block `target.model.generate` has no penalty or cut from the model's folder.

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
    warm_up(bench, arms)
    return run_units(bench, arms, title)


def run_units(bench: Bench, arms: Sequence[Arm], title: str) -> list[Unit]:
    """The same with arms that are warm."""
    console = Console(stderr=True)
    with explain_out_of_memory(LESS):
        turns = track(list(enumerate(bench.units())), title, console=console)
        return [
            Unit(unit, {arm.key: run_arm(arm, bench.target, unit) for arm in rotate(arms, turn)})
            for turn, unit in turns
        ]


def warm_up(bench: Bench, arms: Sequence[Arm]) -> dict[str, float]:
    """Let each arm decode the longest unit of every number of rows once; the first's seconds."""
    by_rows: dict[int, list[Prompt]] = {}
    for unit in sorted(bench.units(), key=lambda unit: max(len(prompt.ids) for prompt in unit)):
        by_rows[len(unit)] = unit
    first: dict[str, float] = {}
    with explain_out_of_memory(LESS):
        turns = [(arm, unit) for _, unit in sorted(by_rows.items(), reverse=True) for arm in arms]
        for arm, unit in track(turns, "warming up", console=Console(stderr=True), transient=True):
            first.setdefault(arm.key, run_arm(arm, bench.target, unit).wall)
    return first


def rotate(arms: Sequence[Arm], turn: int) -> list[Arm]:
    """The arms, starting from a later one each turn."""
    first = turn % len(arms)
    return [*arms[first:], *arms[:first]]


def run_arm(arm: Arm, target: Target, prompts: list[Prompt]) -> Outcome:
    """Time one arm on one unit, turn by turn; answers of a second turn come behind those of the
    first. What the arm does not name as a part is `rest`."""
    outcome = _run_turn(arm, target, prompts)
    asked = [(p, a) for p, a in zip(prompts, outcome.answers, strict=True) if p.later]
    if not asked:
        return outcome
    texts = target.tokenizer.batch_decode([a for _, a in asked], skip_special_tokens=True)
    following = [next_turn(p, text, target) for (p, _), text in zip(asked, texts, strict=True)]
    after = run_arm(arm, target, following)
    answers, stats = outcome.answers + after.answers, outcome.stats + after.stats
    return Outcome(answers, stats, max(outcome.peak_bytes, after.peak_bytes))


def _run_turn(arm: Arm, target: Target, prompts: list[Prompt]) -> Outcome:
    ids, mask = left_padded(target, [prompt.ids for prompt in prompts])
    reset_peak(target.device)
    synchronize(target.device)
    start = perf_counter()
    answers, stats = arm.decode(ids, mask)
    synchronize(target.device)
    wall = perf_counter() - start
    parts = {part: stats.seconds.get(part, 0.0) for part in PARTS if part != "rest"}
    seconds = parts | {"rest": max(wall - sum(parts.values()), 0.0)}
    return Outcome(answers, replace(stats, seconds=seconds), peak_bytes(target.device))


def reset_peak(device: torch.device) -> None:
    """Forget the peak memory so far, where the system allows it (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # then the peak is that of the whole process so far
