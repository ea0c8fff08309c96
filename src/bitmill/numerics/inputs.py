"""Rounding of a linear layer's inputs, operation by operation as the compressed-tensors package does it in
float32.

Runtimes that fuse it into a kernel differ in last places (vLLM's int8 kernels divide the largest value by
127, not 127.5). MX scales follow the rule of that package: the power of two below, or the one above from 1.75
times it on (OCP Microscaling Formats v1.0 leaves the choice open), or else, as ``mxfp8-ceil``, the least one
that cuts nothing off; NVFP4's block scales are E4M3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.core.caches import KEYS
from bitmill.core.errors import Refused
from bitmill.core.experts import expert_of
from bitmill.core.inputs import HELD, InputGrid
from bitmill.core.registry import cache_method
from bitmill.core.types import Inputs, Params
from bitmill.numerics import llm_int8
from bitmill.numerics.floats import ELEMENTS, power_of_two, round_to

_E4M3, _E2M1 = ELEMENTS["e4m3"], ELEMENTS["e2m1"]
_NO_SCALE = torch.finfo(torch.float32).eps  # what stands for a scale of 0, in float32 and in E4M3
_NO_BLOCK_SCALE = 0.125
_OFFSET = {"e4m3": 8, "e2m3": 2, "e2m1": 2}  # binary exponent of the largest element
_MANTISSA = (1 << 23) - 1
_CARRY = {"e4m3": 21, "e2m3": 19, "e2m1": 21}  # bit of the mantissa whose addition reaches the next power


def fixed_params(grid: InputGrid, low: Tensor, high: Tensor, dtype: torch.dtype) -> Params:
    """What calibration fixes, from the smallest and largest input that it saw (float32, scalars or one a
    head): ``scale`` and ``zero`` of as many numbers, rounded to ``dtype`` as the file holds them, or NVFP4's
    ``gain``."""
    if grid.scaling == "nv":
        largest = torch.maximum(-low, high).clamp_min(torch.finfo(torch.float32).tiny)
        gain = _E4M3.largest * _E2M1.largest / largest
        return {"gain": torch.where(gain.isfinite(), gain, 1.0).reshape(1)}
    if not grid.static:
        return {}
    scale, zero = _range(grid, low.reshape(-1), high.reshape(-1))
    scale = scale.to(dtype).to(torch.float32)
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    return {"scale": scale} if grid.symmetric else {"scale": scale, "zero": zero}


def rounded(grid: InputGrid, x: Tensor, fixed: Params) -> Tensor:
    """``x`` (``… tokens in``, any float type) as the layer's matrix product sees it, in ``x``'s own type."""
    if grid.scaling == "loud":
        return llm_int8.rounded(x, grid.threshold)
    if grid.scaling == "bitnet":
        return _bitnet(x)
    if grid.scaling == HELD:
        return _held(grid.method, x)
    wide = x.to(torch.float32)
    if grid.group:
        wide = wide.unflatten(-1, (-1, grid.group))
    scale, zero = scale_and_zero(grid, wide, {k: v.to(x.device) for k, v in fixed.items()})
    values = wide / scale
    if grid.element == "int":
        half = 2.0 ** (grid.bits - 1)
        values = values if zero is None else values + zero
        values = values.clamp(-half, half - 1).round()
        values = values if zero is None else values - zero
    else:
        values = round_to(values, ELEMENTS[grid.element])
    return (values * scale).reshape(x.shape).to(x.dtype)


def _held(method: str, x: Tensor) -> Tensor:
    """What a cache gives back of these keys or values: such ways treat both alike."""
    code = cache_method(method).code(KEYS, x.shape[-1], {})
    return code.back(code.unpack(code.pack(x.to(torch.float32)))).to(x.dtype)


def _bitnet(x: Tensor) -> Tensor:
    """As transformers' BitNet layers do (Ma et al., arXiv 2402.17764)."""
    wide = x.to(torch.float32)
    scale = 127 / wide.abs().amax(-1, keepdim=True).clamp_min(1e-5)
    return ((wide * scale).round().clamp(-128, 127) / scale).to(x.dtype)


def seen(how: Inputs, x: Tensor) -> Tensor:
    """:func:`rounded` as ``how`` says, in the basis that it says, and back."""
    if how.basis is None:
        return rounded(how.grid, x, how.fixed)
    basis = how.basis()
    return basis.turn_back(rounded(how.grid, basis.turn(x), how.fixed))


