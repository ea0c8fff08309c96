"""Threads that each take a share of the micro-batches, with operations of one thread.

Where parts of the work are independent, a core that has parts of its own does not wait at the end of every
operation for the others, and what goes element by element uses all cores as well. On two cores a decoder
layer of width 576 then takes four fifths of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from operator import itemgetter
from typing import TypeVar

import torch
from greenlet import greenlet
from torch import Tensor

_T = TypeVar("_T")


class Crew:
    """Workers with a thread each: what worker ``k`` does is always done in the same one. Gradients are off.

    Args:
        size: workers; a single one works in the caller's thread, on as many threads an operation as that has.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._threads = [ThreadPoolExecutor(1, initializer=_alone) for _ in range(size)] if size > 1 else []

    def each(self, work: Callable[[int], _T]) -> list[_T]:
        """``work(k)`` of every worker ``k``, side by side; the first error, once all have stopped."""
        if not self._threads:
            with torch.no_grad():
                return [work(0)]
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # MKL has one number for all threads of the process
        try:
            running = [thread.submit(work, k) for k, thread in enumerate(self._threads)]
            wait(running)
        finally:
            torch.set_num_threads(before)
        return [one.result() for one in running]

    def close(self) -> None:
        """End the threads."""
        for thread in self._threads:
            thread.shutdown()


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


class MicroBatches:
    """Micro-batches inside a block, each a coroutine that is in the thread of one worker.

    Args:
        run: goes through the block from a first sequence on, and switches to its parent at gates.
        starts: first sequences.
        threads: at most as many workers.
    """

    def __init__(self, run: Callable[[int], None], starts: Sequence[int], threads: int) -> None:
        self._run, self._crew = run, Crew(min(threads, len(starts)))
        self._worker = {first: place % self._crew.size for place, first in enumerate(starts)}
        self._inside: dict[int, greenlet] = {}

    def go_on(self, ready: Sequence[int]) -> list[tuple[int, tuple[str, Tensor] | None]]:
        """Each of these as far as its next gate, in the order of their first sequences: path and input there,
        None if it is through."""

        def work(k: int) -> dict[int, tuple[str, Tensor] | None]:
            return {first: self._one(first) for first in ready if self._worker[first] == k}

        found = {first: reached for part in self._crew.each(work) for first, reached in part.items()}
        return sorted(found.items(), key=itemgetter(0))

    def _one(self, first: int) -> tuple[str, Tensor] | None:
        if first not in self._inside:  # in the thread that it stays in
            self._inside[first] = greenlet(self._run)
        return self._inside[first].switch(first)

    def close(self) -> None:
        """Out of the block, wherever they are: an error leaves the others inside, hooks and all."""

        def leave(k: int) -> None:
            for first, one in self._inside.items():
                if self._worker[first] == k and one:
                    one.throw()

        self._crew.each(leave)
        self._crew.close()
