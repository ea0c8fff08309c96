"""The page of worked examples: figures of the articles behind the rules, and ours by the code that plans
and advises."""

from __future__ import annotations

import runpy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from page_parts import page, table

from bitmill.advise.cache_types import cache_types
from bitmill.advise.cliff import cliff, shown
from bitmill.advise.hardware import find_card
from bitmill.advise.inventory import Bare, sized
from bitmill.advise.machine import Machine, machine
from bitmill.advise.memory import Model, Wanted, memory
from bitmill.advise.runtimes import RUNTIMES
from bitmill.advise.shape_config import config_shape
from bitmill.recipe import parse

MADE = "<!-- Written by docs/generate.py from docs/worked_examples.py: edit that. -->"
GB = 10**9
PUBLISHED = runpy.run_path(str(Path(__file__).parent.parent / "tests" / "published.py"))
"""Configurations of published models."""
PRECISIONS = {
    "16 bits": ("hf-bf16", "16", "140", ""),
    "8": ("Q8_0", "8", "70", "a scale for 32 weights is half a bit"),
    "6": ("Q6_K", "6", "53", "6.56 bits, with scales"),
    "5": ("Q5_K_M", "5.2", "46", "v and part of down have 6.56 bits"),
    "4": ("Q4_K_M", "4.4", "39", "so have they here, and the head"),
    "3": ("Q3_K_M", "3.6", "32", "the names of mixtures are lower than their bits"),
    "2": ("Q2_K", "2.4", "21", "3.2 bits; `IQ2_XXS` is what comes to their figure"),
    "2 (IQ2_XXS)": ("IQ2_XXS", "2.4", "21", "embedding and head keep more"),
}


@dataclass(frozen=True)
class Example:
    """One figure.

    Attributes:
        what: the question.
        theirs, ours: the figures, with units.
        why: they differ; empty where they do not.
    """

    what: str
    theirs: str
    ours: str
    why: str


@cache
def bare(name: str) -> Bare:
    """A published model, by its configuration."""
    return Bare(PUBLISHED[name], Path(name))


@cache
def model(name: str, recipe: str, runtime: str = "llama.cpp") -> Model:
    """It, by a recipe."""
    weights = sized(bare(name), parse(recipe)).weights
    return Model(config_shape(bare(name).config, RUNTIMES[runtime].latent), weights, RUNTIMES[runtime])


def gb(name: str, recipe: str) -> str:
    """GB of its weights."""
    return f"{model(name, recipe).weights.bytes_ / GB:.1f} GB"


def cache_gb(name: str, context: int, kind: str, full: bool = False, runtime: str = "llama.cpp") -> float:
    """GB of keys and values of one sequence."""
    kinds = cache_types(kind)
    found = memory(model(name, "Q4_K_M", runtime), Wanted(context, 1, kinds, full), "vram")
    return next(part.bytes_ for part in found.parts if part.name == "keys and values") / GB


def whole_gb(name: str, recipe: str, context: int, kind: str = "f16", runtime: str = "llama.cpp") -> float:
    """GB of all that is on a card."""
    return memory(model(name, recipe, runtime), Wanted(context, 1, cache_types(kind)), "vram").bytes_ / GB


def speed(name: str, recipe: str, there: Machine, layers: int | None = None) -> str:
    """Tokens a second at 8,192 of context, with so many layers on the card or as many as fit."""
    found = cliff(model(name, recipe), Wanted(8192, 1, cache_types("f16")), there)
    split = found.best if layers is None else found.splits[layers]
    assert split is not None
    where = "" if layers is not None or split.whole else f", {split.layers} of {split.of} layers on the card"
    return f"{shown(split.decode)} tokens/s{where}"


def weights() -> list[list[str]]:
    """The table of weights."""
    return [
        [bits, f"`{recipe}`", eight, gb("LLAMA_8B", recipe), seventy, gb("LLAMA_70B", recipe), why]
        for bits, (recipe, eight, seventy, why) in PRECISIONS.items()
    ]


