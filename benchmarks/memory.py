"""Peak memory of quantizing a model of three billion weights, against the size of one of its blocks.

Writes a random Llama of 3.2 billion bfloat16 weights (6.4 GB, in shards, never whole in memory)
into a scratch folder, quantizes it in a process of its own, reads that process's anonymous memory
50 times a second, and deletes everything. Anonymous memory is what cannot be given back: pages of
the mapped checkpoint are counted apart.

    python benchmarks/memory.py SCRATCH [--recipe RECIPE ...] [--windows 16] [--layers 28]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from compare import EVIDENCE, HERE, machine, signature
from ruler import write_json
from safetensors.torch import save_file

SHARD = 1 << 30  # bytes of weights a file
CHUNK = 1 << 22  # weights written at a time
PERIOD = 0.02  # seconds between two readings
RECIPES = ("nearest : int4-g64-asym > compressed-tensors", "gptq : int4-g64-asym > compressed-tensors")
MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """The synthetic model; the defaults are those of a Llama of 3.2 billion weights."""

    hidden: int = 3072
    mlp: int = 8192
    layers: int = 28
    heads: int = 24
    kv_heads: int = 8
    head: int = 128
    vocabulary: int = 128256

    def config(self) -> dict[str, Any]:
        """The Hugging Face configuration."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def block(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one block's tensors."""
        attention, keys = self.heads * self.head, self.kv_heads * self.head
        return {
            "self_attn.q_proj.weight": (attention, self.hidden),
            "self_attn.k_proj.weight": (keys, self.hidden),
            "self_attn.v_proj.weight": (keys, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, attention),
            "mlp.gate_proj.weight": (self.mlp, self.hidden),
            "mlp.up_proj.weight": (self.mlp, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.mlp),
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self.block().items()}
        return shapes | {"model.norm.weight": (self.hidden,)}

    @property
    def block_bytes(self) -> int:
        """One block in bfloat16."""
        return 2 * sum(_count(shape) for shape in self.block().values())

    @property
    def weights(self) -> int:
        """Of the whole model."""
        return sum(_count(shape) for shape in self.tensors().values())


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def write_model(folder: Path, sizes: Sizes) -> Path:
    """The synthetic checkpoint in shards, a few MiB in memory at a time; written once, then found again."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    noise = (torch.randn(CHUNK, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    ones = torch.ones(sizes.hidden, dtype=torch.bfloat16)
    shards = list(_shards(sizes.tensors()))
    index = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        index |= dict.fromkeys(shapes, name)
        with (folder / name).open("wb") as file:
            _write_header(file, shapes)
            for shape in shapes.values():
                _write_values(file, _count(shape), ones if len(shape) == 1 else noise)
    total = {"metadata": {"total_size": 2 * sizes.weights}, "weight_map": index}
    write_json(folder / "model.safetensors.index.json", total)
    write_json(folder / "config.json", sizes.config())
    return folder


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if shard and 2 * sum(map(_count, [*shard.values(), shape])) > SHARD:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _write_header(file: BinaryIO, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors header: eight bytes of length, then JSON padded to eight bytes."""
    at, entries = 0, {}
    for name, shape in shapes.items():
        end = at + 2 * _count(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _write_values(file: BinaryIO, count: int, values: torch.Tensor) -> None:
    """``count`` values, repeating ``values`` from a place that moves, so that no two rows are alike."""
    data = values.view(torch.uint8).numpy()
    written = 0
    while written < count:
        start = 2 * ((written // CHUNK * 4099) % max(values.numel() // 2, 1))
        part = data[start : start + 2 * (count - written)]
        file.write(part.data)
        written += part.size // 2


def watched(command: list[str], log: Path) -> dict[str, float]:
    """Run a process; its peak anonymous memory and peak resident set in MiB, and its seconds.

    Raises:
        RuntimeError: it failed.
    """
    anonymous = resident = 0
    before = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            known = dict(
                x.split(":", 1) for x in status.read_text().splitlines() if x.startswith(("Rss", "VmHWM"))
            )
            anonymous = max(anonymous, _kib(known.get("RssAnon")))
            resident = max(resident, _kib(known.get("VmHWM")))
            time.sleep(PERIOD)
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {log}")
    seconds = time.monotonic() - before
    return {"anonymous_mib": anonymous / 1024, "resident_mib": resident / 1024, "seconds": seconds}


def _kib(text: str | None) -> int:
    return int(text.split()[0]) if text else 0


def main() -> None:
    """Write the model, run each recipe, report, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "scratch", type=Path, help="10 GB of free disk; everything in it is deleted at the end"
    )
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES))
    parser.add_argument("--windows", type=int, default=16, help="of 512 calibration tokens")
    parser.add_argument("--layers", type=int, default=Sizes.layers)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evidence", type=Path, default=EVIDENCE)
    options = parser.parse_args()
    sizes = Sizes(layers=options.layers)
    work = options.scratch / "bitmill-memory"
    rows = []
    try:
        model = write_model(work / "model", sizes)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, sizes.vocabulary, (options.windows, 512), generator=generator)
        save_file({"input_ids": ids}, work / "tokens.safetensors")
        for recipe in options.recipe:
            out = work / "out"
            command = [
                sys.executable,
                str(HERE / "run_bitmill.py"),
                str(model),
                str(work / "tokens.safetensors"),
            ]
            plain = ["--plain"] if recipe.startswith(("nearest", "hqq")) else []
            command += [str(out), recipe, "--threads", str(options.threads), *plain]
            out.mkdir(parents=True)
            facts = watched(command, work / "log.txt")
            rows.append({"recipe": recipe, "windows": 0 if plain else options.windows, **facts})
            print(rows[-1], flush=True)
            shutil.rmtree(out)
    finally:
        if not rows and (work / "log.txt").is_file():
            print((work / "log.txt").read_text()[-4000:], file=sys.stderr)
        shutil.rmtree(work, ignore_errors=True)
    _report(options.evidence, sizes, options.threads, rows)


def _report(evidence: Path, sizes: Sizes, threads: int, rows: list[dict[str, Any]]) -> None:
    about = {**machine(), "threads": threads, "weights": sizes.weights, "block_mib": sizes.block_bytes / MIB}
    rows = [*_kept(evidence / "memory.json", sizes, {row["recipe"] for row in rows}), *rows]
    write_json(evidence / "memory.json", {"about": about, "rows": rows})
    size = f"{sizes.weights / 1e9:.2f} billion bfloat16 weights ({2 * sizes.weights / MIB:,.0f} MiB)"
    lines = [
        "# Peak memory",
        "",
        f"A random Llama of {size}, {sizes.layers} blocks of {sizes.block_bytes / MIB:,.0f} MiB.",
        "Anonymous memory of the whole process, interpreter and libraries included, read 50 times a second.",
        "",
        "| recipe | windows of 512 | peak anonymous MiB | in blocks | peak resident MiB |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        blocks = row["anonymous_mib"] * MIB / sizes.block_bytes
        lines.append(
            f"| `{row['recipe']}` | {row['windows']} | {row['anonymous_mib']:,.0f} | {blocks:.1f} "
            f"| {row['resident_mib']:,.0f} |"
        )
    text = "\n".join([*lines, "", signature(about), ""])
    (evidence / "memory.md").write_text(text, encoding="utf-8")


def _kept(path: Path, sizes: Sizes, new: set[str]) -> list[dict[str, Any]]:
    """Rows of the same model by other recipes."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    same = found["about"]["weights"] == sizes.weights
    return [row for row in found["rows"] if same and row["recipe"] not in new]


if __name__ == "__main__":
    main()
