"""The layers of a stored model as settings and shapes give them: what each is quantized to, and how it lies.

Every method has its own names for the tensors of a layer; a :class:`Layer` says the same of all, so that one
set of rules can judge them. Where settings and tensors contradict each other, a loader fails or misreads;
that is found here, whoever the loader is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitmill.checkpoint.safetensors import DENSE
from bitmill.core.errors import BadFile
from bitmill.families.base import LINEAR_ROLES, Family, describe, is_expert
from bitmill.trust.findings import Finding, of_error
from bitmill.trust.named import Naming, naming
from bitmill.trust.stored import Part, Stored

_WEIGHT = ".weight"
_NAMED = LINEAR_ROLES | {"head"}
_ELEMENTS = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2", "I8": "e2m1"}
_GGUF_ROLES = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o", "ffn_gate": "gate", "ffn_up": "up",
    "ffn_down": "down",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One weight matrix.

    Attributes:
        module: its path, without ``.weight``.
        role: the family's word for it.
        shape: ``(out, in)`` of the dense weight; zeros where headers do not say.
        kind: ``dense``, ``int``, ``float``, ``mx``, ``nv``, ``table``, or a ggml type.
        layout: the method's own word for how it is stored.
        bits: of a code.
        group: columns that share a scale; 0 is a whole row, -1 the whole weight, and a tile its width.
        zero: whether zero points are stored that a kernel must apply.
        order: whether groups are in an order of their own (``g_idx``).
        inputs: what its inputs are rounded to, ``int8 float8 int4 float4`` with ``-static`` where that is
            fixed; empty where they are left.
        element: of floating-point codes: ``e4m3``, ``e5m2``, ``e2m1``, ``e2m3``.
        expert: whether it is one of several of its block.
    """

    module: str
    role: str
    shape: tuple[int, int]
    kind: str = "dense"
    layout: str = "dense"
    bits: int = 16
    group: int = 0
    zero: bool = False
    order: bool = False
    inputs: str = ""
    element: str = ""
    expert: bool = False

    @property
    def block(self) -> str:
        """The path of what it is a part of: the attention, the MLP."""
        return self.module.rpartition(".")[0]


@dataclass(frozen=True)
class Layers:
    """All weight matrices of a model, and what is wrong between settings and tensors."""

    all: tuple[Layer, ...]
    found: tuple[Finding, ...] = ()


_Read = Callable[[Stored, str, Mapping[str, Part], Naming], Layer | None]
"""Reads the stored tensors of one module, by what stands behind its path, as a layer; None for no layer."""


def layers_of(model: Stored) -> Layers:
    """The layers, as far as the method is known here; a method that is not has none."""
    if model.gguf:
        return Layers(tuple(_of_gguf(model)))
    read = _READERS.get(model.method)
    if read is None:
        return Layers(())
    family = describe({**model.config, "model_type": str(model.config.get("model_type") or "unknown")})
    try:
        said = naming(model)
    except BadFile as error:
        return Layers((), (of_error(error, "layout"),))
    layers: list[Layer] = []
    found: list[Finding] = []
    for module, parts in _modules(model).items():
        role = family.role(f"{module}{_WEIGHT}")[0]
        try:
            layer = read(model, module, parts, said)
            if layer is not None:
                layers.append(replace(layer, role=role, expert=is_expert(f"{module}.")))
                found += _agrees(layers[-1], said, model, family)
        except BadFile as error:
            found.append(of_error(error, "layout"))
    return Layers(tuple(layers), _shortened(found))


