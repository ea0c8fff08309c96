"""``bitmill run``: a model answers, whatever file it is in."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli import say
from bitmill.cli.options import Device, Json, Revision
from bitmill.cli.progress import quiet
from bitmill.cli.speaking import (
    STOPPED,
    Chunk,
    Context,
    DrawSeed,
    Dtype,
    MinP,
    Repeat,
    Screen,
    Temperature,
    TopK,
    TopP,
    last_lines,
    memory,
    memory_line,
    rates,
)
from bitmill.core.errors import BitmillError, Refused

if TYPE_CHECKING:
    from bitmill.run.chat import Conversation
    from bitmill.run.draw import Sampling
    from bitmill.run.ready import Opened
    from bitmill.run.speak import Speaker

COMMANDS = "/new starts over, Ctrl-C stops an answer, Ctrl-D ends"


Text = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT",
        help="What to say; - reads it from standard input. Without it, on a terminal: turn after turn.",
        show_default=False,
    ),
]
Document = Annotated[
    Path | None,
    typer.Option(
        "--file", "-f",
        help="A .txt, .md, .html or .pdf file that stands before the prompt.", show_default=False,
    ),
]  # fmt: skip
System = Annotated[
    str | None,
    typer.Option("--system", "-sys", help="A text for the template's system turn.", show_default=False),
]
Plain = Annotated[
    bool, typer.Option("--plain", "--raw", help="Continue the prompt as it is, without chat template.")
]
Kv = Annotated[
    str | None,
    typer.Option(
        "--kv", "--kv-cache-dtype", metavar="METHOD",
        help="What keys and values are kept as: turboquant-3.5, q4_0-rot, kivi-2, k=q8_0,v=q4_0 … "
        "(docs/caches.md). [default: what the file says, or what the model computes in]", show_default=False,
    ),
]  # fmt: skip
Most = Annotated[
    int,
    typer.Option(
        "--max-tokens", "-n", "--predict", "--max-new-tokens", min=1, help="The most tokens of an answer."
    ),
]


def run(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A quantized file or folder, a plain model folder, a hub id or smollm2.",
            show_default=False,
        ),
    ],
    prompt: Text = None,
    document: Document = None,
    system: System = None,
    plain: Plain = False,
    kv: Kv = None,
    context: Context = None,
    most: Most = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repeat: Repeat = None,
    seed: DrawSeed = 0,
    chunk: Chunk = 512,
    dtype: Dtype = None,
    device: Device = "cpu",
    revision: Revision = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Run a model: FILE answers PROMPT.

    Any file or folder that bitmill reads. The weights are decoded into memory and computed with as they are
    stored, so that the words are what the quantized model says; speed is not what its own runtime has. The
    answer streams to standard output; speed and memory follow on standard error.

        bitmill run q4.gguf "Why is the sky blue?"
        bitmill run ./model-w4a16 "Say it in one sentence." --file paper.md --temperature 0.7 --seed 1
        echo "2 + 2?" | bitmill run smollm2 - --json
        bitmill run smollm2
    """
    from bitmill.run.chat import Conversation
    from bitmill.run.draw import sampling_of
    from bitmill.run.kept import kept_as, new_cache
    from bitmill.run.ready import dtype_of, loaded, opened
    from bitmill.run.speak import Speaker

    quiet()
    text = _prompt(prompt, document, json)
    model = opened(file, revision)
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repeat": repeat}
    sampling = sampling_of(model.authors, seed, **asked)
    talk = Conversation(model.tokenizer, system, plain)
    kind = dtype_of(dtype, device)
    kv, held = kept_as(kv, model.checkpoint)
    new_cache(kv or kind, model.config, kind)
    if text is not None:
        text = _with_document(text, document, model)
        _check(text, talk, model, context)
    how = _How(sampling, most, json)
    speaker = Speaker(loaded(model, dtype, device, held=held), kv, context=context, chunk=chunk)
    if text is None:
        _chat(speaker, talk, how)
    else:
        _once(speaker, talk, text, how)


