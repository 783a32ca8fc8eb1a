"""What the driver host tells the agent: one reading of the cards, in base units.

Every fact that a card or a driver may be unable to tell is `None` when it was not told. Why it was
not told stands beside it: a fact that is `None` and named in `failures` was asked for and failed;
a fact that is `None` and not named there does not exist on this card or in this driver.
"""

from dataclasses import dataclass
from typing import Literal

ProcessKind = Literal["compute", "graphics"]

# `ReadFailure.fact` when it is the whole GPU that could not be read, not one fact of it.
WHOLE_GPU = "gpu"


@dataclass(frozen=True, slots=True)
class GpuIdentity:
    """What a GPU is; it changes only when somebody changes the machine."""

    index: int  # the driver's order (by PCI address); it may change when a GPU falls off the bus
    uuid: str  # "GPU-8-4-4-4-12", the only name that survives a reboot
    model: str  # as the driver names it: "NVIDIA H100 80GB HBM3"
    memory_total_bytes: int
    pci_bus_id: str | None = None  # "00000000:53:00.0"
    serial: str | None = None
    board_part_number: str | None = None
    vbios_version: str | None = None
    minor_number: int | None = None  # the N of /dev/nvidiaN
    compute_capability: str | None = None  # "9.0"
    power_limit_watts: float | None = None  # the limit in force
    mig_enabled: bool | None = None  # None: a card without MIG
    numa_node: int | None = None  # the host's memory node nearest to it; None: several, or untold


@dataclass(frozen=True, slots=True)
class GpuFault:
    """One GPU that the driver counts and that could not be read."""

    index: int
    uuid: str | None  # None when the fault came before its UUID could be read
    error_kind: str  # `DriverError.kind`
    message: str


@dataclass(frozen=True, slots=True)
class Inventory:
    """The GPUs of this machine."""

    at: float
    driver_version: str | None
    nvml_version: str | None
    cuda_driver_version: str | None  # "12.8"
    simulated: bool
    gpus: tuple[GpuIdentity, ...]
    missing: tuple[GpuFault, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadFailure:
    """A fact that was asked for and not told."""

    fact: str  # a field of GpuReading, or WHOLE_GPU
    error_kind: str  # `DriverError.kind`
    message: str


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What one GPU told at one moment."""

    uuid: str
    at: float
    memory_total_bytes: int | None = None
    # Without the driver's own share. A driver that cannot tell that share apart (before R510)
    # counts it as used, and leaves `memory_reserved_bytes` absent.
    memory_used_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    memory_free_bytes: int | None = None
    utilization_ratio: float | None = None  # share of time in which a kernel ran; None under MIG
    memory_utilization_ratio: float | None = None  # share of time in which memory was accessed
    temperature_celsius: float | None = None
    power_watts: float | None = None
    energy_joules: float | None = None  # since the driver was loaded
    sm_clock_hertz: float | None = None
    memory_clock_hertz: float | None = None
    failures: tuple[ReadFailure, ...] = ()


@dataclass(frozen=True, slots=True)
class ProcessReading:
    """One process that holds a context on one GPU."""

    uuid: str  # of the GPU
    pid: int  # as the driver counts: in the host's PID namespace
    kind: ProcessKind  # a process that does both is listed once, as "compute"
    memory_used_bytes: int | None = None
    name: str | None = None  # the executable as the driver knows it


@dataclass(frozen=True, slots=True)
class ProcessesReading:
    """Who uses the GPUs. A GPU in `failed_gpus` has an unknown number of users, not none."""

    started_at: float
    finished_at: float
    processes: tuple[ProcessReading, ...]
    failed_gpus: tuple[GpuFault, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One GPU over the time since its previous reading; made by `sampling.sample`."""

    uuid: str
    at: float
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    memory_free_bytes: int | None = None
    utilization_ratio: float | None = None
    memory_utilization_ratio: float | None = None
    temperature_celsius: float | None = None
    # The mean since the previous reading where the energy counter tells it, else the sensor's.
    power_watts: float | None = None
    energy_joules_total: float | None = (
        None  # since the driver was loaded: a counter that may reset
    )
    sm_clock_hertz: float | None = None
    memory_clock_hertz: float | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing was told: the GPU was not read."""
        return all(
            fact is None
            for fact in (
                self.memory_used_bytes,
                self.utilization_ratio,
                self.temperature_celsius,
                self.power_watts,
                self.energy_joules_total,
                self.sm_clock_hertz,
                self.memory_clock_hertz,
            )
        )
