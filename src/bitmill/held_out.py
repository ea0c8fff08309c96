"""Text that does not teach but judges: of another kind than what is learned from, since tuning on one kind of
text overfits to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitmill.calibrate.corpus import Text, default_calibration
from bitmill.calibrate.tokens import Calibration
from bitmill.calibrate.windows import tokenizer_of, tokens_sha256, windows
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.tuning_plan import JUDGES

_PREFERRED = ("code", "markdown", "docs")
SHARE = 4  # a part of the mixture no larger than one in so many may be kept aside


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Token ids ``n T`` that teach, and ``m T`` that judge.

    Attributes:
        facts: what judges, for the report: ``text``, ``windows``, ``sha256``.
    """

    taught: Tensor
    judges: Tensor
    facts: Mapping[str, Any]


def held_out(calibration: Calibration, source: Checkpoint) -> HeldOut:
    """The last kind of a mixture, kept aside; text of a kind that is not in it, where it has one kind only;
    the last windows, where there is no such text."""
    tokens = calibration.tokens
    found = [s for s in calibration.facts.get("sources", ()) if s["windows"]]
    kinds = {str(s["kind"]) for s in found}
    if len(kinds) > 1:
        last, count = found[-1], int(found[-1]["windows"])
        alone = sum(s["kind"] == last["kind"] for s in found) == 1
        if alone and count * SHARE <= len(tokens):
            said = f"{last['kind']} ({last['name']}), which does not teach"
            return _told(tokens[:-count], tokens[-count:][:JUDGES], said)
    drawn = _other_kind(source, kinds, tokens.shape[1])
    if drawn is not None:
        return _told(tokens, drawn[0], f"{drawn[1].kind} ({drawn[1].name})")
    held = min(JUDGES, max(1, len(tokens) // 8)) if len(tokens) > 1 else 0
    if not held:
        return _told(tokens, tokens, "the very window that teaches: there is no other")
    return _told(tokens[:-held], tokens[-held:], "windows kept aside, of the calibration's own text")


def _other_kind(source: Checkpoint, kinds: set[str], length: int) -> tuple[Tensor, Text] | None:
    """Windows of a text that every installation carries, of a kind that is not among these."""
    texts = {text.kind: text for text in default_calibration(None)}
    for text in (texts[kind] for kind in _PREFERRED if kind in texts.keys() - kinds):
        try:
            return windows(tokenizer_of(source), (text,), length, JUDGES, seed=0).tokens, text
        except Refused:
            continue  # too short for such windows
    return None


def _told(taught: Tensor, judges: Tensor, text: str) -> HeldOut:
    facts = {"text": text, "windows": len(judges), "sha256": tokens_sha256(judges)}
    return HeldOut(taught, judges, facts)
