"""Other methods as arms: counted like ours, told what they lack, lossless where they are."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaspec_eagle import Target, generate
from adaspec_eagle.baselines import (
    EAGLE1_TREE,
    EAGLE2_TREE,
    MEDUSA_TREE,
    METHODS,
    Ask,
    build_baselines,
    parse_asks,
)
from adaspec_eagle.bench import Bench, HeadChoice
from adaspec_eagle.errors import UserError
from adaspec_eagle.foreign import assisted, count_rounds, decoder_arm
from adaspec_eagle.head import HeadConfig, new_head
from tests.test_eval_scripts import arguments, script, tokens, write_prompts
from tests.tiny import tiny_head, tiny_target, tiny_target_folder

DECODER = '''
import torch

def forward(inputs, model, tokenizer, max_new_tokens, **kw):
    """Two tokens a forward: the next one, and the same one again as a draft."""
    ids, came = inputs.input_ids, []
    start = ids.shape[1]
    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    while ids.shape[1] - start < max_new_tokens and int(ids[0, -1]) != model.config.eos_token_id:
        draft = ids[:, -1:]
        best = model(torch.cat([ids, draft], 1)).logits[:, -2:].argmax(-1)
        took = 2 if int(best[0, 0]) == int(draft) else 1
        ids = torch.cat([ids, best[:, :took]], 1)
        came.append(took)
    ids = ids[:, : start + max_new_tokens]
    return ids, ids.shape[1] - start, len(came), came

def liar(inputs, model, tokenizer, max_new_tokens):
    return inputs.input_ids.repeat(1, 3), inputs.input_ids.shape[1], 1, [1]

def stranger(inputs, model, tokenizer, max_new_tokens):
    return inputs.input_ids + 1, 0, 0, []

def short(inputs, model, tokenizer, max_new_tokens):
    ids, new, steps, came = forward(inputs, model, tokenizer, max_new_tokens)
    return ids, new, steps, [sum(came)]

def nothing(inputs, model, tokenizer, max_new_tokens):
    return inputs.input_ids
'''


def bench(target: Target, new: int = 24) -> Bench:
    """A bench without prompts of its own."""
    head = tiny_head(target)
    return Bench(target, head, HeadChoice(Path("none"), "test"), [], new, 1)


def ragged() -> tuple[Tensor, Tensor]:
    """Three prompts that repeat themselves, so that copies of them are drafted."""
    rows = [[9, 10, 11, 12, 9, 10], [20, 21, 20, 21, 20, 21, 20], [30, 31]]
    return left_padded_rows(rows)


def left_padded_rows(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


# ---- trees ---------------------------------------------------------------------------------------


def test_published_trees_have_their_published_sizes():
    assert len(EAGLE1_TREE.parents) == 26
    assert EAGLE1_TREE.depth == 5
    assert len(MEDUSA_TREE.parents) == 64
    assert MEDUSA_TREE.depth == 4
    assert (EAGLE2_TREE.nodes + 1, EAGLE2_TREE.depth, EAGLE2_TREE.width) == (60, 6, 10)


@pytest.mark.parametrize(
    ("name", "kind", "tree"),
    [("medusa", "medusa", MEDUSA_TREE), ("eagle1", "eagle1", EAGLE1_TREE)]
    + [("eagle2", "eagle1", EAGLE2_TREE), ("eagle3", "eagle3", METHODS["eagle3"].tree)],
)
def test_published_trees_are_lossless(name, kind, tree):
    target = tiny_target()
    ids, mask = ragged()
    found = generate(target, tiny_head(target, kind), ids, mask, tree=tree, max_new_tokens=24)
    assert found.answers == generate(target, None, ids, mask, max_new_tokens=24).answers
    assert METHODS[name].tree == tree


# ---- transformers' own ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lookup", "assisted"])
def test_assisted_decoding_is_lossless_row_by_row(method):
    target, small = tiny_target(), tiny_target(num_hidden_layers=2)
    how = (
        {"prompt_lookup_num_tokens": 5} if method == "lookup" else {"assistant_model": small.model}
    )
    ids, mask = ragged()
    answers, stats = assisted(bench(target), how, ids, mask)
    assert answers == generate(target, None, ids, mask, max_new_tokens=24).answers
    assert stats.new_tokens == sum(map(len, answers))
    assert stats.nodes > 0


def test_a_perfect_assistant_is_accepted_whole_and_counted_without_the_first_forward():
    """A copy of the target as assistant: each forward brings its drafts and one token more."""
    target, how = tiny_target(), {"assistant_model": tiny_target().model}
    _, stats = assisted(bench(target, 25), how, *tokens([7, 8, 9]))
    assert stats.accepted_tokens == stats.nodes
    assert stats.tokens == stats.accepted_tokens + stats.rounds
    assert stats.tokens < stats.new_tokens == 25
    assert sum(stats.offered) == stats.nodes
    assert stats.tau == stats.tokens / stats.rounds > 1.5


def test_without_a_copy_to_draft_tau_is_one():
    target = tiny_target()
    _, stats = assisted(bench(target, 6), {"prompt_lookup_num_tokens": 1}, *tokens([7, 8, 9, 10]))
    assert stats.rounds == stats.tokens - stats.accepted_tokens
    assert count_rounds([1] * 5, 6, 0.0).tau == 1.0


def test_the_models_hooks_are_gone_afterwards():
    target = tiny_target()
    assisted(bench(target, 4), {"prompt_lookup_num_tokens": 1}, *tokens([7, 8]))
    assert not target.model._forward_pre_hooks
    assert not target.model._forward_hooks


# ---- a decoder from a file -----------------------------------------------------------------------


@pytest.fixture
def decoder(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(DECODER)
    return path


def test_a_decoder_from_a_file_is_counted_by_what_its_forwards_brought(decoder):
    target = tiny_target()
    ids, mask = ragged()
    arm = decoder_arm(bench(target), f"{decoder}:forward")
    answers, stats = arm.decode(ids, mask)
    assert answers == generate(target, None, ids, mask, max_new_tokens=24).answers
    assert stats.tokens == sum(map(len, answers)) - 3
    assert stats.tau == stats.tokens / stats.rounds >= 1
    assert stats.seconds["prefill"] > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("liar", "add up to 1"),
        ("short", "1 entries for"),
        ("stranger", "not the prompt"),
        ("nothing", "gave Tensor"),
    ],
)
def test_a_decoder_that_breaks_the_signature_is_told_so(decoder, name, message):
    arm = decoder_arm(bench(tiny_target()), f"{decoder}:{name}")
    with pytest.raises(UserError, match=message):
        arm.decode(*tokens([7, 8, 9]))


# ---- asking --------------------------------------------------------------------------------------


def test_baselines_are_asked_for_by_name_with_what_they_need():
    assert [ask.name for ask in parse_asks(["all"])] == list(METHODS)
    asked = parse_asks(["eagle2=runs/a,medusa=b@auto", "lookup"])
    assert asked == [Ask("lookup"), Ask("medusa", "b", "auto"), Ask("eagle2", "runs/a")]
    assert parse_asks(["medusa=b", "all"])[2] == Ask("medusa", "b")
    for wrong in ("eagle4", "all=x", "medusa=b@bush", "lookup=a", "lookup@auto", "assisted=a@auto"):
        with pytest.raises(UserError):
            parse_asks([wrong])


def test_what_is_not_there_is_named_and_nothing_stands_in_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tiny_target()
    tiny_head(target, "medusa").save(tmp_path / "m")
    tiny_target_folder(tmp_path / "other")
    other = ("tokenizer.json", '"w3":', '"w3x":')
    file = tmp_path / "other" / other[0]
    file.write_text(file.read_text().replace(*other[1:]))
    asks = parse_asks(["all", "eagle1=m", "eagle3=gone/away/far", f"assisted={tmp_path / 'other'}"])
    made = build_baselines(bench(target), asks)
    lacks = {name: facts["lacks"] for name, facts in made.facts.items()}
    assert [arm.key for arm in made.arms] == ["lookup"]
    assert "other has another" in lacks["assisted"]
    assert "kind eagle1: m is of kind medusa" in lacks["eagle1"]
    assert "does not exist" in lacks["eagle3"]
    assert "--head medusa --method distillspec" in lacks["medusa"]
    assert "--method adaspec" in lacks["adaspec"]
    assert (
        "name one" in build_baselines(bench(target), [Ask("assisted")]).facts["assisted"]["lacks"]
    )


def test_a_tree_that_a_baseline_cannot_draft_is_what_it_lacks(tmp_path, monkeypatch):
    """Known before anything is measured: a warm-up that fails would take all other arms along."""
    monkeypatch.chdir(tmp_path)
    target = tiny_target()
    head = tiny_head(target, "medusa")
    head.save(tmp_path / "m")
    tiny_head(target, "eagle1").save(tmp_path / "e")
    deep = f"medusa=m@chain:{head.deepest + 1}"
    made = build_baselines(bench(target), parse_asks([deep, "eagle1=e@sampled:2"]))
    assert made.arms == []
    assert f"{head.deepest} tokens deep" in made.facts["medusa"]["lacks"]
    assert "greedily" in made.facts["eagle1"]["lacks"]
    fits = parse_asks([f"medusa=m@chain:{head.deepest}"])
    assert [arm.key for arm in build_baselines(bench(target), fits).arms] == ["medusa"]


def test_a_head_without_notes_is_not_taken_for_a_plainly_distilled_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tiny_target()
    tiny_head(target, "eagle1").save("runs/a/head")
    assert (
        "none that"
        in build_baselines(bench(target), parse_asks(["eagle1"])).facts["eagle1"]["lacks"]
    )


def test_heads_are_found_by_kind_and_by_how_they_were_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tiny_target()
    for name, kind, select in (("a", "eagle3", "adaspec"), ("b", "eagle1", "none")):
        tiny_head(target, kind).save(f"runs/{name}/head", {"objective": {"select": select}})
    tiny_head(target).save("runs/a/reference", {"objective": {"select": "none"}})
    facts = build_baselines(bench(target), parse_asks(["all"])).facts
    found = {name: one["head"]["folder"] for name, one in facts.items() if one.get("head")}
    assert found == {
        "eagle1": "runs/b/head",
        "eagle2": "runs/b/head",
        "eagle3": "runs/a/reference",
        "adaspec": "runs/a/head",
    }


# ---- the script ----------------------------------------------------------------------------------


def test_all_methods_stand_in_one_table(tmp_path, monkeypatch, capsys, decoder):
    """Arms alternate, are checked against generate, and the missing one stays with its reason."""
    monkeypatch.chdir(tmp_path)
    target = Target.load(tiny_target_folder(tmp_path / "target"), dtype="float32")
    tiny_head(target).save("runs/one/head", {"objective": {"select": "adaspec"}})
    tiny_head(target).save("runs/one/reference", {"objective": {"select": "none"}})
    tiny_head(target, "eagle1").save("runs/two/head", {"objective": {"select": "none"}})
    write_prompts(tmp_path / "a.jsonl")
    others = ["all", "assisted=target", "eagle2=runs/two/head@dynamic"]
    more = ["--prompts", "a.jsonl", "--arm", f"{decoder}:forward", "--out", "made"]
    assert script("speedup").main(arguments("--baselines", *others, *more)) == 0
    result = json.loads((tmp_path / "made" / "result.json").read_text())
    names = ["lookup", "assisted", "eagle1", "eagle2", "eagle3", "adaspec", "forward"]
    assert list(result["arms"]) == ["generate", "loop", "chain", "tree", *names]
    assert all(arm["lossless"] for arm in result["arms"].values())
    assert result["arms"]["eagle2"]["shape"] == "dynamic"
    assert result["arms"]["lookup"]["efficiency"] is None
    assert result["arms"]["tree"]["efficiency"] > 0
    assert "lacks" in result["baselines"]["medusa"]
    first = [next(iter(unit["arms"])) for unit in result["per_prompt"]]
    assert first == ["generate", "loop", "chain"]
    out = capsys.readouterr().out
    assert "medusa: not measured, it lacks a head of kind medusa: none that" in out
    assert (tmp_path / "made" / "speedup.png").read_bytes().startswith(b"\x89PNG")
    tables = script("tables")
    text = tables.section(tmp_path, tmp_path, "made/methods", set())
    assert "| medusa | lacks a head of kind medusa |" in text
    assert "arXiv 2401.15077" in text


def test_two_arms_of_one_name_are_refused(decoder):
    with pytest.raises(UserError, match="'tree'"):
        script("speedup").check_keys(["generate", "tree", "tree"])


@pytest.mark.slow
def test_arms_are_lossless_on_the_real_target(real_target):
    """Copies, and a fresh Medusa head, which drafts the target's next token at every depth."""
    head = new_head(HeadConfig.for_target("medusa", real_target, real_target.vocab_size))
    head.start_from(real_target)
    head.eval().bind(real_target)
    text = "Repeat after me: one two three four, one two three four."
    ids = torch.tensor([real_target.chat_ids([{"role": "user", "content": text}])])
    wanted = generate(real_target, None, ids, max_new_tokens=24).answers
    made = bench(real_target, 24)
    answers, stats = assisted(made, {"prompt_lookup_num_tokens": 10}, ids, torch.ones_like(ids))
    assert answers == wanted
    assert stats.accepted_tokens > 0
    assert generate(real_target, head, ids, tree=MEDUSA_TREE, max_new_tokens=24).answers == wanted
