"""What a measurement needs, loaded and checked: arguments, target, head, prompts."""

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from adaspec_eagle.data import prompt_messages, read_prompts
from adaspec_eagle.errors import UserError
from adaspec_eagle.head import DraftHead, load_head
from adaspec_eagle.hub import task_prompts
from adaspec_eagle.packed import packing
from adaspec_eagle.record import check_folder, environment, sha256, shown
from adaspec_eagle.sampling import MAX_SEED
from adaspec_eagle.storage import local_folder, weights_file
from adaspec_eagle.targets import DEFAULT_TARGET, Target

TREES = ("auto", "dynamic", "static")  # the first is what --tree alone means


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the target."""

    id: str
    task: str
    source: str  # file or task name, as given
    messages: list[dict[str, str]]
    ids: list[int]
    later: tuple[str, ...] = ()  # user messages that follow, each behind the arm's own answer

    @property
    def sha256(self) -> str:
        """Who has the set can tell by it that a prompt is the same."""
        return texts_sha256(self.messages, self.later)


def texts_sha256(messages: Sequence[dict[str, str]], later: Sequence[str] = ()) -> str:
    """Hex SHA-256 of the texts of `messages` and `later` as a JSON list."""
    texts = [*(message["content"] for message in messages), *later]
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """A prompt file (or a task's prompts) and how much of it is used."""

    name: str
    sha256: str
    prompts: list[Prompt]
    origin: str | None = None  # where a named set was read

    def describe(self) -> dict[str, Any]:
        """What a result says about it."""
        origin = {"origin": self.origin} if self.origin else {}
        facts = {"file": self.name, "sha256": self.sha256, "prompts": len(self.prompts)}
        return facts | origin


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
    temperature: float = 0.0
    seed: int = 0  # of sampling; a prompt's random numbers do not depend on the other prompts
    compiled: bool = False  # forwards of the target and of heads (compiled.py)

    def units(self) -> list[list[Prompt]]:
        """Batches of prompts of one source each, in the order given."""
        size = self.batch_size
        starts = [(s.prompts, i) for s in self.sources for i in range(0, len(s.prompts), size)]
        return [prompts[i : i + size] for prompts, i in starts]


# ---- arguments -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, prompts: Path | None) -> None:
    """The options that every measuring script has; `prompts` is the default prompt file (None: the
    script finds its prompts by itself)."""
    add = parser.add_argument
    add("--target", default=DEFAULT_TARGET, help="alias, hub id or folder (default: %(default)s)")
    add("--head", metavar="DIR|ID", help="draft head, a folder or a hub id, also in EAGLE's, "
        "SGLang's, vLLM's or speculators' layout; default: the newest runs/*/head that was trained "
        "for this target, else the one that ships")  # fmt: skip
    if prompts:
        add("--prompts", nargs="+", action="extend", metavar="FILE|TASK",
            help=f"prompt files (JSON Lines) or task names; default: {prompts.name}")  # fmt: skip
    add("--limit", type=positive, metavar="N", help="use the first N prompts of each file")
    add("--max-new-tokens", type=positive, default=128, metavar="N", help="default: %(default)s")
    add("--batch-size", type=positive, default=1, metavar="B", help="default: %(default)s")
    add("--dtype", help="bfloat16, float32, float64; default: bfloat16 where the device computes "
        "it natively, else float32")  # fmt: skip
    add("--seed", type=seed, default=0, help="of the bootstrap, and of what is sampled; default: 0")
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


def at_least_zero(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def seed(text: str) -> int:
    """A seed, for argparse."""
    value = int(text)
    if not 0 <= value < MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {MAX_SEED - 1}")
    return value


def add_draft_arguments(parser: argparse.ArgumentParser) -> None:
    """`--tree` and `--chain`."""
    add = parser.add_argument
    add("--tree", nargs="*", type=tree_name, metavar="TREE",
        help="draft trees: auto (what pays on this machine, the default), dynamic, static, or "
        "several of them; with it goes a chain, of 4 without --chain")  # fmt: skip
    add("--chain", type=positive, metavar="K", help="draft chains of K tokens")


def tree_name(text: str) -> str:
    """One of TREES, for argparse."""
    if text not in TREES:
        way = f"choose from {', '.join(TREES)}; a chain of K tokens is --chain K"
        raise argparse.ArgumentTypeError(f"{text!r} is no tree: {way}")
    return text


def draft_shapes(tree: Sequence[str] | None, chain: int | None) -> dict[str, str]:
    """Arm key -> shape. With neither option the same as a bare `--tree`.

    The first tree is the arm `tree`; further ones go by their own names.
    """
    if tree == [] or (tree is None and chain is None):
        tree = TREES[:1]
    shapes = {"chain": f"chain:{chain or 4}"} if chain or tree else {}
    for place, kind in enumerate(dict.fromkeys(tree or ())):
        shapes["tree" if place == 0 else kind] = kind
    return shapes


# ---- choosing: target, head, prompts -------------------------------------------------------------


def prompt_sources(args: argparse.Namespace, target: Target) -> list[Source]:
    """The prompts that `--prompts` names, else the default ones."""
    names = list(dict.fromkeys(args.prompts or [shown(args.default_prompts)]))
    return [read_source(name, target, args.limit, args.max_new_tokens) for name in names]


def open_bench(
    args: argparse.Namespace,
    read: Callable[[argparse.Namespace, Target], list[Source]] = prompt_sources,
) -> Bench:
    """Load target, head and prompts as the arguments say. Raises UserError on anything unfit."""
    environment()  # notes what code runs, before it is changed
    if args.max_new_tokens < 2:
        raise UserError("--max-new-tokens 1: nothing is drafted for a first token; give 2 or more")
    if args.out:
        check_folder(args.out)
    given = HeadChoice(local_folder(args.head), "--head") if args.head else None
    target = Target.load(args.target, dtype=args.dtype)
    choice = given or find_head(target)
    head = load_head(choice.folder, target, allow_other_target=args.allow_other_target)
    sizes = (args.max_new_tokens, args.batch_size)
    sources = read(args, target)
    return Bench(target, head, choice, sources, *sizes, args.allow_other_target, seed=args.seed)


def known_heads(
    target: Target, runs: Path = Path("runs"), stages: Sequence[str] = ("head",)
) -> list[HeadChoice]:
    """Heads for these weights: `runs/*/STAGE`, the newest first, then those that ship.

    Of several that ship the last by name comes first: `NAME-long`, trained longer, before `NAME`.
    """
    trained = [c for stage in stages for c in runs.glob(f"*/{stage}/config.json")]
    trained.sort(key=lambda config: config.stat().st_mtime, reverse=True)
    shipped = Path(str(package_files("adaspec_eagle.heads"))) / "pretrained"
    why = dict.fromkeys(trained, f"the newest under {runs}/ for this target")
    there = sorted(shipped.glob("*/config.json"), reverse=True)
    why |= dict.fromkeys(there, "shipped with the package")
    return [HeadChoice(c.parent, reason) for c, reason in why.items() if _fits(c, target)]


def find_head(target: Target, runs: Path = Path("runs")) -> HeadChoice:
    """The newest `runs/*/head` trained for these weights, else the shipped head for them."""
    if found := known_heads(target, runs):
        return found[0]
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
    if path.is_file():
        records, digest = read_prompts(path, limit), sha256(path)
    elif path.suffix or len(path.parts) > 1:
        raise UserError(f"prompt file {name} does not exist, or is no file")
    else:
        records = task_prompts(name, limit)
        digest = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
    prompts = [make_prompt(record, name, target, max_new_tokens) for record in records]
    if not prompts:
        raise UserError(f"{name} has no prompts")
    return Source(name, digest, prompts)


def make_prompt(record: dict[str, Any], source: str, target: Target, max_new_tokens: int) -> Prompt:
    """A prompt in the target's tokens; of several turns those that `record["later"]` lists.

    Raises UserError where it does not fit the context, answers of all its turns included.
    """
    messages = prompt_messages(record["messages"])
    ids, later = target.chat_ids(messages), tuple(record.get("later", ()))
    prompt = Prompt(record["id"], record.get("task") or "", source, messages, ids, later)
    _check_length(prompt, target, max_new_tokens)
    return prompt


def next_turn(prompt: Prompt, answer: str, target: Target) -> Prompt:
    """What is asked behind an answer: the conversation so far and the first of `prompt.later`."""
    asked, *later = prompt.later
    added = [{"role": "assistant", "content": answer}, {"role": "user", "content": asked}]
    messages = [*prompt.messages, *added]
    ids = target.chat_ids(messages)
    return replace(prompt, messages=messages, ids=ids, later=tuple(later))


def _check_length(prompt: Prompt, target: Target, max_new_tokens: int) -> None:
    last = prompt
    while last.later:
        last = next_turn(last, "", target)
    need = len(last.ids) + (1 + len(prompt.later)) * max_new_tokens
    if need > target.context:
        raise UserError(
            f"prompt {prompt.id} of {prompt.source} has {len(last.ids)} tokens; with "
            f"{max_new_tokens} new ones a turn that is {need}, over the target's context of "
            f"{target.context}. Lower --max-new-tokens or leave the prompt out"
        )


# ---- for the record ------------------------------------------------------------------------------


def describe_bench(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """The part of a result that says what was measured, with what, and where."""
    target, folder = bench.target, bench.choice.folder
    dtype = str(target.dtype).removeprefix("torch.")
    arguments = {
        name: str(value) if isinstance(value, Path) else value  # as JSON takes it
        for name, value in vars(args).items()
        if name != "default_prompts"
    }
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": arguments,
        "target": {
            "name": target.name,
            "fingerprint": target.fingerprint,
            "dtype": dtype,
            "device": str(target.device),
            "packed": bool(packing(target.model).places),  # its linear layers (packed.py)
        },
        "head": {
            "folder": shown(folder),
            "chosen": bench.choice.why,
            "sha256": sha256(weights_file(folder)),
            "config": asdict(bench.head.config),
        },
        "prompts": [source.describe() for source in bench.sources],
        "turns": "first",
        "environment": environment(),
    }
