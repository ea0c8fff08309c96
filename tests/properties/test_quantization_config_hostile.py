"""Any quantization_config at all: the folder is read, or refused with a sentence; nothing else comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.bitmill import Bitmill
from bitmill.containers.bitsandbytes import Bitsandbytes
from bitmill.containers.compressed_tensors import CompressedTensors
from bitmill.containers.gptq import Gptq
from bitmill.containers.hqq import Hqq
from bitmill.core.axes import Container, inputs_of
from bitmill.core.errors import BitmillError
from bitmill.core.inputs import find_inputs
from bitmill.core.registry import parse_grid
from bitmill.source import open_path
from tests.tiny import make_model
from tests.written import rows_of, write

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
GRIDS: dict[type[Container], str] = {Bitsandbytes: "nf4-b32-dq", Hqq: "int4-g32-fz"}
WORDS = [
    "int",
    "float",
    "group",
    "channel",
    "tensor",
    "block",
    "tensor_group",
    "token",
    "local",
    "torch.uint8",
    "Linear",
    "re:.*",
    "gptq_v2",
    "re:(",
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.just(1 << 80)
    | st.floats()
    | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["g", "config_groups"]), inner, max_size=2)
    ),
    max_leaves=4,
)


CONTAINERS = (CompressedTensors(), Gptq(), Bitmill(), Bitsandbytes(), Hqq())
CASES: list[tuple[Container, str]] = [(container, "") for container in CONTAINERS]
CASES += [(CompressedTensors(), grid) for grid in ("int8-token", "fp8-e4m3-g32-token")]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{type(c[0]).__name__}{c[1]}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    container, inputs = request.param
    place = tmp_path_factory.mktemp("hostile")
    source = SafetensorsFolder(make_model(place / "model", "llama", **SIZES))
    grid = parse_grid(GRIDS.get(type(container), "int4-g32-asym"))
    rows = rows_of(container, source, "f32", container.adapt(grid, "f32"))
    rows = [replace(row, inputs=find_inputs(inputs)) if row.solved else row for row in rows]
    return write(container, source, rows, place).path


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, item in inside for p in places(item, (*path, key)))]


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
)
@given(st.data())
def test_any_settings(folder: Path, data: st.DataObject) -> None:
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    *way, last = data.draw(st.sampled_from(places(config["quantization_config"])[1:]))
    at = config["quantization_config"]
    for key in way:
        at = at[key]
    at[last] = data.draw(VALUES)
    try:
        (folder / "config.json").write_text(json.dumps(config))
        checkpoint = open_path(folder)
        for name, facts in checkpoint.tensors.items():
            assert tuple(checkpoint.read(name).shape) == facts.shape
            checkpoint.stored(name)
        for name, how in inputs_of(checkpoint).items():
            assert how.grid.refuses(checkpoint.tensors[name].shape[1]) is None
    except BitmillError as refusal:
        assert refusal.what
    finally:
        (folder / "config.json").write_text(text)
