"""A model against one runtime's demands: what that runtime would refuse, misread, or need more for."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitmill.families.base import traits
from bitmill.trust.contracts import Contract, Method, Rule, Target
from bitmill.trust.findings import Finding
from bitmill.trust.layers import Layer, Layers
from bitmill.trust.stored import Stored

_COLUMN = {"q", "k", "v", "gate", "up"}
_ROW = {"o", "down"}
_JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
_SAME = ("kind", "layout", "bits", "group", "zero", "order", "inputs", "element")
_EXPERT = re.compile(r"\.experts\.\d+(?=\.|$)")


def judge(model: Stored, layers: Layers, to: Target, tp: int = 1) -> tuple[Finding, ...]:
    """Everything that ``to`` would refuse, misread or need more for, with whose word that is.

    Args:
        tp: among how many cards every layer is parted.
    """
    contract = to.contract
    method = contract.method(model.method, to.version)
    if method is None:
        return (_unknown(model, to),)
    found = list(_method(method, to))
    found += _files(model, contract)
    if tp > 1:
        found += _parallel(model, to, tp)
    for rule in contract.rules_for(model.method, to.version):
        found += _broken(rule, model, layers.all, to, tp)
    return tuple(found)


def _unknown(model: Stored, to: Target) -> Finding:
    contract, former = to.contract, to.contract.former(model.method)
    said = {"gguf": "GGUF files", "mlx": "MLX folders", "dense": "dense folders"}.get(
        model.method, f"quant_method {model.method!r}"
    )
    known = ", ".join(dict.fromkeys(m.name for m in contract.methods if m.span.holds(to.version)))
    what = f"{to} does not load {said}"
    fix = f"it loads: {known}"
    source = f"{contract.title} ({contract.date})"
    if former is not None:
        began, ended = former.span.since, former.span.until
        when = f"before {_text(ended)}" if to.version >= ended else f"from {_text(began)} on"
        what, source = f"{what}; versions {when} do", f"{former.source} ({former.date})"
    elif model.method == "bitmill":
        fix = f"`bitmill convert` writes the same values for it, or quantize anew; {fix}"
    return Finding("error", "runtime", what, model.where, fix, source)


def _text(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _method(method: Method, to: Target) -> Iterator[Finding]:
    source = f"{method.source} ({method.date})"
    if method.needs:
        what = f"{to} loads {method.name} with {' and '.join(method.needs)} beside it"
        more = f"; {method.why}" if method.why else ""
        names = " ".join(f'"{need}"' if re.search(r"[<>=\[]", need) else need for need in method.needs)
        yield Finding(method.level, "runtime", what + more, "", f"pip install {names}", source)
    elif method.why:
        yield Finding(method.level, "runtime", f"{to}: {method.why}", "", "", source)


def _files(model: Stored, contract: Contract) -> Iterator[Finding]:
    strange = [name for name in model.files if contract.files and not fnmatch.fnmatch(name, contract.files)]
    if strange:
        yield Finding(
            "error",
            "runtime",
            f"{contract.title} looks for {contract.files} and does not see {strange[0]}",
            model.where,
            "rename the file (and, in parts, the names in the index)",
            f"{contract.title} ({contract.date})",
        )


def _parallel(model: Stored, to: Target, tp: int) -> Iterator[Finding]:
    """Whether heads and hidden sizes can be parted at all."""
    source = f"{to.contract.title} ({to.contract.date})"
    if not to.contract.parallel:
        what = f"{to} does not part layers among cards"
        yield Finding("error", "runtime", what, "", "leave --tp out", source)
        return
    if model.gguf or "num_attention_heads" not in model.config:
        return
    facts = traits(model.config)
    heads, shared = facts["heads"], facts["kv_heads"]
    fix = f"a --tp that divides {heads} heads: {', '.join(map(str, _divisors(heads)))}"
    if heads % tp:
        what = f"{heads} attention heads cannot be parted among {tp} cards"
        yield Finding("error", "runtime", what, model.where, fix, source)
    elif shared % tp and tp % shared:
        what = f"{shared} heads of keys and values can be neither parted among {tp} cards nor repeated evenly"
        yield Finding("error", "runtime", what, model.where, fix, source)


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, min(number, 64) + 1) if number % i == 0]


@dataclass(frozen=True)
class _Offence:
    """One thing that breaks a rule: where it is, and what its text may quote."""

    where: str
    quoted: Mapping[str, Any]


def _broken(rule: Rule, model: Stored, layers: Sequence[Layer], to: Target, tp: int) -> Iterator[Finding]:
    """The finding of a rule: of the first that breaks it, with how many do."""
    offences = list(_SCOPES[rule.scope](rule, model, layers, tp))
    if not offences:
        return
    first = offences[0]
    what = rule.what.format_map(_Quoted({**first.quoted, "runtime": str(to), "tp": tp}))
    fix = rule.fix.format_map(_Quoted({**first.quoted, "runtime": str(to), "tp": tp}))
    where = f"{first.where}, and {len(offences) - 1} more" if len(offences) > 1 else first.where
    yield Finding(rule.level, "runtime", what, where, fix, f"{rule.source} ({rule.date})", rule.doubt)


class _Quoted(dict[str, Any]):
    """Values that a text quotes; what there is none of stays as it is written."""

    def __missing__(self, key: str) -> str:
        return "{" + key + "}"


def _of_layers(rule: Rule, model: Stored, layers: Sequence[Layer], tp: int) -> Iterator[_Offence]:
    some = any(layer.kind != "dense" for layer in layers)
    for layer in layers:
        if layer.kind == "dense" and not (some and "kind" in rule.when):
            continue
        if not _is_meant(rule.when, layer):
            continue
        part = _part(layer, tp)
        if rule.demand and _holds(rule.demand, layer, part):
            continue
        quoted = {**vars(layer), "out": part[0], "in": part[1], "said": _said(layer)}
        yield _Offence(layer.module, quoted)


def _is_meant(when: Mapping[str, Any], layer: Layer) -> bool:
    return all(_is_one_of(vars(layer)[key], value) for key, value in when.items())


def _is_one_of(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list) else value == wanted


def _holds(demand: Mapping[str, Any], layer: Layer, part: tuple[int, int]) -> bool:
    out, columns = part
    known = all(layer.shape)
    checks = {
        "out_multiple": lambda step: not known or out % step == 0,
        "in_multiple": lambda step: not known or columns % step == 0,
        "whole_groups": lambda _: not known or layer.group <= 0 or columns % layer.group == 0,
    }
    return all(
        checks[key](value) if key in checks else _is_one_of(vars(layer)[key], value)
        for key, value in demand.items()
    )


def _part(layer: Layer, tp: int) -> tuple[int, int]:
    """Rows and columns of a layer on each of ``tp`` cards; what does not divide is rounded up."""
    out, columns = layer.shape
    if layer.role in _COLUMN:
        return math.ceil(out / tp), columns
    return (out, math.ceil(columns / tp)) if layer.role in _ROW else (out, columns)


def _said(layer: Layer) -> str:
    """A layer's storage in words."""
    if layer.kind == "dense":
        return "dense"
    group = {0: "rows", -1: "the whole"}.get(layer.group, f"groups of {layer.group}")
    kinds = {"int": f"{layer.bits}-bit integers", "float": f"FP{layer.bits}", "mx": f"MXFP{layer.bits}"}
    kind = kinds.get(layer.kind, {"nv": "NVFP4"}.get(layer.kind, layer.kind))
    zero = " with zero points" if layer.zero else ""
    inputs = f", inputs {layer.inputs}" if layer.inputs else ""
    return f"{kind} by {group}{zero}{inputs}"


