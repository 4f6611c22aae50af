"""The training job through its script: outputs, resume, and errors that lose nothing."""

import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adaspec_eagle import generate, load_head, targets, train
from adaspec_eagle.callbacks import newest_checkpoint
from adaspec_eagle.errors import UserError, explain
from adaspec_eagle.features import target_rows
from adaspec_eagle.head import built_in_heads, read_config
from adaspec_eagle.prepare import draft_vocab, split_records
from adaspec_eagle.targets import Target
from adaspec_eagle.train import TrainConfig, Workshop, epochs_made, kind_of, run_training, unrolling
from scripts import train_head
from tests.records import answers_file, record
from tests.tiny import ARCHITECTURES, tiny_head, tiny_model, tiny_target, tiny_target_folder

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny target on disk and a file of answers."""
    made = tmp_path_factory.mktemp("train")
    tiny_target_folder(made / "target")
    answers_file(made / "answers.jsonl")
    return made


def options(folder, **changes) -> TrainConfig:
    settings = {
        "target": str(folder / "target"),
        "data": [str(folder / "answers.jsonl")],
        "draft_vocab": 60,
        "epochs": 1,
        "evaluations": 2,
        "batch_size": 6,
    }
    return TrainConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def run(folder):
    """A finished AdaSPEC run, made through the script."""
    arguments = ["--target", folder / "target", "--data", folder / "answers.jsonl"]
    arguments += ["--draft-vocab", 60, "--epochs", 1, "--evaluations", 2, "--batch-size", 6]
    arguments += ["--out", folder / "run"]
    assert train_head.main([str(a) for a in arguments]) == 0
    return folder / "run"


def test_a_resumed_run_says_how_to_measure_it(run, folder, capsys):
    """The target was left out, as if it were the default one."""
    assert train_head.main(["--out", str(run), "--resume"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"--tree --target {folder / 'target'} --head {run / 'head'}" in last


@pytest.mark.parametrize(("epochs", "evaluations"), [(2, 2), (1.5, 1), (1.3, 3)])
def test_a_stage_is_evaluated_as_often_as_asked_and_at_its_end(
    folder, tmp_path, epochs, evaluations
):
    """An epoch's last step has fewer records than the others."""
    changes = {"epochs": epochs, "evaluations": evaluations, "held_back": 2, "batch_size": 7}
    made = run_training(options(folder, method="distillspec", **changes), tmp_path / "out")
    notes = json.loads((made / "train.json").read_text())
    steps = [entry["step"] for entry in notes["curves"] if "eval_tau_sim" in entry]
    assert len(steps) == len(set(steps)) == evaluations
    assert steps[-1] == notes["steps"]


def test_a_run_leaves_a_reference_and_a_head_with_their_records(run):
    for stage, selection in (("reference", "none"), ("head", "adaspec")):
        notes = json.loads((run / stage / "train.json").read_text())
        assert notes["objective"]["select"] == selection
        assert bool(notes["reference_seconds"]) == (selection == "adaspec")
        assert notes["environment"]["packages"]["torch"]
        assert any("eval_tau_sim" in entry for entry in notes["curves"])
        watched = [entry for entry in notes["curves"] if "loss" in entry]
        assert all(entry["tokens_per_s"] > 0 and entry["memory_gb"] > 0 for entry in watched)
        assert watched
        assert ("kept_top_100" in watched[0]) == (selection == "adaspec")
        assert (run / f"{stage}.png").stat().st_size > 1000
        assert sorted(p.name for p in (run / stage).iterdir()) == [
            "config.json",
            "model.safetensors",
            "train.json",
        ]


def test_every_step_is_reported_on_held_back_answers(run):
    curves = json.loads((run / "head" / "train.json").read_text())["curves"]
    found = next(entry for entry in curves if "eval_tau_sim" in entry)
    for step in range(3):
        for name in ("loss", "overlap", "match"):
            assert f"eval_{name}_{step}" in found


def test_a_trained_head_decodes_losslessly(run, folder):
    target = Target.load(folder / "target", dtype="float64")
    head = load_head(run / "head", target)
    ids = torch.randint(8, 97, (1, 6))
    wanted = target.model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(target, head, ids, max_new_tokens=20).sequences, wanted)


