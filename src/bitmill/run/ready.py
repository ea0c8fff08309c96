"""A model to run: opened (headers, tokenizer, its context), then ready (with its weights in memory)."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from bitmill.checkpoint.hf_folder import parse_object
from bitmill.checkpoint.tokenizer import load_tokenizer
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.run.load import config_of, load_model
from bitmill.run.memory import available_bytes
from bitmill.source import open_source

DTYPES: Mapping[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
"""What weights are decoded to, and computed in."""
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_ENDS = frozenset(
    {
        "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>",
        "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|call|>", "<eos>", "</s>", "<|end_of_turn|>",
    }
)  # fmt: skip
"""Control tokens that end an answer whether or not the files beside the model say so."""
_PART = re.compile(r"(?P<name>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, eq=False)
class Opened:
    """A model of which only headers and the tokenizer have been read.

    Attributes:
        name: as it was asked for.
        authors: ``generation_config.json``: what its authors sample with.
        trained: tokens of context it was trained for; 0 where nothing says.
        ends: tokens that end an answer.
    """

    name: str
    checkpoint: Checkpoint
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    authors: Mapping[str, Any]
    trained: int
    ends: frozenset[int]

    @property
    def weights(self) -> int:
        """Number of weights, tied ones once."""
        return sum(prod(facts.shape) for facts in self.checkpoint.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Size of the files that hold the weights."""
        path = self.checkpoint.path
        if path.is_dir():
            return sum(p.stat().st_size for p in path.iterdir() if p.suffix in (".safetensors", ".gguf"))
        part = _PART.fullmatch(path.name)
        if part is None:
            return path.stat().st_size
        return sum(p.stat().st_size for p in path.parent.glob(f"*-of-{part['count']}.gguf") if _of(p, part))


@dataclass(frozen=True, eq=False)
class Ready:
    """A model in memory.

    Attributes:
        dtype: of its weights and of computing: ``f32``, ``bf16`` or ``f16``.
        seconds: that loading took.
    """

    opened: Opened
    model: PreTrainedModel
    dtype: str
    seconds: float

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take in memory."""
        found = (*self.model.parameters(), *self.model.buffers())
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def opened(text: str, revision: str | None = None) -> Opened:
    """Open the model that ``text`` names; see :func:`~bitmill.source.open_source`.

    Raises:
        Refused: it does not exist, is no causal language model, or carries no tokenizer.
        BadFile: a file is not what it claims to be.
    """
    checkpoint = open_source(text, revision=revision)
    config = config_of(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    said = checkpoint.carried.get("generation_config.json")
    where = str(checkpoint.path)
    authors = {} if said is None else parse_object(said, where, "generation_config.json")
    facts = config.get_text_config().to_dict()
    trained = next((n for n in (facts.get(name) for name in _LENGTHS) if isinstance(n, int) and n > 0), 0)
    return Opened(text, checkpoint, config, tokenizer, authors, trained, _ends(tokenizer, authors, facts))


def loaded(model: Opened, dtype: str | None = None, device: str = "cpu", *, held: bool = False) -> Ready:
    """Read the weights into memory, decoded.

    Args:
        dtype: one of :data:`DTYPES`; without one ``f32`` on a CPU, else ``bf16``.
        held: whether the cache will hold keys and values as the file says that they are rounded.

    Raises:
        Refused: there is no such device, or not enough memory for so many weights.
        BadFile: weights and config.json do not belong together.
    """
    started = time.perf_counter()
    there = _device(device)
    name = dtype_of(dtype, device)
    if there.type == "cpu":
        _refuse_too_large(model, name)
    made = load_model(model.checkpoint, DTYPES[name], held=held)
    torch.nn.Module.to(made, there)
    return Ready(model, made, name, time.perf_counter() - started)


def dtype_of(asked: str | None, device: str = "cpu") -> str:
    """What is asked for, or what models are computed in on this device.

    Raises:
        Refused: there is no such type, or no such device.
    """
    name = asked or ("f32" if _device(device).type == "cpu" else "bf16")
    if name not in DTYPES:
        raise Refused(f"models are not computed in {name!r}", fix=f"--dtype {', '.join(DTYPES)}")
    return name


def _refuse_too_large(model: Opened, dtype: str) -> None:
    there = available_bytes()
    wanted = {name: model.weights * kind.itemsize for name, kind in DTYPES.items()}
    if wanted[dtype] <= there:
        return
    smaller = wanted["bf16"] <= there
    raise Refused(
        f"{model.name} takes {wanted[dtype] / 1e9:.1f} GB as {dtype}, and {there / 1e9:.1f} GB are free",
        fix=f"--dtype bf16 takes {wanted['bf16'] / 1e9:.1f} GB"
        if smaller
        else "a smaller model; a smaller file of this one does not help: weights are decoded here",
    )


def _device(text: str) -> torch.device:
    try:
        there = torch.device(text)
    except RuntimeError as error:
        raise Refused(f"there is no device {text!r}", fix="cpu or cuda") from error
    if there.type == "cuda" and not torch.cuda.is_available():
        raise Refused("torch sees no CUDA device here", fix="--device cpu, or see `bitmill doctor`")
    return there


def _ends(
    tokenizer: PreTrainedTokenizerFast, authors: Mapping[str, Any], facts: Mapping[str, Any]
) -> frozenset[int]:
    found: set[int] = set()
    for said in (authors.get("eos_token_id"), facts.get("eos_token_id"), tokenizer.eos_token_id):
        found |= {i for i in (said if isinstance(said, list) else [said]) if isinstance(i, int)}
    known = tokenizer.added_tokens_decoder.items()
    return frozenset(found | {i for i, token in known if token.special and token.content in _ENDS})


def _of(path: Path, part: re.Match[str]) -> bool:
    other = _PART.fullmatch(path.name)
    return other is not None and other["name"] == part["name"]
