"""The K-quant grid by itself: nearest codes, columns, layout, refusals."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from bitmill.core.errors import BadFile, Refused, Unsolvable
from bitmill.grids.dense import Dense
from bitmill.grids.kquant import KQuant
from bitmill.numerics.blocks import TYPES, pack, unpack

GRIDS = KQuant.examples()
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def _weights(out: int = 6, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def _codes(grid: KQuant) -> Tensor:
    if grid.type == "q8_0":
        return torch.arange(-127, 128, dtype=torch.int8)
    counts = {"q2_k": 4, "q3_k": 8, "q5_k": 32, "q6_k": 64, "q5_0": 32, "q5_1": 32}
    return torch.arange(counts.get(grid.type, 16), dtype=torch.uint8)


@every_grid
def test_encode_is_nearest_of_all_codes(grid: KQuant) -> None:
    params = grid.fit(_weights())
    w = 1.3 * _weights(seed=1)
    missed = (grid.decode(grid.encode(w, params), params) - w).abs()
    every = [grid.decode(code.expand(w.shape), params) for code in _codes(grid)]
    least = torch.stack([(value - w).abs() for value in every]).amin(0)
    assert torch.allclose(missed, least, rtol=0, atol=1e-6)


@every_grid
def test_columns_are_what_the_whole_says(grid: KQuant) -> None:
    w = _weights()
    params = grid.fit(w)
    whole, value, step = grid.encode(w, params), grid.decode(grid.encode(w, params), params), grid.step
    for at, n in ((0, 1), (31, 1), (32, 1), (300, 1), (17, 40), (255, 257), (256, 256), (511, 1)):
        part = grid.encode(w[:, at : at + n], params, at)
        assert torch.equal(part, whole[:, at : at + n])
        assert torch.equal(grid.decode(part, params, at), value[:, at : at + n])
        assert torch.equal(step(params, at, n), step(params, 0, 512)[:, at : at + n])


@every_grid
def test_step_is_the_distance_between_neighbours(grid: KQuant) -> None:
    params = grid.fit(_weights())
    low, high = (torch.full((6, 512), code, dtype=_codes(grid).dtype) for code in (1, 2))
    gap = (grid.decode(high, params) - grid.decode(low, params)).abs()
    assert torch.allclose(gap, grid.step(params, 0, 512), atol=1e-6)


@every_grid
def test_scaled_widens_the_range_and_stays_storable(grid: KQuant) -> None:
    params = grid.fit(_weights())
    wider = grid.scaled(params, torch.tensor(2.0))
    codes = grid.encode(_weights(), params)
    assert torch.allclose(grid.decode(codes, wider), 2 * grid.decode(codes, params))
    odd = grid.scaled(params, torch.tensor(0.937))
    assert torch.equal(odd["d"], odd["d"].half().float())


@every_grid
def test_importance_lowers_the_error_it_weighs(grid: KQuant) -> None:
    """… and changes nothing in types that have no search."""
    w, importance = _weights(64), torch.rand(512, generator=torch.Generator().manual_seed(4)) ** 6
    plain, told = grid.round(w).dense(), grid.round(w, importance).dense()
    cost = [float((importance * (w - value) ** 2).sum()) for value in (plain, told)]
    assert cost[1] == cost[0] if grid.type in ("q8_0", "tq1_0", "tq2_0") else cost[1] < 0.97 * cost[0]


@every_grid
def test_zero_scale_has_one_value_and_a_code_for_it(grid: KQuant) -> None:
    w = torch.zeros(2, 512)
    params = grid.fit(w)
    codes = grid.encode(_weights(2), params)
    assert torch.equal(grid.decode(codes, params), w)
    assert torch.isfinite(grid.round(torch.full((2, 512), 1e-40)).dense()).all()


@every_grid
def test_storage_is_the_files(grid: KQuant) -> None:
    q = grid.round(_weights())
    raw = pack(grid.type, q.codes, q.params)
    assert raw.shape == (6, TYPES[grid.type].row_bytes(512)) and 8 * raw.size == q.bits
    length, bytes_ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(TYPES[grid.type].id)]
    assert (length, bytes_) == (TYPES[grid.type].length, TYPES[grid.type].bytes_)


@every_grid
def test_any_bytes_survive_the_round_trip(grid: KQuant) -> None:
    raw = np.random.default_rng(8).integers(0, 256, (5, TYPES[grid.type].row_bytes(512)), dtype=np.uint8)
    codes, params = unpack(grid.type, raw)
    assert codes.shape == (5, 512)
    if grid.type == "tq1_0":  # more bytes than five digits of base three: some mean the same
        raw = pack(grid.type, codes, params)
        codes, params = unpack(grid.type, raw)
    assert np.array_equal(pack(grid.type, codes, params), raw)


@every_grid
def test_permuted_rows_pack_to_permuted_bytes(grid: KQuant) -> None:
    q, order = grid.round(_weights()), torch.tensor([3, 1, 5, 0, 2, 4])
    moved = q.rows(order)
    assert np.array_equal(
        pack(grid.type, moved.codes, moved.params), pack(grid.type, q.codes, q.params)[order.numpy()]
    )


@every_grid
def test_threads_do_not_change_the_answer(grid: KQuant) -> None:
    w, before = _weights(700, 1024), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(grid.round(w))
    torch.set_num_threads(before)
    assert torch.equal(found[0].codes, found[1].codes) and found[0].same_values(found[1])


@every_grid
def test_input_is_left_alone(grid: KQuant) -> None:
    w = _weights()
    kept = w.clone()
    params = grid.fit(w, torch.rand(512))
    grid.encode(w, params)
    assert torch.equal(w, kept)


@every_grid
def test_refusals_say_what_would_work(grid: KQuant) -> None:
    assert grid.refuses((4, 512)) is None
    assert "shape (512,)" in str(grid.refuses((512,)))
    assert "f16" in str(grid.refuses((4, 100)))
    with pytest.raises(Refused, match="whole blocks"):
        grid.round(torch.zeros(64, 100))
    if grid.block[1] == 256:
        assert "576" in str(grid.refuses((4, 576))) and "q4_0" in str(grid.refuses((4, 576)))
    else:
        assert grid.refuses((4, 576)) is None


@every_grid
def test_numbers_a_block_cannot_hold_are_refused(grid: KQuant) -> None:
    for bad in (float("nan"), float("inf"), 1e30):
        w = _weights()
        w[2, 100] = bad
        with pytest.raises(Unsolvable):
            grid.round(w)


@every_grid
def test_importance_of_the_wrong_width_is_refused(grid: KQuant) -> None:
    with pytest.raises(ValueError, match="importance"):
        grid.round(_weights(), torch.ones(256))


def test_names_parse_in_either_case() -> None:
    assert KQuant.parse("Q4_K") == KQuant.parse("q4_k") == KQuant("q4_k")
    assert KQuant.parse("q4_k_m") is None and KQuant.parse("int4") is None
    assert all(KQuant.parse(str(grid)) == grid for grid in GRIDS)


def test_ragged_bytes_are_a_bad_file() -> None:
    with pytest.raises(BadFile):
        unpack("q4_k", np.zeros((2, 143), np.uint8))


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_dense_rows_pack_as_they_are(name: str) -> None:
    grid = Dense(name)
    for shape in ((6,), (4, 6), (2, 3, 6)):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        codes = grid.encode(w, {})
        raw = pack(name, codes, {})
        back, params = unpack(name, raw)
        assert (
            params == {}
            and torch.equal(back.reshape(shape), codes)
            and raw.size * 8 == grid.storage_bits(shape)
        )


def test_dense_keeps_finite_values_finite() -> None:
    w = torch.tensor([[1e9, -7e4, float("inf"), -2.0]])
    assert Dense("f16").round(w).dense().tolist() == [[65504.0, -65504.0, float("inf"), -2.0]]
    assert Dense("f32").round(w).dense().tolist() == w.tolist()