def test_borrowed_rows_are_not_stored(run):
    names = set(load_file(run / "head" / "model.safetensors"))
    assert {"fc.weight", "d2t", "t2d", "norm.weight"} <= names
    assert not {"embed_rows", "output_rows", "output_bias"} & names


def test_float16_is_refused_on_a_cpu_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="float16 trains on CUDA"):
        run_training(TrainConfig(dtype="float16", device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_passes_are_those_of_the_steps_that_were_made():
    assert epochs_made(12, 23, 8) == 4  # three steps an epoch, the last of 7
    assert epochs_made(1, 23, 8) == 8 / 23
    assert epochs_made(5, 23, 8) == 1 + 16 / 23


def test_a_resumed_run_stays_on_the_device_it_was_begun_on(tmp_path, monkeypatch):
    """Several processes choose theirs before anything else: they took GPUs that were there."""
    seen = []

    def meet(device):
        seen.append(device)
        raise UserError("far enough")

    (tmp_path / "run.json").write_text(json.dumps({"config": {"device": "cpu"}}))
    monkeypatch.setattr(train, "join_processes", meet)
    for given in (None, "cuda:1"):
        with pytest.raises(UserError, match="far enough"):
            run_training(TrainConfig(device=given), tmp_path, resume=True)
    assert seen == ["cpu", "cuda:1"]


def test_a_finished_run_is_not_overwritten(run, folder):
    with pytest.raises(UserError, match="--resume"):
        run_training(options(folder), run)


def test_resuming_after_a_kill_gives_the_same_weights(run, folder, tmp_path):
    """The run is cut off behind its first checkpoint, with a torn newer one beside it."""
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "head")
    checkpoints = again / "checkpoints" / "head"
    steps = sorted(int(p.name.rpartition("-")[2]) for p in checkpoints.glob("checkpoint-*"))
    torn = checkpoints / f"checkpoint-{steps[-1]}"
    (torn / "trainer_state.json").unlink()
    assert newest_checkpoint(checkpoints) == checkpoints / f"checkpoint-{steps[0]}"
    run_training(TrainConfig(), again, resume=True)
    first, second = (load_file(p / "head" / "model.safetensors") for p in (run, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_seed_gives_the_same_head(folder, run, tmp_path):
    run_training(options(folder), tmp_path / "twin")
    first, second = (load_file(p / "head" / "model.safetensors") for p in (run, tmp_path / "twin"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mode", ["recompute", "disk"])
def test_where_features_are_kept_changes_nothing(folder, tmp_path, mode):
    heads = []
    for kept in ("memory", mode):
        config = options(folder, method="distillspec", features=kept)
        heads.append(load_file(run_training(config, tmp_path / kept) / "model.safetensors"))
    for name in heads[0]:
        torch.testing.assert_close(heads[0][name], heads[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "eagle1"},
        {"head": "medusa"},
        {"train_output": True},
        {"mask_oov": True},
        {"method": "mixed"},
        {"gradient_checkpointing": True, "accumulate": 2, "attn": "eager"},
    ],
)
def test_variants_train(folder, tmp_path, changes):
    made = run_training(options(folder, **{"method": "distillspec"} | changes), tmp_path / "out")
    head = load_head(made)
    assert head.config.head == changes.get("head", "eagle3")
    assert ("lm_head.weight" in head.state_dict()) == changes.get("train_output", False)


@pytest.mark.parametrize(
    ("schedule", "halfway"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)]
)
def test_schedules_of_the_learning_rate(folder, tmp_path, schedule, halfway):
    chosen = options(folder, method="distillspec", lr=0.01, batch_size=1, schedule=schedule)
    run_training(chosen, tmp_path / "out")
    state = tmp_path / "out/checkpoints/head/checkpoint-36/trainer_state.json"
    log = json.loads(state.read_text())["log_history"]
    half, end = [line["learning_rate"] for line in log if "loss" in line]
    assert half == pytest.approx(0.01 * halfway, rel=0.15)
    assert end == pytest.approx(0.01 if schedule == "constant" else 0.0, abs=4e-4)


def test_a_given_reference_is_used_and_an_initial_head_goes_on(folder, run, tmp_path):
    config = options(folder, reference=str(run / "reference"), init=str(run / "head"))
    made = run_training(config, tmp_path / "out")
    assert not (tmp_path / "out" / "reference").exists()
    curves = json.loads((made / "train.json").read_text())["curves"]
    old = json.loads((run / "head" / "train.json").read_text())["curves"]
    assert next(e["loss"] for e in curves if "loss" in e) < next(
        e["loss"] for e in old if "loss" in e
    )


def test_a_given_reference_brings_its_draft_vocabulary_along(folder, run, tmp_path):
    """On other data the frequent tokens differ; dL compares like with like all the same."""
    other = answers_file(tmp_path / "other.jsonl", records=12)
    config = options(folder, data=[other], draft_vocab=30, reference=str(run / "reference"))
    head = load_head(run_training(config, tmp_path / "out"))
    assert torch.equal(head.draft_ids, load_head(run / "reference").draft_ids)
    wrong = options(folder, head="eagle1", reference=str(run / "reference"))
    with pytest.raises(UserError, match="hidden states"):
        run_training(wrong, tmp_path / "wrong")


def test_a_prompt_that_is_held_back_is_not_trained_on():
    records = [record(4, 5, seed % 15) for seed in range(30)]  # every one of them twice
    train, held = split_records(records, 3)
    prompts = {tuple(one.prompt_ids) for one in held}
    assert len(held) == 3
    assert not prompts & {tuple(one.prompt_ids) for one in train}
    assert len(train) == 30 - 2 * len(prompts)
    with pytest.raises(UserError, match="training needs others"):
        split_records([record(4, 5)] * 5, 1)


def test_a_head_that_may_have_seen_what_is_held_back_is_named(folder, run, tmp_path, capsys):
    settings = {"method": "distillspec", "epochs": 0.1, "init": str(run / "head")}
    run_training(options(folder, **settings), tmp_path / "same")
    assert "may have seen" not in capsys.readouterr().err
    other = answers_file(tmp_path / "other.jsonl", records=12)
    run_training(options(folder, **settings, data=[other]), tmp_path / "other")
    assert f"{run / 'head'} was trained on other files" in capsys.readouterr().err


def test_an_initial_head_takes_a_vocabulary_counted_anew(folder, run, tmp_path):
    other = answers_file(tmp_path / "other.jsonl", records=12)
    settings = {"data": [other], "draft_vocab": 30, "method": "distillspec", "epochs": 0.1}
    started = options(
        folder, **settings, init=str(run / "head"), fresh_vocab=True, lr=1e-9, optimizer="adamw"
    )
    head = load_head(run_training(started, tmp_path / "started"))
    fresh = load_head(run_training(options(folder, **settings), tmp_path / "fresh"))
    assert torch.equal(head.draft_ids, fresh.draft_ids)
    before, after = load_head(run / "head").state_dict(), head.state_dict()
    for name in before.keys() - {"d2t", "t2d"}:
        torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="--fresh-vocab is for --init"):
        options(folder, fresh_vocab=True)


def test_features_that_one_run_asked_for_are_not_the_next_runs(folder, run, tmp_path):
    workshop = Workshop(Target.load(str(folder / "target")))
    for mode in ("recompute", "memory"):
        config = options(folder, reference=str(run / "reference"), epochs=1.0, features=mode)
        notes = json.loads(
            (run_training(config, tmp_path / mode, workshop=workshop) / "train.json").read_text()
        )
        assert notes["data"]["features"] == mode
        assert (notes["reference_seconds"] is None) == (mode == "recompute")


def test_a_vocabulary_that_a_head_brought_along_is_not_the_next_runs(folder, run, tmp_path):
    """Several runs of one process share their data: a plain run after one with --reference."""
    other = answers_file(tmp_path / "other.jsonl", records=12)
    workshop = Workshop(Target.load(str(folder / "target")))
    settings = {"data": [other], "method": "distillspec", "epochs": 0.5}
    given = options(folder, **settings, init=str(run / "reference"))
    run_training(given, tmp_path / "given", workshop=workshop)
    plain = options(folder, **settings)
    shared = load_head(run_training(plain, tmp_path / "shared", workshop=workshop))
    alone = load_head(run_training(options(folder, **settings), tmp_path / "alone"))
    assert torch.equal(shared.draft_ids, alone.draft_ids)
    assert not torch.equal(shared.draft_ids, load_head(run / "reference").draft_ids)


def test_resuming_on_changed_data_is_refused(folder, run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "head")
    saved = json.loads((again / "run.json").read_text())
    saved["config"]["data"] = [answers_file(tmp_path / "fewer.jsonl", records=20)]
    (again / "run.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="have changed"):
        run_training(TrainConfig(), again, resume=True)


def test_the_draft_vocabulary_holds_the_most_frequent_answer_tokens():
    target = tiny_target()
    records = [record(3, 40, seed) for seed in range(5)]
    ids, coverage = draft_vocab(records, target, 30)
    answers = torch.tensor([token for r in records for token in r.answer_ids])
    counts = answers.bincount(minlength=target.vocab_size)
    assert len(ids) == 30
    assert set(target.eos_token_ids) <= set(ids.tolist())
    left_out = torch.ones(target.vocab_size, dtype=torch.bool)
    left_out[ids] = False
    others = [i for i in ids.tolist() if i not in target.eos_token_ids]
    assert counts[left_out].max() <= counts[others].min()
    assert coverage == pytest.approx(float(counts[ids].sum()) / len(answers))


def test_the_kind_of_a_setting_is_found_in_every_python():
    """From 3.14 on `int | None` has a __name__, which says nothing of int."""

    class Union:
        __name__ = "Union"

        def __str__(self) -> str:
            return "float | None"

    assert kind_of(SimpleNamespace(type=Union())) is float
    known = {option.name: kind_of(option) for option in fields(TrainConfig)}
    assert (known["lr"], known["unroll"], known["epochs"], known["loss"]) == (
        float,
        int,
        float,
        str,
    )


def test_the_script_runs_as_a_program(tmp_path):
    command = [sys.executable, str(REPOSITORY / "scripts" / "train_head.py")]
    done = subprocess.run([*command, "--keep", "1.5"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: keep 1.5 is outside (0, 1]")


def test_defaults_of_the_script_are_those_of_the_config():
    args = vars(train_head.parser().parse_args([]))
    del args["out"], args["resume"]
    assert TrainConfig(**args) == TrainConfig()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "magic"}, "adaspec, distillspec"),
        ({"shallow": 1.5}, "--shallow 1.5"),
        ({"loss": "l7"}, "fkl"),
        ({"keep": "0"}, "outside"),
        ({"epochs": 0}, "above 0"),
        ({"lr": 0.0}, "above 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"epochs": float("inf")}, "--epochs inf"),
        ({"decay": -0.5}, "--decay -0.5"),
        ({"init": "runs/x/head", "train_output": True}, "--init goes on"),
        ({"reference": "runs/x", "method": "distillspec"}, "none reads no reference head"),
        ({"reference_epochs": 0}, "above 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"unroll": 0}, "--unroll 0"),
        ({"draft_vocab": 0}, "--draft-vocab 0"),
        ({"schedule": "wsd"}, "cosine, linear, constant"),
        ({"report_to": ["tensorbord"]}, "--report-to tensorbord"),
    ],
)
def test_bad_options_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, (3, 0.0)),
        ({"method": "mixed"}, (3, 0.75)),
        ({"method": "mixed", "unroll": 5, "shallow": 0.5}, (5, 0.5)),
        ({"method": "mixed", "select": "adaspec"}, (3, 0.75)),
        ({"head": "eagle1"}, (1, 0.0)),
        ({"head": "eagle1", "unroll": 2, "shallow": 0.5}, (2, 0.5)),
        ({"head": "medusa", "unroll": 2}, (2, 0.0)),
        ({"head": "eagle1", "method": "mixed"}, None),
        ({"head": "medusa", "method": "mixed"}, None),
        ({"head": "lm:layers=2", "method": "mixed"}, None),
        ({"unroll": 1, "shallow": 0.5}, None),
    ],
)
def test_a_method_says_how_heads_that_feed_on_themselves_are_unrolled(changes, wanted):
    config = TrainConfig(**changes)
    if wanted is None:
        with pytest.raises(UserError, match="take --method distillspec"):
            unrolling(config)
    else:
        assert unrolling(config) == wanted


