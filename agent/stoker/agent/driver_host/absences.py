"""Which GPUs are gone, and when a fresh session with the driver looks whether one has come back.

A GPU that fell off the bus, or needs a reset, stays so for the session that saw it go; one that
the driver does not count any more may be seen again only by a session that begins after its
return. So such a GPU is waited for: at growing pauses the driver host is renewed. Each renewal
costs the other GPUs a reading at most, and it is none of their faults.

A GPU that was lost is waited for as long as the driver counts it. One that is not counted any more
was likely taken out, or given to a virtual machine: it is given up once the longest pause is over.
"""

from collections.abc import Iterator, Sequence

from stoker.agent.driver import GpuLost, GpuUnavailable, ResetRequired, UnknownDriverError
from stoker.agent.driver_host.retrials import Retrials
from stoker.agent.readings import WHOLE_GPU, GpuReading, Inventory

Key = str | int  # the UUID, or the index of a GPU that never told it

# What a GPU says that a fresh session may find well. The last one: drivers have no better word
# for a GPU that is gone when its handle is asked for.
_MAY_RETURN = frozenset(
    kind.kind for kind in (GpuLost, ResetRequired, GpuUnavailable, UnknownDriverError)
)


class Absences:
    """The GPUs of one machine that are waited for."""

    def __init__(self, *, retrial_seconds_min: float, retrial_seconds_max: float) -> None:
        """Take the time to the first renewal, doubled with each that is in vain, and its end."""
        self._trials = Retrials[Key](
            seconds_min=retrial_seconds_min, seconds_max=retrial_seconds_max
        )
        self._known: set[str] = set()  # those that were found once and not given up
        self._counted: frozenset[Key] = frozenset()  # those missing that the driver counts

    def __iter__(self) -> Iterator[Key]:
        return iter(self._trials)

    def learn(self, inventory: Inventory, now: float) -> None:
        """Take who was found, and who was not."""
        found = {gpu.uuid for gpu in inventory.gpus}
        self._known |= found
        kinds: dict[Key, str] = {
            fault.index if fault.uuid is None else fault.uuid: fault.error_kind
            for fault in inventory.missing
        }
        self._counted = frozenset(kinds)
        lost = {key for key, kind in kinds.items() if kind in _MAY_RETURN}
        gone = lost | (self._known - found - self._counted)
        for key in set(self._trials) - gone:
            self._trials.settle(key, now)
        for key in gone - set(self._trials):
            self._trials.put_off(key, now)

    def notice(self, readings: Sequence[GpuReading], now: float) -> bool:
        """Take who could not be read as a whole; return whether anybody new is waited for."""
        has_more = False
        for reading in readings:
            if not reading.failures:
                continue
            kinds = {each.error_kind for each in reading.failures if each.fact == WHOLE_GPU}
            if kinds & _MAY_RETURN and reading.uuid not in self._trials:
                self._trials.put_off(reading.uuid, now)
                has_more = True
        return has_more

    def due(self, now: float) -> tuple[Key, ...]:
        """Return those whose time has come."""
        return self._trials.due(now)

    def renewed(self, tried: Sequence[Key], now: float) -> None:
        """Put off those that a fresh session has not found either, once `learn` has heard it."""
        for key in set(tried) & set(self._trials):
            if key not in self._counted and self._trials.is_last_pause(key):
                self._trials.forget(key)
                self._known.discard(str(key))
            else:
                self._trials.put_off(key, now)

    def seconds_until_due(self, now: float) -> float | None:
        """Return the time to the next renewal; None when nobody is waited for."""
        return self._trials.seconds_until_due(now)
