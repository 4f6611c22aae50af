"""The public prompt suites by name: EAGLE's six sets, Spec-Bench by category, AdaSPEC's five tasks.

From files under a folder (`--data-root`) in either layout: this package's (`messages`) or the
question files of EAGLE, FastChat and Spec-Bench (`question_id`, `category`, `turns`), as their
repositories have them; without a folder from where they are published.
"""

import hashlib
import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaspec_eagle.bench import Source, make_prompt
from adaspec_eagle.data import Prompt, check_messages, numbered_lines, prompt_messages
from adaspec_eagle.errors import UserError
from adaspec_eagle.hub import HUB_SETS, task_prompts
from adaspec_eagle.paths import default_cache_dir
from adaspec_eagle.record import sha256, shown, write_bytes
from adaspec_eagle.targets import Target

TIMEOUT = 60  # seconds for one question file
EAGLE_DATA = "https://raw.githubusercontent.com/SafeAILab/EAGLE/main/eagle/data"
SPECBENCH_DATA = (
    "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"
)
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem",
            "humanities")  # fmt: skip


@dataclass(frozen=True)
class PromptSet:
    """One column of a suite's table: where its prompts are, and which lines of the file."""

    name: str
    label: str  # as the published table heads the column
    files: tuple[str, ...]  # under the data root; the first that exists is taken
    hub: str  # a task of hub.py, or the address of a question file
    categories: tuple[str, ...] = ()  # of the file's lines; empty: all lines


@dataclass(frozen=True)
class Suite:
    """A collection of sets."""

    title: str
    sets: tuple[PromptSet, ...]


def _eagle(name: str, label: str) -> PromptSet:
    files = (f"eagle_{name}.test.jsonl", f"{name}/question.jsonl")
    return PromptSet(name, label, files, f"{EAGLE_DATA}/{name}/question.jsonl")


def _specbench(name: str, label: str, more: Sequence[str] = ()) -> PromptSet:
    files = ("specbench.test.jsonl", "spec_bench/question.jsonl", "question.jsonl")
    return PromptSet(name, label, files, SPECBENCH_DATA, (name, *more))


def _task(name: str, label: str) -> PromptSet:
    return PromptSet(name, label, (f"{name}.test.jsonl",), name)


SUITES = {
    "eagle": Suite(
        "EAGLE's six sets",
        (
            _eagle("mt_bench", "MT-bench"),
            _eagle("humaneval", "HumanEval"),
            _eagle("gsm8k", "GSM8K"),
            _eagle("alpaca", "Alpaca"),
            _eagle("sum", "CNN/DM"),
            _eagle("qa", "Natural Questions"),
        ),
    ),
    "specbench": Suite(
        "Spec-Bench",
        (
            _specbench("mt_bench", "Multi-turn", MT_BENCH),
            _specbench("translation", "Translation"),
            _specbench("summarization", "Summarization"),
            _specbench("qa", "QA"),
            _specbench("math_reasoning", "Math"),
            _specbench("rag", "RAG"),
        ),
    ),
    "adaspec": Suite(
        "AdaSPEC's five tasks",
        (
            _task("gsm8k", "GSM8K"),
            _task("alpaca", "Alpaca"),
            _task("mbpp", "MBPP"),
            _task("cnndm", "CNN/DM"),
            _task("xsum", "XSUM"),
        ),
    ),
}


def chosen_sets(suite: str, names: Sequence[str] | None) -> list[PromptSet]:
    """The sets of a suite, or those named, in the suite's order."""
    sets = SUITES[suite].sets
    known = [one.name for one in sets]
    wrong = [name for name in names or () if name not in known]
    if wrong:
        raise UserError(f"suite {suite} has no set {wrong[0]!r}; it has {', '.join(known)}")
    return [one for one in sets if not names or one.name in names]


