"""Frozen bytes: the same rows must pack to the same file for ever, on every machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from bitmill.grids.kquant import KQuant
from bitmill.numerics.blocks import pack

ROWS = Path(__file__).parent / "kquant_rows.npy"  # 24 x 768 rows of SmolLM2-135M, float16

FROZEN = {
    ("q4_0", False): "60856c23319d69a41d1912883c069250",
    ("q4_0", True): "50612590c2fb33d70daa12a6780feebb",
    ("q4_1", False): "1130e3cacd6cbde924c36231306b9b59",
    ("q4_1", True): "109555cbf404edfda4174633d54068c8",
    ("q5_0", False): "b286f185f5a0aaf66edad08931b6b505",
    ("q5_0", True): "3c8d5f9eeb006d3bb0bbcf309e52686e",
    ("q5_1", False): "92f0e37778fc3c36ac1ec17d4ac9def6",
    ("q5_1", True): "5eaeec0ca12437341e4ac74685225cc0",
    ("q8_0", False): "a09616420a61f3a76c46cbf5eeb5c0e3",
    ("q8_0", True): "a09616420a61f3a76c46cbf5eeb5c0e3",
    ("q2_k", False): "f002d17a977fc9342495c0bc0300fad0",
    ("q2_k", True): "3fd211d561d7314277fdaff8c035b3fa",
    ("q3_k", False): "96a4eb5cabc48bfb1a2aaada02a51f56",
    ("q3_k", True): "9316eb365a4b1fcfbb51a6a8c79a0fb2",
    ("q4_k", False): "d9aebbd4e007ba02bdea0f9efbbd2e71",
    ("q4_k", True): "f68d9477f34e31d57cac32aed1a5b816",
    ("q5_k", False): "25e24911522bbe37d6e321ac91adab16",
    ("q5_k", True): "d0f0c9b434ecfb49a2ab137c13c101f6",
    ("q6_k", False): "e46e841771b355ead8e8b78aa4341e5e",
    ("q6_k", True): "e2747faefbc52a17baa7a9d5f135b90a",
}


@pytest.mark.parametrize("told", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", [str(grid) for grid in KQuant.examples()])
def test_bytes_are_frozen(name: str, told: bool) -> None:
    w = torch.from_numpy(np.load(ROWS, allow_pickle=False).astype(np.float32))
    importance = torch.arange(768, dtype=torch.float32).remainder(37).square() / 64 if told else None
    quantized = KQuant(name).round(w, importance)
    digest = hashlib.sha256(pack(name, quantized.codes, quantized.params).tobytes()).hexdigest()
    assert digest[:32] == FROZEN[name, told]
