"""The chat: streams what generate gives, marks drafted tokens, survives Ctrl-C."""

import io
import sys

import pytest
from rich.console import Console

from adaspec_eagle import chat as chat_module
from adaspec_eagle import generate
from adaspec_eagle.chat import Chat
from adaspec_eagle.draft import Dynamic
from adaspec_eagle.errors import run_main
from scripts import chat as chat_script
from tests.tiny import tiny_head, tiny_target, tiny_target_folder

TREE = Dynamic(nodes=12, depth=4, width=4)


def session(head: bool, color: bool = False, **options) -> tuple[Chat, io.StringIO]:
    target = tiny_target()
    out = io.StringIO()
    console = Console(
        file=out, width=1000, force_terminal=color, color_system="standard" if color else None
    )
    options = {"max_new_tokens": 12} | options
    return Chat(target, tiny_head(target) if head else None, TREE, console, options), out


@pytest.mark.parametrize("head", [True, False])
def test_the_answer_is_streamed_and_remembered(head):
    chat, out = session(head)
    chat.run(["w3 w4 w5\n", "\n", "w6\n"])
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert chat.messages[1]["content"] in out.getvalue()
    assert ("tau" in out.getvalue()) == head
    assert "tokens/s" in out.getvalue()


def test_drafted_tokens_are_coloured_and_the_targets_own_are_not():
    chat, out = session(True, color=True, max_new_tokens=60)
    chat.answer("w3 w4 w5")
    assert chat.stats.accepted_tokens > 0
    green = out.getvalue().count("\x1b[32m")
    assert 0 < green <= chat.stats.accepted_tokens


def test_ctrl_c_stops_the_answer_and_keeps_what_came(monkeypatch):
    chat, out = session(False, max_new_tokens=40)

    def stopped(*args, watch=None, **more):
        def once(row, tokens, drafted):
            watch(row, tokens, drafted)
            raise KeyboardInterrupt

        return generate(*args, watch=once, **more)

    monkeypatch.setattr(chat_module, "generate", stopped)
    chat.run(["w3 w4\n"])
    assert "[stopped]" in out.getvalue()
    assert chat.messages[-1]["role"] == "assistant"


def test_ctrl_c_before_the_answer_takes_the_question_back(monkeypatch):
    chat, out = session(True)

    def stopped(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "generate", stopped)
    chat.run(["w3 w4\n"])
    assert "[stopped]" in out.getvalue()
    assert chat.messages == []


def test_a_conversation_that_fills_the_context_says_so_and_goes_on():
    chat, out = session(False, max_new_tokens=600)
    chat.run(["w3\n"])
    assert "context" in out.getvalue()
    assert chat.messages == []


def test_the_speed_without_a_draft_is_measured_when_everything_is_warm(monkeypatch):
    """The first decode of a process packs weights: 7 s where the next one took 0.5 s."""
    chat, out = session(True)
    warm = set()

    def slow_at_first(target, head, *args, **more):
        made = generate(target, head, *args, **more)
        if head not in warm:
            made.stats.seconds["verify"] += 1e6
        warm.add(head)
        return made

    monkeypatch.setattr(chat_module, "generate", slow_at_first)
    chat.run(["w3 w4 w5\n"])
    assert chat.plain_speed > 1e-3
    assert chat.stats.seconds["verify"] < 1e6
    assert "times the decoding speed" in out.getvalue()


def test_a_target_that_says_one_token_only_still_has_a_speed_and_no_ratio_is_made_up():
    chat, out = session(True, max_new_tokens=30)
    first = generate(chat.target, None, chat.prompt("w3"), max_new_tokens=1).answers[0]
    chat.target.eos_token_ids = first
    chat.run(["w3\n"])
    assert chat.plain_speed > 0
    assert "1 tokens" in out.getvalue()
    assert "times" not in out.getvalue()


@pytest.mark.parametrize("most", [1, 3])
def test_a_prompt_that_just_fits_is_answered_with_a_head_and_without(most):
    for head in (True, False):
        chat, out = session(head, max_new_tokens=most)
        room = 512 - most - chat.prompt("").shape[1]
        question = " ".join(["w3"] * room)
        assert chat.prompt(question).shape[1] + most == 512
        chat.run([question])
        assert "error" not in out.getvalue()
        assert "0.00 times" not in out.getvalue()


def test_a_question_that_the_template_refuses_is_an_error_and_is_forgotten():
    chat, out = session(False)
    chat.target.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    chat.run(["w3\n"])
    assert "no such role" in out.getvalue()
    assert "tiny-llama" in out.getvalue()
    assert chat.messages == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--temperature", "-1"], "temperature -1"),
        (["--top-p", "2"], "top_p 2"),
        (["--seed", "-3"], "seed -3"),
        (["--tree", "sampled:3"], "sampled:3"),
        (["--tree", "shrub"], "shrub"),
    ],
)
def test_bad_options_end_the_script_before_anything_is_loaded(words, named, monkeypatch, capsys):
    monkeypatch.setattr(chat_script.Target, "load", None)
    assert run_main(chat_script.main, words) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--system", "w3"], "no system role"), (["--max-new-tokens", "600"], "context of 512")],
)
def test_what_no_question_could_mend_ends_the_script_at_once(
    words, named, tmp_path, monkeypatch, capsys
):
    folder = tiny_target_folder(tmp_path / "target")
    target = chat_script.Target.load(folder, dtype="float32")
    refuse = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    target.tokenizer.chat_template = refuse + target.tokenizer.chat_template
    target.tokenizer.save_pretrained(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w3 w4\nw5\n"))
    command = ["--target", folder, "--no-draft", "--dtype", "float32", *words]
    assert run_main(chat_script.main, command) == 2
    assert named in capsys.readouterr().err


def test_a_line_that_is_no_text_is_an_error_and_the_next_is_answered(tmp_path, monkeypatch, capsys):
    folder = tiny_target_folder(tmp_path / "target")
    given = io.TextIOWrapper(io.BytesIO(b"w3 \xff w4\nw5\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", given)
    more = ["--no-draft", "--max-new-tokens", "5", "--dtype", "float32"]
    assert chat_script.main(["--target", folder, *more]) == 0
    shown = capsys.readouterr().out
    assert "error: text that is no Unicode" in shown
    assert shown.count("\n5 tokens, ") == 1


def test_the_script_answers_a_pipe(tmp_path, monkeypatch, capsys):
    folder = tiny_target_folder(tmp_path / "target")
    monkeypatch.setattr(sys, "stdin", io.StringIO("w3 w4\nw5\n"))
    more = ["--no-draft", "--max-new-tokens", "5", "--dtype", "float32"]
    assert chat_script.main(["--target", folder, *more]) == 0
    assert capsys.readouterr().out.count("\n5 tokens, ") == 2
