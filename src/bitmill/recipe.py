r"""A recipe: what the user wants, in one line that reads as the sentence it is.

    awq + gptq(damp=0.01) : int4-g128-asym > compressed-tensors
    nearest : Q4_K_M > gguf
    gptq : q4_0, embed=q8_0, keep=v+down > gguf
    best : Q4_K_M > gguf
    nearest : Q4_K_M, /blk\.[0-3]\.ffn_down/=q8_0 > gguf
    smoothquant + nearest : int8-channel-sym, input=int8-token > compressed-tensors
    gptq + tune(steps=200) : Q3_K_M > gguf
    gptq : int4-g128-sym, experts=until=512 > compressed-tensors

``transforms + solver : grid-or-mixture, options > container``. A solver that goes on from what another has
left stands behind it (``gptq + tune``), or behind plain rounding where none is named. Parsing and printing
round-trip; known names (``Q4_K_M``, ``W4A16``, ``nf4``) are recipes in a table; long ones live in TOML files
with the same keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bitmill.allocation.mixture import Mixture
from bitmill.core import registry
from bitmill.core.axes import Container, InputContainer, Solver, Transform
from bitmill.core.cache_words import parse_cache
from bitmill.core.errors import BadRecipe
from bitmill.core.experts import parse_experts
from bitmill.core.inputs import parse_inputs
from bitmill.core.learning import ModelSolver
from bitmill.core.sizes import size_of
from bitmill.core.types import Split
from bitmill.gguf_options import pre_tokenizer, tensor_type
from bitmill.known import KNOWN, PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Value = bool | int | float | str

ROLES = ("embed", "head", "q", "k", "v", "o", "gate", "up", "down", "router", "linear")
"""Roles that an option may name: ``embed=q8_0`` on another grid, ``keep=v+down`` left dense."""

DTYPES = ("f32", "f16", "bf16")

_OPTIONS = ("keep", "fallback", "dtype", "input", "cache", "experts")
_OF_GGUF = ("split-max-size", "split-max-tensors", "pre-tokenizer")


@dataclass(frozen=True)
class Call:
    """A member of an axis with the options that were set: ``gptq(damp=0.05)``."""

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in self.options)
        return f"{self.name}({shown})" if shown else self.name


@dataclass(frozen=True)
class Recipe:
    """What the user wants; frozen, comparable, printable.

    Attributes:
        transforms: changes of basis, in order.
        solver: which codes.
        grid: a grid's canonical text, or the name of a mixture.
        roles: grids for single roles, ``(("embed", "q8_0"), …)``.
        keep: roles that stay dense.
        fallback: grid for a shape that the grid refuses; None refuses the plan.
        dtype: precision of what is kept and of scales; None follows the source.
        container: file layout.
        container_options: what was set of it: ``gptq(version=2)``.
        tensors: grids for single tensors, ``(("blk.0.ffn_", "q8_0"), …)``: regular expressions, searched in
            this order in llama.cpp's names where the container is GGUF, else in the model's own; the first
            that is found decides, after ``roles``.
        pure: whether a mixture gives every tensor its default type, embedding and head too.
        split_max_size, split_max_tensors: the most that a part of a GGUF output may hold, in bytes and in
        tensors; 0 is no limit, and without any limit the output is one file.
        input: what the inputs of the quantized linears are rounded to at run time; None leaves them.
        cache: what keys and values are rounded to on their way into the cache; None leaves them.
        experts: which tokens the experts of a mixture learn from; None: those that they are sent.
        tune: what learns with the whole model after the solver; None for nothing.
        pre_tokenizer: llama.cpp's name of how text is cut into words, for a GGUF output; None recognises it.

    Raises:
        BadRecipe: ``pure`` without a mixture; parts without GGUF; ``cache`` with ``tune``.
    """

    transforms: tuple[Call, ...]
    solver: Call
    grid: str
    container: str
    container_options: tuple[tuple[str, Value], ...] = ()
    roles: tuple[tuple[str, str], ...] = ()
    keep: tuple[str, ...] = ()
    fallback: str | None = None
    dtype: str | None = None
    tensors: tuple[tuple[str, str], ...] = ()
    pure: bool = False
    split_max_size: int = 0
    split_max_tensors: int = 0
    pre_tokenizer: str | None = None
    input: str | None = None
    cache: str | None = None
    experts: str | None = None
    tune: Call | None = None

    def __post_init__(self) -> None:
        if self.pure and not (self.is_mixture and self.container == "gguf"):
            raise BadRecipe(
                "pure changes one of llama.cpp's mixtures, in GGUF",
                where=f"{self.grid} > {self.container.replace('_', '-')}",
                fix="name a mixture, for example Q4_K_S; on other grids say ROLE=GRID",
            )

        if self.container != "gguf" and (self.split_max_size or self.split_max_tensors):
            raise BadRecipe("only GGUF outputs are split", where=self.container.replace("_", "-"))
        if self.container != "gguf" and self.pre_tokenizer is not None:
            raise BadRecipe("only GGUF names a pre-tokenizer", where=self.container.replace("_", "-"))
        if self.cache is not None and self.tune is not None and parse_cache(self.cache).static:
            raise BadRecipe(
                f"{self.tune} moves keys and values after the scales of cache={self.cache} are fixed",
                fix="one of the two, or cache=int8-token, whose scales come with each key and value",
            )

    def __str__(self) -> str:
        axes = " + ".join(map(str, (*self.transforms, *self.solvers)))
        options = [f"{role}={grid}" for role, grid in self.roles]
        options += [f"input={self.input}"] if self.input else []
        options += [f"cache={self.cache}"] if self.cache else []
        options += [f"experts={self.experts}"] if self.experts else []
        options += [f"/{pattern}/={kind}" for pattern, kind in self.tensors]
        options += ["pure"] if self.pure else []
        options += [f"keep={'+'.join(self.keep)}"] if self.keep else []
        options += [f"fallback={self.fallback}"] if self.fallback else []
        options += [f"dtype={self.dtype}"] if self.dtype else []
        options += [f"split-max-size={self.split_max_size}"] if self.split_max_size else []
        options += [f"split-max-tensors={self.split_max_tensors}"] if self.split_max_tensors else []
        options += [f"pre-tokenizer={self.pre_tokenizer}"] if self.pre_tokenizer else []
        container = Call(self.container.replace("_", "-"), self.container_options)
        return f"{axes} : {', '.join([self.grid, *options])} > {container}"

    @property
    def is_mixture(self) -> bool:
        """Whether the grid is chosen by a mixture's rules rather than uniform."""
        return self.grid in Mixture.names()

    @property
    def solvers(self) -> tuple[Call, ...]:
        """The solver, and what goes on from what it has left."""
        return (self.solver,) if self.tune is None else (self.solver, self.tune)

    def make_solver(self) -> Solver:
        """The solver, with its options."""
        return make("solvers", self.solver)

    def make_tune(self) -> ModelSolver | None:
        """What learns with the whole model after the solver."""
        return None if self.tune is None else cast(ModelSolver, make("solvers", self.tune))

    def make_container(self) -> Container:
        """The container, with its options."""
        cls = registry.member("containers", self.container)
        options: dict[str, Any] = dict(self.container_options)
        if self.split_max_size or self.split_max_tensors:
            options["split"] = Split(self.split_max_size, self.split_max_tensors)
        if self.pre_tokenizer is not None:
            options["pre_tokenizer"] = self.pre_tokenizer
        return cast(Container, cls(**options))

    def make_transforms(self) -> tuple[Transform, ...]:
        """The transforms, with their options."""
        return tuple(make("transforms", call) for call in self.transforms)


