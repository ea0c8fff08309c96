"""What is done and safe on disk: preallocated files, a journal whose line is always written last, and resume.

Order of a unit: its bytes, fsync; the live activations to a temporary file, fsync, rename, fsync of the
folder;
then the journal line, fsync. A line therefore vouches for everything before it. The output appears by one
rename.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitmill.core.errors import Interrupted, Refused
from bitmill.core.types import FileImage

Boundary = Callable[[str], None]
RESUME = "run the same command again: it takes over what is finished"


class Workspace:
    """The folder ``<out>.partial`` while a file is being made.

    Args:
        out: the final path.
        images: every output file to the byte.
        single_file: whether the output is one file rather than a folder.
        boundary: called with a name at every durable step; tests kill the process there.
    """

    def __init__(
        self, out: Path, images: Sequence[FileImage], single_file: bool, boundary: Boundary = lambda _: None
    ) -> None:
        self.out, self._images, self._single = out, images, single_file
        self.folder = out.with_name(out.name + ".partial")
        self._boundary = boundary
        self._slots = {slot.name: (image.path, slot) for image in images for slot in image.slots}
        self._handles: dict[str, int] = {}
        self._touched: set[str] = set()
        self._hash = hashlib.sha256()
        self._written: list[tuple[str, int, int]] = []
        self._lock: int | None = None

    def open(self, identity: Mapping[str, Any], resume: bool) -> list[dict[str, Any]]:
        """Take the folder, start or resume; the records of the units that are done.

        Raises:
            Refused: another run holds the folder, or it belongs to another recipe or source (the field is
            named).
        """
        with _disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            lines = self._journal_lines()
            if lines and resume:
                _refuse_other(lines[0]["identity"], dict(identity), self.folder)
                self._open_files()
                units = [line for line in lines[1:] if line["unit"] != "sealed"]
                over = max((at for at, unit in enumerate(units) if unit.get("rewrites")), default=0)
                if all(self._intact(unit) for unit in units[over:]):
                    return units
                self.close_files()
            self._start(identity)
            return []

    def write(self, slot: str, data: bytes | memoryview, at: int = 0) -> None:
        """Bytes of one slot, or a part of them from ``at`` on."""
        path, place = self._slots[slot]
        if at + len(data) > place.bytes_:
            raise AssertionError(f"{slot}: {at + len(data)} bytes for a slot of {place.bytes_}")
        with _disk_errors(self.folder):
            view, offset = memoryview(data), place.offset + at
            while view:
                done = os.pwrite(self._handles[path], view, offset)
                view, offset = view[done:], offset + done
        self._touched.add(path)
        self._hash.update(data)
        self._written.append((slot, at, len(data)))

    def finish_unit(
        self,
        unit: str,
        record: Mapping[str, Any],
        live: Mapping[str, Tensor] | None = None,
        *,
        lasting: bool = False,
    ) -> None:
        """Make everything written since the last unit durable, then say so in the journal.

        A record with ``rewrites`` says that what earlier units wrote may change from here on. Of what units
        leave ``live``, the last two stay, and what is ``lasting``.
        """
        self._boundary(f"{unit}: written")
        with _disk_errors(self.folder):
            for path in sorted(self._touched):
                os.fsync(self._handles[path])
            self._boundary(f"{unit}: synced")
            line = {"unit": unit, "sha256": self._hash.hexdigest(), "slots": self._written, **record}
            if live is not None:
                line["live"] = self._keep_live(unit, live, "kept" if lasting else "live")
            self._append(line)
        self._boundary(f"{unit}: journaled")
        self._touched.clear()
        self._hash, self._written = hashlib.sha256(), []

    def with_activations(self, done: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Of these units, which are the last there are, those up to the last that left activations; without
        any, the first, which needs none. The others are forgotten: they will be done again."""
        last = max((at for at, unit in enumerate(done) if "live" in unit), default=0)
        if last + 1 < len(done):
            lines = self._journal_lines()
            lines = lines[: len(lines) - (len(done) - last - 1)]
            with _disk_errors(self.folder):
                _write_synced(self._journal_path, _lines(lines))
        return list(done[: last + 1])

    def load_live(self, name: str) -> dict[str, Tensor]:
        """Activations a finished unit left, in fresh memory: a mapped file's alignment could change sums."""
        with safe_open(self.folder / name, framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118

    def seal(self, report: bytes, force: bool) -> None:
        """The output appears: everything synced, one rename, then the workspace goes."""
        with _disk_errors(self.folder):
            for path in sorted(self._handles):
                os.fsync(self._handles[path])
                os.close(self._handles.pop(path))
            _write_synced(self.folder / REPORT if self._single else self.payload / REPORT, report)
            self._append({"unit": "sealed", "sha256": "", "slots": []})
            self._boundary("sealed: journaled")
            if self.out.exists() and force:
                _remove(self.out)
            self._boundary("sealed: cleared")
            os.rename(self.payload, self.out)
            self._boundary("sealed: renamed")
            _sync_folder(self.out.parent)
            self._place_report()
        self.discard()

    def finish_sealed(self) -> None:
        """Finish what a kill between the last rename and the clean-up left undone."""
        lines = self._journal_lines()
        if lines and lines[-1].get("unit") == "sealed" and self.out.exists() and not self.payload.exists():
            self._place_report()
            self.discard()

    def _place_report(self) -> None:
        if self._single and (self.folder / REPORT).exists():
            os.replace(self.folder / REPORT, report_path(self.out))
            _sync_folder(self.out.parent)
        self._boundary("sealed: reported")

    def close_files(self) -> None:
        """Let go of the output's files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def close(self) -> None:
        """Let go of files and lock; what is done stays for a resume."""
        self.close_files()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Leave nothing behind."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def payload(self) -> Path:
        """The output before it has its name."""
        return self.folder / ("output" if self._single else "files")

    @property
    def _journal_path(self) -> Path:
        return self.folder / "journal.jsonl"

    def _path(self, image: str) -> Path:
        return self.payload / image if image else self.payload

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refused(
                "another run is writing this output",
                where=str(self.folder),
                fix="wait for it, or choose another -o",
            ) from error

    def _start(self, identity: Mapping[str, Any]) -> None:
        for entry in self.folder.iterdir():
            if entry.name != "lock":
                _remove(entry)
        for image in self._images:
            path = self._path(image.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            self._handles[image.path] = handle
            _reserve(handle, image.bytes_)
            os.pwrite(handle, image.head, 0)
            os.fsync(handle)
        self._boundary("start: preallocated")
        self._append({"identity": dict(identity)})
        self._boundary("start: journaled")

    def _open_files(self) -> None:
        for image in self._images:
            self._handles[image.path] = os.open(self._path(image.path), os.O_RDWR)

    def _intact(self, line: Mapping[str, Any]) -> bool:
        """Whether a unit's bytes, and the activations it left, are still what its line says."""
        digest = hashlib.sha256()
        for name, at, size in line["slots"]:
            path, place = self._slots[name]
            _hash_range(digest, self._handles[path], size, place.offset + at)
        return digest.hexdigest() == line["sha256"]

    def _journal_lines(self) -> list[dict[str, Any]]:
        path = self._journal_path
        if not path.exists():
            return []
        lines = []
        for text in path.read_bytes().split(b"\n"):
            try:
                lines.append(json.loads(text))
            except ValueError:  # the torn last line of a killed run: nothing after it is vouched for
                break
        return lines

    def _append(self, line: Mapping[str, Any]) -> None:
        path, whole = self._journal_path, _lines(self._journal_lines())
        if path.exists() and path.stat().st_size != len(whole):
            _write_synced(path, whole)  # drop a torn line before adding behind it
        with path.open("ab") as file:
            file.write(_lines([line]))
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self.folder)

    def _keep_live(self, unit: str, live: Mapping[str, Tensor], kind: str) -> str:
        name = f"{kind}-{unit.replace(' ', '-').replace(':', '')}.safetensors"
        partial = self.folder / (name + ".partial")
        save_file({key: value.contiguous() for key, value in live.items()}, partial)
        _sync_file(partial)
        self._boundary(f"{unit}: live written")
        os.rename(partial, self.folder / name)
        _sync_folder(self.folder)
        self._boundary(f"{unit}: live renamed")
        old = sorted(self.folder.glob("live-*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
        for path in old[:-2]:
            path.unlink()
        return name


REPORT = "bitmill-report.json"


def report_path(out: Path) -> Path:
    """Where the account of an output lies: inside a folder, beside a file."""
    return out / REPORT if out.is_dir() else out.with_name(out.name + ".report.json")


def _refuse_other(theirs: Mapping[str, Any], ours: Mapping[str, Any], folder: Path) -> None:
    ours = json.loads(json.dumps(ours))
    for key in dict.fromkeys([*ours, *theirs]):  # as they are listed: other files follow from another recipe
        then, now = theirs.get(key), ours.get(key)
        if then == now:
            continue
        if isinstance(then, list) and isinstance(now, list):
            difference = f"another {_first_other(then, now)} is here"
        else:
            difference = f"another {key} is here: {_short(then)} then, {_short(now)} now"
        raise Refused(
            f"an unfinished run with {difference}",
            where=str(folder),
            fix="finish it with its own command, add --no-resume to start over, or choose another -o",
        )


def _first_other(then: Sequence[Any], now: Sequence[Any]) -> str:
    """The name of the first file that two lists of ``name, bytes, digest`` do not share."""
    other = next(entry for entry in [*now, *then] if entry not in now or entry not in then)
    return str(other[0])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _reserve(handle: int, size: int) -> None:
    """Claim the blocks now, so that a disk that is too small says so before hours of work."""
    if size == 0:
        return
    try:
        os.posix_fallocate(handle, 0, size)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        os.ftruncate(handle, size)


def _hash_range(digest: Any, handle: int, size: int, offset: int) -> None:
    while size:
        part = os.pread(handle, min(size, 1 << 24), offset)
        if not part:
            return
        digest.update(part)
        size, offset = size - len(part), offset + len(part)


def _lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _write_synced(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    _sync_file(partial)
    os.replace(partial, path)
    _sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_sync_folder = _sync_file


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


class _disk_errors:
    """Turns a full disk, a read-only folder and their kin into clean stops."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Interrupted(
                "the disk is full", where=str(self._folder), fix=f"free some space, then {RESUME}"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise Refused("cannot write here", where=str(self._folder), fix="choose another -o") from error
        if isinstance(error, SafetensorError):
            raise Interrupted(
                f"cannot write activations: {error}", where=str(self._folder), fix=RESUME
            ) from error
