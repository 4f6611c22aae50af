"""Tiny random targets and heads for tests that need no downloads."""

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from adaspec_eagle import Target
from adaspec_eagle.head import DraftHead, HeadConfig, new_head

ARCHITECTURES = ("llama", "phi", "qwen3", "gpt_neox")
VOCAB = 97

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "phi": (PhiForCausalLM, PhiConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
}
_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tiny_model(arch: str = "llama", dtype: torch.dtype = torch.float64, **changes):
    """A random causal LM whose greedy text does not fall into a loop at once."""
    make, config, more = _MODELS[arch]
    torch.manual_seed(3)
    model = make(config(**{**_SIZES, **more, **changes}))
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn_like(weight)  # biases that matter (Phi's output)
        else:
            weight.data *= 4
    return model.to(dtype).eval()


def tiny_tokenizer(template: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with ids below VOCAB."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
    ]
    words = [f"w{i}" for i in range(VOCAB - len(special))]
    vocab = {word: i for i, word in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    fast.chat_template = _CHAT if template else None
    return fast


def tiny_target(
    arch: str = "llama", dtype: torch.dtype = torch.float64, template: bool = True, **changes
) -> Target:
    """A tiny random target in memory, with a tokenizer."""
    return Target.wrap(tiny_model(arch, dtype, **changes), tiny_tokenizer(template), f"tiny-{arch}")


def tiny_target_folder(folder, arch: str = "llama", dtype: torch.dtype = torch.float32) -> str:
    """The same, saved: a path for --target."""
    tiny_model(arch, dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_head(
    target: Target, name: str = "eagle3", draft_vocab: int | None = 40, **more
) -> DraftHead:
    """A bound random head; draft_vocab None for the whole vocabulary."""
    size = draft_vocab or target.vocab_size
    head = new_head(HeadConfig.for_target(name, target, size, **more))
    head.set_draft_vocab(torch.arange(0, 2 * size, 2) % target.vocab_size)
    return head.eval().bind(target)
