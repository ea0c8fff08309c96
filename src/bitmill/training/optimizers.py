"""AdamW for adapters: torch's, or bitsandbytes' with states of eight bits, which may also be paged; its state
goes into a file of tensors and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.core.errors import Refused

CHOICES = ("auto", "adamw", "adamw8bit", "paged-adamw8bit", "paged-adamw32bit")
BETAS = (0.9, 0.999)
_NUMBER = "number"


def optimizer_for(
    parameters: Sequence[nn.Parameter], choice: str, rate: float
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer and what it is: ``auto`` takes eight-bit states on a GPU where bitsandbytes is installed,
    and torch's AdamW otherwise.

    Raises:
        Refused: what was asked for by name is not there.
    """
    on_gpu = parameters[0].device.type == "cuda"
    if choice == "adamw" or (choice == "auto" and not on_gpu):
        return torch.optim.AdamW(parameters, rate, BETAS, weight_decay=0.0), "adamw"
    try:
        from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
    except ImportError as error:
        if choice == "auto":
            return torch.optim.AdamW(parameters, rate, BETAS, weight_decay=0.0), "adamw"
        raise Refused(f"--optimizer {choice} needs bitsandbytes", fix="pip install bitsandbytes") from error
    name = "adamw8bit" if choice == "auto" else choice
    if name.startswith("paged") and not on_gpu:
        raise Refused(f"{name} pages between a GPU and the machine's memory", fix="--optimizer adamw8bit")
    made = {"adamw8bit": AdamW8bit, "paged-adamw8bit": PagedAdamW8bit}
    cls = made.get(name, PagedAdamW32bit)
    return cls(parameters, lr=rate, betas=BETAS, weight_decay=0.0), name


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The whole state as tensors by name."""
    found: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        found.update(_flat(f"optimizer/{index}", state))
    return found


def restore(optimizer: torch.optim.Optimizer, kept: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`state_of`."""
    states: dict[int, dict[str, Any]] = {}
    for name, value in kept.items():
        if not name.startswith("optimizer/"):
            continue
        _, index, *path = name.split("/")
        place = states.setdefault(int(index), {})
        for part in path[:-1]:
            if part == _NUMBER:
                break
            place = place.setdefault(part, {})
        is_number = path[-2:-1] == [_NUMBER]
        place[path[-1]] = _number(value) if is_number else value.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _flat(prefix: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            found[f"{prefix}/{key}"] = value.detach().cpu().clone()
        elif isinstance(value, Mapping):
            found.update(_flat(f"{prefix}/{key}", value))
        elif isinstance(value, int | float):
            found[f"{prefix}/{_NUMBER}/{key}"] = torch.tensor(value, dtype=torch.float64)
    return found


def _number(value: Tensor) -> int | float:
    number = float(value)
    return int(number) if number.is_integer() else number
