"""Answers by the target: prompts in length-sorted batches through one decode loop, resumable.

The answers' file is the only record of what has been done. Prompts that the target writes itself
are kept beside it (`NAME.prompts.jsonl`, one line a sampled batch), so that a second run goes on
with the same ones.
"""

import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from adaspec_eagle.apart import normalise
from adaspec_eagle.asks import CHUNK, Ask, Say, Settings, Tally, batches, tokenise
from adaspec_eagle.data import (
    Prompt,
    Record,
    append_jsonl,
    ending,
    given_answer,
    given_record,
    mend_jsonl,
    prompt_messages,
    read_answers,
    read_jsonl,
)
from adaspec_eagle.errors import UserError, explain_out_of_memory
from adaspec_eagle.estimate import estimate, estimate_self, progress, usual_answer
from adaspec_eagle.generate import generate
from adaspec_eagle.selfdata import SelfBatch, write_prompts
from adaspec_eagle.targets import Target, left_padded

SELF_CHUNK = 2  # batches of self-written prompts that are answered together
BARREN = 8  # batches of self-written prompts in a row that may give none


# ---- one batch -----------------------------------------------------------------------------------


def answer(target: Target, asks: list[Ask], settings: Settings) -> list[Record]:
    """The target's answers to one batch, greedy at temperature 0, in the order of the prompts.

    Above it a prompt's random numbers follow from (seed, its id), whatever it is batched with.
    """
    tokens, mask = left_padded(target, [ask.ids for ask in asks])
    out = generate(
        target,
        None,
        tokens,
        mask,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        row_keys=[zlib.crc32(ask.prompt["id"].encode()) for ask in asks],
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
        seed=settings.seed if settings.temperature else None,
    )


# ---- whole runs ----------------------------------------------------------------------------------


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
    """Write the answers that the prompts' file gives, in the target's tokens; where
    `settings.tokens` is given, up to the answer that reaches it.

    Prompts without one, which published sets have, are left out and counted.
    """
    tally, done = start(target, out, settings, say, given=True)
    answered = [p for p in prompts if given_answer(p["messages"])]
    if len(answered) < len(prompts):
        tally.dropped["no answer given"] = len(prompts) - len(answered)
    asks = _not_done(target, answered, settings, tally, done, say)
    size, end = CHUNK * settings.batch_size, ending(target) if asks else []
    for begin in range(0, len(asks), size):
        if _enough(tally, settings):
            break
        records = [given_record(ask.prompt, target, end) for ask in asks[begin : begin + size]]
        _add(tally, out, list(_up_to(records, _missing(tally, settings).tokens)), target)
    return tally


def answer_self(target: Target, out: Path, settings: Settings, say: Say) -> Tally:
    """Let the target write prompts and answer them until `out` holds `settings.tokens` tokens."""
    assert settings.tokens is not None, "self-written prompts have no end of their own"
    tally, done = start(target, out, settings, say)
    journal = Journal.open(target, out, settings)
    if not _enough(tally, settings):
        say(estimate_self(target, _missing(tally, settings)))
    asks = _fresh(target, journal.prompts, settings, tally, done)
    barren = 0  # batches in a row that gave no prompt to answer
    with progress(tally, settings, 0) as show:
        while not _enough(tally, settings):
            needed = _prompts_needed(tally, settings)
            while len(asks) < needed:
                show(f"writing prompts, {len(asks)} of {needed}")
                fresh = _fresh(target, journal.add().kept, settings, tally, done)
                barren = 0 if fresh else barren + 1
                if barren >= BARREN:
                    raise UserError(
                        f"{target.name} writes no usable prompts"
                        f" ({_counts(journal.dropped + tally.dropped)}):"
                        " give some with --prompts FILE"
                    )
                asks += fresh
            _answer_all(target, asks, out, settings, tally, show)
            asks = []
    tally.dropped.update(journal.dropped)
    say(f"self-written prompts: {journal.kept} kept; left out: {_counts(tally.dropped) or 'none'}")
    return tally


class Journal:
    """The prompts that the target has written for one output, a line of the file for each batch."""

    def __init__(self, target: Target, out: Path, settings: Settings) -> None:
        self.target, self.out, self.settings = target, out, settings
        self.path = out.with_name(out.name.removesuffix(".jsonl") + ".prompts.jsonl")
        self.prompts: list[Prompt] = []  # what earlier runs wrote
        self.seen: set[str] = set()  # normalised texts
        self.dropped: Counter = Counter()
        self.number = self.kept = 0
        self.owner = {"fingerprint": target.fingerprint, "seed": settings.seed}

    @classmethod
    def open(cls, target: Target, out: Path, settings: Settings) -> "Journal":
        """The journal beside `out`, with what earlier runs wrote."""
        journal = cls(target, out, settings)
        path = journal.path
        for item in read_jsonl(path) if mend_jsonl(path) else []:
            if {key: item.get(key) for key in journal.owner} != journal.owner:
                raise UserError(
                    f"{path} was made with another target or --seed; choose another --out or repeat"
                    " the earlier ones"
                )
            batch = SelfBatch(item["number"], item["kept"], item["dropped"], item["tokens"])
            journal.prompts += batch.kept
            journal.seen.update(normalise(p["messages"][0]["content"]) for p in batch.kept)
            journal._count(batch)
        return journal

    def add(self) -> SelfBatch:
        """Sample the next batch and write it down."""
        rows, seed = self.settings.batch_size, self.settings.seed
        with explain_out_of_memory(fewer_rows(rows, self.out)):
            batch = write_prompts(self.target, self.number, self.seen, seed=seed, rows=rows)
        append_jsonl(self.path, [{**self.owner, "rows": rows, **asdict(batch)}])
        self._count(batch)
        return batch

    def _count(self, batch: SelfBatch) -> None:
        self.number += 1
        self.kept += len(batch.kept)
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


