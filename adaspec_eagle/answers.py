"""Answers by the target: prompts in length-sorted batches through one decode loop, resumable.

The answers' file is the only record of what has been done. Prompts that the target writes itself
are kept beside it (`NAME.prompts.jsonl`, one line a sampled batch), so that a second run goes on
with the same ones.
"""

import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from adaspec_eagle.data import (
    Prompt,
    Record,
    append_jsonl,
    given_record,
    normalise,
    prompt_messages,
    resume_jsonl,
)
from adaspec_eagle.errors import UserError, explain_out_of_memory
from adaspec_eagle.generate import generate
from adaspec_eagle.selfdata import MAX_TOKENS, write_prompts
from adaspec_eagle.targets import Target

CHUNK = 8  # batches that are sorted by length together
MAX_CELLS = 65_536  # rows x (prompt + answer) of one batch: long prompts go in smaller batches
USUAL_ANSWER = 100  # tokens, before any answer has been seen
BARREN = 8  # batches of self-written prompts in a row that may give none

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How answers are made. `tokens` None: an answer to every prompt."""

    tokens: int | None = None
    temperature: float = 0.0
    max_new_tokens: int = 224
    max_prompt_tokens: int | None = None
    batch_size: int = 64
    seed: int = 0


@dataclass
class Tally:
    """What a run did."""

    records: int = 0  # in the file at the end
    tokens: int = 0  # answer tokens in the file at the end
    ended: int = 0  # answers of this run that ended by themselves
    new_records: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Ask:
    """A prompt in the target's tokens."""

    prompt: Prompt
    ids: list[int]


# ---------------------------------------------------------------- one batch


def answer(target: Target, asks: list[Ask], settings: Settings) -> list[Record]:
    """The target's answers to one batch, greedy at temperature 0, in the order of the prompts."""
    longest = max(len(ask.ids) for ask in asks)
    tokens = torch.full((len(asks), longest), target.pad_token_id)  # [B, T], left-padded
    mask = torch.zeros_like(tokens)
    for row, ask in enumerate(asks):
        tokens[row, longest - len(ask.ids) :] = torch.tensor(ask.ids)
        mask[row, longest - len(ask.ids) :] = 1
    out = generate(
        target,
        None,
        tokens.to(target.device),
        mask.to(target.device),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed ^ zlib.crc32(asks[0].prompt["id"].encode()),
    )
    return [_record(target, ask, ids, settings) for ask, ids in zip(asks, out.answers, strict=True)]


def _record(target: Target, ask: Ask, ids: list[int], settings: Settings) -> Record:
    words = ids[:-1] if ids[-1] in target.eos_token_ids else ids
    text = target.tokenizer.decode(words, skip_special_tokens=True)
    asked = prompt_messages(ask.prompt["messages"])
    return Record(
        id=ask.prompt["id"],
        task=ask.prompt["task"],
        messages=[*asked, {"role": "assistant", "content": text}],
        prompt_ids=ask.ids,
        answer_ids=ids,
        target=target.name,
        fingerprint=target.fingerprint,
        temperature=settings.temperature,
    )


