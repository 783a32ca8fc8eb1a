"""The MIG devices of one GPU: who they are, what each tells, and that it is still the same one.

Partitions change under us, handles go stale and are used again for another device. So every
reading of a MIG device ends with the question for its UUID: another answer, or none, and what was
read is thrown away, the devices are listed anew and read once more. Listing them can be slow, so it
is done when the GPUs are looked for, after an event that says they changed, when one turned out
stale, and with the slow facts where the driver has no such event.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from stoker.agent.driver import (
    DriverError,
    DriverUnavailable,
    FactUnavailable,
    GpuUnavailable,
    InventoryChanged,
    NotAvailable,
    NotFound,
    NotSupported,
)
from stoker.agent.facts import Fact
from stoker.agent.nvml.facts import MEMORY, Told
from stoker.agent.nvml.gpm import Gpm
from stoker.agent.nvml.session import Device, InvalidArgument, Prepared, Session
from stoker.agent.nvml.table import DeviceAttributes
from stoker.agent.nvml.units import MEBIBYTE, as_text
from stoker.agent.readings import MigDeviceIdentity, MigDeviceReading

_UUID: Final = "nvmlDeviceGetUUID"
# A reading that finds a device stale begins once more, with the devices that are there now.
_ATTEMPTS: Final = 2
_MEGABYTES_PER_GIGABYTE: Final = 1024


@dataclass(frozen=True, slots=True)
class _MigDevice:
    """A compute instance in a GPU instance, as the driver lists it."""

    device: Device
    identity: MigDeviceIdentity
    memory: Prepared


class _Stale(Exception):
    """A handle does not lead to the device any more that it was got for."""


@contextmanager
def _going_stale() -> Generator[None]:
    """Turn what a handle answers that leads nowhere into _Stale: "lost" too is not the GPU then."""
    try:
        yield
    except DriverUnavailable:
        raise
    except DriverError as error:
        raise _Stale from error


def ask_mig_mode(session: Session, gpu: Device) -> bool | None:
    """Return whether the GPU is partitioned, or None for a card that cannot be.

    Raises DriverUnavailable and GpuUnavailable.
    """
    try:
        current, _pending = session.ask(gpu, "nvmlDeviceGetMigMode", gpu.handle)
    except (DriverUnavailable, GpuUnavailable):
        raise
    except DriverError:
        return None
    return bool(current == 1)


class MigDevices:
    """The MIG devices of a GPU that is in MIG mode."""

    def __init__(
        self, session: Session, gpu: Device, gpm: Gpm | None, *, memory_max_bytes: int
    ) -> None:
        """List them; raises DriverUnavailable and GpuUnavailable."""
        self._session, self._gpu, self._gpm = session, gpu, gpm
        self._memory_max_bytes = memory_max_bytes
        self._devices: list[_MigDevice] = []
        self._is_stale = False
        self._missing: DriverError | None = None  # why the list is not complete
        self._list()

    @property
    def identities(self) -> tuple[MigDeviceIdentity, ...]:
        """Who they are, in the driver's order, as they were listed last."""
        return tuple(each.identity for each in self._devices)

    def devices(self) -> tuple[tuple[MigDeviceIdentity, Device], ...]:
        """Return who they are, each with whom to ask, after a look that they are still the same.

        Raises DriverError, also where they could not all be listed.
        """
        if self._is_stale:
            self._list_anew()
        if self._missing is not None:
            raise self._missing
        for mig in self._devices:
            try:
                self._check(mig)
            except _Stale as error:
                self.have_changed()
                raise InventoryChanged("it is not there any more", gpu=mig.identity.uuid) from error
        return tuple((mig.identity, mig.device) for mig in self._devices)

    def have_changed(self) -> None:
        """Let the next reading list the devices anew, and compare nothing with those before."""
        self._is_stale = True
        if self._gpm is not None:
            self._gpm.keep_only(())

    def may_have_changed(self, *, is_told: bool) -> None:
        """Let the next reading list the devices anew, unless changes are told by events."""
        if self._missing is not None or not is_told:
            self._is_stale = True

    def read(self, told: Told, now: float, *, profiling: bool) -> tuple[MigDeviceReading, ...]:
        """Return what every MIG device tells.

        Raises InventoryChanged when the GPU is not in MIG mode any more, DriverUnavailable, and
        GpuUnavailable of the whole GPU only.
        """
        readings: list[MigDeviceReading] = []
        for _ in range(_ATTEMPTS):
            if self._is_stale:
                self._list_anew()
            readings = []
            counted: dict[int, Told] = {}
            for device in self._devices:
                counters = self._count(device, counted, now) if profiling else None
                try:
                    readings.append(self._read(device, told, counters))
                except _Stale:
                    self.have_changed()
            if not self._is_stale:
                break
        if self._missing is not None:
            told.fail(Fact.MIG_MODE, self._missing)
        return tuple(readings)

    def _count(self, mig: _MigDevice, counted: dict[int, Told], now: float) -> Told | None:
        """Return the hardware counters of its GPU instance, which others may be a part of too."""
        if self._gpm is None:
            return None
        instance = mig.identity.gpu_instance_id
        if instance not in counted:
            counted[instance] = Told(mig.identity.uuid)
            self._gpm.read(counted[instance], now, instance)
        return counted[instance]

    def _read(self, mig: _MigDevice, told: Told, counters: Told | None) -> MigDeviceReading:
        """Return what one tells; raises _Stale when it is not the one that was listed."""
        identity = mig.identity
        own = Told(identity.uuid, self._memory_max_bytes)
        with _going_stale():
            self._tell_memory(mig, own)
        if counters is not None:
            own.facts |= counters.facts
            own.failures |= counters.failures
        self._check(mig)
        for failure in own.failures.values():
            told.failures.setdefault(failure.fact, failure)
        return MigDeviceReading(
            identity.uuid,
            identity.gpu_instance_id,
            identity.compute_instance_id,
            identity.profile,
            own.facts,
        )

    def _check(self, mig: _MigDevice) -> None:
        """Raise _Stale when the handle does not lead to the device any more that was listed."""
        with _going_stale():
            if self._session.ask(mig.device, _UUID, mig.device.handle) != mig.identity.uuid:
                raise _Stale

    def _tell_memory(self, mig: _MigDevice, own: Told) -> None:
        try:
            mig.memory.question.tell(own, mig.memory.answer())
        except NotSupported:
            return
        except (DriverUnavailable, GpuUnavailable):
            raise
        except DriverError as error:
            # The question for the UUID tells whether it is the fact that fails or the device.
            for fact in mig.memory.question.facts:
                own.fail(fact, error)

    def _list_anew(self) -> None:
        if ask_mig_mode(self._session, self._gpu) is not True:
            raise InventoryChanged("it is not in MIG mode any more", gpu=self._gpu.label)
        self._list()

    def _list(self) -> None:
        session, gpu = self._session, self._gpu
        self._devices, self._missing, self._is_stale = [], None, False
        try:
            places: int = session.ask(gpu, "nvmlDeviceGetMaxMigDeviceCount", gpu.handle)
            for place in range(places):
                if (found := self._find(place)) is not None:
                    self._devices.append(found)
        except (DriverUnavailable, GpuUnavailable):
            raise
        except DriverError as error:
            self._missing = error
        if self._gpm is not None:
            self._gpm.keep_only({each.identity.gpu_instance_id for each in self._devices})

    def _find(self, place: int) -> _MigDevice | None:
        """Return the device at this place of the list, or None when the place is empty."""
        session, gpu = self._session, self._gpu
        try:
            handle = session.ask(gpu, "nvmlDeviceGetMigDeviceHandleByIndex", gpu.handle, place)
        except (NotFound, InvalidArgument):
            return None
        device = Device(gpu.index, handle, f"MIG device {place} of {gpu.label}")

        def asked(function: str) -> int:
            number: int = session.ask(device, function, handle)
            return number

        try:
            uuid = as_text(session.ask(device, _UUID, handle))
            if uuid is None:
                raise NotFound("its UUID is empty", gpu=device.label)
            device.label = uuid
            memory = Prepared(session, device, MEMORY)
            identity = MigDeviceIdentity(
                uuid=uuid,
                profile=self._profile(device),
                memory_total_bytes=self._memory_total(device, memory),
                gpu_instance_id=asked("nvmlDeviceGetGpuInstanceId"),
                compute_instance_id=asked("nvmlDeviceGetComputeInstanceId"),
            )
            return _MigDevice(device, identity, memory)
        except DriverUnavailable:
            raise
        except DriverError as error:
            # It went while it was asked who it is; the others are listed on.
            self._missing = error
            return None

    def _memory_total(self, device: Device, memory: Prepared) -> int:
        """Return how much its GPU instance has, as itself tells or as it was made."""
        told = Told(device.label, self._memory_max_bytes)
        try:
            memory.question.tell(told, memory.answer())
        except (DriverUnavailable, GpuUnavailable):
            raise
        except DriverError as error:
            told.fail(Fact.MEMORY_TOTAL_BYTES, error)
        total = told.facts.get(Fact.MEMORY_TOTAL_BYTES)
        if total is not None:
            return int(total)
        mebibytes = self._ask_made_of(device).memorySizeMB
        if mebibytes == 0:
            raise NotAvailable("it has no memory", gpu=device.label)
        return mebibytes * MEBIBYTE

    def _ask_made_of(self, device: Device) -> DeviceAttributes:
        made_of: DeviceAttributes = self._session.ask(
            device, "nvmlDeviceGetAttributes", device.handle
        )
        return made_of

    def _profile(self, device: Device) -> str:
        """Return "1g.10gb" of "NVIDIA H100 80GB HBM3 MIG 1g.10gb", or make it of its parts."""
        session = self._session
        try:
            name = as_text(session.ask(device, "nvmlDeviceGetName", device.handle)) or ""
        except FactUnavailable:
            name = ""
        _, is_there, profile = name.rpartition(" MIG ")
        if is_there and profile:
            return profile
        return profile_of(self._ask_made_of(device))


def profile_of(made_of: DeviceAttributes) -> str:
    """Return "3g.40gb", or "1c.3g.40gb" for a compute instance that is a part of it."""
    slices, parts = made_of.gpuInstanceSliceCount, made_of.computeInstanceSliceCount
    gigabytes = round(made_of.memorySizeMB / _MEGABYTES_PER_GIGABYTE)
    profile = f"{slices}g.{gigabytes}gb"
    return profile if parts == slices else f"{parts}c.{profile}"
