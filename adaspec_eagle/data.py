"""Prompts and answers as JSON Lines: every line is checked, and a kill loses nothing written.

A prompt is a dict with `id`, `task` and `messages` (`role`, `content`); an answer is a `Record`,
which adds token ids. Every error about a file names the file and the line.
"""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from adaspec_eagle.errors import UserError
from adaspec_eagle.targets import Target

ROLES = ("system", "user", "assistant")
Message = dict[str, str]
Prompt = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One prompt with its answer; `answer_ids` holds the end token where it ended by itself.

    `fingerprint` is that of the target whose tokens these are (None: not known); `temperature` is
    None where the answer was given and not generated, `seed` where it was not sampled.
    """

    id: str
    task: str
    messages: list[Message]
    prompt_ids: list[int]
    answer_ids: list[int]
    target: str
    fingerprint: str | None
    temperature: float | None
    seed: int | None = None

    @property
    def ids(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt_ids + self.answer_ids


# ---------------------------------------------------------------- reading


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a `.jsonl` or `.jsonl.gz` file. Raises UserError with file:line."""
    for _, item in numbered_lines(path):
        yield item


def numbered_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every line of a `.jsonl` or `.jsonl.gz` file."""
    path, number = Path(path), 0
    try:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: not a whole gzip file ({error})") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _open_bytes(path: Path) -> AbstractContextManager[Iterable[bytes]]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if where.endswith(":1") else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start} of the line)") from error
    if not text.strip():
        raise UserError(f"{where}: empty line; every line must hold one JSON object")
    try:
        item = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: malformed JSON ({error})") from error
    if not isinstance(item, dict):
        raise UserError(f"{where}: a JSON object was expected, not {type(item).__name__}")
    return item


def check_messages(item: dict[str, Any], where: str) -> list[Message]:
    """The `messages` of a line: roles known, contents text, user messages not empty."""
    messages = item.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: no `messages` (a list of objects with `role` and `content`)")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"{where}: a message's `role` must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}: a message's `content` must be text")
        if message["role"] == "user" and not message["content"].strip():
            raise UserError(f"{where}: empty prompt")
    if not any(message["role"] == "user" for message in messages):
        raise UserError(f"{where}: no user message, so there is no prompt")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _label(item: dict[str, Any], path: Path, where: str) -> tuple[str, str]:
    """(id, task) of a line; named after file and line where the line does not say."""
    stem = path.name.split(".")[0]
    known = {key: item[key] for key in ("id", "task") if item.get(key) not in (None, "")}
    return str(known.get("id", f"{stem}-{where.rpartition(':')[2]}")), str(known.get("task", stem))


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Prompts of one file, at most `limit`: dicts with `id`, `task`, `messages` (answers kept)
    and `where` (file:line)."""
    path, prompts = Path(path), []
    for where, item in numbered_lines(path):
        name, task = _label(item, path, where)
        messages = check_messages(item, where)
        prompts.append({"id": name, "task": task, "messages": messages, "where": where})
        if len(prompts) == limit:
            break
    if not prompts:
        raise UserError(f"{path}: no prompts in this file")
    return prompts


def read_answers(path: str | Path) -> list[Record]:
    """Records of one file, made by make_data.py (`prompt_ids` and `answer_ids` are required)."""
    path = Path(path)
    return [_record(item, path, where) for where, item in numbered_lines(path)]


def _record(item: dict[str, Any], path: Path, where: str) -> Record:
    name, task = _label(item, path, where)
    for key in ("prompt_ids", "answer_ids"):
        ids = item.get(key)
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"{where}: `{key}` must be a list of token ids; run make_data.py first")
        if not ids:
            what = "empty prompt" if key == "prompt_ids" else "the answer has no token to learn"
            raise UserError(f"{where}: {what} (`{key}` is empty)")
    return Record(
        id=name,
        task=task,
        messages=check_messages(item, where),
        prompt_ids=item["prompt_ids"],
        answer_ids=item["answer_ids"],
        target=str(item.get("target", "")),
        fingerprint=item.get("fingerprint"),
        temperature=item.get("temperature"),
        seed=item.get("seed"),
    )


# ---------------------------------------------------------------- the form of a conversation


def prompt_messages(messages: list[Message]) -> list[Message]:
    """What the target is asked: up to the last user message that an answer may follow.

    Two user messages in a row: the first one is asked. A trailing answer is left out.
    """
    for i, message in enumerate(messages[:-1]):
        if message["role"] == "user" and messages[i + 1]["role"] == "user":
            return messages[: i + 1]
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return messages[: last + 1]


def given_answer(messages: list[Message]) -> str | None:
    """The answer that follows `prompt_messages(messages)`, None where it has no text."""
    after = messages[len(prompt_messages(messages)) :]
    answer = after[0]["content"] if after and after[0]["role"] == "assistant" else None
    return answer if answer and answer.strip() else None


@dataclass(frozen=True)
class ChatFrame:
    """Token ids around the first user content: `prefix` before it, `suffix` after it."""

    prefix: list[int]
    suffix: list[int]


