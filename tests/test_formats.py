"""Layouts of other engines: nothing lost, the tables of names and sizes, the known traps."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from adaspec_eagle import DraftHead, Target, load_head
from adaspec_eagle.errors import UserError
from adaspec_eagle.export import export_head, import_head
from adaspec_eagle.formats import FORMATS, OURS, cannot_run
from adaspec_eagle.head import HeadConfig, new_head
from adaspec_eagle.unroll import step_masks, supervised, unroll
from tests.tiny import tiny_head, tiny_model, tiny_target, tiny_tokenizer

V, VD, H, LAYERS = 97, 40, 32, 8
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}


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
        ("vllm", {"rope_scaling": YARN}),
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


def test_eagle1_heads_of_older_speculators_are_read(tmp_path, targets):
    """speculators up to 0.3 called fc fusion_fc and the layer transformer, and saved no rows."""
    target = targets["untied"]
    head = make_head(target, "eagle1", None, fc_bias=True)
    folder = exported(head, target, "eagle", tmp_path)
    layer = json.loads((folder / "config.json").read_text())
    config = {
        "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
        "speculators_model_type": "eagle",
        "transformer_layer_architecture": "LlamaDecoderLayer",
        "transformer_layer_config": {n: v for n, v in layer.items() if n != OURS},
        "layernorms": False,
        "fusion_bias": True,
        "speculators_config": {"verifier": {"name_or_path": target.name, "architectures": []}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    names = {n: n.replace("layers.0.", "transformer.").replace("fc.", "fusion_fc.") for n in state}
    state = {names[n]: t for n, t in state.items()}
    save_file(state, folder / "model.safetensors")
    assert same_weights(load_head(folder, target), head)
    save_file(state | {"embedding_layernorm.weight": torch.ones(H)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="embedding_layernorm"):
        load_head(folder, target)


def test_output_rows_that_come_with_eagle1_must_be_the_targets(tmp_path, targets):
    """Readers of EAGLE-1 use the target's output layer, whatever is in the file."""
    target = targets["untied"]
    head = make_head(target, "eagle1", None)
    folder = exported(head, target, "vllm", tmp_path)
    edit(folder, {"lm_head.weight": target.output_rows.detach().clone()})
    assert same_weights(load_head(folder, target), head)
    edit(folder, {"lm_head.weight": torch.randn(V, H)})
    with pytest.raises(UserError, match="lm_head"):
        load_head(folder, target)


def test_norm_before_residual_norms_what_is_added_to(targets):
    """With nothing from attention and MLP, the layer gives its residual."""
    for normed in (False, True):
        head = make_head(targets["untied"], "eagle3", norm_before_residual=normed)
        head.midlayer.self_attn.o_proj.weight.data.zero_()
        head.midlayer.mlp.down_proj.weight.data.zero_()
        hidden, tokens = 3 * torch.randn(1, 4, H), torch.randint(8, V, (1, 4))
        given = head(hidden, tokens, torch.arange(4)[None], None, None, 0)
        assert torch.equal(given, head.midlayer.hidden_norm(hidden) if normed else hidden)


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
    """Another family; Qwen3's attention is wider than its hidden size."""
    if arch == "qwen3":
        model = tiny_model("qwen3", torch.float32, num_hidden_layers=LAYERS, head_dim=16)
    else:
        sizes = {"vocab_size": V, "hidden_size": H, "intermediate_size": 48}
        sizes |= {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
        torch.manual_seed(3)
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, max_position_embeddings=512)).eval()
    model.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target = Target.load(tmp_path / "target", dtype="float32")
    for kind in ("eagle1", "eagle3"):
        for to in ("sglang", "vllm"):
            head = make_head(target, kind, None)
            folder = exported(head, target, to, tmp_path / kind)
            as_published(folder)
            assert same_weights(load_head(folder, target), head)


