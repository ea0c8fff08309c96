"""gpt-oss folders as OpenAI publishes them: stacks of experts in MXFP4, all else in bfloat16. Read only.

A block of 32 inputs of one output is 16 bytes, the first value of each in the low half, and one E8M0 byte
(OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", arXiv 2508.10925). The stack in the model is transposed:
experts × in × out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import read_config
from bitmill.checkpoint.packed_folder import Packed, PackedFolder, check_parts, quantization_config
from bitmill.checkpoint.read_only import ReadOnly
from bitmill.checkpoint.safetensors import Record, TensorFolder
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadFile
from bitmill.numerics.bits import unpack
from bitmill.numerics.floats import ELEMENTS, decode, power_of_two

METHOD = "mxfp4"

_BLOCKS = "_blocks"
_WIDTH = 32


@final
@dataclass(frozen=True)
class GptOss(ReadOnly):
    """A source: the experts' values are exact in bfloat16, so that ``bf16 > safetensors`` loses nothing."""

    single_file: ClassVar[bool] = False

    @property
    def why(self) -> str:
        return (
            "gpt-oss's stacks of experts are read, not written: tensors of three dimensions are kept as they "
            "are; > compressed-tensors or > bitmill takes the layers around them"
        )

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return quantization_config(path, METHOD) is not None

    def open(self, path: Path) -> Checkpoint:
        """The folder as a checkpoint.

        Raises:
            BadFile: blocks and scales do not fit together.
        """
        folder = TensorFolder(path)
        packed = {
            name.removesuffix(_BLOCKS): _stack(folder, record)
            for name, record in folder.records.items()
            if name.endswith(_BLOCKS)
        }
        return PackedFolder(folder, read_config(path), packed)


def _stack(folder: TensorFolder, blocks: Record) -> Packed:
    if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != _WIDTH // 2 or 0 in blocks.shape:
        raise BadFile(
            f"{blocks.name!r} is {blocks.dtype} {list(blocks.shape)}, not bytes: experts × out × blocks × 16",
            where=str(blocks.path),
        )
    experts, out, groups, _ = blocks.shape
    scales = blocks.name.removesuffix(_BLOCKS) + "_scales"
    check_parts(folder, {scales: ("U8", (experts, out, groups))})
    shape = (experts, groups * _WIDTH, out)
    dense = partial(_dense, folder, blocks.name, scales, shape)
    return Packed(shape, (blocks.name, scales), dense, lambda: None, "bf16")


def _dense(folder: TensorFolder, blocks: str, scales: str, shape: tuple[int, int, int]) -> Tensor:
    """The stack, one expert at a time; bfloat16 holds every product of an E2M1 number and a power of two."""
    packed, exponents = folder.read(blocks), folder.read(scales)
    experts, columns, out = shape
    whole = torch.empty(shape, dtype=torch.bfloat16)
    for expert in range(experts):
        codes = unpack(packed[expert].reshape(out, columns // 2), 4, columns)
        values = decode(codes, ELEMENTS["e2m1"]).reshape(out, -1, _WIDTH)
        values *= power_of_two(exponents[expert])[..., None]
        whole[expert] = values.reshape(out, columns).T
    return whole
