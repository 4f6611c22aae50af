"""The way out and in: script, card, hub, and measuring a head from elsewhere directly."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import load_file

from adaspec_eagle import DraftHead, Target, load_head
from adaspec_eagle.bench import find_head
from adaspec_eagle.card import model_card, target_licence
from adaspec_eagle.errors import UserError, run_main
from adaspec_eagle.export import export_head, import_head, read_result
from adaspec_eagle.formats import FORMATS, OURS
from adaspec_eagle.head import read_config
from adaspec_eagle.record import sha256
from tests.tiny import tiny_head, tiny_model, tiny_target, tiny_tokenizer

REPOSITORY = Path(__file__).parents[1]
NOTES = {
    "objective": {"loss": "fkl", "select": "adaspec", "keep": "0.4", "unroll": 3, "decay": 0.8},
    "data": {"records": 1234, "answer_tokens": 56789, "tasks": {"gsm8k": 1234}, "held_back": 64},
    "epochs": 2.0,
    "answer_token_passes": 113578,
    "best_tau_sim": 1.948,
}


def script(name: str, folder: str = "scripts"):
    return runpy.run_path(str(REPOSITORY / folder / f"{name}.py"), run_name="imported")["main"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A working folder with a target, a head for it with notes, and a prompt file."""
    folder = tmp_path_factory.mktemp("work")
    tiny_model("llama", torch.float32, num_hidden_layers=8).save_pretrained(folder / "target")
    tiny_tokenizer().save_pretrained(folder / "target")
    target = Target.load(folder / "target", dtype="float32")
    tiny_head(target).save(folder / "head", NOTES)
    prompt = {"id": "one", "messages": [{"role": "user", "content": "w1 w2 w3"}]}
    (folder / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    return folder


@pytest.fixture
def here(work, monkeypatch):
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def hub(monkeypatch):
    """A hub that notes what is asked of it; `hub.logged_in` says whether there is a token."""
    seen = SimpleNamespace(calls=[], files=[], logged_in=True)

    class Api:
        def whoami(self):
            seen.calls.append("whoami")
            if not seen.logged_in:
                raise LocalTokenNotFoundError("Token is required, but no token found")

        def create_repo(self, repo, repo_type, exist_ok):
            seen.calls.append(f"create {repo}")
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen.calls.append(f"upload {repo_id}")
            seen.files = sorted(p.name for p in Path(folder_path).iterdir())

    monkeypatch.setattr("adaspec_eagle.storage.HfApi", Api)
    return seen


def export(*more: str) -> int:
    return run_main(script("export_head"), ["--head", "head", *more])


# ---- script --------------------------------------------------------------------------------------


def test_the_script_exports_and_imports(here, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    assert export("--to", "sglang", "--out", str(out)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"head: {out}"
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert export("--head", str(out), "--to", "vllm", "--out", str(back)) == 2
    assert "import it first (--from sglang)" in capsys.readouterr().err
    command = ["--head", str(out), "--from", "sglang", "--out", str(back)]
    assert run_main(script("export_head"), [*command, "--target-licence", "mit"]) == 2
    assert run_main(script("export_head"), command) == 0
    one, two = (load_file(folder / "model.safetensors") for folder in (here / "head", back))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_the_shipped_head_goes_out_and_comes_back(real_target, tmp_path, to):
    """Bit-equal, in every layout, for the real target; its rows are not the head's."""
    shipped = find_head(real_target, runs=tmp_path / "none").folder
    command = ["--head", str(shipped), "--to", to, "--out", str(tmp_path / "out")]
    assert run_main(script("export_head"), command) == 0
    command = ["--head", str(tmp_path / "out"), "--from", to, "--out", str(tmp_path / "back")]
    assert run_main(script("export_head"), command) == 0
    assert read_config(tmp_path / "back") == read_config(shipped)
    with pytest.raises(UserError, match="own layout"):
        import_head(shipped, "eagle", tmp_path / "again")
    one, two = (load_file(f / "model.safetensors") for f in (shipped, tmp_path / "back"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--head", "nowhere"], "nowhere"),
        (["--head", "target"], "known here"),
        (["--target", "nowhere/at/all"], "does not exist"),
        (["--out", "target"], "exists already"),
        (["--push", "not a repo"], "OWNER/NAME"),
        (["--push", "me/mine"], "licence of target"),
        (["--result", "prompts.jsonl"], "no result of eval/speedup.py"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(here, tmp_path, hub, capsys, options, words):
    before = sorted(p for p in here.rglob("*"))
    assert export("--to", "vllm", "--out", str(tmp_path / "out"), *options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
    assert sorted(p for p in here.rglob("*")) == before
    assert "create me/mine" not in hub.calls


def test_a_failed_write_leaves_no_folder(here, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("adaspec_eagle.storage.save_file", full)
    assert export("--to", "vllm", "--out", str(tmp_path / "out")) == 2
    assert list(tmp_path.iterdir()) == []


# ---- card ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["eagle", "sglang", "vllm", "speculators"])
def test_every_export_has_a_card_with_what_a_user_needs(here, tmp_path, to):
    out = tmp_path / to
    assert export("--to", to, "--out", str(out), "--target-licence", "BSD-3-Clause") == 0
    card = (out / "README.md").read_text()
    target = json.loads((here / "head" / "config.json").read_text())
    for words in (
        target["target"],
        target["target_fingerprint"],
        "licence of the target | BSD-3-Clause",
        "gsm8k 1,234",
        "56,789 answer tokens",
        "AdaSPEC, k = 0.4",
        "tau_sim 1.948",
        "**tau** (acceptance length)",
        "P(the draft token at\ndepth d is accepted, given that depth d - 1 was)",
        f"vllm serve {target['target']} --speculative-config",
        '"method": "eagle3"',
        "--speculative-algorithm EAGLE3",
        f"--speculative-draft-model-path {out}",
    ):
        assert words in card, words
    assert ("vLLM:" in card) == (to in ("vllm", "speculators"))
    assert ("SGLang:" in card) == (to == "sglang")  # elsewhere: export first


def test_the_card_takes_tau_and_alpha_from_a_measurement(here, tmp_path):
    fields = json.loads((here / "head" / "config.json").read_text())
    arm = {"nodes": 9, "shape": "chain:4", "tau": 1.42, "tau_ci95": [1.32, 1.54]}
    arm |= {"alpha_by_depth": [0.28, 0.31], "speedup_vs_generate": 1.02}
    arm |= {"speedup_vs_generate_ci95": [0.94, 1.11]}
    result = {
        "kind": "speedup",
        "head": {"sha256": sha256(here / "head" / "model.safetensors")},
        "arms": {"generate": {"nodes": 0, "shape": None}, "chain": arm},
        "prompts": [{"file": "data/gsm8k.jsonl", "prompts": 20}],
        "target": {"dtype": "bfloat16", "fingerprint": fields["target_fingerprint"]},
        "environment": {"cuda": None, "cpu": "Some CPU"},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    options = ["--to", "vllm", "--out", str(tmp_path / "out")]
    assert export(*options, "--result", str(tmp_path / "result.json")) == 0
    (tmp_path / "other.json").write_text(json.dumps(result | {"head": {"sha256": "other"}}))
    with pytest.raises(UserError, match="other weights"):
        read_result(tmp_path / "other.json", here / "head")
    elsewhere = result | {"target": {"dtype": "bfloat16", "fingerprint": "other"}}
    (tmp_path / "other.json").write_text(json.dumps(elsewhere))
    with pytest.raises(UserError, match="not trained for"):
        read_result(tmp_path / "other.json", here / "head")
    sampled = model_card(fields, None, "MIT", result=result | {"temperature": 1.0})
    assert "Sampled at temperature 1.0, bfloat16" in sampled
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| chain:4 | 1.42 [1.32, 1.54] | 0.28 0.31 | 1.02 [0.94, 1.11] |" in card
    assert "gsm8k.jsonl (20)" in card
    assert "Greedy, bfloat16" in card


def test_the_card_offers_no_command_that_cannot_work():
    """vLLM has no reduced EAGLE-1 head, and no engine adds a borrowed output bias."""
    fields = vars(tiny_head(tiny_target(), "eagle1").config)
    card = model_card(fields, None, "MIT", "sglang", "me/mine")
    assert "vllm serve" not in card
    assert "--speculative-token-map me/mine/hot_token_id.pt" in card
    assert "--speculative-algorithm EAGLE " in card
    biased = model_card(fields | {"output_bias": True}, None, "MIT")
    assert "No engine runs this head" in biased
    assert "sglang.launch_server" not in biased


def test_the_card_lists_no_other_method_and_names_any_selection():
    fields = vars(tiny_head(tiny_target()).config)
    figures = {"tau": 1.5, "tau_ci95": [1, 2], "speedup_vs_generate": 1.25,
               "speedup_vs_generate_ci95": [1, 2], "nodes": 9}  # fmt: skip
    result = {
        "arms": {"tree": figures | {"shape": "auto"}, "lookup": figures | {"shape": "copies"}},
        "baselines": {"lookup": {}},
        "prompts": [],
        "target": {"dtype": "bfloat16"},
        "environment": {"cuda": None, "cpu": "Some CPU"},
    }
    for select, words in (
        ("none", "all tokens"),
        ("adaspec", "AdaSPEC, k = 0.4"),
        ("random", "selection random, k = 0.4"),
    ):
        notes = {"objective": {"select": select, "keep": 0.4}}
        card = model_card(fields, notes, "MIT", result=result)
        assert f"| method | {words}, loss" in card
        assert "| auto | 1.50" in card
        assert "copies" not in card


def test_the_licence_is_the_one_that_the_targets_card_states(tmp_path):
    assert target_licence("smollm2-135m") == "Apache-2.0"
    assert target_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    assert target_licence(str(tmp_path)) == "llama3.1"


# ---- hub -----------------------------------------------------------------------------------------


def test_a_dry_run_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="--push REPO"):
        script("export_head")(
            ["--head", "x", "--to", "vllm", "--out", str(tmp_path / "made"), "--dry-run"]
        )
    assert not (tmp_path / "made").exists()


def test_a_dry_run_asks_nothing_of_the_hub(here, tmp_path, hub, capsys):
    options = ["--to", "vllm", "--out", str(tmp_path / "out"), "--target-licence", "MIT"]
    assert export(*options, "--push", "me/mine", "--dry-run") == 0
    assert hub.calls == []
    said = capsys.readouterr().out
    assert "would upload to me/mine: README.md" in said
    assert "model.safetensors" in said
    assert list(tmp_path.iterdir()) == [], "so that the push itself may follow"
    assert export(*options, "--push", "me/mine") == 0
    assert "me/mine" in (tmp_path / "out" / "README.md").read_text()


def test_a_push_that_fails_says_how_to_go_on(here, tmp_path, hub, monkeypatch, capsys):
    def gone(*args, **kwargs):
        raise OSError("the line is dead")

    monkeypatch.setattr("adaspec_eagle.storage.HfApi.upload_folder", gone)
    options = ["--to", "vllm", "--out", str(tmp_path / "out"), "--target-licence", "MIT"]
    assert export(*options, "--push", "me/mine") == 2
    assert f"the line is dead; the export is whole, in {tmp_path / 'out'}: `hf upload me/mine" in (
        capsys.readouterr().err
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_current_folder_is_not_written_over(here, tmp_path, monkeypatch, capsys):
    """It would be gone from under the user's shell."""
    head = load_head(here / "head")
    monkeypatch.chdir(tmp_path)
    options = ["--head", str(here / "head"), "--to", "vllm", "--out", "."]
    assert run_main(script("export_head"), options) == 2
    assert "current folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="current folder"):
        head.save(".")
    assert list(tmp_path.iterdir()) == []


def test_a_head_in_float16_goes_both_ways_and_loads_in_every_dtype(tmp_path):
    """Its target, whose weights are in bfloat16, was loaded in float16, which loses the smallest:
    what came out fitted no other dtype."""
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=8)
    model.lm_head.weight.data[:, 0] = 1e-9  # below float16's smallest
    model.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target = Target.load(tmp_path / "target", dtype="bfloat16")
    assert target.fingerprint != Target.load(tmp_path / "target", dtype="float16").fingerprint
    tiny_head(target).to(torch.float16).save(tmp_path / "head")
    out = tmp_path / "out"
    export_head(tmp_path / "head", "vllm", out, licence="MIT")
    config = json.loads((out / "config.json").read_text())
    del config[OURS]  # as others publish theirs
    (out / "config.json").write_text(json.dumps(config))
    import_head(out, "vllm", tmp_path / "back", target.name)
    for dtype in ("bfloat16", "float32", "float64"):
        assert load_head(tmp_path / "back", Target.load(target.name, dtype=dtype)).bound_to


def test_a_push_uploads_the_export(here, tmp_path, hub, capsys):
    options = ["--to", "vllm", "--out", str(tmp_path / "out"), "--target-licence", "MIT"]
    assert export(*options, "--push", "me/mine") == 0
    assert hub.calls == ["whoami", "create me/mine", "upload me/mine"]
    assert hub.files == ["README.md", "config.json", "model.safetensors"]
    assert "https://huggingface.co/me/mine" in capsys.readouterr().out


def test_a_push_without_a_login_does_no_work(here, tmp_path, hub, capsys):
    hub.logged_in = False
    options = ["--to", "vllm", "--out", str(tmp_path / "out"), "--target-licence", "MIT"]
    assert export(*options, "--push", "me/mine") == 2
    assert "hf auth login" in capsys.readouterr().err
    assert hub.calls == ["whoami"]
    assert list(tmp_path.iterdir()) == []


def test_heads_load_save_and_push_as_other_models_do(here, tmp_path, hub):
    head = DraftHead.from_pretrained("head")
    head.save_pretrained(tmp_path / "saved", NOTES, "MIT")
    back = DraftHead.from_pretrained(str(tmp_path / "saved"), Target.load("target", "float32"))
    assert torch.equal(back.fc.weight, head.fc.weight)
    assert back.bound_to
    assert "licence of the target | MIT" in (tmp_path / "saved" / "README.md").read_text()
    with pytest.raises(UserError, match="licence"):
        head.push_to_hub("me/mine")
    assert hub.calls == []
    assert head.push_to_hub("me/mine", NOTES, licence="MIT").endswith("me/mine")
    assert hub.files == ["README.md", "config.json", "model.safetensors", "train.json"]


# ---- measuring a head from elsewhere -------------------------------------------------------------


def test_speedup_measures_a_head_in_any_layout_by_folder_or_hub_id(
    here, tmp_path, monkeypatch, capsys
):
    """The same counts as the head itself; a hub id is fetched without any pickled code."""
    export("--to", "sglang", "--out", str(tmp_path / "theirs"))
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, "pytorch_model.bin" in allow_patterns, "*.py" in allow_patterns))
        return str(tmp_path / "theirs")

    monkeypatch.setattr("adaspec_eagle.storage.snapshot_download", fetch)
    options = ["--target", "target", "--dtype", "float32", "--max-new-tokens", "8", "--chain", "3"]
    options += ["--prompts", "prompts.jsonl"]
    counts = []
    for name in ("head", str(tmp_path / "theirs"), "owner/theirs"):
        capsys.readouterr()
        assert script("speedup", "eval")([*options, "--head", name]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        counts.append((result["arms"]["chain"]["histogram"], result["head"]["config"]))
    assert counts[0] == counts[1] == counts[2]
    assert asked == [("owner/theirs", True, False)]


def test_a_head_that_is_nowhere_is_named(here):
    with pytest.raises(UserError, match="runs/none.*no such folder.*hub id"):
        load_head("runs/none")
    with pytest.raises(UserError, match="a/b/c.*does not exist"):
        load_head("a/b/c")
