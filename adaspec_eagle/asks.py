"""What a target is asked: settings, prompts in its tokens, batches of like length; and the count.

Legend: B rows, T prompt columns.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from adaspec_eagle.apart import Measured
from adaspec_eagle.data import Prompt, prompt_messages
from adaspec_eagle.errors import UserError
from adaspec_eagle.targets import Target

CHUNK = 8  # batches that are sorted by length together
MAX_CELLS = 65_536  # rows x (prompt + answer) of one batch: long prompts go in smaller batches
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
        try:
            ids = target.chat_ids(messages)
        except UserError as error:
            raise UserError(f"{prompt.get('where', prompt['id'])}: {error}") from error
        if len(ids) <= limit:
            asks.append(Ask(prompt, ids))
        else:
            dropped[f"longer than {limit} tokens"] += 1
    return asks


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
