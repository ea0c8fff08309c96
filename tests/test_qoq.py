"""QoQ's grid: four bits inside eight, with whole numbers alone up to the last two factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitmill import mill
from bitmill.calibrate.moments import MomentSum
from bitmill.core.axes import inputs_of
from bitmill.core.errors import BadFile
from bitmill.core.inputs import parse_inputs
from bitmill.core.types import Problem
from bitmill.grids.qoq import PROTECTED, Qoq, fits_int8
from bitmill.numerics.inputs import rounded
from bitmill.run.load import load_model
from bitmill.solvers.clip import Clip
from bitmill.solvers.gptq import Gptq
from bitmill.source import open_path
from tests.tiny import make_model, tokens

DOWN0 = "model.layers.0.mlp.down_proj.weight"


def weight(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(24, 512, generator=generator) * torch.logspace(-3, 1, 24)[:, None]
    w[::3, ::40] *= 9
    w[1] = w[1].abs()
    w[2] = -w[2].abs()
    w[3, :256] = 0
    return w


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("importance", [False, True])
def test_every_code_stands_for_an_int8_value(group: int, importance: bool) -> None:
    grid, w = Qoq(group), weight()
    u = torch.rand(512, generator=torch.Generator().manual_seed(1)) if importance else None
    params = grid.fit(w, u)
    assert fits_int8(params["step"], params["zero"])
    for code in range(16):
        codes = torch.full(w.shape, code, dtype=torch.uint8)
        whole = (codes.int() - params["zero"].int().repeat_interleave(group, 1)) * params[
            "step"
        ].int().repeat_interleave(group, 1)
        assert int(whole.min()) >= -128 and int(whole.max()) <= 127
        assert torch.equal(grid.eight(codes, params).int(), whole)
        assert torch.equal(grid.decode(codes, params), params["scale"] * whole)
    assert torch.equal(params["scale"], (w.abs().amax(1, keepdim=True) / PROTECTED).half().float())


def test_protection_costs_nothing_where_it_is_kept() -> None:
    """Two roundings, to eight bits and then to four, would be the paper's; the direct one is as near or
    nearer."""
    grid, w = Qoq(64), weight()
    params = grid.fit(w)
    step = params["step"].repeat_interleave(64, 1)
    zero = params["zero"].repeat_interleave(64, 1)
    eight = (w / params["scale"]).round().clamp(-PROTECTED, PROTECTED)
    twice = ((eight / step).round() + zero).clamp(0, 15)
    theirs = (twice - zero) * step * params["scale"]
    ours = grid.decode(grid.encode(w, params), params)
    assert float((ours - w).norm()) <= float((theirs - w).norm())
    assert float((ours - w).norm()) < 0.2 * float(w.norm())


def test_solvers_stay_inside(tmp_path: Path) -> None:
    grid, w = Qoq(64), weight()
    x = torch.randn(700, 512, generator=torch.Generator().manual_seed(2))
    total = MomentSum(512, True)
    total.add(x, "w")
    moments = total.moments()
    for solver in (Gptq(), Clip()):
        found = solver.solve([Problem("w", "q", w, moments)], [grid])[0].quantized
        assert fits_int8(found.params["step"], found.params["zero"])
        whole = grid.eight(found.codes, found.params)
        assert torch.equal(found.dense(), found.params["scale"] * whole.float())


def test_the_forward_pass_is_integer_arithmetic(tmp_path: Path) -> None:
    """What `load` computes is ``s · sₓ · Σ w₈ x₈`` with the sum in whole numbers, to float32's last
    places."""
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    line = "hadamard + gptq : int4-g64-qoq, input=int8-token, cache=int4-token-asym > bitmill"
    mill.quantize(str(folder), line, tmp_path / "out", calib=tokens(4, 32), nsamples=4, seqlen=32)
    made, seen = open_path(tmp_path / "out"), {}
    model = load_model(made)
    layer = model.get_submodule(DOWN0.removesuffix(".weight"))
    layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach()), prepend=True)
    layer.register_forward_hook(lambda _, __, out: seen.update(y=out.detach()))
    with torch.no_grad():
        model(tokens(1, 24))
    stored, x = made.stored(DOWN0), seen["x"][0]
    assert stored is not None and isinstance(stored.grid, Qoq)
    grid = inputs_of(made)[DOWN0].grid
    assert grid == parse_inputs("int8-token")
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    x8 = (x / scale).clamp(-128, 127).round().to(torch.int64)
    assert torch.equal(rounded(grid, x, {}), x8 * scale)
    w8 = stored.grid.eight(stored.codes, stored.params).to(torch.int64)
    whole = x8 @ w8.T
    assert int(whole.abs().max()) < 1 << 31
    wanted = whole.double() * scale.double() * stored.params["scale"].double().T
    torch.testing.assert_close(
        seen["y"][0].double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())
    )


@pytest.mark.parametrize(("name", "value"), [("step", 0), ("step", 17), ("zero", 16), ("step", 16)])
def test_files_that_lead_out_of_int8(name: str, value: int, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    mill.quantize(str(folder), "nearest : int4-g64-qoq > bitmill", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        head = dict(file.metadata())
    tensors = load_file(path)
    assert json.loads(head["bitmill.weights"])[DOWN0][0] == "int4-g64-qoq"
    tensors[f"{DOWN0}.{name}"][3, 1] = value
    if (name, value) == ("step", 16):
        tensors[f"{DOWN0}.zero"][3, 1] = 7
    save_file(tensors, path, head)
    with pytest.raises(BadFile, match="out of int8"):
        open_path(tmp_path / "out").read(DOWN0)
