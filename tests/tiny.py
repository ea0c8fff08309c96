"""Small random models of every family, with a real byte-level tokenizer: whole folders in a second."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "phi3": functools.partial(Phi3Config, bos_token_id=1, eos_token_id=2, pad_token_id=2),
    "gemma2": functools.partial(Gemma2Config, sliding_window=16),
    "gemma3": functools.partial(Gemma3TextConfig, sliding_window=16),
}
EXPERTS = {
    "mixtral": functools.partial(MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "qwen3moe": functools.partial(
        Qwen3MoeConfig,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    ),
}
"""Mixtures of experts."""
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens, pre-tokenized as SmolLM does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([Path(__file__).read_text(encoding="utf-8")] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = CHAT
    return fast


def make_model(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    **sizes: Any,
) -> Path:
    """Write a random model of ``family`` into ``folder``: a few strong channels, norms off one."""
    torch.manual_seed(seed)
    vocab = len(tokenizer())
    config = (CONFIGS | EXPERTS)[family](**{**SIZES, **sizes}, vocab_size=vocab, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                strong = torch.ones(parameter.shape[-1])
                strong[:: max(parameter.shape[-1] // 8, 1)] = 3.0
                parameter.copy_(noise * strong * (0.7 if "embed" in name else 0.08))
    model = model.to({"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype])
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokens(samples: int = 4, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Random ids in the tiny tokenizer's range."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, len(tokenizer()), (samples, length), generator=generator)
