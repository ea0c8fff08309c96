"""Input grids: what the inputs of a linear layer, or the keys and values of a cache, are rounded to while a
model runs.

The rows of an input grid are tokens. A runtime takes its parameters from the numbers that pass by, by one
fixed rule, and stores nothing; only what a name calls static is fixed by calibration and stands in the file.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from bitmill.core.errors import BadRecipe

_TEXT = re.compile(
    r"(int[2-8]|fp8-e4m3)-(token|tensor|head|g[1-9]\d{0,5}(?:-token)?)(?:-(static))?(?:-(sym|asym))?(?:-(static))?"
    r"(?:-clip(0\.\d{1,4}))?"
)
_SMALL = {
    "mxfp8": ("e4m3", 8, "mx"),
    "mxfp8-ceil": ("e4m3", 8, "ceil"),
    "mxfp6-e2m3": ("e2m3", 6, "mx"),
    "mxfp4": ("e2m1", 4, "mx"),
    "nvfp4": ("e2m1", 4, "nv"),
}
_BITNET = "bitnet-int8"
_LOUD = re.compile(r"llm-int8(?:-(\d{1,3}(?:\.\d{1,6})?))?")
_ALSO = {"mxfp6": "mxfp6-e2m3", "mxfp8-e4m3": "mxfp8", "mxfp4-e2m1": "mxfp4"}

EXAMPLES = (
    "int8-token", "int8-token-asym", "int8-tensor", "int8-tensor-static", "int8-tensor-static-asym",
    "int4-token", "int4-g128-token", "fp8-e4m3-token", "fp8-e4m3-tensor", "fp8-e4m3-tensor-static",
    "bitnet-int8", "fp8-e4m3-g128-token", "mxfp8", "mxfp8-ceil", "mxfp6-e2m3", "mxfp4", "nvfp4", "llm-int8",
)  # fmt: skip
"""Spellings that help and documentation show."""

CACHES = ("fp8-e4m3-tensor-static", "fp8-e4m3-head-static", "int8-tensor-static", "int8-head-static")
"""Grids of keys and values with fixed scales: one for all of a layer's keys, or for those of each head."""

CACHE_EXAMPLES = (*CACHES, "int4-token-asym", "int4-token-asym-clip0.95", "int4-g32-token-asym", "int8-token")
"""Spellings of caches: those with fixed scales, and some whose scales come with each key and value."""

HELD = "held"
"""Scaling of what comes back from a way to store keys and values."""

LOUD = 6.0
"""Magnitude from which LLM.int8() keeps a channel out of the rounding, where nothing else is said."""


@dataclass(frozen=True)
class InputGrid:
    """What a linear's input is rounded to; ``str`` is its canonical text.

    Attributes:
        element: ``int``, or a small float: ``e4m3 e2m3 e2m1``.
        bits: of an element.
        extent: whose largest value sets the scale: a ``token``, a ``group`` of a token's channels, the
            ``tensor`` that goes through the layer in one sequence, or a ``head`` of keys or values in all.
        group: channels of a group; 0 for the others.
        symmetric: whether there is no zero point.
        static: whether scale (and zero point) are fixed by calibration.
        scaling: ``real``; ``mx``, powers of two by compressed-tensors' rule, and ``ceil``, the power of two
            that cuts nothing off (NVIDIA's rule, and that of transformers' FP8 kernels); ``nv``, E4M3 under
            one fixed gain; ``loud``, LLM.int8()'s: whole numbers up to 127, and channels that reach
            ``threshold`` anywhere in a sequence as they are; ``held``, as a cache gives them back.
        threshold: of ``loud``; at 0 no channel is left out.
        clip: of whole numbers: what the range is multiplied by before scales are taken from it; what lies
            outside takes the outermost value.
        method: of ``held``, for keys and values alone: the way to store them, by its text.
    """

    element: str
    bits: int
    extent: str
    group: int = 0
    symmetric: bool = True
    static: bool = False
    scaling: str = "real"
    threshold: float = 0.0
    clip: float = 1.0
    method: str = ""

    def __str__(self) -> str:
        if self.method:
            return self.method
        if self.scaling == "nv":
            return "nvfp4"
        if self.scaling == "bitnet":
            return _BITNET
        if self.scaling == "loud":
            return "llm-int8" if self.threshold == LOUD else f"llm-int8-{self.threshold:g}"
        kind = f"int{self.bits}" if self.element == "int" else f"fp{self.bits}-{self.element}"
        if self.scaling in ("mx", "ceil"):
            return f"mxfp{self.bits}{'-ceil' * (self.scaling == 'ceil')}{'-e2m3' * (self.bits == 6)}"
        extent = f"g{self.group}-token" if self.extent == "group" else self.extent
        clip = "" if self.clip == 1 else f"-clip{self.clip:g}"
        return f"{kind}-{extent}{'-static' * self.static}{'' if self.symmetric else '-asym'}{clip}"

    @property
    def fixed(self) -> tuple[str, ...]:
        """Names of the parameters that calibration fixes."""
        if self.scaling == "nv":
            return ("gain",)
        if not self.static:
            return ()
        return ("scale",) if self.symmetric else ("scale", "zero")

    def refuses(self, columns: int) -> str | None:
        """Why inputs of so many channels cannot be rounded, or None."""
        if self.extent == "head":
            return "only keys and values have heads: say cache=, not input="
        if self.group and columns % self.group:
            return f"{columns} channels are not a multiple of {self}'s group of {self.group}"
        return None


