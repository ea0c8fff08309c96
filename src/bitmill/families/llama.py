"""Llama 1–3, Mistral, SmolLM: pre-norm, grouped-query attention, gated MLP."""

from bitmill.families.base import ATTENTION_NAMES, GATED_MLP_NAMES, Family, gated_seams

FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral"),
    gguf_arch="llama",
    names={
        **ATTENTION_NAMES,
        **GATED_MLP_NAMES,
        "input_layernorm": "attn_in_norm",
        "post_attention_layernorm": "mlp_in_norm",
    },
    seams=gated_seams("attn_in_norm", "mlp_in_norm", residual=True),
    permuted_rope=True,
)
