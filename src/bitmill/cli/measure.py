"""``bitmill measure``: what a quantized file lost against its original, and whether that is too much."""

from __future__ import annotations

from typing import Any

from bitmill.cli.options import Device, Json, Model, Revision, Text


def measure(
    model: Model, text: Text = None, device: Device = "cpu", revision: Revision = None, json: Json = False
) -> None:
    """Measure."""
    verdict(account(model, model, text, device, revision))


def account(file: str, against: str, text: list[str] | None, device: str, revision: str | None) -> Any:
    """The measurement of ``file`` against ``against``."""


def show(found: Any) -> None:
    """Print."""


def verdict(found: Any) -> None:
    """Exit code."""