@pytest.mark.parametrize("theirs", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ours", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_rows_of_the_target_are_the_targets(tmp_path, targets, theirs, ours):
    """Published heads are in float16 or bfloat16, whatever their targets are loaded in."""
    model = tiny_model("llama", torch.bfloat16, num_hidden_layers=LAYERS)
    model.save_pretrained(tmp_path / "target")
    tiny_tokenizer().save_pretrained(tmp_path / "target")
    target = Target.load(tmp_path / "target", dtype="float32")
    folder = exported(make_head(target, "eagle3"), target, "eagle", tmp_path)
    state = load_file(folder / "model.safetensors")
    state = {n: t.to(theirs) if t.is_floating_point() else t for n, t in state.items()}
    edit(folder, state | {"embed_tokens.weight": target.embedding.detach().to(theirs)})
    as_published(folder)  # a fingerprint taken in float16 differs
    head = load_head(folder, Target.load(tmp_path / "target", dtype=ours))
    assert not head.config.train_output
    assert head.fc.weight.dtype == ours


# ---- names, shapes, dtypes and config fields -----------------------------------------------------

LAYER = {  # of a Llama layer; `{}` is midlayer or layers.0
    "self_attn.o_proj.weight": [32, 32],
    "mlp.gate_proj.weight": [48, 32],
    "mlp.up_proj.weight": [48, 32],
    "mlp.down_proj.weight": [32, 48],
    "post_attention_layernorm.weight": [32],
}
EAGLE1 = {f"layers.0.{name}": shape for name, shape in LAYER.items()} | {
    "layers.0.self_attn.q_proj.weight": [32, 32],
    "layers.0.self_attn.k_proj.weight": [16, 32],
    "layers.0.self_attn.v_proj.weight": [16, 32],
    "fc.weight": [32, 64],
}
EAGLE3_LAYER = LAYER | {
    "self_attn.q_proj.weight": [32, 64],
    "self_attn.k_proj.weight": [16, 64],
    "self_attn.v_proj.weight": [16, 64],
    "hidden_norm.weight": [32],
    "input_layernorm.weight": [32],
}
EAGLE3 = {"fc.weight": [32, 96], "norm.weight": [32], "lm_head.weight": [40, 32]}
EAGLE3 |= {"d2t": [40], "t2d": [97]}
MIDLAYER = EAGLE3 | {f"midlayer.{name}": shape for name, shape in EAGLE3_LAYER.items()}
LAYERS_0 = EAGLE3 | {f"layers.0.{name}": shape for name, shape in EAGLE3_LAYER.items()}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
OUTPUTS = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 4]}
TABLE = {  # (layout, head): tensors, config entries beside SIZES
    ("eagle", "eagle1"): (
        EAGLE1,
        {"architectures": ["LlamaForCausalLM"], "bias": False, "qkv_bias": False},
    ),
    ("sglang", "eagle1"): (
        EAGLE1 | {"fc.bias": [32]},
        {"architectures": ["LlamaForCausalLMEagle"], "bias": False, "attention_bias": False},
    ),
    ("vllm", "eagle1"): (
        EAGLE1,
        {"architectures": ["EagleLlamaForCausalLM"], "attention_bias": False},
    ),
    ("eagle", "eagle3"): (
        MIDLAYER,
        {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 40},
    ),
    ("sglang", "eagle3"): (
        MIDLAYER,
        {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": 40,
            "bias": False,
            "eagle_config": OUTPUTS,
        },
    ),
    ("vllm", "eagle3"): (
        LAYERS_0,
        {
            "architectures": ["Eagle3LlamaForCausalLM"],
            "draft_vocab_size": 40,
            "norm_before_residual": False,
            "eagle_config": {"use_aux_hidden_state": True},
            "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        },
    ),
}


@pytest.mark.parametrize(("to", "kind"), TABLE, ids="-".join)
def test_exports_have_the_names_shapes_and_fields_of_the_table(tmp_path, targets, to, kind):
    """Each layout written out, from its own readers' sources; nothing more, nothing less."""
    tensors, entries = TABLE[to, kind]
    head = make_head(targets["tied"], kind, VD if kind == "eagle3" else None)
    folder = exported(head, targets["tied"], to, tmp_path)
    state = load_file(folder / "model.safetensors")
    assert {name: list(t.shape) for name, t in state.items()} == tensors
    kinds = {"d2t": torch.int64, "t2d": torch.bool}
    assert all(t.dtype == kinds.get(name, torch.float32) for name, t in state.items())
    config = json.loads((folder / "config.json").read_text())
    wanted = SIZES | entries
    assert {name: config[name] for name in wanted} == wanted
    extra = {"transformers_version", OURS, "mlp_bias", "attention_bias", "bias", "qkv_bias"}
    assert config.keys() - wanted.keys() <= extra
    read = LlamaConfig(**{name: v for name, v in config.items() if name != "model_type"})
    assert read.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_speculators_exports_have_the_names_and_fields_of_the_table(tmp_path, targets):
    head = make_head(targets["tied"], "eagle3", norm_before_residual=True)
    folder = exported(head, targets["tied"], "speculators", tmp_path)
    state = load_file(folder / "model.safetensors")
    assert {n: list(t.shape) for n, t in state.items()} == LAYERS_0 | {
        "embed_tokens.weight": [97, 32]
    }
    config = json.loads((folder / "config.json").read_text())
    verifier = config["speculators_config"].pop("verifier")
    assert verifier == {"name_or_path": targets["tied"].name, "architectures": ["LlamaForCausalLM"]}
    layer = config.pop("transformer_layer_config")
    assert {name: layer[name] for name in SIZES} == SIZES
    for name, value in {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": 40,
        "norm_before_residual": True,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "default_proposal_method": "greedy",
        },
    }.items():
        assert config[name] == value, name


