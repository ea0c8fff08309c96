"""Rounding of what single experts multiply, where transformers runs all experts of a block as one module.

An expert's gate and up read the tokens that were sent to it, down what they make of them; each may be rounded
in its own way, before the very products that transformers computes (DeepSeekMoE, arXiv 2401.06066; Mixtral,
arXiv 2401.04088).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from bitmill.core.errors import Refused
from bitmill.core.types import Inputs
from bitmill.numerics.inputs import check_inputs, seen

Joined = Mapping[str, tuple[str, ...]]
"""Parameter path in transformers' layer to the module paths it is made of, as a family has them."""

_Place = tuple[str, int, int]  # parameter, which of its parts, expert


def check_all_inputs(
    model: nn.Module, layers: str, inputs: Mapping[str, Inputs], joined: Joined, where: str
) -> None:
    """As :func:`~bitmill.numerics.inputs.check_inputs`, experts included.

    Args:
        layers: path of the list of blocks in ``model``.
        joined: what a block's stacks are made of.

    Raises:
        Refused: the model does not run that, or a scale would be shared by the tokens of a sequence.
    """
    found = {
        name: (experts, place)
        for index, block in (model.get_submodule(layers).named_children() if joined else ())
        for name, experts, place in _places(block, f"{layers}.{index}.", joined)
    }
    for name in found.keys() & inputs.keys():
        (experts, (parameter, _, _)), grid = found[name], inputs[name].grid
        columns = experts.get_parameter(parameter).shape[-1]
        reason = grid.refuses(columns)
        if grid.extent == "tensor" and not grid.static:
            reason = "its experts see tokens of all sequences at once, and this takes a scale for each"
        if reason is not None:
            raise Refused(f"inputs of {name} are to be rounded to {grid}: {reason}", where=where)
    rest = {name: how for name, how in inputs.items() if name not in found}
    check_inputs(model, rest, where)


def round_experts(block: nn.Module, prefix: str, inputs: Mapping[str, Inputs], joined: Joined) -> None:
    """Let the experts of a block round what they multiply; ``prefix`` is the block's path and a dot."""
    told: dict[nn.Module, dict[_Place, Inputs]] = {}
    for name, experts, place in _places(block, prefix, joined):
        if name in inputs:
            told.setdefault(experts, {})[place] = inputs[name]
    for experts, known in told.items():
        experts.forward = partial(_run, experts, known)


def _places(block: nn.Module, prefix: str, joined: Joined) -> Iterator[tuple[str, nn.Module, _Place]]:
    """Canonical name of every expert's weight, the module that holds it, and where."""
    modules = dict(block.named_modules()) if joined else {}
    for path, parts in joined.items():
        module, _, parameter = path.rpartition(".")
        experts = modules.get(module)
        if experts is None or "{}" not in parts[0]:
            continue
        for expert in range(experts.get_parameter(parameter).shape[0]):
            for part, template in enumerate(parts):
                yield f"{prefix}{template.format(expert)}.weight", experts, (parameter, part, expert)


def _run(
    experts: nn.Module, told: Mapping[_Place, Inputs], hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """What the module computes for ``tokens hidden``, each of whose tokens goes to the experts of its row of
    ``index`` with the weights beside them."""
    out = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        x = hidden[token]
        gate, up = (
            nn.functional.linear(_seen(told, ("gate_up_proj", part, expert), x), weight)
            for part, weight in enumerate(experts.get_parameter("gate_up_proj")[expert].chunk(2))
        )
        x = experts.get_submodule("act_fn")(gate) * up
        x = _seen(told, ("down_proj", 0, expert), x)
        x = nn.functional.linear(x, experts.get_parameter("down_proj")[expert])
        out.index_add_(0, token, (x * weights[token, slot, None]).to(out.dtype))
    return out


def _seen(told: Mapping[_Place, Inputs], place: _Place, x: Tensor) -> Tensor:
    how = told.get(place)
    return x if how is None else seen(how, x)