def _agrees(layer: Layer, said: Naming, model: Stored, family: Family) -> Iterator[Finding]:
    """Whether settings and tensors say the same of one layer: dense, or quantized."""
    place = f"{layer.module} in {model.where}"
    named = layer.role in _NAMED
    told = said.quantized(layer.module, layer.role)
    if layer.kind == "dense" and told and named:
        yield Finding(
            "error" if family.names else "warning",
            "layout",
            "it is stored dense, and the settings say that it is quantized: loaders look for tensors that "
            "are not there",
            place,
            f"name it among what is left out ({said.left_out}), or fetch the right config.json",
        )
    if layer.kind != "dense" and told is False:
        yield Finding(
            "error",
            "layout",
            "it is stored quantized, and the settings say that it is dense",
            place,
            f"take it off {said.left_out}, or fetch the right config.json",
        )


def _shortened(found: list[Finding]) -> tuple[Finding, ...]:
    """The first of each kind, with how many there are."""
    kinds: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in found:
        kinds.setdefault((finding.level, finding.what, finding.fix), []).append(finding)
    return tuple(
        replace(some[0], where=f"{some[0].where}, and {len(some) - 1} more") if len(some) > 1 else some[0]
        for some in kinds.values()
    )


_PARTS = re.compile(
    r"\.(weight_packed|weight_scale_inv|weight_scale_2|weight_scale|weight_global_scale|weight_zero_point|"
    r"weight_shape|weight_g_idx|weight\.(?:absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..+)|"
    r"weight_format|SCB|qweight|qzeros|scales|g_idx|biases|weight|scale|qscale_weight|activation_scale|"
    r"input_scale|input_zero_point|input_global_scale|qscale_act)$"
)


def _modules(model: Stored) -> dict[str, dict[str, Part]]:
    """Stored tensors by module, then by what stands behind its path."""
    found: dict[str, dict[str, Part]] = {}
    for name, part in model.parts.items():
        end = _PARTS.search(name)
        if end is not None:
            found.setdefault(name[: end.start()], {})[end[1]] = part
    return found


def _dense(module: str, parts: Mapping[str, Part]) -> Layer | None:
    weight = parts.get("weight")
    if weight is None or len(weight.shape) != 2 or weight.dtype not in DENSE:
        return None
    return Layer(module, "", (weight.shape[0], weight.shape[1]))


def _two(part: Part | None, module: str, model: Stored) -> tuple[int, int]:
    """Dimensions of a stored matrix."""
    if part is None or len(part.shape) != 2 or 0 in part.shape:
        name = "a tensor" if part is None else f"{part.name} with shape {list(part.shape)}"
        raise BadFile(f"{name} is missing or no matrix", where=f"{module} in {model.where}")
    return part.shape[0], part.shape[1]


def _number(value: Any, what: str, model: Stored, most: int = 1 << 31) -> int:
    if type(value) is not int or not -1 <= value < most:
        raise BadFile(f"{what} is {value!r}", where=f"{model.where}: quantization_config")
    return value


def _compressed(model: Stored, module: str, parts: Mapping[str, Part], said: Naming) -> Layer | None:
    """compressed-tensors: the group of settings that names the module says all but the shape."""
    packed, weight = parts.get("weight_packed"), parts.get("weight")
    if packed is None and (weight is None or weight.dtype in DENSE):
        return _dense(module, parts)
    if packed is None and "weight_scale" not in parts:
        return None
    about = said.about(module)
    weights, inputs = about.get("weights") or {}, about.get("input_activations")
    bits = _number(weights.get("num_bits", 8), "num_bits", model, 33)
    scale = parts.get("weight_scale")
    group = _number(weights.get("group_size") or 0, "group_size", model)
    layer = Layer(
        module,
        "",
        (0, 0),
        layout=str(about.get("format") or model.settings.get("format")),
        bits=bits,
        zero="weight_zero_point" in parts,
        order="weight_g_idx" in parts,
        inputs=_inputs(inputs),
    )
    out, columns = _two(packed or weight, module, model)
    integer = weights.get("type", "int") == "int"
    if packed is not None and integer:
        groups = _two(scale, module, model)[1]
        columns = groups * group if group > 0 else columns * 32 // bits
    elif packed is not None:
        columns = columns * 8 // bits
    how = str(weights.get("strategy"))
    spread = {"channel": 0, "tensor": -1, "block": 128}.get(how, group)
    kind = "int" if integer else {"tensor_group": "nv", "group": "mx"}.get(how, "float")
    element = "" if integer else {4: "e2m1", 6: "e2m3"}.get(bits, "e4m3")
    return replace(layer, shape=(out, columns), group=spread, kind=kind, element=element)


