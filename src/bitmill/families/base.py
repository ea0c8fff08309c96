"""What a model is, as data: names to roles, and the seams where a change of basis can be folded exactly.

A family is one file that defines ``FAMILY``; :func:`describe` picks the one that claims a ``model_type``. A
model that
transformers knows and no table describes gets the generic family: its block linears can be quantized and
calibrated, nothing is folded, and the plan says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from bitmill.core.axes import Seam
from bitmill.core.errors import Refused
from bitmill.core.experts import expert_of, stack_of

LINEAR_ROLES = frozenset({"q", "k", "v", "o", "gate", "up", "down", "linear"})
"""Roles of the weights that a recipe's solver places by default."""

_BLOCK = re.compile(r"^model\.layers\.(\d+)\.(.+)$")

ATTENTION_NAMES = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
}
GATED_MLP_NAMES = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
MODEL_NAMES = {"model.embed_tokens": "embed", "lm_head": "head", "model.norm": "final_norm"}

DIAGONAL = frozenset({"diagonal"})
ANY = frozenset({"diagonal", "orthogonal"})
ORTHOGONAL = frozenset({"orthogonal"})
PERMUTATION = frozenset({"permutation"})
NORMED = ("k_norm", "q_norm")
"""What keys and queries are multiplied by last, where each head has a norm."""


@dataclass(frozen=True)
class Family:
    """One row of facts about a model family.

    Attributes:
        name: public name, equal to the file.
        model_types: ``config.json`` model types it describes.
        gguf_arch: llama.cpp's architecture string, or None when it has none.
        names: module path inside a block (without ``.weight``) to role.
        seams: the hidden spaces and what each allows.
        norm_offset: added to a norm's stored weight by the forward pass (1 for Gemma's ``1 + w``).
        permuted_rope: whether llama.cpp wants the rows of q and k interleaved.
        model_names: module path outside the blocks to role.
        joined: parameter path in transformers' layer to the module paths it is made of, where a checkpoint
            has parts: their rows one after the other, stacked over the experts where a path has ``{}``.
    """

    name: str
    model_types: tuple[str, ...]
    gguf_arch: str | None
    names: Mapping[str, str]
    seams: tuple[Seam, ...] = ()
    norm_offset: float = 0.0
    permuted_rope: bool = False
    model_names: Mapping[str, str] = field(default_factory=lambda: dict(MODEL_NAMES))
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def role(self, tensor: str) -> tuple[str, int | None]:
        """Role and block index of a canonical tensor name; biases have the role ``bias``."""
        stem, _, kind = tensor.rpartition(".")
        block = _BLOCK.match(stem)
        if block is None:
            return self.model_names.get(stem, "other"), None
        layer, path = int(block[1]), stack_of(block[2])
        if kind == "bias":
            return "bias", layer
        role = self.names.get(path)
        if role is None:
            role = "norm" if path.endswith("norm") else ("linear" if not self.names else "other")
        return role, layer

    def module(self, role: str, layer: int | None) -> str:
        """Module path of a role: the inverse of :meth:`role` for weights."""
        if layer is None:
            return next(path for path, r in self.model_names.items() if r == role)
        path = next(path for path, r in self.names.items() if r == role)
        return f"model.layers.{layer}.{path}"

    def inside(self, path: str) -> str:
        """Where transformers' layer has the module whose canonical path is ``path``."""
        for ours, theirs in self._renamed():
            if path.startswith(ours):
                return theirs + path.removeprefix(ours)
        return path

    def canonical(self, path: str) -> str:
        """The canonical path of a module of transformers' layer: the inverse of :meth:`inside`."""
        for ours, theirs in self._renamed():
            if path.startswith(theirs):
                return ours + path.removeprefix(theirs)
        return path

    @property
    def has_single_experts(self) -> bool:
        """Whether its checkpoints have experts one by one, in a way that calibration knows."""
        return any("{}" in parts[0] for parts in self.joined.values())

    def _renamed(self) -> list[tuple[str, str]]:
        """Beginnings of canonical paths, and what transformers has in their place."""
        pairs = []
        for path, parts in self.joined.items():
            if "{}" in parts[0]:
                pairs.append((parts[0].partition("{}")[0], f"{path.rpartition('.')[0]}."))
            elif len(parts) == 1:
                pairs.append((parts[0], path.removesuffix(".weight")))
        return pairs

    def seam(self, name: str) -> Seam | None:
        """The seam called ``name``, or None when this family has none such."""
        return next((s for s in self.seams if s.name == name), None)


