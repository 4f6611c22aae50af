"""The feature store: the same training as from memory, whatever happens while it is written."""

import json
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaspec_eagle import feature_store
from adaspec_eagle.data import read_answers
from adaspec_eagle.errors import UserError
from adaspec_eagle.feature_store import (
    FeatureStore,
    open_for_writing,
    pack,
    record_key,
    token_bytes,
    unpack,
    write_features,
)
from adaspec_eagle.features import target_rows
from adaspec_eagle.prepare import write_store
from adaspec_eagle.train import TrainConfig, run_training
from scripts import make_data
from tests.records import answers_file, record
from tests.tiny import tiny_target, tiny_target_folder

RECORDS = [record(2 + n % 3, 5 + n, seed=n) for n in range(12)]
LAYERS = [2, 3]


def written(folder, target, records=RECORDS, dtype="float64", **sizes) -> FeatureStore:
    store = open_for_writing(Path(folder), target, LAYERS, dtype)
    list(write_features(store, target, records, batch_tokens=40, **sizes))
    return store


def read_all(folder, target) -> list[torch.Tensor]:
    rows = FeatureStore(folder).rows_of(RECORDS, target)
    return [rows[n].result() for n in range(len(RECORDS))]


def shards(folder) -> list[Path]:
    return sorted(Path(folder).glob("shard-*.safetensors"))


def test_a_store_holds_what_the_target_gives_in_several_shards(tmp_path):
    target = tiny_target()
    written(tmp_path, target, shard_bytes=10_000)
    rows = FeatureStore(tmp_path).rows_of(RECORDS, target)
    assert len(shards(tmp_path)) > 2
    for index, made in enumerate(RECORDS):
        assert isinstance(rows[index], Future)
        wanted = target_rows(target, torch.tensor([made.ids]), LAYERS)[0]
        torch.testing.assert_close(rows[index].result(), wanted)
    first, rest = rows.split(5)
    assert torch.equal(rest[0].result(), rows[5].result())
    assert len(first.keys) == 5


def test_the_size_told_beforehand_is_the_size_written(tmp_path):
    target = tiny_target(dtype=torch.bfloat16)
    tokens = sum(len(made.ids) for made in RECORDS)
    for dtype in ("bfloat16", "int8"):
        written(tmp_path / dtype, target, dtype=dtype)
        (file,) = shards(tmp_path / dtype)
        numbers = sum(t.nbytes for t in load_file(file).values())
        assert numbers == tokens * token_bytes(target, LAYERS, dtype)


def test_int8_is_off_by_at_most_half_a_step_of_its_group():
    rows = torch.randn(7, 256) * torch.logspace(-4, 4, 7)[:, None]
    rows[3, 70] = 1e6  # spoils its own group only
    rows[5] = 0
    again = unpack(pack(rows, "int8"), torch.float32)
    step = rows.unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True) / 127 * (1 + 2**-7)
    assert ((again - rows).unflatten(1, (-1, 64)).abs() <= 0.51 * step + 1e-30).all()


def test_training_from_a_bfloat16_store_equals_training_from_memory(tmp_path):
    """To the bit; the store is written by make_data.py."""
    settings = {
        "target": tiny_target_folder(tmp_path / "target"),
        "data": [answers_file(tmp_path / "answers.jsonl")],
        "dtype": "bfloat16",
        "draft_vocab": 60,
        "epochs": 1.0,
        "batch_size": 6,
        "held_back": 4,
    }
    store = str(tmp_path / "store")
    command = ["--target", settings["target"], "--dtype", "bfloat16", "--data", *settings["data"]]
    assert make_data.main([*command, "--write-features", store]) == 0
    heads = []
    for features in ("memory", store, "disk"):
        out = tmp_path / f"from-{len(heads)}"
        made = run_training(TrainConfig(**settings, features=features), out)
        heads.append(load_file(made / "model.safetensors"))
    for other in heads[1:]:
        assert all(torch.equal(heads[0][name], other[name]) for name in heads[0])


