"""The shape of the code: import arrows, and the contract over every file in heads/."""

import ast
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch

import adaspec_eagle
from adaspec_eagle import DraftHead, head_class
from adaspec_eagle.errors import UserError
from adaspec_eagle.head import built_in_heads
from tests.tiny import tiny_head, tiny_target

REPOSITORY = Path(__file__).parents[1]
HEADS = sorted(p.stem for p in (REPOSITORY / "heads").glob("*.py") if p.stem != "__init__")

LEVELS = [  # a module imports from earlier lines, or from its own line, only
    {"errors", "paths", "allocator", "plugins", "processes", "stats", "packed", "watch"},
    {"attention", "cache", "default_target", "tree", "losses", "fused", "selection", "record"},
    {"targets", "verify", "storage"},
    {"sampling", "formats"},
    {"card", "published"},
    {"head", "data", "features", "hub", "apart", "zero", "optim"},
    {"compiled"},
    {"auto", "feature_store"},
    {"draft", "unroll"},
    {"generate"},
    {"distill", "selfdata", "asks", "estimate", "plug", "chat", "work"},
    {"acceptance", "answers", "bench", "export", "callbacks", "plots", "speed_tables", "prepare"},
    {"onpolicy"},
    {"train", "measure", "suites"},
    {"rescore", "foreign", "baselines", "suite_tables", "trace"},
    {"alike"},
    {"grid", "contrasts"},
    {"figures", "compare_tables", "report"},
    {"grid_speed"},
]


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in found if name.startswith("adaspec_eagle.")}


def test_imports_go_one_way():
    level = {name: n for n, names in enumerate(LEVELS) for name in names}
    modules = {p.stem: p for p in (REPOSITORY / "adaspec_eagle").glob("*.py")}
    assert set(modules) - {"__init__"} == set(level), "a new module needs its place in LEVELS"
    for name, path in modules.items():
        if name != "__init__":
            assert all(level[other] <= level[name] for other in imports(path)), name


def test_heads_import_the_contract_only():
    for name in HEADS:
        assert imports(REPOSITORY / "heads" / f"{name}.py") <= {"head"}


def test_scripts_import_the_library_only():
    for path in [*REPOSITORY.glob("scripts/*.py"), *REPOSITORY.glob("eval/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in ("scripts", "eval", "tests"), path


def test_heavy_packages_are_imported_where_they_are_used():
    for path in (REPOSITORY / "adaspec_eagle").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(a.name for a in node.names)}
                assert not names & {"datasets", "deepspeed", "matplotlib"}, path


def test_every_file_in_heads_is_built_in():
    assert built_in_heads() == HEADS


@pytest.mark.parametrize("name", HEADS)
def test_heads_keep_the_contract(name):
    """Class, features, shapes, borrowed rows: what generate and unroll rely on."""
    kind = head_class(name)
    assert issubclass(kind, DraftHead)
    assert all(0 <= layer <= 30 for layer in kind.feature_layers(30))
    target = tiny_target()
    head = tiny_head(target, name)
    tokens = torch.randint(8, 97, (2, 5))
    features = torch.randn(2, 5, 32 * len(head.config.feature_layers), dtype=torch.float64)
    positions = torch.arange(5).expand(2, 5)
    fused = head.fuse(features)
    hidden = head(fused, tokens, positions, None, None, 0)
    assert hidden.shape == fused.shape
    assert head.readout(hidden).shape == (2, 5, 32)
    assert head.logits(hidden).shape == (2, 5, 40)
    torch.testing.assert_close(head.logits(hidden), head.project(head.readout(hidden)))
    torch.testing.assert_close(head.embed(tokens), target.model.get_input_embeddings()(tokens))
    if name != "lm":  # which has output rows of its own
        wanted = target.logits(head.readout(hidden))[..., head.draft_ids]
        torch.testing.assert_close(head.logits(hidden), wanted)
    assert torch.equal(head.to_target(torch.arange(40)), head.draft_ids)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_was_not_bound_gives_nan(name):
    """A forgotten bind shows: no output can come from rows that were never borrowed."""
    target = tiny_target()
    head = head_class(name)(tiny_head(target, name).config).double()
    assert head.embed(torch.zeros(1, 1, dtype=torch.long)).isnan().all()
    if name != "lm":
        assert head.project(torch.zeros(1, 32, dtype=torch.float64)).isnan().all()


@pytest.mark.parametrize("name", HEADS)
def test_casting_a_head_keeps_its_rotary_frequencies_exact(name):
    """A head saved in bfloat16 used to turn far positions by other angles than it was trained with.

    Another package's logits for the shipped head showed it.
    """
    head = head_class(name)(tiny_head(tiny_target(), name).config)
    exact = {n: b.clone() for n, b in head.named_buffers() if n.endswith(".inv_freq")}
    assert exact or name == "medusa"  # which has no attention
    head.to(torch.bfloat16).to(torch.float64)
    found = dict(head.named_buffers())
    assert all(torch.equal(found[n].double(), b.double()) for n, b in exact.items())
    assert {weight.dtype for weight in head.parameters()} == {torch.float64}


def test_a_head_is_found_by_module_and_by_file(tmp_path):
    source = REPOSITORY / "heads" / "eagle3.py"
    copy = tmp_path / "my_head.py"
    copy.write_text(source.read_text())
    assert head_class(str(copy)).__doc__ == head_class("adaspec_eagle.heads.eagle3").__doc__
    for wrong in ("nowhere", "json.decoder", str(tmp_path / "none.py")):
        with pytest.raises(UserError):
            head_class(wrong)


def tracked(*folders: str) -> list[str]:
    """Paths of the files there that git knows; skips outside a checkout."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    return done.stdout.splitlines()


def test_every_data_file_of_the_package_is_installed():
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    packages = {"adaspec_eagle": "adaspec_eagle", "heads": "adaspec_eagle.heads"}
    for folder, package in packages.items():
        patterns = setup["options.package_data"][package].split()
        installed = {file for one in patterns for file in (REPOSITORY / folder).glob(one)}
        for path in tracked(folder):
            assert path.endswith(".py") or REPOSITORY / path in installed, path


def test_no_result_names_a_folder_of_one_machine():
    for path in tracked("results"):
        if path.endswith(".png"):  # compressed bytes match by chance
            continue
        content = (REPOSITORY / path).read_bytes()
        assert not re.search(rb"""["'\s=]/\w+/""", content), path


def test_every_link_to_a_file_leads_somewhere():
    for page in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_public_names():
    for name in ("Target", "DraftHead", "load_head", "generate", "AcceptanceStats", "head_class"):
        assert hasattr(adaspec_eagle, name)
