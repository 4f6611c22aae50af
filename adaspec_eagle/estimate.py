"""What answering will cost, from a short trial; and how far it has come."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from adaspec_eagle.asks import Ask, Say, Settings, Tally, batches
from adaspec_eagle.generate import generate
from adaspec_eagle.selfdata import MAX_TOKENS, TEMPERATURE, TOP_P
from adaspec_eagle.targets import Target

USUAL_ANSWER, USUAL_KEPT = 130, 0.85  # tokens and share of prompts, before any have been seen
TRIAL_CELLS, TRIAL_STEPS = 2_048, 4  # of prefill; the estimate rests on them


def estimate(target: Target, asks: list[Ask], settings: Settings) -> str:
    """Time (from a short trial on a middling batch), memory and disk, as one line."""
    plan = list(batches(asks, settings))
    middling = sorted(plan, key=lambda batch: len(batch[0].ids))[len(plan) // 2]
    cost = _trial(target, middling[0].ids, len(middling))
    tokens = len(asks) * usual_answer(settings)
    if settings.tokens is not None:
        tokens = min(tokens, settings.tokens)
    seconds = tokens / _speed(cost, settings)
    cells = max(len(batch) * (len(batch[0].ids) + settings.max_new_tokens) for batch in plan)
    return _estimate(target, tokens, seconds, cells, sum(len(ask.ids) for ask in asks))


def estimate_self(target: Target, settings: Settings) -> str:
    """The same for self-written prompts, the time to write them included."""
    tokens, rows = settings.tokens or 0, settings.batch_size
    ids = target.chat_ids([{"role": "user", "content": "How can I help a friend in need?"}])
    cost, sampled = (_trial(target, ids, rows, sampled=sampled) for sampled in (False, True))
    prompts = tokens / usual_answer(settings) / USUAL_KEPT
    seconds = tokens / _speed(cost, settings)
    seconds += prompts / sampled.rows * (sampled.prefill + sampled.step * MAX_TOKENS * 0.7)
    cells = rows * (len(ids) + MAX_TOKENS + settings.max_new_tokens)
    return _estimate(target, tokens, seconds, cells, round(prompts * 60))


def _estimate(target: Target, tokens: int, seconds: float, cells: int, prompt_tokens: int) -> str:
    memory = cells * kv_bytes_per_token(target) / 1e9
    disk = 12 * (tokens + prompt_tokens) / 1e6  # an id and the text, in JSON
    return (
        f"estimate: {tokens:,} answer tokens in about {_clock(seconds)}, up to {memory:.1f} GB for"
        f" keys and values, {disk:.1f} MB of disk"
    )


def kv_bytes_per_token(target: Target) -> int:
    """Bytes of keys and values that one token takes in the cache."""
    numbers = 2 * target.num_layers * target.key_heads * target.head_size
    return numbers * target.dtype.itemsize


@dataclass(frozen=True)
class Cost:
    """Seconds that one batch takes."""

    rows: int
    prefill: float
    step: float


def _trial(target: Target, prompt: list[int], rows: int, sampled: bool = False) -> Cost:
    """What a batch costs, from as few of its rows as TRIAL_CELLS allow behind the whole prompt.

    A step costs what all rows take behind one token, and what those few take more behind the prompt
    than behind one token, in proportion.
    """
    few = max(1, min(rows, TRIAL_CELLS // len(prompt)))
    _timed(target, prompt[-1:], rows, 1, sampled)  # warms up
    _, step = _timed(target, prompt[-1:], rows, TRIAL_STEPS, sampled)
    least = step if few == rows else _timed(target, prompt[-1:], few, TRIAL_STEPS, sampled)[1]
    steps = max(1, min(TRIAL_STEPS, target.context - len(prompt) - 1))
    prefill, behind = _timed(target, prompt, few, steps, sampled)
    return Cost(rows, prefill * rows / few, step + max(0.0, behind - least) * rows / few)


def _timed(
    target: Target, prompt: list[int], rows: int, steps: int, sampled: bool
) -> tuple[float, float]:
    """Seconds of a prefill of `rows` such prompts, and of one of the steps behind it."""
    temperature, top_p = (TEMPERATURE, TOP_P) if sampled else (0.0, 1.0)
    out = generate(
        target,
        None,
        torch.tensor([prompt] * rows, device=target.device),
        max_new_tokens=1 + steps,
        temperature=temperature,
        top_p=top_p,
        ignore_eos=True,
    )
    prefill = out.stats.seconds["prefill"]
    return prefill, (sum(out.stats.seconds.values()) - prefill) / steps


def _speed(cost: Cost, settings: Settings) -> float:
    """Answer tokens a second; a step of a batch that thins out takes 0.8 of a full one's time."""
    seconds = cost.prefill + cost.step * settings.max_new_tokens * 0.8
    return cost.rows * usual_answer(settings) / seconds


def usual_answer(settings: Settings) -> int:
    """Tokens of an answer, before any have been seen."""
    return min(settings.max_new_tokens, USUAL_ANSWER)


def _clock(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


@contextmanager
def progress(tally: Tally, settings: Settings, prompts: int) -> Iterator[Say]:
    """A bar over tokens (over prompts, where no number of tokens is set) with tokens/s.

    Gives a function that shows where `tally` stands, and what is being done.
    """
    by_tokens = settings.tokens is not None
    tokens, records, began = tally.tokens, tally.records, time.perf_counter()
    columns = (
        TextColumn("answers"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as bar:
        total = settings.tokens if by_tokens else prompts
        task = bar.add_task("", total=total, completed=tokens if by_tokens else 0, text="")

        def show(doing: str) -> None:
            speed = (tally.tokens - tokens) / (time.perf_counter() - began)
            counts = f"{tally.records} records, {tally.tokens:,} tokens, {speed:.0f} tokens/s"
            text = f"{counts}, {doing}" if doing else counts
            done = tally.tokens if by_tokens else tally.records - records
            bar.update(task, completed=min(done, total or 0), text=text)
            if not bar.console.is_terminal and not doing:
                bar.console.print(text, highlight=False)

        yield show
