"""The agent's journal: records on disk that survive kill -9 and loss of power.

A file of JSON lines, each one batch of records with a checksum. `append` returns after fsync; a
batch is on disk whole or not at all:

* A last line without its newline is what a crash left of a batch that nobody was told about. It is
  dropped, with a line in the log. Anything else that does not read is `StoreCorrupt`: the journal
  held something that was acknowledged.
* When the disk is full, the file is cut back to the end of the last good batch: `StoreFull`.

A file that has grown to several times what it says is written anew beside it and renamed. A lock on
the folder keeps two agents from sharing it; the kernel lets go of it when the process ends.
"""

import errno
import fcntl
import logging
import os
import typing
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import msgspec

from stoker.agent.records import DriverResumed, Durable, Record
from stoker.core.errors import InUse, StoreCorrupt, StoreError, StoreFull, StoreTooNew

JOURNAL_NAME = "journal.jsonl"
LOCK_NAME = "lock"
# The file is rewritten when it has this many bytes, and this many times what it had when it was
# last rewritten: seldom enough to cost nothing, often enough to stay small.
REWRITE_BYTES_MIN = 256 * 1024
REWRITE_GROWTH = 4

_TYPES: dict[str, type[Record]] = {each.__name__: each for each in typing.get_args(Record)}
_HEAD = b'{"crc32":"%08x","records":'
_HEAD_BYTES = len(_HEAD % 0)
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_log = logging.getLogger(__name__)


class UnknownRecord(ValueError):
    """A sound line with a record that this version does not know."""


def encode_batch(records: Sequence[Record]) -> bytes:
    """Return the line that keeps `records`."""
    items = [{"record": type(each).__name__, **msgspec.to_builtins(each)} for each in records]
    payload = msgspec.json.encode(items)
    return _HEAD % zlib.crc32(payload) + payload + b"}\n"


def decode_batch(line: bytes) -> tuple[Record, ...]:
    """Return the records of a line without its newline; raises ValueError with what is wrong."""
    payload = line[_HEAD_BYTES:-1]
    if line != _HEAD % zlib.crc32(payload) + payload + b"}":
        raise ValueError("the checksum does not match")
    # msgspec's errors are ValueErrors that name the field.
    items = msgspec.json.decode(payload, type=list[dict[str, object]])
    return tuple(_decode_record(item) for item in items)


def _decode_record(item: dict[str, object]) -> Record:
    name = item.pop("record", None)
    if not isinstance(name, str) or name not in _TYPES:
        raise UnknownRecord(f"unknown record {name!r}")
    return msgspec.convert(item, _TYPES[name])


class Journal:
    """An open journal, the only one of its folder. Its methods block; one thread uses it."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._path = folder / JOURNAL_NAME
        self._lock = lock
        self._file = -1
        self._size = 0  # up to the end of the last good batch
        self._rewrite_at = 0
        self._is_renamed = False  # and the folder not yet synced
        self._durable = Durable()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Lock the folder, which is made if need be, and read what it keeps.

        Raises InUse when another agent has it, StoreCorrupt, StoreFull, or StoreError.
        """
        try:
            if not folder.exists():
                folder.mkdir(mode=0o750, parents=True, exist_ok=True)
                sync_folder(folder.parent)
            journal = cls(folder, _lock(folder))
        except OSError as error:
            raise explained(folder, error) from error
        try:
            journal._read()
        except BaseException:
            journal.close()
            raise
        return journal

    @property
    def records(self) -> tuple[Record, ...]:
        """The fewest records that add up to all that was kept."""
        return self._durable.records()

    def append(self, batches: Iterable[Sequence[Record]]) -> None:
        """Return when all records are on disk; raises StoreError when none of them is."""
        kept = list(batches)
        data = b"".join(map(encode_batch, kept))
        try:
            self._sync_rename()
            # What an earlier failure could not cut off must not stand before this.
            os.ftruncate(self._file, self._size)
            _write_all(self._file, data, self._size)
            os.fsync(self._file)
        except OSError as error:
            self._cut_back()
            raise explained(self._path, error) from error
        self._size += len(data)
        for records in kept:
            self._durable = self._durable.after(records)
        # An agent from before there were releases cannot read the file while one lasts, which is
        # right: it would open the driver. Once it is over, nothing of it is left in the file.
        is_resumed = any(isinstance(each, DriverResumed) for records in kept for each in records)
        if self._size >= self._rewrite_at or is_resumed:
            self._rewrite()

    def close(self) -> None:
        """Let go of the files and the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _read(self) -> None:
        try:
            is_new = not self._path.exists()
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            if is_new:
                sync_folder(self._path.parent)
            data = self._path.read_bytes()
        except OSError as error:
            raise explained(self._path, error) from error
        *lines, torn = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                self._durable = self._durable.after(decode_batch(line))
            except UnknownRecord as error:
                raise StoreTooNew(
                    f"{self._path}, line {number}: {error}; a newer stoker-agent wrote it"
                ) from error
            except ValueError as error:
                raise StoreCorrupt(
                    f"{self._path}, line {number} of {len(lines)}: {error}; it is damaged. "
                    "Move the file away to begin a new one: the aggregator then tells the agent "
                    "again what to hold"
                ) from error
        self._size = len(data) - len(torn)
        if torn:
            _log.warning("%s: dropped %d bytes of a torn last line", self._path, len(torn))
            self._cut_back()
        self._rewrite_at = max(REWRITE_BYTES_MIN, REWRITE_GROWTH * self._size)
        if self._size >= REWRITE_BYTES_MIN:
            self._rewrite()

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)
        except OSError as error:  # `append` tries again; until then a torn line stands at the end
            _log.warning("%s: cannot be cut back to %d bytes: %s", self._path, self._size, error)

    def _rewrite(self) -> None:
        """Replace the file by the fewest records; until the rename the old one stays in use."""
        fresh = self._path.with_suffix(".new")
        data = encode_batch(self._durable.records())
        file = -1
        try:
            file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
            _write_all(file, data, 0)
            os.fsync(file)
            os.rename(fresh, self._path)
        except OSError as error:
            _log.warning("%s: cannot be rewritten: %s", self._path, error.strerror)
            self._rewrite_at = 2 * self._size
            if file >= 0:
                os.close(file)
            return
        os.close(self._file)
        self._file, self._size, self._is_renamed = file, len(data), True
        self._rewrite_at = max(REWRITE_BYTES_MIN, REWRITE_GROWTH * self._size)

    def _sync_rename(self) -> None:
        """Make the rename durable before anything that only the new file has."""
        if self._is_renamed:
            sync_folder(self._path.parent)
            self._is_renamed = False


def _lock(folder: Path) -> int:
    file = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.pwrite(file, b"%d\n" % os.getpid(), 0)
    except BlockingIOError:
        owner = os.pread(file, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(file)
        raise InUse(f"{folder}: another agent, process {owner}, uses this data folder") from None
    except OSError:
        os.close(file)
        raise
    return file


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Make durable which files a folder has; raises OSError."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def explained(path: Path, error: OSError) -> StoreError:
    """Return what the error means for whoever wanted to write there."""
    kind = StoreFull if error.errno in _NO_ROOM else StoreError
    return kind(f"{path}: {error.strerror}")
