"""What the driver host tells the agent: one reading of the cards, in base units.

A fact that a card or a driver does not tell is not in the reading (in a value with fixed fields it
is `None`). Why it was not told stands beside it: a fact that is named in `failures` was asked for
and failed; one that is not named there does not exist on this card or in this driver, or it was
not its turn.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stoker.agent.facts import Fact, Rate

ProcessKind = Literal["compute", "graphics"]

# `ReadFailure.fact` when it is the whole GPU that could not be read, not one fact of it.
WHOLE_GPU = "gpu"


@dataclass(frozen=True, slots=True)
class MigDeviceIdentity:
    """What a MIG device (a compute instance in a GPU instance) is while its layout lasts."""

    uuid: str  # "MIG-8-4-4-4-12"
    profile: str  # "1g.10gb"; with a compute instance of its own size: "1c.2g.20gb"
    memory_total_bytes: int  # of its GPU instance
    gpu_instance_id: int
    compute_instance_id: int


@dataclass(frozen=True, slots=True)
class NvlinkPeer:
    """Another GPU of the node that a GPU has NVLinks to."""

    uuid: str
    links: int  # that are active


@dataclass(frozen=True, slots=True)
class GpuIdentity:
    """What a GPU is; it changes only when somebody changes the machine, or its partitions."""

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
    # Of the links that were active when the GPUs were looked for: those to GPUs that could be read,
    # and to NVSwitches, through which each such GPU reaches each.
    nvlink_peers: tuple[NvlinkPeer, ...] = ()
    nvswitch_links: int = 0
    nvlinks_active: int = 0  # all of them, wherever they lead
    mig_devices: tuple[MigDeviceIdentity, ...] = ()  # in the driver's order, while MIG mode is on


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

    fact: str  # a `Fact`, or WHOLE_GPU
    error_kind: str  # `DriverError.kind`
    message: str


@dataclass(frozen=True, slots=True)
class Extent:
    """What the driver's own samples of one fact say about the time since the previous reading."""

    least: float
    most: float
    mean: float
    samples: int  # how many it is made of


@dataclass(frozen=True, slots=True)
class XidSeen:
    """An error that the driver reported as an event since the previous reading (an Xid)."""

    at: float  # when it was read; the driver does not tell when it happened
    xid: int
    gpu_instance_id: int | None = None  # of the MIG instance; None: the whole GPU, or not told


@dataclass(frozen=True, slots=True)
class MigDeviceReading:
    """What one MIG device (a compute instance in a GPU instance) told."""

    uuid: str  # "MIG-8-4-4-4-12"
    gpu_instance_id: int
    compute_instance_id: int
    profile: str  # "1g.10gb"; with a compute instance of its own size: "1c.2g.20gb"
    facts: Mapping[Fact, float] = field(default_factory=dict[Fact, float])


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What one GPU told at one moment; `rates` says which facts had their turn."""

    uuid: str
    at: float
    rates: tuple[Rate, ...] = (Rate.FAST,)
    facts: Mapping[Fact, float] = field(default_factory=dict[Fact, float])
    # Facts that have a value for each link, fan or reason, by what their label says.
    by_label: Mapping[Fact, Mapping[str, float]] = field(
        default_factory=dict[Fact, Mapping[str, float]]
    )
    extents: Mapping[Fact, Extent] = field(default_factory=dict[Fact, Extent])
    xids: tuple[XidSeen, ...] = ()
    # Complete when the GPU is in MIG mode; in its order. Their slow facts have the same turns.
    mig_devices: tuple[MigDeviceReading, ...] = ()
    failures: tuple[ReadFailure, ...] = ()

    @property
    def is_lost(self) -> bool:
        """Whether the GPU as a whole could not be read."""
        return any(failure.fact == WHOLE_GPU for failure in self.failures)


@dataclass(frozen=True, slots=True)
class ProcessReading:
    """One process that holds a context on one GPU."""

    uuid: str  # of the GPU
    pid: int  # as the driver counts: in the host's PID namespace
    kind: ProcessKind  # a process that does both is listed once, as "compute"
    memory_used_bytes: int | None = None
    name: str | None = None  # the executable as the driver knows it
    gpu_instance_id: int | None = None  # of the MIG instance that it runs in; None: none


@dataclass(frozen=True, slots=True)
class ProcessesReading:
    """Who uses the GPUs. A GPU in `failed_gpus` has an unknown number of users, not none."""

    started_at: float
    finished_at: float
    processes: tuple[ProcessReading, ...]
    failed_gpus: tuple[GpuFault, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuSample:
    """What the fleet hears of one GPU; made by `sampling.sample` of its readings."""

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
