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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

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

from adaspec_eagle.apart import Measured, normalise
from adaspec_eagle.data import (
    Prompt,
    Record,
    append_jsonl,
    given_record,
    mend_jsonl,
    prompt_messages,
    read_answers,
    read_jsonl,
)
from adaspec_eagle.errors import UserError, explain_out_of_memory
from adaspec_eagle.generate import generate
from adaspec_eagle.selfdata import MAX_TOKENS, TEMPERATURE, TOP_P, SelfBatch, write_prompts
from adaspec_eagle.targets import Target

CHUNK = 8  # batches that are sorted by length together
SELF_CHUNK = 2  # batches of self-written prompts that are answered together
MAX_CELLS = 65_536  # rows x (prompt + answer) of one batch: long prompts go in smaller batches
USUAL_ANSWER, USUAL_KEPT = 130, 0.85  # tokens and share of prompts, before any have been seen
TRIAL_CELLS, TRIAL_STEPS = 16_384, 8  # size of the trial that the estimate rests on
BARREN = 8  # batches of self-written prompts in a row that may give none
IN_MEASURING_FILE = "in a measuring file"

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
    exclude: Measured | None = None  # prompts that occur in it are dropped


@dataclass
class Tally:
    """What a run did."""

    records: int = 0  # in the file at the end
    tokens: int = 0  # answer tokens in the file at the end
    ended: int = 0  # answers of this run that ended by themselves
    new_records: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    dropped: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Ask:
    """A prompt in the target's tokens."""

    prompt: Prompt
    ids: list[int]


# ---------------------------------------------------------------- one batch


def answer(target: Target, asks: list[Ask], settings: Settings) -> list[Record]:
    """The target's answers to one batch, greedy at temperature 0, in the order of the prompts."""
    tokens, mask = padded(target, asks)
    out = generate(
        target,
        None,
        tokens,
        mask,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed ^ zlib.crc32(asks[0].prompt["id"].encode()),
    )
    return [_record(target, ask, ids, settings) for ask, ids in zip(asks, out.answers, strict=True)]