def test_self_written_answers_behind_long_prompts_are_left_out(tmp_path, monkeypatch, capsys):
    def write(target, out, *_):
        items = [{"prompt_ids": [1] * length, "answer_ids": [2] * 4} for length in (5, 9, 5)]
        out.write_text("".join(json.dumps(item) + "\n" for item in items))

    monkeypatch.setattr(train, "default_cache_dir", lambda: tmp_path)
    monkeypatch.setattr(train, "answer_self", write)
    target = SimpleNamespace(name="t", fingerprint="f")
    made = train._self_written(TrainConfig(tokens=8, max_length=9), target, tmp_path / "out")
    assert [len(json.loads(line)["prompt_ids"]) for line in made.read_text().splitlines()] == [5, 5]
    assert "left out 1 answers" in capsys.readouterr().err
    with pytest.raises(UserError, match="--max-length 5 holds no"):
        train._self_written(TrainConfig(tokens=8, max_length=5), target, tmp_path / "out")


def test_unknown_targets_and_heads_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="aliases"):
        Target.load("no-such-model")
    with pytest.raises(UserError, match="no weights"):
        Target.load(tmp_path)
    with pytest.raises(UserError, match="eagle1, eagle3, lm, medusa"):
        run_training(options(folder, head="eagle9"), tmp_path / "out")