# ---- traps that others stepped into --------------------------------------------------------------


def test_trap_fc_bias_is_never_left_to_a_default(tmp_path, targets):
    """EAGLE and SGLang draw one at random where it is not written; vLLM stops at one (#11126)."""
    target = targets["untied"]
    plain = make_head(target, "eagle1", None)
    for to in ("eagle", "sglang", "vllm"):
        folder = exported(plain, target, to, tmp_path / to)
        state = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        if to == "eagle":
            assert config["bias"] is False
        if to == "sglang":
            assert not state["fc.bias"].any()
        assert ("fc.bias" in state) == (to == "sglang")
        assert config.get("bias", False) is False  # else SGLang and vLLM bias the attention
    folder = exported(make_head(target, "eagle3", fc_bias=True), target, "sglang", tmp_path / "3")
    assert json.loads((folder / "config.json").read_text())["bias"] is True
    o_proj = load_file(folder / "model.safetensors")["midlayer.self_attn.o_proj.bias"]
    assert o_proj.shape == (H,)  # made by the same entry, and not set to zero by the engine
    assert not o_proj.any()
    biased = make_head(target, "eagle1", None, fc_bias=True)
    with pytest.raises(UserError, match="fc has a bias"):
        exported(biased, target, "vllm", tmp_path / "biased")
    folder = exported(biased, target, "eagle", tmp_path / "biased")
    edit(folder, bias=None)  # unsaid, as in the oldest published heads
    assert torch.equal(load_head(folder, target).fc.bias, biased.fc.bias)
    edit(folder, {"fc.bias": None}, bias=True)
    with pytest.raises(UserError, match=r"fc\.bias"):
        load_head(folder, target)


def test_trap_embeddings_are_the_targets_or_not_there(tmp_path, targets):
    """Random rows were written out elsewhere (TorchSpec#38), and the engine used them."""
    target = targets["untied"]
    head = make_head(target, "eagle3")
    for to in FORMATS:
        folder = exported(head, target, to, tmp_path / to)
        rows = load_file(folder / "model.safetensors").get("embed_tokens.weight")
        assert (rows is not None) == (to == "speculators")
        assert rows is None or torch.equal(rows, target.embedding)
        # EAGLE takes the target's embedding only where target_hidden_size is not in the config
        assert "target_hidden_size" not in json.loads((folder / "config.json").read_text()) or (
            to == "speculators"
        )
        edit(folder, {"embed_tokens.weight": torch.randn(V, H)})
        with pytest.raises(UserError, match="random rows"):
            load_head(folder, target)
        edit(folder, {"embed_tokens.weight": target.embedding.detach().clone()})
        assert same_weights(load_head(folder, target), head)


