"""What the peers' scripts share: the model's linears, the clock, and what is kept of a run."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

STARTED = time.monotonic()

import torch  # noqa: E402  (the clock starts before the imports, as a user's does)
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every peer has."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="safetensors file with input_ids, windows by length")
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def opened(options: argparse.Namespace) -> PreTrainedModel:
    """The original in float32, on as many threads as are allowed."""
    torch.set_num_threads(options.threads)
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)


def block_linears(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """Linear layers inside the blocks, by name."""
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, torch.nn.Linear) and ".layers." in n}


def keep(
    options: argparse.Namespace,
    weights: Mapping[str, torch.Tensor],
    packages: Sequence[str],
    **facts: Any,
) -> None:
    """Write ``linears.safetensors`` (every changed weight, dense float32) and ``facts.json`` into OUT.

    Args:
        weights: by name in the model.
        packages: whose versions count.
        facts: at least ``peer``, ``grid``, ``bpw`` and ``seconds``.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    dense = {name: weight.float().contiguous().clone() for name, weight in weights.items()}
    save_file(dense, options.out / "linears.safetensors")
    whole = {
        **facts,
        "linears": len(dense),
        "threads": options.threads,
        "seconds_whole": time.monotonic() - STARTED,
        "peak_rss_mib": peak_rss_mib(),
        "versions": {name: version(name) for name in (*packages, "torch")},
    }
    (options.out / "facts.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def peak_rss_mib() -> float:
    """The kernel's high-water mark for this program alone, MiB; ``ru_maxrss`` starts at the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
