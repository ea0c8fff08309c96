"""Frozen bytes: the same rows must pack to the same file for ever, on every machine."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from bitmill.core.registry import parse_grid
from bitmill.grids.ggml_floats import GgmlFloat
from bitmill.grids.iquant import IQuant
from bitmill.grids.kquant import KQuant
from bitmill.grids.nonlinear import Nonlinear
from bitmill.numerics.blocks import pack, type_of

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
    ("tq1_0", False): "ad5d50476bd3d6bc3fd223b6ac5c416c",
    ("tq1_0", True): "ad5d50476bd3d6bc3fd223b6ac5c416c",
    ("tq2_0", False): "5bffd6237f66814626abb7c53f4c4c43",
    ("tq2_0", True): "5bffd6237f66814626abb7c53f4c4c43",
    ("iq4_nl", False): "c2c92467926e61ce5c2769451f8cbf3d",
    ("iq4_nl", True): "041e2fdf7ded0a3b1f79e8cb86ec38f1",
    ("iq4_xs", False): "c54d6f41b73f5c4a1925e6cacc68a0b3",
    ("iq4_xs", True): "fc67d9cd310f8673626bb927a0442b8d",
    ("iq1_s", False): "db821a106aa4a5f4a1414836215aa3d4",
    ("iq1_s", True): "86a83ddbc6ea5be90a597c69b602d424",
    ("iq1_m", False): "140bdc25c896f9014848d39c9ea6ae2d",
    ("iq1_m", True): "1c6c6a013e9d350a026e25ef5597f183",
    ("iq2_xxs", False): "53fbe0de0f4e2aa4dc9004eba80cd24f",
    ("iq2_xxs", True): "901eef4c07bf77460ff5a346b09f5007",
    ("iq2_xs", False): "8a24cdcd2aaaf85ea3c8cba806e0e084",
    ("iq2_xs", True): "0a5d6d385ae33df1bc77c11af6dcf6a5",
    ("iq2_s", False): "4a95fdb1c0ae075d5e1752d15fa67a49",
    ("iq2_s", True): "c2df4285bb24bb1c631623ed7acf18ca",
    ("iq3_xxs", False): "fdb2a188f58c6ac113de37bb9139bc8a",
    ("iq3_xxs", True): "2d1c6d12b9a2db10092d2527b214dd4b",
    ("iq3_s", False): "c9a9f04b565a8cf6b9c8fe321608beab",
    ("iq3_s", True): "bbf30d9b7b7faa7b98dd909000d4ddfb",
    ("mxfp4-floor", False): "94b199e8d0257ed4d925f421206c4b22",
    ("mxfp4-floor", True): "94b199e8d0257ed4d925f421206c4b22",
    ("nvfp4-flat", False): "4ee7bdecf82463bc14ad7ac77558f86d",
    ("nvfp4-flat", True): "4ee7bdecf82463bc14ad7ac77558f86d",
}


NAMES = [str(g) for kind in (KQuant, Nonlinear, IQuant, GgmlFloat) for g in kind.examples()]


@pytest.mark.parametrize("told", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_frozen(name: str, told: bool) -> None:
    w = torch.from_numpy(np.load(ROWS, allow_pickle=False).astype(np.float32))
    importance = torch.arange(768, dtype=torch.float32).remainder(37).square() / 64 if told else None
    quantized = parse_grid(name).round(w, importance)
    digest = hashlib.sha256(pack(type_of(name), quantized.codes, quantized.params).tobytes()).hexdigest()
    assert digest[:32] == FROZEN[name, told]
