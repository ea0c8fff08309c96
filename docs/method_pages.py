"""Pages of methods: what the code knows, what docs/methods.toml adds, and what docs/evidence measured."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from page_parts import page, table, unquoted

from bitmill.allocation.mixture import Mixture, demands_importance
from bitmill.checkpoint.read_only import ReadOnly
from bitmill.core import registry
from bitmill.core.axes import CalibratedSolver, Container, Grid, InputContainer, Weight
from bitmill.core.inputs import parse_inputs
from bitmill.core.types import Row
from bitmill.known import KNOWN, PRESETS
from bitmill.recipe import Recipe, parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = Path(__file__).parent
SOURCE = DOCS / "methods.toml"
MARK = "<!-- Written by docs/generate.py: edit docstrings, docs/methods.toml or docs/evidence. -->"
SHAPE = (4096, 4096)
MOST_PATTERNS = 3  # in a cell of a table
NEEDS = ("nothing", "diagonal", "gram")
ASKS = {"nothing": "none", "diagonal": "input sizes", "gram": "Gram matrices"}
MODEL = {"hidden": 4096, "middle": 14336, "keys": 1024, "words": 128256, "layers": 32}
"""Sizes of Llama 3 8B, whose mixtures are counted."""
NOTES = """Calibration is what a recipe has to learn from text: how large each channel of the inputs is, their
ranges, or their Gram matrices, which take the most memory and time. "None" may still use it, with `--calib`.
Bits are those of a 4096 × 4096 matrix, scales included; of a mixture, those of all matrices of Llama 3 8B."""
HOLD = """Who holds it is what each [container](../containers.md) answers for a layer of a bfloat16 model."""
HEAD = """Each page says what a method does, when it is worth its price, what it costs, what it stores and who
loads it, and what it was measured to lose, here and by its authors. How to read the figures is
[below](#the-figures)."""


@dataclasses.dataclass(frozen=True)
class Method:
    """An entry of docs/methods.toml.

    Attributes:
        name: of its page.
        title: its heading.
        use: what to take it for, in a few words.
        members: files of the axes that make it, as ``solvers/gptq``; they may be ones still to come.
        module: where its opening stands, for one that is no member.
        recipes: lines to type and what each is, the first for the method as a whole; without any, the known
            names that use a member.
        grids: texts whose size and containers are listed.
        mixtures: llama.cpp's mixtures whose size is listed.
        when, cost, paper: the written part of those sections.
        evidence: file of docs/evidence (without ``.json``) and the pattern of its rows' names.
    """

    name: str
    title: str
    use: str
    members: tuple[str, ...]
    when: str
    cost: str
    paper: str
    module: str = ""
    recipes: tuple[tuple[str, str], ...] = ()
    grids: tuple[str, ...] = ()
    mixtures: tuple[str, ...] = ()
    evidence: tuple[tuple[str, str], ...] = ()

    @property
    def here(self) -> tuple[str, ...]:
        """Those of its members that are there."""
        return tuple(m for m in self.members if m.rpartition("/")[2] in registry.names(m.partition("/")[0]))


@cache
def methods() -> tuple[Method, ...]:
    """Every method of the file that any member makes."""
    entries = tomllib.loads(SOURCE.read_text(encoding="utf-8"))["method"]
    found = []
    for entry in entries:
        lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
        pairs = {key: tuple(map(tuple, lists[key])) for key in ("recipes", "evidence") if key in lists}
        found.append(Method(**{**entry, **lists, **pairs}))
    return tuple(complete(method) for method in found if method.here or method.module)


def complete(method: Method) -> Method:
    """With known recipes where none are written, and with its members' grids where neither is."""
    if method.recipes:
        return method
    known = tuple((text, "") for text in dict.fromkeys(KNOWN.values()) if uses(parse(text), method.here))
    classes = [registry.member("grids", m.partition("/")[2]) for m in method.here if m.startswith("grids/")]
    grids = tuple(str(grid) for cls in classes if issubclass(cls, Grid) for grid in cls.examples())
    return dataclasses.replace(method, recipes=known, grids=method.grids or grids)


def uses(recipe: Recipe, members: tuple[str, ...]) -> bool:
    """Whether a recipe is made of any of these members."""
    calls = [f"transforms/{call.name}" for call in recipe.transforms]
    parts = {*calls, f"solvers/{recipe.solver.name}", f"containers/{recipe.container}"}
    if not recipe.is_mixture:
        module = type(registry.parse_grid(recipe.grid)).__module__
        parts.add(f"grids/{module.rpartition('.')[2]}")
    return not parts.isdisjoint(members)


def method_pages() -> Iterator[tuple[Path, str]]:
    """The index, and a page a method."""
    yield DOCS / "methods.md", index()
    for method in methods():
        yield DOCS / "methods" / f"{method.name}.md", method_page(method)


def index() -> str:
    """What there is, and for what."""
    rows = []
    for method in methods():
        link = f"[{method.title}](methods/{method.name}.md)"
        line = next((line for line, _ in method.recipes), None)
        told = ["–"] * 3 if line is None else [f"`{line}`", asked(parse(line)), bits_of(parse(line))]
        rows.append([link, method.use, *told])
    notes = tomllib.loads(SOURCE.read_text(encoding="utf-8"))
    return page(
        MARK,
        [
            "# Methods",
            HEAD,
            table(["method", "take it for", "recipe", "calibration", "bits a weight"], rows),
            NOTES,
            "## The figures",
            notes["figures"].strip(),
        ],
    )


def method_page(method: Method) -> str:
    """One method from what it does to what it lost."""
    parts = [f"# {method.title}"]
    parts += [opening(member) for member in method.here] or [first_of(method.module)]
    names = [name for name in PRESETS if any(line.startswith(f"{name} :") for line, _ in method.recipes)]
    parts += [", ".join(f"`{name}` stands for `{PRESETS[name]}`" for name in names) + "."] if names else []
    parts += ["## Recipe", recipes(method), "## When to use it", method.when.strip()]
    parts += ["## What it costs", method.cost.strip(), *options(method)]
    if method.grids or method.mixtures:
        parts += ["## What it stores, and who holds it", stored(method.grids), mixtures(method.mixtures)]
        parts.append(told(method))
    if method.paper:
        parts += ["## Its figure here", *figures(method), "## Its figure elsewhere", method.paper.strip()]
    parts.append("[All methods](../methods.md)")
    return page(MARK, parts)


def opening(member: str) -> str:
    """The first paragraph of a member's file, and where there is more."""
    axis, _, name = member.partition("/")
    first = first_of(registry.member(axis, name).__module__)
    called = name.replace("_", "-")
    return f"{first} ({axis.rstrip('s').capitalize()} [`{called}`](../{axis}.md#{called}).)"


def first_of(module: str) -> str:
    """The first paragraph of a module's docstring."""
    return unquoted(inspect.cleandoc(sys.modules[module].__doc__ or "").split("\n\n")[0])


def recipes(method: Method) -> str:
    """The lines to type; each is built, and refused here if Bitmill would refuse it."""
    rows = []
    for line, what in method.recipes:
        recipe = parse(line)
        checked(recipe)
        names = ", ".join(f"`{name}`" for name, known in KNOWN.items() if parse(known) == recipe)
        said = "; ".join(part for part in (what, names and f"known as {names}") if part)
        rows.append([f"`{line}`", said, asked(recipe)])
    if not rows:
        return "No known name yet: `bitmill recipes` lists the parts."
    return table(["recipe", "what it is", "calibration"], rows)


def checked(recipe: Recipe) -> None:
    """Raise ValueError where solver or container would refuse an ordinary weight of this recipe."""
    container, solver = recipe.make_container(), recipe.make_solver()
    texts = {recipe.grid} if not recipe.is_mixture else {grid for _, grid in chosen(recipe.grid)}
    for text in texts:
        grid = container.adapt(registry.parse_grid(text), "bf16")
        reason = container.refuses(grid, "q", SHAPE) or solver.refuses(grid)
        if reason is None and recipe.input is not None:
            able = isinstance(container, InputContainer)
            reason = container.refuses_inputs(grid, parse_inputs(recipe.input)) if able else "no inputs there"
        if reason is not None:
            raise ValueError(f"{recipe}: {reason}")


def asked(recipe: Recipe) -> str:
    """What the recipe asks of calibration, in words."""
    solver = recipe.make_solver()
    parts = (solver, *recipe.make_transforms())
    need = max((part.needs for part in parts), key=NEEDS.index)
    if need == "nothing" and recipe.is_mixture and blind(recipe.grid):
        need = "diagonal"
    words = [ASKS[need]]
    if recipe.input is not None and parse_inputs(recipe.input).fixed:
        words = [*words, "input ranges"] if need != "nothing" else ["input ranges"]
    if isinstance(solver, CalibratedSolver) and solver.cross:
        words.append("the original's inputs")
    if recipe.tune is not None:
        words = [*(words if need != "nothing" else []), "the original's distribution"]
    return " and ".join(words)


def chosen(mixture: str) -> set[tuple[str, str]]:
    """Role and type of every matrix of Llama 3 8B."""
    return {(role, grid) for role, grid, _ in _matrices(mixture)}


def bits_of(recipe: Recipe) -> str:
    """Bits a weight of one matrix, or of a mixture's model."""
    if recipe.tensors:
        return "as asked"
    if recipe.is_mixture:
        return f"{mixture_bits(recipe.grid):.2f}"
    return shown(registry.parse_grid(recipe.grid))


def shown(grid: Grid) -> str:
    """Bits a weight of a large matrix, to three places at most."""
    bits = grid.storage_bits(SHAPE) / (SHAPE[0] * SHAPE[1])
    return f"{bits:.3f}".rstrip("0").rstrip(".")


def _matrices(mixture: str, told: bool = False) -> list[tuple[str, str, int]]:
    """Role, type and stored bits of every matrix of Llama 3 8B in a mixture, its inputs known or not."""
    wide, middle, keys = MODEL["hidden"], MODEL["middle"], MODEL["keys"]
    layers = MODEL["layers"]
    block = {"q": (wide, wide), "k": (keys, wide), "v": (keys, wide), "o": (wide, wide)}
    block |= {"gate": (middle, wide), "up": (middle, wide), "down": (wide, middle)}
    placed = [(role, at, shape) for at in range(layers) for role, shape in block.items()]
    placed += [("embed", None, (MODEL["words"], wide)), ("head", None, (MODEL["words"], wide))]
    traits = {"heads": 32, "kv_heads": 8, "tied": 0, "experts": 0, "imatrix": int(told)}
    rules, found = Mixture(mixture), []
    for role, at, shape in placed:
        choice = rules.choose(Weight(f"{role}.{at}", role, at, shape, layers, traits))
        if choice is None:
            raise ValueError(f"{mixture} leaves {role}")
        found.append((role, choice.grid, registry.parse_grid(choice.grid).storage_bits(shape)))
    return found


def mixture_bits(mixture: str) -> float:
    """Bits a weight of all matrices of Llama 3 8B."""
    wide, middle, keys = MODEL["hidden"], MODEL["middle"], MODEL["keys"]
    weights = MODEL["layers"] * wide * (2 * wide + 2 * keys + 3 * middle) + 2 * MODEL["words"] * wide
    return sum(bits for *_, bits in _matrices(mixture, blind(mixture))) / weights


def blind(mixture: str) -> bool:
    """Whether the mixture demands to know the inputs."""
    return any(demands_importance(mixture, *pair) for pair in chosen(mixture))


def mixtures(names: tuple[str, ...]) -> str:
    """llama.cpp's mixtures, and the share of each type in them."""
    if not names:
        return ""
    rows = []
    for name in names:
        sizes: dict[str, int] = {}
        for _, grid, bits in _matrices(name, blind(name)):
            sizes[grid] = sizes.get(grid, 0) + bits
        kinds = ", ".join(sorted(sizes, key=lambda grid: -sizes[grid]))
        wanted = "needed" if blind(name) else "optional"
        rows.append([f"`{name}`", kinds, f"{mixture_bits(name):.2f}", wanted])
    said = "Mixtures, counted over all matrices of Llama 3 8B, the largest type first:"
    return f"{said}\n\n" + table(["mixture", "types", "bits a weight", "importance"], rows)


def stored(texts: tuple[str, ...]) -> str:
    """Bits and containers of grids, as the containers themselves answer."""
    rows = []
    for text in texts:
        grid = registry.parse_grid(text)
        rows.append([f"`{grid}`", shown(grid), ", ".join(holders(grid))])
    return f"{HOLD}\n\n" + table(["grid", "bits a weight", "containers"], rows) if rows else ""


def told(method: Method) -> str:
    """Whose files have a runtime round the inputs of these recipes' layers, because asked to or by nature."""
    containers = {name: cls() for name, cls in registry.members("containers").items()}
    able = {name: c for name, c in containers.items() if isinstance(c, InputContainer)}
    pairs: dict[tuple[str, str], None] = {}
    for recipe in (parse(line) for line, _ in method.recipes):
        if not recipe.is_mixture:
            asked_for = recipe.input or unasked(able.get(recipe.container), recipe.grid)
            pairs |= {(recipe.grid, asked_for): None} if asked_for else {}
    rows = []
    for grid, inputs in pairs:
        found = []
        for name, container in able.items():
            settled = container.adapt(registry.parse_grid(grid), "bf16")
            refusal = container.refuses(settled, "q", SHAPE)
            if refusal is None and container.refuses_inputs(settled, parse_inputs(inputs)) is None:
                always = " (always)" if unasked(container, grid) == inputs else ""
                found.append(name.replace("_", "-") + always)
        rows.append([f"`{grid}`", f"`{inputs}`", ", ".join(found)])
    said = "With inputs rounded as the recipes above have it, asked for or always:"
    return f"{said}\n\n" + table(["weights", "inputs", "containers"], rows) if rows else ""


def unasked(container: InputContainer | None, grid: str) -> str:
    """The inputs that a container's readers round whether asked to or not; empty for none."""
    if container is None:
        return ""
    row = Row("model.layers.0.self_attn.q_proj.weight", "q", 0, SHAPE, registry.parse_grid(grid), True, "")
    inputs = container.implied_inputs([row]).get(row.name)
    return "" if inputs is None else str(inputs)


def holders(grid: Grid) -> list[str]:
    """Containers that write this grid for a layer of a bfloat16 model, and what else it becomes there."""
    found = []
    for name, cls in registry.members("containers").items():
        container = cls()
        if not isinstance(container, Container) or isinstance(container, ReadOnly):
            continue
        settled = container.adapt(grid, "bf16")
        if container.refuses(settled, "q", SHAPE) is None:
            other = "" if type(settled) is type(grid) else f" (as `{bare(settled)}`)"
            found.append(name.replace("_", "-") + other)
    return found


def bare(grid: Grid) -> str:
    """A grid's text without the precision of its scales."""
    return re.sub(r"-s(f16|bf16|f32)$", "", str(grid))


def options(method: Method) -> list[str]:
    """A table for each of its solvers and transforms that has any."""
    parts = []
    for member in method.here:
        axis, _, name = member.partition("/")
        if axis not in ("solvers", "transforms"):
            continue
        rows = described(registry.member(axis, name))
        if rows:
            called = name.replace("_", "-")
            parts.append(f"Options of `{called}`, as `{called}({rows[0][0].strip('`')}=…)`:")
            parts.append(table(["option", "default", "what it does"], rows))
    return parts


def described(cls: type) -> list[list[str]]:
    """Each option of a member: name, default, and its lines of the docstring."""
    about = unquoted(inspect.cleandoc(cls.__doc__ or "")).partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", about, re.MULTILINE)
    said = {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
    fields = [f for f in dataclasses.fields(cls) if f.init and f.default is not dataclasses.MISSING]
    for field in fields:
        if field.name not in said:
            raise ValueError(f"{cls.__name__}.{field.name} is not described in the docstring")
    return [[f"`{f.name}`", f"`{value(f.default)}`", said[f.name]] for f in fields]


def value(default: Any) -> str:
    """A default as a recipe spells it."""
    return str(default).lower() if isinstance(default, bool) else str(default)


def figures(method: Method) -> list[str]:
    """Rows of docs/evidence that are this method's; a row that is named and not there is an error."""
    parts = []
    for file, pattern in method.evidence:
        path = DOCS / "evidence" / f"{file}.json"
        if not path.is_file():
            continue
        evidence = json.loads(path.read_text(encoding="utf-8"))
        every = [row | {"of": part["about"]} for part in parts_of(evidence) for row in part["rows"]]
        rows = [row for row in every if re.search(pattern, called(row))]
        if not rows:
            raise ValueError(f"{method.name}: no row of {path.name} is called {pattern}")
        shape = qualities if "scores" in rows[0] else memories if "anonymous_mib" in rows[0] else speeds
        parts.append(shape(rows))
        parts.append(f"From [{file}](../evidence/{file}.md).")
    return parts or ["Not measured yet."]


def parts_of(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """A table, and those inside it."""
    return [evidence, *(inner for inner in evidence.values() if isinstance(inner, dict) and "rows" in inner)]


def called(row: dict[str, Any]) -> str:
    """What a row is called by: a name, llama.cpp's type, or a recipe."""
    return str(row.get("name") or row.get("type") or row["recipe"])


def memories(rows: list[dict[str, Any]]) -> str:
    """What a run needed, of a model of random weights."""
    body = [
        [
            f"`{row['recipe']}`",
            f"{row['of']['weights'] / 1e9:.2f} billion",
            f"{row['of']['block_mib']:.0f}",
            str(row["windows"]),
            f"{row['anonymous_mib']:,.0f}",
        ]
        for row in rows
    ]
    return table(["recipe", "weights", "MiB a block", "windows of 512", "peak memory, MiB"], body)


def qualities(rows: list[dict[str, Any]]) -> str:
    """What was lost, by kind of text."""
    body = []
    for row in rows:
        scores = row["scores"]
        line = shortened(row["recipe"]) if "recipe" in row else "the peer's own"
        losses = [f"{scores[kind]['mean_kld']:.4f}" for kind in ("docs", "other")]
        first = f"{100 * scores['docs']['same_top']:.1f} %"
        body.append([row["name"], line, f"{row['bpw']:.2f}", *losses, first])
    head = ["measured", "recipe", "bits a weight", "KLD, docs", "KLD, other", "same first choice"]
    return table(head, body)


def shortened(recipe: str) -> str:
    """A recipe for a cell of a table: many patterns are counted."""
    patterns = re.findall(r"/[^/]+/=[^ ,]+, ?", recipe)
    if len(patterns) <= MOST_PATTERNS:
        return f"`{recipe}`"
    for pattern in patterns:
        recipe = recipe.replace(pattern, "", 1)
    return f"`{recipe}`, and types for {len(patterns)} patterns"


def speeds(rows: list[dict[str, Any]]) -> str:
    """How fast a type is filled, beside llama.cpp's own code."""
    body = [
        [
            f"`{row['type']}`",
            "with" if row["importance"] else "without",
            f"{row['bitmill']:.0f}",
            f"{row['ratio']:.1f}",
            "yes" if row["same"] else "no",
        ]
        for row in rows
    ]
    head = ["type", "importance", "million weights a second", "times llama.cpp's speed", "same bytes"]
    return table(head, body)
