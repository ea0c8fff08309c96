"""Required numbers of a GGUF file's metadata, believed only when they make sense."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitmill.checkpoint.gguf import GgufFile
from bitmill.core.errors import BadFile


class Numbers:
    """Reads the keys of one architecture.

    Attributes:
        file: the container.
        arch: what the keys begin with.
    """

    def __init__(self, file: GgufFile, arch: str) -> None:
        self.file, self.arch = file, arch

    @property
    def where(self) -> str:
        """The file, for messages."""
        return str(self.file.path)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands."""
        return self.file.metadata.get(f"{self.arch}.{key}", default)

    def whole(self, key: str, default: Any = None) -> int:
        """A positive whole number.

        Raises:
            BadFile: it is missing, or anything else.
        """
        value = self._one(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self._bad(key, value)
        return value

    def real(self, key: str, default: Any = None) -> float:
        """A positive number, as the shortest decimal; see :meth:`whole`."""
        value = self._one(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self._bad(key, value)
        return shortest(value)

    def window(self) -> int | None:
        """How many tokens back attention reaches; None when it has no limit."""
        return self.whole("attention.sliding_window") if self.get("attention.sliding_window") else None

    def _one(self, key: str, default: Any) -> Any:
        """The value; one number a block counts as one number when all are equal."""
        value = self.get(key, default)
        return value[0] if isinstance(value, list) and len(set(value)) == 1 else value

    def _bad(self, key: str, value: Any) -> BadFile:
        full = f"{self.arch}.{key}"
        return BadFile(f"key {full!r} is {short(value)}; a positive number is needed", where=self.where)


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "…"


def shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
