"""How long a token takes with a packed cache, beside the one that is not packed.

python benchmarks/cache_speed.py [--contexts 2048 8192] [--steps 8] [--repeats 5] [--methods turboquant-4 ...]

Small: --contexts 512 --steps 2 --repeats 1 --evidence FOLDER

The cache is filled with random keys and values: nothing in it changes what a step costs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from cache_pages import arguments, opened, table, write_page
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bitmill.run.attention import attend_packed
from bitmill.run.cache import PackedCache, cache_of

METHODS = (
    "f16", "fp8", "q8_0", "q4_0-rot", "int4", "int4-rot", "turboquant-4", "turboquant-3.5", "turboquant-3",
    "turboquant-2", "kivi-4", "polarquant", "qjl",
)  # fmt: skip
NOTES = """One new token behind a full cache, one sequence, the whole model in float32, the median of the
repeats. *Usual* is transformers' DynamicCache with its own attention, float32 as the model is. *Step* is the
whole model; *attention* is what remains when the same step behind one token is taken off: reading, scores,
sums, appending. The ratio is the usual cache's attention over this one's: above 1 is faster."""


def main() -> None:
    """Every context, every method."""
    parser = arguments(__doc__)
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    model, _ = opened(options)
    rows: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    for context in options.contexts:
        usual = rung(model, lambda: DynamicCache(config=model.config), context, options)
        rows.append({"name": "usual", "context": context, **usual, "ratio": 1.0})
        print(rows[-1], flush=True)
        before = model.config._attn_implementation
        attend_packed(model)
        for name in options.methods:
            found = rung(model, lambda name=name: cache_of(name, model.config), context, options)
            ratio = usual["attention"] / max(found["attention"], 1e-9)
            rows.append({"name": name, "context": context, **found, "ratio": ratio})
            print(rows[-1], flush=True)
        model.set_attn_implementation(before)
    cells = [
        [
            row["name"],
            f"{row['context']:,}",
            f"{row['bytes']:,}",
            f"{1e3 * row['step']:.1f}",
            f"{1e3 * row['attention']:.1f}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    columns = ["cache", "tokens", "bytes", "step, ms", "attention, ms", "ratio"]
    note = f"The machine's load before: {load:.1f}."
    write_page(
        options,
        "cache_speed",
        "A token with a packed cache",
        [NOTES, table(columns, cells), note],
        {"rows": rows},
    )


def rung(
    model: PreTrainedModel, make: Callable[[], Any], context: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of a step behind ``context`` tokens, and of its attention."""
    empty, full = make(), make()
    fill(model, empty, 1)
    fill(model, full, context)
    steps(model, empty, 1), steps(model, full, 1)  # compiled, warm
    short, long = [], []
    for _ in range(options.repeats):
        short.append(steps(model, empty, options.steps))
        long.append(steps(model, full, options.steps))
    held = (
        full.bytes_
        if isinstance(full, PackedCache)
        else sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    )
    return {"bytes": held, "step": median(long), "attention": median(long) - median(short)}


@torch.inference_mode()
def steps(model: PreTrainedModel, cache: Any, count: int) -> float:
    """Seconds a token."""
    start = time.perf_counter()
    for _ in range(count):
        model(input_ids=torch.tensor([[1]]), past_key_values=cache, use_cache=True)
    return (time.perf_counter() - start) / count


def fill(model: PreTrainedModel, cache: Any, tokens: int) -> None:
    """Random keys and values in every layer."""
    config = model.config
    head = config.head_dim or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)

    def made() -> Tensor:
        return torch.randn(1, config.num_key_value_heads, tokens, head, generator=generator)

    for index in range(config.num_hidden_layers):
        if isinstance(cache, PackedCache):
            layer = cache.packed[index]
            layer.k.append(made())
            layer.v.append(made())
            layer.is_initialized = True
        else:
            cache.update(made(), made(), index)


if __name__ == "__main__":
    main()
