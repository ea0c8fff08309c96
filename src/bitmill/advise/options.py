"""Every way to run a model that an answer chooses among: memory, speed, loss, and what is against it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitmill.advise import rules
from bitmill.advise.cache_types import CacheType, cache_type
from bitmill.advise.cliff import Split, cliff
from bitmill.advise.inventory import Bare, Sized, sized
from bitmill.advise.machine import Machine
from bitmill.advise.memory import Memory, Model, Part, Wanted, memory, most_context
from bitmill.advise.quality import HERE, Loss, loss
from bitmill.advise.rules import Job
from bitmill.advise.runtimes import Runtime
from bitmill.advise.shape_config import config_shape
from bitmill.core.errors import Refused
from bitmill.families.base import describe
from bitmill.recipe import parse


@dataclass(frozen=True)
class Asked:
    """What is asked: machine, job, program, context, sequences, and what was measured.

    Attributes:
        kv: the one type of keys and values to use; None leaves it to the rules.
    """

    machine: Machine
    job: Job
    runtime: Runtime
    context: int
    parallel: int
    measured: Mapping[str, Loss]
    kv: str | None = None


@dataclass(frozen=True)
class Option:
    """One model by one recipe with one type of cache, and how it fares.

    Attributes:
        model: as it was named.
        parameters: weights of it.
        recipe: a known name.
        kv: what keys and values are stored as.
        bits, bpw: a weight of the linears, and of all.
        memory: what it takes in the fastest place of the machine.
        there_bytes: what there is.
        split: how it would be parted between a card and main memory; None without room, or in training.
        loss: what it loses.
        against: what is against it, the worst first; empty when nothing is.
        last: whether it is below the floor, and tried only when nothing else works.
    """

    model: str
    parameters: int
    recipe: str
    kv: str
    bits: float
    bpw: float
    memory: Memory
    there_bytes: int
    split: Split | None
    loss: Loss
    against: tuple[str, ...]
    last: bool

    @property
    def whole(self) -> bool:
        """Whether all of it has room in the fastest place."""
        return self.memory.bytes_ <= self.there_bytes

    @property
    def rate(self) -> float:
        """Tokens a second in the middle of the model's range; 0 where it does not run."""
        return 0.0 if self.split is None else middle(self.split)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "kv": self.kv,
            "bits": round(self.bits, 4),
            "bpw": round(self.bpw, 4),
            "place": self.memory.place,
            "bytes": {"value": self.memory.bytes_, "evidence": "modelled"},
            "parts": [{"name": p.name, "bytes": p.bytes_, "evidence": p.evidence} for p in self.memory.parts],
            "there_bytes": self.there_bytes,
            "fits": self.whole,
            "speed": None if self.split is None else self.split.to_json(),
            "loss": self.loss.to_json(),
            "against": list(self.against),
        }


def middle(split: Split) -> float:
    """The middle of a split's range of tokens a second, as a ratio to both ends."""
    low, high = split.decode
    return math.sqrt(low * high)


