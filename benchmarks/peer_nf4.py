"""bitsandbytes' NF4 on every block linear, its maxima quantized again; in an environment of its own.

peers/hqq/bin/python benchmarks/peer_nf4.py MODEL TOKENS OUT
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

STARTED = time.monotonic()

import torch  # noqa: E402  (the clock starts before the imports, as a user's does)
from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: E402
from peak import peak_rss_mib  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

BLOCK, SUPER = 64, 256  # weights an absolute maximum, maxima a scale of theirs


def main() -> None:
    """Quantize and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    before = time.monotonic()
    packed = {
        name: quantize_4bit(linear.weight.data, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        for name, linear in linears.items()
    }
    seconds = time.monotonic() - before
    options.out.mkdir(parents=True, exist_ok=True)
    dense = {f"{name}.weight": dequantize_4bit(*both).float().contiguous() for name, both in packed.items()}
    save_file(dense, options.out / "linears.safetensors")
    facts = {
        "peer": "bitsandbytes",
        "grid": f"nf4-b{BLOCK}-dq",
        "bpw": 4 + 8 / BLOCK + 32 / (BLOCK * SUPER),
        "linears": len(dense),
        "threads": options.threads,
        "seconds": seconds,
        "seconds_whole": time.monotonic() - STARTED,
        "peak_rss_mib": peak_rss_mib(),
        "versions": {name: version(name) for name in ("bitsandbytes", "torch", "transformers")},
    }
    (options.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