def read_sets(
    sets: Sequence[PromptSet],
    root: Path | None,
    target: Target,
    limit: int | None,
    max_new_tokens: int,
) -> list[Source]:
    """The prompts of these sets, at most `limit` of each, with all their turns.

    root None: from the hub. Raises UserError that lists every set whose file is not under `root`.
    """
    if root is not None:
        missing = [one for one in sets if local_file(one, root) is None]
        if missing:
            raise UserError(_what_is_missing(missing, sets, root))
    return [_read_set(one, root, target, limit, max_new_tokens) for one in sets]


def local_file(one: PromptSet, root: Path) -> Path | None:
    """The set's file under the root, None where there is none."""
    return next((root / file for file in one.files if (root / file).is_file()), None)


def _what_is_missing(missing: list[PromptSet], sets: Sequence[PromptSet], root: Path) -> str:
    lines = [f"  {one.name}: {' or '.join(one.files)}  ({_published(one)})" for one in missing]
    there = [one.name for one in sets if one not in missing]
    way_out = f"; or measure what is there: --sets {' '.join(there)}" if there else ""
    return (
        f"--data-root {root} lacks {len(missing)} of {len(sets)} sets:\n"
        + "\n".join(lines)
        + f"\nPut them there, or leave --data-root out to fetch them{way_out}"
    )


def _published(one: PromptSet) -> str:
    return HUB_SETS[one.hub].path if one.hub in HUB_SETS else one.hub


def _read_set(
    one: PromptSet, root: Path | None, target: Target, limit: int | None, max_new_tokens: int
) -> Source:
    if root is None and one.hub in HUB_SETS:
        records = task_prompts(one.hub, limit)
        digest = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
        origin = _published(one)
    else:
        path = _fetched(one) if root is None else local_file(one, root)
        assert path is not None
        digest, origin = sha256(path), one.hub if root is None else shown(path)
        records = read_questions(path, one)[:limit]
    prompts = [make_prompt(record, one.name, target, max_new_tokens) for record in records]
    if not prompts:
        raise UserError(f"{origin} has no prompts of set {one.name}")
    return Source(one.name, digest, prompts, origin)


def _fetched(one: PromptSet) -> Path:
    """The question file from its address, kept in the user's cache."""
    kept = default_cache_dir() / "suites" / hashlib.sha256(one.hub.encode()).hexdigest()[:16]
    path = kept.with_suffix(".jsonl")
    if not path.exists():
        try:
            with urllib.request.urlopen(one.hub, timeout=TIMEOUT) as answer:
                write_bytes(path, answer.read())
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot fetch set {one.name} from {one.hub}: {error}; get the file by other means "
                f"and give its folder with --data-root (as {' or '.join(one.files)})"
            ) from error
    return path


def read_questions(path: Path, one: PromptSet) -> list[Prompt]:
    """Prompts of a file in either layout: `id`, `task`, `messages`, and `later` (user messages
    that are asked behind the answers to those before)."""
    return [
        _question(item, one, where)
        for where, item in numbered_lines(path)
        if not one.categories or _category(item, one) in one.categories
    ]


def _category(item: dict[str, Any], one: PromptSet) -> str:
    """What the line says, else the name between its id's first and last dash."""
    named = str(item.get("id", "")).split("-")[1:-1]
    return str(item.get("category") or "-".join(named))


def _question(item: dict[str, Any], one: PromptSet, where: str) -> Prompt:
    name = item.get("id")
    if name in (None, ""):
        name = f"{one.name}-{item.get('question_id', where.rpartition(':')[2])}"
    if "turns" in item:
        turns = item["turns"]
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise UserError(f"{where}: `turns` must be a list of texts")
        item = {"messages": [{"role": "user", "content": turn} for turn in turns]}
    messages = check_messages(item, where)
    asked = prompt_messages(messages)
    later: list[str] = []
    for message in messages[len(asked) :]:
        if message["role"] != "user":
            break
        later.append(message["content"])
    return {"id": str(name), "task": one.name, "messages": asked, "later": later, "where": where}