class Judge:
    """Options of one model, for one question; what a recipe makes of it is computed once."""

    def __init__(self, name: str, bare: Bare, asked: Asked, ladder: Sequence[str]) -> None:
        self.name, self.bare, self.asked, self.ladder = name, bare, asked, ladder
        self.shape = config_shape(bare.config, asked.runtime.latent)
        self.family = describe(bare.config).name
        self._sized: dict[str, Sized | Refused] = {}

    def sized(self, recipe: str) -> Sized:
        """What ``recipe`` makes of the model.

        Raises:
            Refused: it cannot.
        """
        if recipe not in self._sized:
            try:
                self._sized[recipe] = sized(self.bare, parse(recipe))
            except Refused as error:
                self._sized[recipe] = error
        found = self._sized[recipe]
        if isinstance(found, Refused):
            raise found
        return found

    def model(self, recipe: str) -> Model:
        """The model as ``recipe`` would make it."""
        return Model(self.shape, self.sized(recipe).weights, self.asked.runtime)

    def caches(self) -> tuple[CacheType, ...]:
        """Types of keys and values to try, the program's own first."""
        runtime, asked = self.asked.runtime, self.asked
        names = (asked.kv,) if asked.kv else (runtime.types[0], *rules.smaller_caches(runtime.name))
        kinds = [cache_type(name) for name in names]
        heads = [(b.head, b.value_head) for b in self.shape.blocks]
        fit = [k for k in kinds if all(k.refuses(a) is None and k.refuses(b) is None for a, b in heads)]
        return tuple(fit) or (kinds[0],)

    def wanted(self, kv: CacheType) -> Wanted:
        """How it is to be run, with that type of cache."""
        return Wanted(self.asked.context, self.asked.parallel, (kv, kv))

    def option(self, recipe: str, kv: CacheType, last: bool) -> Option:
        """How one recipe with one type of cache fares.

        Raises:
            Refused: the recipe cannot work on this model, or its program not with this cache.
        """
        asked, made = self.asked, self.sized(recipe)
        model, wanted = self.model(recipe), self.wanted(kv)
        place, there = asked.machine.places[0]
        needed = self._memory(model, wanted, place)
        room = replace(asked.machine, vram_bytes=max(asked.machine.vram_bytes - rules.headroom("vram"), 0))
        split = None
        if asked.job.name != "finetune":
            split = cliff(model, wanted, room).best
        there -= rules.headroom(place)
        if not asked.machine.vram_bytes and needed.bytes_ > there:
            split = None
        lost = loss(recipe, made.bits, self.family, asked.measured)
        return Option(
            model=self.name,
            parameters=self.bare.parameters,
            recipe=recipe,
            kv=kv.name,
            bits=made.bits,
            bpw=made.bpw,
            memory=needed,
            there_bytes=there,
            split=split,
            loss=lost,
            against=self._against(recipe, made, needed, there, split, lost),
            last=last,
        )

    def _memory(self, model: Model, wanted: Wanted, place: str) -> Memory:
        """What it takes to run it; or, for fine-tuning, to train adapters on it."""
        needed = memory(model, wanted, place)
        if self.asked.job.name != "finetune":
            return needed
        shape, tokens = self.shape, wanted.context * wanted.parallel
        rank, bytes_ = rules.training()
        sides = sum(
            sum(fact.shape) for name, fact in self.bare.tensors.items()
            if len(fact.shape) == 2 and ".layers." in name
        )  # fmt: skip
        inside = 3 * shape.middle + 4 * shape.hidden + 3 * (shape.queries + 2 * shape.hidden)
        parts = [part for part in needed.parts if part.name in ("weights", f"{model.runtime.name} itself")]
        parts += [
            Part("adapters and their states", rank * sides * bytes_, "modelled"),
            Part("kept activations", 2 * tokens * shape.hidden * len(shape.blocks), "modelled"),
            Part("one block, both ways", 4 * tokens * inside, "modelled"),
            Part("logits and their gradient", 8 * tokens * shape.vocabulary, "modelled"),
        ]
        return Memory(place, tuple(parts))

    def _against(
        self, recipe: str, made: Sized, needed: Memory, there: int, split: Split | None, lost: Loss
    ) -> tuple[str, ...]:
        asked = self.asked
        found = []
        lacking = rules.lacks(recipe, asked.machine)
        if lacking is not None:
            found.append(lacking)
        floor, why = rules.least_bits(asked.job, self.bare.parameters)
        if lost.evidence == HERE and lost.kld > asked.job.kld:
            found.append(f"measured here, it loses {lost.kld:.2g} nats a token: more than {asked.job.kld:g}")
        elif lost.evidence != HERE and made.bits < floor:
            found.append(f"{made.bits:.1f} bits a weight: {why}")
        over = needed.bytes_ - there
        parted = split is not None and not split.whole and asked.machine.vram_bytes
        if over > 0 and split is None:
            found.append(f"{over / 1e9:.1f} GB too much for {needed.place} with headroom")
        if split is not None and middle(split) < asked.job.rate:
            where = ", parts of it beside the card" if parted else ""
            found.append(
                f"about {middle(split):.1f} tokens/s{where}: {asked.job.name} wants {asked.job.rate:g}"
            )
        return tuple(found)

    def most_context(self, recipe: str, kv: CacheType) -> int:
        """The longest context with which this would fit, headroom left."""
        place, there = self.asked.machine.places[0]
        asked = self.wanted(kv)
        return most_context(self.model(recipe), asked, place, there - rules.headroom(place))

    def options(self, recipes: Sequence[str], last: bool) -> list[Option]:
        """Every recipe that can be made with every type of cache, in the order of the rules."""
        caches, able = self.caches(), self.able(recipes)
        pairs = [(recipe, kv) for kv in caches for recipe in able]
        if self.dominated():
            pairs = [(recipe, kv) for recipe in able for kv in caches]
        return [self.option(recipe, kv, last) for recipe, kv in pairs]

    def able(self, recipes: Sequence[str]) -> list[str]:
        """Those of the recipes that can be made of this model."""
        found = []
        for recipe in recipes:
            try:
                self.sized(recipe)
            except Refused:
                continue
            found.append(recipe)
        return found

    def dominated(self) -> bool:
        """Whether keys and values take so much beside the weights that they are quantized before them."""
        recipes = self.able(self.ladder)
        if not recipes:
            return False
        wanted = self.wanted(self.caches()[0])
        asked = (wanted.context, wanted.parallel, wanted.types, wanted.full_windows)
        runtime, blocks = self.asked.runtime, self.shape.blocks
        cache = sum(runtime.cache_bytes(b, *asked, (i, len(blocks))) for i, b in enumerate(blocks))
        least = min(self.sized(recipe).weights.bytes_ for recipe in recipes)
        return cache >= rules.cache_share() * least
