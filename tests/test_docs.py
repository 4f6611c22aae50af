"""The pages of docs/: their code runs as it stands."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from adaspec_eagle import generate, load_head
from adaspec_eagle.targets import Target
from scripts import train_head
from tests.records import answers_file
from tests.test_eval_scripts import arguments, script, write_prompts
from tests.tiny import tiny_target_folder

PAGE = Path(__file__).parents[1] / "docs" / "add_your_method.md"
BLOCK = re.compile(r"^```(python|bash) ?(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SMALL = ["--draft-vocab", "60", "--epochs", "1", "--evaluations", "1", "--batch-size", "6"]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A folder in which everything that the page says has been done, on a tiny target."""
    folder = tmp_path_factory.mktemp("stranger")
    target = tiny_target_folder(folder / "target")
    answers_file(folder / "answers.jsonl")
    prompts = write_prompts(folder / "p.jsonl")
    blocks = BLOCK.findall(PAGE.read_text())
    for _, name, text in blocks:
        if name:
            (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        commands = [line for _, name, text in blocks if not name for line in text.splitlines()]
        for number, command in enumerate(commands):
            python, path, *words = shlex.split(command)
            assert python == "python"
            if path == "scripts/train_head.py":
                assert train_head.main([*words, "--target", target, *SMALL]) == 0
            else:
                assert path == "eval/speedup.py"
                more = ["--prompts", prompts, "--out", f"made{number}"]
                assert script("speedup").main(arguments(*words, *more)) == 0
        yield folder


def test_a_head_from_a_file_trains_loads_and_is_lossless(followed):
    target = Target.load(followed / "target", dtype="float64")
    head = load_head(followed / "runs" / "my-head" / "head", target)
    assert type(head).__module__ == "adaspec_plugin_my_head"
    ids = torch.randint(8, 97, (2, 7))
    found = generate(target, head, ids, max_new_tokens=24)
    assert found.answers == generate(target, None, ids, max_new_tokens=24).answers
    (result,) = [json.loads((followed / f"made{n}" / "result.json").read_text()) for n in (1,)]
    assert result["head"]["config"]["head"] == "my_head.py"
    assert all(arm["lossless"] for arm in result["arms"].values())


def test_a_loss_and_a_selection_from_a_file_train_a_head(followed):
    notes = json.loads((followed / "runs" / "my-training" / "head" / "train.json").read_text())
    assert notes["objective"]["loss"] == "my_training.py:mean_kl"
    assert notes["objective"]["select"] == "my_training.py:learnable"


def test_a_decoder_from_a_file_stands_in_the_table_and_is_lossless(followed):
    result = json.loads((followed / "made3" / "result.json").read_text())
    arms = result["arms"]
    assert list(arms) == ["generate", "loop", "chain", "tree", "lookup", "forward"]
    assert arms["forward"]["matched"] == arms["forward"]["total"] == 3
    assert arms["forward"]["tau"] > 1
    assert {name for name, one in result["baselines"].items() if one["lacks"]} == {
        "eagle3",
        "adaspec",
    }