def input_hook(
    current: Callable[[], Inputs | None],
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    """A forward pre-hook that rounds a linear's input as ``current()`` says at that moment."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        inputs = current()
        return None if inputs is None else (straight(inputs, args[0]), *args[1:])

    return hook


def straight(inputs: Inputs, x: Tensor) -> Tensor:
    """:func:`rounded`, through which derivatives go as if nothing had been rounded (Bengio et al., arXiv
    1308.3432)."""
    values = seen(inputs, x.detach())
    return _Straight.apply(x, values) if x.requires_grad else values


class _Straight(torch.autograd.Function):
    """``values`` forwards, the identity backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def check_inputs(linears: Mapping[str, nn.Linear], inputs: Mapping[str, Inputs], where: str) -> None:
    """Refuse to run a model that cannot round all the inputs that its checkpoint says are rounded.

    Args:
        linears: of the model, by the names of their weights.

    Raises:
        Refused: a weight named is not one that a linear layer multiplies with, its input is not a whole
            number of groups, or an expert's would share a scale with the tokens of other sequences.
    """
    for name, how in inputs.items():
        if name not in linears:
            reason: str | None = "it is no linear layer here"
        elif expert_of(name) is not None and how.grid.extent == "tensor" and not how.grid.static:
            reason = "its experts see tokens of all sequences at once, and this takes a scale for each"
        else:
            reason = how.grid.refuses(linears[name].in_features)
        if reason is not None:
            raise Refused(
                f"inputs of {name} are to be rounded to {how.grid}: {reason}",
                where=where,
                fix="the weights alone: bitmill quantize MODEL hf-bf16 -o FOLDER, and measure that",
            )


def scale_and_zero(grid: InputGrid, x: Tensor, fixed: Params) -> tuple[Tensor, Tensor | None]:
    """What ``x`` is divided by and what is then added, in shapes that broadcast to it (runs of channels that
    share them are its last dimension)."""
    if grid.static:
        return fixed["scale"], fixed.get("zero")
    if grid.extent == "tensor":
        dims = tuple(range(1, x.dim())) if x.dim() > 2 else tuple(range(x.dim()))
    else:
        dims = (x.dim() - 1,)
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    if grid.scaling == "ceil":
        bits = (torch.maximum(-low, high) / ELEMENTS[grid.element].largest).contiguous().view(torch.int32)
        exponent = (bits >> 23) + ((bits & _MANTISSA) != 0)
        return power_of_two(exponent.clamp(1, 254).to(torch.uint8)), None
    if grid.scaling == "mx":
        size = torch.maximum(-low, high)
        carried = size.contiguous().view(torch.int32) + (1 << _CARRY[grid.element])
        exponent = (carried >> 23) - _OFFSET[grid.element]
        return power_of_two(exponent.clamp(0, 254).to(torch.uint8)), None
    if grid.scaling == "nv":
        size = torch.maximum(-low, high) / _E2M1.largest
        scale = round_to(fixed["gain"] * size, _E4M3)
        return torch.where(scale == 0, _NO_BLOCK_SCALE, scale) / fixed["gain"], None
    scale, zero = _range(grid, low, high)
    return scale, None if grid.symmetric else zero


def _range(grid: InputGrid, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of values between ``low`` and ``high``; 0 is always one of the grid's values."""
    low, high = low.clamp(max=0) * grid.clip, high.clamp(min=0) * grid.clip
    if grid.element != "int":
        scale = torch.maximum(-low, high) / ELEMENTS[grid.element].largest
        return torch.where(scale == 0, _NO_SCALE, scale), torch.zeros_like(scale)
    half, steps = 2.0 ** (grid.bits - 1), 2.0**grid.bits - 1
    if grid.symmetric:
        scale = torch.maximum(-low, high) / (steps / 2)
        return torch.where(scale == 0, _NO_SCALE, scale), torch.zeros_like(scale)
    scale = (high - low) / steps
    zero = (-half - low / scale).clamp(-half, half - 1).round()
    empty = scale == 0
    return torch.where(empty, _NO_SCALE, scale), torch.where(empty, 0.0, zero)
