"""A head's folder: what saving one there leaves as it was."""

import json
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from tiny import tiny_head, tiny_target

from adaspec_eagle import load_head, plugins, targets
from adaspec_eagle.errors import UserError
from adaspec_eagle.head import head_class
from adaspec_eagle.targets import AutoModelForCausalLM, AutoTokenizer, Target


def test_saving_a_head_takes_away_nothing_but_the_head_before_it(tmp_path):
    """Other files in the folder stay, and so does a folder NAME.old beside it."""
    target, folder = tiny_target(), tmp_path / "head"
    (tmp_path / "head.old").mkdir()
    (tmp_path / "head.old" / "mine").write_text("kept")
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "notes.tex").write_text("long work")
    (folder / "README.md").write_text("of the head before")
    (folder / "pytorch_model.bin").write_text("of the head before")
    head = tiny_head(target)
    head.save(folder)
    head.save(folder)
    assert (tmp_path / "head.old" / "mine").read_text() == "kept"
    assert (folder / ".git" / "HEAD").read_text() == "ref"
    assert (folder / "notes.tex").read_text() == "long work"
    assert "before" not in (
        (folder / "README.md").read_text() if (folder / "README.md").exists() else ""
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "head.old"]
    assert not (folder / "pytorch_model.bin").exists()
    for name, tensor in load_head(folder, target).state_dict().items():
        assert torch.equal(tensor, head.state_dict()[name])


def test_a_head_saved_through_a_link_lies_where_the_link_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    for _ in range(2):
        tiny_head(tiny_target()).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()


def test_the_tokenizer_is_of_the_revision_that_the_weights_are_of(monkeypatch, tmp_path):
    given = {}

    def refused(kind):
        def load(path, **options):
            given[kind] = options
            if kind == "tokenizer":
                raise OSError("seen enough")
            return tiny_target().model

        return load

    monkeypatch.setattr(targets, "_locate", lambda name, gguf_file: (name, gguf_file))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refused("model"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refused("tokenizer"))
    with pytest.raises(UserError):
        Target.load(str(tmp_path), revision="v1.0", token="t", low_cpu_mem_usage=True)
    assert given["tokenizer"] == {"revision": "v1.0", "token": "t"}


def test_a_conversation_that_the_template_refuses_is_an_error_in_words():
    class Tokenizer:
        chat_template = "one without system messages"

        def apply_chat_template(self, *_, **__):
            raise TemplateError("System role not supported")

    target = tiny_target()
    target.tokenizer = Tokenizer()
    with pytest.raises(UserError, match="System role not supported"):
        target.chat_ids([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])


def test_code_that_only_a_heads_config_names_is_not_run(tmp_path, monkeypatch):
    """A relative name took whatever file of that name lay in the current folder."""
    target = tiny_target()
    tiny_head(target).save(tmp_path / "head")
    config = tmp_path / "head" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"head": "mine.py"}))
    own = (Path(__file__).parents[1] / "heads" / "eagle3.py").read_text()
    (tmp_path / "mine.py").write_text(f"open('ran', 'w').close()\n{own}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "default_cache_dir", lambda: tmp_path / "cache")
    with pytest.raises(UserError, match=r"mine.py, which loading it would run.*ADASPEC_ALLOW_CODE"):
        load_head("head", target)
    assert not (tmp_path / "ran").exists()
    with monkeypatch.context() as patch:
        patch.setenv("ADASPEC_ALLOW_CODE", "1")
        assert load_head("head", target).bound_to
    with pytest.raises(UserError, match="would run"):  # once allowed is not for ever
        load_head("head", target)
    head_class("mine.py")  # as train_head.py --head mine.py has it
    plugins._named.clear()  # another process
    assert load_head("head", target).bound_to
    config.write_text(json.dumps(json.loads(config.read_text()) | {"head": "antigravity.more"}))
    with pytest.raises(UserError, match="code antigravity.more"):
        load_head("head", target)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("head", None),
        ("draft_vocab_size", "many"),
        ("num_attention_heads", 0),
        ("head_dim", 2.5),
        ("rope_theta", "1e4"),
        ("feature_layers", "2,4"),
        ("feature_layers", [2, None]),
        ("attention_bias", 1),
        ("rope_scaling", [1]),
    ],
)
def test_a_field_of_a_wrong_type_is_named(tmp_path, field, value):
    target = tiny_target()
    tiny_head(target).save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(UserError, match=f"config.json: .*'{field}'"):
        load_head(tmp_path, target)
