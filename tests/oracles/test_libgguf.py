"""Every block type against libgguf, byte for byte: llama.cpp's quantizers under another roof."""

from __future__ import annotations

from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
import torch
from torch import Tensor

from bitmill.core import registry
from bitmill.grids.ggml_floats import GgmlFloat
from bitmill.grids.iquant import IQuant
from bitmill.grids.kquant import KQuant
from bitmill.grids.nonlinear import Nonlinear
from bitmill.numerics.blocks import TYPES, pack, type_of, unpack

EVERY = tuple(str(grid) for kind in (KQuant, Nonlinear, IQuant, GgmlFloat) for grid in kind.examples())
NAMES = tuple(name for name in EVERY if name != "iq1_m")
BLIND = ("iq1_s", "iq2_xxs", "iq2_xs")
"""Types that libgguf quantizes with importance only; for ours that is importance of ones."""
REAL = Path(__file__).parent.parent / "golden" / "kquant_rows.npy"
WIDTH = 768


def _theirs(name: str, w: Tensor, importance: Tensor | None) -> np.ndarray:
    if importance is None and name in BLIND:
        importance = torch.ones(w.shape[1])
    vector = None if importance is None else importance.numpy()
    return libgguf.quantize_rows(w.numpy(), TYPES[type_of(name)].id, vector)


def _ours(name: str, w: Tensor, importance: Tensor | None) -> np.ndarray:
    quantized = registry.parse_grid(name).round(w, importance)
    return pack(type_of(name), quantized.codes, quantized.params)


def _degenerate() -> Tensor:
    rng = np.random.default_rng(3)
    at, noise = np.arange(WIDTH), rng.standard_normal(WIDTH)
    rows = {
        "zeros": 0 * noise,
        "positive constant": np.full(WIDTH, 0.5),
        "negative constant": np.full(WIDTH, -0.25),
        "negative only": -np.abs(noise),
        "positive only": np.abs(noise),
        "ties of both signs": np.where(at % 2, 0.7, -0.7),
        "one outlier a block": np.where(at % 32 == 5, 100.0, 0.0),
        "one outlier a row": np.where(at == 300, -1e4, noise),
        "huge": noise * 1e4,
        "near the end of half precision": np.full(WIDTH, 6e4),
        "small": noise * 1e-6,
        "scale 0 in half precision": noise * 1e-8,
        "at the threshold": noise * 1e-15,
        "tiny": noise * 1e-30,
        "subnormal": noise * 1e-41,
        "one subnormal": np.where(at == 40, 1e-39, 0.0),
        "loud and quiet sub-blocks": np.where(at % 256 < 32, noise, noise * 1e-5),
        "narrow around 1": 1 + 1e-4 * noise,
        "sparse, zeros of both signs": np.where(at % 7 == 3, noise, np.where(at % 3 == 0, -0.0, 0.0)),
        "positive beside zeros of both signs": np.where(at % 9 == 4, np.abs(noise), 0.0 * noise),
        "wild": noise * np.exp(2 * rng.standard_normal(WIDTH)),
        "coarse": np.round(2 * noise) / 2,
        "ramp": at * 1.0,
        "falling ramp": -at * 1.0,
    }
    return torch.tensor(np.stack(list(rows.values())), dtype=torch.float32)