def test_writing_goes_on_after_a_kill_with_the_same_rows(tmp_path, monkeypatch):
    target = tiny_target()
    whole = written(tmp_path / "whole", target, shard_bytes=10_000)
    calls, append = [], FeatureStore.append

    def killed(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, *args)

    monkeypatch.setattr(FeatureStore, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "cut", target, shard_bytes=10_000)
    monkeypatch.setattr(FeatureStore, "append", append)
    with (tmp_path / "cut" / "index.jsonl").open("a") as file:
        file.write('{"file": "shard-0')  # a line that was being written
    assert len(shards(tmp_path / "cut")) == 2
    kept = shards(tmp_path / "cut")[0].stat().st_mtime_ns
    again = written(tmp_path / "cut", target, shard_bytes=10_000)
    assert shards(tmp_path / "cut")[0].stat().st_mtime_ns == kept
    for made in RECORDS:
        key = record_key(made.ids)
        assert torch.equal(again.read(key, torch.float64), whole.read(key, torch.float64))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_shard_is_seen_named_and_written_again(tmp_path, damage, capsys):
    target = tiny_target(dtype=torch.bfloat16)
    store = written(tmp_path, target, dtype="bfloat16", shard_bytes=2_000)
    victim = store.shards[1]
    path = tmp_path / victim.file
    if damage == "flipped":
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    words = f"{victim.file} is damaged .*{victim.names[0]}.*make_data.py --write-features"
    if damage != "flipped":
        with pytest.raises(UserError, match=words):
            FeatureStore(tmp_path).check_sizes()
    with pytest.raises(UserError, match=words):
        read_all(tmp_path, target)
    untouched = shards(tmp_path)[0].stat().st_mtime_ns
    mended = write_store(target, RECORDS, LAYERS, tmp_path, "bfloat16")
    assert victim.file in capsys.readouterr().err
    assert shards(tmp_path)[0].stat().st_mtime_ns == untouched
    assert len(mended.places) == len(RECORDS)
    read_all(tmp_path, target)


def test_a_disk_without_room_is_refused_before_anything_runs(tmp_path, monkeypatch):
    target = tiny_target()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda folder: usage)
    target.forward = None
    with pytest.raises(UserError, match="GiB, the disk of .* has 0.00; .*recompute"):
        write_store(target, RECORDS, LAYERS, tmp_path / "store", "float64")
    assert not shards(tmp_path / "store")


def test_a_store_is_bound_to_target_layers_form_and_records(tmp_path):
    target = tiny_target()
    store = written(tmp_path, target, RECORDS[:6])
    with pytest.raises(UserError, match=r"no features of 6 of 12 records \(r6, r7.*--data"):
        store.rows_of(RECORDS, target)
    with pytest.raises(UserError, match="hidden states"):
        store.check_form(target, [1, 3])
    with pytest.raises(UserError, match="weights"):
        store.check_form(tiny_target(hidden_size=16), LAYERS)
    with pytest.raises(UserError, match="float64, not int8"):
        open_for_writing(tmp_path, target, LAYERS, "int8")
    with pytest.raises(UserError, match="neither memory, disk"):
        TrainConfig(features=str(tmp_path / "nothing"))
    added = written(tmp_path, target, RECORDS)
    assert len(added.rows_of(RECORDS, target).keys) == 12


def test_a_resumed_run_reads_the_features_that_are_there(tmp_path, monkeypatch):
    config = TrainConfig(
        target=tiny_target_folder(tmp_path / "target"),
        data=[answers_file(tmp_path / "answers.jsonl")],
        method="distillspec",
        draft_vocab=60,
        epochs=1,
        evaluations=1,
        features="disk",
    )
    run_training(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "head")
    monkeypatch.setattr(feature_store, "target_pass", None)  # must not run again
    run_training(TrainConfig(), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "head" / "train.json").exists()


def test_make_data_says_what_goes_together(tmp_path):
    with pytest.raises(UserError, match="--out FILE"):
        make_data.main([])
    with pytest.raises(UserError, match="--data goes with"):
        make_data.main(["--data", "a.jsonl"])


def test_features_can_be_written_behind_the_answers(tmp_path):
    answers_file(tmp_path / "prompts.jsonl", records=5)
    out, store = tmp_path / "answers.jsonl", tmp_path / "store"
    command = ["--target", tiny_target_folder(tmp_path / "target"), "--out", str(out)]
    command += ["--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "6"]
    assert make_data.main([*command, "--write-features", str(store)]) == 0
    found = json.loads((store / "index.jsonl").read_text().splitlines()[1])
    assert sorted(found["names"]) == sorted(r.id for r in read_answers(out))
