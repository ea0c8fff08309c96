"""Measure what quantization cost: both models over the same windows, block by block, every position scored.

The protocol is llama.cpp's: windows of 512, the second half scored, so that every prediction has 256 tokens
of context. Memory is a block of each model, the hidden states of a wave of 16 windows and a few positions'
logits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bitmill.caching import said_of_cache
from bitmill.calibrate.corpus import Text, default_evaluation, load_texts
from bitmill.calibrate.stream import Block, Stream
from bitmill.calibrate.windows import Windows, overlap, tokenizer_of, windows
from bitmill.checkpoint.stored_types import unread
from bitmill.core.axes import Checkpoint, inputs_of
from bitmill.core.errors import Refused
from bitmill.core.types import Note
from bitmill.measurement.logits import Ids, Positions, Scores, Summary, rows_at_once, summarize
from bitmill.measurement.record import Record, Side, calibration_of, size_of
from bitmill.measurement.states import Kept, States
from bitmill.measurement.tensors import tensor_table
from bitmill.source import open_source

Progress = Callable[[str, int, int, str], None]

WAVE = 16  # windows that go through the blocks together
MICRO = 4  # windows a forward pass carries
KEPT_BYTES = 1_500_000_000  # a model below this stays in memory; above, blocks are read again for every wave
HEAD_BYTES = 600_000_000  # embedding and head stay in memory below this
FLOOR_NOISE = 2.0**-9  # relative: what rounding to bfloat16 does to a number
FLOOR_WINDOWS = 2  # of each kind


class NothingMeasured(Refused):
    """There was no text, or no position where both models gave numbers: not a pass, and not a failure."""


@dataclass(frozen=True)
class Protocol:
    """How positions are chosen and scored.

    Attributes:
        window: tokens a window.
        count: windows of each kind of text.
        scored: ``second half`` or ``all``.
        chat: put plain documents through the chat template.
        seed: of the bootstrap and of the noise floor.
        floor: whether to measure the reference against itself under rounding-scale noise.
    """

    window: int = 512
    count: int = 12
    scored: str = "second half"
    chat: bool = False
    seed: int = 0
    floor: bool = True

    def first(self) -> int:
        """Index inside a window of the first position whose prediction is scored."""
        if self.scored not in ("second half", "all"):
            raise Refused(f"cannot score {self.scored!r}", fix="second half, or all")
        if self.window < 4:
            raise Refused(f"a window of {self.window} tokens is too short", fix="512 is usual")
        return self.window // 2 if self.scored == "second half" else 0


def measure(
    quantized: str | Checkpoint,
    against: str | Checkpoint,
    *,
    texts: Sequence[Text] | Sequence[str] | None = None,
    protocol: Protocol | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Record:
    """Measure one file against its original.

    Args:
        quantized, against: anything :func:`~bitmill.source.open_source` takes, or open checkpoints.
        texts: texts, or their names (see :func:`~bitmill.calibrate.corpus.load_texts`); the default is
            four kinds.
        progress: called as ``progress(event, done, total, text)``.

    Raises:
        Refused: the models do not belong together, or there is less text than one window.
        NothingMeasured: there is no text, or no position has finite logits.
    """
    return measure_all(
        [quantized], against, texts=texts, protocol=protocol, device=device, progress=progress
    )[0]


def measure_all(
    quantized: Sequence[str | Checkpoint],
    against: str | Checkpoint,
    *,
    texts: Sequence[Text] | Sequence[str] | None = None,
    protocol: Protocol | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> tuple[Record, ...]:
    """Measure several files on the same positions, the original once; see :func:`measure`.

    Args:
        kept: where the original's states are kept for the next call; without files they are kept, and no
            more.
    """
    started = time.monotonic()
    how, tell = protocol or Protocol(), progress or (lambda *_: None)
    how.first()
    reference = _opened(against)
    files = [_opened(q) for q in quantized]
    tokenizer = tokenizer_of(reference)
    read = _texts(texts)
    notes = [_compatible(reference, tokenizer, file, read) for file in files]
    corpus = _windows(tokenizer, read, how)
    passes = _Passes(reference, files, corpus, how, device, tell, kept)
    scores = passes.run()
    floor = passes.floor() if how.floor else None
    records = []
    for file, score, said in zip(files, scores, notes, strict=True):
        table = tensor_table(file, reference, lambda done, total: tell("tensors", done, total, ""))
        positions = score.positions()
        kinds = _kinds(read, corpus)
        pooled, by_kind = _summaries(positions, kinds, how.seed, file)
        if not table.same_basis:
            said = (*said, _FOLDED)
        said = (*said, *_rounding(file))
        seen, origin = calibration_of(file.path)
        records.append(
            Record(
                quantized=Side.of(file),
                reference=Side.of(reference),
                protocol=vars(how),
                corpus=corpus.facts,
                summary=pooled,
                kinds=by_kind,
                floor=floor,
                bytes_=size_of(file.path),
                bytes_reference=size_of(reference.path),
                table=table,
                overlap=_overlaps(seen, corpus, kinds),
                calibration=origin,
                notes=(*said, *corpus.notes),
                seconds=time.monotonic() - started,
                positions=positions,
                tokens=corpus.tokens,
                kind_of_window=tuple(kinds),
                decode=_decoder(tokenizer),
                choices=tuple(score.worst),
            )
        )
    return tuple(records)


def text_windows(
    reference: Checkpoint, texts: Sequence[Text] | Sequence[str] | None, protocol: Protocol
) -> Windows:
    """The windows that :func:`measure_all` reads for these arguments, and what is known about them."""
    return _windows(tokenizer_of(reference), _texts(texts), protocol)


_FOLDED = Note(
    "basis",
    "tensors",
    "its norms are not the original's: scales, rotations or permutations were folded into the weights, "
    "so that errors tensor by tensor say nothing",
)


def _rounding(file: Checkpoint) -> tuple[Note, ...]:
    """What the file says of its linears' inputs, which this measurement then did."""
    kinds = Counter(str(how) for how in inputs_of(file).values())
    told = [
        Note("inputs", str(file.path), f"inputs of {count} linears are rounded to {kind}, as the file says")
        for kind, count in kinds.most_common()
    ]
    rest = (("cache", said_of_cache(file)), ("inputs", unread(file)))
    return (*told, *(Note(kind, str(file.path), said) for kind, said in rest if said))


