"""``bitmill plan``: what a recipe would do to a model, before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitmill.cli import say
from bitmill.cli.memory import Answer, Asked, Context, Kv, MachineText, Parallel, Plot, RuntimeName, answer
from bitmill.cli.options import (
    Bits,
    EmbeddingType,
    Group,
    ImatrixFiles,
    ImatrixMissing,
    Json,
    Keep,
    Length,
    Model,
    Out,
    OutputType,
    PreTokenizer,
    Pure,
    Recipe,
    Revision,
    Samples,
    SplitSize,
    SplitTensors,
    Strict,
    TensorType,
)
from bitmill.cli.progress import Teller
from bitmill.cli.verify import Cards, refuse_unloadable
from bitmill.cli.wanted import Types, wanted
from bitmill.core.errors import Refused

ORDER = ("embed", "attn_in_norm", "q", "q_norm", "k", "k_norm", "v", "o", "post_attn_norm", "mlp_in_norm",
         "router", "gate", "up", "down", "post_mlp_norm", "final_norm", "head")  # fmt: skip
"""Roles as a model runs them."""
KEPT_SHARE = 0.2  # of an output in single precision that is worth a word

if TYPE_CHECKING:
    from bitmill.core.axes import Checkpoint
    from bitmill.core.types import Row
    from bitmill.planning import Plan


def plan(
    model: Model,
    recipe: Recipe = None,
    out: Out = None,
    nsamples: Samples = 128,
    seqlen: Length = 512,
    strict: Strict = False,
    keep: Keep = None,
    bits: Bits = None,
    group_size: Group = None,
    tensor_type: TensorType = None,
    output_tensor_type: OutputType = None,
    token_embedding_type: EmbeddingType = None,
    pure: Pure = False,
    split_max_size: SplitSize = None,
    split_max_tensors: SplitTensors = None,
    pre_tokenizer: PreTokenizer = None,
    imatrix: ImatrixFiles = None,
    imatrix_missing: ImatrixMissing = "plain",
    revision: Revision = None,
    context: Context = None,
    parallel: Parallel = None,
    kv: Kv = None,
    machine: MachineText = None,
    runtime: RuntimeName = None,
    tp: Cards = 1,
    plot: Plot = None,
    rows: Annotated[
        bool, typer.Option("--rows", help="A line for every tensor, not for every kind.")
    ] = False,
    time: Annotated[
        bool, typer.Option("--time", help="Time the first blocks for real, on random text and thrown away.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what a recipe would do, before any weight is read, and what memory running the model takes.

    Every tensor's grid and why, the size exact to the byte, memory, disk and time as modelled (--time does
    some blocks to know better). What cannot work is refused here, with what would. With --context, --kv,
    --machine …: whether the result fits, which context would, and how fast it would run. Without a recipe:
    the model as it is.

        bitmill plan smollm2 Q4_K_M
        bitmill plan ./my-model "awq + gptq : int4-g128" --rows --for vllm@0.11 --tp 2
        bitmill plan ./my-model Q4_K_M --context 32768 --kv q8_0 --machine vram=8GB,ram=32GB
        bitmill plan file.gguf --context 16384 --machine "rtx4090 + 64GB ddr5" --plot cliff.svg
    """
    from bitmill.planning import plan as make_plan
    from bitmill.source import open_source

    asked = Asked(context, parallel, kv, machine, runtime, plot)
    named = (out, keep, group_size, tensor_type, output_tensor_type, token_embedding_type, pre_tokenizer)
    about = (*named, pure, strict, rows, time, split_max_size, split_max_tensors, imatrix)
    if recipe is None and bits is None and not any(about):
        running = answer(asked, model, revision)
        say.emit({"memory": running.to_json()}) if json else running.show()
        return
    source = open_source(model, revision=revision)
    file = (split_max_size, split_max_tensors, pre_tokenizer)
    types = Types(tensor_type or (), output_tensor_type, token_embedding_type, pure, *file)
    made = make_plan(
        wanted(recipe, keep or [], bits, group_size, types),
        source,
        out,
        nsamples=0 if imatrix else nsamples,
        seqlen=0 if imatrix else seqlen,
        strict=strict,
        calibrated=bool(imatrix),
    )
    check_imatrix(made, source, imatrix, imatrix_missing)
    refuse_unloadable([made], runtime, tp)
    made = _timed(made, source, imatrix, imatrix_missing) if time else made
    found = _running(asked, model, revision, made, source)
    if json:
        say.emit({**made.to_json(), **({"memory": found.to_json()} if found is not None else {})})
        return
    show(made, rows)
    if found is not None:
        say.result()
        found.show()


