"""An adapter's files, known to the byte before anything is learned; peft's description of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

from bitmill.checkpoint.safetensors_write import Planned, safetensors_images, text_image
from bitmill.core.errors import Refused
from bitmill.core.types import FileImage, Row

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
PEFT_PIP = "pip install 'bitmill[finetune]', or pip install peft"
_LARGE = 1 << 50


def adapter_tensors(rows: Sequence[Row], rank: int) -> dict[str, Planned]:
    """Names, types and shapes of an adapter's tensors, as peft stores them."""
    found: dict[str, Planned] = {}
    for row in rows:
        path = f"{PREFIX}{row.name.removesuffix('.weight')}"
        found[f"{path}.lora_A.weight"] = ("F32", (rank, row.shape[1]))
        found[f"{path}.lora_B.weight"] = ("F32", (row.shape[0], rank))
    return found


def targets(rows: Sequence[Row], experts: bool) -> list[str]:
    """What peft calls the linears that get an adapter: by their last names, or one by one beside experts,
    whose linears are called the same."""
    paths = [row.name.removesuffix(".weight") for row in rows]
    return sorted(paths if experts else {path.rpartition(".")[2] for path in paths})


def lora_config(rank: int, alpha: float, modules: Sequence[str], model: str) -> Any:
    """peft's description of the adapter.

    Raises:
        Refused: peft is not installed, or rank or alpha are not above 0.
    """
    if rank < 1 or not 0 < alpha < float("inf"):
        raise Refused(
            f"an adapter of rank {rank} and alpha {alpha}", fix="numbers above 0, such as 16 and 32"
        )
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise Refused("learning an adapter needs peft", fix=PEFT_PIP) from error
    counts: Any = int(alpha) if float(alpha).is_integer() else alpha
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model,
        r=rank,
        lora_alpha=counts,
        lora_dropout=0.0,
        target_modules=list(modules),
        bias="none",
    )


def adapter_images(
    rows: Sequence[Row], rank: int, config: Any, facts: Mapping[str, str]
) -> tuple[FileImage, ...]:
    """Both files of an adapter, to the byte."""
    told = {**_plain(config.to_dict()), "inference_mode": True}
    text = json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    metadata = {f"bitmill.{key}": value for key, value in facts.items()}
    weights = safetensors_images(adapter_tensors(rows, rank), metadata, _LARGE)[0]
    return (text_image(CONFIG_FILE, text.encode()), replace(weights, path=WEIGHTS_FILE))


def _plain(value: Any) -> Any:
    """JSON values; sets in order, so that the same adapter is the same bytes."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
