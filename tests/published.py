"""Configurations of published models, the numbers that matter: advice needs no weights."""

from __future__ import annotations

from typing import Any


def llama(blocks: int, hidden: int, middle: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    """Llama's block, with as many of it."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": blocks,
        "hidden_size": hidden, "intermediate_size": middle, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": 128_256, "max_position_embeddings": 131_072,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", **more,
    }  # fmt: skip


def qwen3(blocks: int, hidden: int, middle: int, heads: int, kv: int = 8, **more: Any) -> dict[str, Any]:
    """Qwen 3's."""
    own = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
    }  # fmt: skip
    return llama(blocks, hidden, middle, heads, kv, **{**own, **more})


LLAMA_1B = llama(16, 2048, 8192, 32, 8, head_dim=64, tie_word_embeddings=True)
LLAMA_3B = llama(28, 3072, 8192, 24, 8, head_dim=128, tie_word_embeddings=True)
LLAMA_8B = llama(32, 4096, 14_336, 32, 8)
LLAMA_70B = llama(80, 8192, 28_672, 64, 8)
QWEN3_4B = qwen3(36, 2560, 9728, 32, tie_word_embeddings=True)
QWEN3_8B = qwen3(36, 4096, 12_288, 32)
QWEN3_14B = qwen3(40, 5120, 17_408, 40)
QWEN3_32B = qwen3(64, 5120, 25_600, 64)
QWEN3_30B_A3B = qwen3(
    48, 2048, 6144, 32, 4, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], num_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1,
)  # fmt: skip
NINE_B = llama(
    42, 3584, 14_336, 16, 8, model_type="gemma2", architectures=["Gemma2ForCausalLM"], head_dim=256,
    vocab_size=256_000, tie_word_embeddings=True, max_position_embeddings=8192, sliding_window=4096,
)  # fmt: skip
"""Gemma 2 9B, with its window in every other block."""
