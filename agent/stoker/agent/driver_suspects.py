"""Which GPUs are left alone because a driver host hung on them, and when each is tried again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from stoker.agent.driver import Suspect
from stoker.agent.readings import Inventory

Key = str | int  # the UUID, or the index of a GPU whose UUID was never read


@dataclass(frozen=True, slots=True)
class _Exclusion:
    suspect: Suspect
    retry_at: float
    hangs: int


class Suspects:
    """The suspects of one machine; it knows what inventories told about who is at which index."""

    def __init__(self, *, retrial_seconds_min: float, retrial_seconds_max: float) -> None:
        """Take the time to the first trial, doubled with each one that hangs again, and its end."""
        self._seconds_min, self._seconds_max = retrial_seconds_min, retrial_seconds_max
        self._exclusions: dict[Key, _Exclusion] = {}
        self._uuids: dict[int, str] = {}
        self._gpu_count: int | None = None

    def __iter__(self) -> Iterator[Suspect]:
        return iter(exclusion.suspect for exclusion in self._exclusions.values())

    def learn(self, inventory: Inventory) -> Inventory:
        """Return the inventory, with UUIDs that earlier ones told of GPUs that are missing now."""
        count = len(inventory.gpus) + len(inventory.missing)
        if count != self._gpu_count:
            self._uuids, self._gpu_count = {}, count  # the others may have moved up
        self._uuids |= {gpu.index: gpu.uuid for gpu in inventory.gpus}
        missing = tuple(
            replace(fault, uuid=fault.uuid or self._uuids.get(fault.index))
            for fault in inventory.missing
        )
        return replace(inventory, missing=missing)

    def exclude(self, index: int, found: str, now: float) -> Suspect:
        """Leave the GPU alone from now on, for longer than the last time."""
        uuid = self._uuids.get(index)
        suspect = Suspect(index, uuid, self._gpu_count, found)
        self._put_off(index if uuid is None else uuid, suspect, now)
        return suspect

    def due(self, now: float) -> tuple[Key, ...]:
        """Return those whose time has come."""
        return tuple(key for key, e in self._exclusions.items() if e.retry_at <= now)

    def without(self, tried: Sequence[Key]) -> tuple[Suspect, ...]:
        """Return the suspects that are still left alone while these are tried."""
        return tuple(e.suspect for key, e in self._exclusions.items() if key not in tried)

    def acquit(self, tried: Sequence[Key]) -> None:
        """Suspect these no more."""
        for key in tried:
            del self._exclusions[key]

    def put_off(self, tried: Sequence[Key], now: float) -> None:
        """After a trial that failed: whichever of them it was, the next is not at once."""
        for key in set(tried) & set(self.due(now)):
            self._put_off(key, self._exclusions[key].suspect, now)

    def seconds_until_due(self, now: float) -> float | None:
        """Return the time to the next trial; None without suspects."""
        times = [exclusion.retry_at for exclusion in self._exclusions.values()]
        return max(0.0, min(times) - now) if times else None

    def _put_off(self, key: Key, suspect: Suspect, now: float) -> None:
        before = self._exclusions.get(key)
        hangs = before.hangs + 1 if before else 1
        pause = min(self._seconds_max, self._seconds_min * 2 ** (hangs - 1))
        self._exclusions[key] = _Exclusion(suspect, now + pause, hangs)
