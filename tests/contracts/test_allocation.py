"""Laws of an allocation, over every member that is found: pure, total, and in grids that exist."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bitmill.allocation.budget import Budget, Offer
from bitmill.allocation.mixture import Mixture
from bitmill.allocation.uniform import Uniform
from bitmill.core import registry
from bitmill.core.axes import Allocation, Weight

LAYERS = 30
BOUGHT = tuple(
    (f"model.layers.{layer}.{role}.weight", Offer("q4_0" if layer % 2 else "iq4_nl", 18, 0.01))
    for layer in range(LAYERS)
    for role in ("q", "v", "o", "gate", "down")
)
MADE = {
    "budget": [Budget(BOUGHT)],
    "uniform": [
        Uniform("int4-g64-asym"),
        Uniform("q4_0", keep=("down",)),
        Uniform("int4-g64-asym", tensors=((r"layers\.3\.", "int8-channel-sym"), ("lm_head", "q8_0"))),
    ],
    "mixture": [Mixture(name) for name in Mixture.names()],
}
SHAPES = {"q": (576, 576), "v": (192, 576), "o": (576, 576), "gate": (1536, 576), "down": (576, 1536)}
TRAITS = {"heads": 9, "kv_heads": 3, "tied": 1, "experts": 0, "imatrix": 1}

every = pytest.mark.parametrize("allocation", [a for made in MADE.values() for a in made], ids=str)


def _weights() -> Iterator[Weight]:
    for layer in range(LAYERS):
        for role, shape in SHAPES.items():
            yield Weight(f"model.layers.{layer}.{role}.weight", role, layer, shape, LAYERS, TRAITS)
        yield Weight(f"model.layers.{layer}.norm.weight", "norm", layer, (576,), LAYERS, TRAITS)
    yield Weight("model.embed_tokens.weight", "embed", None, (49152, 576), LAYERS, TRAITS)
    yield Weight("lm_head.weight", "head", None, (49152, 576), LAYERS, TRAITS)
    yield Weight("model.norm.weight", "final_norm", None, (576,), LAYERS, TRAITS)


def test_every_member_is_tested():
    assert set(MADE) == set(registry.names("allocation"))
    assert all(type(a) is registry.member("allocation", name) for name, made in MADE.items() for a in made)


@every
def test_every_choice_is_a_grid_that_takes_the_shape(allocation: Allocation):
    for weight in _weights():
        choice = allocation.choose(weight)
        if choice is not None:
            grid = registry.parse_grid(choice.grid)
            assert str(grid) == choice.grid
            assert grid.refuses(weight.shape) is None
            assert choice.why
            assert choice.fallback != choice.grid


@every
def test_a_choice_depends_on_nothing_but_the_tensor(allocation: Allocation):
    weights = list(_weights())
    forth = {w.name: allocation.choose(w) for w in weights}
    back = {w.name: allocation.choose(w) for w in reversed(weights)}
    assert forth == back
    if isinstance(allocation, Budget) or (isinstance(allocation, Uniform) and allocation.tensors):
        return  # they go by names
    renamed = [Weight("another", w.role, w.layer, w.shape, w.layers, w.traits) for w in weights]
    assert [allocation.choose(w) for w in renamed] == list(forth.values())


@every
def test_norms_stay_dense_and_linears_do_not(allocation: Allocation):
    for weight in _weights():
        if weight.role in ("norm", "final_norm"):
            assert allocation.choose(weight) is None
        if weight.role in ("q", "v", "o", "gate"):
            assert allocation.choose(weight) is not None


def test_uniform_keeps_what_it_is_told_to():
    down = next(w for w in _weights() if w.role == "down")
    assert Uniform("int4-g64-asym").choose(down) is not None
    assert Uniform("int4-g64-asym", keep=("down",)).choose(down) is None
