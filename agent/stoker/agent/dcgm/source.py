"""Reads the hardware counters of GPUs before Hopper from an nv-hostengine that runs already.

    no connection ──▶ connected ──▶ each GPU: not watched ──▶ watched ──▶ read
          ▲               │                       ▲              │
          └── back-off ◀──┘ any call failed       └── back-off ◀─┘ this GPU failed

Whatever goes wrong, the answer is a `Told` that says so for the GPUs it concerns; the next
question after the back-off tries again from the beginning. A hostengine that was restarted knows
nothing of us, so with the connection everything made over it is forgotten.

One group of entities per GPU (and one for its MIG instances): DCGM watches profiling fields only
of identical GPUs together, and so the failure of one does not cost the others. Not thread-safe.
"""

import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from stoker.agent.dcgm.bindings import Bindings, Hostengine, shut_down
from stoker.agent.dcgm.codes import DcgmFailed
from stoker.agent.dcgm.fields import INTERVALS_FRESH, described, of_instance, select
from stoker.agent.dcgm.merge import DCGM, Question, Told
from stoker.agent.dcgm.values import Entity, Value, judge
from stoker.agent.driver import (
    DriverError,
    NotAvailable,
    NotFound,
    NotSupported,
    UnknownDriverError,
)
from stoker.agent.facts import Fact
from stoker.agent.readings import ReadFailure

RETRY_SECONDS_MIN = 1.0
RETRY_SECONDS_MAX = 60.0
# The profiling module needs a while until it tells the first values.
SETTLE_SECONDS_MIN = 5.0


@dataclass(slots=True)
class _BackOff:
    """When to try again, and why it is not tried now."""

    error: DriverError | None = None
    retry_at: float = 0.0  # monotonic
    pause: float = 0.0

    def failed(self, error: DriverError, now: float) -> None:
        self.error = error
        self.pause = min(RETRY_SECONDS_MAX, max(RETRY_SECONDS_MIN, 2 * self.pause))
        self.retry_at = now + self.pause

    def succeeded(self) -> None:
        self.error, self.retry_at, self.pause = None, 0.0, 0.0


@dataclass(slots=True)
class _Watch:
    """What is watched of one GPU."""

    since: float  # monotonic
    instances: Mapping[Entity, int]  # its GPU instances with their numbers
    places: Mapping[Entity, int | None]  # those, and None for the GPU itself
    fields: dict[Entity, frozenset[int]] = field(default_factory=dict[Entity, frozenset[int]])
    made: list[tuple[Any, Any]] = field(default_factory=list[tuple[Any, Any]])  # DCGM's groups

    @property
    def numbers(self) -> frozenset[int]:
        return frozenset(self.instances.values())

    @property
    def all_fields(self) -> set[int]:
        return set[int]().union(*self.fields.values())


@dataclass(slots=True)
class _Session:
    """A connection and everything made over it."""

    engine: Hostengine
    is_paused: bool = False
    watches: dict[str, _Watch] = field(default_factory=dict[str, _Watch])
    field_groups: dict[tuple[int, ...], Any] = field(default_factory=dict[tuple[int, ...], Any])


