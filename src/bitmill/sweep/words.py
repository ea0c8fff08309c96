"""The commands that make a sweep again, whole or one of its files: what is at its default is left out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from bitmill.measurement.measure import Protocol
from bitmill.sweep.errand import Drawn
from bitmill.sweep.tiers import Tier

if TYPE_CHECKING:
    from bitmill.sweep.run import Asked

MATRIX = "imatrix.gguf"


def sweep_command(asked: Asked) -> str:
    """The sweep itself; a model in a local folder goes by its name."""
    protocol, usual = asked.measuring.protocol, Protocol()
    words = ["bitmill", "sweep", named(asked.model), *asked.recipes, "-o", asked.folder.name]
    words += _drawn(asked)
    words += [word for text in asked.measuring.texts or () for word in ("--text", named(text))]
    for name, value, default in (
        ("--window", protocol.window, usual.window),
        ("--windows", protocol.count, usual.count),
        ("--budget", asked.budget, 0),
    ):
        words += [name, str(value)] if value != default else []
    words += ["--no-importance"] * (not asked.importance)
    return shlex.join(words)


def tier_command(asked: Asked, tier: Tier, told: str) -> str:
    """One of its files, by ``quantize``.

    Args:
        told: what the tier is calibrated on: ``importance matrix``, ``text`` or ``nothing``.
    """
    words = ["bitmill", "quantize", named(asked.model), tier.asked]
    words += ["--imatrix", MATRIX] if told == "importance matrix" else []
    words += _drawn(asked) if told == "text" else []
    return shlex.join([*words, "-o", tier.file])


def _drawn(asked: Asked) -> list[str]:
    drawn = asked.drawn
    words = [word for text in drawn.calib or () for word in ("--calib", named(text))]
    for name, value, default in (
        ("--nsamples", drawn.nsamples, Drawn.nsamples),
        ("--seqlen", drawn.seqlen, Drawn.seqlen),
        ("--seed", drawn.seed, Drawn.seed),
        ("--device", drawn.device, Drawn.device),
    ):
        words += [name, str(value)] if value != default else []
    return [*words, *["--chat"] * drawn.chat, *(["--revision", asked.revision] if asked.revision else [])]


def named(text: str) -> str:
    """A name without the folders that it lies in on this machine."""
    path = Path(text).expanduser()
    return path.name if path.exists() and path.name else text
