"""What the name of a quantized model means: from a table of names, and from the registry for what is made."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bitmill.allocation.mixture import Mixture, demands_importance
from bitmill.core.axes import Weight
from bitmill.core.errors import BadRecipe
from bitmill.core.registry import parse_grid
from bitmill.core.rotating import LearnedTransform
from bitmill.known import KNOWN
from bitmill.recipe import Recipe, parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_BLOCKS, _HIDDEN, _MIDDLE, _KV, _VOCABULARY = 32, 4096, 14_336, 1024, 128_256
"""Llama 3 8B: what sizes of whole models are said for."""
_IGNORED = {"gguf", "safetensors", "instruct", "chat", "it", "base"}


@dataclass(frozen=True)
class Bits:
    """Bits a weight: of the linears' own type, and over all of Llama 3 8B; ``computed``, or as ``named``."""

    type_: float
    model: float | None
    evidence: str
    shares: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Explained:
    """A name, and what is known of it.

    Attributes:
        name: as it was asked for.
        read: the part of it that was understood: of a file name, the quantization alone.
        what: in a sentence or two.
        pieces: how it reads from left to right, for names that do.
        bits: what it takes; None where the name does not say.
        runs: who loads it.
        recipe: what Bitmill calls it; None for what it does not make.
        instead: what comes nearest here.
        text: whether making it needs calibration text, or an importance matrix.
        source: whose word this is.
    """

    name: str
    read: str
    what: str
    pieces: tuple[tuple[str, str], ...]
    bits: Bits | None
    runs: str
    recipe: str | None
    instead: str | None
    text: bool
    source: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        bits = self.bits
        return {
            "name": self.name,
            "read": self.read,
            "what": self.what,
            "pieces": dict(self.pieces),
            "bits": None if bits is None else {
                "type": bits.type_, "model": bits.model, "evidence": bits.evidence,
                "shares": dict(bits.shares),
            },
            "runs": self.runs,
            "recipe": self.recipe,
            "instead": self.instead,
            "calibrates": self.text,
            "source": self.source,
        }  # fmt: skip


def explain(name: str) -> Explained:
    """What ``name`` means: of a type, a method, a recipe, or of a file that is named after one.

    Raises:
        BadRecipe: it means nothing that is known here; with the closest that does.
    """
    found = find(name)
    if found is not None:
        return found
    close = nearest(name)
    hint = f"did you mean {' or '.join(close)}?" if close else "`bitmill recipes` lists what can be made"
    raise BadRecipe(f"{name!r} is no name of a quantization that is known here", fix=hint)


def find(name: str) -> Explained | None:
    """What ``name`` means; None when nothing that is known here."""
    found = (_explained(name, part) for part in _candidates(name))
    return next((one for one in found if one is not None), None)


def nearest(name: str) -> tuple[str, ...]:
    """Names that are known here and spelt most like this one; none where none is alike."""
    mixtures = {mixture.lower().replace("_", "-"): mixture for mixture in Mixture.names()}
    spelt = {**{key: key for key in KNOWN}, **mixtures}
    close = difflib.get_close_matches(name.lower().replace("_", "-"), spelt, n=3)
    return tuple(spelt[key] for key in close)


def _candidates(name: str) -> list[str]:
    """The name, then parts of it as of a file's name: ``Llama-3-8B-Instruct-Q4_K_M.gguf``."""
    words = [w for w in re.split(r"[-./:\s]+", name.strip()) if w and w.lower() not in _IGNORED]
    tails = ["-".join(words[i:]) for i in range(1, len(words))]
    inside = [word for word in words if re.search(r"\d", word) and len(word) > 2]
    return [name.strip(), "-".join(words), *tails, *inside] if len(words) > 1 else [name.strip(), *words]


def _explained(name: str, part: str) -> Explained | None:
    key = part.lower().replace("_", "-")
    entry, groups = _entry(key)
    mixture = _mixture(key)
    if mixture is not None and not key.startswith(("ud-", "i1-")):
        entry, groups = {}, ()
    text = _filled(entry.get("recipe", ""), groups) or (mixture or ("" if "instead" in entry else key))
    recipe = _recipe(text)
    if recipe is None and not entry:
        return None
    where = entry.get("where") or (recipe.container.replace("_", "-") if recipe else "any")
    bits = None if recipe is None else bits_of(recipe)
    if recipe is None and "bits" in entry:
        bits = Bits(float(_filled(entry["bits"], groups)), None, "named")
    instead = entry.get("instead")
    return Explained(
        name=name,
        read=part,
        what=_filled(entry.get("what", ""), groups) or _what(recipe, mixture, bits),
        pieces=_pieces(key) if where == "gguf" or mixture else (),
        bits=bits,
        runs=_table()["runs"].get(where, where),
        recipe=None if recipe is None else str(recipe),
        instead=None if instead is None else _filled(instead, groups),
        text=recipe is not None and _needs_text(recipe),
        source=entry.get("source", "llama.cpp's quantizer" if mixture else "bitmill recipes"),
    )