def _inputs(about: Any) -> str:
    """What inputs are rounded to, in a word."""
    if not isinstance(about, dict):
        return ""
    fixed = "" if about.get("dynamic") in (True, "local") else "-static"
    return f"{'int' if about.get('type') == 'int' else 'float'}{about.get('num_bits')}{fixed}"


def _words(model: Stored, module: str, parts: Mapping[str, Part], said: Naming) -> Layer | None:
    """GPTQ, AWQ and AutoRound: bits from the words of zero points, groups from the scales."""
    if "qweight" not in parts:
        return _dense(module, parts)
    rows, wide = _two(parts["qweight"], module, model)
    groups, out = _two(parts.get("scales"), module, model)
    words = _two(parts.get("qzeros"), module, model)[1]
    bits = words * 32 // out
    across = rows != 0 and wide != out
    columns = rows if across else rows * 32 // max(bits, 1)
    if bits not in range(2, 9) or columns < groups:
        raise BadFile(
            f"{words} words of zero points for {out} outputs are no layout of packed integers",
            where=f"{module} in {model.where}",
        )
    settings = {**model.settings, **said.about(module)}
    zero = not settings.get("sym", not settings.get("zero_point", False))
    order = bool(settings.get("desc_act", False)) and "g_idx" in parts
    name = str(settings.get("version" if model.method == "awq" else "checkpoint_format", "gptq")).lower()
    if model.method == "auto-round":
        name = str(settings.get("packing_format", "auto_round"))
    group = 0 if groups == 1 else columns // groups
    return Layer(module, "", (out, columns), "int", name, bits, group, zero, order)


