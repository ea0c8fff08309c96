"""What a budget may buy: what each lot could be stored as, at how many bytes and at what damage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from bitmill.allocation.budget import Budget, Offer
from bitmill.allocation.mixture import Mixture
from bitmill.calibrate.damage import Damage
from bitmill.core import registry
from bitmill.core.axes import Checkpoint, Solver, Weight
from bitmill.core.errors import Refused
from bitmill.core.types import Row
from bitmill.families.base import LINEAR_ROLES
from bitmill.lots import ALL_OR_NONE, Lot, longest_pattern, lots_of, patterns
from bitmill.planning import BYTES, MATRIX, Plan, plan, source_dtype
from bitmill.recipe import Recipe, parse

_ALIGNMENT = 32  # of a tensor in a GGUF file
_SIGNS = len(", =")  # around a pattern and its type, in a recipe
_HEAD_ROOM = 64  # bytes: the base's name, which is not known before, and the end of the head
_SLOT_ROOM = 128  # bytes: what a folder's headers say of one of a tensor's slots, beside its name
_NAME_ROOM = 256  # bytes: what its config.json may say of one tensor, beside its name
_GROUP_ROOM = 1024  # bytes: and of one type
_ROLES = LINEAR_ROLES | {"embed", "head"}


@dataclass(frozen=True, eq=False)
class Market:
    """Offers for every lot, and what there is to pay besides.

    Attributes:
        lots: what types are chosen for.
        offers: by the lots' names.
        fixed: bytes that no choice changes, with room for the longest way to say any choice: the limit of the
            tensors so does not depend on the choice, which would cost the promise that more bytes are never
            worse.
        parameters: of the model.
        solver, container: as a recipe has them.
        kept: by the lots' names, what they stay in where nothing is said of them.
    """

    lots: tuple[Lot, ...]
    offers: Mapping[str, Sequence[Offer]]
    fixed: int
    parameters: int
    solver: str
    container: str
    kept: Mapping[str, str]

    @classmethod
    def of(
        cls, source: Checkpoint, damage: Damage, types: Collection[str], solver: str, container: str
    ) -> Market:
        """The market for a model, of these types, or of all that were measured.

        Raises:
            Refused: a tensor was not measured, or none of the types can hold it.
        """
        dtype = source_dtype(source)
        start = "Q8_0, pure" if container == "gguf" else dtype
        largest = plan(parse(f"{solver} : {start} > {container.replace('_', '-')}"), source)
        lots = lots_of(_chosen_for(largest.rows, damage), container, source)
        stall = _Stall(source, largest, damage, largest.recipe.make_solver(), dtype, frozenset(types))
        offers = {lot.name: stall.offers(lot) for lot in lots}
        fixed = largest.bytes_ - sum(stall.bytes_(lot, None) for lot in lots) + stall.room(lots, offers)
        kept = {lot.name: stall.kept(lot) for lot in lots}
        return cls(lots, offers, fixed, largest.parameters, solver, container, kept)

    def recipe(self, bought: Budget) -> Recipe:
        """The type of most weights for all, and a pattern for each type and part that differs."""
        kinds = {name: offer.kind for name, offer in bought.types}
        mixtures = _mixtures()
        pure = self.container == "gguf"
        sizes: Counter[str] = Counter()
        for lot in self.lots:
            kind = kinds[lot.name]
            if kind in mixtures if pure else lot.inside and kind not in BYTES:
                sizes[kind] += sum(prod(row.shape) for row in lot.rows)
        rest = "q8_0" if pure else next(iter(self.kept.values()))
        most = sizes.most_common(1)[0][0] if sizes else rest
        grid = f"{mixtures[most]}, pure" if pure else most
        base = parse(f"{self.solver} : {grid} > {self.container.replace('_', '-')}")
        others = [
            (lot, kinds[lot.name]) for lot in self.lots if kinds[lot.name] != self._unsaid(lot, base, most)
        ]
        return replace(base, tensors=patterns(others))

    def _unsaid(self, lot: Lot, base: Recipe, most: str) -> str | None:
        """What a lot has by ``base`` alone; None where a mixture's rules would say."""
        if base.is_mixture and not base.pure:
            return None
        return most if base.pure or lot.inside else self.kept[lot.name]


