"""Which modules a model's settings say are quantized: each method lists them, or what it leaves out, its own
way."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from bitmill.checkpoint.patterns import compiled
from bitmill.core.errors import BadFile
from bitmill.families.base import LINEAR_ROLES
from bitmill.trust.stored import Stored


class Naming(ABC):
    """What settings say of modules."""

    left_out: str
    """The key that lists what is not quantized."""

    @abstractmethod
    def quantized(self, module: str, role: str) -> bool | None:
        """Whether a loader expects this module to be quantized; None where it looks at tensors instead."""

    @abstractmethod
    def about(self, module: str) -> Mapping[str, Any]:
        """What the settings say of this module alone."""


def naming(model: Stored) -> Naming:
    """How the settings of a model name its modules.

    Raises:
        BadFile: they are not what that method's settings must be.
    """
    settings, where = model.settings, f"{model.where}: quantization_config"
    if model.method == "compressed-tensors":
        return _Groups(_groups(settings, where), tuple(_texts(settings, "ignore", where)), where)
    if model.method == "gptq":
        inside = settings.get("modules_in_block_to_quantize")
        listed = _flat(inside) if isinstance(inside, list) else ()
        return _Rules(_mapping(settings, "dynamic", where), listed, where)
    if model.method == "auto-round":
        return _Extra(_mapping(settings, "extra_config", where))
    if model.method == "modelopt":
        keys = ("exclude_modules", "ignore")
        return _Skipped(_any_texts(settings, keys, where), "exclude_modules", wild=True)
    if model.method in ("mlx", "dense"):
        return _Stated(settings)
    names = ("modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules")
    left_out = names[2] if model.method == "bitsandbytes" else names[0]
    return _Skipped(_any_texts(settings, names, where), left_out)


@final
@dataclass(frozen=True)
class _Groups(Naming):
    """compressed-tensors: groups with targets, and an ignore list that goes before them."""

    groups: tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...]
    ignore: tuple[str, ...]
    where: str
    left_out: str = "ignore"

    def quantized(self, module: str, role: str) -> bool | None:
        if any(self._names(text, module) for text in self.ignore):
            return False
        if self._named(module) is not None:
            return True
        kind = "Embedding" if role == "embed" else "Linear"
        return any(kind in targets for targets, _ in self.groups) and (
            role in LINEAR_ROLES or role in ("head", "embed")
        )

    def about(self, module: str) -> Mapping[str, Any]:
        found = self._named(module)
        if found is None:
            found = next(
                (about for targets, about in self.groups if {"Linear", "Embedding"} & {*targets}), {}
            )
        return found

    def _named(self, module: str) -> Mapping[str, Any] | None:
        for targets, about in self.groups:
            if any(self._names(text, module) for text in targets):
                return about
        return None

    def _names(self, text: str, module: str) -> bool:
        if text.startswith("re:"):
            return compiled(text[3:], self.where).match(module) is not None
        return text == module


@final
@dataclass(frozen=True)
class _Rules(Naming):
    """GPTQ: all linears of the blocks, but for rules by pattern and a list of what a block has quantized."""

    rules: Mapping[str, Any]
    listed: tuple[str, ...]
    where: str
    left_out: str = "dynamic"

    def quantized(self, module: str, role: str) -> bool | None:
        rule = self._rule(module)
        if rule is not None:
            return not rule[0].startswith("-:")
        if self.listed and role in LINEAR_ROLES:
            return any(module.endswith(f".{name}") for name in self.listed)
        return role in LINEAR_ROLES or None

    def about(self, module: str) -> Mapping[str, Any]:
        rule = self._rule(module)
        return rule[1] if rule is not None and isinstance(rule[1], dict) else {}

    def _rule(self, module: str) -> tuple[str, Any] | None:
        for text, change in self.rules.items():
            pattern = text[2:] if text.startswith(("-:", "+:")) else text
            if compiled(pattern, self.where).match(module):
                return text, change
        return None


@final
@dataclass(frozen=True)
class _Extra(Naming):
    """AutoRound: all linears of the blocks, but for those that a table gives 16 bits."""

    extra: Mapping[str, Any]
    left_out: str = "extra_config, with 16 bits"

    def quantized(self, module: str, role: str) -> bool | None:
        bits = self.about(module).get("bits", 4)
        if type(bits) is int and bits >= 16:
            return False
        return role in LINEAR_ROLES or None

    def about(self, module: str) -> Mapping[str, Any]:
        found = self.extra.get(module)
        return found if isinstance(found, dict) else {}


@final
@dataclass(frozen=True)
class _Skipped(Naming):
    """All linears of the blocks, but for a list of names, parts of names, or patterns with stars."""

    skipped: Sequence[str]
    left_out: str
    wild: bool = False

    def quantized(self, module: str, role: str) -> bool | None:
        if any(self._names(text, module) for text in self.skipped):
            return False
        return role in LINEAR_ROLES or None

    def about(self, module: str) -> Mapping[str, Any]:
        return {}

    def _names(self, text: str, module: str) -> bool:
        if self.wild and "*" in text:
            return fnmatch.fnmatchcase(module, text)
        return (
            text == module
            or module.startswith(f"{text}.")
            or module.endswith(f".{text}")
            or (f".{text}." in f".{module}.")
        )


@final
@dataclass(frozen=True)
class _Stated(Naming):
    """MLX: a layer is quantized where it has scales, whatever is listed."""

    settings: Mapping[str, Any]
    left_out: str = "quantization"

    def quantized(self, module: str, role: str) -> bool | None:
        return False if self.settings.get(module) is False else None

    def about(self, module: str) -> Mapping[str, Any]:
        found = self.settings.get(module)
        return found if isinstance(found, dict) else {}


def _groups(settings: Mapping[str, Any], where: str) -> tuple[tuple[tuple[str, ...], Mapping[str, Any]], ...]:
    found = []
    for name, group in _mapping(settings, "config_groups", where).items():
        if not isinstance(group, dict):
            raise BadFile(f"{name} is no group", where=where)
        found.append((tuple(_texts(group, "targets", where)), group))
    return tuple(found)


def _mapping(settings: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = settings.get(key) or {}
    if not isinstance(found, dict):
        raise BadFile(f"{key} is not a table", where=where)
    return found


def _texts(settings: Mapping[str, Any], key: str, where: str) -> list[str]:
    found = settings.get(key) or []
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise BadFile(f"{key} is not a list of names", where=where)
    return found


def _any_texts(settings: Mapping[str, Any], keys: Sequence[str], where: str) -> list[str]:
    return [text for key in keys for text in _texts(settings, key, where)]


def _flat(found: Sequence[Any]) -> tuple[str, ...]:
    rows = [row if isinstance(row, list) else [row] for row in found]
    return tuple(str(name) for row in rows for name in row)