def _fp8(model: Stored, module: str, parts: Mapping[str, Part], said: Naming) -> Layer | None:
    """transformers' FP8 and its kin: a weight, and a scale of one number, one a row, or one a tile."""
    weight = parts.get("weight")
    element = _ELEMENTS.get(weight.dtype, "") if weight is not None else ""
    if weight is None or not element:
        return _dense(module, parts)
    out, columns = _two(weight, module, model)
    columns *= 2 if element == "e2m1" else 1
    names = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
    scale = next((parts[name] for name in names if name in parts), None)
    if scale is None:
        raise BadFile(
            f"it holds {weight.dtype} numbers, and no scale stands beside them",
            where=f"{module} in {model.where}",
        )
    group = -1
    if len(scale.shape) == 2 and scale.shape[1] and scale.shape != (1, 1):
        group = 0 if scale.shape[1] == 1 and scale.shape[0] == out else -(-columns // scale.shape[1])
        tile = model.settings.get("weight_block_size")
        if isinstance(tile, list) and len(tile) == 2 and type(tile[1]) is int and group:
            group = tile[1]
    kind = "mx" if scale.dtype in ("U8", "F8_E8M0") else "float"
    static = str(model.settings.get("activation_scheme", "dynamic")).lower() == "static"
    rounds = "" if model.settings.get("dequantize") is True else f"float8{'-static' if static else ''}"
    bits = 4 if element == "e2m1" else 8
    return Layer(module, "", (out, columns), kind, "fp8", bits, group, inputs=rounds, element=element)


def _modelopt(model: Stored, module: str, parts: Mapping[str, Part], said: Naming) -> Layer | None:
    """ModelOpt: FP8 as bytes, NVFP4 two to a byte with scales of 16 and a second scale."""
    weight, scale = parts.get("weight"), parts.get("weight_scale")
    if weight is None or weight.dtype in DENSE or scale is None:
        return _dense(module, parts)
    out, columns = _two(weight, module, model)
    static = "-static" if "input_scale" in parts else ""
    if weight.dtype == "U8":
        rounds = f"float4{static}" if static else ""
        return Layer(module, "", (out, 2 * columns), "nv", "NVFP4", 4, 16, inputs=rounds, element="e2m1")
    many = len(scale.shape) == 2 and scale.shape[1] > 1
    group = columns // scale.shape[1] if many else (0 if scale.shape and scale.shape[0] == out else -1)
    kind = "mx" if scale.dtype == "U8" else "float"
    return Layer(module, "", (out, columns), kind, "FP8", 8, group, inputs=f"float8{static}", element="e4m3")


def _bitsandbytes(model: Stored, module: str, parts: Mapping[str, Part], said: Naming) -> Layer | None:
    """bitsandbytes: codes of four bits have lost their shape, which a text beside them keeps."""
    weight = parts.get("weight")
    if weight is None or weight.dtype in DENSE:
        return _dense(module, parts)
    if any(name.startswith("weight.quant_state") for name in parts):
        return Layer(module, "", (0, 0), "table", "4bit", 4)
    if "SCB" not in parts:
        raise BadFile(
            f"{weight.dtype} codes and neither a quant_state nor SCB beside them",
            where=f"{module} in {model.where}",
        )
    return Layer(module, "", _two(weight, module, model), "int", "8bit", 8, 0)


def _mlx(model: Stored, module: str, parts: Mapping[str, Part], said: Naming) -> Layer | None:
    """MLX: a layer is quantized where it has scales; its words must be as many as bits and groups make."""
    if "scales" not in parts:
        return _dense(module, parts)
    weight, scales = parts.get("weight"), parts["scales"]
    if weight is not None and len(weight.shape) == 3 and len(scales.shape) == 3:
        weight = Part(weight.name, weight.dtype, weight.shape[1:])
        scales = Part(scales.name, scales.dtype, scales.shape[1:])
    out, words = _two(weight, module, model)
    groups = _two(scales, module, model)[1]
    settings = {**model.settings, **said.about(module)}
    mode = str(settings.get("mode", "affine"))
    usual = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}.get(mode, (64, 4))
    group = _number(settings.get("group_size", usual[0]), "group_size", model)
    bits = _number(settings.get("bits", usual[1]), "bits", model, 33)
    if words * 32 != groups * group * bits:
        raise BadFile(
            f"{words} words a row, and {groups} groups of {group} columns with {bits} bits make "
            f"{groups * group * bits / 32:g}",
            where=f"{module} in {model.where}",
            fix="the settings in config.json are another file's: fetch both together",
        )
    return Layer(
        module, "", (out, groups * group), {"affine": "int", "nvfp4": "nv"}.get(mode, "mx"), mode, bits, group
    )


def _plain(model: Stored, module: str, parts: Mapping[str, Part], said: Naming) -> Layer | None:
    return _dense(module, parts)


_READERS: Mapping[str, _Read] = {
    "compressed-tensors": _compressed,
    "gptq": _words,
    "awq": _words,
    "auto-round": _words,
    "fp8": _fp8,
    "mxfp8": _fp8,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "mlx": _mlx,
    "dense": _plain,
}


def _of_gguf(model: Stored) -> Iterator[Layer]:
    """Matrices of a GGUF file; a stack of experts is one."""
    for name, part in model.parts.items():
        if len(part.shape) < 2 or not name.endswith(_WEIGHT):
            continue
        module = name.removesuffix(_WEIGHT)
        kind = "dense" if part.dtype in ("f32", "f16", "bf16") else part.dtype
        role = _GGUF_ROLES.get(module.rpartition(".")[2], "")
        shape = (part.shape[-2], part.shape[-1])
        yield Layer(module, role, shape, kind, part.dtype, expert="_exps" in module)
