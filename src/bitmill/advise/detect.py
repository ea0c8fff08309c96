"""What this machine has, as its kernel and drivers say it: nothing is installed, and no card is woken up."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bitmill.advise.hardware import Card, known_card

FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "i8mm",
)
"""Extensions of a processor that matter to the products of quantized models."""
_BUS = 15.8e9  # PCIe 3 with 16 lanes: what a card has at least, where nothing says more
_MIB = 1 << 20
_QUERY = ("nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits")
_WAIT = 10.0  # seconds for a driver to answer

Ask = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class Processor:
    """The processor: name, the extensions it has of :data:`FEATURES`, cores this process may use."""

    name: str
    features: tuple[str, ...]
    cores: int


def processor(cpuinfo: Path = Path("/proc/cpuinfo"), group: Path = Path("/sys/fs/cgroup")) -> Processor:
    """The processor, with the cores that this process is bound to, within its group's share."""
    text = _read(cpuinfo)
    fields = dict(re.findall(r"^(flags|Features|model name)\s*:\s*(.*)$", text, re.MULTILINE))
    words = set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())
    name = fields.get("model name", "").strip() or platform.processor() or platform.machine()
    return Processor(name, tuple(f for f in FEATURES if f in words), _cores(group))


def _cores(group: Path) -> int:
    bound = len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count() or 1
    share = re.fullmatch(r"(\d+) (\d+)\s*", _read(group / "cpu.max"))
    if share is not None and int(share[2]):
        bound = min(bound, max(int(share[1]) // int(share[2]), 1))
    return bound


def cards(ask: Ask | None = None, drm: Path = Path("/sys/class/drm")) -> tuple[Card, ...]:
    """The cards of this machine, with the memory that is free on each; () without any.

    Args:
        ask: runs a command and gives its output, empty when that fails; the machine's own by default.
        drm: where the kernel shows AMD's cards.
    """
    ask = _ask if ask is None else ask
    found = _nvidia(ask(_QUERY)) or _amd(drm)
    if not found and torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        found = (_described(torch.cuda.get_device_properties(0).name, free),)
    if not found and platform.system() == "Darwin":
        return _apple(ask(("sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize")))
    return found


def _nvidia(said: str) -> tuple[Card, ...]:
    rows = [line.rsplit(",", 1) for line in said.splitlines() if line.count(",")]
    return tuple(
        _described(name.strip(), int(free) * _MIB) for name, free in rows if free.strip().isdecimal()
    )


def _amd(drm: Path) -> tuple[Card, ...]:
    found = []
    for total in sorted(drm.glob("card*/device/mem_info_vram_total")):
        used = _read(total.with_name("mem_info_vram_used")).strip()
        name = _read(total.with_name("product_name")).strip() or "AMD card"
        if _read(total).strip().isdecimal():
            found.append(_described(name, int(_read(total)) - int(used if used.isdecimal() else 0)))
    return tuple(found)


def _apple(said: str) -> tuple[Card, ...]:
    lines = said.splitlines()
    if len(lines) != 2 or not lines[1].strip().isdecimal():
        return ()
    size, card = int(lines[1]), known_card(lines[0])
    share = 2 / 3 if size <= 36 << 30 else 3 / 4
    return () if card is None else (replace(card, bytes_=round(size * share)),)


def _described(name: str, free: int) -> Card:
    """What the table knows of a card, with the memory that the driver says is free."""
    known = known_card(name)
    if known is None:
        return Card(name, free, bus=_BUS, source="the driver; its speed is not in the table")
    return replace(known, name=name, bytes_=free)


def disk_bytes(folder: Path) -> int:
    """Bytes free where ``folder`` is, or would be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def read_bandwidth(bytes_: int = 128 << 20, rounds: int = 3) -> float:
    """Bytes a second at which this process reads main memory with all its threads: the best of some rounds.

    Takes about a tenth of a second; other work on the machine makes it less.
    """
    block = torch.ones(bytes_ // 4, dtype=torch.int32)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        block.max()
        best = max(best, bytes_ / (time.perf_counter() - start))
    return best


def _ask(words: Sequence[str]) -> str:
    try:
        run = subprocess.run(words, capture_output=True, text=True, timeout=_WAIT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout if run.returncode == 0 else ""


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
