"""Which linears of a plan get their inputs rounded, whether the file says so, and what calibration fixes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from bitmill.core.axes import Checkpoint, Container, InputContainer, inputs_of, torch_dtype
from bitmill.core.errors import Refused
from bitmill.core.inputs import parse_inputs
from bitmill.core.types import Inputs, Moments, Params, Row
from bitmill.families.base import is_expert
from bitmill.numerics.inputs import fixed_params

_DENSE = ("f32", "f16", "bf16")
_HOW = "name a container that holds them: > compressed-tensors, or > bitmill"


def with_inputs(rows: Sequence[Row], text: str | None, container: Container, called: str) -> tuple[Row, ...]:
    """The rows, with the input grid of every linear of the blocks that the recipe quantizes; the embedding,
    the head and what is kept have their inputs left as they are.

    Args:
        text: the recipe's input grid; None leaves every input.
        called: the container's name.

    Raises:
        Refused: no file of this container says that, for a weight on this grid or of this shape.
    """
    if text is None:
        implied = container.implied_inputs(rows) if isinstance(container, InputContainer) else {}
        return tuple(replace(row, inputs=implied.get(row.name)) if row.solved else row for row in rows)
    grid = parse_inputs(text)
    placed = {row.name for row in rows if row.solved and str(row.grid) not in _DENSE}
    if not placed:
        raise Refused("inputs of layers that are kept stay as they are", fix=f"drop input={grid}")
    made = []
    for row in rows:
        if row.name not in placed:
            made.append(row)
            continue
        if not isinstance(container, InputContainer):
            raise Refused(
                f"{called} files do not say that inputs are rounded to {grid}", where=row.name, fix=_HOW
            )
        if is_expert(row.name) and grid.extent == "tensor":
            raise Refused(
                "inputs of single experts take no scale of a whole tensor: each sees some tokens of many "
                "texts, which calibration does not reach yet",
                where=row.name,
                fix="input=int8-token, fp8-e4m3-token and their like take a scale a token",
            )
        reason = container.refuses_inputs(row.grid, grid) or grid.refuses(row.shape[1])
        if reason is not None:
            raise Refused(f"weights on {row.grid} with inputs on {grid}: {reason}", where=row.name)
        made.append(replace(row, inputs=grid))
    return tuple(made)


def input_remarks(rows: Sequence[Row], source: Checkpoint) -> tuple[str, ...]:
    """What a reader of the plan must know of rounded inputs: whose, what calibration fixes, and what the
    source does that is not taken over."""
    remarks = []
    rounding = [row for row in rows if row.inputs is not None]
    if rounding:
        grid = rounding[0].inputs
        kept = sum(row.layer is not None and len(row.shape) > 1 for row in rows) - len(rounding)
        left = "embedding and head are left" + (f", and {kept} kept matrices" if kept else "")
        remarks.append(f"inputs of {len(rounding)} linears are rounded to {grid} at run time; {left}")
    if any(row.inputs.fixed for row in rounding if row.inputs is not None):
        remarks.append(
            f"the {' and '.join(grid.fixed) if grid else ''} of each input is fixed by calibration"
        )
    known = inputs_of(source)
    if known:
        kinds = Counter(str(how) for how in known.values())
        listed = ", ".join(f"{n} to {kind}" for kind, n in kinds.most_common())
        remarks.append(
            f"the source rounds inputs when it runs ({listed}): not taken over, input=… in the recipe says so"
        )
    return tuple(remarks)


def fixed_by(row: Row, moments: Moments | None, dtype: str) -> Params:
    """What the inputs that a linear got fix of their grid, for a file whose kept values are ``dtype``.

    Raises:
        Refused: their range is not known.
    """
    if row.inputs is None or not row.inputs.fixed:
        return {}
    if moments is None or moments.range is None:
        raise Refused(
            f"{row.inputs} needs the range of every input", where=row.name, fix="calibrate: --calib TEXT"
        )
    fixed = fixed_params(row.inputs, *moments.range, torch_dtype(dtype))
    return {key: value.cpu() for key, value in fixed.items()}


def needs_zero(group: Sequence[Row]) -> bool:
    """Whether calibration fixes a zero point for any of these linears."""
    return any(row.inputs is not None and "zero" in row.inputs.fixed for row in group)


def same_inputs(found: Mapping[str, Inputs], rows: Sequence[Row], fixed: Mapping[str, Params]) -> bool:
    """Whether a file says of its linears' inputs what a plan does, and holds what was fixed of some."""
    wanted = {row.name: row.inputs for row in rows if row.inputs is not None}
    if {name: how.grid for name, how in found.items()} != wanted:
        return False
    turned = {row.name for row in rows if row.inputs is not None and row.turn}
    if turned != {name for name, how in found.items() if how.basis is not None}:
        return False
    return all(
        torch.equal(found[name].fixed[k], v) for name, values in fixed.items() for k, v in values.items()
    )