@dataclass(frozen=True)
class _How:
    """How answers are made and shown."""

    sampling: Sampling
    most: int
    json: bool


def _prompt(prompt: str | None, document: Path | None, json: bool) -> str | None:
    """What is said, or None for turn after turn."""
    if prompt == "-":
        prompt = sys.stdin.read()
    if prompt is not None:
        if not prompt.strip():
            raise Refused("the prompt is empty", fix="say something")
        return prompt
    if document is not None:
        fix = f"add a prompt ('What does it say?'), or: bitmill summarize {document} MODEL"
        raise Refused("nothing is asked about the document", fix=fix)
    if json or not sys.stdin.isatty():
        raise Refused("there is no prompt", fix="give it as an argument, or - to read standard input")
    return None


def _with_document(text: str, document: Path | None, model: Opened) -> str:
    """The document, whose control words are ordinary ones, before what is said."""
    from bitmill.run.chat import defused
    from bitmill.run.document import read_document

    if document is None:
        return text
    found, control = defused(read_document(document).text, model.tokenizer)
    for word, count in control.items():
        say.note(f"note: {document.name} says {word!r} {count} times: to the model these are ordinary words")
    return f"{found}\n\n{text}"


def _check(text: str, talk: Conversation, model: Opened, context: int | None) -> None:
    """Refuse what does not fit before any weight is read."""
    from bitmill.run.speak import check_room, context_of

    check_room(len(talk.ask(text)[0]), context_of(model, context), model.trained)


def _once(speaker: Speaker, talk: Conversation, text: str, how: _How) -> None:
    said = _answer(speaker, talk, text, how)
    found = {
        "model": str(speaker.ready.opened.checkpoint.path),
        **said,
        "template": not talk.plain,
        "sampling": vars(how.sampling),
        "load_seconds": speaker.ready.seconds,
        "memory": memory(speaker.ready, speaker),
    }
    if how.json:
        say.emit(found)
        return
    if talk.plain:
        last_lines(["no chat template: the prompt was continued as it is"])
    loading = f"loaded in {speaker.ready.seconds:.1f} s; "
    last_lines([loading + _line(said, how), memory_line(found["memory"])])


def _answer(speaker: Speaker, talk: Conversation, text: str, how: _How) -> dict[str, Any]:
    """Read, speak and stream."""
    from bitmill.run.speak import to_json

    ids, _ = talk.ask(text)
    with closing(Screen()) as screen:
        read = speaker.read(ids, screen.tell)
        screen.close()
        spoken = speaker.speak(read, how.sampling, how.most, None if how.json else screen.hear)
    if not how.json:
        say.result()
    talk.answered(text, spoken.text)
    return to_json(read, spoken)


def _line(said: dict[str, Any], how: _How) -> str:
    return f"{rates(said)}; {STOPPED[said['stopped']]}; {how.sampling}"


def _chat(speaker: Speaker, talk: Conversation, how: _How) -> None:
    """Turn after turn, until the input ends."""
    import readline  # noqa: F401 - arrows and history while typing

    if talk.plain:
        why = "--plain has no turns" if speaker.ready.opened.tokenizer.chat_template else "no chat template"
        raise Refused(f"{why}: a conversation needs one", fix="give a prompt, which is continued as it is")
    last_lines([f"{speaker.ready.opened.name}: {COMMANDS}"])
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            say.result()
            break
        if text == "/new":
            talk.forget()
            speaker.forget()
        elif text.startswith("/"):
            say.note(f"{text.split()[0]} is no command: {COMMANDS}")
        elif text:
            _turn(speaker, talk, text, how)
    last_lines([memory_line(memory(speaker.ready, speaker))])


def _turn(speaker: Speaker, talk: Conversation, text: str, how: _How) -> None:
    """One turn; what goes wrong with it does not end the conversation."""
    try:
        last_lines([_line(_answer(speaker, talk, text, how), how)])
    except BitmillError as error:
        say.note(f"bitmill: {error}")
    except KeyboardInterrupt:
        speaker.forget()
        say.result()
        say.note("stopped; this turn is forgotten")
