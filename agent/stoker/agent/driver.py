"""What a driver is to the agent: five questions, and the errors that answers can be.

DriverError                   carries the GPU, the driver's function, and what was found
├── DriverUnavailable         no GPU can be read until somebody acts, or a new driver host starts
│   ├── LibraryMissing        libnvidia-ml.so.1 (or nvidia-ml-py) is not on this machine
│   ├── DriverNotLoaded       the library is there, the kernel module is not loaded
│   ├── LibraryMismatch       library and kernel module differ: the driver was replaced under us
│   └── NotInitialized        the session is gone (nvmlInit was not called, or was undone)
├── GpuUnavailable            this GPU cannot be read until somebody acts; the others can
│   ├── GpuLost               it fell off the bus
│   └── ResetRequired         it must be reset before it works again
├── FactUnavailable           this card or driver does not have this fact; asking again is vain
│   ├── NotSupported          the card does not have it
│   └── FunctionMissing       the library is too old (or too new) for this function
├── NoPermission              another user or a device rule may have it, we may not
├── NotAvailable              answered with a value that means "unknown" or cannot be true
├── NotFound                  what was asked about does not exist (any more)
├── DriverTimeout             no answer within the time allowed
├── InventoryChanged          GPUs came, went, moved or changed their mode: look for them anew
├── UnknownDriverError        any other code of the driver
└── HostUnavailable           the driver host process cannot be asked now
    ├── HostEnded             it ended while it was asked, or before
    ├── HostStuck             an earlier one cannot be reaped, so no new one may start
    ├── HostRenewed           it gave way to another one, which looks for what was lost
    └── HostReleased          it was released on request and not resumed
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from stoker.agent.facts import Rate
from stoker.agent.readings import GpuReading, Inventory, ProcessesReading
from stoker.core.errors import ExitCode, StokerError


@dataclass(frozen=True, slots=True)
class Suspect:
    """A GPU on which the driver hung: a fresh driver host leaves it alone.

    `index` holds only while the driver counts `gpu_count` GPUs; `uuid` holds always, but can be
    read only by talking to the GPU.
    """

    index: int
    uuid: str | None
    gpu_count: int | None
    found: str  # "nvmlDeviceGetPowerUsage has not returned for 1 s"


class Driver(Protocol):
    """A session with a GPU driver. Every method may block for long and raises DriverError."""

    def open(self) -> None:
        """Begin the session; raises DriverUnavailable when there is nothing to talk to."""
        ...

    def inventory(self, suspects: Sequence[Suspect] = ()) -> Inventory:
        """Find the GPUs anew, leaving the suspects alone; later questions are about those found."""
        ...

    def sample(
        self, rates: Sequence[Rate] = (Rate.FAST,), *, profiling: bool = True
    ) -> tuple[GpuReading, ...]:
        """Read the facts of these rates from every GPU found.

        A GPU that cannot be read is a reading without facts. Without `profiling` the hardware
        counters are left to somebody else's profiler.
        """
        ...

    def processes(self) -> ProcessesReading:
        """List who uses every GPU found."""
        ...

    def close(self) -> None:
        """End the session and let go of the devices."""
        ...


class DriverError(StokerError):
    """Something about the driver, with the place where it was found."""

    kind: ClassVar[str] = "driver_error"

    def __init__(self, found: str, *, function: str | None = None, gpu: str | None = None) -> None:
        self.found = found
        self.function = function  # the driver's function, "nvmlDeviceGetPowerUsage"
        self.gpu = gpu  # a UUID, or "GPU 3" before the UUID is known
        super().__init__(": ".join(part for part in (gpu, self.what) if part))

    @property
    def what(self) -> str:
        """What was found by which function, for where the GPU is named already."""
        return ": ".join(part for part in (self.function, self.found) if part)


class DriverUnavailable(DriverError):
    """No GPU can be read."""

    kind = "driver_unavailable"


class LibraryMissing(DriverUnavailable):
    """The NVML library or its Python binding is not on this machine."""

    kind = "library_missing"
    exit_code = ExitCode.MISSING


class DriverNotLoaded(DriverUnavailable):
    """The kernel module is not loaded."""

    kind = "driver_not_loaded"
    exit_code = ExitCode.MISSING


class LibraryMismatch(DriverUnavailable):
    """Library and kernel module are of different versions."""

    kind = "library_mismatch"


class NotInitialized(DriverUnavailable):
    """There is no session with the driver."""

    kind = "not_initialized"


class GpuUnavailable(DriverError):
    """One GPU cannot be read."""

    kind = "gpu_unavailable"


class GpuLost(GpuUnavailable):
    """The GPU fell off the bus."""

    kind = "gpu_lost"


class ResetRequired(GpuUnavailable):
    """The GPU must be reset."""

    kind = "reset_required"


class FactUnavailable(DriverError):
    """This fact does not exist here."""

    kind = "fact_unavailable"


class NotSupported(FactUnavailable):
    """The card does not have this."""

    kind = "not_supported"


class FunctionMissing(FactUnavailable):
    """The library does not have this function."""

    kind = "function_missing"


class NoPermission(DriverError):
    """We may not have this."""

    kind = "no_permission"


class NotAvailable(DriverError):
    """The answer means "unknown", or cannot be true."""

    kind = "not_available"


class NotFound(DriverError):
    """What was asked about does not exist."""

    kind = "not_found"


class DriverTimeout(DriverError):
    """No answer within the time allowed."""

    kind = "driver_timeout"


class InventoryChanged(DriverError):
    """The GPUs are not those that were found: they must be looked for anew."""

    kind = "inventory_changed"


class UnknownDriverError(DriverError):
    """A code of the driver that has no type of its own."""

    kind = "unknown"


class HostUnavailable(DriverError):
    """The driver host process cannot be asked now."""

    kind = "host_unavailable"


class HostEnded(HostUnavailable):
    """The driver host process ended."""

    kind = "host_ended"


class HostStuck(HostUnavailable):
    """An earlier driver host process cannot be reaped."""

    kind = "host_stuck"
    exit_code = ExitCode.PENDING


class HostRenewed(HostUnavailable):
    """The driver host is being replaced by a fresh one."""

    kind = "host_renewed"


class HostReleased(HostUnavailable):
    """The driver host was released on request."""

    kind = "host_released"


def _tree(root: type[DriverError]) -> dict[str, type[DriverError]]:
    found = {root.kind: root}
    for branch in root.__subclasses__():
        found |= _tree(branch)
    return found


# An error crosses from driver host to agent as its kind.
ERRORS_BY_KIND: dict[str, type[DriverError]] = _tree(DriverError)