def _opened(model: str | Checkpoint) -> Checkpoint:
    return open_source(model) if isinstance(model, str) else model


def _texts(texts: Sequence[Text] | Sequence[str] | None) -> tuple[Text, ...]:
    if texts is None:
        return default_evaluation()
    read = tuple(t for given in texts for t in ((given,) if isinstance(given, Text) else load_texts([given])))
    if not read or all(t.empty for t in read):
        raise NothingMeasured("there is no text to measure on", fix="name a file with --text")
    return read


def _windows(tokenizer: PreTrainedTokenizerFast, read: Sequence[Text], how: Protocol) -> Windows:
    """The first windows of every text: ``how.count`` of each kind, texts of one kind sharing them."""
    groups: dict[str, list[Text]] = {}
    for text in read:
        groups.setdefault(text.kind, []).append(text)
    ordered = [t for group in groups.values() for t in group]
    weights = [t.weight / sum(u.weight for u in groups[t.kind]) for t in ordered]
    equal = [
        Text(t.kind, t.name, t.documents, t.conversations, t.licence, w)
        for t, w in zip(ordered, weights, strict=True)
    ]
    return windows(tokenizer, equal, how.window, how.count * len(groups), seed=None, chat=how.chat)


def _compatible(
    reference: Checkpoint, tokenizer: PreTrainedTokenizerFast, file: Checkpoint, read: Sequence[Text]
) -> tuple[Note, ...]:
    """Refuse models over different vocabularies; note a tokenizer that cuts the texts differently."""
    sizes = [c.config.get("vocab_size") for c in (file, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise Refused(
            f"vocabularies of {sizes[0]} and {sizes[1]} tokens cannot be compared",
            where=str(file.path),
            fix="measure a file against the model it was made from",
        )
    try:
        other = tokenizer_of(file)
    except Refused:
        return (Note("tokenizer", str(file.path), "the file carries no tokenizer; the reference's was used"),)
    if other.get_vocab() != tokenizer.get_vocab():
        raise Refused(
            "the two models have different tokenizers",
            where=str(file.path),
            fix="measure a file against the model it was made from",
        )
    for text in read:
        sample = text.plain[:20_000]
        ids = [t(sample, add_special_tokens=False, verbose=False)["input_ids"] for t in (other, tokenizer)]
        if ids[0] != ids[1]:
            said = f"the file's tokenizer cuts {text.name!r} differently; the reference's was used"
            return (Note("tokenizer", str(file.path), said),)
    return ()


def _kinds(read: Sequence[Text], corpus: Windows) -> list[str]:
    """Kind of each window."""
    names = [source["kind"] for source in corpus.facts["sources"]]
    return [names[i] for i in corpus.origin]


def _summaries(
    positions: Positions, kinds: Sequence[str], seed: int, file: Checkpoint
) -> tuple[Summary, dict[str, Summary]]:
    order = list(dict.fromkeys(kinds))
    stratum: Ids = np.array([order.index(k) for k in kinds])
    if not positions.finite.any():
        raise NothingMeasured(
            f"none of {len(positions.kld)} positions has finite logits",
            where=str(file.path),
            fix="the file is damaged, or was quantized from a model that overflows",
        )
    found = {}
    for index, kind in enumerate(order):
        part = positions.kept(stratum[positions.window] == index)
        if part.finite.any():
            found[kind] = summarize(part, seed=seed)
    return summarize(positions, stratum, seed), found


def _overlaps(seen: str | None, corpus: Windows, kinds: Sequence[str]) -> dict[str, float | None] | None:
    """Share of each kind's 13-token phrases that the calibration text held; None where that is unknown."""
    if seen is None:
        return None
    found: dict[str, float | None] = {}
    for kind in dict.fromkeys(kinds):
        rows = torch.tensor([k == kind for k in kinds])
        try:
            found[kind] = overlap(seen, corpus.tokens[rows])
        except ValueError:
            return None
    return found


def _decoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[Sequence[int]], str]:
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


class _Runner:
    """One model, run wave by wave; kept in memory when it is small."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        self._source = checkpoint
        self._outside: dict[str, Tensor] = {}
        self.stream = Stream(checkpoint, device, read=self._read)
        size = sum(int(np.prod(t.shape)) for t in checkpoint.tensors.values()) * 4
        self._blocks: dict[int, Block] | None = {} if size < KEPT_BYTES else None

    def _read(self, name: str) -> Tensor:
        if name.startswith(f"{self.stream.layers_path}."):
            return self._source.read(name)
        if name not in self._outside:
            value = self._source.read(name)
            if value.numel() * value.itemsize > HEAD_BYTES:
                return value
            self._outside[name] = value
        return self._outside[name]

    def hidden(self, tokens: Tensor, after: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Hidden states ``n T H`` after the last block, before the final norm."""
        hidden = self.stream.embed(tokens)
        for index in range(self.stream.layers):
            block = self._block(index)
            hidden = block.run(hidden, MICRO)
            if after is not None:
                hidden = after(hidden)
        return hidden

    def _block(self, index: int) -> Block:
        if self._blocks is None:
            return self.stream.block(index)
        if index not in self._blocks:
            self._blocks[index] = self.stream.block(index)
        return self._blocks[index]


class _Passes:
    """All models over all windows."""

    def __init__(
        self,
        reference: Checkpoint,
        files: Sequence[Checkpoint],
        corpus: Windows,
        how: Protocol,
        device: str,
        tell: Progress,
        kept: Kept | None = None,
    ) -> None:
        self._reference = _Runner(reference, device)
        self._files = [_Runner(file, device) for file in files]
        self._corpus, self._how, self._tell, self._kept = corpus, how, tell, kept
        self._identity = {
            "model": reference.digest,
            "tokens": corpus.facts["sha256"],
            "first": how.first(),
            "device": device,
            "versions": [version("torch"), version("transformers"), version("bitmill")],
        }
        width = self._reference.stream.hidden_size
        shape = (len(corpus.tokens), corpus.tokens.shape[1] - how.first() - 1, width)
        self._known = None if kept is None else kept.read(self._identity, shape, how.seed)

    def run(self) -> list[Scores]:
        """Scores of every file, in the order of the windows."""
        scores = [Scores() for _ in self._files]
        tokens = self._corpus.tokens
        found: list[Tensor] = []
        for a in range(0, len(tokens) if self._files or self._known is None else 0, WAVE):
            self._tell("measure", a, len(tokens), "windows")
            wave = tokens[a : a + WAVE]
            if self._known is not None:
                truth = self._known.hidden[a : a + WAVE].to(self._reference.stream.device)
            else:
                truth = self._inside(self._reference.hidden(wave))
                found += [truth.cpu()] if self._kept is not None else []
            self._score(wave, a, truth, [(f, self._inside(f.hidden(wave))) for f in self._files], scores)
        if found:
            self._keep(States(torch.cat(found)))
        self._tell("measure", len(tokens), len(tokens), "windows")
        return scores

    def _keep(self, states: States) -> None:
        self._known = states
        if self._kept is not None:
            self._kept.write(self._identity, states, self._how.seed)

    def _inside(self, hidden: Tensor) -> Tensor:
        """The positions whose prediction is scored."""
        return hidden[:, self._how.first() : -1]

    def floor(self) -> Mapping[str, Any]:
        """The reference against itself, its hidden states jogged by a bfloat16's rounding after every
        block."""
        if self._known is not None and self._known.floor is not None:
            return self._known.floor
        origin = np.array(self._corpus.origin)
        chosen = np.concatenate([np.flatnonzero(origin == i)[:FLOOR_WINDOWS] for i in np.unique(origin)])
        generator = torch.Generator().manual_seed(self._how.seed)
        scores = [Scores()]

        def jog(hidden: Tensor) -> Tensor:
            noise = torch.rand(hidden.shape, generator=generator).to(hidden.device, hidden.dtype)
            return hidden * (1 + FLOOR_NOISE * (2 * noise - 1))

        for a in range(0, len(chosen), WAVE):
            self._tell("floor", a, len(chosen), "windows")
            wave = self._corpus.tokens[torch.from_numpy(chosen[a : a + WAVE])]
            truth, noisy = (self._inside(self._reference.hidden(wave, how)) for how in (None, jog))
            self._score(wave, a, truth, [(self._reference, noisy)], scores)
        self._tell("floor", len(chosen), len(chosen), "windows")
        positions = scores[0].positions()
        kld = positions.kld[positions.finite]
        if not len(kld):
            raise NothingMeasured(
                "the reference's own logits are not finite", where=str(self._corpus.facts["sha256"])
            )
        found = {
            "kld": float(kld.mean()),
            "median": float(np.median(kld)),
            "p99": float(np.quantile(kld, 0.99)),
            "same_top": float((positions.top == positions.top_reference)[positions.finite].mean()),
            "noise": FLOOR_NOISE,
            "tokens": len(kld),
        }
        if self._known is not None:
            self._keep(States(self._known.hidden, found))
        return found

    def _score(
        self,
        wave: Tensor,
        at: int,
        truth: Tensor,
        others: Sequence[tuple[_Runner, Tensor]],
        scores: Sequence[Scores],
    ) -> None:
        if not others:
            return
        first = self._how.first()
        count, length = wave.shape
        places = torch.arange(first + 1, length)
        target = wave[:, first + 1 :].reshape(-1)
        window = (at + torch.arange(count)).repeat_interleave(len(places))
        place = places.repeat(count)
        flat = [h.reshape(-1, h.shape[-1]) for h in (truth, *(h for _, h in others))]
        step = rows_at_once(int(self._reference.stream.checkpoint.config.get("vocab_size") or 1 << 16))
        for a in range(0, len(target), step):
            rows = slice(a, a + step)
            known = self._reference.stream.logits(flat[0][rows])
            for (runner, _), hidden, score in zip(others, flat[1:], scores, strict=True):
                found = runner.stream.logits(hidden[rows])
                if found.shape != known.shape:
                    raise Refused(
                        f"logits over {found.shape[-1]} and {known.shape[-1]} tokens cannot be compared"
                    )
                score.add(known, found, target[rows], window[rows], place[rows])
