"""A reference's hidden states on disk: its logits are one product away from them, and it need not run again.

Logits over 49,152 tokens take 85 times the room of the 576 numbers they are made from; made from the same
numbers by the same product they are the same, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MOST_BYTES = 2_000_000_000
_SUFFIX = ".states.safetensors"
_NAME = "hidden"


@dataclass(frozen=True, eq=False)
class States:
    """What is known of a reference.

    Attributes:
        hidden: float32 ``windows scored H``: behind the last block, before the final norm, where a prediction
            is scored.
        floor: the reference against itself under noise, if that was measured with this ``seed``.
    """

    hidden: Tensor
    floor: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Kept:
    """A folder of such states, the oldest removed once they are too many bytes.

    Attributes:
        folder: where they lie; made when the first is kept.
        most_bytes: of all of them together.
    """

    folder: Path
    most_bytes: int = MOST_BYTES

    def read(self, identity: Mapping[str, Any], shape: tuple[int, ...], seed: int) -> States | None:
        """What was kept under this identity; None where nothing was, or what is there is damaged."""
        path = self._path(identity)
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                hidden = file.get_tensor(_NAME)
            floor: Any = json.loads(facts.get("floor", "null"))
            os.utime(path)
        except (OSError, SafetensorError, ValueError):
            return None
        if tuple(hidden.shape) != shape or hidden.dtype != torch.float32:
            return None
        ours = isinstance(floor, dict) and floor.get("seed") == seed
        return States(hidden, {k: v for k, v in floor.items() if k != "seed"} if ours else None)

    def write(self, identity: Mapping[str, Any], states: States, seed: int) -> None:
        """Keep them, unless they alone are too many bytes; the least recently used make room."""
        hidden = states.hidden.contiguous()
        if hidden.numel() * hidden.itemsize > self.most_bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(identity)
        floor = "null" if states.floor is None else json.dumps({**states.floor, "seed": seed})
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        save_file({_NAME: hidden}, unfinished, {"identity": json.dumps(identity), "floor": floor})
        unfinished.replace(path)
        self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        files = sorted(self.folder.glob(f"*{_SUFFIX}"), key=lambda p: p.stat().st_mtime_ns, reverse=True)
        files = [newest, *(path for path in files if path != newest)]
        held = 0
        for path in files:
            held += path.stat().st_size
            if held > self.most_bytes and path != newest:
                path.unlink(missing_ok=True)

    def _path(self, identity: Mapping[str, Any]) -> Path:
        text = json.dumps(identity, sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}{_SUFFIX}"