def test_an_alias_that_cannot_be_had_names_both_ways_out():
    with pytest.raises(UserError) as caught:
        Target.load("phi-2")
    for words in ("phi-2", "microsoft/phi-2", "local folder", "--target smollm2-135m"):
        assert words in str(caught.value)


def test_targets_with_windows_or_a_second_kind_of_layer_are_refused():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = MistralForCausalLM(
        MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=8)
    )
    with pytest.raises(UserError, match="sliding-window"):
        Target.wrap(model, name="windowed")


def test_rotary_factors_that_change_with_the_length_are_refused():
    """Of a whole forward they follow its last position, which in a tree is beyond the root's."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    with pytest.raises(UserError, match="longrope"):
        tiny_target(rope_parameters={**rope, **factors}, max_position_embeddings=256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_target_that_looks_past_its_mask_is_refused(arch, dtype, monkeypatch):
    """In half precision, too, where rounding alone moves logits by a part of that."""
    tiny_target(arch, dtype=dtype)
    made = targets.tree_mask

    def everything(lengths, start, seen, dtype):
        return made(lengths, start, torch.ones_like(seen).tril(), dtype)

    monkeypatch.setattr(targets, "tree_mask", everything)
    with pytest.raises(UserError, match="4-D attention mask"):
        tiny_target(arch, dtype=dtype)


def test_a_target_of_more_than_a_linear_output_layer_is_refused():
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = GraniteForCausalLM(GraniteConfig(**sizes, **heads, logits_scaling=3.0))
    with pytest.raises(UserError, match="scaling or soft-capping"):
        Target.wrap(model)


def test_a_target_with_embeddings_of_another_size_is_refused():
    """OPT-350m was taken, and failed when a head was made."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    more = {"num_attention_heads": 2, "word_embed_proj_dim": 8, "do_layer_norm_before": False}
    with pytest.raises(UserError, match="input embeddings of 8, not of the hidden size 16"):
        Target.wrap(OPTForCausalLM(OPTConfig(**sizes, **more)))


