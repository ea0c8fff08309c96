"""Qwen 3 (dense): as Qwen 2 without biases, with norms on each head's q and k."""

from bitmill.families.base import ATTENTION_NAMES, GATED_MLP_NAMES, NORMED, Family, gated_seams

FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    gguf_arch="qwen3",
    names={
        **ATTENTION_NAMES,
        **GATED_MLP_NAMES,
        "input_layernorm": "attn_in_norm",
        "post_attention_layernorm": "mlp_in_norm",
        "self_attn.q_norm": "q_norm",
        "self_attn.k_norm": "k_norm",
    },
    seams=gated_seams("attn_in_norm", "mlp_in_norm", residual=True, keys=NORMED),
)
