"""Prompts, answers and records: every bad line is named, a kill loses and repeats nothing."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, tiny_target, tiny_target_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaspec_eagle import answers, asks, data, estimate, selfdata
from adaspec_eagle.answers import answer_prompts, answer_self, give_answers
from adaspec_eagle.apart import Measured
from adaspec_eagle.asks import Ask, Settings, batches, tokenise
from adaspec_eagle.data import (
    append_jsonl,
    chat_frame,
    load_training,
    mend_jsonl,
    prompt_messages,
    read_answers,
    read_jsonl,
    read_prompts,
)
from adaspec_eagle.errors import UserError
from adaspec_eagle.hub import task_prompts
from adaspec_eagle.selfdata import SelfBatch, broken_rule, start_ids, user_text, write_prompts
from adaspec_eagle.targets import Target
from eval import bench_data
from scripts import make_data

SETTINGS = Settings(max_new_tokens=12, batch_size=3)
TEMPLATE = (
    "<s>system\nBe kind</s>\n{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def silent(_):
    """Where a run reports to in these tests."""


def user(text):
    return [{"role": "user", "content": text}]


def prompt(i, text=None):
    text = text or " ".join(f"w{(7 * i + j) % 60}" for j in range(1 + i % 5))
    return {"id": f"p{i}", "task": "t", "messages": user(text), "where": f"p:{i}"}


def write_lines(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def byte_target(template=None):
    """A tiny target over bytes: its tokenizer can say anything."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *alphabet]
    bytes_only = models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer = Tokenizer(bytes_only)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = template
    return Target.wrap(tiny_model(vocab_size=len(words)), fast, "bytes")


# ---- files ---------------------------------------------------------------------------------------


def test_records_survive_writing_and_reading(tmp_path):
    target = tiny_target()
    found = tokenise(target, [prompt(i) for i in range(4)], SETTINGS, Counter())
    made = answers.answer(target, found, SETTINGS)
    append_jsonl(tmp_path / "a.jsonl", made[:1])
    append_jsonl(tmp_path / "a.jsonl", made[1:])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert read_answers(tmp_path / "a.jsonl") == made == read_answers(packed)
    assert load_training([packed], target, 100) == made


