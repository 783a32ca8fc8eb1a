"""Who uses a GPU: the driver's three lists of processes, each process told once."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stoker.agent.driver import (
    DriverError,
    DriverUnavailable,
    FactUnavailable,
    GpuUnavailable,
    NotSupported,
)
from stoker.agent.nvml.facts import Form, Question, Told
from stoker.agent.nvml.session import Device, Prepared, Session
from stoker.agent.nvml.table import NOT_A_GPU_INSTANCE, RunningProcess
from stoker.agent.nvml.units import as_text, process_memory
from stoker.agent.readings import ProcessKind, ProcessReading


def _list(function: str) -> Question:
    def nothing(told: Told, answer: Any) -> None:
        """A list of processes is no fact of a GPU."""

    return Question((), (Form(function), Form(f"{function}_v2")), nothing)


_COMPUTE = _list("nvmlDeviceGetComputeRunningProcesses")
# Clients of a CUDA MPS server; they use the GPU through it.
_MPS = _list("nvmlDeviceGetMPSComputeRunningProcesses")
_GRAPHICS = _list("nvmlDeviceGetGraphicsRunningProcesses")


class _User:
    """One process as the lists tell it."""

    __slots__ = ("instances", "kind", "memory")

    def __init__(self, kind: ProcessKind) -> None:
        self.kind: ProcessKind = kind
        self.memory: int | None = 0
        self.instances: set[int] = set()

    def add(self, entry: RunningProcess) -> None:
        """Under MIG a process is listed once for each instance that it uses."""
        used = process_memory(entry.usedGpuMemory)
        # A part of the sum is not the sum.
        self.memory = None if used is None or self.memory is None else self.memory + used
        # The first form of the list does not know instances.
        instance: int = getattr(entry, "gpuInstanceId", NOT_A_GPU_INSTANCE)
        if instance != NOT_A_GPU_INSTANCE:
            self.instances.add(instance)

    def plus(self, other: "_User") -> "_User":
        """Return what two GPU instances tell of one process."""
        both = _User(self.kind)
        is_told = self.memory is not None and other.memory is not None
        both.memory = (self.memory or 0) + (other.memory or 0) if is_told else None
        both.instances = self.instances | other.instances
        return both


class ProcessLists:
    """The lists of one GPU that are there."""

    def __init__(self, session: Session, gpu: Device, *, mig_enabled: bool) -> None:
        """Take the GPU; nothing is asked yet."""
        self._mig_enabled = mig_enabled
        self._compute = Prepared(session, gpu, _COMPUTE)
        self._others: list[tuple[Prepared, ProcessKind]] = [
            (Prepared(session, gpu, _MPS), "compute"),
            (Prepared(session, gpu, _GRAPHICS), "graphics"),
        ]

    def read(self, uuid: str, names: "ProcessNames") -> Sequence[ProcessReading]:
        """Return one entry per process; raises DriverError when one that is there is not told."""
        return _told(uuid, self._users(), names)

    def _users(self) -> dict[int, _User]:
        users: dict[int, _User] = {}
        self._add(users, self._compute.answer(), "compute")
        for asked in tuple(self._others):
            prepared, kind = asked
            try:
                entries = prepared.answer()
            except NotSupported:
                self._others.remove(asked)  # a card that draws nothing, a driver without MPS
                continue
            self._add(users, entries, kind)
        return users

    @staticmethod
    def read_parts(
        uuid: str, parts: Iterable[tuple[int, "ProcessLists"]], names: "ProcessNames"
    ) -> Sequence[ProcessReading]:
        """Return what the lists of all MIG devices of a GPU tell together.

        Of each part comes its GPU instance too: a process in its list runs there, whatever the
        entry says. Raises DriverError.
        """
        users: dict[int, _User] = {}
        for instance, lists in parts:
            for pid, user in lists._users().items():  # noqa: SLF001 (its own class)
                known = users.get(pid)
                user.instances = {instance}
                if known is None:
                    users[pid] = user
                elif instance not in known.instances:  # else: of another compute instance there
                    users[pid] = known.plus(user)
        return _told(uuid, users, names)

    def _add(
        self, users: dict[int, _User], entries: Sequence[RunningProcess], kind: ProcessKind
    ) -> None:
        """Add a list; a process that was in an earlier list is told as that one says."""
        here: dict[int, _User] = {}
        for entry in entries:
            if entry.pid not in users:
                here.setdefault(entry.pid, _User(kind)).add(entry)
        for user in here.values():
            if not self._mig_enabled:
                user.instances.clear()
        users |= here


def _told(uuid: str, users: Mapping[int, _User], names: "ProcessNames") -> list[ProcessReading]:
    return [
        ProcessReading(
            *(uuid, pid, user.kind, user.memory, names.name_of(pid)),
            gpu_instance_id=min(user.instances) if len(user.instances) == 1 else None,
        )
        for pid, user in users.items()
    ]


class ProcessNames:
    """What the driver calls a process, where it does."""

    def __init__(self, session: Session) -> None:
        """Nothing is asked yet."""
        self._session = session
        self._are_told = True

    def name_of(self, pid: int) -> str | None:
        """Return the executable, or None; raises DriverUnavailable."""
        if not self._are_told:
            return None
        try:
            return as_text(self._session.ask(None, "nvmlSystemGetProcessName", pid))
        except FactUnavailable:
            self._are_told = False
            return None
        except (DriverUnavailable, GpuUnavailable):
            raise
        except DriverError:
            return None  # it ended since it was listed, or belongs to another user
