"""The measurement's statistics against brute force, known distributions and simulated texts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitmill.measurement.logits import Bootstrap, Positions, Scores, summarize


def scored(
    reference: torch.Tensor, quantized: torch.Tensor, targets: torch.Tensor, windows: int = 4
) -> Positions:
    scores = Scores()
    count = len(targets)
    window = torch.arange(count) * windows // count
    scores.add(reference.clone(), quantized.clone(), targets, window, torch.arange(count))
    return scores.positions()


def random_case(count: int = 64, vocabulary: int = 50, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    reference = 4 * torch.randn(count, vocabulary, generator=g)
    quantized = reference + 0.5 * torch.randn(count, vocabulary, generator=g)
    return reference, quantized, torch.randint(0, vocabulary, (count,), generator=g)


def test_positions_equal_float64_brute_force() -> None:
    a, b, target = random_case()
    found = scored(a, b, target)
    p, q = torch.log_softmax(a.double(), -1), torch.log_softmax(b.double(), -1)
    at = target[:, None]
    np.testing.assert_allclose(found.kld, (p.exp() * (p - q)).sum(-1).numpy(), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(found.nll, -q.gather(1, at)[:, 0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.nll_reference, -p.gather(1, at)[:, 0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.confidence, p.exp().amax(-1).numpy(), rtol=1e-6)
    assert (found.top == b.argmax(-1).numpy()).all()
    np.testing.assert_allclose(
        found.dp, (q.gather(1, at).exp() - p.gather(1, at).exp())[:, 0].numpy(), atol=1e-7
    )


def test_small_divergence_is_not_lost_to_rounding() -> None:
    """A KLD of 1e-8 on a vocabulary of 50,000, where float32 softmax differences would drown it."""
    g = torch.Generator().manual_seed(1)
    a = 3 * torch.randn(4, 50_000, generator=g)
    b = a + 1e-4 * torch.randn(4, 50_000, generator=g)
    p, q = torch.log_softmax(a.double(), -1), torch.log_softmax(b.double(), -1)
    truth = (p.exp() * (p - q)).sum(-1).numpy()
    assert truth.max() < 1e-7
    np.testing.assert_allclose(scored(a, b, torch.zeros(4, dtype=torch.long)).kld, truth, rtol=0.02)


def test_identical_logits_give_exactly_nothing() -> None:
    a, _, target = random_case()
    s = summarize(scored(a, a, target))
    assert s.kld.mean == s.kld.max == 0.0
    assert s.same_top == 1.0 and s.right_to_wrong == s.wrong_to_right == 0 and s.rms_dp == 0.0
    assert s.ppl == s.ppl_reference and s.correlation == pytest.approx(1.0)


def test_a_shift_of_all_logits_changes_nothing() -> None:
    a, _, target = random_case()
    assert summarize(scored(a, a + 7.5, target)).kld.mean < 1e-6


def test_pieces_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, target = random_case()
    whole = scored(a, b, target)
    monkeypatch.setattr("bitmill.measurement.logits.CHUNK_BYTES", 4 * 50 * 7)
    pieces = scored(a, b, target)
    for name, values in vars(whole).items():
        np.testing.assert_array_equal(values, vars(pieces)[name])


def test_flips_and_same_top_by_hand() -> None:
    a = torch.tensor([[2.0, 1, 0], [2, 1, 0], [0, 1, 2], [0, 1, 2]])
    b = torch.tensor([[2.0, 1, 0], [1, 2, 0], [2, 1, 0], [0, 1, 2]])
    s = summarize(scored(a, b, torch.tensor([0, 0, 0, 1]), windows=2))
    assert (s.right_to_wrong, s.wrong_to_right) == (1, 1)
    assert s.same_top == 0.5 and s.same_top_se == pytest.approx(0.25)
    assert sum(bucket.tokens for bucket in s.confidence) == 4


def test_non_finite_positions_are_left_out_and_counted() -> None:
    a, b, target = random_case()
    clean = summarize(scored(a[8:], b[8:], target[8:], windows=1))
    b[0, 3], a[5, 2] = math.nan, math.inf
    b[1:5, 0] = -math.inf
    b[6:8, 1] = math.nan
    s = summarize(scored(a, b, target, windows=1))
    assert s.nonfinite == pytest.approx(8 / 64) and s.tokens == 56
    assert s.kld.mean == pytest.approx(clean.kld.mean)
    with pytest.raises(ValueError, match="none of 64"):
        summarize(scored(a * math.nan, b, target))


def test_one_window_has_no_interval() -> None:
    s = summarize(scored(*random_case(), windows=1))
    assert s.kld.ci95 is None and s.ppl_se is None and s.to_json()["kld"]["ci95"] is None


def test_bootstrap_is_seeded() -> None:
    p = scored(*random_case(), windows=16)
    assert summarize(p, seed=3) == summarize(p, seed=3)
    assert summarize(p, seed=3).kld.ci95 != summarize(p, seed=4).kld.ci95


@pytest.mark.parametrize("blocks", [5, 12, 40])
def test_interval_covers_the_truth_when_errors_cluster(blocks: int) -> None:
    """Skewed errors that share their size inside a window: 95 % intervals hold the true mean about 95 % of
    the time."""
    rng = np.random.default_rng(blocks)
    window = np.repeat(np.arange(blocks), 50)
    held = 0
    for trial in range(300):
        level = rng.gamma(8.0, 1 / 8.0, blocks)[window]
        boot = Bootstrap(window, seed=trial, draws=400)
        low, high = boot.interval(boot.means(level * rng.exponential(1.0, len(window)))) or (0.0, 0.0)
        held += low <= 1.0 <= high
    assert 0.90 <= held / 300 <= 0.99


def test_independent_token_intervals_would_be_too_narrow() -> None:
    rng = np.random.default_rng(0)
    window = np.repeat(np.arange(40), 50)
    values = rng.gamma(2.0, 0.5, 40)[window] * rng.exponential(1.0, len(window))
    naive = values.std() / math.sqrt(len(values))
    boot = Bootstrap(window)
    assert (boot.se(boot.means(values)) or 0) > 2 * naive


def test_kinds_keep_their_share_in_every_resample() -> None:
    """Two kinds that differ by a constant: resampled within each kind, the mixture has no spread at all."""
    window = np.repeat(np.arange(8), 10)
    stratum = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    boot = Bootstrap(window, stratum)
    assert boot.means(stratum[window].astype(float)).std() == 0.0
    pooled = Bootstrap(window)
    assert pooled.means(stratum[window].astype(float)).std() > 0.1
