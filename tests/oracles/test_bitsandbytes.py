"""bitsandbytes is the reference for its own tables: packed bytes, block scales, double quantization."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from bitmill.core.registry import parse_grid
from bitmill.numerics.floats import dynamic_map


def _weight(seed: int, out: int, columns: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(out, columns, generator=rng) * 0.03
    w[torch.rand(out, columns, generator=rng) < 0.01] *= 6
    w[0, :64] = 0
    w[1, :7] = 0
    return w


def _packed(codes: Tensor) -> Tensor:
    flat = codes.reshape(-1)
    return (flat[0::2] << 4) | flat[1::2]


def test_the_dynamic_map_is_theirs():
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_levels_are_theirs(name: str):
    assert torch.equal(torch.tensor(parse_grid(f"{name}-b64").levels), bnb.get_4bit_type(name, device="cpu"))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_and_block_scales(name: str, width: int, dtype: torch.dtype):
    for seed in range(4):
        w = _weight(seed, 48, 768).to(dtype)
        theirs, state = bnb.quantize_4bit(w, blocksize=width, quant_type=name)
        ours = parse_grid(f"{name}-b{width}").round(w.float())
        assert torch.equal(ours.params["absmax"].reshape(-1), state.absmax)
        assert torch.equal(_packed(ours.codes), theirs.reshape(-1))
        back = bnb.dequantize_4bit(theirs, state).float()
        assert torch.equal(ours.dense(dtype).float(), back)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(48, 768), (7, 64), (130, 512), (300, 64)], ids=str)
def test_double_quantization(name: str, shape: tuple[int, int]):
    """Scales are theirs, codes are nearest to what the stored scale expresses (theirs, to the scale before
    it was stored), so the error is no larger."""
    w = _weight(9, *shape)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type=name, compress_statistics=True)
    ours = parse_grid(f"{name}-b64-dq").round(w)
    assert torch.equal(ours.params["absmax_code"].reshape(-1), state.absmax)
    assert torch.equal(ours.params["absmax_scale"], state.state2.absmax)
    assert torch.equal(ours.params["absmax_offset"], state.offset)
    back = bnb.dequantize_4bit(theirs, state)
    assert float((ours.dense() - w).norm()) <= float((back - w).norm())
    mine = bnb.dequantize_4bit(_packed(ours.codes)[:, None], state)
    assert torch.equal(mine, ours.dense())
