"""Which GPUs are left alone because a driver host hung on them, and when each is tried again.

A hang is known by the index of the GPU, and an index says who it is only while the driver numbers
its GPUs as it did in the last inventory. While an inventory is under way nobody knows the numbers:
a GPU may have gone and the others moved up. A GPU on which the host hangs then is suspected by its
index alone, until the next inventory has read the others and it is clear who is missing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from stoker.agent.driver import DriverTimeout, Suspect
from stoker.agent.driver_host.retrials import Retrials
from stoker.agent.readings import Inventory

Key = str | int  # the UUID, or the index of a GPU whose UUID is not known

# An index that tells nothing any more: no driver that counts no GPU is asked for one.
_NO_COUNT = 0


class Suspects:
    """The suspects of one machine; it knows what inventories told about who is at which index."""

    def __init__(self, *, retrial_seconds_min: float, retrial_seconds_max: float) -> None:
        """Take the time to the first trial, doubled with each one that hangs again, and its end."""
        self._trials = Retrials[Key](
            seconds_min=retrial_seconds_min, seconds_max=retrial_seconds_max
        )
        self._suspects: dict[Key, Suspect] = {}
        self._uuids: dict[int, str] = {}
        self._gpu_count: int | None = None
        self._are_numbers_known = False

    def __iter__(self) -> Iterator[Suspect]:
        return iter(self._suspects.values())

    def uuid_at(self, index: int) -> str | None:
        """Return who is at this index; None when that is not known, or not known just now."""
        return self._uuids.get(index) if self._are_numbers_known else None

    def distrust_numbers(self) -> None:
        """An inventory begins: what an index says is unknown until `learn`."""
        self._are_numbers_known = False

    def misplaced_by(self, inventory: Inventory) -> bool:
        """Whether suspects were looked for at indices that are other GPUs' now: look once more.

        They are looked for by UUID then, and so is every one that is known by its index alone.
        """
        count = len(inventory.gpus) + len(inventory.missing)
        if count != self._gpu_count or not self._has_moved(inventory):
            return False  # where the count differs, the driver did not go by index
        left_alone = {fault.index for fault in inventory.missing}
        misplaced = any(s.gpu_count == count and s.index in left_alone for s in self)
        self._unplace()
        return misplaced

    def learn(self, inventory: Inventory) -> Inventory:
        """Return the inventory, with UUIDs that earlier ones told of GPUs that are missing now."""
        count = len(inventory.gpus) + len(inventory.missing)
        if count != self._gpu_count or self._has_moved(inventory):
            self._unplace()
            self._uuids, self._gpu_count = {}, count
        self._uuids |= {gpu.index: gpu.uuid for gpu in inventory.gpus}
        self._uuids |= {
            fault.index: fault.uuid for fault in inventory.missing if fault.uuid is not None
        }
        self._are_numbers_known = True
        self._place(count)
        missing = tuple(
            replace(fault, uuid=fault.uuid or self._uuids.get(fault.index))
            for fault in inventory.missing
        )
        return replace(inventory, missing=missing)

    def exclude(self, index: int, found: str, now: float) -> Suspect:
        """Leave the GPU alone from now on, for longer than the last time."""
        uuid = self.uuid_at(index)
        gpu_count = self._gpu_count if self._are_numbers_known else None
        suspect = Suspect(index, uuid, gpu_count, found)
        key = index if uuid is None else uuid
        self._suspects[key] = suspect
        self._trials.put_off(key, now)
        return suspect

    def due(self, now: float) -> tuple[Key, ...]:
        """Return those whose time has come."""
        return self._trials.due(now)

    def without(self, tried: Sequence[Key]) -> tuple[Suspect, ...]:
        """Return the suspects that are still left alone while these are tried."""
        return tuple(suspect for key, suspect in self._suspects.items() if key not in tried)

    def acquit(self, inventory: Inventory, now: float) -> None:
        """After a trial: suspect no more those that this inventory did not leave alone.

        One that was tried and is missing for another reason does not hang: it is lost, or the like.
        """
        left_alone = {
            fault.index for fault in inventory.missing if fault.error_kind == DriverTimeout.kind
        }
        for key, suspect in list(self._suspects.items()):
            if suspect.index not in left_alone:
                del self._suspects[key]
                self._trials.settle(key, now)
        self.put_off(now)

    def put_off(self, now: float) -> None:
        """After a trial that failed: whichever it was of those due, the next is not at once."""
        for key in self.due(now):
            self._trials.put_off(key, now)

    def seconds_until_due(self, now: float) -> float | None:
        """Return the time to the next trial; None without suspects."""
        return self._trials.seconds_until_due(now)

    def _has_moved(self, inventory: Inventory) -> bool:
        """Whether a GPU is not at the index where it was."""
        return any(self._uuids.get(gpu.index, gpu.uuid) != gpu.uuid for gpu in inventory.gpus)

    def _unplace(self) -> None:
        """Go by UUID alone; those without one may be anybody, and are suspected no more."""
        for key, suspect in list(self._suspects.items()):
            if suspect.uuid is not None:
                self._suspects[key] = replace(suspect, gpu_count=_NO_COUNT)
            elif suspect.gpu_count is not None:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        del self._suspects[key]
        self._trials.forget(key)

    def _place(self, count: int) -> None:
        """Take down at which index each suspect is, and who those without a name are."""
        index_of = {uuid: index for index, uuid in self._uuids.items()}
        for key, suspect in list(self._suspects.items()):
            index = suspect.index if suspect.uuid is None else index_of.get(suspect.uuid)
            if index is None:
                continue  # the driver does not count it any more
            if index >= count:
                self._drop(key)
                continue
            uuid = self._uuids.get(index)
            placed = replace(suspect, index=index, uuid=uuid, gpu_count=count)
            if uuid is None or uuid == key:
                self._suspects[key] = placed
            else:
                del self._suspects[key]
                self._suspects[uuid] = placed
                self._trials.rename(key, uuid)
