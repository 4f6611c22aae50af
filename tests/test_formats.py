"""Layouts of other engines: nothing lost, the tables of names and sizes, the known traps."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from adaspec_eagle import DraftHead, Target, load_head
from adaspec_eagle.errors import UserError
from adaspec_eagle.export import export_head, import_head
from adaspec_eagle.formats import FORMATS, OURS, cannot_run
from adaspec_eagle.head import HeadConfig, new_head
from adaspec_eagle.unroll import unroll
from tests.tiny import tiny_head, tiny_model, tiny_target, tiny_tokenizer

V, VD, H, LAYERS = 97, 40, 32, 8
O_BIAS = {"eagle1": "layers.0.self_attn.o_proj.bias", "eagle3": "midlayer.self_attn.o_proj.bias"}


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """Folders of tiny targets with enough layers for three different features, by their kind."""
    root = tmp_path_factory.mktemp("targets")
    kinds = {"untied": {}, "tied": {"tie_word_embeddings": True}}
    for name, changes in kinds.items():
        model = tiny_model("llama", torch.float32, num_hidden_layers=LAYERS, **changes)
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    return {name: Target.load(root / name, dtype="float32") for name in kinds}


def make_head(target, kind, draft_vocab=VD, **more) -> DraftHead:
    """A random head in evaluation mode that is bound to its target."""
    head = tiny_head(target, kind, draft_vocab, **more)
    if head.config.attention_bias and kind == "eagle1":
        head.layers[0].self_attn.o_proj.bias.data.zero_()  # so that EAGLE, too, can run it
    return head


def exported(head, target, to, folder):
    """The folder of that head in that layout."""
    head.save(folder / "head")
    return export_head(folder / "head", to, folder / to, licence="MIT")


def as_published(folder):
    """Take out what only this package's exports say."""
    config = json.loads((folder / "config.json").read_text())
    del config[OURS]
    (folder / "config.json").write_text(json.dumps(config))


def edit(folder, tensors=None, **config):
    """Change config entries and tensors of a folder (None: remove)."""
    path = folder / "config.json"
    new = json.loads(path.read_text()) | config
    path.write_text(json.dumps({name: value for name, value in new.items() if value is not None}))
    state = load_file(folder / "model.safetensors") | (tensors or {})
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(state, folder / "model.safetensors")


def draft_logits(head, target) -> torch.Tensor:
    """Logits of three unroll steps on fixed features and tokens `[3, 2, 9, Vd]`."""
    generator = torch.Generator().manual_seed(5)
    width = H * len(head.config.feature_layers)
    features = torch.randn(2, 9, width, generator=generator).to(target.dtype)
    ids = torch.randint(8, V, (2, 9), generator=generator)
    return torch.stack([head.logits(h) for h in unroll(head, features, ids, 3)]).detach()


def same_weights(first, second) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


# ---- nothing is lost -----------------------------------------------------------------------------


def refused(to, kind, reduced, biased) -> bool:
    """What the four readers do not have."""
    if kind == "eagle1":
        return to == "speculators" or (reduced and to != "sglang") or (biased and to == "vllm")
    return biased  # EAGLE-3: no engine has both biases


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("tied", ["untied", "tied"])
@pytest.mark.parametrize("draft_vocab", [VD, None], ids=["reduced", "full"])
@pytest.mark.parametrize("kind", ["eagle1", "eagle3"])
@pytest.mark.parametrize("to", FORMATS)
def test_export_and_import_lose_nothing(tmp_path, targets, to, kind, draft_vocab, tied, biased):
    """Bit-equal weights, the same config, equal logits; also without this package's own entry."""
    target = targets[tied]
    head = make_head(target, kind, draft_vocab, fc_bias=biased, attention_bias=biased)
    if refused(to, kind, draft_vocab is not None, biased):
        with pytest.raises(UserError, match="cannot be exported"):
            exported(head, target, to, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["head"]
        return
    folder = exported(head, target, to, tmp_path)
    back = load_head(import_head(folder, to, tmp_path / "back"), target)
    assert same_weights(back, head)
    assert back.config == head.config
    as_published(folder)
    published = load_head(folder, target)
    assert same_weights(published, head)
    assert published.config == head.config
    assert torch.equal(draft_logits(published, target), draft_logits(head, target))


@pytest.mark.parametrize(
    ("to", "more"),
    [
        ("sglang", {"fc_bias": True}),
        ("vllm", {"attention_bias": True}),
        ("vllm", {"norm_before_residual": True}),
        ("speculators", {"attention_bias": True}),
        ("speculators", {"norm_before_residual": True}),
        ("sglang", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("vllm", {"train_output": True}),
        ("eagle", {"train_output": True}),
        ("vllm", {"feature_layers": [1, 3, 7]}),
        ("sglang", {"feature_layers": [1, 3, 7]}),
        ("speculators", {"feature_layers": [1, 3, 7]}),
    ],
)
def test_what_eagle3_heads_may_have_besides_comes_back(tmp_path, targets, to, more):
    target = targets["untied"]
    sizes = HeadConfig.for_target("eagle3", target, VD)
    head = new_head(HeadConfig(**vars(sizes) | more))
    head.set_draft_vocab(torch.arange(0, 2 * VD, 2))
    head.eval().bind(target)
    folder = exported(head, target, to, tmp_path)
    as_published(folder)
    back = load_head(folder, target)
    assert back.config == head.config
    assert same_weights(back, head)
    assert torch.equal(draft_logits(back, target), draft_logits(head, target))


def test_a_head_in_bfloat16_stays_so(tmp_path, targets):
    """The target's rows go into the head's own dtype, whatever the target is loaded in."""
    target = targets["untied"]
    head = make_head(target, "eagle3").to(torch.bfloat16)
    folder = exported(head, target, "vllm", tmp_path)
    kinds = {t.dtype for t in load_file(folder / "model.safetensors").values()}
    assert kinds == {torch.bfloat16, torch.int64, torch.bool}
    back = load_head(import_head(folder, "vllm", tmp_path / "back"))
    assert same_weights(back, head)
    assert not load_head(folder, target).config.train_output  # equal in bfloat16: still borrowed


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_targets_are_exported(tmp_path, arch):
    """Another family; Qwen3's heads are wider than their hidden size."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"num_hidden_layers": LAYERS, "head_dim": 16} if arch == "qwen3" else None
    if sizes:
        model = tiny_model("qwen3", torch.float32, **sizes)
    else:
        made = Qwen2Config(**{n: getattr(tiny_model().config, n) for n in ("vocab_size",)},
            hidden_size=H, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512)  # fmt: skip
        torch.manual_seed(3)
        model = Qwen2ForCausalLM(made).eval()
    model.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target = Target.load(tmp_path / "target", dtype="float32")
    for kind in ("eagle1", "eagle3"):
        for to in ("sglang", "vllm"):
            head = make_head(target, kind, None)
            folder = exported(head, target, to, tmp_path / kind)
            as_published(folder)
            assert same_weights(load_head(folder, target), head)
