"""One line to a whole cache: what stores keys, what stores values, what stays in 16 bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bitmill.core.cache_words import no_such_scale
from bitmill.core.caches import KEYS, VALUES, CacheMethod, stored_bytes
from bitmill.core.errors import Refused
from bitmill.core.registry import cache_method, cache_spellings

OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "auto": "f16",
        "float16": "f16",
        "bfloat16": "bf16",
        "float32": "f32",
        "fp8_e4m3": "fp8",
        "fp8_e5m2": "fp8-e5m2",
        "q8": "q8_0",
        "q4": "q4_0",
    }
)
"""What other programs call some of the ways."""

_PLAIN = "f16"
_OPTIONS = ("k", "v", "window", "ends", "skip")
_EXAMPLES = "turboquant-3.5; k=q8_0,v=turboquant-3; q4_0-rot,ends=2,window=64; skip=0+29 for single layers"
_LONGEST = 400


@dataclass(frozen=True)
class CacheChoice:
    """How a model's keys and values are stored.

    Attributes:
        keys, values: what stores them.
        window: the latest tokens that stay in 16 bits; None: as many as each method wants.
        ends: the first and the last so many layers stay in 16 bits.
        skip: so do these, counted from 0.
    """

    keys: CacheMethod
    values: CacheMethod
    window: int | None = None
    ends: int = 0
    skip: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Canonical text: :func:`cache_choice` of it is the same choice."""
        alike = self.keys == self.values
        parts = [str(self.keys)] if alike else [f"k={self.keys}", f"v={self.values}"]
        parts += [] if self.window is None else [f"window={self.window}"]
        parts += [f"ends={self.ends}"] if self.ends else []
        return ",".join(parts + ([f"skip={'+'.join(map(str, self.skip))}"] if self.skip else []))

    def of(self, layer: int, layers: int) -> tuple[CacheMethod, CacheMethod]:
        """What stores keys and values of one of ``layers`` layers."""
        if layer in self.skip or min(layer, layers - 1 - layer) < self.ends:
            return cache_method(_PLAIN), cache_method(_PLAIN)
        return self.keys, self.values

    def check(self, layers: int, head: int, value_head: int) -> None:
        """Refuse heads that a method cannot store, and layers that are not there.

        Raises:
            Refused: with what would work.
        """
        for method, size in ((self.keys, head), (self.values, value_head)):
            why = method.refuses(size)
            if why is not None:
                raise Refused(why, where=f"a cache of {self}", fix="f16 goes with every model")
        missing = [layer for layer in self.skip if layer >= layers]
        if missing:
            raise Refused(
                f"there is no layer {missing[0]}: the model has {layers}",
                where=f"a cache of {self}",
                fix=f"layers 0 to {layers - 1}",
            )

    def layer_bytes(
        self,
        layer: int,
        layers: int,
        heads: int,
        sizes: tuple[int, int],
        tokens: int,
        sliding: int | None = None,
        sequences: int = 1,
    ) -> int:
        """Bytes of one layer after ``tokens`` of each sequence, to the byte; ``sizes`` are those of a head of
        keys and of values, ``sliding`` is the window of the layer's attention."""
        methods = self.of(layer, layers)
        return sum(
            stored_bytes(method, part, heads, size, tokens, self.window, sliding, sequences)
            for method, part, size in zip(methods, (KEYS, VALUES), sizes, strict=True)
        )


def cache_choice(text: str) -> CacheChoice:
    """What ``text`` asks for: one method for both, ``keys,values``, or ``k=…,v=…`` with options.

    Raises:
        Refused: it does not parse, or names something that does not exist.
    """
    if len(text) > _LONGEST:
        raise Refused(f"a cache is not described in {len(text)} letters", fix=_EXAMPLES)
    words, options = _split(text)
    if len(words) > 2 or bool(words) == bool({"k", "v"} & options.keys()):
        raise Refused(f"{text!r} does not say once what stores keys and values", fix=_EXAMPLES)
    keys = words[0] if words else options.get("k", _PLAIN)
    values = words[-1] if words else options.get("v", _PLAIN)
    window = _number(options["window"], text) if "window" in options else None
    ends = _number(options.get("ends", "0"), text)
    skip = [_number(part, text) for part in options["skip"].split("+")] if "skip" in options else []
    return CacheChoice(_method(keys), _method(values), window, ends, tuple(sorted(set(skip))))


def _split(text: str) -> tuple[list[str], dict[str, str]]:
    words: list[str] = []
    options: dict[str, str] = {}
    for part in text.strip().lower().split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            words.append(name)
        elif name not in _OPTIONS or name in options:
            raise Refused(
                f"{part.strip()!r} is no option of a cache, or is there twice",
                where=text,
                fix=f"one of: {', '.join(_OPTIONS)}; for example {_EXAMPLES}",
            )
        else:
            options[name] = value
    return words, options


def _method(name: str) -> CacheMethod:
    reason = no_such_scale(name)
    if reason is not None:
        raise Refused(
            f"keys and values cannot be stored as {name!r}: {reason}",
            fix=f"cache={name} in a recipe, and run that file; or --kv fp8, --kv int8-token",
        )
    return cache_method(OTHER_NAMES.get(name, name))


def _number(word: str, text: str) -> int:
    if re.fullmatch(r"\d{1,6}", word) is None:
        raise Refused(f"{word!r} is not a whole number", where=text, fix=f"for example {_EXAMPLES}")
    return int(word)


def spellings() -> tuple[str, ...]:
    """Examples of every method."""
    return cache_spellings()
