"""Phi 3 and 4: as Llama with q, k and v in one matrix, gate and up in another.

A fused matrix has the role by which llama.cpp's mixtures choose its type. Where it reads, it is folded whole;
its output is several spaces in one, and no seam, but for its last rows: those of the values.
"""

from bitmill.core.axes import Seam
from bitmill.families.base import DIAGONAL, ORTHOGONAL, Family

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    gguf_arch="phi3",
    names={
        "self_attn.qkv_proj": "v",
        "self_attn.o_proj": "o",
        "mlp.gate_up_proj": "up",
        "mlp.down_proj": "down",
        "input_layernorm": "attn_in_norm",
        "post_attention_layernorm": "mlp_in_norm",
    },
    seams=(
        Seam("attn_in", ("attn_in_norm",), ("v",), DIAGONAL),
        Seam("value", ("v",), ("o",), ORTHOGONAL, per_head=True),
        Seam("mlp_in", ("mlp_in_norm",), ("up",), DIAGONAL),
        Seam("residual", ("embed", "o", "down"), ("v", "up", "head"), ORTHOGONAL),
    ),
)
