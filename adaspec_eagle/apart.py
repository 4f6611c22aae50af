"""Texts that must stay apart: prompts to train on and files to measure on."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from adaspec_eagle.data import Message, read_prompts

RUN = 8  # words of a run by which a long text is recognised


def normalise(text: str) -> str:
    """Lower-case words of a text, Unicode-folded, without punctuation, single spaces between."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


class Measured:
    """The user texts of measuring files, to keep training prompts apart from them.

    A text is among them if its normalised form equals a user message there or, from RUN words on,
    if all its runs of RUN words occur there, or all those of one message there occur in it.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.texts: set[str] = set()
        for path in paths:
            for prompt in read_prompts(path):
                self.texts.update(user_texts(prompt["messages"]))
        self.of_run: dict[int, list[int]] = defaultdict(list)  # run -> numbers of texts
        self.runs: list[int] = []  # how many different ones each text has
        for number, text in enumerate(self.texts):
            runs = set(_runs(text))
            self.runs.append(len(runs))
            for run in runs:
                self.of_run[run].append(number)

    def __contains__(self, messages: list[Message]) -> bool:
        return any(self._holds(text) for text in user_texts(messages))

    def _holds(self, text: str) -> bool:
        runs = set(_runs(text))
        shared = [self.of_run[run] for run in runs if run in self.of_run]
        found = Counter(number for numbers in shared for number in numbers)
        holds_one = any(count == self.runs[number] for number, count in found.items())
        return text in self.texts or holds_one or bool(runs) and len(shared) == len(runs)


def user_texts(messages: list[Message]) -> list[str]:
    """The normalised user messages of a conversation."""
    return [normalise(m["content"]) for m in messages if m["role"] == "user"]


def _runs(text: str) -> list[int]:
    """Hashes of all runs of RUN words."""
    words = text.split()
    return [hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)]