def _fused(layers: Iterable[Layer]) -> Iterator[tuple[str, list[Layer]]]:
    """Layers that runtimes join into one: queries, keys and values; gate and up; all experts of a block."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        for name, roles in _JOINED.items():
            if layer.role in roles and not layer.expert:
                groups.setdefault(f"{layer.block}.{name}", []).append(layer)
        if layer.expert:
            groups.setdefault(f"{_EXPERT.split(layer.module)[0]}.experts", []).append(layer)
    yield from ((name, some) for name, some in groups.items() if len(some) > 1)


def _of_fused(rule: Rule, model: Stored, layers: Sequence[Layer], tp: int) -> Iterator[_Offence]:
    """Joined layers must agree: in how they are stored, or, where the rule names one, in a stored number."""
    number = rule.demand.get("equal")
    for name, some in _fused(layers):
        if not any(_is_meant(rule.when, layer) for layer in some):
            continue
        if number is None:
            kinds = {tuple(vars(layer)[key] for key in _SAME): layer for layer in some}
            if len(kinds) > 1:
                one, other = list(kinds.values())[:2]
                quoted = {
                    "one": one.module,
                    "other": other.module,
                    "said": _said(one),
                    "said_other": _said(other),
                }
                yield _Offence(name, quoted)
        elif not _equal_numbers(model, some, number):
            yield _Offence(name, {"number": number[0]})


def _equal_numbers(model: Stored, some: Sequence[Layer], names: Sequence[str]) -> bool:
    """Whether all of these layers store the same under these names; of experts, gate and up of each."""
    pairs: dict[str, list[Layer]] = {}
    for layer in some:
        if not (layer.expert and layer.role == "down"):
            pairs.setdefault(layer.block if layer.expert else "", []).append(layer)
    for members in pairs.values():
        values = [model.small(f"{layer.module}.{name}") for layer in members for name in names]
        there = [value for value in values if value is not None]
        if any(a.shape != there[0].shape or not torch.equal(a, there[0]) for a in there[1:]):
            return False
    return True


def _of_settings(rule: Rule, model: Stored, layers: Sequence[Layer], tp: int) -> Iterator[_Offence]:
    """Keys of the settings, or of config.json, each a path with dots."""
    if not all(_is_one_of(_found(model, key), value) for key, value in rule.when.items()):
        return
    for spelt, wanted in rule.demand.items():
        key = spelt.replace("{arch}", str(model.config.get("general.architecture")))
        value = _found(model, key)
        if wanted == "absent" and value not in (None, {}, []):
            yield _Offence(f"{model.where}: {key}", {"value": value, "key": key})
        elif wanted == "present" and value is None:
            yield _Offence(f"{model.where}: {key}", {"key": key})
        elif isinstance(wanted, list) and value is not None and value not in wanted:
            yield _Offence(f"{model.where}: {key}", {"value": value, "key": key})


def _found(model: Stored, key: str) -> Any:
    """What stands under a path such as ``kv_cache_scheme.type``; a GGUF key is one name, dots and all."""
    if model.gguf:
        return model.config.get(key)
    at: Any = model.settings
    for name in key.split("."):
        at = at.get(name) if isinstance(at, Mapping) else None
    return at


def _of_tensors(rule: Rule, model: Stored, layers: Sequence[Layer], tp: int) -> Iterator[_Offence]:
    """Stored tensors: element types allowed for those of one dimension, or for all."""
    ranks = rule.when.get("rank")
    for part in model.parts.values():
        if ranks is not None and len(part.shape) not in ranks:
            continue
        if "dtype" in rule.when and part.dtype not in rule.when["dtype"]:
            continue
        if "dtype" not in rule.demand or part.dtype not in rule.demand["dtype"]:
            yield _Offence(part.name, {"dtype": part.dtype.upper()})


def _of_all(rule: Rule, model: Stored, layers: Sequence[Layer], tp: int) -> Iterator[_Offence]:
    """All quantized layers that the rule means have the same bits and groups."""
    kinds: dict[tuple[int, int], Layer] = {}
    for layer in layers:
        if layer.kind != "dense" and _is_meant(rule.when, layer):
            kinds.setdefault((layer.bits, layer.group), layer)
    different = list(kinds.values())
    for layer in different[1:]:
        yield _Offence(layer.module, {"said": _said(different[0]), "said_other": _said(layer)})


def _of_cards(rule: Rule, model: Stored, layers: Sequence[Layer], tp: int) -> Iterator[_Offence]:
    """Whatever is to be parted among cards."""
    if tp > 1:
        yield _Offence(model.where, {})


_SCOPES = {
    "layer": _of_layers,
    "fused": _of_fused,
    "alike": _of_all,
    "settings": _of_settings,
    "tensor": _of_tensors,
    "tp": _of_cards,
}
