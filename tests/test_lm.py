"""A small LM as the draft head: it is transformers' own model, whatever it is called through."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adaspec_eagle import Target, generate, load_head
from adaspec_eagle.distill import forced_counts, teacher_forced
from adaspec_eagle.draft import Drafter, Dynamic, chain
from adaspec_eagle.errors import UserError
from adaspec_eagle.head import HeadConfig
from adaspec_eagle.train import TrainConfig, run_training
from adaspec_eagle.unroll import unroll
from tests.records import answers_file, record
from tests.tiny import ARCHITECTURES, tiny_head, tiny_model, tiny_target, tiny_tokenizer
from tests.tiny import tiny_target_folder as saved

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def lm_head(target, head, draft_vocab=None):
    """A bound `lm` head with the weights that it starts from."""
    made = tiny_head(target, head, draft_vocab)
    made.start_from(target)
    return made


@pytest.fixture(params=["codegen", *ARCHITECTURES])
def named(request, tmp_path):
    """A small LM of another width, saved with the target's tokenizer: its folder."""
    if request.param == "codegen":
        from transformers import CodeGenConfig, CodeGenForCausalLM

        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 512}
        torch.manual_seed(5)
        model = CodeGenForCausalLM(CodeGenConfig(vocab_size=97, **sizes)).double()
        model.lm_head.bias.data.normal_()
    else:
        more = {"num_key_value_heads": 1} if request.param in ("llama", "qwen3") else {}
        model = tiny_model(request.param, **SMALL, **more)
    model.save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_logits_are_those_of_the_named_model(named):
    """Trained on, prefilled and token by token, the first token of the text included."""
    target = tiny_target()
    head = lm_head(target, f"lm:{named}")
    ids = torch.randint(8, 97, (2, 12))
    model = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits  # at token i: of token i + 1
        features = torch.zeros(2, 12, 0, dtype=torch.float64)
        states = unroll(head, features, ids, 3, torch.arange(2, 12).expand(2, -1))
        torch.testing.assert_close(head.logits(states[0])[:, :-1], wanted[:, 3:])
        for step in (1, 2):  # index i of step s is token i + 1 + s
            found = head.logits(states[step])[:, : 12 - 2 - 1 - step]
            torch.testing.assert_close(found, wanted[:, 3 + step :])
        drafter = Drafter(head, chain(2))
        drafter.prefill(features[:, :4], ids[:, :5], torch.tensor([4, 4]))
        torch.testing.assert_close(drafter.logits, wanted[:, 4])
        for place in range(5, 12):
            one = torch.ones(2, dtype=torch.long)
            drafter.advance(features[:, :1], ids[:, place : place + 1], one, place)
            torch.testing.assert_close(drafter.logits, wanted[:, place])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("draft_vocab", [None, 60])
def test_first_layers_are_the_targets_own(arch, draft_vocab):
    target = tiny_target(arch)
    head = lm_head(target, "lm:layers=2", draft_vocab)
    ids = torch.randint(8, 97, (1, 10))
    short = tiny_target(arch, num_hidden_layers=2)
    ours, theirs = target.model.state_dict(), short.model.state_dict()
    short.model.load_state_dict({name: ours[name] for name in theirs})
    with torch.no_grad():
        wanted = short.model(input_ids=ids).logits[:, 1:]
        found = head.logits(unroll(head, torch.zeros(1, 10, 0).double(), ids, 1)[0])
    wanted = wanted if draft_vocab is None else wanted[..., head.draft_ids]
    torch.testing.assert_close(found[:, :-1], wanted)


@pytest.mark.parametrize("tree", ["chain:3", "static", "auto", Dynamic(12, 4, 4)], ids=str)
@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
def test_all_layers_draft_what_the_target_says_in_ragged_rows(arch, tree):
    """The whole target as its own draft: what is not accepted was drafted from a wrong text."""
    target = tiny_target(arch)
    head = lm_head(target, "lm:layers=6")
    ids = torch.randint(8, 97, (3, 9))
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [7]])).long()
    settings = {"max_new_tokens": 22, "ignore_eos": True}
    plain = generate(target, None, ids, mask, **settings)
    found = generate(target, head, ids, mask, tree=tree, **settings)
    assert found.answers == plain.answers
    if tree == "chain:3":
        assert found.stats.accepted == [0, 0, 0, found.stats.rounds]
    assert found.stats.accepted[0] == found.stats.undrafted


