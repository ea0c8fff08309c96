"""Gemma 2: as Gemma 3 without norms on q and k, with caps on attention and on the logits."""

from bitmill.families.base import ATTENTION_NAMES, GATED_MLP_NAMES, Family, gated_seams

FAMILY = Family(
    name="gemma2",
    model_types=("gemma2",),
    gguf_arch="gemma2",
    names={
        **ATTENTION_NAMES,
        **GATED_MLP_NAMES,
        "input_layernorm": "attn_in_norm",
        "post_attention_layernorm": "post_attn_norm",
        "pre_feedforward_layernorm": "mlp_in_norm",
        "post_feedforward_layernorm": "post_mlp_norm",
    },
    seams=gated_seams("attn_in_norm", "mlp_in_norm", residual=False),
    norm_offset=1.0,
)