def is_expert(tensor: str) -> bool:
    """Whether a tensor is one expert's, of several in its block."""
    return expert_of(tensor) is not None


def attention_seams(attn_norm: str, keys: tuple[str, str] = ("k", "q")) -> tuple[Seam, ...]:
    """Seams of grouped-query attention behind a norm; ``keys`` are what writes keys and queries before they
    are rotated by position."""
    return (
        Seam("attn_in", (attn_norm,), ("q", "k", "v"), DIAGONAL),
        Seam("value", ("v",), ("o",), ANY, per_head=True),
        Seam("key", keys[:1], keys[1:], DIAGONAL, per_head=True),
    )


def expert_seams(attn_norm: str, mlp_norm: str, keys: tuple[str, str] = ("k", "q")) -> tuple[Seam, ...]:
    """Seams of a pre-norm block whose gated MLPs are experts behind a router: nothing is folded between norm
    and experts, and a rotation of the stream goes through."""
    readers = ("q", "k", "v", "gate", "up", "router", "head")
    return (
        *attention_seams(attn_norm, keys),
        Seam("mlp_in", (mlp_norm,), ("gate", "up", "router"), frozenset()),
        Seam("residual", ("embed", "o", "down"), readers, ORTHOGONAL),
    )


def gated_seams(
    attn_norm: str, mlp_norm: str, *, residual: bool, keys: tuple[str, str] = ("k", "q")
) -> tuple[Seam, ...]:
    """Seams of a pre-norm block with grouped-query attention and a gated MLP."""
    inside = (
        *attention_seams(attn_norm, keys),
        Seam("mlp_in", (mlp_norm,), ("gate", "up"), DIAGONAL),
        Seam("mlp_mid", ("up",), ("down",), DIAGONAL),
        Seam("mlp_order", ("gate", "up"), ("down",), PERMUTATION),
    )
    if not residual:
        return inside
    stream = Seam("residual", ("embed", "o", "down"), ("q", "k", "v", "gate", "up", "head"), ORTHOGONAL)
    return (*inside, stream)


@cache
def families() -> tuple[Family, ...]:
    """Every table of this folder, by file name."""
    stems = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in {"__init__", "base"})
    return tuple(import_module(f"bitmill.families.{stem}").FAMILY for stem in stems)


def describe(config: Mapping[str, Any]) -> Family:
    """The family of a model, by ``model_type``.

    Raises:
        Refused: ``config`` names no model type.
    """
    model_type = config.get("model_type")
    if not model_type:
        raise Refused(
            "the model's config.json names no model_type",
            fix="add the architecture's model_type, as transformers spells it",
        )
    for family in families():
        if model_type in family.model_types:
            return family
    return Family(name="generic", model_types=(str(model_type),), gguf_arch=None, names={})


def attentions(config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """Paths of the modules that make keys and values, among the tensors ``names``."""
    family = describe(config)
    made = (name for name in names if name.endswith(".weight") and family.role(name)[0] == "v")
    return tuple(dict.fromkeys(name.removesuffix(".weight").rpartition(".")[0] for name in made))


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def traits(config: Mapping[str, Any]) -> dict[str, int]:
    """Numbers that allocations and layouts ask for: heads, kv_heads, layers, tied, experts."""
    heads = int(config.get("num_attention_heads", 1))
    return {
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "layers": int(config.get("num_hidden_layers", 0)),
        "tied": int(bool(config.get("tie_word_embeddings", False))),
        "experts": int(config.get("num_local_experts") or config.get("num_experts") or 0),
    }
