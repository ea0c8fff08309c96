"""Qwen 2 and 2.5: as Llama, with biases on q, k and v."""

from bitmill.families.base import ATTENTION_NAMES, GATED_MLP_NAMES, Family, gated_seams

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    gguf_arch="qwen2",
    names={
        **ATTENTION_NAMES,
        **GATED_MLP_NAMES,
        "input_layernorm": "attn_in_norm",
        "post_attention_layernorm": "mlp_in_norm",
    },
    seams=gated_seams("attn_in_norm", "mlp_in_norm", residual=True),
)
