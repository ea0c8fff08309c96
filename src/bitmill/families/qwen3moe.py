"""Qwen 3 with experts: Qwen 3's attention, and a router that sends each token to some of them."""

from bitmill.families.base import ATTENTION_NAMES, Family, expert_seams

_EXPERT = "mlp.experts.{}."

FAMILY = Family(
    name="qwen3moe",
    model_types=("qwen3_moe",),
    gguf_arch="qwen3moe",
    names={
        **ATTENTION_NAMES,
        "mlp.gate": "router",
        f"{_EXPERT}gate_proj": "gate",
        f"{_EXPERT}up_proj": "up",
        f"{_EXPERT}down_proj": "down",
        "input_layernorm": "attn_in_norm",
        "post_attention_layernorm": "mlp_in_norm",
        "self_attn.q_norm": "q_norm",
        "self_attn.k_norm": "k_norm",
    },
    seams=expert_seams("attn_in_norm", "mlp_in_norm"),
    joined={
        "mlp.experts.gate_up_proj": (f"{_EXPERT}gate_proj", f"{_EXPERT}up_proj"),
        "mlp.experts.down_proj": (f"{_EXPERT}down_proj",),
    },
)
