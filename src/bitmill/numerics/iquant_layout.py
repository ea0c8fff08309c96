"""Bytes of llama.cpp's I-quants and ternary types, between codes with parameters and packed blocks.

Layouts follow ``ggml-common.h`` of llama.cpp (ggml-org). Arrays are ``out blocks ·``; codes are those of
:class:`bitmill.grids.iquant.IQuant`, :class:`bitmill.grids.nonlinear.Nonlinear` and
:class:`bitmill.grids.kquant.KQuant`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Fields = tuple[np.ndarray, ...]
Params = Mapping[str, np.ndarray]
Unpacked = tuple[np.ndarray, dict[str, np.ndarray]]


def half(values: np.ndarray) -> np.ndarray:
    """Bytes of float16 values, one a block: ``out blocks`` to ``out blocks 2``."""
    return np.ascontiguousarray(values, dtype="<f2")[..., None].view(np.uint8)


def unhalf(raw: np.ndarray) -> np.ndarray:
    """The inverse of :func:`half`, as float32."""
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float32)


def nibbles(q: np.ndarray) -> np.ndarray:
    """Blocks of 32: byte ``j`` holds element ``j`` low and element ``j + 16`` high."""
    return (q[..., :16] & 15) | (q[..., 16:] & 15) << 4


def unnibbles(raw: np.ndarray) -> np.ndarray:
    """The inverse of :func:`nibbles`."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def parity(signs: np.ndarray) -> np.ndarray:
    """Eight signs of which seven are given: an even number of them is set."""
    folded = signs ^ signs >> 4
    folded = folded ^ folded >> 2
    return (signs & 127) | ((folded ^ folded >> 1) & 1) << 7


def _words(values: np.ndarray, type: str) -> np.ndarray:
    """``out blocks n`` integers as their little-endian bytes."""
    raw = np.ascontiguousarray(values.astype(type))
    return raw.view(np.uint8).reshape(*values.shape[:2], -1)


def _unwords(raw: np.ndarray, type: str) -> np.ndarray:
    return np.ascontiguousarray(raw).view(type).astype(np.int64)


def _pairs(values: np.ndarray) -> np.ndarray:
    """Neighbouring four-bit values share a byte, the first one low."""
    return (values[..., 0::2] | values[..., 1::2] << 4).astype(np.uint8)


def _unpairs(raw: np.ndarray) -> np.ndarray:
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:2], -1)


def _scales(p: Params, shape: tuple[int, ...], count: int) -> np.ndarray:
    return p["scales"].reshape(*shape[:2], count).astype(np.int64)


def _bytes(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint8)


def pack_iq2_xxs(q: np.ndarray, p: Params) -> Fields:
    """Per 32 weights: four indices of a byte, then 4 × 7 signs and the scale in a word."""
    code = q.astype(np.int64).reshape(*q.shape[:2], 8, 4)
    index, signs = code & 1023, (code >> 10) & 127
    word = _scales(p, q.shape, 8) << 28
    for k in range(4):
        word |= signs[..., k] << 7 * k
    both = np.concatenate([_bytes(index), _words(word, "<u4").reshape(*q.shape[:2], 8, 4)], axis=-1)
    return half(p["d"]), both.reshape(*q.shape[:2], 64)


def unpack_iq2_xxs(raw: np.ndarray) -> Unpacked:
    """The inverse of :func:`pack_iq2_xxs`."""
    both = raw[..., 2:].reshape(*raw.shape[:2], 8, 8)
    word = _unwords(both[..., 4:], "<u4")
    signs = np.concatenate([(word >> 7 * k) & 127 for k in range(4)], axis=-1)
    code = both[..., :4].astype(np.int64) | parity(signs) << 10
    scales = _bytes(word >> 28)
    return code.astype(np.int32).reshape(*raw.shape[:2], 32), {"d": unhalf(raw[..., :2]), "scales": scales}


def pack_iq2_xs(q: np.ndarray, p: Params) -> Fields:
    """Nine bits of index and seven of sign a group; two scales a byte."""
    code = q.astype(np.int64)
    word = (code & 1023) | ((code >> 10) & 127) << 9
    return half(p["d"]), _words(word, "<u2"), _pairs(_scales(p, q.shape, 16))


def unpack_iq2_xs(raw: np.ndarray) -> Unpacked:
    """The inverse of :func:`pack_iq2_xs`."""
    word = _unwords(raw[..., 2:66], "<u2")
    code = (word & 511) | parity(word >> 9) << 10
    return code.astype(np.int32), {"d": unhalf(raw[..., :2]), "scales": _unpairs(raw[..., 66:])}


