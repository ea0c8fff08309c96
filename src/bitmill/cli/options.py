"""Arguments and options that several verbs share, with the spellings people bring from other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder, a .gguf file, a hub id (org/name, org/name:Q8_0) or smollm2.",
        show_default=False,
    ),
]
Recipe = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A known name in any case (Q4_K_M, W4A16, nf4), a bare grid (int4-g64), one line "
        "'transforms + solver : grid, options > container', or a .toml file. `bitmill recipes` lists them.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", "--output", "--output-dir", "--outfile",
        help="Where the result goes: a file for gguf, a folder for the rest.", show_default=False,
    ),
]  # fmt: skip
Recipes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE]...",
        help="A known name in any case (Q4_K_M, W4A16, nf4), a bare grid (int4-g64), one line "
        "'transforms + solver : grid, options > container', or a .toml file; one for each -o. "
        "`bitmill recipes` lists them.",
        show_default=False,
    ),
]
Outs = Annotated[
    list[Path] | None,
    typer.Option(
        "-o", "--out", "--output", "--output-dir", "--outfile",
        help="Where the result goes: a file for gguf, a folder for the rest. Repeated, with as many recipes, "
        "several outputs share calibration.",
        show_default=False,
    ),
]  # fmt: skip
Calib = Annotated[
    list[str] | None,
    typer.Option(
        "--calib", "--dataset", "-f",
        help="Calibration text: a .txt, .jsonl or .parquet file, a data set's name, or self, what the model "
        "itself writes; may be repeated, and weighted (chat.jsonl=2). Without it, a mixture made of text "
        "that is already on this machine.",
        show_default=False,
    ),
]  # fmt: skip
Samples = Annotated[
    int,
    typer.Option("--nsamples", "--num-calibration-samples", min=1, help="Calibration windows."),
]
Length = Annotated[
    int,
    typer.Option("--seqlen", "--max-seq-length", min=8, help="Tokens of a calibration window."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Draws the windows; the same seed, the same bytes.")]
Device = Annotated[str, typer.Option("--device", "--device-map", help="cpu or cuda.")]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Refuse grids that shapes force, and files that no loader takes."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep", "--ignore", "--exclude",
        help="Leave these as they are: roles (head, v) or module names (lm_head, v_proj); may be repeated.",
        show_default=False,
    ),
]  # fmt: skip
TensorType = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type", metavar="REGEX=TYPE",
        help="A grid for the tensors in whose name the pattern is found: in GGUF llama.cpp's name "
        "(blk.0.ffn_down.weight), else the model's own. May be repeated; the first that is found decides.",
        show_default=False,
    ),
]  # fmt: skip
OutputType = Annotated[
    str | None,
    typer.Option(
        "--output-tensor-type", metavar="TYPE",
        help="GGUF: the head's type, or that of an embedding which is also the head (head=TYPE in a "
        "recipe).",
        show_default=False,
    ),
]  # fmt: skip
EmbeddingType = Annotated[
    str | None,
    typer.Option(
        "--token-embedding-type", metavar="TYPE",
        help="GGUF: the embedding's type (embed=TYPE in a recipe).", show_default=False,
    ),
]  # fmt: skip
Pure = Annotated[
    bool,
    typer.Option("--pure", help="With a mixture: its default type for every tensor, embedding and head too."),
]
SplitSize = Annotated[
    str | None,
    typer.Option(
        "--split-max-size", metavar="SIZE",
        help="GGUF: parts of at most this size, 500M or 2G, in a folder.", show_default=False,
    ),
]  # fmt: skip
PreTokenizer = Annotated[
    str | None,
    typer.Option(
        "--pre-tokenizer", metavar="NAME",
        help="GGUF: llama.cpp's name of how text is cut into words (llama-bpe, qwen2), where it is not "
        "recognised.",
        show_default=False,
    ),
]  # fmt: skip
SplitTensors = Annotated[
    int | None,
    typer.Option(
        "--split-max-tensors", min=1,
        help="GGUF: parts of at most this many tensors, in a folder.", show_default=False,
    ),
]  # fmt: skip
Bits = Annotated[
    int | None,
    typer.Option(
        "--bits", "-b", "--w-bit", "--wbits", "--q-bits", min=2, max=8,
        help="Instead of a recipe: gptq on integers of this width.", show_default=False,
    ),
]  # fmt: skip
Group = Annotated[
    int | None,
    typer.Option(
        "--group-size", "--q-group-size",
        help="With --bits: columns that share a scale; -1 is a whole row. [default: 128]", show_default=False,
    ),
]  # fmt: skip
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.", show_default=False)
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text", "-t",
        help="Text to measure on: files or data sets, as for --calib. Without it, a mixture that is already "
        "on this machine and shares no document with the default calibration.",
        show_default=False,
    ),
]  # fmt: skip
Json = Annotated[
    bool, typer.Option("--json", help="JSON to standard output, everything else to standard error.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done and what it takes; write nothing.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Put calibration text through the chat template.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Resume = Annotated[
    bool,
    typer.Option("--resume/--no-resume", "-r", help="Go on from an interrupted run of the same command."),
]
MomentsFile = Annotated[
    Path | None,
    typer.Option("--moments", help="Moments saved before, instead of calibrating.", show_default=False),
]
SaveMoments = Annotated[
    Path | None,
    typer.Option("--save-moments", help="Keep this run's moments for other recipes.", show_default=False),
]
ImatrixFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--imatrix",
        help="An importance matrix (GGUF or .dat), instead of calibrating; several are merged.",
        show_default=False,
    ),
]
ImatrixMissing = Annotated[
    str,
    typer.Option(
        "--imatrix-missing", metavar="plain|refuse",
        help="A weight without data in it: plain quantizes without importance and notes it.",
    ),
]  # fmt: skip
Measure = Annotated[
    bool, typer.Option("--measure/--no-measure", help="Measure the result against the original.")
]
