"""``bitmill inspect``: what is inside a model file, quantized or not."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli import say
from bitmill.cli.imatrix import show as show_imatrix
from bitmill.cli.options import Json, Revision

if TYPE_CHECKING:
    from bitmill.core.axes import Checkpoint

LONGEST = 100  # characters of one metadata value
SAMPLE = 1 << 16  # weights behind the outlier numbers of a large tensor, taken in whole rows
WORST = 12


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A model file, a folder, a hub id, smollm2, or an importance matrix.",
            show_default=False,
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="A line for every tensor.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="Every metadata key.")] = False,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Largest |w| against the root mean square; reads the weights.")
    ] = False,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """List what is inside a model file: grids, bits, sizes, metadata.

    With --outliers also the largest weight of each tensor against the root mean square. A ratio of 4 to 6 is
    a bell curve; far above it a few weights set the scale of all their neighbours, and smaller groups, awq or
    a rotation pay.

        bitmill inspect model.gguf
        bitmill inspect ./model --outliers --json
    """
    from bitmill.caching import said_of_cache
    from bitmill.checkpoint.imatrix import is_imatrix, read_imatrix
    from bitmill.core.axes import cache_of
    from bitmill.source import open_source

    if is_imatrix(Path(file)):
        show_imatrix(read_imatrix(Path(file)), file, json)
        return
    checkpoint = open_source(file, revision=revision)
    entries = [_entry(checkpoint, name, outliers) for name in checkpoint.tensors]
    whole = {
        "path": str(checkpoint.path),
        "architecture": checkpoint.config.get("model_type"),
        "tensors": len(entries),
        "parameters": sum(e["parameters"] for e in entries),
        "bits": sum(e["bits"] for e in entries),
    }
    whole["bpw"] = whole["bits"] / max(whole["parameters"], 1)
    whole["cache"] = {name: str(how.grid) for name, how in cache_of(checkpoint).items()}
    plain = {key: _plain(value) for key, value in checkpoint.metadata.items()}
    if json:
        say.emit({**whole, "metadata": plain, "entries": entries})
        return
    say.result(
        f"{whole['path']}: {whole['architecture']}, {whole['parameters']:,} weights in {len(entries)} tensors"
    )
    say.result(f"{say.size(whole['bits'] / 8)} of tensor data, {whole['bpw']:.3f} bits a weight\n")
    say.result(_by_grid(entries) if not tensors else _by_tensor(entries))
    cached = said_of_cache(checkpoint)
    if cached is not None:
        say.result(f"\n{cached}")
    if outliers:
        say.result(f"\nlargest |w| against the root mean square, the {WORST} worst")
        worst = sorted(entries, key=lambda e: -e["outlier"])[:WORST]
        say.result(
            say.table(["tensor", "ratio"], [[e["name"], f"{e['outlier']:.1f}"] for e in worst], right=(1,))
        )
    keys = plain if metadata else {k: v for k, v in plain.items() if not k.startswith("tokenizer.")}
    if keys:
        say.result("\nmetadata")
        say.result(
            "\n".join(f"  {key} = {say.shortened(str(value), LONGEST)}" for key, value in keys.items())
        )


def _entry(checkpoint: Checkpoint, name: str, outliers: bool) -> dict[str, Any]:
    from bitmill.core.axes import inputs_of, torch_dtype

    fact = checkpoint.tensors[name]
    stored = checkpoint.stored(name)
    inputs = inputs_of(checkpoint).get(name)
    count = prod(fact.shape)
    dense = torch_dtype(fact.dtype).itemsize * 8 * count
    entry: dict[str, Any] = {
        "name": name,
        "shape": list(fact.shape),
        "grid": fact.dtype if stored is None else str(stored.grid),
        "inputs": None if inputs is None else str(inputs),
        "parameters": count,
        "bits": dense if stored is None or len(fact.shape) != 2 else stored.bits,
    }
    if outliers:
        entry["outlier"] = _outlier(checkpoint, name)
    return entry


def _outlier(checkpoint: Checkpoint, name: str) -> float:
    w = checkpoint.read(name).float()
    if w.dim() == 2:
        step = max(1, w.numel() // SAMPLE)
        w = w[::step]
    power = float(w.square().mean().sqrt())
    return float(w.abs().max()) / power if power else 0.0


def _by_grid(entries: list[dict[str, Any]]) -> str:
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        found.setdefault(_stored(entry), []).append(entry)
    rows = []
    for grid, members in sorted(found.items(), key=lambda item: -sum(e["bits"] for e in item[1])):
        weights, bits = sum(e["parameters"] for e in members), sum(e["bits"] for e in members)
        rows.append([grid, len(members), f"{weights:,}", f"{bits / max(weights, 1):.3f}", say.size(bits / 8)])
    return say.table(["stored on", "tensors", "weights", "bits", "size"], rows, right=(1, 2, 3, 4))


def _by_tensor(entries: list[dict[str, Any]]) -> str:
    rows = [
        [
            e["name"],
            "×".join(map(str, e["shape"])),
            _stored(e),
            f"{e['bits'] / max(e['parameters'], 1):.3f}",
            say.size(e["bits"] / 8),
        ]
        for e in entries
    ]
    return say.table(["tensor", "shape", "stored on", "bits", "size"], rows, right=(3, 4))


def _stored(entry: dict[str, Any]) -> str:
    return f"{entry['grid']}, inputs {entry['inputs']}" if entry["inputs"] else str(entry["grid"])


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return f"[{len(value)} values]" if len(value) > 8 else list(value)
    return value if isinstance(value, bool | int | float | str | dict) else str(value)
