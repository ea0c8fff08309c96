"""The next token from its logits: the likeliest, or one drawn from what temperature and cuts leave.

In the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from bitmill.core.errors import Refused, Unsolvable


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; as it stands, the likeliest.

    Attributes:
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_k: how many of the likeliest are left; 0 is all.
        top_p: the likeliest whose chances reach this together are left; 1 is all.
        min_p: those with at least this share of the likeliest's chance are left; 0 is all.
        repeat: what the logits of tokens that the answer has already are divided by (multiplied, below zero).
        seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        right = {
            "temperature": isfinite(self.temperature) and self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repeat": isfinite(self.repeat) and self.repeat > 0,
            "seed": 0 <= self.seed < 1 << 63,
        }
        for name in (name for name, good in right.items() if not good):
            raise Refused(f"{name} is {vars(self)[name]}", fix=_RANGES[name])

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, and nothing drawn."""
        return self.temperature == 0

    def __str__(self) -> str:
        said = [] if self.repeat == 1 else [f"repeat penalty {self.repeat:g}"]
        if self.greedy:
            return ", ".join(["greedy", *said])
        cuts = {"top-k": self.top_k, "top-p": self.top_p, "min-p": self.min_p}
        off = {"top-k": 0, "top-p": 1, "min-p": 0}
        said = [*(f"{name} {value:g}" for name, value in cuts.items() if value != off[name]), *said]
        return ", ".join([f"temperature {self.temperature:g}", *said, f"seed {self.seed}"])


_RANGES = {
    "temperature": "0 (the likeliest token) or more; 0.7 is usual",
    "top_k": "0 (all tokens) or more; 40 is usual",
    "top_p": "more than 0, at most 1 (all tokens); 0.95 is usual",
    "min_p": "0 (all tokens) to 1; 0.05 is usual",
    "repeat": "more than 0; 1 is none, 1.1 is usual",
    "seed": "a whole number from 0",
}
_OFF: Mapping[str, float] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat": 1.0}
_AUTHORS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat": "repetition_penalty",
}
_CUTS = ("top_k", "top_p", "min_p")


def sampling_of(authors: Mapping[str, Any], seed: int = 0, **asked: float | None) -> Sampling:
    """What is asked for, and for the rest what the model's authors say in ``generation_config.json``.

    Where they say ``do_sample``, their numbers count; else the likeliest token is taken. Asked for a cut and
    no temperature, it is theirs or 1.

    Args:
        authors: ``generation_config.json``.
        asked: any of ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repeat``; None is not asked.

    Raises:
        Refused: a number is out of its range, or a cut is asked for where nothing is drawn.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    cuts = [name for name in _CUTS if name in given]
    if given.get("temperature") == 0 and cuts:
        raise Refused(
            f"temperature 0 takes the likeliest token, and {cuts[0].replace('_', '-')} has no say in it",
            fix="leave one of them out",
        )
    theirs = _theirs(authors)
    if given.get("temperature") == 0:
        theirs = {name: value for name, value in theirs.items() if name == "repeat"}
    elif cuts or "temperature" in given:
        theirs = {"temperature": 1.0, **theirs}
    found: dict[str, Any] = {**_OFF, **theirs, **given}
    return Sampling(**{**found, "top_k": int(found["top_k"])}, seed=seed)


def _theirs(authors: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of the authors that make sense; those that are no numbers are as if not said."""
    said = {ours: authors.get(name) for ours, name in _AUTHORS.items()}
    numbers = {
        name: value
        for name, value in said.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    if authors.get("do_sample") is not True:
        return {name: value for name, value in numbers.items() if name == "repeat"}
    return {"temperature": 1.0, **numbers}


def to_json(sampling: Sampling) -> dict[str, Any]:
    """As plain values."""
    return asdict(sampling)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Sequence[int] = ()) -> int:
    """One token.

    Args:
        logits: one a token of the vocabulary.
        seen: the tokens that a repetition penalty is about.

    Raises:
        Unsolvable: the logits are not numbers.
    """
    logits = logits.float().cpu()
    if not bool(torch.isfinite(logits.max())):
        raise Unsolvable(
            "the model's logits are not finite",
            fix="a wider type for computing (--dtype f32); if it stays so, the file is damaged",
        )
    if sampling.repeat != 1 and seen:
        logits = _damped(logits, sampling.repeat, torch.tensor(sorted(set(seen))))
    if sampling.greedy:
        return int(logits.argmax())
    tokens, chances = left(logits, sampling)
    summed = chances.double().cumsum(0)
    point = torch.rand(1, generator=generator, dtype=torch.float64) * summed[-1]
    return int(tokens[int(torch.searchsorted(summed, point, right=True).clamp_max(len(tokens) - 1))])


def left(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens that may be drawn, the likeliest first, and their chances, which need not add up to 1."""
    count = min(sampling.top_k or len(logits), len(logits))
    ordered, tokens = torch.topk(logits / sampling.temperature, count)
    chances = torch.softmax(ordered, 0)
    kept = chances >= sampling.min_p * chances[0]
    if sampling.top_p < 1:  # a sum of all may round to 1 before the last of them
        kept &= chances.double().cumsum(0) - chances < sampling.top_p
    return tokens[kept], chances[kept]


def _damped(logits: Tensor, by: float, seen: Tensor) -> Tensor:
    found = logits[seen]
    return logits.index_copy(0, seen, torch.where(found > 0, found / by, found * by))