class DcgmSource:
    """Answers questions by what an nv-hostengine says."""

    def __init__(
        self,
        address: str,
        interval_seconds: float,
        load: Callable[[], Bindings],
        *,
        log: Callable[[str], None],
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take where it listens, how often to measure, and how the bindings are loaded."""
        self._address = address
        self._interval = interval_seconds
        self._load = load
        self._log = log
        self._now = now
        self._monotonic = monotonic
        self._bindings: Bindings | None = None
        self._session: _Session | None = None
        self._back_off = _BackOff()
        self._gpu_back_off: dict[str, _BackOff] = {}
        self._owes_resume = False
        self._logged: dict[str, str] = {}
        self._token = os.urandom(4).hex()
        self._names = 0
        self.call = DCGM  # the call made last; read by other threads

    def ask(self, question: Question) -> Told:
        """Return what DCGM tells now; never raises."""
        now = self._monotonic()
        if not question.gpus:
            # A GPU that is lost for a moment must not end a pause.
            if question.profiling:
                self._disconnect()
            return Told()
        if self._back_off.error is not None and now < self._back_off.retry_at:
            return _failed(question, self._back_off.error)
        try:
            return self._answer(question, now)
        except DriverError as error:
            return self._give_up(question, error, now)
        except DcgmFailed as failed:
            return self._give_up(question, failed.error, now)
        except Exception as error:  # noqa: BLE001 (see below)
            # Foreign code, read over the shoulder of NVML, whose readings it must never cost.
            found = f"{self.call}: {type(error).__name__}: {error}"
            return self._give_up(question, UnknownDriverError(found), now)

    def close(self) -> None:
        """Resume what we paused, and disconnect; never raises."""
        self._disconnect()
        if self._bindings is not None:
            with suppress(DcgmFailed):
                shut_down(self._bindings, self._announce)

    def _answer(self, question: Question, now: float) -> Told:
        session = self._connected()
        if not question.profiling:
            self._pause(session)
            self._worked()
            return Told()
        self._resume(session, now)
        self._arrange(session, question.gpus, now)
        told = self._read(session, question.gpus, now)
        self._worked()
        return told

    def _connected(self) -> _Session:
        if self._session is None:
            if self._bindings is None:
                self._bindings = self._load()
            self._session = _Session(Hostengine(self._bindings, self._address, self._announce))
            self._gpu_back_off.clear()
        return self._session

    def _pause(self, session: _Session) -> None:
        if session.is_paused:
            return
        self._owes_resume = True
        with _unless_unsupported():
            session.engine.pause()
        session.is_paused = True

    def _resume(self, session: _Session, now: float) -> None:
        """End a pause that is ours: it may be one from before the connection was lost."""
        if not self._owes_resume:
            return
        with _unless_unsupported():
            session.engine.resume()
        self._owes_resume = session.is_paused = False
        for watch in session.watches.values():
            watch.since = now

    def _arrange(self, session: _Session, gpus: Mapping[str, frozenset[int]], now: float) -> None:
        """Watch what is asked about, and nothing else."""
        for uuid in session.watches.keys() - gpus.keys():
            self._unwatch(session, uuid)
        due = [
            uuid
            for uuid, instances in gpus.items()
            if (uuid not in session.watches or session.watches[uuid].numbers != instances)
            and now >= self._gpu_back_off.setdefault(uuid, _BackOff()).retry_at
        ]
        if not due:
            return
        known = session.engine.uuids()
        instances = session.engine.instances() if any(gpus[uuid] for uuid in due) else ()
        for uuid in due:
            back_off = self._gpu_back_off[uuid]
            parts = {
                each.entity: each.gpu_instance_id
                for each in instances
                if each.gpu_uuid == uuid and each.gpu_instance_id in gpus[uuid]
            }
            try:
                if uuid not in session.watches or session.watches[uuid].instances != parts:
                    self._unwatch(session, uuid)
                    self._watch(session, uuid, known, parts, now)
                if missing := sorted(gpus[uuid] - set(parts.values())):
                    raise NotFound(
                        f"DCGM does not know GPU instance {', '.join(map(str, missing))}",
                        function="dcgmGetGpuInstanceHierarchy",
                    )
                back_off.error = None  # whether it works its values tell
            except DriverError as error:
                back_off.failed(error, now)
            except DcgmFailed as failed:
                if failed.is_connection_lost:
                    raise
                back_off.failed(failed.error, now)
            if back_off.error is not None:
                self._say(uuid, f"{uuid}: {back_off.error}")

    def _watch(
        self,
        session: _Session,
        uuid: str,
        known: Mapping[str, Entity],
        instances: Mapping[Entity, int],
        now: float,
    ) -> None:
        gpu = known.get(uuid)
        if gpu is None:
            raise NotFound("DCGM does not have this GPU", function="dcgmGetAllSupportedDevices")
        selection = select(session.engine.metric_groups(gpu))
        if not selection.watched:
            raise NotSupported(
                "no profiling field is known of this GPU",
                function="dcgmProfGetSupportedMetricGroups",
            )
        watch = session.watches[uuid] = _Watch(now, instances, {gpu: None, **instances})
        try:
            self._watch_entities(session, watch, (gpu,), selection.watched)
            if instances:
                fields = of_instance(selection.watched)
                self._watch_entities(session, watch, tuple(instances), fields)
        except DcgmFailed:
            self._unwatch(session, uuid)
            raise
        if selection.left_out:
            self._say(
                uuid,
                f"{uuid}: not watched, because the hardware would count them in turns with what is "
                f"watched: {described(selection.left_out)}",
            )

    def _watch_entities(
        self,
        session: _Session,
        watch: _Watch,
        entities: tuple[Entity, ...],
        fields: tuple[int, ...],
    ) -> None:
        engine = session.engine
        if fields not in session.field_groups:
            session.field_groups[fields] = engine.make_field_group(self._name(), fields)
        field_group = session.field_groups[fields]
        group = engine.make_group(self._name(), entities)
        watch.made.append((group, field_group))
        engine.watch(group, field_group, self._interval)
        watch.fields.update((entity, frozenset(fields)) for entity in entities)

    def _unwatch(self, session: _Session, uuid: str) -> None:
        watch = session.watches.pop(uuid, None)
        for group, field_group in watch.made if watch else ():
            # What was never watched, or went with a MIG instance, cannot be unwatched.
            with suppress(DcgmFailed):
                session.engine.unwatch(group, field_group)
            with suppress(DcgmFailed):
                session.engine.drop_group(group)

    def _read(self, session: _Session, gpus: Mapping[str, frozenset[int]], now: float) -> Told:
        facts: dict[str, Mapping[Fact, float]] = {}
        instances: dict[tuple[str, int], Mapping[Fact, float]] = {}
        failures: dict[str, ReadFailure] = {}
        values = self._values(session)
        settling = max(SETTLE_SECONDS_MIN, INTERVALS_FRESH * self._interval)
        for uuid, wanted in gpus.items():
            back_off = self._gpu_back_off[uuid]
            watch = session.watches.get(uuid)
            error = back_off.error
            if watch is not None:
                judged = judge(values[uuid], watch.places, self._now(), self._interval)
                for place, told in judged.facts.items():
                    if place is None:
                        facts[uuid] = told
                    else:
                        instances[uuid, place] = told
                if judged.is_unwatched:
                    self._unwatch(session, uuid)
                    back_off.failed(NotAvailable("DCGM has stopped to measure it"), now)
                    error = back_off.error
                elif judged.facts and watch.numbers == wanted:
                    back_off.succeeded()
                elif now - watch.since > settling:
                    error = error or judged.error
            if error is not None:
                failures[uuid] = ReadFailure(DCGM, error.kind, f"{uuid}: {error}")
        return Told(facts, instances, failures)

    def _values(self, session: _Session) -> Mapping[str, list[Value]]:
        """Return by GPU the newest values of what is watched: one call for all GPUs."""
        watches = session.watches
        values: dict[str, list[Value]] = {uuid: [] for uuid in watches}
        uuids = {entity: uuid for uuid in watches for entity in watches[uuid].fields}
        if not uuids:
            return values
        fields = {field for watch in watches.values() for field in watch.all_fields}
        for value in session.engine.newest(tuple(uuids), sorted(fields)):
            uuid = uuids.get(value.entity)
            if uuid is not None and value.field in watches[uuid].fields[value.entity]:
                values[uuid].append(value)
        return values

    def _give_up(self, question: Question, error: DriverError, now: float) -> Told:
        """Forget the connection, and everything made over it, for a while."""
        self._disconnect()
        self._back_off.failed(error, now)
        self._say("", str(error))
        return _failed(question, error)

    def _disconnect(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        with suppress(DcgmFailed):
            self._resume(session, self._monotonic())
        with suppress(DcgmFailed):
            session.engine.close()

    def _worked(self) -> None:
        if self._back_off.error is not None:
            self._back_off.succeeded()
            self._say("", f"{self._address} answers again")

    def _announce(self, function: str) -> None:
        self.call = function

    def _name(self) -> str:
        """Return a name that no other client of the hostengine has."""
        self._names += 1
        return f"stoker-{self._token}-{self._names}"

    def _say(self, topic: str, text: str) -> None:
        """Log it, unless it was the last thing said about this."""
        if self._logged.get(topic) != text:
            self._logged[topic] = text
            self._log(text)


def _failed(question: Question, error: DriverError) -> Told:
    return Told(
        failures={uuid: ReadFailure(DCGM, error.kind, f"{uuid}: {error}") for uuid in question.gpus}
    )


@contextmanager
def _unless_unsupported() -> Generator[None]:
    """Pass when there is nothing to pause: no profiling module, no counters held."""
    try:
        yield
    except DcgmFailed as failed:
        if not isinstance(failed.error, NotSupported):
            raise
