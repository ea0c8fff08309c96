"""compressed-tensors folders as others write them: activation order, rotations.

Judged by the package itself in tests/oracles/test_compressed_rotations.py; here all parts are made by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill import mill
from bitmill.checkpoint.stored_types import unread
from bitmill.core.axes import inputs_of
from bitmill.core.errors import BadFile, Refused
from bitmill.numerics.bits import unpack
from bitmill.numerics.inputs import rounded, seen
from bitmill.source import open_path, open_source
from bitmill.transfer import convert
from tests.tiny import make_model

MODULE = "model.layers.0.mlp.down_proj"
TURN = torch.linalg.qr(torch.randn(256, 256, generator=torch.Generator().manual_seed(3)))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    source = open_source(str(make_model(place / "model", num_hidden_layers=1)))
    mill.quantize(source, "nearest : int4-g32-asym > compressed-tensors", place / "out")
    return place / "out"


def edited(folder: Path, out: Path, tensors: dict[str, torch.Tensor | None], **changes: Any) -> Path:
    out.mkdir()
    kept = {**load_file(folder / "model.safetensors"), **tensors}
    made = {k: v.contiguous() for k, v in kept.items() if v is not None}
    save_file(made, out / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (out / "config.json").write_text(json.dumps(config))
    return out


def rotated(location: str, kind: str = "random-matrix", **more: Any) -> dict[str, Any]:
    apply = [{"targets": [MODULE], "location": location, "inverse": False, "ignore": []}]
    return {"config_groups": {"u": {"type": kind, "apply": apply, "head_dim": None, **more}}}


def test_columns_in_activation_order(folder: Path, tmp_path: Path) -> None:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0)) // 32
    made = edited(folder, tmp_path / "a", {f"{MODULE}.weight_g_idx": order.to(torch.int32)})
    found = open_path(made)
    stored = load_file(made / "model.safetensors")
    codes = unpack(stored[f"{MODULE}.weight_packed"], 4, 256).float()
    zero = unpack(stored[f"{MODULE}.weight_zero_point"].T.contiguous(), 4, 128).T.float()
    scale = stored[f"{MODULE}.weight_scale"].float()
    by_hand = torch.stack([scale[:, g] * (codes[:, c] - zero[:, g]) for c, g in enumerate(order)], 1)
    assert torch.equal(found.read(f"{MODULE}.weight"), by_hand) and found.stored(f"{MODULE}.weight") is None
    plain = open_path(folder).read(f"{MODULE}.weight")
    for name, index in (("b", torch.full((256,), -1)), ("c", torch.arange(256) // 32)):
        same = open_path(edited(folder, tmp_path / name, {f"{MODULE}.weight_g_idx": index.to(torch.int32)}))
        assert torch.equal(same.read(f"{MODULE}.weight"), plain) and same.stored(f"{MODULE}.weight")
    for name, wrong in (("d", order + 1), ("e", order[:-1]), ("f", order.float()), ("g", order - 2)):
        index = wrong if wrong.is_floating_point() else wrong.to(torch.int32)
        with pytest.raises(BadFile, match="g_idx"):
            open_path(edited(folder, tmp_path / name, {f"{MODULE}.weight_g_idx": index}))


@pytest.mark.parametrize("location", ["input", "output"])
def test_rotations_go_into_the_weights(folder: Path, tmp_path: Path, location: str) -> None:
    turn = TURN if location == "input" else TURN[:128, :128]
    asked = {"transform_config": rotated(location)}
    made = edited(folder, tmp_path / "a", {f"{MODULE}.u_{location}.weight": turn}, **asked)
    found, plain = open_path(made), open_path(folder).read(f"{MODULE}.weight")
    wanted = plain @ turn.T if location == "input" else turn.T @ plain
    torch.testing.assert_close(found.read(f"{MODULE}.weight"), wanted, rtol=1e-5, atol=1e-5)
    assert set(found.tensors) == set(open_path(folder).tensors) and unread(found) is None
    other = "model.layers.0.mlp.up_proj.weight"
    assert found.stored(other) is not None and torch.equal(found.read(other), open_path(folder).read(other))


def test_hadamard_matrices_need_not_be_stored(folder: Path, tmp_path: Path) -> None:
    asked = {"transform_config": rotated("input", "hadamard", head_dim=4)}
    found = open_path(edited(folder, tmp_path / "a", {}, **asked)).read(f"{MODULE}.weight")
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    plain = open_path(folder).read(f"{MODULE}.weight")
    torch.testing.assert_close(found, (plain.unflatten(-1, (-1, 4)) @ signs.T).flatten(-2))


def test_what_is_in_the_weights_already_changes_nothing(folder: Path, tmp_path: Path) -> None:
    made = edited(folder, tmp_path / "a", {}, transform_config=rotated("weight_input"))
    assert open_path(made).stored(f"{MODULE}.weight") is not None


WRONG: dict[str, tuple[dict[str, torch.Tensor | None], dict[str, Any], str]] = {
    "no matrix": ({}, rotated("input"), "no matrix that fits"),
    "another size": ({f"{MODULE}.u_input.weight": TURN[:64, :64]}, rotated("input"), "no matrix that fits"),
    "whole numbers": ({f"{MODULE}.u_input.weight": TURN.int()}, rotated("input"), "no matrix"),
    "no permutation": (
        {f"{MODULE}.u_input.weight": TURN},
        rotated("input", "random-hadamard", randomize=True),
        "no permutation",
    ),
    "a bias": (
        {f"{MODULE}.u_output.weight": TURN[:128, :128], f"{MODULE}.bias": torch.ones(128)},
        rotated("output"),
        "bias",
    ),
    "no place": ({}, rotated("somewhere"), "no place"),
    "no type": ({}, rotated("input", "spin"), "'spin'"),
    "no width": ({}, rotated("input", head_dim=0), "head_dim"),
    "no groups": ({}, {"config_groups": [1]}, "not groups"),
    "queries alone": ({}, rotated("q_attn", "hadamard"), "queries and keys"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rotations_that_cannot_be_undone(folder: Path, tmp_path: Path, case: str) -> None:
    tensors, asked, said = WRONG[case]
    with pytest.raises((BadFile, Refused), match=said):
        open_path(edited(folder, tmp_path / "a", tensors, transform_config=asked))


@pytest.mark.parametrize("target", ["LlamaMLP", "model.layers.0.mlp", "re:.*self_attn$"])
def test_only_linear_layers(folder: Path, tmp_path: Path, target: str) -> None:
    asked = rotated("input", "hadamard")
    asked["config_groups"]["u"]["apply"][0]["targets"] = [target]
    with pytest.raises(Refused, match=r"undone|no linear layer"):
        open_path(edited(folder, tmp_path / "a", {}, transform_config=asked))


def rounding(folder: Path, out: Path) -> Path:
    source = open_source(str(folder.parent / "model"))
    mill.quantize(source, "nearest : int8-channel-sym, input=int8-token > compressed-tensors", out)
    return out


def test_inputs_rounded_in_a_rotated_basis(folder: Path, tmp_path: Path) -> None:
    """The layer computes what it does where inputs are rotated, rounded, multiplied with what is stored."""
    made = rounding(folder, tmp_path / "made")
    plain = open_path(made)
    asked = rotated("input", "hadamard", head_dim=64)
    found = open_path(edited(made, tmp_path / "a", {}, transform_config=asked))
    how, x = inputs_of(found)[f"{MODULE}.weight"], torch.randn(5, 256) * torch.rand(256) ** 4
    assert str(how) == "int8-token in a rotated basis"
    assert str(inputs_of(found)["model.layers.0.mlp.up_proj.weight"]) == "int8-token"
    assert how.basis is not None
    turned = how.basis().turn(x)
    signs = torch.ones(1, 1)
    for _ in range(6):
        signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), signs)
    torch.testing.assert_close(turned, (x.unflatten(-1, (-1, 64)) @ signs / 8).flatten(-2))
    wanted = rounded(how.grid, turned, {}) @ plain.read(f"{MODULE}.weight").T
    torch.testing.assert_close(seen(how, x) @ found.read(f"{MODULE}.weight").T, wanted, rtol=1e-4, atol=1e-4)
    report = convert(found, "safetensors", tmp_path / "dense", requantize=True)
    assert any("in a rotated basis" in text for text in report.plan["remarks"])


def test_bases_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    made, name = rounding(folder, tmp_path / "made"), f"{MODULE}.u_input.weight"
    with pytest.raises(Refused, match="not orthogonal"):
        open_path(edited(made, tmp_path / "a", {name: TURN}, transform_config=rotated("input")))
    asked = rotated("input", "hadamard")
    found = open_path(edited(made, tmp_path / "b", {name: 17 * TURN}, transform_config=asked))
    basis = inputs_of(found)[f"{MODULE}.weight"].basis
    with pytest.raises(BadFile, match="not orthogonal"):
        assert basis is not None and basis() is None
    found = open_path(edited(made, tmp_path / "c", {name: 16 * TURN}, transform_config=asked))
    basis = inputs_of(found)[f"{MODULE}.weight"].basis
    assert basis is not None
    torch.testing.assert_close(basis().turn(torch.eye(256)), TURN)
    torch.testing.assert_close(basis().turn_back(TURN), torch.eye(256), rtol=0, atol=1e-5)
