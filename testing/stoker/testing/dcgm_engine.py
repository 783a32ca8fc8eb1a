"""An nv-hostengine that behaves: GPUs with hardware counters that can be watched, paused and lost.

It serves `dcgm_agent` over a real socket, from threads of the process that made it, so that a
driver host in another process meets real restarts, losses and hangs. Where each behaviour was
found, in DCGM 4.6 unless said otherwise:

- fields of profiling are told only while they are watched; without a watch the status of the value
  is NOT_WATCHED, before the first measurement NO_DATA (DcgmCacheManager.cpp, GetLatestSample);
- of the metric groups with one major number only one is counted at a time (dcgm_structs.h); up to
  five are counted in turns, more are PROFILING_MULTI_PASS (tests/test_prof.py);
- paused profiling tells blanks with status OK, and pausing twice is pausing once; watching while
  paused works (dcgm_agent.h, tests/test_prof.py);
- without a profiling module pausing is NOT_SUPPORTED (DcgmApi.cpp, helperProfPauseResume);
- another profiler makes watching fail with PROFILING_LIBRARY_ERROR (NVIDIA/DCGM on GitHub, 56 and
  151), a hostengine without root with REQUIRES_ROOT (tests/test_prof.py);
- names of field groups are unique in the hostengine, and there are 64 of them and of groups
  (DcgmFieldGroup.cpp, dcgm_structs.py);
- groups and watches of a client that does not persist them go with its connection
  (DcgmHandle.py); a pause does not (it is the hostengine's).

The metric groups of a T4 are those of DCGM's user guide ("Multiplexing of Profiling Counters");
those of an A100 are made after them, with one group more fields.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec

from stoker.testing import dcgm_structs
from stoker.testing.dcgm_agent import receive

GPU, GPU_INSTANCE = 1, 4
UUID_FIELD = 54
LIVE = 1
DOUBLE_BLANK = 140737488355328.0
INT64_BLANK = 0x7FFFFFFFFFFFFFF0
GROUPS_MAX = 64
TURNS_MAX = 5
# Of traffic, in bytes per second.
INTEGER_FIELDS = frozenset({1009, 1010, 1011, 1012})

Groups = tuple[tuple[int, int, tuple[int, ...]], ...]

T4_GROUPS: Groups = (
    (0, 1, (1002, 1003, 1004, 1007)),
    (0, 2, (1006,)),
    (0, 3, (1008,)),
    (1, 0, (1005,)),
    (2, 0, (1009, 1010)),
    (3, 0, (1001,)),
)
A100_GROUPS: Groups = (
    (0, 1, (1002, 1003, 1004, 1006, 1007, 1008, 1013, 1014, 1015, 1016)),
    (1, 0, (1005,)),
    (2, 0, (1009, 1010)),
    (3, 0, (1001,)),
    (4, 0, (1011, 1012)),
)

_SHIM = """\
import sys
from stoker.testing import {name}
{more}sys.modules[__name__] = {name}
"""


def write_bindings(folder: Path, *, library_is_there: bool = True) -> Path:
    """Make a folder of bindings as NVIDIA's package installs one; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dcgm_agent.py").write_text(_SHIM.format(name="dcgm_agent", more=""))
    more = "" if library_is_there else "dcgm_structs.library_is_there = False\n"
    (folder / "dcgm_structs.py").write_text(_SHIM.format(name="dcgm_structs", more=more))
    return folder


@dataclass(slots=True)
class EngineGpu:
    """A GPU that the hostengine has."""

    uuid: str
    groups: Groups = A100_GROUPS
    instances: tuple[int, ...] = ()  # NVML's numbers of its GPU instances


@dataclass(slots=True)
class _Client:
    """What was made over one connection."""

    groups: dict[int, list[tuple[int, int]]] = field(
        default_factory=dict[int, list[tuple[int, int]]]
    )
    fields: dict[int, tuple[str, tuple[int, ...]]] = field(
        default_factory=dict[int, tuple[str, tuple[int, ...]]]
    )
    watches: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])


