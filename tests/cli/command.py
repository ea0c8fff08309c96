"""Run the command as a user does, in this process: words in, exit code and both outputs out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from bitmill.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a user sees."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON: nothing else may be on it."""
        return json.loads(self.out)


class Command:
    """``command("plan", "smollm2", "Q4_K_M")``."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> Outcome:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        out, err = self._capsys.readouterr()
        code = stop.value.code
        return Outcome(code if isinstance(code, int) else 0, out, err)