def test_trap_output_rows_are_not_tied_again(tmp_path, targets):
    """A head of a tied target has a tied config elsewhere, and lm_head is lost (speculators#74)."""
    target = targets["tied"]
    for own in (False, True):
        head = make_head(target, "eagle3", train_output=own)
        for to in FORMATS:
            folder = exported(head, target, to, tmp_path / f"{to}-{own}")
            config = json.loads((folder / "config.json").read_text())
            for part in (config, config.get("transformer_layer_config", config)):
                assert part["tie_word_embeddings"] is False
            rows = load_file(folder / "model.safetensors")["lm_head.weight"]
            assert torch.equal(rows, head.lm_head.weight if own else head.output_rows)
            back = load_head(folder, target)
            assert back.config.train_output == own
            assert torch.equal(draft_logits(back, target), draft_logits(head, target))


def test_trap_d2t_is_an_offset(tmp_path, targets):
    target = targets["untied"]
    head = make_head(target, "eagle3")
    ids = torch.arange(0, 2 * VD, 2)
    for to in FORMATS:
        folder = exported(head, target, to, tmp_path / to)
        state = load_file(folder / "model.safetensors")
        assert torch.equal(torch.arange(VD) + state["d2t"], ids)
        assert torch.equal(state["t2d"].nonzero().flatten(), ids)
        assert torch.equal(state["lm_head.weight"], target.output_rows[ids])
        edit(folder, {"d2t": ids})  # ids where offsets belong
        with pytest.raises(UserError, match=r"offsets|t2d"):
            load_head(folder, target)
        edit(folder, {"d2t": ids - torch.arange(VD), "t2d": None})  # SGLang and vLLM skip t2d
        assert torch.equal(load_head(folder, target).t2d, head.t2d)


def test_trap_the_token_map_of_eagle1_holds_ids(tmp_path, targets):
    """SGLang's token map is the other way round: ids, not offsets."""
    head = make_head(targets["untied"], "eagle1")
    folder = exported(head, targets["untied"], "sglang", tmp_path)
    ids = torch.load(folder / "hot_token_id.pt", weights_only=True)
    assert torch.equal(ids, head.draft_ids)
    assert json.loads((folder / "config.json").read_text())["hot_vocab_size"] == VD
    for other in ({"ids": ids}, ids.float(), ids[None]):
        torch.save(other, folder / "hot_token_id.pt")
        with pytest.raises(UserError, match="hot_token_id.pt holds no list of token ids"):
            load_head(folder, targets["untied"])
    (folder / "hot_token_id.pt").unlink()
    with pytest.raises(UserError, match="hot_token_id"):
        load_head(folder, targets["untied"])


@pytest.mark.parametrize("entry", ["hidden_size", "target_hidden_size"])
def test_trap_a_hidden_size_other_than_the_targets_is_refused(tmp_path, targets, entry):
    """vllm#18906: a KeyError about embed_tokens was all that came."""
    target = targets["untied"]
    for to in ("eagle", "sglang", "vllm"):
        folder = exported(make_head(target, "eagle3"), target, to, tmp_path / to)
        edit(folder, **{entry: 64})
        with pytest.raises(UserError, match=r"hidden size .*64.* do not fit target .*32"):
            load_head(folder, target)


