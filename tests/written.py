"""Write a model through a container by plain rounding, without the mill: what container tests read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitmill.core import registry
from bitmill.core.axes import Checkpoint, Container, Grid
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES, describe
from bitmill.inputs import with_inputs


@dataclass(frozen=True, eq=False)
class Written:
    """An output, and everything that went into it."""

    path: Path
    rows: Sequence[Row]
    quantized: Mapping[str, Quantized]
    images: tuple[FileImage, ...]


def rows_of(
    container: Container, model: Checkpoint, dtype: str, grid: Grid, other: Mapping[str, Grid] | None = None
) -> list[Row]:
    """Every linear of the blocks on ``grid`` (or on ``other``'s for its name or role), the rest kept."""
    family, chosen = describe(model.config), other or {}
    rows = []
    for fact in model.tensors.values():
        role, layer = family.role(fact.name)
        placed = chosen.get(fact.name) or chosen.get(role) or (grid if role in LINEAR_ROLES else None)
        kept = registry.parse_grid(container.default_grid(dtype, role))
        rows.append(Row(fact.name, role, layer, fact.shape, placed or kept, placed is not None, "test"))
    return list(with_inputs(rows, None, container, ""))


def write(container: Container, model: Checkpoint, rows: Sequence[Row], folder: Path) -> Written:
    """Realise the container's file images under ``folder / "out"``; every slot is written exactly once."""
    images = container.files(rows, model, {"recipe": "a : b > c"})
    out = folder / "out"
    if images[0].path:
        out.mkdir(parents=True)
    content = {image.path: bytearray(image.bytes_) for image in images}
    places = {slot.name: (image.path, slot) for image in images for slot in image.slots}
    for image in images:
        content[image.path][: len(image.head)] = image.head
    quantized = {row.name: row.grid.round(model.read(row.name).float()) for row in rows}
    for row in rows:
        packed = container.pack(row, quantized[row.name], model)
        assert {slot: len(data) for slot, data in packed.items()} == dict(container.slots(row, model))
        for slot, data in packed.items():
            path, place = places.pop(slot)
            assert place.bytes_ == len(data)
            content[path][place.offset : place.offset + len(data)] = data
    assert not places, "every slot belongs to exactly one row"
    for path, data in content.items():
        (out / path if path else out).write_bytes(data)
    return Written(out, rows, quantized, images)
