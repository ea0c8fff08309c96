"""One layer's keys, or its values, packed: appended to, let go from either end, read in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.core.caches import STEP, CacheCode, CacheMethod, forgotten, packed_of
from bitmill.core.errors import Refused


@dataclass(frozen=True, eq=False)
class Piece:
    """Some tokens of a store.

    Attributes:
        first: the place of the first of them, among those that can be looked at.
        coordinates: ``batch heads tokens width`` float32.
        packed: whether those are coordinates in the basis of the store's code, or the numbers themselves.
    """

    first: int
    coordinates: Tensor
    packed: bool


class Store:
    """Packed runs of tokens, and behind them the latest tokens in 16 bits.

    Attributes:
        method: what packs.
        part: ``k`` or ``v``.
        tokens: how many were appended and not taken back.
        dropped: how many of the first of them are gone, because no query looks back that far.
    """

    def __init__(self, method: CacheMethod, part: str, window: int | None, sliding: int | None) -> None:
        self.method, self.part = method, part
        self.tokens = self.dropped = 0
        self._window = method.window if window is None else window
        self._sliding = sliding
        self._packed = 0
        self._fields: dict[str, Tensor] = {}
        self._learned: dict[str, Tensor] = {}
        self._recent: Tensor | None = None
        self._code: CacheCode | None = None

    @property
    def code(self) -> CacheCode:
        """What packs and unpacks; there is one from the first token on."""
        if self._code is None:
            raise ValueError("nothing has been stored yet")
        return self._code

    @property
    def kept(self) -> int:
        """Tokens that are here."""
        return self.tokens - self.dropped

    @property
    def heads(self) -> tuple[int, int]:
        """Their number, and the numbers of each."""
        if self._recent is None:
            raise ValueError("nothing has been stored yet")
        return self._recent.shape[1], self._recent.shape[3]

    @property
    def bytes_(self) -> int:
        """Memory that is held, room for more included."""
        held = [*self._fields.values(), *self._learned.values()]
        held += [] if self._recent is None else [self._recent]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    def append(self, x: Tensor) -> None:
        """Store what comes next, ``batch heads tokens head``."""
        if x.shape[-2] == 0:
            return
        self._start(x)
        layout = self.method.layout(self.part, x.shape[-1])
        recent = self._recent
        if recent is None:
            raise ValueError("nothing has been started")
        if self._window or layout.run > 1:
            x = x.to(recent.dtype)
        x = torch.cat((recent, x.to(recent.dtype)), -2) if recent.shape[-2] else x
        count = packed_of(x.shape[-2], layout.run, self._window)
        if count:
            self._write(self.code.pack(x[..., :count, :].to(torch.float32)), count // layout.run, layout.run)
        self._recent = x[..., count:, :].to(recent.dtype, copy=True, memory_format=torch.contiguous_format)
        self.tokens = self.dropped + self._packed + self._recent.shape[-2]

    def forget(self) -> None:
        """Let go what no query will look back at."""
        run = self._run
        gone = forgotten(self.tokens, self._sliding, run, self._window)
        out = min(gone - self.dropped, self._packed // STEP * STEP)
        if out <= 0:
            return
        self._packed -= out
        self.dropped += out
        used, room = self._packed // run, -(-self._packed // STEP) * STEP // run
        for name, held in self._fields.items():
            fresh = held.new_zeros(*held.shape[:2], room, *held.shape[3:])
            fresh[:, :, :used] = held[:, :, out // run : out // run + used]
            self._fields[name] = fresh

    def crop(self, tokens: int) -> None:
        """Take back the latest ``tokens``. Where that ends inside a run, the rest of the run is what it
        decodes to, in 16 bits."""
        recent = self._recent
        if recent is None or tokens <= 0:
            return
        back = min(tokens, self.kept)
        from_recent = min(back, recent.shape[-2])
        recent = recent[..., : recent.shape[-2] - from_recent, :]
        rest, run = back - from_recent, self._run
        left = self._packed - rest
        if left % run:
            first = left // run
            fields = {name: held[:, :, first : first + 1] for name, held in self._fields.items()}
            again = self.code.back(self.code.unpack(fields))[..., : left % run, :]
            recent = torch.cat((again.to(recent.dtype), recent), -2)
        self._packed = left // run * run
        self._recent = recent.clone(memory_format=torch.contiguous_format)
        self.tokens -= back

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put ``change`` of every tensor in its place; it acts on the first dimension, the sequences."""
        self._fields = {name: change(held) for name, held in self._fields.items()}
        self._recent = None if self._recent is None else change(self._recent)

    @property
    def whole(self) -> tuple[Mapping[str, Tensor], int] | None:
        """The packed fields with room for more, and how many tokens they hold; None where they hold none."""
        return (self._fields, self._packed) if self._packed else None

    def pieces(self, skip: int, size: int, *, packed: bool = True) -> Iterator[Piece]:
        """All tokens but the first ``skip`` of those kept, at most ``size`` at a time (whole runs);
        ``packed=False`` leaves out those that are packed."""
        run = self._run
        size = max(size // run, 1) * run
        for start in range(skip // run * run, self._packed if packed else 0, size):
            stop = min(start + size, self._packed)
            fields = {name: held[:, :, start // run : stop // run] for name, held in self._fields.items()}
            ahead = max(skip - start, 0)
            yield Piece(start + ahead - skip, self.code.unpack(fields)[..., ahead:, :], True)
        recent = self._recent
        if recent is not None and recent.shape[-2]:
            ahead = max(skip - self._packed, 0)
            first = max(self._packed - skip, 0)
            yield Piece(first, recent[..., ahead:, :].to(torch.float32), False)

    def dense(self, skip: int, size: int) -> Tensor:
        """All tokens but the first ``skip``, ``batch heads tokens head`` float32."""
        parts = [
            self.code.back(piece.coordinates) if piece.packed else piece.coordinates
            for piece in self.pieces(skip, size)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    def state(self) -> dict[str, Tensor]:
        """Everything that is stored, without room for more: packed fields, ``learned.…``, ``recent``."""
        used = self._packed // self._run
        fields = self._fields if used else {}
        found = {name: held[:, :, :used].contiguous() for name, held in fields.items()}
        found |= {f"learned.{name}": held for name, held in self._learned.items()}
        return found if self._recent is None else {**found, "recent": self._recent}

    def restore(self, state: Mapping[str, Tensor], tokens: int, dropped: int) -> None:
        """Become what :meth:`state` told.

        Raises:
            ValueError: what was learned cannot have been.
        """
        recent = state["recent"]
        layout = self.method.layout(self.part, recent.shape[-1])
        self._learned = {name: state[f"learned.{name}"].clone() for name in layout.learned}
        self._recent = recent.clone()
        self._code = self.method.code(self.part, recent.shape[-1], self._learned)
        self.tokens, self.dropped = tokens, dropped
        self._packed, packed = 0, tokens - dropped - recent.shape[-2]
        if packed:
            self._write({name: state[name] for name in layout.fields}, packed // layout.run, layout.run)

    @property
    def _run(self) -> int:
        if self._recent is None:
            return 1
        return self.method.layout(self.part, self._recent.shape[-1]).run

    def _start(self, x: Tensor) -> None:
        if self._code is not None:
            return
        head = x.shape[-1]
        why = self.method.refuses(head)
        if why is not None:
            raise Refused(why, where=f"a cache of {self.method}", fix="f16 goes with every model")
        self._learned = self.method.learn(self.part, x)
        self._code = self.method.code(self.part, head, self._learned)
        dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float16
        self._recent = x.new_zeros(*x.shape[:2], 0, head, dtype=dtype)

    def _write(self, packed: Mapping[str, Tensor], runs: int, run: int) -> None:
        """Put ``runs`` runs behind what is there; the room grows by whole steps."""
        used = self._packed // run
        room = -(-(self._packed + runs * run) // STEP) * STEP // run
        for name, new in packed.items():
            held = self._fields.get(name)
            if held is None or held.shape[2] < room:
                fresh = new.new_zeros(*new.shape[:2], room, *new.shape[3:])
                if held is not None:
                    fresh[:, :, :used] = held[:, :, :used]
                self._fields[name] = held = fresh
            held[:, :, used : used + runs] = new
        self._packed += runs * run
