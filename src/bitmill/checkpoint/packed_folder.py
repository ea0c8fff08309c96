"""A model folder whose weights are quantized, as a checkpoint: several stored tensors make one weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import read_carried, read_config
from bitmill.checkpoint.safetensors import DENSE, TensorFolder, folder_digest, settled_config
from bitmill.checkpoint.safetensors_write import Planned
from bitmill.core.axes import InputCheckpoint
from bitmill.core.errors import BadFile
from bitmill.core.inputs import InputGrid
from bitmill.core.types import Basis, Inputs, Quantized, TensorFacts
from bitmill.numerics.cache import KEYS, VALUES

_CACHE_SCALE = re.compile(r"(.+?)(?:\.([kv])_proj)?\.([kv]_scale|output_scale)")


@dataclass(frozen=True, eq=False)
class Packed:
    """One quantized weight of a folder.

    Attributes:
        shape: of the dense weight.
        parts: names of the stored tensors it is made of; none where it is one of a stack of weights.
        dense: its values, in ``dtype``.
        stored: codes and parameters, or None when no grid describes how they are laid out.
        dtype: the narrowest type that all its values are exact in.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    dense: Callable[[], Tensor]
    stored: Callable[[], Quantized | None]
    dtype: str = "f32"


@final
class PackedFolder(InputCheckpoint):
    """The weights of ``packed`` by their own names, every other tensor as it is.

    Args:
        folder: the stored tensors.
        config: the whole ``config.json``.
        packed: quantized weights by canonical name.
        aside: stored tensors that are no weights (scales of activations, of a cache).
        inputs: how the inputs of linears are rounded when the model runs, by weight name.
        cache: how keys and values are, by the name of their scale.
        used: stored tensors that are in the values of weights already, or are stacks of several.

    Raises:
        BadFile: a part is missing, belongs to two weights, or to none although it is not a dense weight.
    """

    def __init__(
        self,
        folder: TensorFolder,
        config: Mapping[str, Any],
        packed: Mapping[str, Packed],
        aside: Collection[str] = (),
        inputs: Mapping[str, Inputs] | None = None,
        used: Collection[str] = (),
        cache: Mapping[str, Inputs] | None = None,
    ) -> None:
        self.path: Path = folder.path
        self.folder = folder
        self._packed = packed
        self._inputs = MappingProxyType(dict(inputs or {}))
        self._cache = MappingProxyType(dict(cache or {}))
        told = {name.rpartition(".")[0] for name in self._inputs}
        rest = (name for name in sorted(aside) if not _is_input(name, told))
        self._unread = tuple(name for name in rest if cache_name(name) not in self._cache)
        owners: dict[str, str] = {}
        for name, weight in packed.items():
            for part in weight.parts:
                if folder.record(part) and part in owners:
                    raise BadFile(f"{part!r} belongs to {owners[part]} and to {name}", where=str(self.path))
                owners[part] = name
        facts: dict[str, TensorFacts] = {}
        for record in folder.records.values():
            owner = owners.get(record.name)
            if record.name in aside or record.name in used:
                continue
            if owner is not None:
                facts.setdefault(owner, TensorFacts(owner, packed[owner].shape, packed[owner].dtype))
            elif record.dtype in DENSE:
                facts[record.name] = TensorFacts(record.name, record.shape, DENSE[record.dtype])
            elif record.dtype.startswith(("F8", "U8", "I32", "U32")):
                raise BadFile(
                    f"tensor {record.name!r} ({record.dtype}) belongs to no weight that is described",
                    where=f"{record.path}: quantization_config",
                )
        for name, weight in packed.items():
            facts.setdefault(name, TensorFacts(name, weight.shape, weight.dtype))
        self._facts = MappingProxyType(facts)
        self._quantization = MappingProxyType(dict(config["quantization_config"]))
        plain = {k: v for k, v in config.items() if k != "quantization_config"}
        self._config = MappingProxyType(settled_config(plain, facts))

    def is_packed(self, name: str) -> bool:
        """Whether this weight is one of the quantized ones."""
        return name in self._packed

    @property
    def inputs(self) -> Mapping[str, Inputs]:
        return self._inputs

    @property
    def cache(self) -> Mapping[str, Inputs]:
        return self._cache

    @property
    def unread(self) -> tuple[str, ...]:
        """Stored scales that change what the model's own runtime computes, and nothing here."""
        return self._unread

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return self._facts

    def read(self, name: str) -> Tensor:
        if name in self._packed:
            return self._packed[name].dense()
        if name not in self._facts:
            raise BadFile(f"there is no tensor called {name!r}", where=str(self.path))
        values = self.folder.read(name)
        return values.to(torch.float32) if values.dtype is torch.float64 else values

    def stored(self, name: str) -> Quantized | None:
        return self._packed[name].stored() if name in self._packed else None

    @cached_property
    def _carried(self) -> Mapping[str, bytes]:
        return MappingProxyType(read_carried(self.path))

    @property
    def carried(self) -> Mapping[str, bytes]:
        return self._carried

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The ``quantization_config``, and the free text of the headers under ``safetensors``."""
        return {**self._quantization, "safetensors": dict(self.folder.metadata)}

    @cached_property
    def _digest(self) -> str:
        return folder_digest(
            self.folder, {**self._config, "quantization": dict(self._quantization)}, self._carried
        )

    @property
    def digest(self) -> str:
        return self._digest


def _is_input(name: str, modules: Collection[str]) -> bool:
    """Whether ``name`` is of the inputs of one of ``modules``."""
    module, _, part = name.rpartition(".")
    return part.startswith(("input_", "activation_", "qscale_act")) and module in modules


def from_quantized(shape: tuple[int, int], parts: tuple[str, ...], unpack: Callable[[], Quantized]) -> Packed:
    """A weight whose values are those of its codes."""
    return Packed(shape, parts, lambda: unpack().dense(), unpack)


def checked_inputs(grid: InputGrid, fixed: Mapping[str, Tensor], where: str) -> Inputs:
    """How the inputs of a linear are rounded, once what calibration fixed is sane.

    Raises:
        BadFile: a scale is not positive and finite, or a zero point is none of the grid's numbers.
    """
    half = 2 ** (grid.bits - 1)
    for key, stored in fixed.items():
        value = float(stored)
        if not (
            -half <= value < half and value == round(value) if key == "zero" else 0 < value < float("inf")
        ):
            raise BadFile(f"{value} is no {key} of inputs on {grid}", where=where)
    return Inputs(grid, {key: stored.to(torch.float32).reshape(1) for key, stored in fixed.items()})


def cache_name(stored: str) -> str | None:
    """What the scale of a cache is called here, whatever a file calls it: it may stand beside the projection
    that makes the keys, as a scale of its output, too; None for any other tensor."""
    found = _CACHE_SCALE.fullmatch(stored)
    if found is None:
        return None
    attention, side, part = found.groups()
    part = f"{side}_scale" if part == "output_scale" and side else part
    return f"{attention}.{part}" if part in ("k_scale", "v_scale") and side in (None, part[0]) else None


def stored_cache(folder: TensorFolder, grid: InputGrid, heads: int) -> dict[str, Inputs]:
    """The scales of a cache that a folder holds, by :func:`cache_name`.

    Raises:
        BadFile: one is stored twice, has no partner, is of another shape, or is no scale.
    """
    found: dict[str, Inputs] = {}
    for stored in folder.records:
        name = cache_name(stored)
        if name is None:
            continue
        record, where = folder.record(stored), f"{stored} in {folder.path}"
        if name in found:
            raise BadFile("this scale of a cache is stored twice", where=where)
        shapes = ((heads, 1, 1),) if grid.extent == "head" else ((), (1,), (1, 1))
        if record.dtype not in DENSE or record.shape not in shapes:
            raise BadFile(
                f"it is {record.dtype} {list(record.shape)} and must be a scale of shape {list(shapes[-1])}",
                where=where,
            )
        scale = folder.read(stored).to(torch.float32)
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise BadFile("a scale of a cache is not positive and finite", where=where)
        found[name] = Inputs(grid, {"scale": scale if grid.extent == "head" else scale.reshape(1)})
    for name in found:
        attention, _, part = name.rpartition(".")
        partner = f"{attention}.{'v' if part == 'k_scale' else 'k'}_scale"
        if partner not in found:
            raise BadFile(f"there is {name!r} and no {partner!r}", where=str(folder.path))
    return found


def known_cache(
    folder: TensorFolder,
    grid: InputGrid,
    heads: int,
    attentions: Collection[str],
    basis: Callable[[], Basis] | None = None,
) -> dict[str, Inputs]:
    """How keys and values are rounded, by the name of their scale, stored or not.

    Args:
        heads: of keys.
        attentions: paths of the modules that make them.
        basis: what keys are multiplied by first.

    Raises:
        BadFile: as :func:`stored_cache`; or scales are to be stored, and are not.
    """
    if grid.static:
        found = stored_cache(folder, grid, heads)
        if not found:
            raise BadFile(
                "keys and values are rounded, and no k_scale is in the file", where=str(folder.path)
            )
    else:
        found = {f"{path}.{part}": Inputs(grid) for path in attentions for part in (KEYS, VALUES)}
    return {name: replace(how, basis=basis) if name.endswith(KEYS) else how for name, how in found.items()}


def one_number(folder: TensorFolder, name: str, types: Collection[str] = tuple(DENSE)) -> Tensor:
    """A stored tensor that must be a single number of one of these element types.

    Raises:
        BadFile: it is missing, or something else.
    """
    record = folder.record(name)
    if record.dtype not in types or record.shape not in ((1,), (), (1, 1)):
        raise BadFile(
            f"{record.name!r} is {record.dtype} {list(record.shape)} and must be one number",
            where=str(record.path),
        )
    return folder.read(name)


def check_parts(folder: TensorFolder, parts: Mapping[str, Planned]) -> None:
    """Compare stored tensors with the element types and dimensions they must have.

    Raises:
        BadFile: one is missing or different.
    """
    for name, (dtype, shape) in parts.items():
        record = folder.record(name)
        if (record.dtype, record.shape) != (dtype, shape):
            raise BadFile(
                f"{name!r} is {record.dtype} {list(record.shape)} and must be {dtype} {list(shape)}",
                where=str(folder.path),
            )


def quantization_config(path: Path, method: str) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a folder when it is ``method``'s, None for anything else.

    Raises:
        BadFile: config.json cannot be read.
    """
    if not path.is_dir() or not (path / "config.json").is_file():
        return None
    found = read_config(path).get("quantization_config")
    return found if isinstance(found, dict) and found.get("quant_method") == method else None
