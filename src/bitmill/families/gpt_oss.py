"""gpt-oss: attention with biases and sinks, and a router before experts that are one stack a layer."""

from bitmill.families.base import ATTENTION_NAMES, Family, attention_seams

FAMILY = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    gguf_arch=None,
    names={
        **ATTENTION_NAMES,
        "mlp.router": "router",
        "input_layernorm": "attn_in_norm",
        "post_attention_layernorm": "mlp_in_norm",
    },
    seams=attention_seams("attn_in_norm"),
)
