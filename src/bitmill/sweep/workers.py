"""Who carries a sweep's errands: this process, several of this machine, or a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from bitmill.core.errors import Interrupted, Refused
from bitmill.journal import RESUME
from bitmill.sweep.errand import Errand, Progress, carry
from bitmill.sweep.result import Result

PATIENCE = 5.0  # seconds for a cluster to answer

Carry = Callable[[Errand], tuple[Result, ...]]


def one_by_one(errands: Sequence[Errand], progress: Progress) -> Iterator[tuple[Result, ...]]:
    """In this process."""
    for errand in errands:
        yield carry(errand, progress)


def in_processes(errands: Sequence[Errand], jobs: int) -> Iterator[tuple[Result, ...]]:
    """In ``jobs`` processes of this machine that share its cores; results come as they are ready.

    Raises:
        BitmillError: that of the first errand that failed; the others are finished first.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = [pool.submit(carry, replace(errand, threads=threads)) for errand in errands]
        try:
            for ready in as_completed(waiting):
                yield ready.result()
        except KeyboardInterrupt as stop:
            pool.shutdown(wait=False, cancel_futures=True)
            raise Interrupted("stopped", fix=RESUME) from stop


def on_ray(errands: Sequence[Errand], address: str) -> Iterator[tuple[Result, ...]]:
    """On a Ray cluster whose machines all see the sweep's folder and the model under the same paths.

    Args:
        address: of the cluster; ``auto`` finds one that runs here, ``local`` starts one on this machine, and
            ``local:2`` one of two workers.

    Raises:
        Refused: Ray is not installed, or there is no such cluster.
    """
    refuse_cluster(address)
    import ray

    kind, _, count = address.partition(":")
    local = kind == "local"
    workers = int(count) if local and count.isdecimal() and int(count) else os.cpu_count() or 1
    try:
        if local:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
        else:
            ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError) as error:
        raise Refused(
            f"there is no Ray cluster at {address!r}",
            where=str(error).partition("\n")[0],
            fix="--ray local starts one on this machine",
        ) from error
    try:
        threads = max(1, (os.cpu_count() or 1) // workers) if local else 0
        task = ray.remote(_carry_quietly)
        waiting = [task.remote(replace(abroad(errand), threads=threads)) for errand in errands]
        while waiting:
            ready, waiting = ray.wait(waiting)
            for one in ready:
                yield ray.get(one)
    finally:
        ray.shutdown()


def refuse_cluster(address: str) -> None:
    """Refuse what :func:`on_ray` could only find out after the first work is done.

    Raises:
        Refused: Ray is not installed, or nothing answers at that address.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise Refused(
            "--ray needs Ray, which is not installed",
            fix="pip install ray, or --jobs N for processes of this machine",
        ) from error
    if not _answers(address):
        raise Refused(f"there is no Ray cluster at {address!r}", fix="--ray local starts one on this machine")


def _answers(address: str) -> bool:
    """Whether something listens there, if a host and a port are named: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if host == "local" or not (colon and port.isdecimal()):
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError):
        return False
    return True


def abroad(errand: Errand) -> Errand:
    """The errand with every path in full, for a process that starts in another folder."""
    kept = replace(errand.measuring.kept, folder=errand.measuring.kept.folder.absolute())
    texts, calib = (
        None if names is None else tuple(map(_whole, names))
        for names in (errand.measuring.texts, errand.drawn.calib)
    )
    return replace(
        errand,
        model=_whole(errand.model),
        folder=errand.folder.absolute(),
        matrix=None if errand.matrix is None else errand.matrix.absolute(),
        drawn=replace(errand.drawn, calib=calib),
        measuring=replace(errand.measuring, texts=texts, kept=kept),
    )


def _whole(text: str) -> str:
    """A path in full; what names no file here stays as it is."""
    name, equals, weight = text.partition("=")
    path = Path(name).expanduser()
    return f"{path.absolute()}{equals}{weight}" if path.exists() else text


def _carry_quietly(errand: Errand) -> tuple[Result, ...]:
    return carry(errand)
