"""Exit codes, which are a contract: scripts and CI may rely on them."""

from __future__ import annotations

GOOD = 0
"""What was asked for was done."""

FAILED = 2
"""Refused or failed; standard error says what, where, and what would work."""

MISSED = 3
"""Measured, and a threshold that was given is not met; or verified, and there is an error in the file."""

UNMEASURED = 4
"""Nothing was measured: no text, or no position with finite logits. Not a pass."""

STOPPED = 130
"""Stopped by Ctrl-C; the same command takes over what is finished."""

LEGEND = (
    "Exit codes: 0 good, 2 refused or failed, 3 a threshold is missed or a file is not sound, 4 nothing was "
    "measured, 130 stopped by Ctrl-C."
)
