"""Drawing the next token: the same choice as transformers' own processors, and the seed's alone."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bitmill.core.errors import Refused, Unsolvable
from bitmill.run.draw import Sampling, draw, left, sampling_of

VOCABULARY = 300


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=17),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=0.9, min_p=0.08),
        Sampling(temperature=1.7, top_k=60, top_p=0.9, min_p=0.02),
        Sampling(temperature=0.2, top_k=1),
        Sampling(temperature=1.0, top_p=1e-6),
    ],
)
def test_what_is_left_is_what_transformers_leaves(sampling: Sampling, seed: int) -> None:
    steps = [TemperatureLogitsWarper(sampling.temperature)]
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    wanted = torch.softmax(LogitsProcessorList(steps)(torch.zeros(1, 1).long(), logits(seed)[None]), -1)[0]
    tokens, chances = left(logits(seed), sampling)
    found = torch.zeros(VOCABULARY).scatter(0, tokens, chances / chances.sum())
    assert torch.equal(found > 0, wanted > 0)
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_a_repetition_penalty_is_transformers(penalty: float) -> None:
    seen = [3, 3, 17, 200, int(logits(0).argmax())]
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits(0)[None])[0]
    assert draw(logits(0), Sampling(repeat=penalty), generator(), seen) == int(wanted.argmax())


def test_draws_follow_the_chances_and_the_seed() -> None:
    sampling, found = Sampling(temperature=1.0, top_k=4), generator(1)
    tokens, chances = left(logits(2), sampling)
    drawn = torch.tensor([draw(logits(2), sampling, found) for _ in range(4000)])
    shares = torch.stack([(drawn == token).float().mean() for token in tokens])
    assert torch.allclose(shares, chances / chances.sum(), atol=0.03) and abs(shares.sum() - 1) < 1e-5
    again = generator(1)
    assert drawn[:50].tolist() == [draw(logits(2), sampling, again) for _ in range(50)]
    other = generator(2)
    assert drawn[:50].tolist() != [draw(logits(2), sampling, other) for _ in range(50)]


def test_greedy_takes_the_likeliest_whatever_the_seed() -> None:
    assert {draw(logits(0), Sampling(seed=s), generator(s)) for s in range(5)} == {int(logits(0).argmax())}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(value: float) -> None:
    damaged = logits(0).index_fill(0, torch.tensor([5]), value)
    with pytest.raises(Unsolvable, match="not finite"):
        draw(damaged, Sampling(), generator())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repeat", 0.0),
        ("seed", -1),
    ],
)
def test_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(Refused, match=name):
        Sampling(**{name: value})


def test_what_is_not_asked_is_as_the_authors_say() -> None:
    authors = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None}
    assert sampling_of(authors) == Sampling(temperature=0.6, top_k=20, top_p=0.95)
    assert sampling_of(authors, 3, top_p=0.5).top_p == 0.5
    assert sampling_of(authors, temperature=0).greedy
    assert sampling_of({**authors, "do_sample": False}).greedy
    assert sampling_of({"temperature": 0.6}).greedy and sampling_of({}).greedy
    assert sampling_of({"do_sample": True}) == Sampling(temperature=1.0)
    assert sampling_of({"do_sample": True, "temperature": "hot"}) == Sampling(temperature=1.0)
    assert sampling_of({}, min_p=0.1) == Sampling(temperature=1.0, min_p=0.1)
    assert sampling_of({"repetition_penalty": 1.1}) == Sampling(repeat=1.1)


def test_a_cut_where_nothing_is_drawn() -> None:
    with pytest.raises(Refused, match="top-p has no say"):
        sampling_of({}, temperature=0, top_p=0.9)


def test_it_says_what_it_does() -> None:
    assert str(Sampling()) == "greedy"
    assert str(Sampling(repeat=1.2)) == "greedy, repeat penalty 1.2"
    assert str(Sampling(temperature=0.5, top_k=9, seed=4)) == "temperature 0.5, top-k 9, seed 4"
