"""Student's t: how far a mean of few may be off (Student, "The Probable Error of a Mean", 1908)."""

from __future__ import annotations

from statistics import NormalDist


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: the Cornish–Fisher expansion, a table where that is poor."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    if freedom in exact:
        return exact[freedom]
    z = NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2