def parse(text: str) -> Recipe:
    """A recipe from a known name, a one-line recipe, a bare grid, or the path of a TOML file.

    Raises:
        BadRecipe: with the part that is wrong and the closest spelling.
    """
    text = text.strip()
    if text.lower().endswith(".toml"):
        return from_toml(Path(text))
    key = text.lower().replace("_", "-")
    known = {name.replace("_", "-"): recipe for name, recipe in KNOWN.items()}
    if key in known:
        return parse(known[key])
    if not text:
        raise BadRecipe("the recipe is empty", fix="for example: Q4_K_M, or gptq : int4-g128-asym")
    return _parse_line(text, known)


def _parse_line(text: str, known: Mapping[str, str]) -> Recipe:
    patterns: list[str] = []

    def put_aside(match: re.Match[str]) -> str:
        patterns.append(match[1])
        return f"/{len(patterns) - 1}/"

    text = re.sub(
        r"/([^/]*)/(?=\s*=)", put_aside, text
    )  # a pattern may hold any of the signs that part a recipe
    body, _, container = text.partition(">")
    axes, colon, rest = body.partition(":")
    if not colon:
        axes, rest = "nearest", body
        if not _is_grid(_split(rest)[0]):
            close = difflib.get_close_matches(text.lower().replace("_", "-"), known, n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else "see `bitmill recipes`"
            raise BadRecipe(f"no recipe or grid is called {text!r}", fix=hint)
    parts = (PRESETS.get(part.lower(), part) for part in _split(axes, "+"))
    *transforms, solver = (_call(part) for part in parts)
    transforms, solver, tune = _tuned(transforms, solver)
    for call in transforms:
        make("transforms", call)
    made = make("solvers", solver)
    head, *options = _split(rest)
    grid = _grid_text(head, made)
    fields = _fields(options, patterns)
    layout = _container(container.strip(), grid, bool({"input", "cache"} & fields.keys()))
    return Recipe(tuple(transforms), solver, grid, layout.name, layout.options, **fields, tune=tune)


def _tuned(transforms: list[Call], last: Call) -> tuple[list[Call], Call, Call | None]:
    """Transforms, the solver, and what goes on from it where the last call is that."""
    if not isinstance(make("solvers", last), ModelSolver):
        return transforms, last, None
    if not transforms or transforms[-1].name not in registry.names("solvers"):
        return transforms, Call("nearest"), last
    if isinstance(make("solvers", transforms[-1]), ModelSolver):
        raise BadRecipe(f"{transforms[-1]} + {last}: one of them is enough", fix=f"{last} alone")
    return transforms[:-1], transforms[-1], last


def _fields(options: list[str], patterns: list[str]) -> dict[str, Any]:
    roles: list[tuple[str, str]] = []
    tensors: list[tuple[str, str]] = []
    fields: dict[str, Any] = {}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        key, value = key.lower(), value.lower()
        if key == "pure" and value in ("", "true"):
            fields["pure"] = True
        elif not equals:
            raise BadRecipe(f"option {option!r} has no value", fix="options read key=value, e.g. embed=q8_0")
        elif re.fullmatch(r"/\d+/", key):
            tensors.append(tensor_type(patterns[int(key[1:-1])], value))
        elif key in ROLES:
            roles.append((key, str(registry.parse_grid(value))))
        elif key == "keep":
            fields["keep"] = tuple(_role(r) for r in value.split("+"))
        elif key == "fallback":
            fields["fallback"] = str(registry.parse_grid(value))
        elif key == "input":
            fields["input"] = str(parse_inputs(value))
        elif key == "cache":
            fields["cache"] = str(parse_cache(value))
        elif key == "experts":
            fields["experts"] = str(parse_experts(value))
        elif key == "dtype":
            if value not in DTYPES:
                raise BadRecipe(f"dtype={value!r}", fix=f"one of {', '.join(DTYPES)}")
            fields["dtype"] = value
        elif key == "split-max-size":
            fields["split_max_size"] = size_of(value)
        elif key == "split-max-tensors":
            if not value.isdecimal() or int(value) == 0:
                raise BadRecipe(f"{key}={value!r} is no number of tensors", fix="for example 128")
            fields["split_max_tensors"] = int(value)
        elif key == "pre-tokenizer":
            fields["pre_tokenizer"] = pre_tokenizer(value)
        else:
            raise BadRecipe(
                f"unknown option {key!r}",
                where=option,
                fix=_closest(key, [*ROLES, *_OPTIONS, "pure", *_OF_GGUF]),
            )
    return {**fields, "roles": tuple(roles), "tensors": tuple(tensors)}


def from_toml(path: Path) -> Recipe:
    """A recipe from a file.

    It holds ``recipe = "…"``, or the keys ``transforms solver grid container keep fallback dtype input
    cache experts pure split-max-size split-max-tensors pre-tokenizer`` and the tables ``[roles]`` and
    ``[tensors]``.
    Unknown keys are errors.

    Raises:
        BadRecipe: the file does not exist, does not parse, or holds an unknown key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRecipe(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRecipe(f"not a TOML file: {error}", where=str(path)) from error
    allowed = ["recipe", "transforms", "solver", "grid", "container", "pure", "roles", "tensors"]
    allowed += [*_OPTIONS, *_OF_GGUF]
    for key in table:
        if key not in allowed:
            raise BadRecipe(f"unknown key {key!r}", where=str(path), fix=_closest(key, allowed))
    if "recipe" in table:
        return parse(str(table["recipe"]))
    if "grid" not in table:
        raise BadRecipe(
            "the file names no grid", where=str(path), fix='add a line such as grid = "int4-g128-asym"'
        )
    transforms = table.get("transforms", [])
    axes = " + ".join(
        [*(transforms if isinstance(transforms, list) else [transforms]), table.get("solver", "nearest")]
    )
    options = [f"{role}={grid}" for role, grid in table.get("roles", {}).items()]
    found = [tensor_type(pattern, str(kind)) for pattern, kind in table.get("tensors", {}).items()]
    options += [f"/{pattern}/={kind}" for pattern, kind in found]
    options += ["pure"] if table.get("pure", False) else []
    keep = table.get("keep", [])
    options += [f"keep={'+'.join(keep if isinstance(keep, list) else [keep])}"] if keep else []
    options += [f"{key}={table[key]}" for key in (*_OPTIONS[1:], *_OF_GGUF) if key in table]
    container = f" > {table['container']}" if "container" in table else ""
    return parse(f"{axes} : {', '.join([str(table['grid']), *options])}{container}")


def make(axis: str, call: Call) -> Any:
    """The member of ``axis`` that ``call`` names, built with its options.

    Raises:
        BadRecipe: unknown name or option, or a value the member rejects.
    """
    cls = registry.member(axis, call.name)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key, _ in call.options:
        if key not in fields:
            hint = _closest(key, list(fields)) if fields else "it takes no options"
            raise BadRecipe(f"{call.name} has no option {key!r}", where=str(call), fix=hint)
    try:
        return cls(**dict(call.options))
    except (TypeError, ValueError) as error:
        raise BadRecipe(f"{call}: {error}", fix="see `bitmill recipes`") from error


def _call(text: str) -> Call:
    match = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise BadRecipe(f"cannot read {text.strip()!r}", fix="write name or name(option=value, …)")
    options: list[tuple[str, Value]] = []
    for part in _split(match[2]) if match[2] else []:
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals:
            raise BadRecipe(f"option {part!r} of {match[1]!r} has no value", fix="write name(option=value)")
        options.append((key.lower().replace("-", "_"), _value(value)))
    return Call(match[1].lower().replace("-", "_"), tuple(options))


def _value(text: str) -> Value:
    lowered = text.lower()
    if lowered in ("true", "yes", "on"):
        return True
    if lowered in ("false", "no", "off"):
        return False
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")


def _split(text: str, separator: str = ",") -> list[str]:
    """Parts at the top level, outside parentheses."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()] or [""]


def _grid_text(text: str, solver: Solver) -> str:
    mixtures = {name.lower(): name for name in Mixture.names()}
    lowered = text.strip().lower()
    named = mixtures.get(lowered) or mixtures.get(lowered.replace("-", "_"))
    if (
        named is not None
    ):  # q4_0 is both a block type and llama.cpp's mixture of that name: the mixture is meant
        return named
    if not lowered:
        raise BadRecipe("the recipe names no grid", fix="for example: gptq : int4-g128-asym")
    return str(registry.parse_grid(solver.prefers(lowered)))


def _is_grid(text: str) -> bool:
    lowered = text.strip().lower()
    return registry.find_grid(lowered) is not None or lowered in {n.lower() for n in Mixture.names()}


def _container(text: str, grid: str, rounds: bool) -> Call:
    if text:
        call = _call(text)
        cls = registry.member("containers", call.name)
        plain = {f.name for f in dataclasses.fields(cls) if f.type in ("int", "float", "bool", "str")}
        for key, _ in call.options:
            if key not in plain:
                hint = _closest(key, sorted(plain)) if plain else "it takes none"
                raise BadRecipe(f"{call.name.replace('_', '-')} has no option {key!r}", where=text, fix=hint)
        make("containers", call)
        return call
    if grid in Mixture.names():
        return Call("gguf")
    value = registry.parse_grid(grid)
    for name in ("gguf", "compressed_tensors", "bitsandbytes", "hqq", "mlx", "bitnet", "bitmill"):
        made = registry.member("containers", name)()
        if made.refuses(value, "q", (256, 256)) is None and (isinstance(made, InputContainer) or not rounds):
            return Call(name)
    raise BadRecipe(f"no container holds {grid!r}", fix="name one after '>'")


def _role(text: str) -> str:
    role = text.strip()
    if role not in ROLES:
        raise BadRecipe(f"unknown role {role!r} in keep", fix=_closest(role, list(ROLES)))
    return role


def _closest(text: str, among: list[str]) -> str:
    close = difflib.get_close_matches(text, among, n=1)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(among)}"
