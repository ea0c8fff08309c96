"""What a checkpoint's matrices are stored as, from headers alone: whether it has been quantized before."""

from __future__ import annotations

from collections import Counter
from math import prod

from bitmill.checkpoint.gguf_model import GgufCheckpoint
from bitmill.checkpoint.packed_folder import PackedFolder
from bitmill.core.axes import Checkpoint

_DENSE = frozenset({"f32", "f16", "bf16", "f64"})
_SHOWN = 3  # types by name; the rest of a mixture is "others"


def quantized_types(checkpoint: Checkpoint) -> dict[str, float]:
    """Share of the matrices' weights by the type that stores them, largest first; empty when all are dense.

    A folder of packed weights counts by its method's name.
    """
    weights: Counter[str] = Counter()
    for name, facts in checkpoint.tensors.items():
        if len(facts.shape) > 1:
            weights[type_of(checkpoint, name)] += prod(facts.shape)
    total = sum(weights.values())
    return {kind: count / total for kind, count in weights.most_common() if kind not in _DENSE}


def requantized(checkpoint: Checkpoint) -> str | None:
    """The sentence for a plan that quantizes what is quantized already, or None."""
    types = quantized_types(checkpoint)
    if not types:
        return None
    shown = [f"{kind} {share:.0%}" for kind, share in list(types.items())[:_SHOWN]]
    listed = ", ".join([*shown, "others"] if len(types) > _SHOWN else shown)
    return f"the source is quantized already ({listed}) and both losses add up: prefer the original model"


def unread(checkpoint: Checkpoint) -> str | None:
    """The sentence for a source whose runtime also rounds what no grid here describes, or None."""
    names = checkpoint.unread if isinstance(checkpoint, PackedFolder) else ()
    if not names:
        return None
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    return f"{len(names)} stored scales of activations or of a cache are left out: {kinds}"


def type_of(checkpoint: Checkpoint, name: str) -> str:
    """The type that stores a tensor, or the method of a folder of packed weights; else its dtype."""
    if isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.type_of(name)
    if isinstance(checkpoint, PackedFolder) and checkpoint.is_packed(name):
        return str(checkpoint.metadata.get("quant_method", "quantized"))
    return checkpoint.tensors[name].dtype
