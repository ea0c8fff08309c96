"""Text sampled from the model itself: calibration data for any model, without a network and without a corpus.

Data-free calibration as in LLM-QAT (Liu et al. 2023, arXiv 2305.17888): a random first token, then the
model's own distribution at temperature 1. A quarter goes through the chat template: the template's opening,
then a user's turn and an answer that the model makes up. Of all one-kind calibrations it costs the least on
text of other kinds.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from bitmill.calibrate.corpus import Text
from bitmill.calibrate.windows import start_token, tokenizer_of
from bitmill.checkpoint.tokenizer import render_chat
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.run.load import load_model

Progress = Callable[[str, int, int, str], None]

VERSION = 1  # of the sampling procedure: part of the cache's key
TOKENS = 32768
DOCUMENT = (
    256  # tokens: the key-value cache is what grows with length, and 128 short texts are more varied than 64
)
BATCH = 128
CHAT_SHARE = 0.25
CPU_WORK = 1e14  # operations: a quarter of an hour on two cores
_SMALL = 1_000_000_000  # parameters that still fit in float32
_MARK = "\u241e"
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")


def sample_text(
    checkpoint: Checkpoint,
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    sure: int = 0,
    device: str = "cpu",
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Text:
    """About ``tokens`` tokens of the model's own text, in documents of 256; the same for the same arguments.

    Args:
        sure: so many tokens behind the first are the most likely ones, as LLM-QAT has it: texts begin less
            wildly, and stay as varied.
        cache: folder where texts are kept by model; the user's cache folder unless given.
        progress: called as ``progress("sample", done, total, text)``.

    Raises:
        Refused: the model does not fit in memory, or would take hours on this device.
    """
    key = hashlib.sha256(_key(checkpoint, tokens, seed, sure).encode()).hexdigest()[:32]
    file = (cache or _cache_folder()) / f"{key}.json"
    documents = _remembered(file)
    if documents is None:
        _refuse_too_large(checkpoint, tokens, device)
        documents = _sampled(checkpoint, tokens, seed, sure, device, progress or (lambda *_: None))
        _remember(file, documents)
    return Text("sampled", f"the model itself, seed {seed}", documents, licence="the model's")


def _key(checkpoint: Checkpoint, tokens: int, seed: int, sure: int) -> str:
    return f"{VERSION}:{checkpoint.digest}:{tokens}:{seed}" + (f":{sure}" if sure else "")


def _sampled(
    checkpoint: Checkpoint, tokens: int, seed: int, sure: int, device: str, tell: Progress
) -> tuple[str, ...]:
    tokenizer = tokenizer_of(checkpoint)
    small = device == "cpu" and parameters(checkpoint) < _SMALL
    model = load_model(checkpoint, torch.float32 if small else torch.bfloat16)
    torch.nn.Module.to(model, torch.device(device))
    generator = torch.Generator().manual_seed(seed)
    count = max(1, -(-tokens // DOCUMENT))
    opening = _chat_opening(tokenizer)
    chats = int(count * CHAT_SHARE) if opening else 0
    prompts = [_plain_prompts(tokenizer, count - chats, generator)]
    if opening:
        prompts.append(torch.tensor(opening).repeat(chats, 1))
    documents: list[str] = []
    total = count * DOCUMENT
    for group in prompts:
        for batch in group.split(BATCH) if len(group) else ():
            done = partial(_progress, tell, len(documents) * DOCUMENT, total)
            ids = _continued(model, batch, len(tokenizer), generator, sure, done)
            documents += tokenizer.batch_decode(ids, skip_special_tokens=False)
    tell("sample", total, total, f"{count} documents")
    return tuple(documents)


def _progress(tell: Progress, before: int, total: int, now: int) -> None:
    tell("sample", before + now, total, "tokens of the model's own text")


def _plain_prompts(tokenizer: PreTrainedTokenizerFast, count: int, generator: torch.Generator) -> Tensor:
    """The document separator and one random token, ``count 2``."""
    special = set(tokenizer.all_special_ids)
    words = torch.tensor([i for i in sorted(tokenizer.get_vocab().values()) if i not in special])
    first = words[torch.randint(len(words), (count,), generator=generator)]
    return torch.stack([torch.full((count,), separator(tokenizer)), first], 1)


def separator(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that stands before a document in training: begin-of-text, or the end of the text before it."""
    begin = start_token(tokenizer)
    if begin is not None:
        return begin
    vocabulary = tokenizer.get_vocab()
    named = [vocabulary[s] for s in _SEPARATORS if s in vocabulary]
    known = (*named, tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return int(next(i for i in known if i is not None))


def _chat_opening(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the chat template up to where the user starts to speak; empty without a template."""
    if not tokenizer.chat_template:
        return []
    said = render_chat(tokenizer, [{"role": "user", "content": _MARK}], add_generation_prompt=False)
    before, mark, _ = said.partition(_MARK)
    return list(tokenizer(before, add_special_tokens=False)["input_ids"]) if mark else []


def _continued(
    model: PreTrainedModel,
    prompt: Tensor,
    vocabulary: int,
    generator: torch.Generator,
    sure: int,
    tell: Callable[[int], None],
) -> Tensor:
    """``prompt`` (``n t``) continued to 256 tokens at temperature 1; ends of text are followed by new
    texts."""
    device = model.device
    ids = prompt
    step = prompt
    cache = DynamicCache()
    with torch.inference_mode():
        while ids.shape[1] < DOCUMENT:
            logits = model(step.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            said = logits[:, -1, :vocabulary].float().cpu()
            likely = ids.shape[1] < prompt.shape[1] + sure
            step = said.argmax(-1, keepdim=True) if likely else _drawn(said, generator)
            ids = torch.cat([ids, step], 1)
            tell(ids.numel())
    return ids


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row, ``n 1``, by inverting the cumulative distribution."""
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    chance = torch.rand(logits.shape[0], 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, chance, right=True).clamp_max(logits.shape[-1] - 1)


def parameters(checkpoint: Checkpoint) -> int:
    """Number of weights, tied ones once."""
    return sum(prod(facts.shape) for facts in checkpoint.tensors.values())


def _refuse_too_large(checkpoint: Checkpoint, tokens: int, device: str) -> None:
    count = parameters(checkpoint)
    if not device.startswith("cpu"):
        return
    if 2.0 * count * tokens > CPU_WORK:
        raise Refused(
            f"sampling {tokens} tokens from {count / 1e9:.1f} billion weights takes hours on a CPU",
            fix="name a calibration text, or use --device cuda",
        )
    memory = _physical_memory()
    wanted = count * (4 if count < _SMALL else 2)
    if memory is not None and wanted > memory // 2:
        raise Refused(
            f"the model needs {wanted / 1e9:.1f} GB and this machine has {memory / 1e9:.1f} GB",
            fix="name a calibration text",
        )


def _physical_memory() -> int | None:
    if sys.platform == "win32" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bitmill" / "sampled"


def _remembered(file: Path) -> tuple[str, ...] | None:
    """Documents kept by an earlier run; None when there are none, or what is there is damaged."""
    try:
        kept: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict) or not isinstance(kept.get("documents"), list):
        return None
    documents = tuple(d for d in kept["documents"] if isinstance(d, str))
    return documents if kept.get("sha256") == _digest(documents) else None


def _remember(file: Path, documents: Sequence[str]) -> None:
    """Keep documents for the next run; a cache that cannot be written is no reason to stop."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")
        content = {"sha256": _digest(documents), "documents": list(documents)}
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        unfinished.replace(file)
    except OSError:
        return


def _digest(documents: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(documents)).encode()).hexdigest()
