"""The common ruler: every peer's model and Bitmill's, scored against the original on the same text.

Twelve windows of 512 tokens of two kinds of text; the second half of every window is scored over
the full vocabulary in float32: KL(original ‖ quantized) in nats, its median and 99th percentile,
perplexity, and how often the best token is the same. ``docs`` is the kind that calibration uses
(other topics of the same manual); ``other`` is half library source code and half package pages,
which no calibration here sees. Nothing here uses ``bitmill.measurement``, so that the two check one
another.

    python benchmarks/ruler.py ORIGINAL QUANTIZED [--out FILE.json]   any two checkpoints that Bitmill reads
    python benchmarks/ruler.py ORIGINAL QUANTIZED --check             the same mean from bitmill.measure
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

THREADS = 2
WINDOW = 512
EVALUATION_WINDOWS = 12
CALIBRATION_WINDOWS = 64
AGREEMENT = 1e-4  # nats between this ruler and bitmill.measure

CODE_MODULES = ("argparse", "textwrap", "configparser", "statistics", "http.client", "calendar")
PROSE_PACKAGES = ("sympy", "tqdm", "mpmath", "regex", "fsspec", "llvmlite")
CODE_START = 2  # windows: past the licence and the imports


@dataclass(frozen=True)
class Score:
    """What a quantized model lost on one kind of text. KLD in nats a token."""

    mean_kld: float
    standard_error: float
    median_kld: float
    q99_kld: float
    perplexity: float
    original_perplexity: float
    same_top: float
    tokens: int


def documents() -> dict[str, str]:
    """The texts by kind: ``calibration`` and ``docs`` are alternate topics of Python's manual."""
    names = sorted(topics)
    return {
        "calibration": "\n\n".join(topics[name] for name in names[::2]),
        "docs": "\n\n".join(topics[name] for name in names[1::2]),
    }


def other_documents() -> list[tuple[str, int]]:
    """Texts of other kinds, and the window to take of each; none is in Bitmill's default calibration."""
    code = [(inspect.getsource(import_module(name)), CODE_START) for name in CODE_MODULES]
    return [*code, *((_description(name), 0) for name in PROSE_PACKAGES)]


