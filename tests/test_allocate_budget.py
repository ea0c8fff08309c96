"""Types under a budget: the best there is at every edge, monotone everywhere."""

from __future__ import annotations

import itertools
import random

import pytest

from bitmill.allocation.budget import Budget, Offer, hull, spend
from bitmill.core.axes import Weight


def market(seed: int, tensors: int, kinds: int) -> dict[str, list[Offer]]:
    """Offers whose damage falls with bytes on the whole, not always."""
    draw = random.Random(seed)
    return {
        f"t{t}": [
            Offer(f"k{k}", draw.randrange(1, 60), draw.random() * 4.0 ** -draw.uniform(0, 4))
            for k in range(kinds)
        ]
        for t in range(tensors)
    }


def best(offers: dict[str, list[Offer]], limit: int) -> float:
    """Least damage of every choice in ``limit`` bytes."""
    return min(
        (
            sum(o.damage for o in chosen)
            for chosen in itertools.product(*offers.values())
            if sum(o.bytes_ for o in chosen) <= limit
        ),
        default=float("inf"),
    )


@pytest.mark.parametrize("seed", range(20))
def test_more_bytes_never_predict_worse(seed: int) -> None:
    offers = market(seed, tensors=12, kinds=6)
    made = [spend(offers, limit) for limit in range(800)]
    least = sum(hull(of)[0].bytes_ for of in offers.values())
    assert all((b is None) == (limit < least) for limit, b in enumerate(made))
    bought = [(limit, b) for limit, b in enumerate(made) if b is not None]
    assert all(b.bytes_ <= limit for limit, b in bought)
    damages = [b.damage for _, b in bought]
    assert all(after <= before for before, after in itertools.pairwise(damages))
    assert damages[-1] == pytest.approx(sum(min(o.damage for o in of) for of in offers.values()))


@pytest.mark.parametrize("seed", range(12))
def test_against_every_choice(seed: int) -> None:
    offers = market(seed, tensors=4, kinds=5)
    hulls = {name: hull(of) for name, of in offers.items()}
    edges = [
        ((a.damage - b.damage) / (b.bytes_ - a.bytes_), b.bytes_ - a.bytes_, a.damage - b.damage)
        for h in hulls.values()
        for a, b in itertools.pairwise(h)
    ]
    limit = sum(h[0].bytes_ for h in hulls.values())
    for _, price, gain in sorted(edges, reverse=True):
        short = spend(offers, limit + price - 1)
        assert short is not None
        exact = best(offers, limit + price - 1)
        assert exact <= short.damage + 1e-12 and short.damage <= exact + gain + 1e-12  # one edge at most
        limit += price
        whole = spend(offers, limit)
        assert whole is not None and whole.bytes_ == limit
        assert whole.damage == pytest.approx(best(offers, limit), abs=1e-12)


def test_hull_leaves_out_what_no_price_would_choose() -> None:
    a, b, c, d = Offer("a", 10, 1.0), Offer("b", 20, 0.9), Offer("c", 30, 0.1), Offer("d", 40, 0.2)
    assert hull([d, b, c, a]) == (a, c)
    assert hull([a, Offer("a2", 10, 0.5)]) == (Offer("a2", 10, 0.5),)


def test_as_an_allocation() -> None:
    made = spend({"x": [Offer("q4_k", 10, 0.25)]}, 10)
    assert made == Budget((("x", Offer("q4_k", 10, 0.25)),))
    choice = made.choose(Weight("x", "q", 0, (256, 256), 1, {}))
    assert choice is not None and (choice.grid, choice.why) == ("q4_k", "budget: 0.25 nats")
    assert made.choose(Weight("y", "q", 0, (256, 256), 1, {})) is None
