"""Bytes of llama.cpp's block types: pure layout, between codes with parameters and packed rows.

Layouts follow ``ggml-common.h`` of llama.cpp (ggml-org). A packed tensor is ``out row_bytes`` uint8; every
row is a run of blocks. Sub-fields are little-endian, float16 values are exact by the time they get here.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitmill.core.errors import BadFile
from bitmill.numerics import float_layout as small
from bitmill.numerics import iquant_layout as iq
from bitmill.numerics.iquant_layout import half, nibbles, unhalf, unnibbles

Bytes = NDArray[np.uint8]
_SHARE = 1 << 17  # codes worth a thread: the calls of a share take as long as 2^16 codes
_LARGEST_SHARE = 1 << 22  # codes; what is made of them takes some 30 MiB


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
        "q2_k": BlockType(10, 256, 84),
        "q3_k": BlockType(11, 256, 110),
        "q4_k": BlockType(12, 256, 144),
        "q5_k": BlockType(13, 256, 176),
        "q6_k": BlockType(14, 256, 210),
        "iq2_xxs": BlockType(16, 256, 66),
        "iq2_xs": BlockType(17, 256, 74),
        "iq3_xxs": BlockType(18, 256, 98),
        "iq1_s": BlockType(19, 256, 50),
        "iq4_nl": BlockType(20, 32, 18),
        "iq3_s": BlockType(21, 256, 110),
        "iq2_s": BlockType(22, 256, 82),
        "iq4_xs": BlockType(23, 256, 136),
        "iq1_m": BlockType(29, 256, 56),
        "tq1_0": BlockType(34, 256, 54),
        "tq2_0": BlockType(35, 256, 66),
        "mxfp4": BlockType(39, 32, 17),
        "nvfp4": BlockType(40, 64, 36),
    }
)
"""Types whose bytes this module lays out, by their lower-case name."""

_HELD = {"mxfp4-floor": "mxfp4", "nvfp4-flat": "nvfp4"}

_DENSE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def type_of(grid: str) -> str:
    """Name of the type that holds a grid's values: its own, but where two rules of rounding share one."""
    return _HELD.get(grid, grid)


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
    kind = TYPES[type]
    out, count = codes.shape[0], codes.shape[1] // _codes_of_a_block(type)
    q = codes.cpu().contiguous().numpy().reshape(out, count, -1)
    p = {name: value.cpu().contiguous().numpy() for name, value in params.items()}
    p = {
        name: value.reshape(out, count) if name in ("d", "m", "dmin") else value for name, value in p.items()
    }
    packed = np.empty((out, count, kind.bytes_), dtype=np.uint8)

    def fill(first: int, last: int) -> None:
        rows = slice(first, last)
        own = {name: value[rows] if value.shape[:1] == (out,) else value for name, value in p.items()}
        start = 0
        for field in _PACK[type](q[rows], own):
            packed[rows, :, start : start + field.shape[2]] = field
            start += field.shape[2]

    threads = max(1, min(torch.get_num_threads(), q.size // _SHARE))
    shares = max(1, min(out, threads * -(-q.size // (threads * _LARGEST_SHARE))))
    edges = [out * k // shares for k in range(shares + 1)]
    if threads == 1:
        for first, last in pairwise(edges):
            fill(first, last)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, edges[:-1], edges[1:]))
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


def _codes_of_a_block(type: str) -> int:
    """A code is a weight, or eight of them where they are a point of a codebook."""
    return TYPES[type].length // (8 if type.startswith(("iq1", "iq2", "iq3")) else 1)


def _pack_dense(codes: Tensor) -> Bytes:
    rows = codes.detach().cpu().contiguous().reshape(-1, codes.shape[-1] if codes.dim() else 1)
    return rows.view(torch.uint8).numpy()


def _fifth(q: np.ndarray) -> np.ndarray:
    """Bit 4 of 32 codes as a little-endian word: bit ``j`` belongs to element ``j``."""
    return np.packbits(q >> 4, axis=-1, bitorder="little")


def _unfifth(raw: np.ndarray) -> np.ndarray:
    return np.unpackbits(raw, axis=-1, bitorder="little") << 4


def _pack_q4_0(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return half(p["d"]), nibbles(q)


def _unpack_q4_0(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return unnibbles(raw[..., 2:]), {"d": unhalf(raw[..., :2])}


def _pack_q4_1(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return half(p["d"]), half(p["m"]), nibbles(q)


def _unpack_q4_1(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return unnibbles(raw[..., 4:]), {"d": unhalf(raw[..., :2]), "m": unhalf(raw[..., 2:4])}


def _pack_q5_0(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return half(p["d"]), _fifth(q), nibbles(q)


def _unpack_q5_0(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return unnibbles(raw[..., 6:]) | _unfifth(raw[..., 2:6]), {"d": unhalf(raw[..., :2])}


def _pack_q5_1(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return half(p["d"]), half(p["m"]), _fifth(q), nibbles(q)


def _unpack_q5_1(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    codes = unnibbles(raw[..., 8:]) | _unfifth(raw[..., 4:8])
    return codes, {"d": unhalf(raw[..., :2]), "m": unhalf(raw[..., 2:4])}


def _pack_q8_0(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return half(p["d"]), q.view(np.uint8)


def _unpack_q8_0(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return raw[..., 2:].view(np.int8), {"d": unhalf(raw[..., :2])}


def _woven(runs: np.ndarray, width: int) -> np.ndarray:
    """Bytes ``… 32`` of codes ``… k 32``: run ``j`` gives ``width`` low bits to bits ``j·width`` and up.

    Eight bytes go as one word: what is shifted stays inside its byte, because ``k·width`` is 8 at most.
    """
    words, low = np.ascontiguousarray(runs).view(np.uint64), np.uint64(0x0101010101010101 * (2**width - 1))
    packed = words[..., 0, :] & low
    for j in range(1, words.shape[-2]):
        packed |= (words[..., j, :] & low) << np.uint64(j * width)
    return packed.view(np.uint8)


def _pairs_of_bits(q: np.ndarray) -> np.ndarray:
    """Blocks of 256: byte ``l`` of a half holds two bits of elements ``l, l + 32, l + 64, l + 96``."""
    return _woven(q.reshape(*q.shape[:2], 2, 4, 32), 2).reshape(*q.shape[:2], 64)


def _unpairs_of_bits(raw: np.ndarray) -> np.ndarray:
    halves = raw.reshape(*raw.shape[:2], 2, 32)
    return np.stack([(halves >> shift) & 3 for shift in (0, 2, 4, 6)], axis=3).reshape(*raw.shape[:2], 256)


def _plane(bits: np.ndarray) -> np.ndarray:
    """Blocks of 256 single bits: bit ``b`` of byte ``l`` belongs to element ``l + 32 b``."""
    return _woven(bits.reshape(*bits.shape[:2], 8, 32), 1)


def _unplane(raw: np.ndarray) -> np.ndarray:
    return np.unpackbits(raw[:, :, None], axis=2, bitorder="little").reshape(*raw.shape[:2], 256)


def _pack_q2_k(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    both = (p["scales"] | p["mins"] << 4).reshape(*q.shape[:2], 16)
    return both, _pairs_of_bits(q), half(p["d"]), half(p["dmin"])


def _unpack_q2_k(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    both = raw[..., :16]
    params = {"d": unhalf(raw[..., 80:82]), "dmin": unhalf(raw[..., 82:])}
    return _unpairs_of_bits(raw[..., 16:80]), params | {"scales": both & 15, "mins": both >> 4}


def _pack_q3_k(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    # Six-bit scales, 32 added: nibbles of scales j and j + 8 share a byte, four pairs of top bits another.
    s = (p["scales"].astype(np.int16) + 32).astype(np.uint8).reshape(*q.shape[:2], 16)
    low = (s[..., :8] & 15) | (s[..., 8:] & 15) << 4
    top = (s >> 4).reshape(*q.shape[:2], 4, 4)
    high = top[..., 0, :] | top[..., 1, :] << 2 | top[..., 2, :] << 4 | top[..., 3, :] << 6
    return _plane(q >> 2), _pairs_of_bits(q), low, high, half(p["d"])


def _unpack_q3_k(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    low, high = raw[..., 96:104], raw[..., 104:108]
    top = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1)
    scales = (np.concatenate([low & 15, low >> 4], axis=-1) | top << 4).astype(np.int16) - 32
    codes = _unpairs_of_bits(raw[..., 32:96]) | _unplane(raw[..., :32]) << 2
    return codes, {"d": unhalf(raw[..., 108:]), "scales": scales.astype(np.int8)}


def _scales_and_mins(p: Mapping[str, np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Eight six-bit scales and mins in twelve bytes: sub-blocks 4..7 put their low four bits in the last four
    and their top two above sub-blocks 0..3."""
    s, m = p["scales"].reshape(*shape, 8), p["mins"].reshape(*shape, 8)
    low_s = s[..., :4] | (s[..., 4:] >> 4) << 6
    low_m = m[..., :4] | (m[..., 4:] >> 4) << 6
    return low_s, low_m, (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4


def _head_of_k(raw: np.ndarray) -> dict[str, np.ndarray]:
    """The first 16 bytes of ``q4_k`` and ``q5_k``."""
    low_s, low_m, rest = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scales = np.concatenate([low_s & 63, (rest & 15) | (low_s >> 6) << 4], axis=-1)
    mins = np.concatenate([low_m & 63, (rest >> 4) | (low_m >> 6) << 4], axis=-1)
    return {"d": unhalf(raw[..., :2]), "dmin": unhalf(raw[..., 2:4]), "scales": scales, "mins": mins}


def _nibbles_of_64(q: np.ndarray) -> np.ndarray:
    """Blocks of 256: each 64 elements are 32 bytes, element ``l`` low and element ``l + 32`` high."""
    return _woven(q.reshape(*q.shape[:2], 4, 2, 32), 4).reshape(*q.shape[:2], 128)


def _unnibbles_of_64(raw: np.ndarray) -> np.ndarray:
    pairs = raw.reshape(*raw.shape[:2], 4, 1, 32)
    return np.concatenate([pairs & 15, pairs >> 4], axis=3).reshape(*raw.shape[:2], 256)


def _pack_q4_k(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return half(p["d"]), half(p["dmin"]), *_scales_and_mins(p, q.shape[:2]), _nibbles_of_64(q)


def _unpack_q4_k(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return _unnibbles_of_64(raw[..., 16:]), _head_of_k(raw)


def _pack_q5_k(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    head = (half(p["d"]), half(p["dmin"]), *_scales_and_mins(p, q.shape[:2]))
    return *head, _plane(q >> 4), _nibbles_of_64(q)


def _unpack_q5_k(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return _unnibbles_of_64(raw[..., 48:]) | _unplane(raw[..., 16:48]) << 4, _head_of_k(raw)


def _pack_q6_k(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    # Each half of 128 is four runs of 32; runs 0 2 and 1 3 share the nibbles of a byte, all four share qh.
    runs = q.reshape(*q.shape[:2], 2, 4, 32)
    low, high = runs & 15, runs >> 4
    ql = np.concatenate([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], axis=-1)
    qh = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    scales = p["scales"].view(np.uint8).reshape(*q.shape[:2], 16)
    return ql.reshape(*q.shape[:2], 128), qh.reshape(*q.shape[:2], 64), scales, half(p["d"])


def _unpack_q6_k(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    ql = raw[..., :128].reshape(*raw.shape[:2], 2, 2, 32)
    qh = raw[..., 128:192].reshape(*raw.shape[:2], 2, 32)
    low = np.concatenate([ql & 15, ql >> 4], axis=3)
    high = np.stack([(qh >> shift) & 3 for shift in (0, 2, 4, 6)], axis=3)
    return low | high << 4, {"scales": raw[..., 192:208].view(np.int8), "d": unhalf(raw[..., 208:])}


def _pack_tq2_0(q: np.ndarray, p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return _pairs_of_bits(q), half(p["d"])


def _unpack_tq2_0(raw: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return _unpairs_of_bits(raw[..., :64]), {"d": unhalf(raw[..., 64:])}


_PACK = MappingProxyType(
    {
        "q4_0": _pack_q4_0,
        "q4_1": _pack_q4_1,
        "q5_0": _pack_q5_0,
        "q5_1": _pack_q5_1,
        "q8_0": _pack_q8_0,
        "q2_k": _pack_q2_k,
        "q3_k": _pack_q3_k,
        "q4_k": _pack_q4_k,
        "q5_k": _pack_q5_k,
        "q6_k": _pack_q6_k,
        "iq1_s": iq.pack_iq1_s,
        "iq1_m": iq.pack_iq1_m,
        "iq2_xxs": iq.pack_iq2_xxs,
        "iq2_xs": iq.pack_iq2_xs,
        "iq2_s": iq.pack_iq2_s,
        "iq3_xxs": iq.pack_iq3_xxs,
        "iq3_s": iq.pack_iq3_s,
        "iq4_nl": iq.pack_iq4_nl,
        "iq4_xs": iq.pack_iq4_xs,
        "tq1_0": iq.pack_tq1_0,
        "tq2_0": _pack_tq2_0,
        "mxfp4": small.pack_mxfp4,
        "nvfp4": small.pack_nvfp4,
    }
)
_UNPACK = MappingProxyType(
    {
        "q4_0": _unpack_q4_0,
        "q4_1": _unpack_q4_1,
        "q5_0": _unpack_q5_0,
        "q5_1": _unpack_q5_1,
        "q8_0": _unpack_q8_0,
        "q2_k": _unpack_q2_k,
        "q3_k": _unpack_q3_k,
        "q4_k": _unpack_q4_k,
        "q5_k": _unpack_q5_k,
        "q6_k": _unpack_q6_k,
        "iq1_s": iq.unpack_iq1_s,
        "iq1_m": iq.unpack_iq1_m,
        "iq2_xxs": iq.unpack_iq2_xxs,
        "iq2_xs": iq.unpack_iq2_xs,
        "iq2_s": iq.unpack_iq2_s,
        "iq3_xxs": iq.unpack_iq3_xxs,
        "iq3_s": iq.unpack_iq3_s,
        "iq4_nl": iq.unpack_iq4_nl,
        "iq4_xs": iq.unpack_iq4_xs,
        "tq1_0": iq.unpack_tq1_0,
        "tq2_0": _unpack_tq2_0,
        "mxfp4": small.unpack_mxfp4,
        "nvfp4": small.unpack_nvfp4,
    }
)