GOOD = json.dumps({"messages": user("hello")}).encode()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{oops", "malformed JSON"),
        (b"", "empty line"),
        (b"   ", "empty line"),
        (b'{"messages": "\xff"}', "not UTF-8"),
        (b"[1]", "JSON object"),
        (b'{"id": "x"}', "no `messages`"),
        (b'{"messages": []}', "no `messages`"),
        (b'{"messages": [{"role": "bot", "content": "x"}]}', "role"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "content"),
        (b'{"messages": [{"role": "user", "content": "  "}]}', "empty prompt"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "no user message"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, says, suffix):
    path = tmp_path / f"bad{suffix}"
    text = GOOD + b"\n" + line + b"\n" + GOOD + b"\n"
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    with pytest.raises(UserError, match=says) as caught:
        read_prompts(path)
    assert f"{path}:2:" in str(caught.value)


def test_files_without_prompts_are_refused(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="no prompts"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path)
    torn = gzip.compress(GOOD * 1000)[:-20]
    (tmp_path / "torn.jsonl.gz").write_bytes(torn)
    with pytest.raises(UserError, match="gzip"):
        read_prompts(tmp_path / "torn.jsonl.gz")


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", {"id": "kept"})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        append_jsonl(path, [{"id": "lost"}])
    assert [item["id"] for item in read_jsonl(path)] == ["kept"]


# ---- conversations -------------------------------------------------------------------------------


def test_the_first_of_two_user_messages_in_a_row_is_asked():
    a, b, c = user("a")[0], user("b")[0], {"role": "assistant", "content": "c"}
    assert prompt_messages([a, b]) == [a]
    assert prompt_messages([a, c]) == [a]
    assert prompt_messages([a, c, b, c]) == [a, c, b]
    assert data.given_answer([a, c]) == "c"
    assert data.given_answer([a, b, c]) is None


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_the_chat_frame_is_what_surrounds_the_users_words(template):
    target = byte_target(template)
    frame = chat_frame(target)
    words = target.tokenizer.encode("hello", add_special_tokens=False)
    assert target.chat_ids(user("hello")) == frame.prefix + words + frame.suffix
    before = "<s>system\nBe kind</s>\n<s>user\n" if template else "User: "
    assert target.tokenizer.decode(frame.prefix) == before
    starts = start_ids(target, frame)
    assert starts == frame.prefix if template else starts == [1, *frame.prefix]


def test_a_given_answer_ends_with_the_end_of_a_turn_where_there_is_one():
    target, item = byte_target(None), prompt(0) | {"where": "p.jsonl:1"}
    item["messages"] = [*user("hi"), {"role": "assistant", "content": "yes"}]
    said = target.tokenizer.encode("yes", add_special_tokens=False)
    for ends in ([], [2], [5, 2]):
        target.eos_token_ids = ends
        found = data.given_record(item, target, data.ending(target))
        assert found.answer_ids == said + ends[:1]


def test_an_id_of_zero_is_an_id(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", prompt(1) | {"id": 0, "task": 0})
    assert [(p["id"], p["task"]) for p in data.read_prompts(path)] == [("0", "0")]


# ---- self-written prompts ------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_self_written_prompt_ends_where_the_users_turn_ends(template):
    target = byte_target(template)
    frame = chat_frame(target)

    def said(text):
        return user_text(target, frame, target.tokenizer.encode(text, add_special_tokens=False))

    assert said("How are you?</s>") == "How are you?"
    assert said("How are you") is None
    cut = said("How are you?\n\nAssistant: Fine.\n\nUser: And")
    assert cut == (None if template else "How are you?")


def test_a_turn_may_end_with_words_of_the_template():
    target = byte_target("[INST] {{ messages[0]['content'] }} [/INST]")
    frame = chat_frame(target)
    ids = target.tokenizer.encode("Why so? [/INST] Because", add_special_tokens=False)
    assert user_text(target, frame, ids) == "Why so?"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Can you explain how tides work?", None),
        ("Was macht der Mond heute Nacht?", None),
        ("Why?", "too short"),
        ("What does this \ufffd mean here", "not printable"),
        ("What is\x00 this thing about", "not printable"),
        ("12 + 34 = 46, 46 - 12 = 34 ok", "mostly not words"),
        ("go on " * 20, "repetitive"),
        ("I'm sorry, but I cannot do that", "speaks as the assistant"),
        ("Tell me more <s> about this", "template marker"),
        ("Tell me more\nAssistant: about this", "template marker"),
        ("Assistant\nCan you tell me more about this?", "template marker"),
        (None, "not ended after 128 tokens"),
    ],
)
def test_the_stated_rules_drop_what_is_no_prompt(text, rule):
    assert broken_rule(byte_target(), text) == rule


def test_self_written_prompts_are_counted_and_never_repeated(monkeypatch):
    target = byte_target(TEMPLATE)
    texts = ["How do birds fly?", "how do  BIRDS fly", "Why?", "What makes the sky so blue?"]
    written = [target.tokenizer.encode(f"{t}</s>", add_special_tokens=False) for t in texts]
    seeds = []

    def scripted(*_, seed, **__):
        seeds.append(seed)
        return SimpleNamespace(answers=written)

    monkeypatch.setattr(selfdata, "generate", scripted)
    seen: set[str] = set()
    first = write_prompts(target, 0, seen, rows=4)
    assert [p["id"] for p in first.kept] == ["self-0-0-0", "self-0-0-3"]
    assert first.dropped == {"duplicate": 1, "too short": 1}
    again = write_prompts(target, 1, seen, rows=4)
    assert not again.kept
    assert again.dropped == {"duplicate": 3, "too short": 1}
    assert len(set(seeds)) == 2


