"""What caches that rotate lose, beside what theory says they lose.

python benchmarks/cache_theory.py [--vectors 100000] [--seeds 200] [--pairs 1000000] [--draws 1000]
    [--orders 2048] [--tokens 1024]

OPENBLAS_NUM_THREADS=1 before it keeps the drawing of rotations from waiting for other programs.

Small: --vectors 4000 --seeds 8 --pairs 20000 --draws 40 --orders 128 --tokens 64 --evidence FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from math import pi, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from cache_pages import arguments, opened, table, text_ids, vectors, write_page
from torch import Tensor

from bitmill.numerics.cache_sphere import Signs, Sphere
from bitmill.numerics.hadamard import factors, matrix
from bitmill.numerics.lloyd_max import bound, sphere_distortion, sphere_levels

BITS = (1, 2, 3, 4, 5)
HEADS = (64, 128)
NORMAL = (0.3634, 0.1175, 0.03454, 0.00950, 0.00250)
NOTES = """TurboQuant's levels are solved for the exact density of a coordinate of a random direction at each
head size; the last lines of the first table are their limit, normal numbers. *Levels* are compared with a
second solution (Lloyd's steps, integrals by Gauss and Legendre). *Loss* is the squared error as a share of
the vector's square, over all vectors of a kind and all seeds of the rotation. Adversarial vectors are single
channels, equal channels, equal channels of random signs, two channels of one size, and one channel beside
noise, the same behind every rotation. Real ones are keys of all layers of the model on a text, others for
every seed. The theorem is about the rotation's randomness: vectors that share a rotation do not err
independently, so the interval is two standard errors over the seeds, and few seeds say little. *Worst* is the
one vector with the largest mean over all rotations, as a multiple of the prediction (one vector's mean is
noisier than that of all; the bound is what none may exceed). Products are tested in the same way: each draw
has a rotation and a sketch of its own, *t* is that of the draws' means and not of single pairs, and it is
held against what the largest of as many tests exceeds by chance in one of twenty runs."""
CHANCE = 0.05
SURE = 4


def main() -> None:
    """All of it."""
    parser = arguments(__doc__)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=200, help="rotations")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--draws", type=int, default=1000, help="of a rotation and a sketch, for all pairs")
    parser.add_argument("--orders", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=1024, help="of real text; 0 leaves real keys out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    levels = [level_row(head, bits) for head in HEADS for bits in BITS]
    kinds = [kind_rows(name, head, make, options) for head in HEADS for name, make in made(options).items()]
    if options.tokens:
        kinds.append(real_rows(options))
    products = [row for head in HEADS for row in product_rows(head, options)]
    sketches = [sketch_row(rows, options) for rows in (64, 128, 256)]
    orders = hadamards(options.orders)
    found = {
        "levels": levels,
        "loss": [row for rows in kinds for row in rows],
        "products": products,
        "sketches": sketches,
        "hadamard": orders,
    }
    found["verdict"] = verdict(found)
    print(found["verdict"], flush=True)
    parts = [NOTES, verdict_text(found["verdict"]), *pages(found)]
    write_page(options, "cache_theory", "Caches and theory", parts, found)


def level_row(head: int, bits: int) -> dict[str, Any]:
    """Levels beside another solution of the same equations."""
    ours = sphere_levels(head, bits)
    start = np.linspace(-2.5, 2.5, 2**bits + 2)[1:-1] / sqrt(head)
    apart = float(np.abs(ours - by_quadrature(head, start)).max())
    row = {"head": head, "bits": bits, "apart": apart, "loss": sphere_distortion(head, bits)}
    print(row, flush=True)
    return row


def by_quadrature(head: int, levels: np.ndarray, steps: int = 20_000) -> np.ndarray:
    """Lloyd's steps, each integral by 60 nodes, until nothing moves."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    for _ in range(steps):
        edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
        t = (edges[1:] + edges[:-1])[:, None] / 2 + np.diff(edges)[:, None] / 2 * nodes
        f = (1 - t * t) ** ((head - 3) / 2) * weights
        moved = (f * t).sum(1) / f.sum(1)
        if np.abs(moved - levels).max() < 1e-15:
            return moved
        levels = moved
    return levels


Maker = Callable[[int, int], Tensor]


def made(options: argparse.Namespace) -> dict[str, Maker]:
    """Kinds of vectors: ``count head`` of a head's size and a seed."""

    def random(head: int, seed: int) -> Tensor:
        count = max(options.vectors // options.seeds, 1)
        return torch.randn(count, head, generator=torch.Generator().manual_seed(seed))

    return {"random": random, "adversarial": lambda head, seed: adversarial(head)}


def adversarial(head: int) -> Tensor:
    """Vectors that plain rounding dislikes, always the same."""
    generator = torch.Generator().manual_seed(head)
    signs = torch.randint(0, 2, (head, head), generator=generator).float() * 2 - 1
    single, pairs = torch.eye(head), torch.eye(head) + torch.eye(head).roll(1, 0)
    noisy = torch.randn(head, head, generator=generator) + 30 * single
    return torch.cat((single, torch.ones(1, head), signs, pairs, noisy))


def kind_rows(name: str, head: int, make: Maker, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The loss of one kind of vectors at every width."""
    found = []
    for bits in BITS:
        losses = [losses_of(make(head, seed), Sphere(head, bits, seed)) for seed in range(options.seeds)]
        found.append(row_of(name, head, bits, losses))
    return found


def real_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The loss of a model's own keys at every width."""
    model, tokenizer = opened(options)
    keys, _ = vectors(model, text_ids(tokenizer, options.tokens))
    x = torch.cat([layer.flatten(0, 2) for layer in keys])
    head = x.shape[-1]
    count = max(options.vectors // options.seeds, 1)

    def some(head: int, seed: int) -> Tensor:
        return x[torch.randint(0, len(x), (count,), generator=torch.Generator().manual_seed(seed))]

    return kind_rows("keys of the model", head, some, options)


def losses_of(x: Tensor, sphere: Sphere) -> Tensor:
    """Squared error of each vector as a share of its square."""
    back = sphere.unpack(sphere.pack(x)) @ sphere.basis
    return ((back - x).square().sum(-1) / x.square().sum(-1)).double()


def row_of(name: str, head: int, bits: int, losses: list[Tensor]) -> dict[str, Any]:
    """One width of one kind: ``losses`` of the vectors behind each rotation."""
    predicted, means = sphere_distortion(head, bits), torch.stack([part.mean() for part in losses])
    mean = float(means.mean())
    error = float(means.std() / sqrt(len(means))) if len(means) > 1 else float("nan")
    row = {"kind": name, "head": head, "bits": bits, "loss": mean, "standard_error": error}
    row |= {"predicted": predicted, "ratio": mean / predicted, "bound": bound(bits)}
    if name == "adversarial":
        each = torch.stack(losses)
        least = each.mean(0) - SURE * each.std(0) / sqrt(len(each))
        row |= {"worst": float(each.mean(0).max()) / predicted, "above": int((least > bound(bits)).sum())}
    print(row, flush=True)
    return row


def pairs_of(head: int, options: argparse.Namespace) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Unit vectors in pairs, and a new seed for every share of them."""
    generator = torch.Generator().manual_seed(head)
    draws = max(options.draws, 2)
    for seed in range(draws):
        x, y = torch.randn(2, max(options.pairs // draws, 1), head, generator=generator)
        yield seed, x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)


def tested(errors: list[Tensor]) -> tuple[float, float, float]:
    """Mean, its t over the seeds, and mean square."""
    means = torch.stack([e.double().mean() for e in errors])
    t = float(means.mean() / (means.std() / sqrt(len(means))))
    return float(means.mean()), t, float(torch.cat(errors).double().square().mean())


def product_rows(head: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Products of stored vectors with others: bias and variance, with a residual sketch and without. One draw
    serves every width."""
    found: dict[int, tuple[list[Any], ...]] = {bits: ([], [], [], []) for bits in BITS[:-1]}
    for seed, x, y in pairs_of(head, options):
        y = (0.5 * x + sqrt(0.75) * y) / (0.5 * x + sqrt(0.75) * y).norm(dim=-1, keepdim=True)
        exact = (x * y).sum(-1)
        for bits, (with_sketch, without, slopes, expected) in found.items():
            with_sketch.append(products(Sphere(head, bits, seed, residual=True), x, y) - exact)
            plain = products(Sphere(head, bits, seed), x, y)
            without.append(plain - exact)
            slopes.append(float((plain * exact).sum() / exact.square().sum()))
            expected.append(exact_variance(left(Sphere(head, bits - 1, seed), x), y, head))
    return [product_row(head, bits, *lists) for bits, lists in found.items()]


def product_row(
    head: int, bits: int, with_sketch: list[Tensor], without: list[Tensor], slopes: list[float],
    expected: list[float],
) -> dict[str, Any]:  # fmt: skip
    """One width: errors, slopes and expected variances of all draws."""
    mean, t, square = tested(with_sketch)
    plain_mean, plain_t, plain_square = tested(without)
    row = {
        "head": head,
        "bits": bits,
        "bias": mean,
        "t": t,
        "variance": square,
        "predicted": float(np.mean(expected)),
        "bound": sqrt(3) * pi**2 / head * 4.0**-bits,
        "plain_bias": plain_mean,
        "plain_t": plain_t,
        "plain_variance": plain_square,
        "plain_slope": float(np.mean(slopes)),
    }
    print(row, flush=True)
    return row


def products(sphere: Sphere, x: Tensor, y: Tensor) -> Tensor:
    """Of what is stored of each ``x`` with its ``y``."""
    return ((sphere.unpack(sphere.pack(x)) @ sphere.basis) * y).sum(-1)


def left(coarse: Sphere, x: Tensor) -> Tensor:
    """What the coarse bits leave to the sketch; all of it, where there are none."""
    return x - coarse.unpack(coarse.pack(x)) @ coarse.basis if coarse.bits else x


def exact_variance(x: Tensor, y: Tensor, rows: int) -> float:
    """Of products of a sketch of ``x`` with ``y``, over sketches of so many rows; the mean of all pairs."""
    both = x.square().sum(-1) * y.square().sum(-1)
    return float((pi / 2 * both - (x * y).sum(-1).square()).double().mean()) / rows


def sketch_row(rows: int, options: argparse.Namespace, head: int = 64) -> dict[str, Any]:
    """QJL's estimate of products: bias, and variance beside its exact value and the paper's bound."""
    errors, expected = [], []
    for seed, x, y in pairs_of(head, options):
        signs = Signs(rows, head, seed)
        dot = (x * y).sum(-1)
        errors.append((signs.unpack(signs.pack(x)) * (y @ signs.basis.mT)).sum(-1) - dot)
        expected.append(exact_variance(x, y, rows))
    mean, t, square = tested(errors)
    row = {"signs": rows, "bias": mean, "t": t, "variance": square}
    row |= {"predicted": float(np.mean(expected)), "bound": pi / 2 / rows}
    print(row, flush=True)
    return row


def hadamards(most: int) -> dict[str, Any]:
    """Every order up to ``most`` that is constructed: are its rows orthogonal?"""
    good, bad, none = [], [], []
    for order in range(1, most + 1):
        if factors(order) is None:
            if order < 3 or order % 4 == 0:
                none.append(order)
            continue
        signs = matrix(order).to(torch.float32)
        even = torch.equal(signs @ signs.T, order * torch.eye(order)) and bool((signs.abs() == 1).all())
        (good if even else bad).append(order)
    print(
        f"{len(good)} orders orthogonal, {len(bad)} not, {len(none)} multiples of 4 not constructed",
        flush=True,
    )
    return {"orthogonal": len(good), "not_orthogonal": bad, "largest": max(good), "not_constructed": none}


def verdict(found: dict[str, Any]) -> dict[str, Any]:
    """The furthest that anything is from what theory says."""
    tests = [*found["products"], *found["sketches"]]
    return {
        "levels_apart": max(row["apart"] for row in found["levels"]),
        "loss_off": max(abs(row["ratio"] - 1) for row in found["loss"]),
        "loss_error": max(2 * row["standard_error"] / row["predicted"] for row in found["loss"]),
        "over_bound": sum(row["loss"] > row["bound"] for row in found["loss"]),
        "vectors_over_bound": sum(row.get("above", 0) for row in found["loss"]),
        "largest_t": max(abs(row["t"]) for row in tests),
        "tests": len(tests),
        "chance_t": NormalDist().inv_cdf(1 - CHANCE / 2 / len(tests)),
        "variance_off": max(abs(row["variance"] / row["predicted"] - 1) for row in tests),
        "variance_over_bound": sum(row["variance"] > row["bound"] for row in tests),
        "not_orthogonal": len(found["hadamard"]["not_orthogonal"]),
    }


def verdict_text(v: dict[str, Any]) -> str:
    """The same as sentences."""
    lines = (
        f"levels: at most {v['levels_apart']:.1e} from the second solution",
        f"losses: at most {100 * v['loss_off']:.2f} % from the prediction (two standard errors of the worst "
        f"known: {100 * v['loss_error']:.2f} %); {v['over_bound']} rows above the bound, "
        f"{v['vectors_over_bound']} single vectors",
        f"products: the largest of {v['tests']} |t| is {v['largest_t']:.2f}, chance alone exceeds "
        f"{v['chance_t']:.2f} in one of twenty runs; variances at most {100 * v['variance_off']:.2f} % from "
        f"the prediction, {v['variance_over_bound']} above the bound",
        f"Hadamard matrices: {v['not_orthogonal']} not orthogonal",
    )
    return "\n".join(f"- {line}" for line in lines)


def pages(found: dict[str, Any]) -> Iterator[str]:
    """The tables."""
    rows = [
        [str(r["head"]), str(r["bits"]), f"{r['loss']:.6f}", f"{r['apart']:.1e}"] for r in found["levels"]
    ]
    rows += [["∞", str(bits), f"{value}", ""] for bits, value in zip(BITS, NORMAL, strict=True)]
    yield "## Levels\n\n" + table(["head", "bits", "loss predicted", "largest difference of a level"], rows)
    rows = [
        [
            r["kind"],
            str(r["head"]),
            str(r["bits"]),
            f"{r['loss']:.6f} ± {2 * r['standard_error']:.6f}",
            f"{r['predicted']:.6f}",
            f"{r['ratio']:.4f}",
            f"{r['bound']:.4f}",
            f"{r['worst']:.3f}" if "worst" in r else "",
            str(r["above"]) if "above" in r else "",
        ]
        for r in found["loss"]
    ]
    yield "## Loss\n\n" + table(
        ["vectors", "head", "bits", "loss", "predicted", "ratio", "bound", "worst"], rows
    )
    rows = [
        [
            str(r["head"]),
            str(r["bits"]),
            f"{r['bias']:.1e}",
            f"{r['t']:.2f}",
            f"{r['variance'] * r['head']:.4f}",
            f"{r['predicted'] * r['head']:.4f}",
            f"{r['bound'] * r['head']:.4f}",
            f"{r['plain_bias']:.1e}",
            f"{r['plain_slope']:.4f}",
            f"{r['plain_variance'] * r['head']:.4f}",
        ]
        for r in found["products"]
    ]
    columns = ["head", "bits", "bias", "t", "variance · head", "predicted · head", "bound · head"]
    columns += ["bias without sketch", "slope without", "mean square without · head"]
    yield "## Products of unit vectors whose product is about a half\n\n" + table(columns, rows)
    rows = [
        [
            str(r["signs"]),
            f"{r['bias']:.1e}",
            f"{r['t']:.2f}",
            f"{r['variance']:.6f}",
            f"{r['predicted']:.6f}",
            f"{r['bound']:.6f}",
        ]
        for r in found["sketches"]
    ]
    yield "## Sketches of signs (QJL), head of 64\n\n" + table(
        ["signs", "bias", "t", "variance", "predicted", "bound"], rows
    )
    h = found["hadamard"]
    yield (
        f"## Hadamard matrices\n\n{h['orthogonal']} orders up to {h['largest']:,} are constructed and their "
        f"rows are orthogonal; {len(h['not_orthogonal'])} are not. Multiples of four that are not "
        f"constructed: {len(h['not_constructed'])}."
    )


if __name__ == "__main__":
    main()