@dataclass(frozen=True, eq=False)
class _Stall:
    """What is known to make offers from."""

    source: Checkpoint
    largest: Plan
    damage: Damage
    solver: Solver
    dtype: str
    types: frozenset[str]

    @property
    def gguf(self) -> bool:
        return self.largest.recipe.container == "gguf"

    def offers(self, lot: Lot) -> list[Offer]:
        """What was measured, and container and solver allow."""
        first, found = lot.rows[0], []
        for measured in self.damage.nats[first.name]:
            kind = self.kept(lot) if measured in BYTES and not self.gguf else measured
            if not self._wanted(lot, kind) or self._refuses(lot, kind):
                continue
            cost = sum(self.damage.nats[row.name][measured] for row in lot.rows)
            found.append(Offer(kind, self.bytes_(lot, kind), cost))
        if not found:
            raise Refused(
                f"none of the types can hold a weight of shape {list(first.shape)}",
                where=lot.name,
                fix=f"measured are {', '.join(self.damage.nats[first.name])}",
            )
        return found

    def kept(self, lot: Lot) -> str:
        """What a lot is stored in when it is left."""
        return self.largest.container.default_grid(self.dtype, lot.rows[0].role)

    def bytes_(self, lot: Lot, kind: str | None) -> int:
        """Of a lot at a type, or as it is in the largest plan; in GGUF with what aligns the next one."""
        total = sum(sum(self._slots(row, kind).values()) for row in lot.rows)
        return -(-total // _ALIGNMENT) * _ALIGNMENT if self.gguf else total

    def room(self, lots: Sequence[Lot], offers: Mapping[str, Sequence[Offer]]) -> int:
        """Bytes for the longest way to say what was chosen."""
        kinds = {offer.kind for of in offers.values() for offer in of}
        longest = _SIGNS + max((len(kind) for kind in kinds), default=0)
        said = _HEAD_ROOM + sum(len(longest_pattern(lot)) + longest for lot in lots)
        if self.gguf:
            return said
        names = sum(2 * len(row.name) + _NAME_ROOM for lot in lots for row in lot.rows)
        slots = sum(
            max(
                sum(len(slot) + _SLOT_ROOM for slot in self._slots(row, offer.kind))
                for offer in offers[lot.name]
            )
            for lot in lots
            for row in lot.rows
        )
        return 4 * said + names + slots + _GROUP_ROOM * len(kinds)

    def _slots(self, row: Row, kind: str | None) -> Mapping[str, int]:
        if kind is not None:
            row = replace(row, grid=self.largest.container.adapt(registry.parse_grid(kind), self.dtype))
        return self.largest.container.slots(row, self.source)

    def _wanted(self, lot: Lot, kind: str) -> bool:
        """Whether it was asked for; embedding and head may stay as they are where a container keeps them."""
        if kind in BYTES and not self.gguf:
            container = self.largest.recipe.container
            return not lot.inside or (container not in ALL_OR_NONE and (not self.types or kind in self.types))
        return not self.types or kind in self.types

    def _refuses(self, lot: Lot, kind: str) -> bool:
        container = self.largest.container
        grid = container.adapt(registry.parse_grid(kind), self.dtype)
        if lot.inside and kind not in BYTES and self.solver.refuses(grid):
            return True
        return any(
            container.refuses(grid, role, shape) for role, shape in {(r.role, r.shape) for r in lot.rows}
        )


def _chosen_for(rows: Sequence[Row], damage: Damage) -> list[Row]:
    """The matrices that types are chosen for.

    Raises:
        Refused: one was not measured.
    """
    found = []
    for row in rows:
        outside = row.role in LINEAR_ROLES and row.layer is None
        if row.role not in _ROLES or outside or len(row.shape) < MATRIX:
            continue
        if row.name not in damage.nats or len(row.shape) != MATRIX:
            raise Refused(
                "nothing is known of what quantizing this tensor costs",
                where=row.name,
                fix="measure this model anew; stacks of experts cannot be measured: name a mixture",
            )
        found.append(row)
    return found


def _mixtures() -> dict[str, str]:
    """By type: a mixture that gives it to every tensor when it is pure."""
    found: dict[str, str] = {}
    for name in Mixture.names():
        choice = Mixture(name, pure=True).choose(Weight("", "q", 0, (256, 256), 1, {}))
        if choice is not None:
            found.setdefault(choice.grid, name)
    return found