class Refused(Exception):
    """The hostengine answers with a code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class FakeHostengine:
    """A hostengine at an address; what is public may be changed while it runs."""

    def __init__(self, gpus: Sequence[EngineGpu], socket_path: Path | None = None) -> None:
        """Take its GPUs, and where it listens: a free port of this machine unless told."""
        self.gpus = list(gpus)
        self.is_paused = False
        self.has_other_profiler = False
        self.has_profiling_module = True
        self.runs_as_root = True
        self.is_measuring = True  # False: nothing was measured yet
        self.age_seconds = 0.0  # of every value
        self.value: Callable[[int, int], float] = lambda number, field: field / 10_000
        self.answering = threading.Event()  # cleared: it hangs
        self.answering.set()
        self.calls: list[str] = []
        self._socket_path = socket_path
        self._port = 0
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._clients: dict[socket.socket, _Client] = {}
        self._numbers = 0

    @property
    def address(self) -> str:
        """Where it listens, as the option `dcgm.address` has it."""
        return str(self._socket_path) if self._socket_path else f"127.0.0.1:{self._port}"

    @property
    def watched(self) -> set[tuple[int, int, int]]:
        """Entity group, entity and field of everything watched."""
        with self._lock:
            return set(self._watched())

    @property
    def groups_count(self) -> int:
        """How many groups of entities there are."""
        with self._lock:
            return sum(len(client.groups) for client in self._clients.values())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, knowing nothing of what was before."""
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self._socket_path))
            listener.listen()
        else:
            listener = socket.create_server(("127.0.0.1", self._port))
            self._port = listener.getsockname()[1]
        self.is_paused = False
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def stop(self) -> None:
        """Be gone, with every connection, in the middle of whatever is asked."""
        self.answering.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.lose_connections()

    def lose_connections(self) -> None:
        """Drop every client."""
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def hang(self) -> None:
        """Answer nothing more, until `answering` is set again."""
        self.answering.clear()

    def forget_watches(self) -> None:
        """Measure nothing more, as after a reset of the GPUs."""
        with self._lock:
            for client in self._clients.values():
                client.watches.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self._clients[connection] = _Client()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            try:
                while True:
                    length = int.from_bytes(receive(connection, 4), "big")
                    function, arguments = msgspec.msgpack.decode(receive(connection, length))
                    self.answering.wait()
                    reply = msgspec.msgpack.encode(self._answer(connection, function, arguments))
                    connection.sendall(len(reply).to_bytes(4, "big") + reply)
            finally:
                with self._lock:
                    self._clients.pop(connection, None)

    def _answer(self, connection: socket.socket, function: str, arguments: Any) -> tuple[int, Any]:
        with self._lock:
            self.calls.append(function)
            client = self._clients[connection]
            try:
                return dcgm_structs.OK, getattr(self, f"_do_{function}")(client, *arguments)
            except Refused as refused:
                return refused.code, None

    def _do_login(self, client: _Client) -> None:
        pass

    def _do_devices(self, client: _Client) -> list[int]:
        return list(range(len(self.gpus)))

    def _do_hierarchy(self, client: _Client) -> list[tuple[int, int, int, str, int]]:
        return [
            (GPU_INSTANCE, _number(gpu, instance), gpu, self.gpus[gpu].uuid, instance)
            for gpu in range(len(self.gpus))
            for instance in self.gpus[gpu].instances
        ]

    def _do_metric_groups(self, client: _Client, gpu: int) -> Groups:
        self._require_profiling()
        return self.gpus[gpu].groups

    def _do_make_group(self, client: _Client, kind: int, name: str) -> int:
        if sum(len(each.groups) for each in self._clients.values()) >= GROUPS_MAX:
            raise Refused(dcgm_structs.MAX_LIMIT)
        client.groups[number := self._next()] = []
        return number

    def _do_add_entity(self, client: _Client, group: int, entity_group: int, number: int) -> None:
        if (entity_group, number) not in self._entities():
            raise Refused(dcgm_structs.BADPARAM)
        client.groups[group].append((entity_group, number))

    def _do_drop_group(self, client: _Client, group: int) -> None:
        del client.groups[group]
        client.watches = {watch for watch in client.watches if watch[0] != group}

    def _do_make_field_group(self, client: _Client, fields: list[int], name: str) -> int:
        made = [each for other in self._clients.values() for each, _ in other.fields.values()]
        if len(made) >= GROUPS_MAX:
            raise Refused(dcgm_structs.MAX_LIMIT)
        if name in made:
            raise Refused(dcgm_structs.DUPLICATE_KEY)
        client.fields[number := self._next()] = (name, tuple(fields))
        return number

    def _do_watch(self, client: _Client, group: int, fields: int, microseconds: int) -> None:
        self._require_profiling()
        if not self.runs_as_root:
            raise Refused(dcgm_structs.REQUIRES_ROOT)
        if self.has_other_profiler:
            raise Refused(dcgm_structs.PROFILING_LIBRARY_ERROR)
        client.watches.add((group, fields))
        for gpu in range(len(self.gpus)):
            if self._turns(gpu) > TURNS_MAX:
                client.watches.discard((group, fields))
                raise Refused(dcgm_structs.PROFILING_MULTI_PASS)

    def _do_unwatch(self, client: _Client, group: int, fields: int) -> None:
        client.watches.discard((group, fields))

    def _do_values(
        self, client: _Client, pairs: list[list[int]], fields: list[int], flags: int
    ) -> list[tuple[int, int, int, str, int, int, float | str]]:
        watched, at = set(self._watched()), round((time.time() - self.age_seconds) * 1e6)
        told: list[tuple[int, int, int, str, int, int, float | str]] = []
        for group, number in pairs:
            for each in fields:
                if each == UUID_FIELD and flags & LIVE:
                    uuid = self.gpus[number].uuid
                    told.append((group, number, each, "s", dcgm_structs.OK, at, uuid))
                    continue
                kind = "i" if each in INTEGER_FIELDS else "d"
                blank = INT64_BLANK if kind == "i" else DOUBLE_BLANK
                if (group, number, each) not in watched:
                    told.append((group, number, each, kind, dcgm_structs.NOT_WATCHED, 0, blank))
                elif not self.is_measuring:
                    told.append((group, number, each, kind, dcgm_structs.NO_DATA, 0, blank))
                else:
                    value = blank if self.is_paused else self.value(number, each)
                    told.append((group, number, each, kind, dcgm_structs.OK, at, value))
        return told

    def _do_pause(self, client: _Client) -> None:
        self._set_paused(True)

    def _do_resume(self, client: _Client) -> None:
        self._set_paused(False)

    def _set_paused(self, is_paused: bool) -> None:
        if not self.has_profiling_module:
            raise Refused(dcgm_structs.NOT_SUPPORTED)
        self.is_paused = is_paused

    def _require_profiling(self) -> None:
        if not self.has_profiling_module:
            raise Refused(dcgm_structs.MODULE_NOT_LOADED)

    def _entities(self) -> set[tuple[int, int]]:
        gpus = range(len(self.gpus))
        return {(GPU, gpu) for gpu in gpus} | {
            (GPU_INSTANCE, _number(gpu, instance))
            for gpu in gpus
            for instance in self.gpus[gpu].instances
        }

    def _watched(self) -> list[tuple[int, int, int]]:
        there = self._entities()
        return [
            (*entity, each)
            for client in self._clients.values()
            for group, fields in client.watches
            for entity in client.groups[group]
            if entity in there
            for each in client.fields[fields][1]
        ]

    def _turns(self, gpu: int) -> int:
        """Return the most groups of one major number that would have to be counted in turns."""
        watched = {each for group, number, each in self._watched() if (group, number) == (GPU, gpu)}
        turns: dict[int, int] = {}
        for major, _, fields in self.gpus[gpu].groups:
            if watched.intersection(fields):
                turns[major] = turns.get(major, 0) + 1
        return max(turns.values(), default=0)

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers


def _number(gpu: int, instance: int) -> int:
    """Return DCGM's number of a GPU instance: it counts up to eight of each GPU."""
    return gpu * 8 + instance