def batches(asks: list[Ask], settings: Settings) -> Iterator[list[Ask]]:
    """Batches of prompts of like length, taken from CHUNK batches' worth of prompts at a time."""
    for start in range(0, len(asks), CHUNK * settings.batch_size):
        chunk = asks[start : start + CHUNK * settings.batch_size]
        chunk = sorted(chunk, key=lambda ask: -len(ask.ids))  # longest first: memory shows early
        while chunk:
            cells = len(chunk[0].ids) + settings.max_new_tokens
            rows = max(1, min(settings.batch_size, MAX_CELLS // cells))
            yield chunk[:rows]
            chunk = chunk[rows:]


def tokenise(
    target: Target, prompts: Iterable[Prompt], settings: Settings, dropped: Counter
) -> list[Ask]:
    """Prompts in the target's tokens; those too long are left out and counted in `dropped`."""
    room = target.context - settings.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-new-tokens {settings.max_new_tokens} leaves no room in the context of"
            f" {target.context} tokens of {target.name}"
        )
    limit = min(room, settings.max_prompt_tokens or room)
    asks = []
    for prompt in prompts:
        ids = target.chat_ids(prompt_messages(prompt["messages"]))
        if len(ids) <= limit:
            asks.append(Ask(prompt, ids))
        else:
            dropped[f"longer than {limit} tokens"] += 1
    return asks


# ---------------------------------------------------------------- whole runs


def answer_prompts(
    target: Target, prompts: list[Prompt], out: Path, settings: Settings, say: Say
) -> Tally:
    """Answer prompts that are there; what `out` holds already is not asked again."""
    tally, done = start(target, out, settings)
    _refuse_repeated_ids(prompts)
    dropped: Counter = Counter()
    asks = tokenise(target, prompts, settings, dropped)
    if not asks:
        raise UserError(f"no prompts to answer ({_counts(dropped) or 'none given'})")
    asks = [ask for ask in asks if ask.prompt["id"] not in done]
    say(
        f"{len(asks)} prompts to answer, {len(done)} answered before; {_counts(dropped)}".rstrip(
            "; "
        )
    )
    tally.dropped = dict(dropped)
    if asks and not _enough(tally, settings):
        say(estimate(target, asks, settings))
    with progress(tally, settings, len(asks)) as advance:
        _answer_all(target, asks, out, settings, tally, advance)
    return tally


def answer_self(target: Target, out: Path, settings: Settings, say: Say) -> Tally:
    """Let the target write prompts and answer them until `out` holds `settings.tokens` tokens."""
    tally, done = start(target, out, settings)
    journal = out.with_name(out.name.removesuffix(".jsonl") + ".prompts.jsonl")
    made = _read_journal(target, journal, settings)
    seen = {normalise(p["messages"][0]["content"]) for batch in made for p in batch["kept"]}
    dropped: Counter = Counter()
    for batch in made:
        dropped.update(batch["dropped"])
    kept = [prompt for batch in made for prompt in batch["kept"]]
    asks = [a for a in tokenise(target, kept, settings, dropped) if a.prompt["id"] not in done]
    if tally.records:
        say(f"going on behind {tally.records} records, {tally.tokens:,} answer tokens in {out}")
    if not _enough(tally, settings):
        say(estimate_self(target, settings))
    number, barren = len(made), 0
    with progress(tally, settings, 0) as advance:
        while not _enough(tally, settings):
            while len(asks) < _prompts_needed(tally, settings):
                batch = write_prompts(
                    target, number, seen, seed=settings.seed, rows=settings.batch_size
                )
                append_jsonl(journal, [{**_owner(target, settings), **asdict(batch)}])
                number, barren = number + 1, 0 if batch.kept else barren + 1
                dropped.update(batch.dropped)
                if barren == BARREN:
                    raise UserError(
                        f"{target.name} writes no usable prompts ({_counts(dropped)}):"
                        " give some with --prompts FILE"
                    )
                asks += tokenise(target, batch.kept, settings, dropped)
            _answer_all(target, asks, out, settings, tally, advance)
            asks = []
    tally.dropped = dict(dropped)
    say(f"self-written prompts left out: {_counts(dropped) or 'none'}")
    return tally


def give_answers(target: Target, prompts: list[Prompt], out: Path, settings: Settings) -> Tally:
    """Write the answers that the prompts' file gives, in the target's tokens."""
    tally, done = start(target, out, settings)
    _refuse_repeated_ids(prompts)
    dropped: Counter = Counter()
    for ask in tokenise(target, prompts, settings, dropped):
        if ask.prompt["id"] not in done and not _enough(tally, settings):
            _add(
                tally, out, [given_record(ask.prompt, target, f"prompt {ask.prompt['id']}")], target
            )
    if not tally.records:
        raise UserError(f"no prompts left ({_counts(dropped) or 'none given'})")
    tally.dropped = dict(dropped)
    return tally


def start(target: Target, out: Path, settings: Settings) -> tuple[Tally, set[str]]:
    """(counts, ids) of what `out` holds; refuses a file made by another target."""
    tally, done = Tally(), set()
    for where, item in resume_jsonl(out):
        if item.get("fingerprint") != target.fingerprint:
            raise UserError(
                f"{where}: {out} holds answers of another target ({item.get('target')});"
                " choose another --out"
            )
        if item.get("temperature") not in (None, settings.temperature):
            raise UserError(
                f"{where}: {out} holds answers at temperature {item['temperature']};"
                " choose another --out"
            )
        done.add(item["id"])
        tally.records += 1
        tally.tokens += len(item["answer_ids"])
    return tally, done


def _answer_all(
    target: Target, asks: list[Ask], out: Path, settings: Settings, tally: Tally, advance: Callable
) -> None:
    for batch in batches(asks, settings):
        if _enough(tally, settings):
            return
        began = time.perf_counter()
        way_out = f"run again with --batch-size {len(batch) // 2}; nothing that was written is lost"
        with explain_out_of_memory(way_out):
            records = answer(target, batch, settings)
        _add(tally, out, records, target)
        tally.seconds += time.perf_counter() - began
        advance(len(records))


def _add(tally: Tally, out: Path, records: list[Record], target: Target) -> None:
    append_jsonl(out, records)
    tokens = sum(len(record.answer_ids) for record in records)
    tally.records += len(records)
    tally.tokens += tokens
    tally.new_records += len(records)
    tally.new_tokens += tokens
    tally.ended += sum(record.answer_ids[-1] in target.eos_token_ids for record in records)


def _enough(tally: Tally, settings: Settings) -> bool:
    return settings.tokens is not None and tally.tokens >= settings.tokens


def _prompts_needed(tally: Tally, settings: Settings) -> int:
    """Prompts to have before answering: a chunk, or as many as the tokens that are missing need."""
    usual = tally.tokens / tally.records if tally.records else USUAL_ANSWER
    missing = (settings.tokens or 0) - tally.tokens
    return max(
        1, min(CHUNK * settings.batch_size, round(missing / min(usual, settings.max_new_tokens)))
    )


def _read_journal(target: Target, journal: Path, settings: Settings) -> list[dict[str, Any]]:
    """The batches of prompts that an earlier run sampled with the same settings."""
    made = [item for _, item in resume_jsonl(journal)]
    owner = _owner(target, settings)
    if any({key: item.get(key) for key in owner} != owner for item in made):
        raise UserError(
            f"{journal} was made with another target, --seed or --batch-size; choose another --out"
            " or repeat the earlier ones"
        )
    return made


def _owner(target: Target, settings: Settings) -> dict[str, Any]:
    return {
        "fingerprint": target.fingerprint,
        "seed": settings.seed,
        "rows": settings.batch_size,
    }


def _refuse_repeated_ids(prompts: list[Prompt]) -> None:
    name, times = (
        Counter(prompt["id"] for prompt in prompts).most_common(1)[0] if prompts else ("", 1)
    )
    if times > 1:
        raise UserError(f"{times} prompts have the id {name!r}; ids must be unique for resuming")


def _counts(dropped: Counter) -> str:
    return ", ".join(f"{reason}: {n}" for reason, n in dropped.most_common())


# ---------------------------------------------------------------- what it will cost


def kv_bytes_per_token(target: Target) -> int:
    """Bytes of keys and values that one token takes in the cache."""
    config = target.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * target.dtype.itemsize


def estimate(target: Target, asks: list[Ask], settings: Settings) -> str:
    """Time (from a short trial on the first batch), memory and disk, as one line."""
    batch = next(batches(asks, settings))
    speed = _trial(target, batch, settings)
    tokens = len(asks) * min(settings.max_new_tokens, 150)
    if settings.tokens is not None:
        tokens = min(tokens, settings.tokens)
    cells = max(len(b) * (len(b[0].ids) + settings.max_new_tokens) for b in batches(asks, settings))
    prompt_bytes = 8 * sum(len(ask.ids) for ask in asks)
    return _estimate(target, tokens, tokens / speed, cells, prompt_bytes)


def estimate_self(target: Target, settings: Settings) -> str:
    """The same for self-written prompts: the prompts' own tokens are counted in the time."""
    tokens = settings.tokens or 0
    ids = target.chat_ids([{"role": "user", "content": "How are you today?"}])
    asks = [Ask({"id": "trial", "task": "self", "messages": []}, ids)] * settings.batch_size
    speed = _trial(target, asks, settings)
    cells = settings.batch_size * (len(ids) + MAX_TOKENS + settings.max_new_tokens)
    return _estimate(target, tokens, 1.6 * tokens / speed, cells, 4 * tokens)


def _estimate(target: Target, tokens: int, seconds: float, cells: int, prompt_bytes: int) -> str:
    memory = cells * kv_bytes_per_token(target) / 1e9
    disk = (12 * tokens + prompt_bytes) / 1e6
    return (
        f"estimate: {tokens:,} answer tokens in about {_clock(seconds)}, {memory:.1f} GB for keys"
        f" and values at the most, {disk:.0f} MB of disk"
    )


def _trial(target: Target, asks: list[Ask], settings: Settings, steps: int = 8) -> float:
    """Tokens a second over a few steps on one batch."""
    prompt = max(asks, key=lambda ask: len(ask.ids)).ids
    tokens = torch.tensor([prompt] * len(asks), device=target.device)  # [B, T]
    seconds = []
    for n in (1, 1 + steps):  # the first only shows what the prompts cost
        began = time.perf_counter()
        generate(target, None, tokens, max_new_tokens=n, ignore_eos=True)
        seconds.append(time.perf_counter() - began)
    per_step = max(seconds[1] - seconds[0], 1e-4) / steps
    whole = min(settings.max_new_tokens, 150)
    return len(asks) * whole / (seconds[0] + per_step * settings.max_new_tokens * 0.8)


def _clock(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


@contextmanager
def progress(tally: Tally, settings: Settings, prompts: int) -> Iterator[Callable[[int], None]]:
    """A bar over tokens (or prompts, where no number of tokens is wanted) with tokens/s."""
    by_tokens = settings.tokens is not None
    before, began = tally.tokens, time.perf_counter()
    columns = (
        TextColumn("answers"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, speed_estimate_period=600) as bar:
        total = settings.tokens if by_tokens else prompts
        task = bar.add_task("", total=total, completed=before if by_tokens else 0, text="")

        def advance(records: int) -> None:
            speed = (tally.tokens - before) / (time.perf_counter() - began)
            text = f"{tally.records} records, {tally.tokens:,} tokens, {speed:.0f} tokens/s"
            bar.update(task, advance=records if not by_tokens else None, text=text)
            if by_tokens:
                bar.update(task, completed=min(tally.tokens, total))
            if not bar.console.is_terminal:
                bar.console.print(text)

        yield advance