def fits() -> list[Example]:
    """What fits where."""
    seventy = bare("LLAMA_70B").parameters
    return [
        Example(
            "70B at 2 bits on 24 GB", "18 GB of weights, fits",
            f"{seventy * 2 / 8 / GB:.1f} GB at 2 bits even, {gb('LLAMA_70B', 'IQ2_XXS')} as `IQ2_XXS`; "
            f"{whole_gb('LLAMA_70B', 'IQ2_XXS', 8192):.1f} GB with a context of 8,192: fits 25.8 GB",
            "scales, embedding and head",
        ),
        Example(
            "70B at 3 bits on 24 GB", "fits", f"{seventy * 3 / 8 / GB:.1f} GB at 3 bits even: does not fit",
            "three bits of 70 billion are more than the card",
        ),
        Example(
            "70B at 4 bits on 48 GB", "about 35 GB, 40+ GB elsewhere; fits",
            f"{gb('LLAMA_70B', 'Q4_K_M')} as `Q4_K_M`, {gb('LLAMA_70B', 'nf4')} as `nf4`: fits 51.5 GB",
            "35 GB are 4 bits even; scales and a head in 6 or 16 bits come on top",
        ),
        Example(
            "file of an 8B, 16 and 4 bits", "16.1 and 4.92 GB",
            f"{gb('LLAMA_8B', 'f16')} and {gb('LLAMA_8B', 'Q4_K_M')}", "",
        ),
        Example(
            "8B in bitsandbytes, INT8 and NF4", "8.5 and 5 GB",
            f"{gb('LLAMA_8B', 'llm-int8')} and {gb('LLAMA_8B', 'nf4')}",
            "embedding and head stay in 16 bits: 2.1 GB of it",
        ),
        Example(
            "keys and values of a 9B at 8,192 and 32,768",
            "a gigabyte or more; 8 to 10 GB, more than the weights",
            f"{cache_gb('NINE_B', 8192, 'f16'):.1f} and {cache_gb('NINE_B', 32768, 'f16'):.1f} GB, "
            f"{cache_gb('NINE_B', 32768, 'f16', True):.1f} if every block kept all; weights "
            f"{gb('NINE_B', 'Q4_K_M')}",
            "every other block keeps a window of 4,096; 9Bs differ twofold in heads",
        ),
        Example(
            "an 8B with 128k of context on 16 GB", "4-bit weights and a cache of 3 bits hold it",
            f"{whole_gb('LLAMA_8B', 'Q4_K_M', 131072):.1f} GB with an f16 cache, "
            f"{whole_gb('LLAMA_8B', 'Q4_K_M', 131072, 'q4_0'):.1f} with q4_0, "
            f"{cache_gb('LLAMA_8B', 131072, 'turboquant-3', False, 'bitmill'):.1f} GB of turboquant-3",
            "",
        ),
        Example(
            "14B at 8 and at 4 bits", "16 GB spills, 8 GB fits a 16 GB card",
            f"{gb('QWEN3_14B', 'Q8_0')} and {gb('QWEN3_14B', 'Q4_K_M')}",
            "14.8 billion weights, a large vocabulary",
        ),
    ]  # fmt: skip


def speeds() -> list[Example]:
    """How fast what is."""
    card = machine("rx9060xt 16GB + 32GB ddr5 + 8 cores")
    there = replace(card, vram_bytes=card.vram_bytes - GB)
    a100, h100 = find_card("a100"), find_card("h100")
    assert a100 is not None and h100 is not None
    large = machine("rtx3090")
    dense, four = (model("LLAMA_70B", recipe).weights.bytes_ for recipe in ("hf-bf16", "Q4_K_M"))
    return [
        Example(
            "14B at 8 and at 4 bits, 16 GB with one of them taken", "the first at the speed of the bus",
            f"{speed('QWEN3_14B', 'Q8_0', there)}; {speed('QWEN3_14B', 'Q4_K_M', there)}",
            "llama.cpp's processor reads what spilled: no bus in between",
        ),
        Example(
            "9B at 4 bits that fits, 14B at 8 that spills", "40 tokens/s against 3",
            f"{speed('NINE_B', 'Q4_K_M', there)}; {speed('QWEN3_14B', 'Q8_0', there)}",
            "the same direction; ours are ranges, and the spilled part is small",
        ),
        Example(
            "8B at 4 bits: 36, 25, 11 and no layers on the card",
            "full speed; 5 times slower; 15; single digits",
            "; ".join(speed("QWEN3_8B", "Q4_K_M", card, n) for n in (36, 25, 11, 0)),
            "the article takes spilled weights over the bus for every token",
        ),
        Example(
            "30B with 3B active", "stored as 30B, as fast as 3B",
            f"{gb('QWEN3_30B_A3B', 'Q4_K_M')}; on an RTX 3090 {speed('QWEN3_30B_A3B', 'Q4_K_M', large)}, "
            f"a dense 3B {speed('LLAMA_3B', 'Q4_K_M', large)}, "
            f"a dense 32B {speed('QWEN3_32B', 'Q4_K_M', large)}",
            "",
        ),
        Example(
            "70B in 16 bits on an A100 of 80 GB", "140 GB: does not load, two do",
            f"{gb('LLAMA_70B', 'hf-bf16')}, {a100.bytes_ / GB:.0f} GB a card", "",
        ),
        Example(
            "operations a byte of an H100, FP8", "1,979 TFLOPS on 3.35 TB/s: 590",
            f"{2 * h100.flops / h100.bandwidth:.0f}", "",
        ),
        Example(
            "4 bits against 16 on an H100, one token at a time", "four times as fast",
            f"{dense / four:.1f} times fewer bytes, and so many times as fast at most",
            "scales, and a head with more bits",
        ),
    ]  # fmt: skip


def worked_examples() -> str:
    """The page."""
    said = (
        "Figures of four articles on running quantized models, beside what `bitmill plan` and\n"
        "`bitmill advise` compute from the published configurations of Llama 3, Qwen 3 and Gemma 2.\n"
        "Sizes are those of all tensors as they are stored; caches are llama.cpp's, exact; speeds are\n"
        "modelled, as ranges. GB are 10⁹ bytes, and a card of 16 GB has 17.2 of them.\n"
        "`tests/test_worked_examples.py` holds each."
    )
    head = ["question", "article", "here", "why they differ"]
    parts = [
        "# Worked examples",
        said,
        "## Weights",
        table(["bits", "recipe", "8B, GB", "here", "70B, GB", "here", "why"], weights()),
        "## What fits",
        table(head, [[e.what, e.theirs, e.ours, e.why] for e in fits()]),
        "## How fast",
        table(head, [[e.what, e.theirs, e.ours, e.why] for e in speeds()]),
        "The ten questions of [advice](advise.md) and their answers: `tests/test_advice.py`.",
    ]
    return page(MADE, parts)
