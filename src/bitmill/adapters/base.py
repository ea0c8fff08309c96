"""A transformers model whose linears are frozen on their grids: what adapters are learned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitmill.adapters.frozen import FrozenLinear
from bitmill.calibrate.skeleton import empty_model, find_layers
from bitmill.calibrate.stream import Stream
from bitmill.checkpoint.stored_types import type_of
from bitmill.core.axes import Checkpoint, inputs_of
from bitmill.core.errors import BadFile, Refused
from bitmill.core.registry import parse_grid
from bitmill.core.types import Quantized, Row
from bitmill.families.base import LINEAR_ROLES, describe, is_expert

DENSE = ("f32", "f16", "bf16", "f64")
DEFAULT_GRID = "nf4-b64-dq"
_MATRIX = 2


@dataclass(frozen=True, eq=False)
class Base:
    """What adapters are learned on.

    Attributes:
        model: transformers' own, every linear of its blocks a :class:`FrozenLinear`.
        body: path of the part of it that ends before the head.
        held: bytes of the frozen weights.
    """

    model: PreTrainedModel
    body: str
    held: int


def base_rows(checkpoint: Checkpoint, grid: str | None) -> tuple[Row, ...]:
    """Every linear of the blocks, with the grid that it is frozen on; from headers alone.

    ``solved`` says that the weight is rounded to that grid here; where the source stores it quantized, that
    stays as it is, and ``grid`` is ``f32`` in its row until it is read.

    Raises:
        Refused: the source's inputs are rounded when it runs, a grid is asked for although the source is
            quantized, or the grid does not hold a shape.
    """
    if inputs_of(checkpoint):
        raise Refused(
            "this model rounds the inputs of its linears when it runs, which learning does not",
            where=str(checkpoint.path),
            fix="give the model it was made from; --base-grid then freezes it on any grid",
        )
    family, rows = describe(checkpoint.config), []
    wanted = parse_grid((grid or DEFAULT_GRID).lower())
    for name, fact in checkpoint.tensors.items():
        role, layer = family.role(name)
        if layer is None or role not in LINEAR_ROLES or len(fact.shape) != _MATRIX:
            continue
        kind = type_of(checkpoint, name)
        if kind not in DENSE:
            if grid is not None:
                raise Refused(
                    f"the model is quantized already ({kind}): its own codes are the base",
                    where=f"{name} in {checkpoint.path}",
                    fix="leave out --base-grid, or give the original model",
                )
            rows.append(Row(name, role, layer, fact.shape, parse_grid("f32"), False, kind))
            continue
        refusal = wanted.refuses(fact.shape)
        if refusal is not None:
            raise Refused(
                f"{wanted} cannot hold a weight of shape {list(fact.shape)}: {refusal}",
                where=name,
                fix="a grid with shorter blocks, for example --base-grid nf4-b32-dq or int8-channel-sym",
            )
        rows.append(Row(name, role, layer, fact.shape, wanted, True, "frozen"))
    if not rows:
        raise Refused(
            "no linear is found inside the blocks of this model",
            where=f"{checkpoint.path}: model_type {checkpoint.config.get('model_type')!r}",
            fix="its blocks must be called model.layers.N",
        )
    return tuple(rows)


def taught_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Those that get an adapter: all but single experts, which transformers keeps as stacks."""
    return tuple(row for row in rows if not is_expert(row.name))


def frozen(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    dtype: torch.dtype,
    device: torch.device,
    tell: Callable[[int, int], None],
) -> Base:
    """The model with every row frozen, read and rounded one weight at a time.

    Raises:
        BadFile: weights and config.json do not belong together.
    """
    by_name = {row.name: row for row in rows}

    def read(name: str) -> Tensor:
        if name in by_name:  # only its shape is looked at
            return torch.zeros(1).expand(by_name[name].shape)
        return checkpoint.read(name)

    stream = Stream(checkpoint, str(device), dtype, read=read)
    model = empty_model(checkpoint.config, device)
    path, layers = find_layers(model)
    held = 0
    for index in range(stream.layers):
        block = stream.block(index)
        for inside, linear in block.linears().items():
            row = by_name.get(f"{block.prefix}{inside}.weight")
            if row is None:
                continue
            made = FrozenLinear(_quantized(checkpoint, row), linear.bias, dtype, device)
            held += made.held_bytes
            block.module.set_submodule(stream.family.inside(inside), made)
        layers[index] = block.module
        tell(index + 1, stream.layers)
    _fill(model, checkpoint, dtype, device)
    return Base(model, path.rpartition(".")[0], held)


def experts_of_rows(rows: Sequence[Row]) -> bool:
    """Whether single experts are among them."""
    return any(is_expert(row.name) for row in rows)


def _quantized(checkpoint: Checkpoint, row: Row) -> Quantized:
    if not row.solved:
        stored = checkpoint.stored(row.name)
        if stored is not None:
            return stored
        raise BadFile(
            "the header calls this weight quantized, and no grid here describes it",
            where=f"{row.name} in {checkpoint.path}",
            fix="bitmill convert writes it in a container of its own, or give the original model",
        )
    weight = checkpoint.read(row.name).float()
    if not torch.isfinite(weight).all():
        raise Refused(
            "weights are NaN or infinite",
            where=f"{row.name} in {checkpoint.path}",
            fix="the source is damaged: fetch or export it again",
        )
    made = row.grid.round(weight)
    return replace(made, codes=made.codes.clone())


def _fill(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """What stands outside the blocks, dense; a head that the file lacks is the embedding."""
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        path, _, leaf = name.rpartition(".")
        if name in checkpoint.tensors:
            value = nn.Parameter(checkpoint.read(name).to(device, dtype), requires_grad=False)
            if value.shape != parameter.shape:
                raise BadFile(
                    f"shape {tuple(value.shape)} where the architecture wants {tuple(parameter.shape)}",
                    where=name,
                    fix="config.json and the weights do not belong together",
                )
            model.get_submodule(path)._parameters[leaf] = value
    head = model.get_output_embeddings()
    if head is not None and head.weight.is_meta:
        head.weight = model.get_input_embeddings().weight
    rest = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if rest:
        raise BadFile(
            f"the checkpoint has no tensor {rest[0]!r}, which {type(model).__name__} needs",
            where=str(checkpoint.path),
            fix="the file is incomplete, or stores this architecture under other names",
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
