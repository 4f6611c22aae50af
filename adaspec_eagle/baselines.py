"""Methods to compare with, as further arms: same prompts, same process, same figures.

Those that draft with a head run in this package's loop; prompt lookup and assisted generation are
transformers' own (foreign.py). An arm for which something is not there is kept, with what it lacks,
and never measured with something else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from adaspec_eagle.bench import Bench, known_heads
from adaspec_eagle.draft import Dynamic, Shape, Static, check_shape, parse_shape, static_paths
from adaspec_eagle.errors import UserError, first_line
from adaspec_eagle.foreign import assisted
from adaspec_eagle.head import load_head
from adaspec_eagle.measure import Arm, compiled_baseline, decode
from adaspec_eagle.record import sha256, shown
from adaspec_eagle.storage import local_folder, read_json, weights_file
from adaspec_eagle.targets import Target, left_padded

COMPILED = "generate-compiled"
LOOKUP = 10  # tokens that prompt lookup copies, as Spec-Bench asks for; the n-gram is of up to 2

DEFINITIONS = {
    "baselines": "arms of other methods: `paper`; `head` and `tree` of those that draft with one; "
    "`lacks`: why an arm was not measured",
    "lossless": "every answer that differs from generate's is the target's own by the rule of "
    "eval/lossless.py for the dtype; `gap`: the largest logit minus that of the emitted token, the "
    "greatest over all tokens of those answers",
}


@dataclass(frozen=True)
class Method:
    """A published method."""

    paper: str
    head: str | None = None  # kind of head, a file in heads/
    tree: Shape | None = None  # the paper's
    select: str = "none"  # how a head that is looked for was trained


def tree_of(children: dict[tuple[int, ...], int]) -> Static:
    """The static tree in which the node at a path of ranks has that many children, ranked from 0.

    What is not named has none; the root is at ().
    """
    return static_paths([(*path, n) for path, count in children.items() for n in range(count)])


# EAGLE-1's published tree, 25 draft tokens and 5 deep: "mc_sim_7b_63" in its code.
EAGLE1_TREE = tree_of(
    {
        (): 4,
        **{(0,): 3, (1,): 2, (2,): 2, (3,): 1},
        **{(0, 0): 3, (0, 1): 2, (0, 2): 2, (1, 0): 1},
        **{(0, 0, 0): 3, (0, 0, 0, 0): 2},
    }
)
# Medusa's for Vicuna-7B, 63 draft tokens and 4 deep: of the same name in Medusa's code.
MEDUSA_TREE = tree_of(
    {
        (): 10,
        **{(0,): 10, (1,): 7, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1, (8,): 1},
        **{(9,): 1, (0, 0): 10, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1},
        **{(0, 6): 1, (0, 7): 1, (1, 0): 2, (2, 0): 1, (0, 0, 0): 2},
    }
)
# EAGLE-2 verifies 60 tokens, the root among them, from beams of 10 (6 levels; EAGLE-3: 8).
EAGLE2_TREE = Dynamic(nodes=59, depth=6, width=10)
EAGLE3_TREE = Dynamic(nodes=59, depth=8, width=10)

METHODS = {
    "lookup": Method("prompt lookup, Saxena 2023; transformers' prompt_lookup_num_tokens"),
    "assisted": Method("Leviathan et al., arXiv 2211.17192; transformers' assistant_model"),
    "medusa": Method("Cai et al., arXiv 2401.10774", "medusa", MEDUSA_TREE),
    "eagle1": Method("Li et al., arXiv 2401.15077", "eagle1", EAGLE1_TREE),
    "eagle2": Method("Li et al., arXiv 2406.16858", "eagle1", EAGLE2_TREE),
    "eagle3": Method("Li et al., arXiv 2503.01840", "eagle3", EAGLE3_TREE),
    "adaspec": Method("Hu et al., arXiv 2510.19779", "eagle3", EAGLE3_TREE, "adaspec"),
}


@dataclass(frozen=True)
class Ask:
    """A baseline as it is asked for: `NAME[=WHAT][@TREE]`."""

    name: str
    what: str | None = None  # folder or id of the head or of the small model
    tree: str | None = None  # instead of the paper's


def parse_asks(words: Sequence[str]) -> list[Ask]:
    """`all`, or names with what they need: `all medusa=DIR eagle2=DIR@auto`, in METHODS' order.

    Words may be joined by commas. Raises UserError for unknown names and trees.
    """
    asked: dict[str, Ask] = {}
    for word in [part for text in words for part in text.split(",") if part]:
        whole, _, tree = word.partition("@")
        name, _, what = whole.partition("=")
        if tree:
            parse_shape(tree)
        if name not in (*METHODS, "all") or (name == "all" and word != "all"):
            raise UserError(f"unknown baseline {word!r}; there are all, {', '.join(METHODS)}")
        if (tree and name != "all" and METHODS[name].head is None) or (what and name == "lookup"):
            raise UserError(
                f"baseline {word!r}: transformers' own decoding takes no tree, and lookup no model"
            )
        for one in METHODS if name == "all" else [name]:
            if name != "all" or one not in asked:
                asked[one] = Ask(one, what or None, tree or None)
    return [asked[name] for name in METHODS if name in asked]


@dataclass
class Baselines:
    """What was asked for: the arms that can be measured, and all of them described."""

    arms: list[Arm] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def build_baselines(bench: Bench, asks: Sequence[Ask]) -> Baselines:
    """An arm for each baseline that has what it needs; `facts` say of the others what they lack."""
    made = Baselines()
    if bench.compiled:
        add_compiled_generate(bench, made)
    for ask in asks:
        facts: dict[str, Any] = {"paper": METHODS[ask.name].paper, "lacks": None}
        made.facts[ask.name] = facts
        try:
            arm, more = _build(bench, ask)
        except UserError as error:
            facts["lacks"] = f"{_need(ask.name)}: {error}"
        else:
            made.arms.append(arm)
            facts |= more
    return made


def add_compiled_generate(bench: Bench, made: Baselines) -> None:
    """`model.generate` compiled transformers' way, tried once; what it fails with, if it does."""
    arm = Arm(COMPILED, None, partial(compiled_baseline, bench))
    what = "transformers' static cache, with room for the longest prompt, and torch.compile"
    facts: dict[str, Any] = {"paper": what}
    begin = perf_counter()
    try:
        arm.decode(*left_padded(bench.target, [prompt.ids for prompt in bench.units()[0]]))
    except Exception as error:  # whatever a compiler raises: the table shows it
        facts["lacks"] = f"a graph: {type(error).__name__}: {first_line(error)}"
    else:
        facts |= {"lacks": None, "first_decode_s": perf_counter() - begin}
        made.arms.append(arm)
    made.facts[COMPILED] = facts


