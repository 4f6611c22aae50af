"""Data sets on the hub by task name: the customary prompt, and the set's own answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adaspec_eagle.data import Prompt
from adaspec_eagle.errors import UserError, first_line


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub: where it is, how a row becomes prompt and answer, and its splits."""

    path: str
    name: str | None
    prompt: Callable[[dict[str, Any]], str]
    answer: Callable[[dict[str, Any]], str]
    train: str = "train"
    test: str = "test"
    revision: str | None = None


def _alpaca(row: dict[str, Any]) -> str:
    return "\n\n".join(filter(None, (row["instruction"], row["input"])))


def _mbpp(row: dict[str, Any]) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']}"
        f" Your code should pass these tests:\n\n{tests}"
    )


HUB_SETS = {
    "gsm8k": HubSet("openai/gsm8k", "main", lambda row: row["question"], lambda row: row["answer"]),
    "alpaca": HubSet(  # has one split: the last 1,000 are for measuring
        "tatsu-lab/alpaca",
        None,
        _alpaca,
        lambda row: row["output"],
        train="train[:-1000]",
        test="train[-1000:]",
    ),
    "mbpp": HubSet("google-research-datasets/mbpp", "full", _mbpp, lambda row: row["code"]),
    "cnndm": HubSet(
        "abisee/cnn_dailymail",
        "3.0.0",
        lambda row: f"Summarize: {row['article']}",
        lambda row: row["highlights"],
    ),
    "xsum": HubSet(  # its main branch holds a loading script, which `datasets` no longer runs
        "EdinburghNLP/xsum",
        None,
        lambda row: f"Summarize: {row['document']}",
        lambda row: row["summary"],
        revision="refs/convert/parquet",
    ),
}


def task_prompts(name: str, limit: int | None = None, split: str = "test") -> list[Prompt]:
    """Prompts of a hub set by its task name, with the customary prompt and the set's own answer.

    split: "test" for measuring, "train" for training. Raises UserError where the hub is not there.
    """
    if name not in HUB_SETS:
        raise UserError(f"no file and no task {name!r}; tasks are {', '.join(HUB_SETS)}")
    hub = HUB_SETS[name]
    import datasets  # slow to import, and not needed for files

    try:
        rows = datasets.load_dataset(
            hub.path, hub.name, split=getattr(hub, split), revision=hub.revision
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot load task {name!r} ({hub.path}) from the hub: {first_line(error)};"
            " give a JSON Lines file with `messages`, or --prompts self"
        ) from error
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    return [
        {
            "id": f"{name}-{split}-{i}",
            "task": name,
            "messages": [
                {"role": "user", "content": hub.prompt(row)},
                {"role": "assistant", "content": hub.answer(row)},
            ],
            "where": f"{hub.path} {split}:{i}",
        }
        for i, row in enumerate(rows)
        if hub.prompt(row).strip()
    ]
