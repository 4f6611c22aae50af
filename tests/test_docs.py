"""The pages of docs/, whose code runs as it stands, and what is to be cited."""

import ast
import json
import re
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
import yaml

from adaspec_eagle import generate, load_head
from adaspec_eagle.plugins import function_of, module_of
from adaspec_eagle.targets import Target
from scripts import train_head
from tests.records import answers_file
from tests.test_eval_scripts import arguments, script, write_prompts
from tests.tiny import tiny_target_folder

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "add_your_method.md"
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
        patch.setenv("ADASPEC_CACHE", str(folder / "cache"))
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
    assert type(head).__module__.startswith("adaspec_plugin_my_head_")
    ids = torch.randint(8, 97, (2, 7))
    found = generate(target, head, ids, max_new_tokens=24)
    assert found.answers == generate(target, None, ids, max_new_tokens=24).answers
    result = json.loads((followed / "made1" / "result.json").read_text())
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


# ---- citations -----------------------------------------------------------------------------------

PAPERS = {  # method -> arXiv id, and where its docstring is
    "adaspec": ("2510.19779", "adaspec_eagle/selection.py"),
    "distillspec": ("2310.08461", "adaspec_eagle/losses.py"),
    "eagle": ("2401.15077", "heads/eagle1.py"),
    "eagle2": ("2406.16858", "adaspec_eagle/draft.py"),
    "eagle3": ("2503.01840", "heads/eagle3.py"),
    "medusa": ("2401.10774", "heads/medusa.py"),
}


def test_the_citation_is_of_this_version_and_names_every_method():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert cited["version"] == setup["metadata"]["version"]
    assert cited["license"] == setup["metadata"]["license"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    found = {one["url"].removeprefix("https://arxiv.org/abs/") for one in cited["references"]}
    assert found == {number for number, _ in PAPERS.values()}


@pytest.mark.parametrize("method", PAPERS)
def test_a_methods_docstring_and_the_readme_name_its_paper(method):
    number, file = PAPERS[method]
    documented = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    assert any(number in text for text in documented)
    assert f"@article{{{method}," in (ROOT / "README.md").read_text()
    assert f"arXiv:{number}" in (ROOT / "README.md").read_text()


def test_a_file_of_ones_own_may_hold_dataclasses_and_share_its_stem(tmp_path):
    """Dataclasses with annotations as text look their module up by its name."""
    found = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        (folder / "mine.py").write_text(
            "from __future__ import annotations\n"
            "from dataclasses import dataclass\n"
            "@dataclass\nclass Setting:\n    value: int = 1\n"
            f"def where():\n    return {folder.name!r}\n"
        )
        found.append(function_of(f"{folder}/mine.py:where"))
    assert [where() for where in found] == ["one", "two"]
    assert function_of(f"{tmp_path}/two/../one/mine.py:where") is found[0]


def test_a_file_that_fails_is_run_anew_the_next_time(tmp_path):
    file, before = tmp_path / "mine.py", set(sys.modules)
    file.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        module_of(str(file))
    assert set(sys.modules) == before
    file.write_text("value = 11\n")
    assert module_of(str(file)).value == 11