def check_imatrix(made: Plan, source: Checkpoint, files: Sequence[Path] | None, missing: str) -> None:
    """Refuse importance matrices that the plan cannot use; say how many weights they leave out."""
    if not files:
        return
    from bitmill.mill import importance

    _, account = importance(made, source, files, missing)
    if account.notes:
        say.note(f"{len(account.notes)} weights have no data in the importance matrix: {missing}")


def _running(asked: Asked, model: str, revision: str | None, made: Plan, source: Checkpoint) -> Answer | None:
    """What running it takes, if any of that is asked; a runtime alone may be one that is not modelled."""
    try:
        return answer(asked, model, revision, made, source) if asked.anything else None
    except Refused as refusal:
        if asked != Asked(runtime=asked.runtime):
            raise
        say.note(f"what running it takes is left out: {refusal.what}")
        return None


def _timed(made: Plan, source: Checkpoint, files: Sequence[Path] | None, missing: str) -> Plan:
    """The plan with its first blocks timed instead of modelled."""
    from bitmill.mill import importance
    from bitmill.timing import timed

    known = importance(made, source, files, missing)[0] if files else None
    with Teller() as teller:
        found = timed(made, source, known, tell=teller)
    return replace(made, seconds=found.seconds, timed=found.said)


def show(made: Plan, every_row: bool) -> None:
    """The plan for a reader: headline, then a table by kind or by tensor."""
    for line in made.headline:
        say.result(line)
    say.result()
    if every_row:
        head = ["tensor", "shape", "grid", "why"]
        say.result(say.table(head, [[r.name, _shape(r), _grid(r), _why(r)] for r in made.rows]))
        return
    kinds: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in sorted(made.rows, key=lambda row: ORDER.index(row.role) if row.role in ORDER else len(ORDER)):
        kinds.setdefault((row.role, _shape(row), _grid(row), _why(row)), []).append(row)
    head = ["role", "tensors", "shape", "grid", "weights", "why"]
    total = made.parameters
    lines = [
        [role, len(found), shape, grid, f"{sum(prod(r.shape) for r in found) / total:.1%}", why]
        for (role, shape, grid, why), found in kinds.items()
    ]
    say.result(say.table(head, lines, right=(1, 4)))
    grids = Counter({str(r.grid): 0 for r in made.rows})
    for row in made.rows:
        grids[str(row.grid)] += prod(row.shape)
    said = ", ".join(f"{grid} {count / total:.1%}" for grid, count in grids.most_common())
    say.result(f"\nof all weights: {said}")
    wide = 4 * sum(prod(row.shape) for row in made.rows if str(row.grid) == "f32" and len(row.shape) > 1)
    if made.dtype == "f32" and wide > KEPT_SHARE * made.bytes_:
        share = f"{wide / made.bytes_:.0%} of the bytes"
        say.result(f"what is kept is in f32, as in the source: {share}; dtype=bf16 in the recipe halves it")


def _shape(row: Row) -> str:
    return "×".join(map(str, row.shape))


def _grid(row: Row) -> str:
    return f"{row.grid}, inputs {row.inputs}" if row.inputs else str(row.grid)


def _why(row: Row) -> str:
    return f"{row.why}; instead of {row.fallback}" if row.fallback else row.why