def _need(name: str) -> str:
    """What a baseline cannot do without."""
    kind = METHODS[name].head
    return f"a head of kind {kind}" if kind else "a small model with the target's tokenizer"


def _build(bench: Bench, ask: Ask) -> tuple[Arm, dict[str, Any]]:
    method = METHODS[ask.name]
    if ask.name == "lookup":
        how = {"prompt_lookup_num_tokens": LOOKUP}
        return Arm(ask.name, f"copies of {LOOKUP}", partial(assisted, bench, how)), {}
    if ask.name == "assisted":
        small = _assistant(bench.target, ask.what)
        how = {"assistant_model": small.model}
        facts = {"assistant": small.name, "assistant_fingerprint": small.fingerprint}
        return Arm(ask.name, small.name, partial(assisted, bench, how)), facts
    folder = local_folder(ask.what) if ask.what else _find(bench, method)
    head = load_head(folder, bench.target, bench.allow_other_target)
    if head.config.head != method.head:
        raise UserError(f"{folder} is of kind {head.config.head}")
    tree = ask.tree or method.tree
    assert tree is not None  # those with a head have one
    shape = parse_shape(tree)
    if shape.sampled:
        raise UserError("a baseline is decoded greedily, and a sampled chain is not")
    try:
        check_shape(shape, head, bench.target.context)
    except UserError as error:
        raise UserError(f"{folder}: {error} (NAME=DIR@TREE)") from error
    label = ask.tree or _label(shape)
    own = partial(decode, replace(bench, head=head), shape)
    facts = {"folder": shown(folder), "sha256": sha256(weights_file(folder))}
    return Arm(ask.name, label, own), {"head": facts | _objective(folder), "tree": label}


def _objective(folder: Path) -> dict[str, str]:
    """Loss and selection by which a head was trained, as far as its train.json says."""
    notes = folder / "train.json"
    found = read_json(notes).get("objective", {}) if notes.is_file() else {}
    return {name: str(found[name]) for name in ("loss", "select") if name in found}


def _label(shape: Shape) -> str:
    """A shape in a few characters."""
    if isinstance(shape, Static):
        return f"static of {len(shape.parents) - 1}"
    assert isinstance(shape, Dynamic)
    return f"dynamic of {shape.nodes}"


def _find(bench: Bench, method: Method) -> Path:
    """The first of the known heads of the method's kind that was trained as the method says."""
    for choice in known_heads(bench.target, stages=("head", "reference")):
        kind = read_json(choice.folder / "config.json").get("head")
        select = _objective(choice.folder).get("select")
        if (kind, select) == (method.head, method.select):
            return choice.folder
    trained = "adaspec" if method.select == "adaspec" else "distillspec"
    raise UserError(
        f"none that {trained} trained for these weights is under runs/ or ships; train one "
        f"(scripts/train_head.py --head {method.head} --method {trained}) or name one (NAME=DIR)"
    )


def _assistant(target: Target, name: str | None) -> Target:
    """The small model of assisted generation; UserError where its tokenizer is another."""
    if name is None:
        raise UserError("name one (assisted=NAME)")
    small = Target.load(name, dtype=target.dtype, device=target.device)
    if small.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise UserError(f"{name} has another")
    return small
