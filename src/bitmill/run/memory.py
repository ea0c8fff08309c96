"""Memory that this process may still take, and the most that it has taken."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")
_MARKS = Path("/proc/self/clear_refs")


def available_bytes(meminfo: Path = _MEMINFO, group: Path = _GROUP) -> int:
    """Bytes free or easily freed: the kernel's own estimate, within this control group's limit; half of the
    machine's memory where neither is told."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(meminfo), re.MULTILINE)
    free = int(found[1]) * 1024 if found is not None else _installed() // 2
    limit, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
    if limit.isdecimal() and used.isdecimal():
        free = min(free, max(int(limit) - int(used), 0))
    return free


def whole_bytes(group: Path = _GROUP) -> int:
    """Bytes of the machine's memory, or of what this control group may have of it: the same at any time."""
    limit = _text(group / "memory.max").strip()
    return min(_installed(), int(limit)) if limit.isdecimal() else _installed()


def peak_bytes(status: Path = _STATUS) -> int | None:
    """The most memory that this process had at a time since it began, or since :func:`forget_peak`; None
    where the system does not say."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", _text(status), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def forget_peak(marks: Path = _MARKS) -> bool:
    """Start the count of :func:`peak_bytes` again; whether the system does so."""
    try:
        marks.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _installed() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