def test_the_same_model_overlaps_with_itself_wholly():
    target = tiny_target("phi")
    head = lm_head(target, "lm:layers=6")
    found = teacher_forced(target, head, [record(5, 30, seed) for seed in range(3)], steps=4)
    assert found["overlap"] == pytest.approx([1] * 4)
    assert found["tau_sim"] == 5


def test_an_lm_is_trained_selectively_saved_and_loaded(tmp_path):
    """AdaSPEC on its own form, from the script's job to a head that decodes losslessly."""
    folder = saved(tmp_path / "target")
    answers = answers_file(tmp_path / "answers.jsonl")
    settings = {"target": folder, "data": [answers], "head": "lm:layers=2", "draft_vocab": 60}
    run = TrainConfig(**settings, epochs=2, evaluations=2, batch_size=6, lr=1e-3)
    out = run_training(run, tmp_path / "out")
    target = Target.load(folder, dtype="float64")
    head, reference = (load_head(out.parent / name, target) for name in ("head", "reference"))
    fresh = lm_head(target, "lm:layers=2", draft_vocab=60)
    fresh.set_draft_vocab(head.draft_ids)
    fresh.start_from(target)
    records = [record(6, 20, seed) for seed in range(8)]
    loss = [
        forced_counts(target, one, records, 1).figures()["loss"][0]
        for one in (fresh, reference, head)
    ]
    assert loss[1] < loss[0]
    assert loss[2] < loss[0]
    weights = load_file(out / "model.safetensors")
    assert {"lm.embed_tokens.weight", "lm.layers.1.mlp.up_proj.weight"} <= set(weights)
    assert not any(name.startswith("lm.layers.2") for name in weights)
    notes = json.loads((out / "train.json").read_text())
    assert notes["objective"]["unroll"] == 1
    ids = torch.randint(8, 97, (1, 6))
    wanted = target.model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(target, head, ids, max_new_tokens=20).sequences, wanted)


def test_what_cannot_be_a_draft_lm_is_refused(tmp_path):
    target = tiny_target()
    other = tiny_tokenizer()
    other.add_tokens(["w5000"])
    for name, tokenizer, vocabulary in (("other", other, 98), ("few", tiny_tokenizer(), 90)):
        tiny_model(vocab_size=vocabulary, **SMALL, num_key_value_heads=1).save_pretrained(
            tmp_path / name
        )
        tokenizer.save_pretrained(tmp_path / name)
    for head, reason in (
        (f"lm:{tmp_path / 'other'}", "tokenizer is not that of tiny-llama: 1 tokens differ"),
        (f"lm:{tmp_path / 'few'}", "--draft-vocab 90"),
        (f"lm:{tmp_path / 'nowhere'}", "does not exist"),
        ("lm:layers=7", "from 1 to 6"),
        ("lm:layers=two", "from 1 to 6"),
    ):
        with pytest.raises(UserError, match=reason):
            HeadConfig.for_target(head, target, target.vocab_size)
    with pytest.raises(UserError, match="--train-output"):
        HeadConfig.for_target("lm", target, target.vocab_size, train_output=True)


def test_a_smaller_embedding_serves_with_a_part_of_the_vocabulary(tmp_path):
    """Families pad their embeddings to unequal sizes (Qwen2.5): ids beyond are never read."""
    target = tiny_target()
    model = tiny_model(vocab_size=90, **SMALL, num_key_value_heads=1)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    head = lm_head(target, f"lm:{tmp_path}", draft_vocab=45)
    ids = torch.randint(8, 90, (1, 10))
    with torch.no_grad():
        found = head.logits(unroll(head, torch.zeros(1, 10, 0).double(), ids, 1)[0])
        wanted = model(input_ids=ids).logits[:, 1:, head.draft_ids]
    torch.testing.assert_close(found[:, :-1], wanted)