def chat_frame(target: Target) -> ChatFrame:
    """What all one-message conversations of this target begin and end with, default system turn
    included. Found in token ids, so that tokens that merge with the content are not in it."""
    own = [target.tokenizer.decode([target.vocab_size * i // 5]).strip() for i in (2, 3, 4)]
    probes = ["apple tree", "1234", "Zebra?", "(x)", "éa", *filter(None, own)]
    rows = [target.chat_ids([{"role": "user", "content": text}]) for text in probes]
    return ChatFrame(_common_prefix(rows), _common_prefix([row[::-1] for row in rows])[::-1])


def _common_prefix(rows: list[list[int]]) -> list[int]:
    columns = list(zip(*rows, strict=False))
    n = next((i for i, column in enumerate(columns) if len(set(column)) > 1), len(columns))
    return rows[0][:n]


def ending(target: Target) -> list[int]:
    """The token that ends an answer: the template's end of a turn, else the first end token, if
    the target has one."""
    ends = target.eos_token_ids
    return [*(token for token in chat_frame(target).suffix if token in ends), *ends][:1]


def given_record(item: Prompt, target: Target, end: list[int]) -> Record:
    """A record with the answer that the file gives, in the target's tokens, its `ending` added."""
    answer = given_answer(item["messages"])
    if answer is None:
        raise UserError(
            f"{item['where']}: the answer has no token to learn (no text after the prompt)"
        )
    ids = target.tokenizer.encode(answer, add_special_tokens=False) + end
    prompt = prompt_messages(item["messages"])
    return Record(
        id=item["id"],
        task=item["task"],
        messages=[*prompt, {"role": "assistant", "content": answer}],
        prompt_ids=target.chat_ids(prompt),
        answer_ids=ids,
        target=target.name,
        fingerprint=target.fingerprint,
        temperature=None,
    )


# ---------------------------------------------------------------- records for training


def load_training(paths: Iterable[str | Path], target: Target, max_length: int) -> list[Record]:
    """Records of all files in this target's tokens, prompt + answer cut to `max_length` tokens.

    Lines without ids are tokenised with the answer that they give. Refused, with file and line: ids
    made for another target, ids outside the vocabulary, an answer without a token to learn.
    """
    records, too_long = [], []
    end = cache(partial(ending, target))
    for path in map(Path, paths):
        first = True
        for where, item in numbered_lines(path):
            record = _training_record(item, target, path, where, end, check_format=first)
            first = False
            room = max_length - len(record.prompt_ids)
            if room < 1:
                too_long.append((where, len(record.prompt_ids) + 1))
            records.append(replace(record, answer_ids=record.answer_ids[:room]))
    if too_long:
        where, needed = too_long[0]
        raise UserError(
            f"{where}: the answer has no token to learn within --max-length {max_length}"
            f" ({len(too_long)} such records; this one needs {needed}, all of them"
            f" {max(n for _, n in too_long)}): raise --max-length, or make the data with a"
            " smaller --max-prompt-tokens"
        )
    if not records:
        raise UserError(f"no records in {', '.join(map(str, paths)) or 'no file'}")
    return records


def _training_record(
    item: dict[str, Any],
    target: Target,
    path: Path,
    where: str,
    end: Callable[[], list[int]],
    check_format: bool,
) -> Record:
    if "answer_ids" not in item:
        name, task = _label(item, path, where)
        messages = check_messages(item, where)
        prompt = {"id": name, "task": task, "messages": messages, "where": where}
        return given_record(prompt, target, end())
    record = _record(item, path, where)
    made_for = (
        f"{where}: these token ids were made for another target ({record.target or 'unnamed'})"
    )
    way_out = f"make the data again with --target {target.name}"
    if record.fingerprint not in (None, target.fingerprint):
        raise UserError(f"{made_for}: its weights are not those of {target.name}; {way_out}")
    largest = max(max(record.prompt_ids), max(record.answer_ids))
    if largest >= target.vocab_size:
        raise UserError(f"{made_for}: id {largest}, vocabulary {target.vocab_size}; {way_out}")
    if (
        check_format and record.fingerprint is None
    ):  # no fingerprint: the tokens must at least agree
        if record.prompt_ids != target.chat_ids(prompt_messages(record.messages)):
            raise UserError(f"{made_for}: {target.name} tokenises this prompt otherwise; {way_out}")
    return record


# ---------------------------------------------------------------- writing


def append_jsonl(path: str | Path, items: Iterable[Record | dict[str, Any]]) -> None:
    """Append lines in one write and sync it to disk; a failed write leaves the file as it was."""
    rows = [asdict(item) if isinstance(item, Record) else item for item in items]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path = Path(path)
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            written = file.write(data)
            if written != len(data):
                raise OSError(28, os.strerror(28))
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(size)
            raise UserError(
                f"cannot write {path}: {error.strerror}; what was there stays:"
                " make room and run the same command again"
            ) from error


def mend_jsonl(path: str | Path) -> bool:
    """Make a file ready to be gone on with: whether it exists; a torn last line is cut off.

    A last line that only lacks its end gets one. UserError, with nothing changed, for a torn file
    that is no JSON Lines.
    """
    path = Path(path)
    if path.suffix == ".gz":
        raise UserError(
            f"{path}: a .gz file cannot be gone on with; write .jsonl, compress it later"
        )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return False
    with path.open("r+b") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        last = data[whole:].strip()
        if last and _is_object(last):
            file.write(b"\n")
            return True
        if last and not (last.startswith(b"{") and all(map(_is_object, data[:whole].splitlines()))):
            raise UserError(
                f"{path} is no file of JSON Lines to go on with; nothing was changed: give another "
                "name to write to"
            )
        file.truncate(whole)
    return whole > 0


def _is_object(line: bytes) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
