"""Bytes of llama.cpp's block types: pure layout, between codes with parameters and packed rows.

Layouts follow ``ggml-common.h`` of llama.cpp (ggml-org). A packed tensor is ``out row_bytes`` uint8; every
row is a run of blocks. Sub-fields are little-endian, float16 values are exact by the time they get here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitmill.core.errors import BadFile

Bytes = NDArray[np.uint8]


class BlockType(NamedTuple):
    """A ggml tensor type: its number in a file, weights a block, bytes a block."""

    id: int
    length: int
    bytes_: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` weights, which must be whole blocks."""
        return columns // self.length * self.bytes_


TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "f32": BlockType(0, 1, 4),
        "f16": BlockType(1, 1, 2),
        "bf16": BlockType(30, 1, 2),
        "q4_0": BlockType(2, 32, 18),
        "q4_1": BlockType(3, 32, 20),
        "q5_0": BlockType(6, 32, 22),
        "q5_1": BlockType(7, 32, 24),
        "q8_0": BlockType(8, 32, 34),
        "q4_k": BlockType(12, 256, 144),
        "q6_k": BlockType(14, 256, 210),
    }
)
"""Types whose bytes this module lays out, by their lower-case name."""

_DENSE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def pack(type: str, codes: Tensor, params: Mapping[str, Tensor]) -> Bytes:
    """Packed rows, ``out row_bytes`` uint8, of ``codes`` (``out in``) and their parameters.

    Args:
        type: a name of :data:`TYPES`.
        codes: unsigned codes as stored (int8 for ``q8_0``); for a dense type the values themselves, of any
            rank: all but the last dimension count as rows.
        params: ``d m`` or ``d dmin scales mins``, see :class:`bitmill.grids.kquant.KQuant`.
    """
    if type in _DENSE:
        return _pack_dense(codes)
    out, columns = codes.shape
    kind = TYPES[type]
    q = codes.cpu().contiguous().numpy().reshape(out, columns // kind.length, kind.length)
    fields = _PACK[type](q, {name: value.cpu().contiguous().numpy() for name, value in params.items()})
    packed = np.empty((out, columns // kind.length, kind.bytes_), dtype=np.uint8)
    start = 0
    for field in fields:
        packed[:, :, start : start + field.shape[2]] = field
        start += field.shape[2]
    return packed.reshape(out, -1)


def unpack(type: str, raw: Bytes) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes (``out in``) and parameters of packed rows; the inverse of :func:`pack`.

    Raises:
        BadFile: the rows are not whole blocks of this type.
    """
    kind = TYPES[type]
    if raw.ndim != 2 or raw.dtype != np.uint8 or raw.shape[1] % kind.bytes_:
        raise BadFile(f"{raw.dtype} rows of shape {raw.shape} are not {type} blocks of {kind.bytes_} bytes")
    if type in _DENSE:
        return torch.from_numpy(raw.copy()).view(_DENSE[type]), {}
    out = raw.shape[0]
    codes, params = _UNPACK[type](raw.reshape(out, raw.shape[1] // kind.bytes_, kind.bytes_))
    flat = {name: np.ascontiguousarray(value.reshape(out, -1)) for name, value in params.items()}
    return (
        torch.from_numpy(np.ascontiguousarray(codes.reshape(out, -1))),
        {name: torch.from_numpy(value) for name, value in flat.items()},
    )


def _pack_dense(codes: Tensor) -> Bytes:
    rows = codes.detach().cpu().contiguous().reshape(-1, codes.shape[-1] if codes.dim() else 1)
    return rows.view(torch.uint8).numpy()


def _half(values: np.ndarray) -> np.ndarray:
    """Bytes of float16 values, one a block: ``out blocks`` to ``out blocks 2``."""
    return np.ascontiguousarray(values, dtype="<f2")[..., None].view(np.uint8)


def _unhalf(raw: np.ndarray) -> np.ndarray:
    """The inverse of :func:`_half`, as float32."""
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32)


def _nibbles(q: np.ndarray) -> np.ndarray:
    """Blocks of 32: byte ``j`` holds element ``j`` low and element ``j + 16`` high."""
    return (q[..., :16] & 15) | (q[..., 16:] & 15) << 4


def _unnibbles(raw: np.ndarray) -> np.ndarray:
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _fifth(q: np.ndarray) -> np.ndarray:
    """Bit 4 of 32 codes as a little-endian word: bit ``j`` belongs to element ``j``."""
    return np.packbits(q >> 4, axis=-1, bitorder="little")


def _unfifth(raw: np.ndarray) -> np.ndarray:
    return np.unpackbits(raw, axis=-1, bitorder="little") << 4


def _pack_q4_0(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return _half(p["d"]), _nibbles(q)


def _unpack_q4_0(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return _unnibbles(raw[..., 2:]), {"d": _unhalf(raw[..., :2])}


def _pack_q4_1(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return _half(p["d"]), _half(p["m"]), _nibbles(q)


def _unpack_q4_1(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return _unnibbles(raw[..., 4:]), {"d": _unhalf(raw[..., :2]), "m": _unhalf(raw[..., 2:4])}


def _pack_q5_0(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return _half(p["d"]), _fifth(q), _nibbles(q)


def _unpack_q5_0(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return _unnibbles(raw[..., 6:]) | _unfifth(raw[..., 2:6]), {"d": _unhalf(raw[..., :2])}


def _pack_q5_1(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return _half(p["d"]), _half(p["m"]), _fifth(q), _nibbles(q)


def _unpack_q5_1(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    codes = _unnibbles(raw[..., 8:]) | _unfifth(raw[..., 4:8])
    return codes, {"d": _unhalf(raw[..., :2]), "m": _unhalf(raw[..., 2:4])}


def _pack_q8_0(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return _half(p["d"]), q.view(np.uint8)


def _unpack_q8_0(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return raw[..., 2:].view(np.int8), {"d": _unhalf(raw[..., :2])}


def _pack_q4_k(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    shape = (*q.shape[:2], 8)
    s, m = p["scales"].reshape(shape), p["mins"].reshape(shape)
    # Sub-blocks 4..7 put their low four bits in bytes 8..11 and their top two above sub-blocks 0..3.
    low_s = s[..., :4] | (s[..., 4:] >> 4) << 6
    low_m = m[..., :4] | (m[..., 4:] >> 4) << 6
    rest = (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4
    pairs = q.reshape(*q.shape[:2], 4, 2, 32)
    codes = (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*q.shape[:2], 128)
    return _half(p["d"]), _half(p["dmin"]), low_s, low_m, rest, codes


def _unpack_q4_k(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    low_s, low_m, rest = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scales = np.concatenate([low_s & 63, (rest & 15) | (low_s >> 6) << 4], axis=-1)
    mins = np.concatenate([low_m & 63, (rest >> 4) | (low_m >> 6) << 4], axis=-1)
    codes = raw[..., 16:].reshape(*raw.shape[:2], 4, 1, 32)
    params = {"d": _unhalf(raw[..., :2]), "dmin": _unhalf(raw[..., 2:4]), "scales": scales, "mins": mins}
    return np.concatenate([codes & 15, codes >> 4], axis=3), params


def _pack_q6_k(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    # Each half of 128 is four runs of 32; runs 0 2 and 1 3 share the nibbles of a byte, all four share qh.
    runs = q.reshape(*q.shape[:2], 2, 4, 32)
    low, high = runs & 15, runs >> 4
    ql = np.concatenate([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], axis=-1)
    qh = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    scales = p["scales"].view(np.uint8).reshape(*q.shape[:2], 16)
    return ql.reshape(*q.shape[:2], 128), qh.reshape(*q.shape[:2], 64), scales, _half(p["d"])


def _unpack_q6_k(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    ql = raw[..., :128].reshape(*raw.shape[:2], 2, 2, 32)
    qh = raw[..., 128:192].reshape(*raw.shape[:2], 2, 32)
    low = np.concatenate([ql & 15, ql >> 4], axis=3)
    high = np.stack([(qh >> shift) & 3 for shift in (0, 2, 4, 6)], axis=3)
    return low | high << 4, {"scales": raw[..., 192:208].view(np.int8), "d": _unhalf(raw[..., 208:])}


_PACK = MappingProxyType(
    {
        "q4_0": _pack_q4_0,
        "q4_1": _pack_q4_1,
        "q5_0": _pack_q5_0,
        "q5_1": _pack_q5_1,
        "q8_0": _pack_q8_0,
        "q4_k": _pack_q4_k,
        "q6_k": _pack_q6_k,
    }
)
_UNPACK = MappingProxyType(
    {
        "q4_0": _unpack_q4_0,
        "q4_1": _unpack_q4_1,
        "q5_0": _unpack_q5_0,
        "q5_1": _unpack_q5_1,
        "q8_0": _unpack_q8_0,
        "q4_k": _unpack_q4_k,
        "q6_k": _unpack_q6_k,
    }
)