def test_a_target_that_keeps_no_cache_is_refused():
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="ignores past_key_values.*trees need"):
        Target.wrap(model)


def test_a_target_that_gives_no_numbers_is_refused():
    model = tiny_model()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        Target.wrap(model)


def damaged(run, tmp_path, change) -> Path:
    copy = tmp_path / "head"
    shutil.copytree(run / "head", copy)
    change(copy)
    return copy


def test_heads_that_do_not_fit_are_refused_by_name(run, tmp_path):
    with pytest.raises(UserError, match="config.json"):
        load_head(tmp_path)
    other = tiny_target(num_hidden_layers=4, dtype=torch.float32)
    with pytest.raises(UserError, match="allow"):
        load_head(run / "head", other)
    head = load_head(run / "head", other, allow_other_target=True)
    assert head.bound_to
    with pytest.raises(UserError, match="--allow-other-target"):
        head.bind(other)
    with pytest.raises(UserError, match="vocabulary and hidden size"):
        load_head(run / "head", tiny_target(hidden_size=16, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["truncated", "foreign", "missing", "outside", "config"])
def test_damaged_heads_are_refused_with_the_file_named(run, tmp_path, kind):
    def change(copy: Path) -> None:
        weights = copy / "model.safetensors"
        state = load_file(weights)
        if kind == "truncated":
            weights.write_bytes(weights.read_bytes()[:1000])
        elif kind == "foreign":
            save_file({"x": torch.zeros(2)}, weights)
        elif kind == "missing":
            weights.unlink()
        elif kind == "outside":
            save_file(state | {"d2t": state["d2t"] + 10**6}, weights)
        else:
            (copy / "config.json").write_text("{}")

    with pytest.raises(UserError, match="config.json" if kind == "config" else "model.safetensors"):
        load_head(damaged(run, tmp_path, change))


def test_a_failed_save_leaves_the_old_head(tmp_path, monkeypatch):
    target = tiny_target(dtype=torch.float32)
    head = tiny_head(target)
    head.save(tmp_path / "head")
    before = load_file(tmp_path / "head" / "model.safetensors")

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr("adaspec_eagle.storage.save_file", full)
    with torch.no_grad():
        head.fc.weight.zero_()
    with pytest.raises(SafetensorError, match="No space left") as caught:
        head.save(tmp_path / "head")
    assert "disk is full" in explain(caught.value)
    after = load_file(tmp_path / "head" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [p.name for p in tmp_path.iterdir()] == ["head"]


def test_out_of_memory_is_explained():
    assert "--batch-size" in explain(MemoryError())
    assert "--batch-size" in explain(RuntimeError("CUDA out of memory. Tried to allocate"))
    assert explain(RuntimeError("shape mismatch")) is None


def test_prompts_that_cannot_be_decoded_are_named():
    target = tiny_target()
    with pytest.raises(UserError, match="empty"):
        generate(target, None, torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(UserError, match="context of 512"):
        generate(target, None, torch.ones(1, 500).long(), max_new_tokens=64)


def test_targets_in_pieces_or_in_few_bits_are_refused_by_name():
    """What from_pretrained leaves on a model for device_map over two devices, and for 4-bit."""
    model = tiny_model()
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1}
    with pytest.raises(UserError, match="weights on several devices.*on one device"):
        Target.wrap(model)
    model = tiny_model()
    model.is_quantized = True
    with pytest.raises(UserError, match="quantised weights.*unquantised"):
        Target.wrap(model)


def test_flash_attention_is_refused_where_it_cannot_run(folder, tmp_path, monkeypatch):
    config = options(folder, attn="flash_attention_2")
    config.device = "cpu"
    for there, words in ((None, "pip install flash-attn"), (1, "needs a CUDA device, not cpu")):
        monkeypatch.setattr(targets.importlib.util, "find_spec", {"flash_attn": there}.get)
        with pytest.raises(UserError, match=words):
            run_training(config, tmp_path / "out")
    with pytest.raises(UserError, match="unknown --attn 'fast'; .*flash_attention_2"):
        options(folder, attn="fast")


def test_another_attention_of_the_target_changes_nothing(folder):
    ids = torch.arange(8, 20)[None]
    rows = [
        target_rows(Target.load(folder / "target", "float64", attn_implementation=name), ids, [2])
        for name in ("sdpa", "eager")
    ]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-6)  # eager softmax is in float32


@pytest.mark.parametrize("name", built_in_heads())
def test_saved_heads_load_equal(tmp_path, name):
    target = tiny_target(dtype=torch.float32)
    head = tiny_head(target, name, draft_vocab=None if name == "eagle1" else 40)
    head.save(tmp_path / "head")
    other = load_head(tmp_path / "head", target)
    assert read_config(tmp_path / "head") == head.config
    for key, value in head.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


def test_scripts_do_no_work_when_imported():
    for path in [*REPOSITORY.glob("scripts/*.py"), *REPOSITORY.glob("eval/*.py")]:
        assert "main" in runpy.run_path(str(path), run_name="imported")


@pytest.mark.parametrize("native", [torch.bfloat16, torch.float32])
def test_a_type_that_the_device_emulates_is_noted(monkeypatch, native):
    monkeypatch.setattr(targets, "default_dtype", lambda device: native)
    noted = "no bfloat16 units" in targets.describe(tiny_target(dtype=torch.bfloat16))
    assert noted == (native == torch.float32)
    assert "no bfloat16" not in targets.describe(tiny_target(dtype=torch.float32))