def _edges() -> Tensor:
    """Ties between E2M1 values, and largest magnitudes at and beside powers of two."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    ties = torch.cat((ties, -ties))
    scales = torch.cat((2.0 ** torch.arange(-9, 10), torch.linspace(0.3, 3, 40)))
    powers = 2.0 ** torch.arange(-60, 12)
    beside = [powers, *(torch.nextafter(powers, torch.full((), to)) for to in (0.0, 1e30)), 1.4 * powers]
    tops = torch.cat(beside).repeat_interleave(64).reshape(-1, WIDTH)
    signs = torch.where(torch.arange(WIDTH) % 2 > 0, 1.0, -0.66)
    return torch.cat((ties.repeat(WIDTH // 16) * scales[:, None], tops * signs))


def _rows(kind: str) -> Tensor:
    if kind == "real":
        return torch.from_numpy(np.load(REAL, allow_pickle=False).astype(np.float32))
    if kind == "degenerate":
        return _degenerate()
    if kind == "edges":
        return _edges()
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(200, WIDTH, generator=generator)
    if (
        kind == "uneven"
    ):  # sub-blocks so unlike that the scales of the scales take every sweep of their search
        w *= torch.exp(1.5 * torch.randn(200, WIDTH // 32, generator=generator)).repeat_interleave(32, 1)
    return w


def _importance(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    values = 10 * torch.rand(WIDTH, generator=torch.Generator().manual_seed(9)) ** 4
    if kind == "steep":
        values = torch.exp(5 * torch.randn(WIDTH // 32, generator=torch.Generator().manual_seed(9)))
        values = values.repeat_interleave(32)
    if kind == "with zeros":
        values[::7] = 0
        values[256:288] = 0
    return values * 1e-12 if kind == "tiny" else values


@pytest.mark.parametrize("importance", ["none", "usual", "with zeros", "steep", "tiny"])
@pytest.mark.parametrize("rows", ["real", "degenerate", "gaussian", "uneven", "edges"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_llama_cpps(name: str, rows: str, importance: str) -> None:
    w, weights = _rows(rows), _importance(importance)
    differing = (_ours(name, w, weights) != _theirs(name, w, weights)).any(1).nonzero()[0]
    assert differing.tolist() == []


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_other_lengths(name: str) -> None:
    length = registry.parse_grid(name).block[1]
    for blocks in (1, 2, 5, 9):
        w = torch.randn(3, length * blocks, generator=torch.Generator().manual_seed(blocks))
        weights = torch.rand(length * blocks, generator=torch.Generator().manual_seed(blocks))
        assert np.array_equal(_ours(name, w, None), _theirs(name, w, None))
        assert np.array_equal(_ours(name, w, weights), _theirs(name, w, weights))


@pytest.mark.parametrize("name", NAMES)
def test_importance_of_its_own_for_every_row(name: str) -> None:
    w = _rows("real")
    weights = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) ** 2
    theirs = [_theirs(name, w[r : r + 1], weights[r].clone()) for r in range(len(w))]
    assert np.array_equal(_ours(name, w, weights), np.concatenate(theirs))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("rows", ["real", "degenerate"])
def test_decoding_is_the_gguf_packages(name: str, rows: str) -> None:
    raw = _theirs(name, _rows(rows), None)
    codes, params = unpack(type_of(name), raw)
    theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType(TYPES[type_of(name)].id))
    assert np.array_equal(registry.parse_grid(name).decode(codes, params).numpy(), theirs)
    assert np.array_equal(pack(type_of(name), codes, params), raw)


@pytest.mark.parametrize("rows", ["real", "gaussian", "uneven"])
@pytest.mark.parametrize("importance", ["none", "usual"])
def test_iq1_m_has_llama_cpps_error(rows: str, importance: str) -> None:
    """Versions of llama.cpp differ in the order of its sums, so in a few codes that are as good."""
    w, u = _rows(rows), _importance(importance)
    ours, theirs = _ours("iq1_m", w, u), _theirs("iq1_m", w, u)
    weights = w.square()
    if u is not None:
        blocks = w.reshape(len(w), -1, 256)
        power = 2 * blocks.square().mean(-1, keepdim=True)
        weights = u * (power + blocks.square()).sqrt().reshape(w.shape)
    cost = []
    for raw in (ours, theirs):
        value = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType.IQ1_M))
        cost.append(float((weights * (value - w).square()).sum()))
    assert cost[0] == pytest.approx(cost[1], rel=2e-3)
    assert (ours != theirs).mean() < 0.05
