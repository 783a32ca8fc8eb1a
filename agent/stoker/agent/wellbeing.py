"""How the node's GPUs are, for its state: the judge's verdicts, and memory that nobody owns.

What is new since the last look is asked for in one place (`news`), so that every event that may
change a verdict ends the same way: what must be remembered is saved, what changed is told.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from stoker.agent.health.judge import Judge
from stoker.agent.model import NumberedInventory, ProcessSeen, Release
from stoker.agent.picture import Picture
from stoker.agent.readings import GpuReading, GpuSample
from stoker.agent.records import HealthRecord
from stoker.agent.unattributed import unattributed_bytes
from stoker.agent.verdicts import Check, GpuHealth, KernelLine, KernelLogStatus


class Wellbeing:
    """The health of the node's GPUs. `at` is Unix seconds, `now` monotonic seconds."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._told: tuple[GpuHealth, ...] = judge.gpus()
        self.kernel_log = KernelLogStatus()
        self.unsaved = ""  # why a restart would judge otherwise; empty: it would not
        self.memory_unattributed_bytes: Mapping[str, int] = {}
        self._samples_before: tuple[GpuSample, ...] = ()
        self._counted: tuple[tuple[ProcessSeen, ...], frozenset[str]] | None = None

    @property
    def gpus(self) -> tuple[GpuHealth, ...]:
        """The verdicts, also on GPUs that cannot be read."""
        return self._judge.gpus()

    def take_readings(
        self, at: float, now: float, readings: Sequence[GpuReading], picture: Picture
    ) -> None:
        """Take in a tick that was answered, and what the picture is with it."""
        self._judge.take_readings(at, now, readings, picture.gpus)
        if self._counted is not None:
            processes, untold = self._counted
            self._counted = None
            self.memory_unattributed_bytes = unattributed_bytes(
                self._samples_before, picture.samples, processes, untold
            )

    def take_silence(self, at: float, now: float, reason: str) -> None:
        """Take in that nothing is read."""
        self.memory_unattributed_bytes, self._counted = {}, None
        self._judge.take_silence(at, now, reason)

    def take_release(self, at: float, now: float, release: Release) -> None:
        """Take in that nothing is read, with each tick of a release: what was seen grows old."""
        self.take_silence(at, now, f"the driver is released by {release.by}")

    def take_kernel_log(self, at: float, lines: Sequence[KernelLine]) -> None:
        """Take in what the kernel's log tells."""
        self._judge.take_kernel_log(at, lines)

    def begin_processes(self, samples: Sequence[GpuSample]) -> None:
        """Take in the newest samples as a reading of processes begins."""
        self._samples_before = tuple(samples)

    def take_processes(
        self, processes: Sequence[ProcessSeen], unread: Sequence[str], partitioned: Iterable[str]
    ) -> None:
        """Take in who uses the GPUs; what nobody owns is known with the next tick.

        Of GPUs that are `partitioned` (MIG) a process is told with the memory of its part.
        """
        self._counted = tuple(processes), frozenset((*unread, *partitioned))

    def forgive(self, at: float, uuid: str) -> None:
        """Take in that a GPU's faults are mended, as a person says."""
        self._judge.forgive(at, uuid)

    def take_loss(self, record: HealthRecord, reason: str) -> None:
        """Take in that this could not be written down; it comes again with later news."""
        self.unsaved = reason
        self._judge.take_loss((record,))

    def take_driver_opened(self, at: float) -> None:
        """Take in that the driver is read again: it may have been loaded anew meanwhile."""
        self._judge.take_driver_loaded(at)

    def complete(self, at: float, inventory: NumberedInventory) -> NumberedInventory:
        """Take in the inventory; return it with the GPUs that it should list and does not."""
        told = without_absent(inventory)
        self._judge.take_inventory(at, told)
        return replace(told, missing=(*told.missing, *self._judge.absent()))

    def news(self, *, is_saving: bool) -> tuple[tuple[HealthRecord, ...], bool]:
        """Return what is to be remembered since the last time, and whether a verdict changed.

        While earlier records are being saved, later ones wait here, the newest of each fault: a
        disk that hangs lets nothing pile up.
        """
        before, self._told = self._told, self._judge.gpus()
        return () if is_saving else self._judge.take_records(), self._told is not before


def without_absent(inventory: NumberedInventory) -> NumberedInventory:
    """Return the inventory as the driver told it, without what `complete` has added."""
    told = tuple(each for each in inventory.missing if each.error_kind != Check.GPU_MISSING)
    return replace(inventory, missing=told)
