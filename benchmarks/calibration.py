"""How much calibration text, and of which kind: loss in and out of the calibration's own domain.

One recipe, many calibration sets: text that the model writes itself, Python's manual, library
source code, and mixtures, from 8 to 64 thousand tokens. A method tuned on one kind of text looks
better on that kind than it is.

    python benchmarks/calibration.py [--windows 16 32 64 128] [--recipe RECIPE] [--work FOLDER] [--reuse]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from compare import Bench, arguments, bench, machine, signature
from ruler import CODE_MODULES, WINDOW, documents, windows, write_json
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

import bitmill
from bitmill.calibrate.sample import sample_text
from bitmill.calibrate.tokens import calibration_tokens
from bitmill.core.axes import Checkpoint

MIXTURES = {
    "own": ("own",),
    "docs": ("docs",),
    "code": ("code",),
    "own + docs": ("own", "docs"),
    "own + code": ("own", "code"),
    "own + docs + code": ("own", "docs", "code"),
    "default": ("default",),
}
LIBRARY = (
    "ast",
    "_pydecimal",
    "doctest",
    "email.message",
    "inspect",
    "ipaddress",
    "mailbox",
    "smtplib",
    "pprint",
)
NOTES = """The same recipe (`{recipe}`) calibrated on each set of windows of 512 tokens. `own` is sampled from
the model itself, `docs` are the even topics of Python's manual, `code` is library source code, `default` is
what Bitmill takes when no text is named. KLD in nats on two kinds of evaluation text that no set holds: odd
topics of the manual, and source code of other modules mixed with package pages."""


def sources(work: Path, model: Path, tokens: int, kinds: set[str]) -> dict[str, Tensor]:
    """The most windows of each kind of text that any set needs."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    count = tokens // WINDOW
    source = bitmill.open_source(str(model))
    made: dict[str, Callable[[], Tensor]] = {
        "own": lambda: _up_to(tokenizer, _own(work / "own-words.txt", source, tokens * 5 // 4), count),
        "docs": lambda: _up_to(tokenizer, documents()["calibration"], count),
        "code": lambda: _up_to(tokenizer, _library(), count),
        "default": lambda: _default(source, count),
    }
    return {kind: made[kind]() for kind in sorted(kinds)}


def _own(kept: Path, source: Checkpoint, tokens: int) -> str:
    """Text of the model itself, kept: sampling it takes minutes."""
    if not kept.is_file():
        kept.write_text(sample_text(source, tokens=tokens, seed=0).plain, encoding="utf-8")
    return kept.read_text(encoding="utf-8")


def _default(source: Checkpoint, count: int) -> Tensor:
    drawn = {"nsamples": count, "seqlen": WINDOW, "seed": 0, "chat": False}
    found = calibration_tokens(source, None, **drawn, progress=lambda *_: None).tokens
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


def _up_to(tokenizer: Any, text: str, count: int) -> Tensor:
    have = len(tokenizer(text, add_special_tokens=False)["input_ids"]) // WINDOW
    return windows(tokenizer, text, min(count, have))


def _library() -> str:
    """Sources of modules that the evaluation does not hold."""
    assert not set(LIBRARY) & set(CODE_MODULES)
    return "\n\n".join(inspect.getsource(import_module(name)) for name in LIBRARY)


def drawn_from(texts: Mapping[str, Tensor], kinds: tuple[str, ...], count: int) -> Tensor | None:
    """``count`` windows in equal shares of ``kinds``; None where a text is too short for its share."""
    shares = [count // len(kinds) + (i < count % len(kinds)) for i in range(len(kinds))]
    if any(texts[kind].shape[0] < share for kind, share in zip(kinds, shares, strict=True)):
        return None
    return torch.cat([texts[kind][:share] for kind, share in zip(kinds, shares, strict=True)])


def run(ours: Bench, recipe: str, counts: list[int], mixtures: list[str]) -> None:
    """One row a set; each set's tokens are kept beside its result."""
    kinds = {kind for name in mixtures for kind in MIXTURES[name]}
    texts = sources(ours.work, ours.model, max(counts) * WINDOW, kinds)
    for name in mixtures:
        for count in counts:
            ids = drawn_from(texts, MIXTURES[name], count)
            if ids is None:
                print(f"{name}: less than {count} windows of text", flush=True)
                continue
            save_file({"input_ids": ids}, ours.work / "set.safetensors")
            ours.tokens = ours.work / "set.safetensors"
            row = ours.bitmill(recipe, f"calibration {name} {count}")
            row |= {"text": name, "tokens": ids.numel()}


def table(rows: list[dict[str, Any]]) -> str:
    """Text and count against KLD in and out of domain."""
    lines = [
        "| text | tokens | KLD docs | KLD other | ppl docs | ppl other | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        docs, other = row["scores"]["docs"], row["scores"]["other"]
        lines.append(
            f"| {row['text']} | {row['tokens']:,} | {docs['mean_kld']:.4f} | {other['mean_kld']:.4f} "
            f"| {docs['perplexity']:.2f} | {other['perplexity']:.2f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run every set at every size."""
    parser = arguments(__doc__)
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--only", nargs="+", choices=list(MIXTURES), default=list(MIXTURES))
    parser.add_argument("--recipe", default="gptq : int4-g64-asym > bitmill")
    options = parser.parse_args()
    ours = bench(options)
    run(ours, options.recipe, options.windows, options.only)
    about = {**machine(), "threads": ours.threads}
    write_json(
        ours.evidence / "calibration.json", {"about": about, "recipe": options.recipe, "rows": ours.rows}
    )
    text = "\n\n".join(
        ["# Calibration text", NOTES.format(recipe=options.recipe), table(ours.rows), signature(about)]
    )
    (ours.evidence / "calibration.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
