"""Peak resident memory of this process. ``ru_maxrss`` would not do: it starts at the parent's size."""

from __future__ import annotations

from pathlib import Path


def peak_rss_mib() -> float:
    """The kernel's high-water mark for this program alone, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
