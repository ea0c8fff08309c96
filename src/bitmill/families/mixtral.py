"""Mixtral: Llama's attention, and a router that sends each token to some of a block's experts."""

from bitmill.families.base import ATTENTION_NAMES, Family, expert_seams

_EXPERT = "block_sparse_moe.experts.{}."

FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    gguf_arch="llama",
    names={
        **ATTENTION_NAMES,
        "block_sparse_moe.gate": "router",
        f"{_EXPERT}w1": "gate",
        f"{_EXPERT}w3": "up",
        f"{_EXPERT}w2": "down",
        "input_layernorm": "attn_in_norm",
        "post_attention_layernorm": "mlp_in_norm",
    },
    seams=expert_seams("attn_in_norm", "mlp_in_norm"),
    permuted_rope=True,
    joined={
        "mlp.gate.weight": ("block_sparse_moe.gate",),
        "mlp.experts.gate_up_proj": (f"{_EXPERT}w1", f"{_EXPERT}w3"),
        "mlp.experts.down_proj": (f"{_EXPERT}w2",),
    },
)
