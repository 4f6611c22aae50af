"""Long tier: the package `speculators`, which we did not write, reads and trains what we export."""

import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaspec_eagle import Target, generate, load_head
from adaspec_eagle.bench import find_head
from adaspec_eagle.default_target import default_target_folder
from adaspec_eagle.export import export_head
from adaspec_eagle.unroll import unroll
from tests.tiny import tiny_head, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.long
READER = Path(__file__).with_name("speculators_reader.py")
STEPS = 3
PACKAGES = [
    "torch==2.13.0",
    "transformers>=5.15,<5.16",
    "speculators==0.9.0",
    "hs-connectors==0.9.0",
]


@pytest.fixture(scope="module")
def python(request) -> Path:
    """An interpreter with `speculators`, in pytest's cache; skipped where pip cannot install it."""
    folder = Path(request.config.cache.mkdir("speculators-0.9.0"))
    found, done = folder / "venv" / "bin" / "python", folder / "installed"
    if not done.exists():
        shutil.rmtree(folder / "venv", ignore_errors=True)
        venv.create(folder / "venv", with_pip=True)
        pip = [str(found), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        tried = subprocess.run([*pip, "install", *PACKAGES], capture_output=True, text=True)
        if tried.returncode:
            pytest.skip(f"pip cannot install {' '.join(PACKAGES)}: {tried.stderr.strip()[-300:]}")
        # Not needed here, and the index's builds do not fit a CPU build of torch.
        subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio"], check=True)
        done.touch()
    return found


def read_and_train(python: Path, head: Path, inputs: dict[str, torch.Tensor], out: Path) -> dict:
    """What the reader gives: logits `[STEPS, T, Vd]` before and after ten steps, and the losses."""
    out.mkdir()
    save_file({name: t.contiguous() for name, t in inputs.items()}, out / "inputs.safetensors")
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(python), str(READER), str(head), str(out / "inputs.safetensors"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(out / "logits.safetensors")


@torch.no_grad()
def target_inputs(target, head, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features `[1, T, 3 H]` of tokens `[1, T]`; the same, shifted as speculators wants them."""
    last: list[torch.Tensor] = []
    hook = target.model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    positions = torch.arange(ids.shape[1])[None]
    features = target.forward(ids, positions, feature_layers=head.config.feature_layers).features
    hook.remove()
    return features, {
        "input_ids": ids[:, 1:],
        "hidden_states": features[:, :-1],
        "verifier_last_hidden_states": last[0][:, 1:],
        "document_ids": torch.zeros_like(ids[:, 1:]),
    }


@torch.no_grad()
def assert_equal_logits(head, features, ids, theirs: torch.Tensor) -> None:
    """Ours and theirs within 1e-4 wherever a step's token exists."""
    for step, hidden in enumerate(unroll(head, features, ids, STEPS)):
        known = ids.shape[1] - 1 - step
        torch.testing.assert_close(
            head.logits(hidden)[0, :known], theirs[step, :known], atol=1e-4, rtol=0
        )


def check_elsewhere(python, target, head, folder, ids, tmp_path) -> None:
    """Equal logits, ten steps of training that help, and a way back."""
    features, inputs = target_inputs(target, head, ids)
    seen = read_and_train(python, folder, inputs, tmp_path / "theirs")
    assert seen["before"].shape == (STEPS, ids.shape[1] - 1, head.config.draft_vocab_size)
    assert_equal_logits(head, features, ids, seen["before"])
    assert seen["losses"][-1] < 0.9 * seen["losses"][0]
    trained = tmp_path / "theirs" / "trained"
    back = load_head(trained, target)
    assert vars(back.config) | {"target": head.config.target} == vars(head.config)
    assert torch.equal(back.fc.weight, load_file(trained / "model.safetensors")["fc.weight"])
    assert not torch.equal(back.fc.weight, head.fc.weight)
    assert_equal_logits(back, features, ids, seen["after"])
    out = generate(target, back, ids[:, :8], tree="dynamic", max_new_tokens=16)
    wanted = target.model.generate(ids[:, :8], max_new_tokens=16, do_sample=False)
    assert torch.equal(out.sequences, wanted)


@pytest.mark.parametrize(
    ("tied", "draft_vocab", "more"),
    [
        (False, 40, {}),
        (True, None, {}),
        (True, 40, {"norm_before_residual": True}),
        (False, None, {"attention_bias": True}),
    ],
    ids=["untied", "tied-full", "normed-residual", "attention-bias"],
)
def test_speculators_computes_trains_and_returns_our_head(
    python, tmp_path, tied, draft_vocab, more
):
    model = tiny_model("llama", torch.float32, num_hidden_layers=8, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target = Target.load(tmp_path / "target", dtype="float32")
    head = tiny_head(target, "eagle3", draft_vocab, **more)
    head.save(tmp_path / "head")
    folder = export_head(tmp_path / "head", "speculators", tmp_path / "out")
    ids = torch.randint(8, 97, (1, 48), generator=torch.Generator().manual_seed(7))
    check_elsewhere(python, target, head, folder, ids, tmp_path)


def test_speculators_computes_trains_and_returns_the_shipped_head(python, tmp_path, real_target):
    """The real head, on a text; its target by the folder that the weights are in."""
    shipped = find_head(real_target, runs=Path("/nonexistent")).folder
    weights = str(default_target_folder())
    folder = export_head(shipped, "speculators", tmp_path / "out", target=weights)
    text = "The sum of two even numbers is even. Let us see why: an even number is twice another."
    ids = real_target.tokenizer(text, return_tensors="pt").input_ids
    head = load_head(shipped, real_target)
    check_elsewhere(python, real_target, head, folder, ids, tmp_path)