def pack_iq2_s(q: np.ndarray, p: Params) -> Fields:
    """Low bytes of the indices, signs, two high bits of four indices a byte, two scales a byte."""
    code = q.astype(np.int64)
    index, signs = code & 1023, (code >> 10) & 255
    top = (index >> 8).reshape(*q.shape[:2], 8, 4)
    high = top[..., 0] | top[..., 1] << 2 | top[..., 2] << 4 | top[..., 3] << 6
    return half(p["d"]), _bytes(index), _bytes(signs), _bytes(high), _pairs(_scales(p, q.shape, 16))


def unpack_iq2_s(raw: np.ndarray) -> Unpacked:
    """The inverse of :func:`pack_iq2_s`."""
    low, signs, high = (raw[..., a:b].astype(np.int64) for a, b in ((2, 34), (34, 66), (66, 74)))
    top = np.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(low.shape)
    code = low | top << 8 | signs << 10
    return code.astype(np.int32), {"d": unhalf(raw[..., :2]), "scales": _unpairs(raw[..., 74:])}


def _indices_of_fours(q: np.ndarray) -> np.ndarray:
    """Indices of both points of each eight weights, in order."""
    code = q.astype(np.int64)
    return np.stack([code & 511, (code >> 9) & 511], axis=-1).reshape(*q.shape[:2], 64)


def _of_fours(index: np.ndarray, signs: np.ndarray) -> np.ndarray:
    pairs = index.reshape(*index.shape[:2], 32, 2)
    return (pairs[..., 0] | pairs[..., 1] << 9 | signs << 18).astype(np.int32)


def pack_iq3_xxs(q: np.ndarray, p: Params) -> Fields:
    """Indices of a byte, then per 32 weights 4 × 7 signs and the scale in a word."""
    signs = ((q.astype(np.int64) >> 18) & 127).reshape(*q.shape[:2], 8, 4)
    word = _scales(p, q.shape, 8) << 28
    for k in range(4):
        word |= signs[..., k] << 7 * k
    return half(p["d"]), _bytes(_indices_of_fours(q)), _words(word, "<u4")


def unpack_iq3_xxs(raw: np.ndarray) -> Unpacked:
    """The inverse of :func:`pack_iq3_xxs`."""
    word = _unwords(raw[..., 66:], "<u4")
    signs = np.stack([(word >> 7 * k) & 127 for k in range(4)], axis=-1).reshape(*raw.shape[:2], 32)
    code = _of_fours(raw[..., 2:66].astype(np.int64), parity(signs))
    return code, {"d": unhalf(raw[..., :2]), "scales": _bytes(word >> 28)}


def pack_iq3_s(q: np.ndarray, p: Params) -> Fields:
    """Low bytes of the indices, their ninth bits, signs, two scales a byte."""
    index = _indices_of_fours(q)
    ninth = np.packbits((index >> 8).astype(np.uint8), axis=-1, bitorder="little")
    signs = (q.astype(np.int64) >> 18) & 255
    return half(p["d"]), _bytes(index), ninth, _bytes(signs), _pairs(_scales(p, q.shape, 8))


def unpack_iq3_s(raw: np.ndarray) -> Unpacked:
    """The inverse of :func:`pack_iq3_s`."""
    ninth = np.unpackbits(raw[..., 66:74], axis=-1, bitorder="little").astype(np.int64)
    code = _of_fours(raw[..., 2:66].astype(np.int64) | ninth << 8, raw[..., 74:106].astype(np.int64))
    return code, {"d": unhalf(raw[..., :2]), "scales": _unpairs(raw[..., 106:])}


def pack_iq1_s(q: np.ndarray, p: Params) -> Fields:
    """Low bytes of the indices; per 32 weights four times three high bits, the scale, the shift's sign."""
    index = q.astype(np.int64)
    top = (index >> 8).reshape(*q.shape[:2], 8, 4)
    word = _scales(p, q.shape, 8) << 12 | p["down"].reshape(*q.shape[:2], 8).astype(np.int64) << 15
    for k in range(4):
        word |= top[..., k] << 3 * k
    return half(p["d"]), _bytes(index), _words(word, "<u2")


def unpack_iq1_s(raw: np.ndarray) -> Unpacked:
    """The inverse of :func:`pack_iq1_s`."""
    word = _unwords(raw[..., 34:], "<u2")
    top = np.stack([(word >> 3 * k) & 7 for k in range(4)], axis=-1).reshape(*raw.shape[:2], 32)
    code = (raw[..., 2:34].astype(np.int64) | top << 8).astype(np.int32)
    params = {"d": unhalf(raw[..., :2]), "scales": _bytes((word >> 12) & 7), "down": _bytes(word >> 15)}
    return code, params


