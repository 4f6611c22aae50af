"""Records of random tokens, and a file of given answers, for tests of training."""

import json
import random
from pathlib import Path

from adaspec_eagle.data import Record
from tests.tiny import VOCAB


def record(prompt: int, answer: int, seed: int = 0) -> Record:
    """A record with so many prompt and answer tokens, none of them special."""
    draw = random.Random(f"{prompt} {answer} {seed}")
    ids = [draw.randrange(8, VOCAB) for _ in range(prompt + answer)]
    return Record(
        id=f"r{seed}",
        task="test",
        messages=[],
        prompt_ids=ids[:prompt],
        answer_ids=ids[prompt:],
        target="tiny",
        fingerprint=None,
        temperature=None,
    )


def answers_file(path: Path, records: int = 40) -> str:
    """A JSON Lines file of short given answers in the tiny tokenizer's words."""
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{draw.randrange(80)}" for _ in range(draw.randrange(low, high)))

    with path.open("w") as file:
        for n in range(records):
            turns = [{"role": "user", "content": text(3, 9)}]
            turns.append({"role": "assistant", "content": text(6, 24)})
            file.write(json.dumps({"id": f"r{n}", "task": "test", "messages": turns}) + "\n")
    return str(path)
