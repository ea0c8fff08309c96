"""Bitmill: quantize any language model with any method into the file your runtime loads; measure the cost.

import bitmill
bitmill.quantize("smollm2", "gptq : q4_0 > gguf", out="smollm2.gguf")
bitmill.measure("smollm2.gguf", against="smollm2")
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "quantize": "bitmill.mill",
    "quantize_many": "bitmill.several",
    "convert": "bitmill.transfer",
    "finetune": "bitmill.adapters.finetune",
    "Report": "bitmill.account",
    "plan": "bitmill.planning",
    "Plan": "bitmill.planning",
    "Recipe": "bitmill.recipe",
    "parse": "bitmill.recipe",
    "open_source": "bitmill.source",
    "load": "bitmill.run.load",
    "measure": "bitmill.measurement.measure",
    "train_ternary": "bitmill.ternary.train",
    "verify": "bitmill.trust.verdict",
}

__all__ = [
    "Plan",
    "Recipe",
    "Report",
    "convert",
    "finetune",
    "load",
    "measure",
    "open_source",
    "parse",
    "plan",
    "quantize",
    "quantize_many",
    "train_ternary",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Public names, imported when first used: ``import bitmill`` costs no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bitmill' has no attribute {name!r}")
    return vars(import_module(_PUBLIC[name]))[name]
