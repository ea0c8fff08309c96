"""An adapter's folder, read and checked: LoRA as peft writes it (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitmill.adapters.files import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from bitmill.checkpoint.hf_folder import inside, read_object
from bitmill.checkpoint.safetensors import DENSE, Header, Record, read_header
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadFile, Refused

_PAIR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_MERGE_THERE = "merge it with peft: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
_UNREAD = {
    "use_dora": "it scales weights by their norms (DoRA)",
    "modules_to_save": "it replaces whole modules",
    "lora_bias": "it has biases of its own",
    "fan_in_fan_out": "its weights are transposed",
    "layer_replication": "it repeats layers",
    "target_parameters": "it adapts stacked parameters, not linears",
    "trainable_token_indices": "it replaces embeddings of single tokens",
}


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter adds to each weight.

    Attributes:
        path: its folder.
        base: the model that it says it is for.
        pairs: by canonical weight name, the records of A (``rank in``) and B (``out rank``).
        scales: by that name, what the product counts.
        metadata: free text of the file; what Bitmill noted begins with ``bitmill.``.
        digest: of both files.
    """

    path: Path
    base: str
    pairs: Mapping[str, tuple[Record, Record]]
    scales: Mapping[str, float]
    metadata: Mapping[str, str]
    digest: str

    def delta(self, name: str) -> Tensor | None:
        """What is added to a weight, ``out in`` float32; None for one that it leaves alone."""
        if name not in self.pairs:
            return None
        a, b = (_read(record).float() for record in self.pairs[name])
        return (b @ a) * self.scales[name]


def read_adapter(path: Path) -> Adapter:
    """Open an adapter's folder; headers only.

    Raises:
        Refused: it is no LoRA adapter, or one of a kind that is not merged here.
        BadFile: a file is not what it claims to be.
    """
    if not (path / CONFIG_FILE).is_file():
        raise Refused(
            f"there is no {CONFIG_FILE} in {str(path)!r}",
            fix="give the folder of an adapter as peft writes it",
        )
    config = read_object(inside(path, CONFIG_FILE))
    _refuse_kinds(config, path)
    if not (path / WEIGHTS_FILE).exists():
        pickled = (path / "adapter_model.bin").exists()
        raise Refused(
            f"there is no {WEIGHTS_FILE}" + (", only pickled weights" if pickled else ""),
            where=str(path),
            fix="save the adapter once more with peft's save_pretrained",
        )
    file = inside(path, WEIGHTS_FILE)
    header = read_header(file)
    pairs = _pairs(header, file)
    digest = hashlib.sha256((path / CONFIG_FILE).read_bytes())
    digest.update(file.read_bytes())
    scales = {name: _scale(config, name, int(a.shape[0]), file) for name, (a, _) in pairs.items()}
    base = str(config.get("base_model_name_or_path") or "")
    return Adapter(path, base, pairs, scales, header.metadata, digest.hexdigest())


def check_adapter(adapter: Adapter, source: Checkpoint) -> None:
    """Refuse an adapter whose weights are not the model's.

    Raises:
        Refused: a weight is missing, or has another shape.
    """
    for name, (a, b) in adapter.pairs.items():
        fact = source.tensors.get(name)
        shape = (b.shape[0], a.shape[1])
        if fact is None or tuple(fact.shape) != shape:
            there = "is not there" if fact is None else f"has shape {list(fact.shape)}"
            hint = f"; it says it is for {adapter.base!r}" if adapter.base else ""
            raise Refused(
                f"the adapter changes {name} of shape {list(shape)}, which {there} in this model",
                where=f"{adapter.path} and {source.path}",
                fix=f"give the model that the adapter was made for{hint}",
            )


def _refuse_kinds(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Refused(f"this adapter is {kind!r}; LORA is merged here", where=str(path), fix=_MERGE_THERE)
    for key, why in _UNREAD.items():
        if config.get(key):
            raise Refused(
                f"{key} of this adapter is set: {why}", where=str(path / CONFIG_FILE), fix=_MERGE_THERE
            )
    if config.get("bias", "none") != "none":
        raise Refused("the adapter changes biases", where=str(path / CONFIG_FILE), fix=_MERGE_THERE)


def _pairs(header: Header, file: Path) -> dict[str, tuple[Record, Record]]:
    found: dict[str, dict[str, Record]] = {}
    for record in header.records:
        match = _PAIR.fullmatch(record.name)
        if match is None or record.dtype not in DENSE or len(record.shape) != 2:
            raise Refused(
                f"tensor {record.name!r} ({record.dtype} {list(record.shape)}) is no part of a LoRA pair",
                where=str(file),
                fix=_MERGE_THERE,
            )
        found.setdefault(f"{match[1]}.weight", {})[match[2]] = record
    pairs = {}
    for name, parts in found.items():
        if set(parts) != {"A", "B"} or parts["A"].shape[0] != parts["B"].shape[1]:
            raise BadFile("half of a LoRA pair is missing or of another rank", where=f"{name} in {file}")
        pairs[name] = (parts["A"], parts["B"])
    if not pairs:
        raise BadFile("the adapter holds no weights", where=str(file))
    return pairs


def _scale(config: Mapping[str, Any], name: str, rank: int, file: Path) -> float:
    """``alpha / rank`` (``alpha / √rank`` for rsLoRA), with what patterns say of single modules."""
    path = name.removesuffix(".weight")
    told = _by_pattern(config.get("rank_pattern"), path, config.get("r"), file)
    alpha = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha"), file)
    if told != rank:
        raise BadFile(
            f"{CONFIG_FILE} says rank {told} and the weights have {rank}",
            where=f"{PREFIX}{path} in {file}",
            fix="both files must be of one adapter",
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Any, path: str, default: Any, file: Path) -> float:
    chosen = default
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        if path == pattern or path.endswith(f".{pattern}"):
            chosen = value
            break
        if any(c in pattern for c in "^$*+?()[]|\\"):
            raise Refused(
                f"the pattern {pattern!r} is a regular expression", where=str(file), fix=_MERGE_THERE
            )
    if isinstance(chosen, bool) or not isinstance(chosen, int | float) or not 0 < chosen < 1 << 31:
        raise BadFile(f"rank or alpha is {chosen!r}", where=str(file))
    return float(chosen)


def _read(record: Record) -> Tensor:
    try:
        with safe_open(record.path, framework="pt") as file:
            values = file.get_tensor(record.name)
    except (SafetensorError, OSError) as error:
        raise BadFile(f"cannot read tensor {record.name!r}: {error}", where=str(record.path)) from error
    if not torch.isfinite(values).all():
        raise BadFile(f"tensor {record.name!r} is not finite", where=str(record.path))
    return values
