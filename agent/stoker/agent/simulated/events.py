"""Events of simulated GPUs: what the scenario lets happen, and every change of a MIG layout.

An event set hears what happens after a GPU was registered in it, once; nobody hears what happened
before.
"""

# ruff: noqa: N802, N815 (the names are the driver's own)

from collections import deque
from dataclasses import dataclass, field

from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.library import NO_INSTANCE, NVML, error
from stoker.agent.simulated.session import SimulatedSession, of_card, of_system

# The driver keeps a queue too; its length is not told.
_EVENTS_MAX = 1000
_WAIT_STEP_SECONDS = 0.02

_XID: int = NVML.nvmlEventTypeXidCriticalError
_MIG_CHANGED: int = NVML.nvmlEventMigConfigChange
_ALWAYS_SUPPORTED: int = (
    _XID
    | NVML.nvmlEventTypeSingleBitEccError
    | NVML.nvmlEventTypeDoubleBitEccError
    | NVML.nvmlEventTypePState
    | NVML.nvmlEventTypeClock
)


@dataclass(frozen=True, slots=True)
class SimulatedEvent:
    """What the driver's struct of an event tells."""

    device: SimulatedCard
    eventType: int
    eventData: int  # the Xid
    gpuInstanceId: int
    computeInstanceId: int


@dataclass(slots=True, eq=False)
class SimulatedEventSet:
    """What is listened for since when, by GPU, and what was heard and not yet fetched."""

    types: dict[SimulatedCard, tuple[int, float]] = field(
        default_factory=dict[SimulatedCard, tuple[int, float]]
    )
    heard: deque[SimulatedEvent] = field(
        default_factory=lambda: deque[SimulatedEvent](maxlen=_EVENTS_MAX)
    )


class EventFunctions(SimulatedSession):
    """Questions about what happened."""

    def _prepare(self) -> None:
        super()._prepare()
        self._event_sets: list[SimulatedEventSet] = []
        # When the scenario began, and which of its events were reported since.
        self._reported: tuple[float, set[int]] = (float("-inf"), set())

    @of_card
    def nvmlDeviceGetSupportedEventTypes(self, card: SimulatedCard, /) -> int:
        return _ALWAYS_SUPPORTED | (_MIG_CHANGED if card.model.has_mig else 0)

    @of_system
    def nvmlEventSetCreate(self) -> SimulatedEventSet:
        created = SimulatedEventSet()
        self._event_sets.append(created)
        return created

    @of_card
    def nvmlDeviceRegisterEvents(
        self, card: SimulatedCard, types: int, event_set: SimulatedEventSet, /
    ) -> None:
        self._fail_unless_open(event_set)
        supported = _ALWAYS_SUPPORTED | (_MIG_CHANGED if card.model.has_mig else 0)
        if types & ~supported:
            raise error("NOT_SUPPORTED")
        before, since = event_set.types.get(card, (0, self._now()))
        event_set.types[card] = (before | types, since)

    def nvmlEventSetWait_v2(
        self, event_set: SimulatedEventSet, timeout_milliseconds: int, /
    ) -> SimulatedEvent:
        return self._wait("nvmlEventSetWait_v2", event_set, timeout_milliseconds)

    def nvmlEventSetWait(
        self, event_set: SimulatedEventSet, timeout_milliseconds: int, /
    ) -> SimulatedEvent:
        return self._wait("nvmlEventSetWait", event_set, timeout_milliseconds)

    @of_system
    def nvmlEventSetFree(self, event_set: SimulatedEventSet, /) -> None:
        self._fail_unless_open(event_set)
        self._event_sets.remove(event_set)

    def _wait(
        self, function: str, event_set: SimulatedEventSet, timeout_milliseconds: int
    ) -> SimulatedEvent:
        # A set of one GPU has that GPU's faults.
        listened = list(event_set.types)
        card = listened[0] if len(listened) == 1 else None
        self.admit(function, card)
        self._fail_unless_open(event_set)
        until = self._now() + timeout_milliseconds / 1000
        while True:
            self._report_due()
            if event_set.heard:
                return event_set.heard.popleft()
            left = until - self._now()
            if left <= 0:
                raise error("TIMEOUT")
            self._pause(min(_WAIT_STEP_SECONDS, left))
            self.admit(function, card)

    def _report_due(self) -> None:
        """Let the event sets hear what has happened by now."""
        if self._reported[0] != self._began_at:
            self._reported = (self._began_at, set())
        seconds, reported = self._seconds(), self._reported[1]
        for number, event in enumerate(self._scenario.events):
            if event.at_seconds > seconds or number in reported:
                continue
            reported.add(number)
            instance = NO_INSTANCE if event.gpu_instance is None else event.gpu_instance
            happened = SimulatedEvent(
                self._cards[event.gpu], _XID, event.xid, instance, NO_INSTANCE
            )
            self._spread(happened, self._began_at + event.at_seconds)

    def _partition_changed(self, card: SimulatedCard, at: float) -> None:
        super()._partition_changed(card, at)
        happened = SimulatedEvent(card, _MIG_CHANGED, 0, NO_INSTANCE, NO_INSTANCE)
        self._spread(happened, at)

    def _spread(self, happened: SimulatedEvent, at: float) -> None:
        for event_set in self._event_sets:
            types, since = event_set.types.get(happened.device, (0, at))
            if types & happened.eventType and since <= at:
                event_set.heard.append(happened)

    def _fail_unless_open(self, event_set: SimulatedEventSet) -> None:
        if event_set not in self._event_sets:
            raise error("INVALID_ARGUMENT")