@pytest.mark.parametrize("template", [True, False])
def test_a_batch_of_prompts_is_the_same_whenever_it_is_made(template, monkeypatch):
    target = tiny_target(template=template)
    monkeypatch.setattr(selfdata, "broken_rule", lambda _, text: None if text else "none")
    batches = [write_prompts(target, n, set(), rows=16) for n in (3, 4, 3)]
    assert batches[0] == batches[2] != batches[1]


def test_a_target_that_writes_no_prompts_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "write_prompts", lambda _, number, *__, **___: SelfBatch(number))
    with pytest.raises(UserError, match="no usable prompts"):
        answer_self(tiny_target(), tmp_path / "a.jsonl", replace(SETTINGS, tokens=20), silent)


# ---- answers -------------------------------------------------------------------------------------


def greedy_by_generate(target, ids):
    out = target.model.generate(
        torch.tensor([ids]), max_new_tokens=SETTINGS.max_new_tokens, do_sample=False
    )[0, len(ids) :].tolist()
    end = next((i + 1 for i, token in enumerate(out) if token in target.eos_token_ids), len(out))
    return out[:end]


def test_greedy_answers_are_those_of_generate_in_float32(tmp_path):
    target = tiny_target(dtype=torch.float32)
    out = tmp_path / "a.jsonl"
    answer_prompts(target, [prompt(i) for i in range(10)], out, SETTINGS, silent)
    records = read_answers(out)
    assert {r.id for r in records} == {f"p{i}" for i in range(10)}
    for record in records:
        assert record.answer_ids == greedy_by_generate(target, record.prompt_ids)
        assert record.prompt_ids == target.chat_ids(record.messages[:-1])
        assert record.fingerprint == target.fingerprint
        assert record.temperature == 0


def test_sampled_answers_are_recorded_as_such_and_follow_from_seed_and_id(tmp_path):
    """Each is what sampling that prompt alone gives; answers used to depend on the batch."""
    target, warm = tiny_target(), replace(SETTINGS, temperature=1.0, seed=4)
    out = tmp_path / "a.jsonl"
    answer_prompts(target, [prompt(i) for i in range(6)], out, warm, silent)
    cold = tmp_path / "b.jsonl"
    answer_prompts(target, [prompt(i) for i in range(6)], cold, SETTINGS, silent)
    greedy = {record.id: record.answer_ids for record in read_answers(cold)}
    for record in read_answers(out):
        assert record.temperature == 1.0
        assert record.answer_ids != greedy[record.id]
        alone = answers.answer(target, [Ask(prompt(int(record.id[1:])), record.prompt_ids)], warm)
        assert alone[0].answer_ids == record.answer_ids


class Killed(BaseException):
    """What a kill looks like from inside."""


def kill_after(monkeypatch, writes):
    """The run dies in the middle of its write number `writes`, with half the line written."""
    count = 0

    def dying(path, items):
        nonlocal count
        count += 1
        if count < writes:
            return append_jsonl(path, items)
        append_jsonl(path, items)
        path.write_bytes(path.read_bytes()[:-25])
        raise Killed

    monkeypatch.setattr(answers, "append_jsonl", dying)


