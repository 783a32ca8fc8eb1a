"""Where the partitions of simulated cards are kept: in this process, or in a file for all of them.

Partitions belong to the card and not to the process that made them. So a node whose agent, helper
and driver host are processes of their own keeps them in one JSON file. It is written beside and
renamed while FILE.lock is held, so a process that dies at any moment leaves it as it was before or
as it is after; nothing is synced to the disk, since a simulated card need not outlast its machine.
Whoever has a session with the driver holds FILE.sessions (a shared lock, which ends with the
process, however that ends): as with a real driver, a session is what keeps a GPU in use.
"""

import fcntl
import os
import time
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol

import msgspec

from stoker.agent.simulated.partitions import CardRecord
from stoker.core.errors import BadInput

# A node has 64 cards at most, with seven instances of seven parts each at most.
FILE_BYTES_MAX = 4 << 20


class MigRecords(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept: the partitions of every card that ever had any."""

    format: Literal["stoker-simulated-mig"] = "stoker-simulated-mig"
    version: Literal[1] = 1
    cards: dict[str, CardRecord] = {}  # by UUID and model: a card of another model is another card
    unloaded_at: float | None = None  # Unix seconds: the last unloading of the driver


_NOTHING = MigRecords()


class MigState(Protocol):
    """Where the partitions are kept."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        ...

    @property
    def cards(self) -> Mapping[str, CardRecord]:
        """The cards as they were last seen."""
        ...

    @property
    def unloaded_at(self) -> float | None:
        """When the driver was unloaded last."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether other processes may change it."""
        ...

    def refresh(self) -> bool:
        """Look whether somebody else changed it; raises BadInput when it cannot be read."""
        ...

    def changing(self) -> AbstractContextManager[None]:
        """Keep everybody else from changing it; raises BadInput as `refresh` does."""
        ...

    def keep(self, cards: Mapping[str, CardRecord], unloaded_at: float | None) -> None:
        """Keep these cards in place of what was there; only while `changing`."""
        ...

    def join(self) -> None:
        """Have a session with the driver."""
        ...

    def leave(self) -> None:
        """Have none any more."""
        ...

    def is_in_session_elsewhere(self) -> bool:
        """Whether somebody else has a session with the driver; only while `changing`."""
        ...


class OwnMigState:
    """Partitions that no other process knows of, and that end with this one."""

    def __init__(self) -> None:
        """Begin with nothing partitioned."""
        self.name = "simulated MIG"
        self.cards: Mapping[str, CardRecord] = MappingProxyType({})
        self.unloaded_at: float | None = None
        self.is_shared = False

    def refresh(self) -> bool:
        return False

    def changing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def keep(self, cards: Mapping[str, CardRecord], unloaded_at: float | None) -> None:
        self.cards, self.unloaded_at = cards, unloaded_at

    def join(self) -> None:
        """Nobody else asks."""

    def leave(self) -> None:
        """Nobody else asks."""

    def is_in_session_elsewhere(self) -> bool:
        return False


class SharedMigState:
    """Partitions that all processes of a node have in one file."""

    def __init__(self, path: Path) -> None:
        """Read the file; one that is not there says that nothing was partitioned yet.

        Raises BadInput when it cannot be read, or is something else.
        """
        self._path, self.name = path, str(path)
        self._seen: tuple[int, int, int] | None = None
        self._records = _NOTHING
        self._session: int | None = None
        self.is_shared = True
        self.refresh()

    @property
    def cards(self) -> Mapping[str, CardRecord]:
        return self._records.cards

    @property
    def unloaded_at(self) -> float | None:
        return self._records.unloaded_at

    def refresh(self) -> bool:
        path = self._path
        try:
            status = os.stat(path)
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
            if seen == self._seen:
                return False
            if status.st_size > FILE_BYTES_MAX:
                raise BadInput(f"{path}: {status.st_size} bytes are no state of simulated MIG")
            text = path.read_bytes()
        except FileNotFoundError:
            changed = self._seen is not None
            self._seen, self._records = None, _NOTHING
            return changed
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}") from error
        self._records = _parse(text, path)
        self._seen = seen
        return True

    @contextmanager
    def changing(self) -> Generator[None]:
        descriptor = self._open(".lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self.refresh()
            yield
        finally:
            os.close(descriptor)

    def keep(self, cards: Mapping[str, CardRecord], unloaded_at: float | None) -> None:
        path, draft = self._path, self._path.with_name(f"{self._path.name}.new")
        records = MigRecords(cards=dict(cards), unloaded_at=unloaded_at)
        # Later than the one before also within one tick of the clock that stamps files: who reads
        # goes by it, and numbers of files are used again.
        stamp = max(time.time_ns(), self._seen[0] + 1 if self._seen else 0)
        try:
            draft.unlink(missing_ok=True)  # of a process that died here
            draft.write_bytes(msgspec.json.encode(records))
            os.utime(draft, ns=(stamp, stamp))
            status = os.stat(draft)
            draft.replace(path)
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}") from error
        self._records = records
        self._seen = (status.st_mtime_ns, status.st_ino, status.st_size)

    def join(self) -> None:
        self._session = self._open(".sessions")
        fcntl.flock(self._session, fcntl.LOCK_SH)

    def leave(self) -> None:
        if self._session is not None:
            os.close(self._session)
            self._session = None

    def is_in_session_elsewhere(self) -> bool:
        descriptor = self._open(".sessions") if self._session is None else self._session
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            # An attempt at the other lock gives up the one that was held.
            if self._session is None:
                os.close(descriptor)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        return False

    def __del__(self) -> None:
        # A driver that was never shut down, and is gone, has no session any more.
        self.leave()

    def _open(self, ending: str) -> int:
        path = f"{self._path}{ending}"
        try:
            return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}") from error


def _parse(text: bytes, path: Path) -> MigRecords:
    try:
        return msgspec.json.decode(text, type=MigRecords)
    except msgspec.DecodeError as error:
        raise BadInput(
            f"{path}: {error}; it is no state of simulated MIG, or a torn one"
        ) from error
