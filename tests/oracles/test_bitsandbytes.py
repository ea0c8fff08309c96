"""bitsandbytes is the reference for its own tables: packed bytes, block scales, double quantization."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from bitmill.core.registry import parse_grid
from bitmill.core.types import Params
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


def _same_but_for_middles(params: Params, w: Tensor, theirs: Tensor) -> None:
    code, table = params["absmax_code"].reshape(-1), dynamic_map()
    outer = params["absmax_scale"].repeat_interleave(256)[: len(code)]
    x = (w.reshape(-1, 64).abs().amax(1) - params["absmax_offset"]) / outer
    off = code != theirs
    assert float(off.double().mean()) < 0.01
    middles = (table[code[off].int()] + table[theirs[off].int()]) / 2
    assert bool(((x[off] - middles).abs() < 2.0**-16).all())
    nearer = (x - table[code.int()]).abs() - (x - table[theirs.int()]).abs()
    assert bool((nearer <= 1e-7).all())


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
@pytest.mark.parametrize("shape", [(48, 768), (7, 64), (130, 512), (300, 64), (1024, 1024)], ids=str)
def test_double_quantization(name: str, shape: tuple[int, int]):
    """Outer scales and offset are theirs. So are the codes of block scales, but for a few that lie within
    one part in 65536 of the middle between two, where their CPU kernel rounds through a coarse table and ours
    is the nearer. Codes of weights are nearest to what the stored scale expresses (theirs, to the scale
    before it was stored), so the error is no larger."""
    w = _weight(9, *shape)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type=name, compress_statistics=True)
    ours = parse_grid(f"{name}-b64-dq").round(w)
    _same_but_for_middles(ours.params, w, state.absmax)
    assert torch.equal(ours.params["absmax_scale"], state.state2.absmax)
    assert torch.equal(ours.params["absmax_offset"], state.offset)
    back = bnb.dequantize_4bit(theirs, state)
    assert float((ours.dense() - w).norm()) <= float((back - w).norm())
    state.absmax = ours.params["absmax_code"].reshape(-1)
    mine = bnb.dequantize_4bit(_packed(ours.codes)[:, None], state)
    assert torch.equal(mine, ours.dense())
