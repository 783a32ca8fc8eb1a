"""When something that failed is tried again: at pauses that grow each time it fails again."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Trial:
    pause: float
    at: float  # of the next trial; of one that is well: when it came back
    is_well: bool = False


class Retrials(Generic[K]):
    """Those that failed, by key.

    One that works again is remembered for as long as its last pause: when it fails before that is
    over, its pauses go on growing. Something that works for a moment after each trial would
    otherwise be tried at the shortest pause for ever.
    """

    def __init__(self, *, seconds_min: float, seconds_max: float) -> None:
        """Take the pause before the first trial, doubled with each that fails, and its end."""
        self._seconds_min, self._seconds_max = seconds_min, seconds_max
        self._trials: dict[K, _Trial] = {}

    def __contains__(self, key: K) -> bool:
        trial = self._trials.get(key)
        return trial is not None and not trial.is_well

    def __iter__(self) -> Iterator[K]:
        return (key for key, trial in self._trials.items() if not trial.is_well)

    def put_off(self, key: K, now: float) -> None:
        """It failed, or failed again: the next trial comes after a longer pause."""
        before = self._remembered(key, now)
        pause = min(self._seconds_max, before.pause * 2) if before else self._seconds_min
        self._trials[key] = _Trial(pause, now + pause)

    def settle(self, key: K, now: float) -> None:
        """It works again."""
        if key in self:
            self._trials[key] = replace(self._trials[key], at=now, is_well=True)

    def forget(self, key: K) -> None:
        """Nothing is known of it any more."""
        self._trials.pop(key, None)

    def rename(self, key: K, name: K) -> None:
        """It is known by another key now; of two that were the same the longer pause counts."""
        trial, other = self._trials.pop(key), self._trials.get(name)
        if other is None or other.is_well or other.pause < trial.pause:
            self._trials[name] = trial

    def due(self, now: float) -> tuple[K, ...]:
        """Return those whose time has come."""
        return tuple(key for key in self if self._trials[key].at <= now)

    def is_last_pause(self, key: K) -> bool:
        """Whether its pauses do not grow any more."""
        return self._trials[key].pause >= self._seconds_max

    def seconds_until_due(self, now: float) -> float | None:
        """Return the time to the next trial; None when nothing is to be tried."""
        times = [self._trials[key].at for key in self]
        return max(0.0, min(times) - now) if times else None

    def _remembered(self, key: K, now: float) -> _Trial | None:
        well = [k for k, t in self._trials.items() if t.is_well and now - t.at >= t.pause]
        for each in well:
            del self._trials[each]
        return self._trials.get(key)
