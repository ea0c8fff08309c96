"""What ``bitmill run`` and ``bitmill summarize`` share: options of a model that runs, lines at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli import say
from bitmill.cli.progress import Teller

if TYPE_CHECKING:
    from bitmill.run.ready import Ready
    from bitmill.run.speak import Speaker

LONG = 1024  # tokens of a prompt whose reading is shown

Context = Annotated[
    int | None,
    typer.Option(
        "--context", "-c", "--ctx-size", min=1,
        help="The most tokens of prompt and answer together. [default: what the model was trained for]",
        show_default=False,
    ),
]  # fmt: skip
Chunk = Annotated[
    int,
    typer.Option("--chunk", "--ubatch-size", min=1, help="Tokens of a prompt that are read at once."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", "--torch-dtype", metavar="f32|bf16|f16",
        help="What weights are decoded to and computed in. [default: f32 on a CPU, else bf16]",
        show_default=False,
    ),
]  # fmt: skip
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", "--temp", min=0,
        help="0 takes the likeliest token. [default: as the model's authors say, else 0]", show_default=False,
    ),
]  # fmt: skip
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k", min=0, help="Draw from so many of the likeliest; 0 is all.", show_default=False
    ),
]  # fmt: skip
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", max=1, help="Draw from the likeliest that have this chance together.", show_default=False
    ),
]  # fmt: skip
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p", min=0, max=1, help="Draw from those with this share of the likeliest's chance.",
        show_default=False,
    ),
]  # fmt: skip
Repeat = Annotated[
    float | None,
    typer.Option(
        "--repeat-penalty", "--repetition-penalty", help="Above 1, words the answer has become less likely.",
        show_default=False,
    ),
]  # fmt: skip
DrawSeed = Annotated[int, typer.Option("--seed", min=0, help="Of the draws; the same seed, the same words.")]


def shown(text: str) -> str:
    """A model's words for standard output: on a terminal without the characters that command it."""
    if not sys.stdout.isatty():
        return text
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))


class Screen:
    """Shows how far reading is, where that takes long, and then the words as they come."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._teller: Teller | None = None

    def tell(self, event: str, done: int, total: int, text: str) -> None:
        """A step of reading."""
        if self._teller is None and total >= LONG:
            self._teller = self._open.enter_context(Teller())
        if self._teller is not None:
            self._teller(event, done, total, text)

    def hear(self, text: str) -> bool:
        """Put a piece of an answer onto standard output at once; it is never enough."""
        self.close()
        typer.echo(shown(text), nl=False)
        sys.stdout.flush()
        return False

    def close(self) -> None:
        """Take the bar away."""
        self._open.close()
        self._teller = None


def memory(ready: Ready, speaker: Speaker, held: tuple[int, int] | None = None) -> dict[str, Any]:
    """What weights and cache take, and what was predicted of the cache.

    Args:
        held: bytes and tokens of the cache; what it holds now unless given.
    """
    from bitmill.advise.running import cache_prediction
    from bitmill.run.memory import peak_bytes

    bytes_, tokens = held or (speaker.held_bytes, speaker.held_tokens)
    opened = ready.opened
    return {
        "weights": {"file_bytes": opened.file_bytes, "bytes": ready.weight_bytes, "dtype": ready.dtype},
        "cache": {
            "kv": speaker.kv,
            "tokens": tokens,
            "bytes": bytes_,
            "predicted_bytes": cache_prediction(
                opened.checkpoint.config, speaker.kv, tokens, packed=speaker.packed
            ),
        },
        "process_peak_bytes": peak_bytes(),
    }


def memory_line(found: dict[str, Any]) -> str:
    """``weights 538.1 MB in memory as f32 (94.4 MB in the file), cache 3.5 MB (f32, 154 tokens; …)``."""
    weights, cache, peak = found["weights"], found["cache"], found["process_peak_bytes"]
    predicted = cache["predicted_bytes"]
    known = "not predicted" if predicted is None else f"predicted {say.size(predicted)}"
    most = "" if peak is None else f", process at most {say.size(peak)}"
    file, held = say.size(weights["file_bytes"]), say.size(weights["bytes"])
    return (
        f"memory: weights {held} as {weights['dtype']} ({file} in the file), "
        f"cache {say.size(cache['bytes'])} as {cache['kv']} for {cache['tokens']:,} tokens ({known}){most}"
    )


def rates(found: dict[str, Any]) -> str:
    """``read 34 tokens in 0.5 s (65.4 tokens/s), wrote 120 in 9.1 s (13.2 tokens/s)``."""
    seconds, speed = found["seconds"], found["tokens_per_second"]
    again = f", {found['reused_tokens']:,} more were there" if found["reused_tokens"] else ""
    write = f" ({speed['write']:.1f} tokens/s)" if speed["write"] is not None else ""
    return (
        f"read {found['prompt_tokens'] - found['reused_tokens']:,} tokens in {seconds['read']:.1f} s "
        f"({speed['read']:.1f} tokens/s){again}; wrote {found['answer_tokens']:,} in "
        f"{seconds['last'] - seconds['read']:.1f} s{write}"
    )


STOPPED = {
    "end": "the model ended its answer",
    "max-tokens": "stopped at --max-tokens",
    "context": "stopped: the context is full",
    "enough": "stopped: that was enough",
}
"""Why an answer is over, for a reader."""


def last_lines(lines: Sequence[str]) -> None:
    """Lines about a run, dim on a terminal, plain elsewhere; to standard error."""
    for line in lines:
        say.note(typer.style(line, dim=True) if sys.stderr.isatty() else line)
