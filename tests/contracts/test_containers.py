"""The laws of a container, run over every member the registry finds and every grid it does not refuse."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.core import registry
from bitmill.core.axes import Checkpoint, Container, Grid
from bitmill.core.errors import Refused
from bitmill.source import open_path
from tests.tiny import make_model
from tests.written import rows_of, write

CONTAINERS: dict[str, Container] = {name: cls() for name, cls in registry.members("containers").items()}
GRIDS = [grid for cls in registry.members("grids").values() for grid in cls.examples()]
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8}


def held(container: Container, dtype: str) -> list[Grid]:
    """Every example grid, as the container would store it, that it takes for a block's linears."""
    adapted = dict.fromkeys(
        container.adapt(grid, dtype) for grid in GRIDS if str(grid) not in ("f32", "f16", "bf16")
    )
    return [grid for grid in adapted if container.refuses(grid, "q", (256, 256)) is None]


CASES = [
    pytest.param(name, dtype, grid, id=f"{name}-{dtype}-{grid}")
    for name, container in CONTAINERS.items()
    for dtype in DTYPES
    for grid in held(container, dtype)
]
SAME_FILE = {"mxfp4-floor": "mxfp4"}
"""Two rules of rounding whose files are alike: the values read back are on the other grid."""
every_container = pytest.mark.parametrize("name", CONTAINERS)


@cache
def source(dtype: str) -> Checkpoint:
    folder = Path(mkdtemp(prefix="bitmill-tests-"))
    return SafetensorsFolder(make_model(folder, "llama", tied=True, dtype=DTYPES[dtype], **SIZES))


@pytest.mark.parametrize(("name", "dtype", "grid"), CASES)
def test_reads_back_bit_for_bit(name: str, dtype: str, grid: Grid, tmp_path: Path) -> None:
    container, model = CONTAINERS[name], source(dtype)
    try:
        written = write(container, model, rows_of(container, model, dtype, grid), tmp_path)
    except Refused as refusal:
        assert dtype == "f32" and "dtype=bf16" in str(refusal.fix)
        return
    assert [n for n, c in CONTAINERS.items() if c.recognises(written.path)] == [name]
    again = open_path(written.path)
    assert set(again.tensors) == {row.name for row in written.rows}
    for row in written.rows:
        wanted = written.quantized[row.name]
        assert again.tensors[row.name].shape == row.shape
        assert torch.equal(again.read(row.name).float(), wanted.dense()), row.name
        if not row.solved:
            continue
        found = again.stored(row.name)
        assert found is not None and found.shape == wanted.shape and found.same_values(wanted)
        named = str(grid) if name == "bitmill" else SAME_FILE.get(str(grid), str(grid))
        same = registry.parse_grid(named)  # a file of our own names the rule, too
        assert container.adapt(found.grid, dtype) == container.adapt(same, dtype)
        assert torch.equal(found.codes.to(torch.int64), wanted.codes.to(torch.int64))
        assert set(found.params) == set(wanted.params)
        for key, value in wanted.params.items():
            assert torch.equal(found.params[key], value) and found.params[key].dtype == value.dtype, key
    keys = (
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "tie_word_embeddings",
        "model_type",
        "vocab_size",
    )
    assert {k: again.config[k] for k in keys} == {k: model.config[k] for k in keys}
    assert "quantization_config" not in again.config
    assert again.digest == open_path(written.path).digest != model.digest


@pytest.mark.parametrize(
    ("name", "dtype", "grid"), [c for c in CASES if "bf16" in str(c.id)][:: max(len(CASES) // 12, 1)]
)
def test_files_are_disjoint_and_exact(name: str, dtype: str, grid: Grid, tmp_path: Path) -> None:
    container, model = CONTAINERS[name], source(dtype)
    written = write(container, model, rows_of(container, model, dtype, grid), tmp_path)
    for image in written.images:
        size = (written.path / image.path if image.path else written.path).stat().st_size
        at = len(image.head)
        for slot in sorted(image.slots, key=lambda s: s.offset):
            assert slot.offset >= at
            at = slot.offset + slot.bytes_
        assert at <= size == image.bytes_


@every_container
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapting_settles(name: str, dtype: str) -> None:
    container = CONTAINERS[name]
    for grid in GRIDS:
        once = container.adapt(grid, dtype)
        assert container.adapt(once, dtype) == once
        assert registry.parse_grid(str(once)) == once


@every_container
def test_refusals_are_sentences(name: str) -> None:
    container = CONTAINERS[name]
    for grid in GRIDS:
        for role, shape in (("q", (256, 256)), ("embed", (400, 256)), ("norm", (256,)), ("down", (256, 250))):
            reason = container.refuses(grid, role, shape)
            assert reason is None or len(reason.split()) > 4


@every_container
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_is_held(name: str, dtype: str) -> None:
    container = CONTAINERS[name]
    for role, shape in (
        ("embed", (400, 256)),
        ("norm", (256,)),
        ("q", (256, 256)),
        ("bias", (256,)),
        ("head", (400, 256)),
    ):
        grid = registry.parse_grid(container.default_grid(dtype, role))
        assert container.refuses(grid, role, shape) is None


@every_container
def test_a_kept_tensor_may_come_in_parts(name: str) -> None:
    container, model = CONTAINERS[name], source("f32")
    grid = registry.parse_grid(container.default_grid("f32", "embed"))
    row = next(r for r in rows_of(container, model, "f32", grid) if r.role == "embed")
    values = model.read(row.name)
    ((_, whole),) = container.pack(row, row.grid.round(values), model).items()
    parts = b""
    for part in values.split(96):
        part_row = replace(row, shape=tuple(part.shape))
        parts += next(iter(container.pack(part_row, row.grid.round(part), model).values()))
    assert parts == whole


@every_container
def test_a_stranger_is_not_recognised(name: str, tmp_path: Path) -> None:
    container = CONTAINERS[name]
    (tmp_path / "file").write_bytes(b"\x00" * 64)
    (tmp_path / "empty").write_bytes(b"")
    strangers = (tmp_path, tmp_path / "file", tmp_path / "empty", tmp_path / "absent", source("f32").path)
    assert not any(container.recognises(path) for path in strangers)