def padded(target: Target, asks: list[Ask]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both `[B, T]`, padded on the left, on the target's device."""
    longest = max(len(ask.ids) for ask in asks)
    gaps = [longest - len(ask.ids) for ask in asks]
    rows = [[target.pad_token_id] * gap + ask.ids for gap, ask in zip(gaps, asks, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return torch.tensor(rows, device=target.device), torch.tensor(mask, device=target.device)


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
    """Prompts in the target's tokens; left out, and counted in `dropped`, are those too long and
    those that occur in a measuring file."""
    room = target.context - settings.max_new_tokens
    if room < 1:
        raise UserError(
            f"--max-new-tokens {settings.max_new_tokens} leaves no room in the context of"
            f" {target.context} tokens of {target.name}"
        )
    limit = min(room, settings.max_prompt_tokens or room)
    asks = []
    if settings.exclude is not None:
        dropped[IN_MEASURING_FILE] += 0  # so that a zero is shown
    for prompt in prompts:
        messages = prompt_messages(prompt["messages"])
        if settings.exclude is not None and messages in settings.exclude:
            dropped[IN_MEASURING_FILE] += 1
            continue
        ids = target.chat_ids(messages)
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
    tally, done = start(target, out, settings, say)
    asks = _not_done(target, prompts, settings, tally, done, say)
    if not asks or _enough(tally, settings):
        return tally
    say(estimate(target, asks, _missing(tally, settings)))
    with progress(tally, settings, len(asks)) as show:
        _answer_all(target, asks, out, settings, tally, show)
    return tally


def give_answers(
    target: Target, prompts: list[Prompt], out: Path, settings: Settings, say: Say
) -> Tally:
    """Write the answers that the prompts' file gives, in the target's tokens."""
    tally, done = start(target, out, settings, say)
    asks = _not_done(target, prompts, settings, tally, done, say)
    size = CHUNK * settings.batch_size
    for begin in range(0, len(asks), size):
        records = [given_record(ask.prompt, target) for ask in asks[begin : begin + size]]
        if not _enough(tally, settings):
            _add(tally, out, records, target)
    return tally


def answer_self(target: Target, out: Path, settings: Settings, say: Say) -> Tally:
    """Let the target write prompts and answer them until `out` holds `settings.tokens` tokens."""
    assert settings.tokens is not None, "self-written prompts have no end of their own"
    tally, done = start(target, out, settings, say)
    journal = Journal.open(target, out, settings)
    if not _enough(tally, settings):
        say(estimate_self(target, _missing(tally, settings)))
    asks = _fresh(target, journal.prompts, settings, tally, done)
    with progress(tally, settings, 0) as show:
        while not _enough(tally, settings):
            needed = _prompts_needed(tally, settings)
            while len(asks) < needed:
                show(f"writing prompts, {len(asks)} of {needed}")
                batch = journal.add()
                if journal.barren == BARREN:
                    raise UserError(
                        f"{target.name} writes no usable prompts ({_counts(journal.dropped)}):"
                        " give some with --prompts FILE"
                    )
                asks += _fresh(target, batch.kept, settings, tally, done)
            _answer_all(target, asks, out, settings, tally, show)
            asks = []
    tally.dropped.update(journal.dropped)
    say(f"self-written prompts: {journal.kept} kept; left out: {_counts(tally.dropped) or 'none'}")
    return tally


class Journal:
    """The prompts that the target has written for one output, a line of the file for each batch."""

    def __init__(self, target: Target, path: Path, settings: Settings) -> None:
        self.target, self.path, self.settings = target, path, settings
        self.prompts: list[Prompt] = []  # what earlier runs wrote
        self.seen: set[str] = set()  # normalised texts
        self.dropped: Counter = Counter()
        self.number = self.kept = self.barren = 0
        self.owner = {
            "fingerprint": target.fingerprint,
            "seed": settings.seed,
            "rows": settings.batch_size,
        }

    @classmethod
    def open(cls, target: Target, out: Path, settings: Settings) -> "Journal":
        """The journal beside `out`, with what earlier runs wrote."""
        path = out.with_name(out.name.removesuffix(".jsonl") + ".prompts.jsonl")
        journal = cls(target, path, settings)
        for item in read_jsonl(path) if mend_jsonl(path) else []:
            if {key: item.get(key) for key in journal.owner} != journal.owner:
                raise UserError(
                    f"{path} was made with another target, --seed or --batch-size; choose another"
                    " --out or repeat the earlier ones"
                )
            batch = SelfBatch(item["number"], item["kept"], item["dropped"], item["tokens"])
            journal.prompts += batch.kept
            journal.seen.update(normalise(p["messages"][0]["content"]) for p in batch.kept)
            journal._count(batch)
        return journal

    def add(self) -> SelfBatch:
        """Sample the next batch and write it down."""
        rows, seed = self.settings.batch_size, self.settings.seed
        with explain_out_of_memory(f"run again with --batch-size {rows // 2} and another --out"):
            batch = write_prompts(self.target, self.number, self.seen, seed=seed, rows=rows)
        append_jsonl(self.path, [{**self.owner, **asdict(batch)}])
        self._count(batch)
        return batch

    def _count(self, batch: SelfBatch) -> None:
        self.number += 1
        self.kept += len(batch.kept)
        self.barren = 0 if batch.kept else self.barren + 1
        self.dropped.update(batch.dropped)


def _not_done(
    target: Target,
    prompts: list[Prompt],
    settings: Settings,
    tally: Tally,
    done: set[str],
    say: Say,
) -> list[Ask]:
    """What is still to be answered of prompts from files; says what is left out."""
    name, times = Counter(p["id"] for p in prompts).most_common(1)[0] if prompts else ("", 1)
    if times > 1:
        lines = ", ".join(p["where"] for p in prompts if p["id"] == name)
        raise UserError(f"{times} prompts have the id {name!r} ({lines}); ids must be unique")
    asks = tokenise(target, prompts, settings, tally.dropped)
    if tally.dropped:
        say(f"prompts left out: {_counts(tally.dropped)}")
    if not asks:
        raise UserError(f"no prompts to answer ({_counts(tally.dropped) or 'none given'})")
    return [ask for ask in asks if ask.prompt["id"] not in done]


def _fresh(
    target: Target, prompts: list[Prompt], settings: Settings, tally: Tally, done: set[str]
) -> list[Ask]:
    """Self-written prompts in tokens, without those that an earlier run answered."""
    asks = tokenise(target, prompts, settings, tally.dropped)
    return [ask for ask in asks if ask.prompt["id"] not in done]


def start(target: Target, out: Path, settings: Settings, say: Say) -> tuple[Tally, set[str]]:
    """(counts, ids) of what `out` holds; refuses a file made by another target."""
    tally, done = Tally(), set()
    for record in read_answers(out) if mend_jsonl(out) else []:
        if record.fingerprint != target.fingerprint:
            raise UserError(
                f"{out} holds answers of another target ({record.target}); choose another --out"
            )
        if record.temperature not in (None, settings.temperature):
            raise UserError(
                f"{out} holds answers at temperature {record.temperature}; choose another --out"
            )
        done.add(record.id)
        tally.records += 1
        tally.tokens += len(record.answer_ids)
    if done:
        say(f"going on behind {tally.records} records, {tally.tokens:,} answer tokens in {out}")
    return tally, done


def _answer_all(
    target: Target, asks: list[Ask], out: Path, settings: Settings, tally: Tally, show: Say
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
        show("")


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


def _missing(tally: Tally, settings: Settings) -> Settings:
    """The settings with the number of tokens that are still to be made."""
    left = None if settings.tokens is None else settings.tokens - tally.tokens
    return replace(settings, tokens=left)


def _prompts_needed(tally: Tally, settings: Settings) -> int:
    """Prompts to have before answering: SELF_CHUNK batches, or what the missing tokens need."""
    usual = tally.tokens / tally.records if tally.records else _usual(settings)
    missing = (settings.tokens or 0) - tally.tokens
    return max(1, min(SELF_CHUNK * settings.batch_size, round(missing / usual)))


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
    """Time (from a short trial on a middling batch), memory and disk, as one line."""
    plan = list(batches(asks, settings))
    middling = sorted(plan, key=lambda batch: len(batch[0].ids))[len(plan) // 2]
    cost = _trial(target, middling[0].ids, len(middling))
    tokens = len(asks) * _usual(settings)
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
    prompts = tokens / _usual(settings) / USUAL_KEPT
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


@dataclass(frozen=True)
class Cost:
    """Seconds that one batch takes."""

    rows: int
    prefill: float
    step: float


def _trial(target: Target, prompt: list[int], rows: int, sampled: bool = False) -> Cost:
    """A few steps on one batch, of fewer rows if its prompts are long."""
    rows = max(1, min(rows, TRIAL_CELLS // len(prompt)))
    tokens = torch.tensor([prompt] * rows, device=target.device)  # [B, T]
    steps = min(TRIAL_STEPS, target.context - len(prompt) - 1)
    temperature, top_p = (TEMPERATURE, TOP_P) if sampled else (0.0, 1.0)
    for new in (2, 1 + steps):  # the first warms up
        out = generate(
            target,
            None,
            tokens,
            max_new_tokens=new,
            temperature=temperature,
            top_p=top_p,
            ignore_eos=True,
        )
    prefill = out.stats.seconds["prefill"]
    return Cost(rows, prefill, (sum(out.stats.seconds.values()) - prefill) / steps)


def _speed(cost: Cost, settings: Settings) -> float:
    """Answer tokens a second; a step of a batch that thins out takes 0.8 of a full one's time."""
    seconds = cost.prefill + cost.step * settings.max_new_tokens * 0.8
    return cost.rows * _usual(settings) / seconds


def _usual(settings: Settings) -> int:
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