def test_trap_layer_ids_count_inputs_or_outputs(tmp_path, targets):
    """hidden_states[i] is the input of layer i; SGLang's ids name outputs, the others inputs."""
    target = targets["untied"]
    config = HeadConfig.for_target("eagle3", target, VD)
    assert config.feature_layers == [2, LAYERS // 2, LAYERS - 3]
    config.feature_layers = [1, 3, 6]
    head = new_head(config)
    head.set_draft_vocab(torch.arange(0, 2 * VD, 2))
    head.eval().bind(target)
    with pytest.raises(UserError, match="reads layers"):
        exported(head, target, "eagle", tmp_path / "eagle")
    for to, ids in (("sglang", [0, 2, 5]), ("vllm", [1, 3, 6]), ("speculators", [1, 3, 6])):
        folder = exported(head, target, to, tmp_path / to)
        config = json.loads((folder / "config.json").read_text())
        place = config["eagle_config"] if to == "sglang" else config
        assert place["eagle_aux_hidden_state_layer_ids"] == ids
        assert load_head(folder, target).config.feature_layers == [1, 3, 6]
        nested = {"use_aux_hidden_state": True}  # published heads that say nothing
        edit(folder, eagle_config=nested, eagle_aux_hidden_state_layer_ids=None)
        assert load_head(folder, target).config.feature_layers == [2, 4, 5]


def test_trap_the_loss_mask_moves_with_the_tokens():
    """SpecForge#885: step s at index i drafts token i + 2 + s, which must be an answer token."""
    answer = torch.tensor([[0, 0, 0, 1, 1, 0, 1]])
    rows, positions = supervised(answer)
    counted = step_masks(positions, 3)  # the head's index at step s is position - 1 - s
    for step in range(3):
        drafted = positions[counted[step]] - 1 - step + 2 + step
        assert drafted.tolist() == [p for p in (3, 4, 6) if p >= 2 + step]


# ---- bad input -----------------------------------------------------------------------------------


@pytest.fixture
def vllm_folder(tmp_path, targets):
    """An EAGLE-3 head in vLLM's layout."""
    return exported(make_head(targets["untied"], "eagle3"), targets["untied"], "vllm", tmp_path)


@pytest.mark.parametrize(
    ("tensors", "entries", "words"),
    [
        ({"norm.weight": None}, {}, r"missing \['norm.weight'\]"),
        ({"lm_head.weight": None}, {}, "no lm_head"),
        ({"d2t": None}, {}, "no d2t"),
        ({"layers.0.self_attn.q_norm.weight": torch.ones(8)}, {}, r"unexpected .*q_norm"),
        ({"fc.weight": torch.ones(32, 64)}, {}, r"fc.weight: \(32, 64\), not \(32, 96\)"),
        ({"d2t": torch.full((VD,), V)}, {}, "d2t does not give"),
        ({"d2t": torch.full((VD,), -1)}, {}, "d2t does not give"),
        ({"d2t": -torch.arange(VD)}, {}, "40 different ids"),
        ({"t2d": torch.ones(V, dtype=torch.bool)}, {}, "t2d does not mark"),
        ({}, {"draft_vocab_size": 41}, "draft_vocab_size is 41, but d2t has 40"),
        ({}, {"vocab_size": 128}, "vocabulary 128"),
        ({}, {"num_hidden_layers": 2}, "2 layers"),
        ({}, {"hidden_act": "gelu"}, "hidden_act"),
        ({}, {"norm_output": True}, "norm_output"),
        ({}, {"fc_norm": True}, "fc_norm"),
        ({}, {"logit_scale": 0.5}, "logit_scale"),
        ({}, {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ({}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({}, {"eagle_aux_hidden_state_layer_ids": [2, 4, 99]}, "99"),
        ({}, {"hidden_size": "many"}, "Llama layer"),
        ({}, {"architectures": ["BertModel"]}, r"Looked for .*Found: .*BertModel"),
        ({"fc.weight": None}, {}, r"Looked for .*Found: .*layers.0"),
        ({}, {"speculators_model_type": "mtp"}, r"Looked for .*Found: .*mtp"),
        ({}, {"eagle_config": 3}, "eagle_config must be an object, not 3"),
        ({}, {"speculators_config": "x"}, "speculators_config must be an object, not 'x'"),
        ({}, {"speculators_config": {"verifier": [1]}}, r"config.verifier must be an object"),
        ({}, {"adaspec_eagle": ["x"]}, "adaspec_eagle must be an object"),
        ({}, {"eagle_aux_hidden_state_layer_ids": "2,4"}, "must be a list of int, not '2,4'"),
        ({}, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ["2"]}}, "a list of int"),
        ({}, {"architectures": [None]}, r"architectures must be a list of str, not \[None\]"),
        ({"d2t": torch.zeros(VD)}, {}, "d2t is of torch.float32, but holds whole numbers"),
        ({"lm_head.weight": torch.ones(VD, 32, dtype=torch.int8)}, {}, "quantised"),
    ],
)
def test_damaged_or_unknown_heads_are_refused(vllm_folder, targets, tensors, entries, words):
    edit(vllm_folder, tensors, **entries)
    with pytest.raises(UserError, match=words):
        load_head(vllm_folder, targets["untied"])
    with pytest.raises(UserError, match=words):
        import_head(vllm_folder, "vllm", vllm_folder.parent / "in", targets["untied"].name)
    assert not (vllm_folder.parent / "in").exists()
    assert not list(vllm_folder.parent.glob(".saving-*"))


def test_another_layout_than_the_one_named_is_refused(vllm_folder, targets):
    with pytest.raises(UserError, match="layout 'vllm', not 'eagle'"):
        import_head(vllm_folder, "eagle", vllm_folder.parent / "in", targets["untied"].name)
    with pytest.raises(UserError, match="with its target"):
        load_head(vllm_folder)
    as_published(vllm_folder)
    with pytest.raises(UserError, match="--target"):
        import_head(vllm_folder, "vllm", vllm_folder.parent / "in")


def test_an_export_remembers_its_targets_weights(vllm_folder, targets):
    with pytest.raises(UserError, match="allow"):
        load_head(vllm_folder, targets["tied"])
    edit(vllm_folder, {"lm_head.weight": targets["tied"].output_rows[::2][:VD].clone()})
    assert load_head(vllm_folder, targets["tied"], allow_other_target=True).bound_to


class Harm:
    """What a pickle can do."""

    def __reduce__(self):
        return (pytest.fail, ("pickled code ran",))


def test_pickled_weights_are_read_as_tensors_only(vllm_folder, targets):
    target = targets["untied"]
    weights = vllm_folder / "model.safetensors"
    state, pickled = load_file(weights), vllm_folder / "pytorch_model.bin"
    weights.unlink()
    with pytest.raises(UserError, match=r"looked for model.safetensors and pytorch_model.bin"):
        load_head(vllm_folder, target)
    torch.save(state, pickled)
    assert torch.equal(load_head(vllm_folder, target).fc.weight, state["fc.weight"])
    for bad in (state | {"x": Harm()}, list(state.values()), {"fc.weight": "no tensor"}):
        torch.save(bad, pickled)
        with pytest.raises(UserError, match=r"pytorch_model.bin"):
            load_head(vllm_folder, target)


def test_targets_and_heads_that_no_engine_has_are_refused(tmp_path, targets):
    """Phi lends its head an output bias; GPT-NeoX has no EAGLE anywhere."""
    for arch, words in (("phi", "output layer has a bias"), ("gpt_neox", "gpt_neox")):
        target = tiny_target(arch, torch.float32, num_hidden_layers=LAYERS)
        head = make_head(target, "eagle3")
        reason = cannot_run("vllm", vars(head.config), head.state_dict(), target)
        assert words in reason
    target = targets["untied"]
    fields = vars(make_head(target, "eagle1", None).config)
    assert "own" in cannot_run("vllm", fields | {"train_output": True}, {}, target)
    for name in ("my.module", "medusa"):
        found = cannot_run("vllm", fields | {"head": name}, {}, target)
        assert f"no layout for {name!r}" in found
    assert "wide" in cannot_run("eagle", fields | {"head_dim": 16}, {}, target)
