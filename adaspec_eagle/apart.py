"""Texts that must stay apart: prompts to train on and files to measure on."""

import unicodedata
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
    if all its runs of RUN words occur there.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.texts: set[str] = set()
        self.runs: set[int] = set()
        for path in paths:
            for prompt in read_prompts(path):
                for text in user_texts(prompt["messages"]):
                    self.texts.add(text)
                    self.runs.update(_runs(text))

    def __contains__(self, messages: list[Message]) -> bool:
        return any(self._holds(text) for text in user_texts(messages))

    def _holds(self, text: str) -> bool:
        runs = _runs(text)
        return text in self.texts or bool(runs) and self.runs.issuperset(runs)


def user_texts(messages: list[Message]) -> list[str]:
    """The normalised user messages of a conversation."""
    return [normalise(m["content"]) for m in messages if m["role"] == "user"]


def _runs(text: str) -> list[int]:
    """Hashes of all runs of RUN words."""
    words = text.split()
    return [hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)]