def pack_iq1_m(q: np.ndarray, p: Params) -> Fields:
    """Low bytes of the indices; three high bits and the shift's sign, two groups a byte; four words of four
    scales and a quarter of ``d`` each."""
    code = q.astype(np.int64)
    four = ((code >> 8) & 7) | ((code >> 11) & 1) << 3
    scales = _scales(p, q.shape, 16).reshape(*q.shape[:2], 4, 4)
    word = np.zeros((*q.shape[:2], 4), np.int64)
    for k in range(4):
        word |= scales[..., k] << 3 * k
    d = np.ascontiguousarray(p["d"], dtype="<f2").view(np.uint16).astype(np.int64)
    for k in range(4):
        word[..., k] |= ((d >> 4 * k) & 15) << 12
    return _bytes(code), _pairs(four), _words(word, "<u2")


def unpack_iq1_m(raw: np.ndarray) -> Unpacked:
    """The inverse of :func:`pack_iq1_m`."""
    four, word = _unpairs(raw[..., 32:48]).astype(np.int64), _unwords(raw[..., 48:], "<u2")
    code = raw[..., :32].astype(np.int64) | (four & 7) << 8 | (four >> 3) << 11
    d = np.zeros(raw.shape[:2], np.int64)
    for k in range(4):
        d |= (word[..., k] >> 12) << 4 * k
    scales = np.stack([(word >> 3 * k) & 7 for k in range(4)], axis=-1).reshape(*raw.shape[:2], 16)
    halves = d.astype("<u2").view("<f2").astype(np.float32)
    return code.astype(np.int32), {"d": halves, "scales": _bytes(scales)}


def pack_iq4_nl(q: np.ndarray, p: Params) -> Fields:
    """One scale and 32 nibbles."""
    return half(p["d"]), nibbles(q)


def unpack_iq4_nl(raw: np.ndarray) -> Unpacked:
    """The inverse of :func:`pack_iq4_nl`."""
    return unnibbles(raw[..., 2:]), {"d": unhalf(raw[..., :2])}


def pack_iq4_xs(q: np.ndarray, p: Params) -> Fields:
    """Eight six-bit scales, 32 added: their top two bits in a word, their low four two a byte."""
    raised = (p["scales"].astype(np.int64) + 32).reshape(*q.shape[:2], 8)
    word = np.zeros((*q.shape[:2], 1), np.int64)
    for k in range(8):
        word[..., 0] |= (raised[..., k] >> 4) << 2 * k
    runs = nibbles(q.reshape(*q.shape[:2], 8, 32)).reshape(*q.shape[:2], 128)
    return half(p["d"]), _words(word, "<u2"), _pairs(raised & 15), runs


def unpack_iq4_xs(raw: np.ndarray) -> Unpacked:
    """The inverse of :func:`pack_iq4_xs`."""
    word = _unwords(raw[..., 2:4], "<u2")
    top = np.concatenate([(word >> 2 * k) & 3 for k in range(8)], axis=-1)
    scales = ((_unpairs(raw[..., 4:8]) | top << 4) - 32).astype(np.int8)
    codes = unnibbles(raw[..., 8:].reshape(*raw.shape[:2], 8, 16)).reshape(*raw.shape[:2], 256)
    return codes, {"d": unhalf(raw[..., :2]), "scales": scales}


def _base_three(digits: np.ndarray) -> np.ndarray:
    """Five digits ``· 5`` in a byte, scaled so that multiplying by 3 carries them out one by one."""
    value = (digits.astype(np.int64) * (81, 27, 9, 3, 1)).sum(-1)
    return _bytes((value * 256 + 242) // 243)


def _from_base_three(raw: np.ndarray, count: int) -> np.ndarray:
    scaled = (raw.astype(np.int64)[..., None] * 3 ** np.arange(count)) & 255
    return _bytes(scaled * 3 >> 8)


def pack_tq1_0(q: np.ndarray, p: Params) -> Fields:
    """Base three: 160 weights by 32 bytes, 80 by 16, the last 16 by 4 of four digits and a zero."""
    first = q[..., :160].reshape(*q.shape[:2], 5, 32).swapaxes(2, 3)
    second = q[..., 160:240].reshape(*q.shape[:2], 5, 16).swapaxes(2, 3)
    third = q[..., 240:].reshape(*q.shape[:2], 4, 4).swapaxes(2, 3)
    third = np.concatenate([third, np.zeros_like(third[..., :1])], axis=-1)
    return _base_three(first), _base_three(second), _base_three(third), half(p["d"])


def unpack_tq1_0(raw: np.ndarray) -> Unpacked:
    """The inverse of :func:`pack_tq1_0`."""
    parts = ((raw[..., :32], 5), (raw[..., 32:48], 5), (raw[..., 48:52], 4))
    runs = [_from_base_three(part, n).swapaxes(2, 3).reshape(*raw.shape[:2], -1) for part, n in parts]
    return np.concatenate(runs, axis=-1), {"d": unhalf(raw[..., 52:])}
