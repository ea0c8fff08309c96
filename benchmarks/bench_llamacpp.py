"""Files for llama.cpp against llama.cpp's own quantizer: the same types, the same calibration text,
the wide model.

    python benchmarks/bench_llamacpp.py [--types Q4_K_M Q3_K_M ...] [--work FOLDER] [--reuse]

Both sides' files are decoded by the ``gguf`` package, not by Bitmill, and only the block linears
are replaced.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from compare import HERE, Bench, arguments, bench
from ruler import WINDOW, Ruler
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

TYPES = ("Q4_0", "Q4_K_M", "Q6_K")
RECIPES = {"nearest": "nearest : {type} > gguf", "gptq": "gptq : {type} > gguf"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NOTES = """llama.cpp's `llama-quantize` with its importance matrix over 64 windows of 512 tokens of Python's
manual, and Bitmill's files of the same types calibrated on the same tokens; the model is the wide one (every
row a multiple of 256). Both are decoded by the `gguf` package, and the linears inside the blocks replaced.
The peer's seconds are those of `llama-quantize` alone, the importance matrix took {imatrix:.0f} s more;
Bitmill's contain its calibration. KLD in nats."""


def linears(path: Path, config: Any) -> tuple[dict[str, Tensor], float]:
    """The block linears of a Llama GGUF under Hugging Face's names and row order, and their bits a weight;
    the blocks' norms as well, which a transform may have moved."""
    found, bits, weights = {}, 0, 0
    for tensor in gguf.GGUFReader(path).tensors:
        _, layer, part, *_ = [*tensor.name.split("."), "", "", ""]
        if not tensor.name.startswith("blk.") or part not in {**PARTS, **NORMS}:
            continue
        dense = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if part in NORMS:
            found[f"model.layers.{layer}.{NORMS[part]}.weight"] = dense
            continue
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)
        if heads:  # llama.cpp rotates neighbouring rows of a head, Hugging Face its two halves
            dense = dense.view(heads, -1, 2, dense.shape[1]).transpose(1, 2).reshape(dense.shape)
        found[f"model.layers.{layer}.{PARTS[part]}.weight"] = dense.contiguous()
        bits += 8 * int(tensor.n_bytes)
        weights += dense.numel()
    return found, bits / weights


def importance_matrix(both: Bench, tools: Path, source: Path) -> tuple[Path, float]:
    """llama.cpp's importance matrix over the calibration text, and the seconds it took."""
    made = both.work / "results" / "llama.cpp imatrix" / "imatrix.gguf"
    seconds = made.with_name("seconds.txt")
    if not seconds.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        ids = load_file(both.tokens)["input_ids"]
        text = made.with_name("calibration.txt")
        text.write_text(
            AutoTokenizer.from_pretrained(both.wide_model).decode(ids.flatten()), encoding="utf-8"
        )
        before = time.monotonic()
        command = [str(tools / "llama-imatrix"), "-m", str(source), "-f", str(text), "-o", str(made)]
        subprocess.run([*command, "-c", str(WINDOW), "-t", str(both.threads), "--no-ppl"], check=True)
        seconds.write_text(str(time.monotonic() - before))
    return made, float(seconds.read_text())


def main() -> None:
    """Run both sides for every type."""
    parser = arguments(__doc__)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    both = bench(options := parser.parse_args())
    tools = both.work / "peers" / "llamacpp" / "bin"
    folder, facts = both.run_bitmill(both.wide_model, "nearest : f32 > gguf", "wide f32", "--plain")
    source = folder / facts["file"]
    imatrix, seconds = importance_matrix(both, tools, source)
    ruler = Ruler(both.wide_model, both.work / "ruler-wide.safetensors")
    for kind in options.types:
        for name, extra in {"": (), " + imatrix": ("--imatrix", str(imatrix))}.items():
            out = both.work / "results" / f"llama.cpp {kind}{name}"
            command = [
                sys.executable,
                str(HERE / "peer_llamacpp.py"),
                str(tools),
                str(source),
                str(out),
                kind,
            ]
            _scored(both, ruler, out.name, out, both.run([*command, *extra], out))
        for solver, recipe in RECIPES.items():
            name = f"bitmill {solver} {kind}"
            _scored(both, ruler, name, *both.run_bitmill(both.wide_model, recipe.format(type=kind), name))
    both.report("llamacpp", "llama.cpp's types, side by side", NOTES.format(imatrix=seconds))


def _scored(both: Bench, ruler: Ruler, name: str, out: Path, facts: Mapping[str, Any]) -> None:
    weights, bpw = linears(out / facts["file"], ruler.model.config)
    both.add(name, {**facts, "bpw": bpw}, ruler.score_linears(weights))


if __name__ == "__main__":
    main()
