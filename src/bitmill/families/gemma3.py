"""Gemma 3 (text): norms multiply by 1 + w, and a norm on each branch's output fixes the stream's basis.

The post-norms stand between o / down and the residual stream, so no rotation can be folded there; the
diagonal seams inside a block are the same as Llama's.
"""

from bitmill.families.base import ATTENTION_NAMES, GATED_MLP_NAMES, NORMED, Family, gated_seams

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    gguf_arch="gemma3",
    names={
        **ATTENTION_NAMES,
        **GATED_MLP_NAMES,
        "input_layernorm": "attn_in_norm",
        "post_attention_layernorm": "post_attn_norm",
        "pre_feedforward_layernorm": "mlp_in_norm",
        "post_feedforward_layernorm": "post_mlp_norm",
        "self_attn.q_norm": "q_norm",
        "self_attn.k_norm": "k_norm",
    },
    seams=gated_seams("attn_in_norm", "mlp_in_norm", residual=False, keys=NORMED),
    norm_offset=1.0,
)
