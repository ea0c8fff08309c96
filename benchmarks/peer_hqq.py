"""The hqq package on every block linear, in an environment of its own; no calibration.

peers/hqq/bin/python benchmarks/peer_hqq.py MODEL TOKENS OUT --bits 4
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

STARTED = time.monotonic()

import torch  # noqa: E402  (the clock starts before the imports, as a user's does)
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # noqa: E402
from peak import peak_rss_mib  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

COSTS = 2 * 16  # bits a group: scale and zero point, stored in half precision


def main() -> None:
    """Quantize and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    wanted = BaseQuantizeConfig(nbits=options.bits, group_size=options.group, axis=1)
    before = time.monotonic()
    packed = {
        name: HQQLinear(linear, wanted, compute_dtype=torch.float32, device="cpu", del_orig=False)
        for name, linear in linears.items()
    }
    seconds = time.monotonic() - before
    options.out.mkdir(parents=True, exist_ok=True)
    dense = {f"{name}.weight": layer.dequantize().float().contiguous() for name, layer in packed.items()}
    save_file(dense, options.out / "linears.safetensors")
    facts = {
        "peer": "hqq",
        "grid": f"int{options.bits}-g{options.group}-fz",
        "bpw": options.bits + COSTS / options.group,
        "linears": len(dense),
        "threads": options.threads,
        "seconds": seconds,
        "seconds_whole": time.monotonic() - STARTED,
        "peak_rss_mib": peak_rss_mib(),
        "versions": {name: version(name) for name in ("hqq", "torch", "transformers")},
    }
    (options.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
