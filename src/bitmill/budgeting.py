"""A budget into a recipe: what each type costs each tensor, the limit in bytes, and the best that buys.

The result is one grid, or in GGUF one of llama.cpp's mixtures, pure, with the tensors that differ from it by
pattern: a recipe like any other, planned and written by nothing that knows of budgets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import floor, prod

from bitmill.allocation.budget import Budget, spend
from bitmill.calibrate.damage import Damage
from bitmill.core import registry
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.core.sizes import size_of
from bitmill.lots import refuse_container
from bitmill.market import Market
from bitmill.planning import Plan, plan
from bitmill.recipe import Recipe

_SHARE, _LEAST = 5, 1 << 30  # of available memory, a fifth or a GiB stays for the context and for others


@dataclass(frozen=True, eq=False)
class Budgeted:
    """What a budget bought.

    Attributes:
        recipe: that makes it.
        plan: of that recipe; its bytes are within ``limit``.
        budget: type, size and predicted damage of every lot that was chosen for: a tensor, or several that
            have one type together.
        limit: bytes of the whole output.
        types: the chosen types by tensor.
    """

    recipe: Recipe
    plan: Plan
    budget: Budget
    limit: int
    types: Mapping[str, str]

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
    container: str = "gguf",
) -> Budgeted:
    """The recipe with the least predicted KL divergence whose output has at most ``limit`` bytes.

    Args:
        solver: as in a recipe, with options if need be; it must be able to place weights on the types.
        types: those that may be used; empty for all that were measured.
        container: what it is stored in: ``gguf``, ``bitmill``, ``compressed_tensors`` … Types are chosen for
            what has one type there (:mod:`bitmill.lots`).

    Raises:
        Refused: not even the smallest types are small enough, a tensor was not measured, or the container
            holds no types to choose among.
    """
    refuse_container(container)
    market = Market.of(source, damage, {str(registry.parse_grid(t)) for t in types}, solver, container)
    bought = spend(market.offers, limit - market.fixed)
    if bought is None:
        least = market.fixed + sum(min(o.bytes_ for o in of) for of in market.offers.values())
        raise Refused(
            f"{limit:,} bytes are too few: the smallest types take {least:,}",
            where=f"{8 * limit / market.parameters:.3f} bits a weight of the whole file",
            fix=f"--size {least} or more, or a smaller model",
        )
    recipe = market.recipe(bought)
    made = plan(recipe, source)
    if made.bytes_ > limit:
        raise AssertionError(f"{made.bytes_} bytes are planned, {limit} were the limit")
    kinds = {lot: offer.kind for lot, offer in bought.types}
    chosen = {row.name: kinds[lot.name] for lot in market.lots for row in lot.rows}
    return Budgeted(recipe, made, bought, limit, chosen)


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
        *(["pure = true"] if recipe.pure else []),
    ]
    lines += ["", "[tensors]"] if recipe.tensors else []
    lines += [f"'{pattern}' = \"{kind}\"" for pattern, kind in recipe.tensors]
    return "\n".join(lines) + "\n"