@pytest.mark.parametrize("writes", [1, 2, 3, 4])
def test_a_killed_run_goes_on_without_losing_or_repeating_a_record(tmp_path, monkeypatch, writes):
    target, prompts = tiny_target(), [prompt(i) for i in range(10)]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    answer_prompts(target, prompts, whole, SETTINGS, silent)
    with monkeypatch.context() as patch:
        kill_after(patch, writes)
        with pytest.raises(Killed):
            answer_prompts(target, prompts, out, SETTINGS, silent)
    answer_prompts(target, prompts, out, SETTINGS, silent)
    assert sorted(out.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    before = out.read_bytes()
    answer_prompts(target, prompts, out, SETTINGS, silent)  # nothing is left to do
    assert out.read_bytes() == before


def scripted_prompts(target, number, seen, *, seed, rows):
    kept = [prompt(0, f"w{number} w{row} w{seed}") | {"id": f"s{number}-{row}"} for row in range(2)]
    return SelfBatch(number, kept, {"too short": 1}, 9)


@pytest.mark.parametrize("writes", [1, 2, 4, 7])
def test_a_killed_self_run_goes_on_with_the_same_prompts(tmp_path, monkeypatch, writes):
    """The journal of prompts is torn as well as the answers' file, whichever is being written."""
    target, settings = tiny_target(), replace(SETTINGS, tokens=100)
    monkeypatch.setattr(answers, "write_prompts", scripted_prompts)
    with monkeypatch.context() as patch:
        kill_after(patch, writes)
        with pytest.raises(Killed):
            answer_self(target, tmp_path / "a.jsonl", settings, silent)
    tally = answer_self(target, tmp_path / "a.jsonl", settings, silent)
    records = read_answers(tmp_path / "a.jsonl")
    ids = [record.id for record in records]
    written = [p["id"] for b in read_jsonl(tmp_path / "a.prompts.jsonl") for p in b["kept"]]
    assert len(set(ids)) == len(ids) == tally.records
    assert set(ids) <= set(written)
    assert 100 <= tally.tokens == sum(len(r.answer_ids) for r in records)
    assert written == [f"s{n}-{row}" for n in range(len(written) // 2) for row in range(2)]
    with pytest.raises(UserError, match="another target or --seed"):
        answer_self(target, tmp_path / "a.jsonl", replace(settings, seed=5), silent)
    fewer = replace(settings, batch_size=1, tokens=tally.tokens + 1)  # as one out of memory is told
    assert answer_self(target, tmp_path / "a.jsonl", fewer, silent).records > tally.records


@pytest.mark.parametrize(
    ("there", "after"),
    [
        ('{"id": 1}\n{"id": 2', '{"id": 1}\n'),  # torn by a kill
        ('{"id": 1', ""),
        ('{"id": 1}\n{"id": 2}', '{"id": 1}\n{"id": 2}\n'),  # whole, by another editor
        ('{"id": 1}', '{"id": 1}\n'),
        ("", ""),
    ],
)
def test_a_torn_line_is_cut_and_a_whole_one_is_kept(tmp_path, there, after):
    path = tmp_path / "a.jsonl"
    path.write_text(there)
    assert mend_jsonl(path) == bool(after)
    assert path.read_text() == after


@pytest.mark.parametrize("there", ["dear diary", '{\n "a": 1\n}', "one\ntwo\n{", "[1, 2]"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, there):
    path = tmp_path / "a.txt"
    path.write_text(there)
    with pytest.raises(UserError, match="no file of JSON Lines"):
        mend_jsonl(path)
    assert path.read_text() == there


def test_a_run_stops_when_the_tokens_are_there(tmp_path):
    prompts = [prompt(i) for i in range(30)]
    settings = replace(SETTINGS, tokens=40)
    tally = answer_prompts(tiny_target(), prompts, tmp_path / "a.jsonl", settings, silent)
    assert 40 <= tally.tokens < 40 + SETTINGS.batch_size * SETTINGS.max_new_tokens


def test_prompts_too_long_are_dropped_and_counted(tmp_path):
    said = []
    settings = replace(SETTINGS, max_prompt_tokens=6)
    prompts = [prompt(0), prompt(4), prompt(9)]
    tally = answer_prompts(tiny_target(), prompts, tmp_path / "a.jsonl", settings, said.append)
    assert tally.records == 1
    assert "longer than 6 tokens: 2" in said[0]
    with pytest.raises(UserError, match="no prompts to answer"):
        answer_prompts(tiny_target(), prompts[1:], tmp_path / "b.jsonl", settings, silent)


def test_batches_are_of_like_length_and_hold_every_prompt_once(monkeypatch):
    target = tiny_target()
    found = tokenise(target, [prompt(i) for i in range(20)], SETTINGS, Counter())
    plan = list(batches(found, SETTINGS))
    assert sorted(a.prompt["id"] for b in plan for a in b) == sorted(a.prompt["id"] for a in found)
    assert max(len({len(ask.ids) for ask in batch}) for batch in plan) <= 2
    monkeypatch.setattr(asks, "MAX_CELLS", 2 * (SETTINGS.max_new_tokens + 8))
    assert max(len(batch) for batch in batches(found, SETTINGS)) == 2


def test_prompts_with_the_same_id_are_refused(tmp_path):
    with pytest.raises(UserError, match="p:1, p:1"):
        answer_prompts(tiny_target(), [prompt(1)] * 2, tmp_path / "a.jsonl", SETTINGS, silent)


def test_a_file_of_another_target_or_temperature_is_not_gone_on_with(tmp_path):
    out = tmp_path / "a.jsonl"
    answer_prompts(tiny_target(), [prompt(0)], out, SETTINGS, silent)
    with pytest.raises(UserError, match="another target"):
        answer_prompts(tiny_target("qwen3"), [prompt(0)], out, SETTINGS, silent)
    warm = replace(SETTINGS, temperature=1.0)
    with pytest.raises(UserError, match="temperature 0, not at temperature 1 ones"):
        answer_prompts(tiny_target(), [prompt(0)], out, warm, silent)
    with pytest.raises(UserError, match="temperature 0, not given ones"):
        give_answers(tiny_target(), [prompt(0)], out, SETTINGS, silent)
    (record,) = read_answers(out)
    short = replace(SETTINGS, max_new_tokens=len(record.answer_ids) - 1)
    with pytest.raises(UserError, match="larger --max-new-tokens"):
        answer_prompts(tiny_target(), [prompt(0)], out, short, silent)
    assert record.answer_ids[-1] not in tiny_target().eos_token_ids, "it was cut at the limit"
    long = replace(SETTINGS, max_new_tokens=SETTINGS.max_new_tokens + 1)
    with pytest.raises(
        UserError, match="smaller --max-new-tokens than 13: an answer was cut at 12"
    ):
        answer_prompts(tiny_target(), [prompt(0)], out, long, silent)


def test_sampled_answers_of_two_seeds_are_not_mixed(tmp_path):
    warm, out = replace(SETTINGS, temperature=1.0, seed=4), tmp_path / "a.jsonl"
    answer_prompts(tiny_target(), [prompt(0)], out, warm, silent)
    before = out.read_bytes()
    with pytest.raises(UserError, match="of --seed 4, not 5; .*another --out"):
        answer_prompts(tiny_target(), [prompt(0), prompt(1)], out, replace(warm, seed=5), silent)
    assert out.read_bytes() == before
    cold = tmp_path / "b.jsonl"
    answer_prompts(tiny_target(), [prompt(0)], cold, SETTINGS, silent)
    greedy = replace(SETTINGS, seed=5)  # greedy answers have none
    assert answer_prompts(tiny_target(), [prompt(0), prompt(1)], cold, greedy, silent).records == 2


@pytest.mark.parametrize("run", [answer_prompts, give_answers])
def test_measuring_prompts_answered_before_are_not_passed_over(tmp_path, run):
    """They were counted as left out, and stayed in the file."""
    reply = {"role": "assistant", "content": "w9 w8"}
    prompts = [p | {"messages": [*p["messages"], reply]} for p in map(prompt, range(4))]
    out, measured = tmp_path / "a.jsonl", write_lines(tmp_path / "dev.jsonl", prompt(1), prompt(3))
    run(tiny_target(), prompts, out, SETTINGS, silent)
    before, apart = out.read_bytes(), replace(SETTINGS, exclude=Measured([measured]))
    with pytest.raises(UserError, match="2 records .*'p[13]'.* in the files of --exclude"):
        run(tiny_target(), prompts, out, apart, silent)
    assert out.read_bytes() == before
    assert run(tiny_target(), prompts, tmp_path / "b.jsonl", apart, silent).records == 2


def test_text_with_half_a_character_is_refused():
    with pytest.raises(UserError, match=r"no Unicode.*'a\\udcff'"):
        tiny_target().chat_ids(user("a\udcff"))
    with pytest.raises(UserError, match=r"^p:1: .*no Unicode"):  # which of a thousand
        tokenise(tiny_target(), [prompt(0), prompt(1, "a\udcff")], SETTINGS, Counter())


def test_running_out_of_memory_names_a_smaller_batch(tmp_path, monkeypatch):
    def greedy(*_, max_new_tokens, **__):
        raise torch.OutOfMemoryError("out of memory: tried to allocate 9 GiB")

    monkeypatch.setattr(answers, "estimate", lambda *_: "")
    monkeypatch.setattr(answers, "generate", greedy)
    with pytest.raises(UserError, match=r"--batch-size 1 --out .*/a,"):
        answer_prompts(tiny_target(), [prompt(i) for i in (0, 1)], tmp_path / "a", SETTINGS, silent)
    with pytest.raises(UserError, match="--max-prompt-tokens"):
        answer_prompts(tiny_target(), [prompt(0)], tmp_path / "a", SETTINGS, silent)


# ---- training ------------------------------------------------------------------------------------


def test_given_answers_become_tokens_with_an_end(tmp_path):
    target = tiny_target()
    messages = [*user("w1 w2"), {"role": "assistant", "content": "w3 w4"}]
    path = write_lines(tmp_path / "g.jsonl", {"messages": messages})
    (record,) = load_training([path], target, 100)
    assert record.id == "g-1"
    assert record.task == "g"
    assert record.prompt_ids == target.chat_ids(user("w1 w2"))
    assert target.tokenizer.decode(record.answer_ids) == "w3 w4 </s>"


def test_given_answers_stop_at_the_record_that_has_the_tokens(tmp_path):
    """Up to eight batches more were written."""
    reply = {"role": "assistant", "content": "w1 w2 w3 w4"}
    given = [p | {"messages": [*p["messages"], reply]} for p in map(prompt, range(20))]
    out, settings = tmp_path / "a.jsonl", replace(SETTINGS, tokens=12)
    tally = give_answers(tiny_target(), given, out, settings, silent)
    assert (tally.records, tally.tokens) == (3, 15)
    assert [record.id for record in read_answers(out)] == ["p0", "p1", "p2"]
    assert (
        give_answers(tiny_target(), given, out, replace(settings, tokens=16), silent).records == 4
    )


def test_given_answers_that_are_empty_are_left_out_and_counted(tmp_path):
    said = " ".join(f"w{i}" for i in range(9))
    says = {"role": "assistant", "content": said}
    full = [p | {"messages": [*p["messages"], says]} for p in map(prompt, range(3))]
    empty = prompt(3) | {"messages": [*user("w1"), {"role": "assistant", "content": " "}]}
    given = [empty, *full, prompt(4)]
    tally = give_answers(tiny_target(), given, tmp_path / "a.jsonl", SETTINGS, silent)
    assert (tally.records, dict(tally.dropped)) == (3, {"no answer given": 2})
    with pytest.raises(UserError, match=r"no prompts to answer \(no answer given: 1\)"):
        give_answers(tiny_target(), [empty], tmp_path / "b.jsonl", SETTINGS, silent)


def test_training_records_are_cut_and_keep_a_token_to_learn(tmp_path):
    target = tiny_target()
    messages = [*user("w1 w2"), {"role": "assistant", "content": "w3 w4 w5"}]
    path = write_lines(tmp_path / "g.jsonl", {"messages": messages})
    length = len(target.chat_ids(user("w1 w2")))
    assert len(load_training([path], target, length + 2)[0].answer_ids) == 2
    with pytest.raises(UserError, match=r"g.jsonl:1: the answer has no token to learn"):
        load_training([path], target, length)
    path = write_lines(tmp_path / "e.jsonl", {"messages": messages}, {"messages": user("w1")})
    with pytest.raises(UserError, match=r"e.jsonl:2: the answer has no token to learn"):
        load_training([path], target, 100)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fingerprint": "0123"}, "another target"),
        ({"answer_ids": [5, 97]}, "id 97, vocabulary 97"),
        ({"answer_ids": []}, "no token to learn"),
        ({"prompt_ids": []}, "empty prompt"),
        ({"answer_ids": "5"}, "token ids"),
        ({"fingerprint": None, "prompt_ids": [5, 6]}, "tokenises this prompt otherwise"),
    ],
)
def test_token_ids_of_another_target_are_refused(tmp_path, change, says):
    target = tiny_target()
    good = {
        "messages": [*user("w1"), {"role": "assistant", "content": "w2"}],
        "prompt_ids": target.chat_ids(user("w1")),
        "answer_ids": [9, 2],
        "target": "tiny",
        "fingerprint": target.fingerprint,
    }
    assert load_training([write_lines(tmp_path / "a.jsonl", good)], target, 50)
    nameless = {key: value for key, value in good.items() if key != "fingerprint"}
    assert load_training([write_lines(tmp_path / "a.jsonl", nameless)], target, 50)
    path = write_lines(tmp_path / "a.jsonl", {**good, **change})
    with pytest.raises(UserError, match=says) as caught:
        load_training([path], target, 50)
    assert f"{path}:1:" in str(caught.value)


# ---- texts that must stay apart ------------------------------------------------------------------


def test_what_occurs_in_a_measuring_file_is_recognised(tmp_path):
    long = "Write a story, please: about nine small ships in a storm"
    path = write_lines(
        tmp_path / "m.jsonl", {"messages": user("Hi there!")}, {"messages": user(long)}
    )
    measured = Measured([path])
    assert user("  hi THERE ") in measured
    assert user("write a story please about NINE small ships") in measured  # a part, from 8 words
    assert user(f"Here is your task: {long} and one more") in measured  # wrapped
    assert user("Please write a story please about nine small ships in peril") not in measured
    assert user("nine small ships") not in measured
    assert [*user("other"), *user("Hi, there")] in measured


# ---- hub sets ------------------------------------------------------------------------------------

ROWS = {
    "openai/gsm8k": {"question": "1+1?", "answer": "#### 2"},
    "tatsu-lab/alpaca": {"instruction": "Say", "input": "yes", "output": "yes"},
    "google-research-datasets/mbpp": {"text": "Add.", "code": "x", "test_list": ["a", "b"]},
    "abisee/cnn_dailymail": {"article": "News", "highlights": "N"},
    "EdinburghNLP/xsum": {"document": "News", "summary": "N"},
}
CUSTOMARY = {
    "gsm8k": "1+1?",
    "alpaca": "Say\n\nyes",
    "mbpp": "You are an expert Python programmer, and here is your task: Add. Your code should "
    "pass these tests:\n\na\nb",
    "cnndm": "Summarize: News",
    "xsum": "Summarize: News",
}


@pytest.mark.parametrize("task", list(CUSTOMARY))
def test_hub_sets_get_their_customary_prompt(task, monkeypatch):
    import datasets

    def load(path, name, *, split, revision):
        assert split.startswith("train")
        return datasets.Dataset.from_list([ROWS[path]] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    first, second = task_prompts(task, 2, split="train")
    assert prompt_messages(first["messages"]) == user(CUSTOMARY[task])
    assert data.given_answer(first["messages"])
    assert (first["id"], second["id"]) == (f"{task}-train-0", f"{task}-train-1")


def test_an_error_without_words_is_named_by_its_type(monkeypatch):
    import datasets

    def load(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="from the hub: OSError"):
        task_prompts("gsm8k")


def test_a_hub_that_is_not_there_is_an_error_with_a_way_out(monkeypatch):
    import datasets

    def load(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="--prompts self"):
        task_prompts("gsm8k")
    with pytest.raises(UserError, match="no task 'gsm9k'"):
        task_prompts("gsm9k")


# ---- scripts -------------------------------------------------------------------------------------


def test_make_data_answers_a_file_and_goes_on(tmp_path, capsys):
    target = tiny_target_folder(tmp_path / "target")
    prompts = write_lines(tmp_path / "p.jsonl", *(prompt(i) for i in range(6)))
    measuring = write_lines(tmp_path / "m.jsonl", prompt(2))
    out = tmp_path / "new" / "a.jsonl"
    common = ["--target", target, "--prompts", str(prompts), "--out", str(out)]
    more = ["--exclude", str(measuring), "--max-new-tokens", "5", "--batch-size", "2"]
    assert make_data.main([*common, *more]) == 0
    text = capsys.readouterr().out
    assert "in a measuring file: 1" in text
    assert "estimate:" in text
    assert "5 records" in text
    assert {r.id for r in read_answers(out)} == {"p0", "p1", "p3", "p4", "p5"}
    assert make_data.main([*common, *more]) == 0
    assert len(read_answers(out)) == 5


def test_make_data_takes_given_answers(tmp_path):
    target = tiny_target_folder(tmp_path / "target")
    messages = [*user("w1 w2"), {"role": "assistant", "content": "w3 w4"}]
    prompts = write_lines(tmp_path / "p.jsonl", {"messages": messages})
    out = tmp_path / "a.jsonl"
    arguments = ["--target", target, "--prompts", str(prompts), "--out", str(out)]
    assert make_data.main([*arguments, "--answers", "given"]) == 0
    (record,) = read_answers(out)
    assert record.temperature is None
    assert record.messages == messages


@pytest.mark.parametrize(("rows", "length"), [(64, 1000), (64, 20), (2, 3000), (1, 5)])
def test_the_trial_of_an_estimate_finds_what_a_batch_costs(monkeypatch, rows, length):
    """On a machine with a cost for every token prefilled, for a step, a row, and a key read."""
    cells = []

    def timed(target, head, ids, max_new_tokens, **_):
        few, tokens = ids.shape
        step = 0.03 + 1e-3 * few + 1e-6 * few * tokens
        cells.append(ids.numel())
        seconds = {"prefill": 1e-4 * few * tokens, "verify": step * (max_new_tokens - 1)}
        return SimpleNamespace(stats=SimpleNamespace(seconds=seconds))

    monkeypatch.setattr(estimate, "generate", timed)
    target = SimpleNamespace(device="cpu", context=8192)
    cost = estimate._trial(target, [7] * length, rows)
    assert cost.rows == rows
    assert cost.prefill == pytest.approx(1e-4 * rows * length)
    of_one = 1e-6 * rows  # a step's key of the one token that the few rows have, too
    assert cost.step == pytest.approx(0.03 + 1e-3 * rows + 1e-6 * rows * length, abs=of_one)
    assert max(cells) <= max(estimate.TRIAL_CELLS, length)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompts", "nowhere"], "not one of self"),
        (["--prompts", "self", "gsm8k"], "stands alone"),
        (["--prompts", "self", "--answers", "given"], "answered by the target"),
        (["--tokens", "0"], "--tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--seed", "-2"], "--seed"),
    ],
)
def test_make_data_refuses_what_makes_no_sense(tmp_path, arguments, says):
    with pytest.raises(UserError, match=says):
        make_data.main([*arguments, "--out", str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize("more", [[], ["--ignore-eos"]])
def test_the_benchmark_compares_both_loops_on_the_same_prompts(tmp_path, capsys, more):
    target = tiny_target_folder(tmp_path / "target")
    prompts = write_lines(tmp_path / "p.jsonl", *(prompt(i) for i in range(6)))
    arguments = ["--target", target, "--prompts", str(prompts), "--limit", "6", "--batch-size", "2"]
    more = [*more, "--max-new-tokens", "8", "--dtype", "float32"]
    assert bench_data.main([*arguments, *more]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["total"] == 6 == result["matched"] + result["ties"]
    assert result["ratio"] > 0
    assert set(result["arms"]) == {"generate", "ours"}
