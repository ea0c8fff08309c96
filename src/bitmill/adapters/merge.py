"""A model with an adapter added to its weights, as a checkpoint like any other.

Added in float32 to the dense values: rounding happens once, in what is written from it. Tensors say the
precision of the source, so that what is written is kept in that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor

from bitmill.adapters.adapter import Adapter, check_adapter
from bitmill.adapters.base import base_rows
from bitmill.core.axes import Checkpoint, cache_of, inputs_of
from bitmill.core.errors import Refused
from bitmill.core.types import Quantized, TensorFacts

_GONE = ("quantization_config",)


@final
class Merged(Checkpoint):
    """``source`` with ``adapter`` in its weights.

    Args:
        source: the model; what it has quantized is decoded.
        adapter: for it.
        base_grid: round the linears of the blocks to this grid before the adapter is added, as they were when
            it was learned; None adds to the weights as they are.

    Raises:
        Refused: they do not belong together, or the source rounds inputs when it runs.
    """

    def __init__(self, source: Checkpoint, adapter: Adapter, base_grid: str | None = None) -> None:
        if inputs_of(source) or cache_of(source):
            raise Refused(
                "this model rounds inputs or its cache when it runs; merged weights would not say so",
                where=str(source.path),
                fix="give the model it was made from",
            )
        check_adapter(adapter, source)
        self.path: Path = source.path
        self._source, self.adapter = source, adapter
        rows = [] if base_grid is None else base_rows(source, base_grid)
        self._grids = {row.name: row.grid for row in rows if row.solved}
        told = f"{source.digest} {adapter.digest} {base_grid}"
        self._digest = hashlib.sha256(told.encode()).hexdigest()

    @property
    def config(self) -> Mapping[str, Any]:
        return {key: value for key, value in self._source.config.items() if key not in _GONE}

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return self._source.tensors

    def read(self, name: str) -> Tensor:
        values = self._source.read(name)
        if name in self._grids:
            values = self._grids[name].round(values.float()).dense()
        delta = self.adapter.delta(name)
        return values if delta is None else values.float() + delta

    def stored(self, name: str) -> Quantized | None:
        return None

    @property
    def carried(self) -> Mapping[str, bytes]:
        return self._source.carried

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {}

    @property
    def digest(self) -> str:
        return self._digest


def sixteen_bits(source: Checkpoint) -> str:
    """The recipe that writes a merged model in 16 bits: half precision where the source has it, else
    bfloat16."""
    kinds = [fact.dtype for fact in source.tensors.values() if len(fact.shape) > 1]
    return f"{'f16' if kinds.count('f16') > len(kinds) // 2 else 'bf16'} > safetensors"
