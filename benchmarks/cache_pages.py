"""What the benchmarks of caches share: the model, a text long enough, its keys and values, pages."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compare import EVIDENCE, machine, signature
from ruler import documents, write_json
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import bitmill


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all of them have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="anything that bitmill opens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evidence", type=Path, default=EVIDENCE, help="where tables go")
    return parser


def opened(options: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """The model in float32, and its tokenizer."""
    torch.set_num_threads(options.threads)
    return bitmill.load(options.model)


def text_ids(tokenizer: Any, tokens: int) -> Tensor:
    """The first ``tokens`` ids of Python's manual, ``1 tokens``; from the start again where it ends."""
    ids = torch.tensor(tokenizer(documents()["docs"], add_special_tokens=False)["input_ids"])
    return ids.repeat(-(-tokens // len(ids)))[:tokens][None]


@torch.inference_mode()
def read(model: PreTrainedModel, ids: Tensor, cache: Any, piece: int = 512) -> Tensor:
    """Put ``ids`` through the model, a piece at a time; the logits of the last token."""
    last = None
    for start in range(0, ids.shape[1], piece):
        part = ids[:, start : start + piece]
        last = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    if last is None:
        raise ValueError("no tokens")
    return last


def vectors(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of every layer behind these tokens, ``1 heads tokens head``."""
    cache = DynamicCache(config=model.config)
    read(model, ids, cache)
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text."""
    lines = [f"| {' | '.join(columns)} |", "|---" + (len(columns) - 1) * "|--:" + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def write_page(
    options: argparse.Namespace, name: str, title: str, parts: Sequence[str], found: Mapping[str, Any]
) -> None:
    """``NAME.json`` and ``NAME.md``."""
    about = {**machine(), "threads": options.threads}
    write_json(options.evidence / f"{name}.json", {"about": about, **found})
    path = options.evidence / f"{name}.md"
    path.write_text("\n\n".join([f"# {title}", *parts, signature(about)]) + "\n", encoding="utf-8")
    print(path)
