"""Prompts that the target writes itself: sampled from where its chat format expects the user.

Given the template's text up to the first user content (default system turn included), an
instruction model writes what it takes a user to ask. Sampled at temperature 1 and top-p 0.95 in
batches, each with a seed of its own, so that batch number b is the same whenever it is made.

A prompt is kept if it breaks none of RULES, and if no earlier one has the same normalised text.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from adaspec_eagle.apart import normalise
from adaspec_eagle.data import ChatFrame, Prompt, chat_frame
from adaspec_eagle.generate import generate
from adaspec_eagle.targets import Target

TEMPERATURE, TOP_P = 1.0, 0.95
MAX_TOKENS = 128  # a prompt that has not ended by then is dropped
MIN_WORDS, MIN_DISTINCT, MIN_LETTERS = 4, 0.4, 0.5

ASSISTANT_OPENINGS = (
    "as an ai",
    "i m sorry",
    "i am sorry",
    "sure here",
    "here is the",
    "here s the",
)

# What a kept prompt must not break, in the order in which the rules are tried.
RULES: dict[str, Callable[[str], bool]] = {
    "too short": lambda text: len(text.split()) < MIN_WORDS,
    "not printable": lambda text: (
        not all(c.isprintable() or c in "\n\t" for c in text) or "\ufffd" in text
    ),
    "mostly not words": lambda text: (
        sum(c.isalpha() or c == " " for c in text) < MIN_LETTERS * len(text)
    ),
    "repetitive": lambda text: _distinct(text) < MIN_DISTINCT,
    "speaks as the assistant": lambda text: normalise(text).startswith(ASSISTANT_OPENINGS),
}


@dataclass
class SelfBatch:
    """One batch of sampled prompts: those kept, how many each rule dropped, tokens sampled."""

    number: int
    kept: list[Prompt] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0


def write_prompts(
    target: Target, number: int, seen: set[str], *, seed: int = 0, rows: int = 64
) -> SelfBatch:
    """Sample batch `number` of `rows` prompts; `seen` (normalised texts) takes in those kept."""
    frame = chat_frame(target)
    prefix = torch.tensor([start_ids(target, frame)] * rows, device=target.device)  # [B, T]
    out = generate(
        target,
        None,
        prefix,
        max_new_tokens=min(MAX_TOKENS, target.context - prefix.shape[1]),
        temperature=TEMPERATURE,
        top_p=TOP_P,
        seed=seed * 1_000_003 + number,
    )
    batch, dropped = SelfBatch(number), Counter[str]()
    for row, ids in enumerate(out.answers):
        batch.tokens += len(ids)
        text = user_text(target, frame, ids)
        reason = broken_rule(target, text)
        if reason is None and normalise(text or "") in seen:
            reason = "duplicate"
        if text is None or reason is not None:
            dropped[str(reason)] += 1
            continue
        seen.add(normalise(text))
        name = f"self-{seed}-{number}-{row}"
        messages = [{"role": "user", "content": text}]
        batch.kept.append({"id": name, "task": "self", "messages": messages, "where": name})
    batch.dropped = dict(dropped)
    return batch


def start_ids(target: Target, frame: ChatFrame) -> list[int]:
    """What the target is given to write on from: the chat format up to the user's words.

    Without a chat template, behind BOS: a tokenizer may leave it out that the model was trained on.
    """
    bos = target.tokenizer.bos_token_id
    if target.tokenizer.chat_template or bos is None or frame.prefix[:1] == [bos]:
        return frame.prefix
    return [bos, *frame.prefix]


def user_text(target: Target, frame: ChatFrame, ids: list[int]) -> str | None:
    """The sampled tokens up to the end of the user's turn; None if that did not come.

    The turn ends with an end token, with the token that follows the user's words in the template,
    or where the text goes on as the format does behind them (` [/INST]`, `Assistant:`).
    """
    decode, special = target.tokenizer.decode, set(target.tokenizer.all_special_ids)
    ends = set(target.eos_token_ids) | (special & set(frame.suffix[:1]))
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    text = decode(ids[:end], skip_special_tokens=False)
    if not ends & set(frame.suffix[:1]):  # the format has no token for the end of the user's turn
        words = [token for token in frame.suffix if token not in special]
        text, marker, _ = text.partition(decode(words).strip() or "\0")
        end = end if end is not None else (0 if marker else None)
    return None if end is None else text.strip()


def broken_rule(target: Target, text: str | None) -> str | None:
    """The name of the first rule that a prompt breaks, or None."""
    if text is None:
        return f"not ended after {MAX_TOKENS} tokens"
    if any(token in text for token in target.tokenizer.all_special_tokens):
        return "template marker"
    if any(line.startswith(("User:", "Assistant:", "System:")) for line in text.splitlines()):
        return "template marker"
    if text.split("\n")[0].strip().casefold() in ("user", "assistant", "system"):
        return "template marker"
    return next((name for name, breaks in RULES.items() if breaks(text)), None)


def _distinct(text: str) -> float:
    """Distinct words / words, of the 30-word stretch that repeats itself most."""
    words = normalise(text).split()
    stretches = [words[i : i + 30] for i in range(0, max(1, len(words) - 29), 10)]
    return min(len(set(s)) / max(1, len(s)) for s in stretches)
