"""The measurement's statistics against brute force, known distributions and simulated texts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitmill.calibrate.corpus import Text
from bitmill.calibrate.windows import tokenizer_of
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.core.errors import Refused
from bitmill.measurement import measure as measuring
from bitmill.measurement.logits import Bootstrap, Positions, Scores, summarize
from bitmill.measurement.measure import NothingMeasured, Protocol, measure
from tests.tiny import make_model


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


SHORT = Protocol(window=32, count=4)


def prose(kind: str = "text", words: int = 900, shift: int = 0) -> Text:
    said = " ".join(f"word{(i * 7919 + shift) % 1000} is{i % 13}." for i in range(words))
    return Text(kind, kind, (said,))


def disturbed(source: Path, folder: Path, noise: float, *, norms: bool = False) -> SafetensorsFolder:
    """A copy whose linear weights are jogged by ``noise`` times their own size."""
    folder.mkdir()
    g = torch.Generator().manual_seed(5)
    tensors = load_file(source / "model.safetensors")
    for name, w in tensors.items():
        if (w.dim() == 2 and "embed" not in name) or (norms and w.dim() == 1):
            tensors[name] = w + noise * w.std() * torch.randn(w.shape, generator=g)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return SafetensorsFolder(folder)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("measured") / "original")


@pytest.fixture(scope="module")
def rough(original: Path, tmp_path_factory: pytest.TempPathFactory) -> SafetensorsFolder:
    return disturbed(original, tmp_path_factory.mktemp("rough") / "rough", 0.1)


def test_a_measurement_equals_transformers_own_forward(original: Path, rough: SafetensorsFolder) -> None:
    reference = SafetensorsFolder(original)
    record = measure(rough, reference, texts=[prose()], protocol=SHORT)
    ids = tokenizer_of(reference)(prose().plain)["input_ids"]
    tokens = torch.tensor(ids[:128]).view(4, 32)
    assert torch.equal(record.tokens, tokens)
    logits = []
    for folder in (original, rough.path):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            logits.append(model(tokens).logits[:, 16:31].double().log_softmax(-1))
    p, q = logits
    kld = (p.exp() * (p - q)).sum(-1).reshape(-1)
    nll = -q.gather(2, tokens[:, 17:, None]).mean()
    assert record.summary.tokens == 60
    np.testing.assert_allclose(record.positions.kld, kld.numpy(), rtol=1e-3, atol=1e-7)
    assert record.summary.ppl == pytest.approx(math.exp(nll), rel=1e-5)
    assert record.summary.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_waves_and_memory_limits_do_not_change_a_number(
    original: Path, rough: SafetensorsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = SafetensorsFolder(original)
    once = measure(rough, reference, texts=[prose()], protocol=SHORT)
    for name, value in (("WAVE", 3), ("KEPT_BYTES", 0), ("HEAD_BYTES", 0), ("MICRO", 2)):
        monkeypatch.setattr(measuring, name, value)
    again = measure(rough, reference, texts=[prose()], protocol=SHORT)
    np.testing.assert_allclose(once.positions.kld, again.positions.kld, rtol=1e-3, atol=1e-8)
    np.testing.assert_array_equal(once.positions.top, again.positions.top)


def test_kinds_worst_floor_and_json(original: Path, rough: SafetensorsFolder) -> None:
    texts = [prose("docs"), prose("code", shift=3), prose("legal", shift=5)]
    record = measure(rough, SafetensorsFolder(original), texts=texts, protocol=SHORT)
    plain = json.loads(record.dumps())
    assert list(plain["kinds"]) == ["docs", "code", "legal"] and plain["tokens"] == 180
    assert plain["worst"]["kld"]["mean"] == max(k["kld"]["mean"] for k in plain["kinds"].values())
    mean = sum(k["kld"]["mean"] * k["tokens"] for k in plain["kinds"].values()) / 180
    assert plain["kld"]["mean"] == pytest.approx(mean)
    low, high = plain["kld"]["ci95"]
    assert low < plain["kld"]["mean"] < high
    assert 0 < plain["floor"] < plain["kld"]["mean"]
    assert plain["bpw"] == plain["bpw_linears"] == 32.0 and plain["bytes"] > 1000
    for key in ("median", "p90", "p99", "p999", "max"):
        assert plain["kld"][key] >= 0
    assert len(plain["worst_tokens"]) == 12 and plain["nonfinite"] == 0.0
    assert [s["sha256"] for s in plain["corpus"]["sources"]] == [t.sha256 for t in texts]


def test_a_model_against_itself_is_below_the_floor(original: Path) -> None:
    reference = SafetensorsFolder(original)
    record = measure(reference, reference, texts=[prose()], protocol=SHORT)
    assert record.summary.kld.mean == 0.0 and record.summary.same_top == 1.0
    assert record.floor is not None and 0 < record.floor["kld"] < 0.01
    assert all(row.relative == 0.0 for row in record.table.rows)


def test_thresholds(original: Path, rough: SafetensorsFolder) -> None:
    record = measure(rough, SafetensorsFolder(original), texts=[prose()], protocol=SHORT)
    mean, same = record.summary.kld.mean, record.summary.same_top
    assert record.missed({"kld.mean": mean * 1.01, "same_top": same - 0.01, "worst.kld.mean": mean}) == ()
    missed = record.missed({"kld.mean": mean * 0.99, "same_top": same + 0.01})
    assert [m.key for m in missed] == ["kld.mean", "same_top"]
    with pytest.raises(Refused, match="did you mean"):
        record.missed({"kld.maen": 1.0})
    with pytest.raises(Refused, match="no number"):
        record.missed({"kld": 1.0})


def test_per_tensor_errors_are_what_was_done(original: Path, rough: SafetensorsFolder) -> None:
    record = measure(rough, SafetensorsFolder(original), texts=[prose()], protocol=SHORT)
    assert record.table.same_basis
    for row in record.table.rows:
        if row.role in ("q", "k", "v", "o", "gate", "up", "down"):
            assert row.relative == pytest.approx(0.1, rel=0.1)
            assert row.sqnr_db == pytest.approx(20, abs=1.0) and 0.99 < row.cosine < 1
            assert row.place[2] >= row.relative * 0.99
        else:
            assert row.relative == 0.0 and row.sqnr_db == math.inf


def test_folded_models_say_that_tensors_cannot_be_compared(original: Path, tmp_path: Path) -> None:
    folded = disturbed(original, tmp_path / "folded", 0.5, norms=True)
    record = measure(folded, SafetensorsFolder(original), texts=[prose()], protocol=SHORT)
    assert not record.table.same_basis and any(note.kind == "basis" for note in record.notes)


def test_a_model_of_nans_measures_nothing(original: Path, tmp_path: Path) -> None:
    dead = disturbed(original, tmp_path / "dead", math.nan)
    with pytest.raises(NothingMeasured, match="none of 60 positions"):
        measure(dead, SafetensorsFolder(original), texts=[prose()], protocol=SHORT)


@pytest.mark.parametrize(
    ("texts", "error", "said"),
    [
        ([], NothingMeasured, "no text"),
        ([Text("text", "e", ("  ",))], NothingMeasured, "no text"),
        ([Text("text", "few", ("one two",))], Refused, r"not one window of 32 tokens \(few: \d+ tokens\)"),
    ],
)
def test_too_little_text(original: Path, texts: list[Text], error: type[Refused], said: str) -> None:
    reference = SafetensorsFolder(original)
    with pytest.raises(error, match=said):
        measure(reference, reference, texts=texts, protocol=SHORT)


def test_models_that_do_not_belong_together_are_refused(original: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    first, second = list(vocabulary["model"]["vocab"])[300:302]
    entries = vocabulary["model"]["vocab"]
    entries[first], entries[second] = entries[second], entries[first]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(Refused, match="different tokenizers"):
        measure(SafetensorsFolder(other), SafetensorsFolder(original), texts=[prose()], protocol=SHORT)
    config["vocab_size"] += 1
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused):
        measure(SafetensorsFolder(other), SafetensorsFolder(original), texts=[prose()], protocol=SHORT)
    with pytest.raises(Refused, match="cannot score"):
        measure(other.name, original.name, protocol=Protocol(scored="some"))


def test_calibration_overlap_comes_from_the_files_report(original: Path, tmp_path: Path) -> None:
    from bitmill.calibrate.windows import windows
    from bitmill.journal import report_path

    rough = disturbed(original, tmp_path / "rough", 0.1)
    reference = SafetensorsFolder(original)
    seen = windows(tokenizer_of(reference), [prose("docs", 3000)], 32, 64, seed=None)
    report_path(rough.path).write_text(json.dumps({"calibration": dict(seen.facts)}))
    texts = [prose("docs", 3000), prose("code", shift=3)]
    how = Protocol(window=32, count=16)
    record = measure(rough, reference, texts=texts, protocol=how)
    assert record.overlap is not None and record.overlap["docs"] == 1.0
    assert record.calibration is not None and record.calibration["sha256"] == seen.facts["sha256"]
    report_path(rough.path).write_text('{"calibration": {"shingles": "***"}}')
    assert measure(rough, reference, texts=texts, protocol=how).overlap is None
