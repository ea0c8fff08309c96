"""A budget into a recipe: what each type costs each tensor, the limit in bytes, and the best that buys.

The result is one of llama.cpp's mixtures, pure, with the tensors that differ from it by pattern: a recipe
like any other, planned and written by nothing that knows of budgets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import floor, prod

from bitmill.allocation.budget import Budget, Offer, spend
from bitmill.allocation.mixture import Mixture
from bitmill.calibrate.damage import Damage
from bitmill.checkpoint.gguf_arch import architecture_of_model
from bitmill.core import registry
from bitmill.core.axes import Checkpoint, Weight
from bitmill.core.errors import Refused
from bitmill.core.experts import stack_of
from bitmill.core.sizes import size_of
from bitmill.core.types import Row
from bitmill.families.base import LINEAR_ROLES
from bitmill.planning import MATRIX, Plan, plan
from bitmill.recipe import Recipe, parse

_ALIGNMENT = 32  # of a tensor in a GGUF file
_LONGEST_TYPE = len(", =iq2_xxs")
_HEAD_ROOM = 64  # bytes: the base's name, which is not known before, and the end of the head
_SHARE, _LEAST = 5, 1 << 30  # of available memory, a fifth or a GiB stays for the context and for others
_ROLES = LINEAR_ROLES | {"embed", "head"}


@dataclass(frozen=True, eq=False)
class Budgeted:
    """What a budget bought.

    Attributes:
        recipe: that makes it.
        plan: of that recipe; its bytes are within ``limit``.
        budget: type, size and predicted damage of every tensor that was chosen for.
        limit: bytes of the whole file.
    """

    recipe: Recipe
    plan: Plan
    budget: Budget
    limit: int

    @property
    def types(self) -> Mapping[str, str]:
        """The chosen types by tensor, single experts among them."""
        kinds = {lot: offer.kind for lot, offer in self.budget.types}
        return {r.name: kinds[stack_of(r.name)] for r in self.plan.rows if stack_of(r.name) in kinds}

    @property
    def shares(self) -> Mapping[str, float]:
        """Share of the chosen weights by type, largest first."""
        sizes: Counter[str] = Counter()
        shapes = {row.name: row.shape for row in self.plan.rows}
        for name, kind in self.types.items():
            sizes[kind] += prod(shapes[name])
        return {kind: count / sizes.total() for kind, count in sizes.most_common()}


def budgeted(
    source: Checkpoint,
    damage: Damage,
    limit: int,
    *,
    solver: str = "gptq",
    types: Collection[str] = (),
) -> Budgeted:
    """The recipe with the least predicted KL divergence whose GGUF file has at most ``limit`` bytes.

    Args:
        solver: as in a recipe, with options if need be; it must be able to place weights on the types.
        types: those that may be used; empty for all that were measured.

    Raises:
        Refused: not even the smallest types are small enough, or a tensor was not measured.
    """
    largest = plan(parse(f"{solver} : Q8_0, pure > gguf"), source)
    lots = _lots(largest, damage)
    offers = _offers(largest, lots, damage, {str(registry.parse_grid(kind)) for kind in types})
    stored = _stored(source, lots)
    fixed = largest.bytes_ - sum(_padded(rows, str(rows[0].grid)) for rows in lots.values())
    # The recipe is in the file's head. Room for the longest one, so that the limit of the tensors does not
    # depend on the choice, which would cost the promise that more bytes are never worse.
    fixed += _HEAD_ROOM + sum(len(_pattern((name,))) + _LONGEST_TYPE for name in stored.values())
    bought = spend(offers, limit - fixed)
    if bought is None:
        least = fixed + sum(min(o.bytes_ for o in of) for of in offers.values())
        raise Refused(
            f"{limit:,} bytes are too few: the smallest types take {least:,}",
            where=f"{8 * limit / largest.parameters:.3f} bits a weight of the whole file",
            fix=f"--size {least} or more, or a smaller model",
        )
    recipe = _recipe(solver, bought, lots, stored)
    made = plan(recipe, source)
    if made.bytes_ > limit:
        raise AssertionError(f"{made.bytes_} bytes are planned, {limit} were the limit")
    return Budgeted(recipe, made, bought, limit)


def limit_of(bpw: float | None, size: str | None, free: int | None, parameters: int) -> int:
    """Bytes of a file, from bits a weight (headers and all, as plans count), a size, or free memory.

    Raises:
        Refused: none or several of them are given, or the one is not a positive number.
    """
    given = [value for value in (bpw, size, free) if value is not None]
    if len(given) != 1:
        raise Refused(
            "a budget is one limit" if given else "no budget is given",
            fix="one of: --bpw 4.5, --size 80MiB, --fit",
        )
    if bpw is not None:
        if not 0 < bpw <= 32:
            raise Refused(f"{bpw} bits a weight", fix="for example --bpw 4.5")
        return floor(bpw * parameters / 8)
    if size is not None:
        return size_of(size)
    assert free is not None
    return max(free - max(free // _SHARE, _LEAST), 0)


def toml(made: Budgeted, damage: Damage) -> str:
    """The recipe as a file, with what it is predicted to cost."""
    recipe, facts = made.recipe, damage.facts
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in made.shares.items())
    tokens = f"{facts.get('windows')} windows of {facts.get('window')} tokens"
    lines = [
        f"# Least predicted KL divergence in {made.limit:,} bytes: {made.budget.damage:.4g} nats a token.",
        f"# {made.plan.bytes_:,} bytes, {made.plan.bpw:.4f} bits a weight; {shares}",
        f"# Damage measured on {tokens}, sha256 {facts.get('sha256')}; model {facts.get('model')}",
        f'solver = "{" + ".join(map(str, recipe.solvers))}"',
        f'grid = "{recipe.grid}"',
        f'container = "{recipe.container}"',
        "pure = true",
    ]
    lines += ["", "[tensors]"] if recipe.tensors else []
    lines += [f"'{pattern}' = \"{kind}\"" for pattern, kind in recipe.tensors]
    return "\n".join(lines) + "\n"


def _lots(largest: Plan, damage: Damage) -> dict[str, list[Row]]:
    """What has one type, by name: a matrix, or all experts of a stack.

    Raises:
        Refused: one was not measured.
    """
    lots: dict[str, list[Row]] = {}
    for row in largest.rows:
        outside = row.role in LINEAR_ROLES and row.layer is None
        if row.role not in _ROLES or outside or len(row.shape) < MATRIX:
            continue
        if row.name not in damage.nats or len(row.shape) != MATRIX:
            raise Refused(
                "nothing is known of what quantizing this tensor costs",
                where=row.name,
                fix="measure this model anew; stacks of experts cannot be measured: name a mixture",
            )
        lots.setdefault(stack_of(row.name), []).append(row)
    return lots


def _offers(
    largest: Plan, lots: Mapping[str, Sequence[Row]], damage: Damage, types: Collection[str]
) -> dict[str, list[Offer]]:
    """What each lot could be stored as: what was measured, and container and solver allow."""
    container, solver = largest.container, largest.recipe.make_solver()
    offers: dict[str, list[Offer]] = {}
    for name, rows in lots.items():
        first, measured = rows[0], damage.nats[rows[0].name]
        for kind in measured:
            grid = registry.parse_grid(kind)
            refused = container.refuses(grid, first.role, first.shape) or (
                first.solved and solver.refuses(grid)
            )
            if not refused and (not types or kind in types):
                cost = sum(damage.nats[row.name][kind] for row in rows)
                offers.setdefault(name, []).append(Offer(kind, _padded(rows, kind), cost))
        if name not in offers:
            raise Refused(
                f"none of the types can hold a weight of shape {list(first.shape)}",
                where=name,
                fix=f"measured are {', '.join(measured)}",
            )
    return offers


def _padded(rows: Sequence[Row], kind: str) -> int:
    """Bytes of a matrix, or of a stack of them, at a type, with what aligns the next one."""
    grid = registry.parse_grid(kind)
    bits = sum(grid.storage_bits((row.shape[0], row.shape[1])) for row in rows)
    return -(-bits // (8 * _ALIGNMENT)) * _ALIGNMENT


def _stored(source: Checkpoint, lots: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    arch = architecture_of_model(source.config)
    return {lot: arch.gguf_name(rows[0].name) or lot for lot, rows in lots.items()}


def _recipe(
    solver: str, bought: Budget, lots: Mapping[str, Sequence[Row]], stored: Mapping[str, str]
) -> Recipe:
    """The type of most weights as a pure mixture, and a pattern for each type and part that differs."""
    sizes: Counter[str] = Counter()
    parts: dict[tuple[str, str], list[str]] = {}
    known = _mixtures()
    for name, offer in bought.types:
        if offer.kind in known:
            sizes[offer.kind] += sum(prod(row.shape) for row in lots[name])
        parts.setdefault((_part(stored[name]), offer.kind), []).append(stored[name])
    most = sizes.most_common(1)[0][0] if sizes else "q8_0"
    patterns = [(_pattern(names), kind) for (_, kind), names in sorted(parts.items()) if kind != most]
    base = parse(f"{solver} : {known[most]}, pure > gguf")
    return parse(str(base).replace(", pure", "".join(f", /{p}/={k}" for p, k in patterns) + ", pure"))


def _mixtures() -> dict[str, str]:
    """By type: a mixture that gives it to every tensor when it is pure."""
    found: dict[str, str] = {}
    for name in Mixture.names():
        choice = Mixture(name, pure=True).choose(Weight("", "q", 0, (256, 256), 1, {}))
        if choice is not None:
            found.setdefault(choice.grid, name)
    return found


def _part(stored: str) -> str:
    return re.sub(r"^blk\.\d+\.", "", stored)


def _pattern(names: Sequence[str]) -> str:
    """One pattern for a part of some blocks, in the regular expressions that llama.cpp has too."""
    part = re.escape(_part(names[0]))
    blocks = [name.split(".")[1] for name in names if name.startswith("blk.")]
    if not blocks:
        return f"^{part}$"
    chosen = blocks[0] if len(blocks) == 1 else f"({'|'.join(blocks)})"
    return rf"^blk\.{chosen}\.{part}$"
