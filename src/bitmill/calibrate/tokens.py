"""The calibration tokens of one run: their source, count and hash; the same for the same arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bitmill.calibrate.corpus import Text, default_calibration, load_text, load_texts, weighed
from bitmill.calibrate.sample import sample_text
from bitmill.calibrate.windows import tokenizer_of, windows
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.core.types import Note

OWN = "self"
"""Names, among texts, what the model itself writes."""

SURE = 4  # of those texts, tokens that are the most likely ones before others are drawn
_MATRIX = 2


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token ids ``n T`` and the facts about them that the report repeats."""

    tokens: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    @classmethod
    def none(cls) -> Calibration:
        """No calibration."""
        return cls(torch.empty(0, 0, dtype=torch.int64))


def calibration_tokens(
    source: Checkpoint,
    calib: Sequence[str] | str | Tensor | None,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    chat: bool,
    progress: Callable[[str, int, int, str], None],
) -> Calibration:
    """Windows of token ids for ``source``.

    Args:
        calib: texts by name or path (``self`` is what the model writes), token ids as they are, or None for
            the default mixture.

    Raises:
        Refused: no text, or less than a window of it.
    """
    if isinstance(calib, Tensor):
        return _given(calib)
    notes: tuple[Note, ...] = ()
    if calib is None:
        sampled, notes = _own_words(source, nsamples * seqlen // 2, seed, progress)
        texts = default_calibration(sampled)
    else:
        named = [calib] if isinstance(calib, str) else list(calib)
        texts = _named(source, named, nsamples * seqlen, seed, progress)
    drawn = windows(tokenizer_of(source), texts, seqlen, nsamples, seed=seed, chat=chat)
    return Calibration(drawn.tokens, drawn.facts, (*notes, *drawn.notes))


def _named(
    source: Checkpoint,
    calib: Sequence[str],
    tokens: int,
    seed: int,
    progress: Callable[[str, int, int, str], None],
) -> tuple[Text, ...]:
    """Texts by name; what the model writes itself is written now, or was before."""
    if all(weighed(name)[0] != OWN for name in calib):
        return load_texts(calib)
    own = sample_text(source, tokens=tokens, seed=seed, sure=SURE, progress=progress)
    found = []
    for name in calib:
        plain, weight = weighed(name)
        found.append(replace(own, weight=weight) if plain == OWN else load_text(name))
    return tuple(found)


def _given(tokens: Tensor) -> Calibration:
    if tokens.dim() != _MATRIX or tokens.numel() == 0:
        raise Refused(
            f"calibration tokens have shape {tuple(tokens.shape)}", fix="pass ids of shape samples × length"
        )
    facts = {
        "source": "token ids",
        "windows": tokens.shape[0],
        "window": tokens.shape[1],
        "tokens": tokens.numel(),
    }
    return Calibration(tokens.long(), facts)


def _own_words(
    source: Checkpoint, tokens: int, seed: int, progress: Callable[[str, int, int, str], None]
) -> tuple[Text | None, tuple[Note, ...]]:
    """Text the model writes itself, or a note why there is none."""
    try:
        return sample_text(source, tokens=tokens, seed=seed, progress=progress), ()
    except Refused as refusal:
        note = Note("calibration", "default mixture", f"no text of the model's own: {refusal.what}")
        return None, (note,)
