"""The command line's own fixture."""

from __future__ import annotations

import pytest

from tests.cli.command import Command


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command ``bitmill``."""
    return Command(capsys)