def _description(package: str) -> str:
    """A package's own page without pictures and link targets: what is left reads as prose."""
    lines = str(metadata(package).get_payload()).splitlines()
    return "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith(("<", "[", "!")))


def windows(tokenizer: Any, text: str, count: int, length: int = WINDOW) -> Tensor:
    """The first ``count`` windows of token ids, ``count length``, without special tokens.

    Raises:
        ValueError: the text is shorter than that.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    if ids.numel() < count * length:
        raise ValueError(f"{ids.numel()} tokens are fewer than {count} windows of {length}")
    return ids[: count * length].reshape(count, length)


def calibration_windows(folder: str | Path, count: int = CALIBRATION_WINDOWS) -> Tensor:
    """The calibration tokens that every peer of a comparison gets."""
    return windows(AutoTokenizer.from_pretrained(folder), documents()["calibration"], count)


def digest(ids: Tensor) -> str:
    """A short name for exactly these tokens."""
    return hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()[:16]


def scored_hidden(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Last hidden states of the second half's predictions, ``T/2-1 H``: a hundredth of the logits' size."""
    with torch.inference_mode():
        return model.get_decoder()(input_ids=window[None]).last_hidden_state[0, window.shape[-1] // 2 : -1]


def log_probabilities(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Float32 log-probabilities over the whole vocabulary, ``T/2-1 V``."""
    with torch.inference_mode():
        return torch.log_softmax(model.get_output_embeddings()(hidden).float(), dim=-1)


class Ruler:
    """The original model and the evaluation tokens; scores any model of the same vocabulary.

    Attributes:
        model: the original, a transformers model in float32.
        tokens: kind of text -> windows ``n 512``.
    """

    def __init__(self, folder: str | Path, kept: Path | None = None) -> None:
        """Load the original and run it; ``kept`` is a file that spares the second run."""
        torch.set_num_threads(THREADS)
        self.folder = Path(folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.tokens = {
            "docs": windows(tokenizer, documents()["docs"], EVALUATION_WINDOWS),
            "other": torch.cat([windows(tokenizer, text, at + 1)[at:] for text, at in other_documents()]),
        }
        self._hidden = self._original_hidden(kept)

    @cached_property
    def linear_names(self) -> list[str]:
        """Names of the linear weights inside the blocks: what a comparison replaces."""
        return [
            f"{name}.weight"
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in name
        ]

    def score(self, model: PreTrainedModel) -> dict[str, Score]:
        """``model`` against the original on every kind of text."""
        return {kind: self._score_kind(model, kind) for kind in self.tokens}

    def score_linears(
        self, weights: Mapping[str, Tensor], eight_bit_inputs: bool = False
    ) -> dict[str, Score]:
        """The original with dense ``weights`` in place of all its block linears, and of what else they name.

        Args:
            eight_bit_inputs: round the inputs of the blocks' linears to 8 bits, every token by itself.

        Raises:
            ValueError: a linear is missing, or a name is none of the model's.
        """
        missing = [name for name in self.linear_names if name not in weights]
        if missing:
            raise ValueError(f"{len(missing)} linears are not replaced, {missing[0]} first")
        model = copy.deepcopy(self.model)
        state = {name: weight.float() for name, weight in weights.items()}
        unknown = model.load_state_dict(state, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{unknown[0]} is not in the model")
        for name in self.linear_names if eight_bit_inputs else ():
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(_eight_bits)
        return self.score(model)

    def score_file(self, path: str | Path) -> dict[str, Score]:
        """A checkpoint as Bitmill reads it: every tensor, for transforms also move norms and head."""
        return self.score(opened(path))

    def _original_hidden(self, kept: Path | None) -> dict[str, Tensor]:
        """The original's scored hidden states by kind, ``n T/2-1 H``; ``kept`` counts if its key agrees."""
        weights = next(self.model.parameters()).detach()
        weights_digest = digest((weights[:64] * 2**20).to(torch.int64))
        key = "-".join([weights_digest, *(digest(ids) for ids in self.tokens.values())])
        if kept is not None and kept.is_file():
            with safe_open(kept, "pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    return {kind: file.get_tensor(kind) for kind in self.tokens}
        hidden = {
            kind: torch.stack([scored_hidden(self.model, window) for window in ids])
            for kind, ids in self.tokens.items()
        }
        if kept is not None:
            save_file(hidden, kept, {"key": key})
        return hidden

    def _score_kind(self, model: PreTrainedModel, kind: str) -> Score:
        divergences, ours, theirs, same = [], [], [], []
        for window, hidden in zip(self.tokens[kind], self._hidden[kind], strict=True):
            p = log_probabilities(self.model, hidden)
            q = log_probabilities(model, scored_hidden(model, window))
            targets = window[window.shape[-1] // 2 + 1 :, None]
            divergences.append((p.exp() * (p - q)).sum(-1))
            ours.append(-q.gather(1, targets)[:, 0])
            theirs.append(-p.gather(1, targets)[:, 0])
            same.append(p.argmax(-1) == q.argmax(-1))
        kld = torch.cat(divergences).double()
        return Score(
            mean_kld=kld.mean().item(),
            standard_error=(kld.std() / kld.numel() ** 0.5).item(),
            median_kld=kld.median().item(),
            q99_kld=kld.quantile(0.99).item(),
            perplexity=torch.cat(ours).mean().exp().item(),
            original_perplexity=torch.cat(theirs).mean().exp().item(),
            same_top=torch.cat(same).float().mean().item(),
            tokens=kld.numel(),
        )


def _eight_bits(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    scale = (args[0].abs().amax(-1, keepdim=True) / 127.5).clamp_min(torch.finfo(torch.float32).tiny)
    return ((args[0] / scale).round().clamp(-128, 127) * scale, *args[1:])


def opened(path: str | Path) -> PreTrainedModel:
    """The dense float32 model of any checkpoint that Bitmill reads."""
    import bitmill

    checkpoint = bitmill.open_source(str(path))
    settings = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    tied = "lm_head.weight" not in checkpoint.tensors
    config = AutoConfig.for_model(**{**settings, "tie_word_embeddings": tied})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: checkpoint.read(name).float() for name in checkpoint.tensors}
    lost = model.load_state_dict(state, strict=False)
    absent = [name for name in lost.missing_keys if not (tied and name == "lm_head.weight")]
    if absent or lost.unexpected_keys:
        raise ValueError(f"{path}: absent {absent[:3]}, unexpected {lost.unexpected_keys[:3]}")
    model.tie_weights()
    return model


def as_json(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Plain values of all kinds of text."""
    return {kind: asdict(score) for kind, score in scores.items()}


def line(name: str, scores: Mapping[str, Score]) -> str:
    """One row: mean KLD of each kind, then perplexity and same top of the first."""
    first = next(iter(scores.values()))
    means = "  ".join(f"{kind} {score.mean_kld:.4f}" for kind, score in scores.items())
    return f"{name:<28} {means}  ppl {first.perplexity:.2f}  same top {first.same_top:.3f}"


def write_json(path: str | Path, value: Any) -> None:
    """Results as readable JSON; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Score one checkpoint against another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("original", type=Path, help="a Hugging Face folder")
    parser.add_argument("quantized", type=Path, help="any checkpoint that Bitmill reads")
    parser.add_argument("--out", type=Path, help="write the scores as JSON")
    parser.add_argument("--check", action="store_true", help="compare the mean with bitmill.measure's")
    arguments = parser.parse_args()
    ruler = Ruler(arguments.original)
    scores = ruler.score_file(arguments.quantized)
    print(line(arguments.quantized.name, scores))
    if arguments.out:
        write_json(arguments.out, as_json(scores))
    if arguments.check:
        check_against_measure(ruler, arguments.quantized, scores)


def check_against_measure(ruler: Ruler, path: Path, scores: Mapping[str, Score]) -> None:
    """Assert that ``bitmill.measure`` finds the same mean KLD on ``docs``, to 1e-4 nats."""
    import bitmill
    from bitmill.calibrate.corpus import Text
    from bitmill.measurement.measure import Protocol

    text = Text("docs", "pydoc topics, odd", (documents()["docs"],))
    protocol = Protocol(window=WINDOW, count=EVALUATION_WINDOWS, floor=False)
    record = bitmill.measure(str(path), str(ruler.folder), texts=[text], protocol=protocol)
    assert torch.equal(record.tokens.long().cpu(), ruler.tokens["docs"]), "the two score other tokens"
    theirs, ours = record.kinds["docs"].kld.mean, scores["docs"].mean_kld
    print(f"docs  ruler {ours:.6f}  bitmill.measure {theirs:.6f}")
    assert abs(theirs - ours) < AGREEMENT, f"the two means are {abs(theirs - ours):.2g} nats apart"


if __name__ == "__main__":
    main()
