"""Our files in llama.cpp: perplexity there beside our own, what it says, and time beside its own quantizer.

    python benchmarks/llama_cpp_runtime.py [--types Q4_K_M ...] [--work FOLDER] [--reuse]

Needs llama-cpp-python (tests/oracles/requirements-llama_cpp.txt), whose library holds llama.cpp's quantizer.
Both sides start from the same single-precision GGUF file of the wide model, use the same importance matrix
and as many threads, and each is a process of its own.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from bench_llamacpp import linears
from compare import HERE, Bench, arguments, bench, machine, signature
from ruler import WINDOW, Ruler, write_json

from bitmill.checkpoint.imatrix import Imatrix, read_imatrix
from bitmill.containers.gguf import MIXTURES

TYPES = ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ3_XXS", "IQ2_M", "IQ2_XXS")
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
WORDS = 24
NOTES = """SmolLM2-135M off its 4-bit grid, widened: rows are multiples of 256. `ours`: perplexity on the
ruler's two texts by transformers over the weights of the file, embedding and head among them; `there`: on
the same tokens by llama.cpp, whose products round activations to 8 bits. `same bytes`: tensors that are the
same in our file and in llama.cpp's own. `seconds`: whole command, reading the source and writing the file,
{threads} threads and the same importance matrix; in parentheses llama.cpp's own quantizer
(`llama_model_quantize`)."""


def perplexity(model: llama_cpp.Llama, tokens: torch.Tensor) -> float:
    """Over the second half of every window ``n 512``, as the ruler has it."""
    loss, count = 0.0, 0
    for window in tokens:
        model.reset()
        model.eval(window.tolist())
        logits = torch.from_numpy(np.array(model.scores[WINDOW // 2 : WINDOW - 1]))
        wanted = window[WINDOW // 2 + 1 :]
        loss -= float(logits.log_softmax(-1).gather(1, wanted[:, None]).double().sum())
        count += len(wanted)
    return math.exp(loss / count)


def importance(matrix: Imatrix) -> tuple[object, object]:
    """An importance matrix as llama.cpp's library takes it, and what must stay alive while it is used."""
    values = {name: entry.mean_square.contiguous().numpy() for name, entry in matrix.entries.items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, means) in zip(entries, values.items(), strict=False):
        entry.name, entry.size = name.encode(), means.size
        entry.data = means.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries, values


def theirs(source: str, target: str, kind: str, imatrix: str, threads: int) -> float:
    """Seconds of llama.cpp's own quantizer."""
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.nthread, wanted.ftype = threads, MIXTURES[kind]
    entries, _alive = importance(read_imatrix(Path(imatrix)))
    wanted.imatrix = ctypes.cast(entries, type(wanted.imatrix))
    before = time.monotonic()
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(wanted))
    if code:
        raise RuntimeError(f"llama_model_quantize says {code}")
    return time.monotonic() - before


def same_tensors(ours: Path, theirs: Path) -> list[int]:
    """How many tensors have the same type and the same bytes in both files, and how many there are."""
    one, other = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (ours, theirs))
    same = [
        one[name].tensor_type == other[name].tensor_type and bool((one[name].data == other[name].data).all())
        for name in one.keys() & other.keys()
    ]
    return [sum(same), len(one.keys() | other.keys())]


def row(both: Bench, ruler: Ruler, kind: str, source: Path, imatrix: Path) -> dict[str, Any]:
    """One type: made by both, run by llama.cpp, scored by the ruler."""
    out = both.work / "results" / f"runtime {kind}"
    kept = out / "row.json"
    if both.reuse and kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    target = out / "model.gguf"
    own = ("-m", "bitmill", "quantize", str(source), kind, "-o", str(target), "--force", "--no-measure")
    other = (__file__, "--theirs", str(source), str(out / "theirs.gguf"), kind, str(imatrix))
    seconds = {
        "theirs": _timed(both, *other),
        "ours": _timed(both, *own, "--imatrix", str(imatrix)),
    }
    _, bpw = linears(target, ruler.model.config)
    scores = ruler.score_file(target)
    model = llama_cpp.Llama(
        str(target), n_ctx=WINDOW, n_batch=WINDOW, n_threads=both.threads, logits_all=True, verbose=False
    )
    found = {
        "type": kind,
        "bpw_linears": bpw,
        "same_bytes": same_tensors(target, out / "theirs.gguf"),
        "seconds": seconds,
        "ours": {text: score.perplexity for text, score in scores.items()},
        "there": {text: perplexity(model, tokens) for text, tokens in ruler.tokens.items()},
        "says": model(PROMPT, max_tokens=WORDS, temperature=0.0)["choices"][0]["text"],
    }
    write_json(kept, found)
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """One line a type, and what each says."""
    lines = [
        "| | bpw of linears | docs: ours | there | other: ours | there | same bytes | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    said = []
    for found in rows:
        cells = [found["type"], f"{found['bpw_linears']:.2f}"]
        for text in ("docs", "other"):
            ours, there = found["ours"][text], found["there"][text]
            cells += [f"{ours:.3f}", f"{there:.3f} ({100 * (there / ours - 1):+.2f} %)"]
        cells.append("{} of {}".format(*found["same_bytes"]))
        cells.append(f"{found['seconds']['ours']:.1f} ({found['seconds']['theirs']:.1f})")
        lines.append(f"| {' | '.join(cells)} |")
        said.append(f"- {found['type']}: {' '.join(found['says'].split())}")
    return "\n".join([*lines, "", "Asked for the capital of France, greedily, llama.cpp goes on:", "", *said])


def main() -> None:
    """Make, run and score every type."""
    if "--theirs" in sys.argv:
        source, target, kind, matrix = sys.argv[sys.argv.index("--theirs") + 1 :]
        theirs(source, target, kind, matrix, int(os.environ["OMP_NUM_THREADS"]))
        return
    parser = arguments(__doc__)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    options = parser.parse_args()
    both = bench(options)
    ruler = Ruler(both.wide_model, both.work / "ruler-wide.safetensors")
    folder, facts = both.run_bitmill(both.wide_model, "nearest : f32 > gguf", "wide f32", "--plain")
    imatrix = both.work / "results" / "wide.imatrix.gguf"
    if not imatrix.is_file():
        _timed(both, "-m", "bitmill", "imatrix", str(both.wide_model), "-o", str(imatrix), "--nsamples", "16")
    rows = [row(both, ruler, kind, folder / facts["file"], imatrix) for kind in options.types]
    about = {**machine(), "threads": both.threads}
    write_json(both.evidence / "llama_cpp.json", {"about": about, "rows": rows})
    text = "\n\n".join(["# In llama.cpp", NOTES.format(threads=both.threads), table(rows), signature(about)])
    (both.evidence / "llama_cpp.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def _timed(both: Bench, *command: str) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": str(both.threads), "NUMBA_NUM_THREADS": str(both.threads)}
    before = time.monotonic()
    subprocess.run(
        [sys.executable, *command], check=True, env=environment, cwd=HERE, stdout=subprocess.DEVNULL
    )
    return time.monotonic() - before


if __name__ == "__main__":
    main()
