"""What quantization did to the next-token distribution, position by position, and what that amounts to.

KL(reference ‖ quantized) over the full vocabulary, as in llama.cpp's perplexity tool (Kullback & Leibler
1951), with intervals from a bootstrap over whole windows (Efron 1979; Künsch 1989), because errors cluster
within a text. The interval is Hesterberg's expanded percentile ("What Teachers Should Know About the
Bootstrap", 2015), which does not pretend that a dozen windows are many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitmill.numerics.student import student

CHUNK_BYTES = 64 << 20  # of float32 logits of one model at a time; three such arrays are alive at once
DRAWS = 2000
WORST = 12  # positions whose first choices are kept
TOP = 5  # choices of each model there
CONFIDENCE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Positions:
    """One entry a scored position, in reading order.

    Attributes:
        kld: KL(reference ‖ quantized), nats.
        nll, nll_reference: −ln p of the true token.
        top, top_reference: most probable token of each model.
        confidence: probability of the reference's most probable token.
        target: the true token.
        window: which window the position belongs to.
        place: index of the true token inside its window.
        finite: whether every logit of both models was a number; the other fields are 0 where not.
    """

    kld: Floats
    nll: Floats
    nll_reference: Floats
    top: Ids
    top_reference: Ids
    confidence: Floats
    target: Ids
    window: Ids
    place: Ids
    finite: Flags

    @property
    def right(self) -> Flags:
        """Whether the quantized model's first choice is the true token."""
        return self.top == self.target

    @property
    def right_reference(self) -> Flags:
        """Whether the reference's first choice is the true token."""
        return self.top_reference == self.target

    @property
    def dp(self) -> Floats:
        """Change of the true token's probability."""
        return np.exp(-self.nll) - np.exp(-self.nll_reference)

    def kept(self, mask: Flags) -> Positions:
        """The positions where ``mask`` holds."""
        return Positions(**{name: values[mask] for name, values in vars(self).items()})

    @classmethod
    def joined(cls, parts: Sequence[Positions]) -> Positions:
        """Parts after one another; window numbers stay as they are."""
        return cls(**{name: np.concatenate([vars(p)[name] for p in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class Choices:
    """What both models would rather say at one position: tokens and their probabilities, best first."""

    kld: float
    window: int
    place: int
    reference: tuple[tuple[int, float], ...]
    quantized: tuple[tuple[int, float], ...]


@dataclass
class Scores:
    """Accumulator: logits go in by the piece, a few bytes a position stay.

    Attributes:
        parts: what was scored.
        worst: choices at the :data:`WORST` positions with the largest divergence, the largest first.
    """

    parts: list[Positions] = field(default_factory=list)
    worst: list[Choices] = field(default_factory=list)

    def add(
        self, reference: Tensor, quantized: Tensor, target: Tensor, window: Tensor, place: Tensor
    ) -> None:
        """Score ``m`` positions.

        Args:
            reference, quantized: float32 logits, ``m V``.
            target: the true tokens, ``m``.
            window, place: where each true token stands, ``m``.
        """
        step = rows_at_once(reference.shape[-1])
        for a in range(0, reference.shape[0], step):
            rows = slice(a, a + step)
            part = _scored(reference[rows], quantized[rows], target[rows], window[rows], place[rows])
            self.parts.append(part)
            self._keep_worst(reference[rows], quantized[rows], part)

    def positions(self) -> Positions:
        """Everything scored so far."""
        return Positions.joined(self.parts)

    def _keep_worst(self, reference: Tensor, quantized: Tensor, part: Positions) -> None:
        least = self.worst[-1].kld if len(self.worst) == WORST else -1.0
        for i in np.argsort(-part.kld, kind="stable")[:WORST]:
            if part.finite[i] and part.kld[i] > least:
                where = float(part.kld[i]), int(part.window[i]), int(part.place[i])
                self.worst.append(Choices(*where, _first(reference[i]), _first(quantized[i])))
        self.worst.sort(key=lambda choices: -choices.kld)
        del self.worst[WORST:]


def _first(logits: Tensor) -> tuple[tuple[int, float], ...]:
    """The most probable tokens of one position."""
    found = torch.softmax(logits.float(), -1).topk(min(TOP, logits.shape[-1]))
    return tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def rows_at_once(vocabulary: int) -> int:
    """How many positions' logits fit in :data:`CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def _scored(reference: Tensor, quantized: Tensor, target: Tensor, window: Tensor, place: Tensor) -> Positions:
    """Logits of one piece to numbers a position: float32 terms, float64 sums."""
    finite = torch.isfinite(reference).all(-1) & torch.isfinite(quantized).all(-1)
    a = torch.where(finite[:, None], reference, 0.0)
    b = torch.where(finite[:, None], quantized, 0.0)
    target = target.to(a.device)
    top_a, top_b = a.max(-1), b.max(-1)
    at_a, at_b = (x.gather(1, target[:, None])[:, 0].double() for x in (a, b))
    p = torch.exp(a - top_a.values[:, None])
    mass = p.sum(-1, dtype=torch.float64)
    log_a = top_a.values.double() + mass.log()
    log_b = top_b.values.double() + torch.exp(b - top_b.values[:, None]).sum(-1, dtype=torch.float64).log()
    kld = _divergence(p, mass, a.sub_(b), log_b - log_a)

    def floats(x: Tensor) -> Floats:
        return torch.where(finite, x.double(), 0.0).cpu().numpy()

    def ids(x: Tensor) -> Ids:
        return x.cpu().numpy().astype(np.int64)

    return Positions(
        kld=floats(kld),
        nll=floats(log_b - at_b),
        nll_reference=floats(log_a - at_a),
        top=ids(top_b.indices),
        top_reference=ids(top_a.indices),
        confidence=floats(1.0 / mass),
        target=ids(target),
        window=ids(window),
        place=ids(place),
        finite=finite.cpu().numpy(),
    )


def _divergence(p: Tensor, mass: Tensor, d: Tensor, log_ratio: Tensor) -> Tensor:
    """KL(softmax a ‖ softmax b) of ``d = a − b``, with ``p`` proportional to softmax a; ``d`` is consumed.

    KL = E d + ln E e⁻ᵈ under softmax a. With d centred, d' = d − E d, that is ln(1 + E[e^(−d') − 1 + d']),
    whose terms are all positive: nothing cancels, and a divergence of 1e-9 keeps its digits. Where logits
    differ by more than e⁸ the sum may overflow, and the plain form E d + ``log_ratio`` is exact enough.
    """
    mean = (p * d).sum(-1, dtype=torch.float64) / mass
    d.sub_(mean[:, None].float())
    far = d.abs().amax(-1) > 8.0
    d.clamp_(-8.0, 8.0)
    excess = torch.expm1(-d).add_(d).mul_(p).sum(-1, dtype=torch.float64) / mass
    return torch.where(far, mean + log_ratio, torch.log1p(excess)).clamp_min(0.0)


@dataclass(frozen=True)
class Distribution:
    """KL divergence over positions: mean with its 95 % interval, and quantiles (linear interpolation)."""

    mean: float
    ci95: tuple[float, float] | None
    se: float | None
    median: float
    p90: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True)
class Bucket:
    """Mean KLD where the reference's confidence is at least ``low`` and below ``high``."""

    low: float
    high: float
    tokens: int
    kld: float | None


@dataclass(frozen=True)
class Summary:
    """The numbers of one set of positions. ``_se`` is a standard error; None where one window cannot tell.

    Attributes:
        tokens: positions scored and finite; ``nonfinite`` is the share of the others.
        windows: blocks of the bootstrap.
        same_top: share of positions where both models prefer the same token (± binomial).
        right_to_wrong, wrong_to_right: positions whose first choice stopped, or started, being the true
            token.
        rms_dp, mean_dp: root mean square and mean change of the true token's probability.
        correlation: of the two models' −ln p of the true token.
    """

    tokens: int
    windows: int
    nonfinite: float
    kld: Distribution
    ppl: float
    ppl_se: float | None
    ppl_reference: float
    ppl_reference_se: float | None
    ln_ppl_ratio: float
    ln_ppl_ratio_se: float | None
    correlation: float | None
    same_top: float
    same_top_se: float
    right_to_wrong: int
    wrong_to_right: int
    rms_dp: float
    rms_dp_se: float | None
    mean_dp: float
    confidence: tuple[Bucket, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``kld.ci95`` is a pair."""
        from_kld = {**vars(self.kld), "ci95": None if self.kld.ci95 is None else list(self.kld.ci95)}
        rest = {k: v for k, v in vars(self).items() if k not in ("kld", "confidence")}
        return {"kld": from_kld, **rest, "confidence": [dict(vars(b)) for b in self.confidence]}


class Bootstrap:
    """Means over positions under resampling of whole windows, within each stratum.

    Args:
        window: window number of each position.
        stratum: kind of text of each window number, so that a mixture stays the mixture it is.
        seed, draws: of the resampling.
    """

    def __init__(self, window: Ids, stratum: Ids | None = None, seed: int = 0, draws: int = DRAWS) -> None:
        self._numbers, self._index = np.unique(window, return_inverse=True)
        self.blocks = len(self._numbers)
        kinds = np.zeros(self.blocks, np.int64) if stratum is None else stratum[self._numbers]
        rng = np.random.default_rng(seed)
        self._draws = np.zeros((draws, self.blocks))
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            share = np.full(len(members), 1 / len(members))
            self._draws[:, members] = rng.multinomial(len(members), share, size=draws)
        self._freedom = self.blocks - len(np.unique(kinds))
        self._counts = np.bincount(self._index, minlength=self.blocks)

    @property
    def possible(self) -> bool:
        """Whether there is anything to resample."""
        return self._freedom > 0

    def means(self, values: Floats) -> Floats:
        """The mean of ``values`` in each resample."""
        sums = np.bincount(self._index, weights=values, minlength=self.blocks)
        return (self._draws @ sums) / (self._draws @ self._counts)

    def se(self, statistic: Floats) -> float | None:
        """Standard error of a statistic from its resamples; widened for few windows."""
        return float(statistic.std() * self._widening) if self.possible else None

    def interval(self, statistic: Floats) -> tuple[float, float] | None:
        """The expanded 95 % percentile interval of a statistic from its resamples."""
        if not self.possible:
            return None
        tail = NormalDist().cdf(-self._widening * student(self._freedom))
        low, high = np.quantile(statistic, [tail, 1 - tail])
        return float(low), float(high)

    @property
    def _widening(self) -> float:
        return math.sqrt(self.blocks / self._freedom)


def summarize(positions: Positions, stratum: Ids | None = None, seed: int = 0) -> Summary:
    """All numbers of ``positions``; non-finite ones are left out and counted.

    Args:
        stratum: kind of each window number when several kinds are pooled.

    Raises:
        ValueError: no position is finite; the caller says what that means.
    """
    total = len(positions.kld)
    p = positions.kept(positions.finite)
    count = len(p.kld)
    if not count:
        raise ValueError(f"none of {total} positions has finite logits")
    boot = Bootstrap(p.window, stratum, seed)
    kld, nll, nll_reference = (boot.means(v) for v in (p.kld, p.nll, p.nll_reference))
    squares = boot.means(p.dp**2)
    same = float((p.top == p.top_reference).mean())
    ppl, ppl_reference = math.exp(min(p.nll.mean(), 700.0)), math.exp(min(p.nll_reference.mean(), 700.0))
    median, p90, p99, p999 = (float(q) for q in np.quantile(p.kld, [0.5, 0.9, 0.99, 0.999]))
    return Summary(
        tokens=count,
        windows=boot.blocks,
        nonfinite=1 - count / total,
        kld=Distribution(
            mean=float(p.kld.mean()),
            ci95=boot.interval(kld),
            se=boot.se(kld),
            median=median,
            p90=p90,
            p99=p99,
            p999=p999,
            max=float(p.kld.max()),
        ),
        ppl=ppl,
        ppl_se=_scaled(boot.se(nll), ppl),
        ppl_reference=ppl_reference,
        ppl_reference_se=_scaled(boot.se(nll_reference), ppl_reference),
        ln_ppl_ratio=float((p.nll - p.nll_reference).mean()),
        ln_ppl_ratio_se=boot.se(nll - nll_reference),
        correlation=_correlation(p.nll, p.nll_reference),
        same_top=same,
        same_top_se=math.sqrt(same * (1 - same) / count),
        right_to_wrong=int((p.right_reference & ~p.right).sum()),
        wrong_to_right=int((~p.right_reference & p.right).sum()),
        rms_dp=math.sqrt(float((p.dp**2).mean())),
        rms_dp_se=boot.se(np.sqrt(squares)),
        mean_dp=float(p.dp.mean()),
        confidence=_buckets(p),
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _correlation(a: Floats, b: Floats) -> float | None:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _buckets(p: Positions) -> tuple[Bucket, ...]:
    """KLD by the reference's confidence: the mean is dominated by positions where it is undecided."""
    found = []
    for low, high in pairwise(CONFIDENCE_EDGES):
        inside = (p.confidence >= low) & ((p.confidence < high) | (high == CONFIDENCE_EDGES[-1]))
        count = int(inside.sum())
        found.append(Bucket(low, high, count, float(p.kld[inside].mean()) if count else None))
    return tuple(found)