def _entry(key: str) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    for entry in _table()["name"]:
        found = re.fullmatch(entry["match"], key)
        if found is not None:
            return entry, tuple(group for group in found.groups() if group is not None)
    return {}, ()


def _filled(text: str, groups: tuple[str, ...]) -> str:
    for i, group in enumerate(groups, 1):
        group = group.upper().replace("-", "_") if re.match(r"i?q\d", group) else group
        text = text.replace(f"{{{i}}}", group)
    return text


def _mixture(key: str) -> str | None:
    names = {name.lower().replace("_", "-"): name for name in Mixture.names()}
    key = {"q3-k": "q3-k-m", "q4-k": "q4-k-m", "q5-k": "q5-k-m", "iq3-m-": ""}.get(key, key)
    return names.get(key)


def _recipe(text: str) -> Recipe | None:
    try:
        return parse(text) if text and not text.endswith(".toml") else None
    except BadRecipe:
        return None


def _what(recipe: Recipe | None, mixture: str | None, bits: Bits | None) -> str:
    if mixture is not None and bits is not None and bits.shares:
        shares = ", ".join(f"{share:.0%} {grid}" for grid, share in bits.shares if share >= 0.005)
        return f"One of llama.cpp's mixtures of block types; in Llama 3 8B: {shares}."
    if recipe is None:
        return ""
    about = " ".join((type(parse_grid(recipe.grid)).__doc__ or "").split()).split(". ")[0].rstrip(".")
    return f"A recipe of Bitmill's on the grid {recipe.grid}: {about}."


def _pieces(key: str) -> tuple[tuple[str, str], ...]:
    found = []
    for piece in key.split("-"):
        for pattern, said in _table()["pieces"].items():
            match = re.fullmatch(pattern, piece)
            if match is not None:
                found.append((piece.upper(), _filled(said, match.groups())))
                break
    return tuple(found) if len(found) == len(key.split("-")) else ()


def _needs_text(recipe: Recipe) -> bool:
    transforms = recipe.make_transforms()
    calibrated = {recipe.make_solver().needs, *(t.needs for t in transforms)} != {"nothing"}
    calibrated = calibrated or any(isinstance(t, LearnedTransform) for t in transforms)
    if calibrated or not recipe.is_mixture:
        return calibrated
    mixture = Mixture(recipe.grid)
    chosen = [(w.role, mixture.choose(w)) for w in reference()]
    return any(c is not None and demands_importance(recipe.grid, role, c.grid) for role, c in chosen)


def reference(importance: bool = True) -> tuple[Weight, ...]:
    """The matrices of Llama 3 8B, as an allocation sees them."""
    traits = {
        "heads": 32,
        "kv_heads": 8,
        "layers": _BLOCKS,
        "tied": 0,
        "experts": 0,
        "imatrix": int(importance),
    }
    shapes = {
        "q": (_HIDDEN, _HIDDEN), "k": (_KV, _HIDDEN), "v": (_KV, _HIDDEN), "o": (_HIDDEN, _HIDDEN),
        "gate": (_MIDDLE, _HIDDEN), "up": (_MIDDLE, _HIDDEN), "down": (_HIDDEN, _MIDDLE),
    }  # fmt: skip
    inside = [
        Weight(f"model.layers.{i}.{role}.weight", role, i, shape, _BLOCKS, traits)
        for i in range(_BLOCKS)
        for role, shape in shapes.items()
    ]
    ends = [Weight(role, role, None, (_VOCABULARY, _HIDDEN), _BLOCKS, traits) for role in ("embed", "head")]
    return (*inside, *ends)


def bits_of(recipe: Recipe) -> Bits:
    """Bits a weight of a recipe: of its linears, and of all of Llama 3 8B; exact, from the layouts."""
    mixture = Mixture(recipe.grid, recipe.pure, recipe.tensors) if recipe.is_mixture else None
    roles, container = dict(recipe.roles), recipe.make_container()
    taken: Counter[str] = Counter()
    held: Counter[str] = Counter()
    main, inside = 0, 0
    dtype = recipe.dtype or "bf16"
    for weight in reference():
        choice = None if mixture is None else mixture.choose(weight)
        text = roles.get(weight.role) or (choice.grid if choice else None)
        if text is None:
            text = recipe.grid if weight.layer is not None else container.default_grid(dtype, weight.role)
        grid = container.adapt(parse_grid(text), dtype)
        bits, count = grid.storage_bits((weight.shape[0], weight.shape[1])), math.prod(weight.shape)
        taken[str(grid)] += bits
        held[str(grid)] += count
        if weight.layer is not None:
            main, inside = main + bits, inside + count
    whole = held.total()
    shares = tuple((grid, count / whole) for grid, count in held.most_common())
    return Bits(main / inside, taken.total() / whole, "computed", shares)


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads((Path(__file__).parent / "names.toml").read_text(encoding="utf-8"))
