"""Damaged headers by the million: each is refused as a bad file, or read; nothing else may happen.

GGUF and safetensors take turns, in this process, through the very functions that every load goes
through. Counted as failures: any exception but a refusal, an input that takes longer than a
second, and one that allocates more than 64 bytes for each of its own and a quarter of a MiB (every
hundredth is measured; a limit on the process' memory stands over all).

    python benchmarks/fuzz.py [--count 1000000] [--seed 0] [--evidence docs/evidence]
"""

from __future__ import annotations

import argparse
import random
import resource
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare import EVIDENCE, machine, signature
from mutate import damaged_gguf, damaged_safetensors
from ruler import write_json

from bitmill.checkpoint import gguf, safetensors
from bitmill.core.errors import BadFile

SLOW = 1.0  # seconds
MEASURED = 100  # one input of so many has its memory measured
EACH, BESIDE = 64, 1 << 18  # bytes that may be allocated for each byte of an input, and beside
ROOM = 1 << 30  # bytes that the process may grow by
SHOWN = 5
PLACE = Path("damaged")


@dataclass
class Tally:
    """What became of one kind of file."""

    read: int = 0
    refused: int = 0
    failed: int = 0
    slowest: float = 0.0
    most_bytes: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """All of them."""
        return self.read + self.refused + self.failed

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "headers": self.count,
            "read": self.read,
            "refused": self.refused,
            "failed": self.failed,
            "distinct_refusals": len(self.reasons),
            "slowest_ms": round(1000 * self.slowest, 2),
            "most_bytes": self.most_bytes,
            "a_second": round(self.count / max(self.seconds, 1e-9)),
        }


def read_gguf(data: bytes) -> None:
    """As any GGUF file is read."""
    gguf.parse_header(data, PLACE)


def read_safetensors(data: bytes) -> None:
    """As any safetensors file is read."""
    safetensors.parse_header(data, len(data), PLACE)


def run(read: Callable[[bytes], None], inputs: Iterator[bytes], count: int) -> Tally:
    """Put ``count`` inputs through ``read``."""
    tally = Tally()
    began = time.perf_counter()
    for at in range(count):
        data = next(inputs)
        measured = at % MEASURED == 0
        if measured:
            tracemalloc.start()
        start = time.perf_counter()
        try:
            read(data)
            tally.read += 1
        except BadFile as error:
            tally.refused += 1
            tally.reasons["".join(c for c in error.what if not c.isdigit())[:40]] += 1
        except Exception as error:  # whatever it is, it is a failure
            _fail(tally, f"{type(error).__name__}: {error}", data)
        taken = time.perf_counter() - start
        if measured:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            tally.most_bytes = max(tally.most_bytes, peak)
            if peak > EACH * len(data) + BESIDE:
                _fail(tally, f"{peak:,} bytes allocated for {len(data)}", data)
        else:
            tally.slowest = max(tally.slowest, taken)
        if taken > SLOW:
            _fail(tally, f"{taken:.1f} s", data)
    tally.seconds = time.perf_counter() - began
    return tally


def _fail(tally: Tally, why: str, data: bytes) -> None:
    tally.failed += 1
    if len(tally.examples) < SHOWN:
        tally.examples.append(f"{why}: {data[:400].hex()}")


def main() -> None:
    """Damage, read, count, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="headers of both kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evidence", type=Path, default=EVIDENCE)
    options = parser.parse_args()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    room = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    half = -(-options.count // 2)
    sides = {
        "GGUF": (read_gguf, damaged_gguf(random.Random(options.seed))),
        "safetensors": (read_safetensors, damaged_safetensors(random.Random(options.seed + 1))),
    }
    tallies = {}
    for name, (read, inputs) in sides.items():
        tallies[name] = run(read, inputs, half)
        print(name, tallies[name].to_json(), flush=True)
        print("\n".join(tallies[name].examples), end="")
    whole = sum(tally.count for tally in tallies.values())
    failed = sum(tally.failed for tally in tallies.values())
    print(f"{whole:,} damaged headers, {failed} failures")
    _report(options, tallies)
    if failed:
        raise SystemExit(1)


def _report(options: argparse.Namespace, tallies: dict[str, Tally]) -> None:
    about = {**machine(), "threads": 1, "seed": options.seed}
    rows = {name: tally.to_json() for name, tally in tallies.items()}
    write_json(options.evidence / "fuzz.json", {"about": about, "rows": rows})
    whole = sum(tally.count for tally in tallies.values())
    failed = sum(tally.failed for tally in tallies.values())
    lines = [
        "# Damaged headers",
        "",
        f"{whole:,} damaged headers through the functions that every load goes through: {failed} crashes,",
        "hangs or over-allocations. A crash is any exception but a refusal; a hang takes over a second;",
        f"memory is measured for every {MEASURED}th, and may be {EACH} bytes for each byte of the input and",
        f"{BESIDE >> 10} KiB beside.",
        "",
        "| headers of | damaged | read all the same | refused | kinds of refusal | failed | ms | most KiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['headers']:,} | {row['read']:,} | {row['refused']:,} "
            f"| {row['distinct_refusals']:,} | {row['failed']} | {row['slowest_ms']} "
            f"| {row['most_bytes'] / 1024:,.0f} |"
        )
    text = "\n".join([*lines, "", signature(about), ""])
    (options.evidence / "fuzz.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
