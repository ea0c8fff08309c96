"""What a request asks for: plain values that somebody else wrote, held to bounds before they are used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bitmill.core.errors import Refused

MOST_BYTES = 16 << 10
"""Of a request's body."""

_SHOWN = 60  # characters of a value that a message quotes
_Chosen = TypeVar("_Chosen")


@dataclass(frozen=True)
class Asked:
    """The fields of one request. Each reader refuses what is not of its kind or not within its bounds."""

    fields: Mapping[str, Any]

    @classmethod
    def read(cls, body: bytes, known: Sequence[str]) -> Asked:
        """The fields of a JSON object.

        Args:
            known: names that there may be.

        Raises:
            Refused: it is no such object.
        """
        try:
            found = json.loads(body.decode("utf-8"), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise Refused(f"the request is not JSON: {error}", fix="a JSON object") from error
        if not isinstance(found, dict):
            raise Refused("the request is not a JSON object", fix='for example {"text": "1.5"}')
        strange = sorted(set(found) - set(known))
        if strange:
            raise Refused(f"there is no field {_quoted(strange[0])}", fix=f"one of: {', '.join(known)}")
        return cls(found)

    def whole(self, name: str, low: int, high: int, usual: int) -> int:
        """A whole number from ``low`` to ``high``."""
        value = self.fields.get(name, usual)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refused(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, usual: float) -> float:
        """A finite number from ``low`` to ``high``."""
        value = self.fields.get(name, usual)
        fit = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not fit or not math.isfinite(value):
            raise _refused(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def word(self, name: str, longest: int, usual: str = "") -> str:
        """Text of at most ``longest`` characters."""
        value = self.fields.get(name, usual)
        if not isinstance(value, str) or len(value) > longest:
            raise _refused(name, value, f"text of at most {longest} characters")
        return value

    def one_of(self, name: str, values: Sequence[_Chosen], usual: _Chosen) -> _Chosen:
        """One of these values."""
        value = self.fields.get(name, usual)
        for known in values:
            if type(known) is type(value) and known == value:
                return known
        raise _refused(name, value, f"one of: {', '.join(map(str, values))}")


def _refused(name: str, value: Any, wanted: str) -> Refused:
    return Refused(f"{name} is {_quoted(value)}", where=name, fix=wanted)


def _quoted(value: Any) -> str:
    said = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
    return said if len(said) <= _SHOWN else f"{said[: _SHOWN - 1]}…"


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")
