"""What runtimes demand of a file, as data: one table a runtime, each fact with its source and date.

A fact may hold for some versions only. Numbers are compared piece by piece (``0.11.2``); llama.cpp, whose
builds are many a day, goes by the month of a build (``2026-03``).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bitmill.core.errors import Refused

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Version = tuple[int, ...]

_TABLES = Path(__file__).parent / "runtimes"
_NEWEST: Version = (1 << 30,)


@dataclass(frozen=True)
class Span:
    """Versions from ``since`` on, before ``until``."""

    since: Version
    until: Version

    def holds(self, version: Version) -> bool:
        """Whether a version is one of them."""
        return self.since <= version < self.until


@dataclass(frozen=True)
class Method:
    """One ``quant_method`` (or ``gguf``, ``mlx``, ``dense``) that a runtime loads.

    Attributes:
        name: of it.
        span: in which versions.
        needs: packages beside the runtime; empty where it needs none.
        level: ``note``; ``warning`` where it takes a plugin, or was not seen; ``error`` where it fails.
        why: what to know; may be empty.
        source, date: whose word it is, and of when.
    """

    name: str
    span: Span
    needs: tuple[str, ...]
    level: str
    why: str
    source: str
    date: str


@dataclass(frozen=True)
class Rule:
    """One demand.

    Attributes:
        id: a short stable key.
        scope: of what it speaks: each ``layer``, ``fused`` layers (which the runtime joins), all of them
            ``alike``, ``settings`` (or keys of a GGUF file), each ``tensor``, or ``tp``, several cards.
        methods: for which; empty is all.
        when: fields of a layer and the values for which the rule speaks.
        demand: fields and the values they must have; of nothing, where the rule forbids.
        level: of what is found.
        what, fix: for a reader; ``{bits}`` and its like stand for the first offender's.
        doubt: as of a :class:`~bitmill.trust.findings.Finding`.
    """

    id: str
    scope: str
    methods: tuple[str, ...]
    span: Span
    when: Mapping[str, Any]
    demand: Mapping[str, Any]
    level: str
    what: str
    fix: str
    source: str
    date: str
    doubt: str = ""


@dataclass(frozen=True)
class Contract:
    """What one runtime demands.

    Attributes:
        name: as people call it.
        title: as its makers do.
        aliases: other spellings.
        newest: the version that is meant when none is named.
        dated: whether versions are months.
        parallel: whether it parts layers among cards (tensor parallelism).
        files: pattern of the names of files with weights; empty where any does.
        methods, rules: the facts.
        date: when the table was last gone through.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    newest: str
    dated: bool
    parallel: bool
    files: str
    date: str
    methods: tuple[Method, ...]
    rules: tuple[Rule, ...]

    def method(self, name: str, version: Version) -> Method | None:
        """How a version takes a method; None when it does not."""
        return next((m for m in self.methods if m.name == name and m.span.holds(version)), None)

    def former(self, name: str) -> Method | None:
        """How another version took it, where this one does not."""
        return next((m for m in self.methods if m.name == name), None)

    def rules_for(self, method: str, version: Version) -> tuple[Rule, ...]:
        """The demands of a version on files of a method."""
        return tuple(
            rule
            for rule in self.rules
            if rule.span.holds(version) and (not rule.methods or method in rule.methods)
        )


@dataclass(frozen=True)
class Target:
    """A runtime in one version.

    Attributes:
        contract: what it demands.
        version: compared with spans.
        said: as it was named; the newest known where it was not.
    """

    contract: Contract
    version: Version
    said: str

    def __str__(self) -> str:
        return f"{self.contract.title} {self.said}"


def target(text: str) -> Target:
    """The runtime that ``text`` names, ``vllm`` or ``vllm@0.11``.

    Raises:
        Refused: there is no table of such a runtime, or that is no version of it.
    """
    name, at, said = text.strip().lower().partition("@")
    found = next((c for c in contracts().values() if name in (c.name, *c.aliases)), None)
    if found is None:
        raise Refused(
            f"there is no runtime {name!r} here", fix=f"one of: {', '.join(contracts())}, or NAME@VERSION"
        )
    if not at:
        return Target(found, version_of(found.newest), found.newest)
    pattern = r"20\d\d-\d\d(-\d\d)?" if found.dated else r"v?\d+(\.\d+){0,3}\w*"
    if re.fullmatch(pattern, said) is None:
        how = "the month it was built in, 2026-03" if found.dated else f"such as {found.newest}"
        raise Refused(f"{said!r} is no version of {found.title} here", fix=f"{found.name}@VERSION, {how}")
    return Target(found, version_of(said), said)


def method_of(container: str) -> str:
    """What files of a container here are called by those who load them."""
    name = container.replace("_", "-")
    return {"safetensors": "dense", "gpt-oss": "mxfp4"}.get(name, name)


def version_of(text: str) -> Version:
    """The numbers of a version's text, compared from the left."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:4])


@cache
def contracts() -> Mapping[str, Contract]:
    """Every table of the folder, by name."""
    tables = (tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(_TABLES.glob("*.toml")))
    found = [_contract(table) for table in tables]
    return MappingProxyType({contract.name: contract for contract in found})


def _contract(table: Mapping[str, Any]) -> Contract:
    sources = table["sources"]
    return Contract(
        name=table["name"],
        title=table["title"],
        aliases=tuple(table.get("aliases", ())),
        newest=table["newest"],
        dated=table.get("dated", False),
        parallel=table.get("parallel", False),
        files=table.get("files", ""),
        date=table["date"],
        methods=tuple(_method(row, sources) for row in table["method"]),
        rules=tuple(_rule(row, sources) for row in table.get("rule", ())),
    )


def _span(row: Mapping[str, Any]) -> Span:
    return Span(version_of(row.get("since", "")), version_of(row["until"]) if "until" in row else _NEWEST)


def _method(row: Mapping[str, Any], sources: Mapping[str, Any]) -> Method:
    source = sources[row["source"]]
    why = row.get("why", "")
    level, needs = row.get("level", "note"), tuple(row.get("needs", ()))
    return Method(row["name"], _span(row), needs, level, why, source["what"], source["date"])


def _rule(row: Mapping[str, Any], sources: Mapping[str, Any]) -> Rule:
    source = sources[row["source"]]
    return Rule(
        id=row["id"],
        scope=row.get("scope", "layer"),
        methods=tuple(row.get("methods", ())),
        span=_span(row),
        when=row.get("when", {}),
        demand=row.get("demand", {}),
        level=row["level"],
        what=row["what"],
        fix=row.get("fix", ""),
        source=source["what"],
        date=source["date"],
        doubt=row.get("doubt", ""),
    )