def llm_int8_inputs(threshold: float = LOUD) -> InputGrid:
    """What LLM.int8() rounds inputs to; channels from ``threshold`` on stay as they are."""
    return InputGrid("int", 8, "token", scaling="loud", threshold=threshold)


def find_inputs(text: str) -> InputGrid | None:
    """The input grid that this lower-case text names, or None."""
    text = _ALSO.get(text, text)
    if text in _SMALL:
        element, bits, scaling = _SMALL[text]
        return InputGrid(element, bits, "group", 16 if scaling == "nv" else 32, scaling=scaling)
    if text == _BITNET:
        return InputGrid("int", 8, "token", scaling="bitnet")
    loud = _LOUD.fullmatch(text)
    if loud is not None:
        return llm_int8_inputs(LOUD if loud[1] is None else float(loud[1]))
    found = _TEXT.fullmatch(text)
    if found is None:
        return None
    kind, extent, early, zero, late, clip = found.groups()
    static, whole = bool(early or late), kind.startswith("int")
    if clip is not None and (not whole or float(clip) == 0):
        return None
    if (static and extent not in ("tensor", "head")) or (early and late) or (zero == "asym" and not whole):
        return None
    if extent == "head" and not (static and zero != "asym"):
        return None
    group = int(extent[1:].partition("-")[0]) if extent.startswith("g") else 0
    element, bits = ("int", int(kind[3:])) if whole else ("e4m3", 8)
    cut = 1.0 if clip is None else float(clip)
    extent = "group" if group else extent
    return InputGrid(element, bits, extent, group, zero != "asym", static, clip=cut)


def parse_inputs(text: str) -> InputGrid:
    """The input grid that ``text`` names.

    Raises:
        BadRecipe: it names none; the message offers the closest spelling.
    """
    wanted = text.strip().lower()
    grid = find_inputs(wanted)
    if grid is not None:
        return grid
    if re.fullmatch(r".*-(token|g\d+|g\d+-token)(-a?sym)?-static(-a?sym)?", wanted):
        raise BadRecipe(
            f"no input grid is called {text!r}: one static scale serves a whole tensor",
            fix="int8-tensor-static, or int8-token, whose scales come with each token",
        )
    close = difflib.get_close_matches(wanted, EXAMPLES, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"for example: {', '.join(EXAMPLES[:8])}"
    raise BadRecipe(f"no input grid is called {text!r}", fix=hint)


def is_cache(grid: InputGrid) -> bool:
    """Whether keys and values can be rounded to ``grid``: with a fixed scale, or whole numbers with a scale
    for each token's head or a run of its channels."""
    if grid.static:
        return str(replace(grid, clip=1.0)) in CACHES
    return (grid.element, grid.scaling) == ("int", "real") and grid.extent in ("token", "group")
