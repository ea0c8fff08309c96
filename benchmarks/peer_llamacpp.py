"""llama.cpp's own quantizer on a GGUF file: seconds and size.

python benchmarks/peer_llamacpp.py TOOLS F32.gguf OUT TYPE [--imatrix FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import time
from pathlib import Path


def main() -> None:
    """Quantize and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tools", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("type")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    importance = ["--imatrix", str(options.imatrix)] if options.imatrix else []
    target = options.out / "model.gguf"
    command = [str(options.tools / "llama-quantize"), *importance, str(options.source), str(target)]
    before = time.monotonic()
    subprocess.run([*command, options.type, str(options.threads)], check=True)
    seconds = time.monotonic() - before
    facts = {
        "peer": "llama.cpp",
        "grid": options.type,
        "file": target.name,
        "bytes": target.stat().st_size,
        "threads": options.threads,
        "seconds": seconds,
        "seconds_whole": seconds,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }
    (options.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
