"""Options that the commands which learn share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    Path | None,
    typer.Option(
        "--data", "--dataset",
        help="Examples: .jsonl with messages, prompt and completion, or text in each row; or .txt.",
        show_default=False,
    ),
]  # fmt: skip
Folder = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", "--output-dir", help="Folder of the adapter that is written.", show_default=False
    ),
]
BaseGrid = Annotated[
    str | None,
    typer.Option(
        "--base-grid",
        help="What the base is frozen on: any grid of `bitmill recipes`. [default: nf4-b64-dq; a model that "
        "is quantized already keeps its codes]",
        show_default=False,
    ),
]
HeldOut = Annotated[
    Path | None,
    typer.Option(
        "--held-out",
        help="Examples that judge and do not teach. [default: one in ten of --data, at most 64]",
        show_default=False,
    ),
]
Steps = Annotated[
    int, typer.Option("--steps", "--max-steps", min=0, help="Of the optimizer; 0 is one pass over the data.")
]
Rank = Annotated[int, typer.Option("--rank", "--lora-r", min=1, help="Of the adapter.")]
Alpha = Annotated[float, typer.Option("--alpha", "--lora-alpha", help="The adapter counts alpha / rank.")]
Rate = Annotated[float, typer.Option("--lr", "--learning-rate", help="Learning rate, behind the warm-up.")]
Batch = Annotated[int, typer.Option("--batch", "--batch-size", min=1, help="Examples of a step.")]
Context = Annotated[
    int, typer.Option("--context", "--max-seq-length", min=8, help="Most tokens of an example.")
]
MicroTokens = Annotated[
    int,
    typer.Option("--micro-tokens", min=8, help="Tokens in the model at once: less memory, the same steps."),
]
Optimizer = Annotated[
    str,
    typer.Option(
        "--optimizer", metavar="auto|adamw|adamw8bit|paged-adamw8bit|paged-adamw32bit",
        help="States in 32 or 8 bits, the latter by bitsandbytes; auto takes 8 bits on a GPU.",
    ),
]  # fmt: skip
Kept = Annotated[str, typer.Option("--keep", metavar="best|last", help="The step that is written.")]
Drawn = Annotated[int, typer.Option("--seed", min=0, help="Of the start and of the order of the examples.")]
Starting = Annotated[
    bool, typer.Option("--scratch", help="Start from random weights; MODEL gives tokenizer and shape.")
]
Shape = Annotated[
    str,
    typer.Option(
        "--shape", metavar="layers=4,hidden=256,…",
        help="With --scratch, another shape: layers, hidden, mlp, heads, kv-heads, head-dim.",
        show_default=False,
    ),
]  # fmt: skip
Written = Annotated[
    str, typer.Option("--recipe", help="What is written: a layout of ternary weights, by plain rounding.")
]
