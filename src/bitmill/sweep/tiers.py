"""What a sweep makes: ladders by name, and a place in its folder for every recipe."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from bitmill.core.errors import BadRecipe
from bitmill.recipe import Recipe, parse

_GGUF = ("Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")
_SERVING = ("W4A16", "AWQ", "NVFP4A16", "MXFP4A16", "W8A8", "FP8-dynamic", "FP8-block", "W8A16")
LADDERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gguf": _GGUF,
        "serving": _SERVING,
        "all": (*_GGUF, *_SERVING, "GPTQ-Int4", "NF4", "MLX-4bit", "MLX-8bit"),
    }
)
"""Names of recipes that people publish together, smallest first."""

_STORED_AS = re.compile(r"[.-](?:i?q\d\w*|b?f(?:p)?(?:16|32)|mxfp4\w*)$", re.IGNORECASE)
_PART = re.compile(r"-00001-of-\d{5}$")
_LONGEST = 48  # characters of a name made from a recipe's line


@dataclass(frozen=True)
class Tier:
    """One output of a sweep.

    Attributes:
        name: what people call it: ``Q4_K_M``, or the recipe's line in letters that a file's name may have.
        asked: the recipe as it was asked for.
        recipe: what that stands for.
        file: its name inside the sweep's folder: a file for GGUF, a folder otherwise.
    """

    name: str
    asked: str
    recipe: Recipe
    file: str


def tiers(model: Path, asked: Sequence[str]) -> tuple[Tier, ...]:
    """A tier for each recipe, one named twice once; ``model`` is the source that outputs are named after.

    Raises:
        BadRecipe: nothing was asked for, or something that does not exist.
    """
    if not asked:
        raise BadRecipe(
            "no recipe is given", fix=f"name some (Q4_K_M Q6_K), or a --ladder: {', '.join(LADDERS)}"
        )
    found: dict[str, Tier] = {}
    base = stem(model)
    for text in asked:
        recipe = parse(text)
        name = _name(text)
        if any(tier.name == name for tier in found.values()) and str(recipe) not in found:
            name = f"{name}-{hashlib.sha256(str(recipe).encode()).hexdigest()[:6]}"
        file = f"{base}-{name}{'.gguf' if recipe.container == 'gguf' else ''}"
        found.setdefault(str(recipe), Tier(name, text, recipe, file))
    return tuple(found.values())


def takes_matrix(recipe: Recipe) -> bool:
    """Whether an importance matrix can tell the recipe all that it could use of a calibration."""
    plain = recipe.solver.name in ("nearest", "clip") and recipe.tune is None and recipe.cache is None
    told = recipe.input is None or "static" not in recipe.input
    return recipe.container == "gguf" and plain and told and not recipe.transforms


def stem(model: Path) -> str:
    """The model's name without what it is stored as."""
    return _STORED_AS.sub("", _PART.sub("", model.name.removesuffix(".gguf"))) or "model"


def _name(text: str) -> str:
    name = Path(text).stem if text.lower().endswith(".toml") else text
    name = re.sub(r"[^\w.=-]+", "-", name.strip()).strip("-.")
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST].rstrip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return name
