"""Sizes as people write them."""

from __future__ import annotations

import re
from math import floor

from bitmill.core.errors import BadRecipe

_UNITS = "kmgt"


def size_of(text: str) -> int:
    """Bytes of ``80MiB`` (units of 1024), ``80M`` or ``1.5 GB`` (units of 1000), or a plain number.

    Raises:
        BadRecipe: it is none of these, or less than a byte.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)([kmgt]?)(i?)b?", text.strip().lower().replace(" ", ""))
    size = 0
    if found is not None and (found[2] or not found[3]):
        unit = (1024 if found[3] else 1000) ** (_UNITS.index(found[2]) + 1 if found[2] else 0)
        size = floor(float(found[1]) * unit)
    if size < 1:
        raise BadRecipe(f"{text!r} is no size", fix="for example 500M, 80MiB or 4.2GB")
    return size
