"""The plug for model.generate: its output, its stopping, what it refuses, what it leaves behind."""

import gc
import weakref

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from adaspec_eagle import generate, speculative
from adaspec_eagle import targets as targets_module
from adaspec_eagle.errors import UserError
from tests.test_sampling import batch
from tests.tiny import ARCHITECTURES, VOCAB, tiny_head, tiny_model, tiny_target


def setting(arch: str = "llama"):
    """(a model as transformers has it, a head for it)."""
    return tiny_model(arch), tiny_head(tiny_target(arch))


@pytest.mark.parametrize("tree", ["auto", "dynamic", "chain:3"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_output_is_that_of_generate(arch, tree):
    model, head = setting(arch)
    ids, mask = batch(3)
    more = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    plug = speculative(head, tree)
    found = model.generate(ids, custom_generate=plug, **more)
    assert torch.equal(found, model.generate(ids, **more))
    assert plug.stats.rounds > 0


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 1.6},
        {"min_new_tokens": 15},
        {"max_length": 17},
        {"eos_token_id": [2, 30, 40, 50]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_the_generation_config_is_heeded(more):
    model, head = setting()
    ids, mask = batch(3)
    more = {"attention_mask": mask, "do_sample": False} | more
    if "max_length" not in more:
        more["max_new_tokens"] = 20
    found = model.generate(ids, custom_generate=speculative(head), **more)
    assert torch.equal(found, model.generate(ids, **more))


class AfterThree(StoppingCriteria):
    """Stops a row behind its third even token."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 9:] % 2 == 0).sum(1) >= 3


def test_stopping_criteria_are_heeded():
    model, head = setting()
    ids, mask = batch(3)
    more = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20}
    more["stopping_criteria"] = StoppingCriteriaList([AfterThree()])
    found = model.generate(ids, custom_generate=speculative(head), **more)
    assert torch.equal(found, model.generate(ids, **more))


def test_a_row_that_a_criterion_stops_is_padded_without_an_end_token():
    """Where no end token is set, `generate` goes on with such a row until all have stopped."""
    model, head = setting()
    ids, mask = batch(3)
    more = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20}
    more |= {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([AfterThree()])}
    whole = model.generate(ids, **more)
    wanted = whole.clone()
    wanted[1:, 12:] = 0  # both begin with three even tokens; row 0 never has three
    assert not torch.equal(whole, wanted)
    assert torch.equal(model.generate(ids, custom_generate=speculative(head), **more), wanted)


def letters() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of VOCAB single characters, which stop strings can be looked up in."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_stop_strings_come_as_a_criterion_and_end_answers_where_generate_ends_them():
    """transformers keeps the tokenizer from a plug, and refuses `stop_strings` without one."""
    model, head = setting()
    ids, mask = batch(3)
    more = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20}
    whole = model.generate(ids, **more)
    tokenizer = letters()
    word = tokenizer.decode(whole[0, 13:15])
    wanted = model.generate(ids, stop_strings=[word], tokenizer=tokenizer, **more)
    assert not torch.equal(whole[0, : wanted.shape[1]], wanted[0])
    with pytest.raises(ValueError, match="could not locate a tokenizer"):
        model.generate(
            ids, custom_generate=speculative(head), stop_strings=[word], tokenizer=tokenizer, **more
        )
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, [word])])
    found = model.generate(ids, custom_generate=speculative(head), stopping_criteria=stop, **more)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("ends", [[30, 40, 41, 50, 60, 2, 15, 35], 15])
def test_a_model_without_a_pad_token_pads_as_generate_does(ends):
    model, head = setting()
    model.generation_config.pad_token_id = model.config.pad_token_id = None
    ids, mask = batch(3)
    more = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, "eos_token_id": ends}
    wanted = model.generate(ids, **more)
    padding = ends[0] if isinstance(ends, list) else ends
    assert (wanted[:, -1] == padding).any()
    assert torch.equal(model.generate(ids, custom_generate=speculative(head), **more), wanted)


@pytest.mark.parametrize(("prompt", "new"), [(515, 4), (4, 600), (500, 13)])
def test_what_does_not_fit_the_context_is_refused_with_its_numbers(prompt, new):
    model, head = setting()
    ids = torch.full((1, prompt), 9)
    with pytest.raises(UserError, match=f"{prompt} tokens; with {new} new .* context of 512"):
        model.generate(ids, custom_generate=speculative(head), max_new_tokens=new)


def test_a_length_that_the_prompt_has_already_is_refused():
    model, head = setting()
    ids, stop = torch.full((1, 10), 9), StoppingCriteriaList([MaxLengthCriteria(10)])
    with pytest.raises(UserError, match="at most 10 tokens .* prompt of 10"):
        model.generate(ids, custom_generate=speculative(head), stopping_criteria=stop)


def test_a_context_may_be_filled_to_its_end():
    model, head = setting()
    ids = torch.full((1, 500), 9)
    more = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = model.generate(ids, custom_generate=speculative(head), **more)
    assert found.shape == (1, 512)
    assert torch.equal(found, model.generate(ids, **more))


def test_sampled_output_repeats_with_torchs_seed():
    model, head = setting()
    ids, mask = batch(2)

    def run(seed):
        torch.manual_seed(seed)
        return model.generate(
            ids, attention_mask=mask, custom_generate=speculative(head), do_sample=True,
            temperature=0.9, top_k=30, top_p=0.9, max_new_tokens=16, num_return_sequences=2,
        )  # fmt: skip

    first = run(1)
    assert first.shape[0] == 4
    assert torch.equal(first, run(1))
    assert not torch.equal(first[0], first[1])
    other = run(2)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_a_dictionary_is_given_where_it_is_asked_for():
    model, head = setting()
    ids, mask = batch(1)
    more = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6}
    found = model.generate(
        ids, custom_generate=speculative(head), return_dict_in_generate=True, **more
    )
    assert torch.equal(found.sequences, model.generate(ids, **more))


class Words:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_every_token_and_the_end():
    model, head = setting()
    ids, mask = batch(1)
    words = Words()
    found = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=12,
        custom_generate=speculative(head, streamer=words),
    )  # fmt: skip
    assert words.tokens == found[0].tolist()
    assert words.ended == 1


def test_a_streamer_is_ended_behind_every_error():
    """A reader of a TextIteratorStreamer waits for the end for ever."""
    model, head = setting()
    bad = tiny_model()
    bad.get_input_embeddings().weight.data[10] = torch.nan
    ids = torch.tensor([[9, 10, 11]])
    for one, rows, more in [
        (model, ids, {"num_beams": 3}),
        (model, ids.expand(2, -1), {}),
        (bad, ids, {}),
    ]:
        words = Words()
        plug = speculative(head, streamer=words, allow_other_target=True)
        with pytest.raises(UserError):
            one.generate(rows, custom_generate=plug, max_new_tokens=4, **more)
        assert words.ended == 1


@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"use_mtp": True},
        {"output_scores": True},
        {"no_repeat_ngram_size": 2},
        {"past_key_values": "filled"},
        {"inputs_embeds": torch.zeros(1, 1, 32, dtype=torch.float64)},
        {"position_ids": torch.arange(40)[None] + 3},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_is_not_supported_is_refused_by_name(more):
    model, head = setting()
    ids, mask = batch(1)
    if "past_key_values" in more:
        more = {"past_key_values": model(ids[:, :5], use_cache=True).past_key_values}
    if "position_ids" in more:
        more = {"position_ids": more["position_ids"][:, : ids.shape[1]]}
    named = "NoRepeatNGram" if "no_repeat_ngram_size" in more else next(iter(more))
    with pytest.raises(UserError, match=named):
        model.generate(
            ids, attention_mask=mask, custom_generate=speculative(head), max_new_tokens=4, **more
        )


@pytest.mark.parametrize("head", [None, "heads/mine"])
def test_what_is_no_head_is_refused(head):
    with pytest.raises(UserError, match="is no draft head"):
        speculative(head)
    if head:
        with pytest.raises(UserError, match="'heads/mine' is no draft head"):
            generate(tiny_target(), head, torch.tensor([[9, 10]]))


def test_a_head_of_another_model_is_refused():
    with pytest.raises(UserError, match="trained for"):
        tiny_model("qwen3").generate(
            batch(1)[0], custom_generate=speculative(setting("llama")[1]), max_new_tokens=4
        )


def test_a_model_that_has_changed_is_looked_at_again():
    model, head = setting()
    ids = batch(1)[0]
    plug = speculative(head)
    model.generate(ids, custom_generate=plug, max_new_tokens=4)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight += 1
    with pytest.raises(UserError, match="trained for"):
        model.generate(ids, custom_generate=plug, max_new_tokens=4)
    with torch.no_grad():
        weight -= 1
    model.resize_token_embeddings(VOCAB + 3)
    with pytest.raises(UserError, match=rf"has \({VOCAB + 3}, "):
        model.generate(ids, custom_generate=plug, max_new_tokens=4)


def test_the_model_is_left_as_it_was():
    model, head = setting()
    model.train()
    before = set(vars(model)), model.config._attn_implementation
    ids, mask = batch(1)
    model.generate(ids, attention_mask=mask, custom_generate=speculative(head), max_new_tokens=4)
    assert (set(vars(model)), model.config._attn_implementation) == before
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_keeps_its_mode(fails, monkeypatch):
    model, head = setting()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]

    def probe(target):
        raise UserError("probed")

    plug = speculative(head)
    if fails:
        monkeypatch.setattr(targets_module, "_probe", probe)
        with pytest.raises(UserError, match="probed"):
            model.generate(batch(1)[0], custom_generate=plug, max_new_tokens=4)
    else:
        model.generate(batch(1)[0], custom_generate=plug, max_new_tokens=4)
    assert [module.training for module in model.modules()] == before


def test_nothing_keeps_the_model_alive_but_the_plug():
    model, head = setting()
    ids, mask = batch(1)
    plug = speculative(head)
    model.generate(ids, attention_mask=mask, custom_generate=plug, max_new_tokens=4)
    seen = weakref.ref(model)
    del model, plug
    head.embed_rows = torch.empty(0)  # the rows it borrows, not the model
    gc.collect()
    assert seen() is None
