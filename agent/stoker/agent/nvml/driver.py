"""Reads GPUs through NVML: the driver's errors and its habits end here.

`NvmlDriver` is given a table of functions: `nvidia_ml_py()` for the real thing, a
`SimulatedNvml` for a simulated node. The library is found by nvidia-ml-py and by nothing else, so
whatever `libnvidia-ml.so.1` the dynamic loader finds is the one that is asked.

What is known about NVML, why this looks as it does, and where it stands:

- A fact that is not supported, or whose function is missing, stays so until the GPUs are looked
  for anew; asking again is a wasted call into a driver that takes a global lock (`nvml.plan`).
- A function may have a newer form: the forms are tried in order until one is there (`nvml.facts`,
  `nvml.fields`).
- A lost GPU answers every call with GPU_IS_LOST, and some drivers answer slowly: it is not asked
  again until the GPUs are looked for anew. The others are read on (`nvml.gpu`).
- A missing symbol behind an unversioned function raises NVMLLibraryMismatchError, which is no
  NVMLError. Bytes that are no UTF-8 raise UnicodeDecodeError (`nvml.session`).
- Values that mean "not available" look like numbers: `nvml.units` knows them, and the units.
- Handles of MIG devices go stale and are used again for others (`nvml.mig`).
- A session counts the GPUs that were there when it began: one that is plugged in later is seen by
  the kernel (/proc/driver/nvidia/gpus) and by a fresh session only.
- nvmlDeviceGetPcieThroughput blocks for 20 ms in each direction: counters are read instead.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

from stoker.agent.driver import (
    DriverError,
    DriverTimeout,
    DriverUnavailable,
    FunctionMissing,
    InventoryChanged,
    LibraryMissing,
    NotAvailable,
    Suspect,
)
from stoker.agent.facts import Rate
from stoker.agent.nvml.gpm import GpmMetrics
from stoker.agent.nvml.gpu import NvmlGpu
from stoker.agent.nvml.links import with_peers
from stoker.agent.nvml.processes import ProcessNames
from stoker.agent.nvml.session import NO_GPU, Device, Session, if_told
from stoker.agent.nvml.table import NvmlTable
from stoker.agent.nvml.units import as_text, cuda_version, release_of
from stoker.agent.readings import (
    GpuFault,
    GpuReading,
    Inventory,
    ProcessesReading,
    ProcessReading,
    XidSeen,
)

# More Xids of one GPU than these wait for no reading: the oldest go.
UNDELIVERED_MAX = 256
# One folder for each GPU that the kernel module knows, named by its PCI address.
KERNEL_GPUS = "/proc/driver/nvidia/gpus"

__all__ = ["NO_GPU", "NvmlDriver", "nvidia_ml_py"]


def nvidia_ml_py() -> NvmlTable:
    """Return nvidia-ml-py; importing it loads no library. Raises LibraryMissing without it."""
    try:
        import pynvml  # type: ignore[import-untyped]  # noqa: PLC0415 (not in every installation)
    except ImportError as error:
        raise LibraryMissing(
            f"the Python package nvidia-ml-py is not installed ({error}); "
            "it comes with stoker[agent]"
        ) from error
    return cast("NvmlTable", pynvml)


def kernel_gpus(folder: str = KERNEL_GPUS) -> frozenset[str]:
    """Return the PCI addresses of the GPUs that the kernel module knows; none without a module."""
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


class NvmlDriver:
    """A session with NVML; see `stoker.agent.driver.Driver` for what its methods answer."""

    def __init__(
        self,
        table: NvmlTable,
        *,
        simulated: bool = False,
        now: Callable[[], float] = time.time,
        announce: Callable[[int, str], None] = lambda index, function: None,
        known_to_kernel: Callable[[], frozenset[str]] = kernel_gpus,
    ) -> None:
        """Take the functions to call; `announce` hears of every call before it is made."""
        self._session = Session(table, announce)
        self._simulated = simulated
        self._now = now
        self._gpus: list[NvmlGpu] = []
        self._count = 0  # of the GPUs that the driver counted, those that cannot be read too
        self._known_to_kernel = known_to_kernel
        self._known: frozenset[str] = frozenset()  # when the session began
        self._names = ProcessNames(self._session)
        self._metrics: GpmMetrics | None = None
        # By UUID: what was collected and not told yet survives a new inventory.
        self._xids: dict[str, deque[XidSeen]] = {}

    def open(self) -> None:
        """Begin the session; raises DriverUnavailable when there is nothing to talk to."""
        self._known = self._known_to_kernel()
        try:
            self._session.ask(None, "nvmlInit")
        except DriverUnavailable:
            raise
        except DriverError as error:
            raise DriverUnavailable(error.found, function=error.function) from error
        try:
            self._metrics = GpmMetrics(self._session)
        except FunctionMissing:
            self._metrics = None

    def close(self) -> None:
        """End the session and let go of the devices."""
        gpus, self._gpus = self._gpus, []
        for gpu in gpus:
            gpu.close()
        self._session.ask(None, "nvmlShutdown")

    def inventory(self, suspects: Sequence[Suspect] = ()) -> Inventory:
        """Find the GPUs anew, leaving the suspects alone; later questions are about those found."""
        session, at = self._session, self._now()
        missing: list[GpuFault] = []
        count: int = session.ask(None, "nvmlDeviceGetCount")
        self._count = count
        alone = {s.index: s for s in suspects if s.gpu_count in (None, count)}
        alone_by_uuid = {s.uuid: s for s in suspects if s.uuid is not None}
        gpus, self._gpus = self._gpus, []
        for gpu in gpus:
            # What the driver keeps for a suspect ends with the process: it is not asked anything.
            if gpu.device.index not in alone and gpu.uuid not in alone_by_uuid:
                gpu.collect_last()
                gpu.close()
        driver_version = as_text(if_told(session, None, "nvmlSystemGetDriverVersion"))
        release = release_of(driver_version)
        for index in range(count):
            device = Device(index, None, f"GPU {index}")
            uuid: str | None = None
            suspect = alone.get(index)
            try:
                if suspect is None:
                    uuid = self._find(device)
                    suspect = alone_by_uuid.get(uuid)
                if suspect is not None or uuid is None:
                    assert suspect is not None
                    raise DriverTimeout(f"left alone: {suspect.found}", gpu=suspect.uuid)
                xids = self._xids.setdefault(uuid, deque(maxlen=UNDELIVERED_MAX))
                self._gpus.append(NvmlGpu(session, device, self._metrics, xids, self._now, release))
            except DriverUnavailable:
                raise
            except DriverError as error:
                uuid = uuid or (suspect.uuid if suspect else None)
                missing.append(GpuFault(index, uuid, error.kind, error.what))
        return Inventory(
            at=at,
            driver_version=driver_version,
            nvml_version=as_text(if_told(session, None, "nvmlSystemGetNVMLVersion")),
            cuda_driver_version=cuda_version(
                if_told(session, None, "nvmlSystemGetCudaDriverVersion")
            ),
            simulated=self._simulated,
            gpus=with_peers([(gpu.identity, gpu.links) for gpu in self._gpus]),
            missing=tuple(missing),
        )

    def sample(
        self, rates: Sequence[Rate] = (Rate.FAST,), *, profiling: bool = True
    ) -> tuple[GpuReading, ...]:
        """Read every GPU found; one that cannot be read is a reading without facts.

        Raises InventoryChanged; what was collected until then is told by the next sample.
        """
        if Rate.SLOW in rates:
            count: int = self._session.ask(None, "nvmlDeviceGetCount")
            if count != self._count:
                raise InventoryChanged(f"the driver counted {self._count} GPUs, now {count}")
            self._look_at_kernel()
        readings = tuple(gpu.read(rates, profiling=profiling) for gpu in self._gpus)
        for gpu in self._gpus:
            gpu.delivered()
        return readings

    def processes(self) -> ProcessesReading:
        """List who uses every GPU found."""
        started_at = self._now()
        users: list[ProcessReading] = []
        failed: list[GpuFault] = []
        for gpu in self._gpus:
            try:
                users.extend(gpu.read_processes(self._names))
            except DriverUnavailable:
                raise
            except DriverError as error:
                gpu.remember_loss(error)
                failed.append(GpuFault(gpu.device.index, gpu.uuid, error.kind, error.what))
        return ProcessesReading(started_at, self._now(), tuple(users), tuple(failed))

    def _look_at_kernel(self) -> None:
        """Raise InventoryChanged, with a fresh session, when a GPU was plugged in or taken out."""
        before, now = self._known, self._known_to_kernel()
        if now == before:
            return
        self.close()
        self.open()
        came, went = (" ".join(sorted(each)) or "none" for each in (now - before, before - now))
        raise InventoryChanged(f"GPUs came: {came}; went: {went} ({KERNEL_GPUS})")

    def _find(self, device: Device) -> str:
        """Fill in handle and UUID."""
        session = self._session
        device.handle = session.ask(device, "nvmlDeviceGetHandleByIndex", device.index)
        uuid = as_text(session.ask(device, "nvmlDeviceGetUUID", device.handle))
        if uuid is None:
            raise NotAvailable("the UUID is empty", function="nvmlDeviceGetUUID", gpu=device.label)
        device.label = uuid
        return uuid
