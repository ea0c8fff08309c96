"""What a check found: how grave it is, what, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitmill.core.errors import BitmillError

LEVELS = ("error", "warning", "note")
"""``error``: it does not load, loads as other numbers, or is not safe to load. ``warning``: it does with
something more (a package, a flag), or nobody was seen to do it. ``note``: worth knowing."""


@dataclass(frozen=True)
class Finding:
    """One such thing.

    Attributes:
        level: one of :data:`LEVELS`.
        check: which check found it: ``files structure layout architecture code template tokenizer values
            manifest runtime``.
        what: a sentence.
        where: the file, tensor or key; empty when it is all of it.
        fix: what would work; empty when nothing is to be done.
        source: whose word it is and of when, for facts about other people's programs.
        doubt: ``silent``: it loads, and computes other numbers than are stored; ``unseen``: nobody was seen
            to load it; empty where that is no question.
    """

    level: str
    check: str
    what: str
    where: str = ""
    fix: str = ""
    source: str = ""
    doubt: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "level": self.level,
            "check": self.check,
            "what": self.what,
            "where": self.where,
            "fix": self.fix,
            "source": self.source,
            "doubt": self.doubt,
        }


def of_error(error: BitmillError, check: str, level: str = "error") -> Finding:
    """What was refused, as a finding."""
    return Finding(level, check, error.what, error.where or "", error.fix or "")


def gravest_first(found: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors, then warnings, then notes, each in the order they were found; what was found twice, once."""
    once = dict.fromkeys(found)
    return tuple(sorted(once, key=lambda finding: LEVELS.index(finding.level)))


def as_levels(found: Sequence[Finding], **levels: str) -> tuple[Finding, ...]:
    """``found`` with some levels exchanged: ``error="note"``."""
    return tuple(replace(f, level=levels.get(f.level, f.level)) for f in found)
