"""The real target: a minute of training helps, and float32 output is the target's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adaspec_eagle import generate, load_head
from adaspec_eagle.bench import find_head
from adaspec_eagle.data import load_training, read_prompts
from adaspec_eagle.distill import teacher_forced
from adaspec_eagle.head import HeadConfig, new_head

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shipped(real_target):
    """The head that ships with the package, in float32."""
    return load_head(find_head(real_target, runs=Path("/nonexistent")).folder, real_target)


@pytest.fixture(scope="module")
def prompt_ids(real_target):
    """Twenty of the project's own prompts, as ids."""
    prompts = read_prompts(REPOSITORY / "eval" / "prompts.jsonl", 20)
    return [torch.tensor([real_target.chat_ids(p["messages"][:1])]) for p in prompts]


def margin_at(target, ids: torch.Tensor, position: int) -> float:
    """Top-two margin of the target's logits behind ids[:position]."""
    with torch.no_grad():
        best = target.model(input_ids=ids[None, :position]).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def test_float32_output_equals_generate_on_twenty_prompts(real_target, shipped, prompt_ids):
    """Equality, but where the target's own top two are within 1e-4 of each other."""
    accepted = 0
    for n, ids in enumerate(prompt_ids):
        wanted = real_target.model.generate(ids, max_new_tokens=24, do_sample=False)[0]
        tree = ["dynamic", "static", "chain:4"][n % 3]
        out = generate(real_target, shipped, ids, tree=tree, max_new_tokens=24)
        accepted += out.stats.tokens - out.stats.rounds
        found = out.sequences[0]
        if not torch.equal(found, wanted):
            size = min(len(found), len(wanted))
            apart = (found[:size] != wanted[:size]).nonzero()
            first = int(apart[0]) if len(apart) else size  # one of them ended
            assert margin_at(real_target, wanted, first) < 1e-4, f"prompt {n}, position {first}"
    assert accepted > 100, "a head that accepts nothing proves nothing"


def test_a_batch_of_ragged_rows_equals_its_rows_alone(real_target, shipped, prompt_ids):
    rows = prompt_ids[:4]
    width = max(ids.shape[1] for ids in rows)
    ids = torch.stack([torch.nn.functional.pad(r[0], (width - r.shape[1], 0)) for r in rows])
    mask = torch.stack([torch.arange(width) >= width - r.shape[1] for r in rows]).long()
    together = generate(real_target, shipped, ids, mask, max_new_tokens=24).answers
    alone = [generate(real_target, shipped, r, max_new_tokens=24).answers[0] for r in rows]
    assert together == alone


@pytest.fixture(scope="module")
def minute(tmp_path_factory):
    """A head after a short AdaSPEC training on answers that the target writes on the spot."""
    folder = tmp_path_factory.mktemp("minute")
    data, run = folder / "self.jsonl", folder / "run"
    make = ["make_data.py", "--prompts", "self", "--tokens", "1000", "--max-new-tokens", "48"]
    make += ["--batch-size", "12"]
    train = ["train_head.py", "--data", str(data), "--epochs", "3", "--batch-size", "4"]
    train += ["--evaluations", "1", "--held-back", "4"]
    for (script, *options), out in ((make, data), (train, run)):
        command = [sys.executable, str(REPOSITORY / "scripts" / script), *options]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        subprocess.run([*command, "--out", str(out)], check=True, env=environment)
    return run / "head", data


def test_a_minute_of_training_beats_an_untrained_head(real_target, minute):
    folder, data = minute
    target = real_target
    trained = load_head(folder, target)
    sizes = HeadConfig.for_target("eagle3", target, trained.config.draft_vocab_size)
    fresh = new_head(sizes, seed=1)
    fresh.set_draft_vocab(trained.draft_ids)
    fresh.eval().bind(target)
    held = load_training([data], target, 256)[-12:]
    figures = [teacher_forced(target, head, held, steps=3) for head in (fresh, trained)]
    assert figures[1]["tau_sim"] > figures[0]["tau_sim"] + 0.05
    assert figures[1]["loss"][0] < 0.8 * figures[0]["loss"][0]
    notes = json.loads((folder / "train.json").read_text())
    assert notes["best_tau_sim"] > 1.02


def test_speedup_prints_its_json_last(real_target, tmp_path):
    command = [sys.executable, str(REPOSITORY / "eval" / "speedup.py"), "--tree", "--limit", "2"]
    command += ["--max-new-tokens", "24", "--out", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    last = json.loads(done.stdout.splitlines()[-1])
    assert set(last["arms"]) == {"generate", "loop", "chain", "tree"}
    for key in ("chain", "tree"):
        arm = last["arms"][key]
        assert arm["tau"] > 1.2
        low, high = arm["speedup_vs_generate_ci95"]
        assert low <= arm["speedup_vs_generate"] <= high
    assert (tmp_path / "speedup.png").stat().st_size > 10_000


def test_acceptance_on_real_prompts(shared_data, real_target, tmp_path):
    """The shipped head on EAGLE's GSM8K questions, where those are at hand."""
    command = [sys.executable, str(REPOSITORY / "eval" / "acceptance.py"), "--limit", "2"]
    command += ["--prompts", str(shared_data / "dev" / "eagle_gsm8k.test.jsonl")]
    command += ["--max-new-tokens", "32"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "overlap" in done.stdout.splitlines()[-1]


def test_stop_strings_end_an_answer_where_generate_ends_it(real_target):
    ids = torch.tensor([real_target.chat_ids([{"role": "user", "content": "Name three fruits."}])])
    free = generate(real_target, None, ids, max_new_tokens=24).answers[0]
    word = real_target.tokenizer.decode(free[9:11]).strip()
    found = generate(real_target, None, ids, max_new_tokens=24, stop_strings=[word])
    wanted = real_target.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
        stop_strings=[word], tokenizer=real_target.tokenizer,
    )  # fmt: skip
    assert torch.equal(found.sequences, wanted)
    assert 0 < len(found.answers[0]) <= 11


def test_the_target_is_its_own_draft_lm(real_target):
    """All its layers as `lm`: what it drafts is accepted, near ties apart."""
    ids = torch.tensor([real_target.chat_ids([{"role": "user", "content": "Name three fruits."}])])
    size = real_target.vocab_size
    head = new_head(HeadConfig.for_target("lm:layers=30", real_target, size))
    head.start_from(real_target)
    head.eval().bind(real_target)
    found = generate(real_target, head, ids, tree="chain:4", max_new_tokens=32, ignore_eos=True)
    assert found.stats.greedy_alpha > 0.95
