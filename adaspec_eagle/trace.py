"""One prompt seen from inside: which tokens of the answer were drafted, and one round's tree.

For a page that shows what a draft head does. Nothing of the prompt's text is kept.

Legend: N nodes, D depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from adaspec_eagle import measure
from adaspec_eagle.bench import Bench, Prompt
from adaspec_eagle.draft import Shape
from adaspec_eagle.generate import generate
from adaspec_eagle.measure import Arm
from adaspec_eagle.targets import Target, left_padded
from adaspec_eagle.tree import DraftTree
from adaspec_eagle.verify import Verdict

TOKENS = 96  # of the answer, at most


@dataclass
class Recorder:
    """Listens to `generate` on one row."""

    target: Target
    rounds: list[tuple[DraftTree, Verdict]] = field(default_factory=list)
    tokens: list[tuple[int, bool]] = field(default_factory=list)  # id, whether it was drafted

    def take_tokens(self, row: int, tokens: list[int], drafted: int) -> None:
        """The tokens of a round; the first `drafted` were the head's guesses."""
        self.tokens += [(token, place < drafted) for place, token in enumerate(tokens)]

    def take_round(self, tree: DraftTree, verdict: Verdict) -> None:
        """A round's tree and what was accepted of it."""
        self.rounds.append((tree, verdict))

    def pieces(self) -> list[list[Any]]:
        """The answer as [text, drafted] pairs; tokens that share a character are one piece."""
        pieces: list[list[Any]] = []
        ids: list[int] = []
        shown = ""
        for token, drafted in self.tokens:
            ids.append(token)
            text = self.target.tokenizer.decode(ids, skip_special_tokens=True)
            if text.endswith("\ufffd") or text == shown:
                continue
            pieces.append([text[len(shown) :], drafted])
            shown = text
        return pieces

    def best_round(self) -> dict[str, Any] | None:
        """The first of the rounds that accepted most; None where nothing was drafted."""
        drafted = [n for n, (tree, _) in enumerate(self.rounds) if tree.tokens.shape[1] > 1]
        if not drafted:
            return None
        best = max(drafted, key=lambda n: (int(self.rounds[n][1].length[0]), -n))
        tree, verdict = self.rounds[best]
        ids = [*tree.tokens[0].tolist(), int(verdict.bonus[0])]
        *texts, bonus = (self.target.tokenizer.decode([token]) for token in ids)
        scores = None if tree.scores is None else tree.scores[0].exp().tolist()  # [N]
        return {
            "number": best + 1,
            "of": len(self.rounds),
            "tokens": texts,
            "parents": tree.parents[0].tolist(),
            "path_probabilities": scores and [round(value, 5) for value in scores],
            "accepted": verdict.path[0, : int(verdict.length[0])].tolist(),
            "next": bonus,
        }


def trace_arms(bench: Bench, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Arm key -> its trace on the first prompt, for the arms that draft with a head.

    A run of its own after the measurement, greedy, not timed.
    """
    prompt = bench.sources[0].prompts[0]
    found = {}
    for arm in arms:
        how = arm.decode
        if arm.shape and isinstance(how, partial) and how.func is measure.decode:
            found[arm.key] = trace(how.args[0], how.args[1], prompt)
    return found


def trace(bench: Bench, shape: str | Shape, prompt: Prompt) -> dict[str, Any]:
    """What the bench's head drafts for one prompt, and what the target accepts of it."""
    ids, mask = left_padded(bench.target, [prompt.ids])
    recorder = Recorder(bench.target)
    made = generate(
        bench.target,
        bench.head,
        ids,
        mask,
        tree=shape,
        max_new_tokens=min(bench.max_new_tokens, TOKENS),
        compiled=bench.compiled,
        watch=recorder.take_tokens,
        watch_tree=recorder.take_round,
        allow_other_target=bench.allow_other_target,
    )
    return {
        "prompt": prompt.id,
        "source": prompt.source,
        "tau": made.stats.tau,
        "pieces": recorder.pieces(),
        "round": recorder.best_round(),
    }
