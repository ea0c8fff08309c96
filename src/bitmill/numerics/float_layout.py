"""Bytes of ggml's four-bit floats, MXFP4 and NVFP4, between codes with parameters and packed blocks.

Layouts follow ``ggml-common.h`` of llama.cpp (ggml-org). Codes are E2M1, the sign highest; arrays are
``out blocks ·``. NVFP4's block scales are unsigned: the sign bit of an E4M3 byte means nothing, and the byte
that is a NaN elsewhere is 0.
"""

from __future__ import annotations

import numpy as np

from bitmill.numerics.iquant_layout import Fields, Params, Unpacked, nibbles, unnibbles


def _unsigned_e4m3() -> np.ndarray:
    """Value of every byte."""
    byte = np.arange(256)
    field, fraction = (byte >> 3) & 15, byte & 7
    value = np.where(field == 0, fraction / 512, (1 + fraction / 8) * 2.0 ** (field - 7))
    value[127] = 0
    return value.astype(np.float32)


UE4M3 = _unsigned_e4m3()
UE4M3.setflags(write=False)
"""Float32 value of every byte; the first 127 are sorted, from 0 to 448."""


def pack_mxfp4(q: np.ndarray, p: Params) -> Fields:
    """An exponent and 32 nibbles."""
    return p["exponent"].reshape(*q.shape[:2], 1), nibbles(q)


def unpack_mxfp4(raw: np.ndarray) -> Unpacked:
    """The inverse of :func:`pack_mxfp4`."""
    return unnibbles(raw[..., 1:]), {"exponent": raw[..., :1]}


def pack_nvfp4(q: np.ndarray, p: Params) -> Fields:
    """Four scales; then 8 bytes for each 16 weights: element ``j`` low, element ``j + 8`` high."""
    scales = np.searchsorted(UE4M3[:127], p["scale"].reshape(*q.shape[:2], 4)).astype(np.uint8)
    runs = q.reshape(*q.shape[:2], 4, 2, 8) & 15
    return scales, (runs[..., 0, :] | runs[..., 1, :] << 4).reshape(*q.shape[:2], 32)


def unpack_nvfp4(raw: np.ndarray) -> Unpacked:
    """The inverse of :func:`pack_nvfp4`."""
    runs = raw[..., 4:].reshape(*raw.shape[:2], 4, 1, 8)
    codes = np.concatenate([runs & 15, runs >> 4], axis=3)
    return codes.reshape(*raw.shape[:2], 64), {"scale": UE4M3[raw[..., :4]]}