def start(
    target: Target, out: Path, settings: Settings, say: Say, given: bool = False
) -> tuple[Tally, set[str]]:
    """(counts, ids) of what `out` holds.

    given: its answers are given ones. Raises UserError, with nothing changed, for records that
    these settings would not have made.
    """
    tally, done, measured = Tally(), set(), []
    for record in read_answers(out) if mend_jsonl(out) else []:
        _check_same(record, target, out, settings, given)
        if settings.exclude is not None and prompt_messages(record.messages) in settings.exclude:
            measured.append(record.id)
        done.add(record.id)
        tally.records += 1
        tally.tokens += len(record.answer_ids)
    if measured:
        raise UserError(
            f"{out} holds {len(measured)} records (the first is {measured[0]!r}) whose prompts are "
            "in the files of --exclude: it was made without these; choose another --out"
        )
    if done:
        say(f"going on behind {tally.records} records, {tally.tokens:,} answer tokens in {out}")
    return tally, done


def _check_same(record: Record, target: Target, out: Path, settings: Settings, given: bool) -> None:
    """Raise UserError for a record made by another target or in another way."""
    if record.fingerprint != target.fingerprint:
        raise UserError(
            f"{out} holds answers of another target ({record.target}); choose another --out"
        )
    temperature = None if given else settings.temperature
    if record.temperature != temperature:
        theirs, ours = _kind(record.temperature), _kind(temperature)
        raise UserError(f"{out} holds answers {theirs}, not {ours} ones; choose another --out")
    if given:
        return
    if record.seed not in (None, settings.seed):
        raise UserError(
            f"{out} holds answers of --seed {record.seed}, not {settings.seed}; give that, or "
            "another --out"
        )
    length, limit = len(record.answer_ids), settings.max_new_tokens
    cut = record.answer_ids[-1] not in target.eos_token_ids
    if length > limit or cut and length < limit:
        how, has = ("smaller", "was cut at") if length < limit else ("larger", "has")
        raise UserError(
            f"{out} was made with a {how} --max-new-tokens than {limit}: an answer {has} {length}; "
            "give what it was made with, or another --out"
        )


def _kind(temperature: float | None) -> str:
    return "given" if temperature is None else f"at temperature {temperature:g}"


def _answer_all(
    target: Target, asks: list[Ask], out: Path, settings: Settings, tally: Tally, show: Say
) -> None:
    for batch in batches(asks, settings):
        if _enough(tally, settings):
            return
        began = time.perf_counter()
        with explain_out_of_memory(fewer_rows(len(batch), out)):
            records = answer(target, batch, settings)
        _add(tally, out, records, target)
        tally.seconds += time.perf_counter() - began
        show("")


def fewer_rows(rows: int, out: Path) -> str:
    """What to do where memory does not hold so many rows."""
    if rows == 1:
        return "one row is too much here: leave out long prompts (make_data.py --max-prompt-tokens)"
    return (
        f"go on with make_data.py --batch-size {rows // 2} --out {out}, its other options as here; "
        "nothing that was written is lost"
    )


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


def _up_to(records: list[Record], tokens: int | None) -> Iterator[Record]:
    """The records up to the one with which they have so many answer tokens; None: all."""
    for record in records:
        yield record
        if tokens is not None:
            tokens -= len(record.answer_ids)
            if tokens <= 0:
                return


def _missing(tally: Tally, settings: Settings) -> Settings:
    """The settings with the number of tokens that are still to be made."""
    left = None if settings.tokens is None else settings.tokens - tally.tokens
    return replace(settings, tokens=left)


def _prompts_needed(tally: Tally, settings: Settings) -> int:
    """Prompts to have before answering: SELF_CHUNK batches, or what the missing tokens need."""
    usual = tally.tokens / tally.records if tally.records else usual_answer(settings)
    missing = (settings.tokens or 0) - tally.tokens
    return max(1, min(SELF_CHUNK * settings.batch_size, round(missing / usual)))


def _counts(dropped: Counter) -> str:
    return ", ".join(f"{reason}: {n}" for reason, n in dropped.most_common())
