"""What was found on a host: values, each with the reason where it cannot be seen."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias, TypeVar, Union

from stoker.agent.readings import GpuReading, Inventory, ProcessesReading
from stoker.agent.verdicts import Check

if TYPE_CHECKING:  # what is said over sockets is beside modules that open them
    from stoker.core.local import Status as AgentStatus

T = TypeVar("T")


class Look(StrEnum):
    """One look at the host; each has a deadline of its own."""

    HOST = "host"
    BUS = "bus"
    MODULE = "module"
    LIBRARY = "library"
    DEVICES = "devices"
    INSTANCES = "instances"
    SERVICES = "services"
    FABRIC = "fabric"
    CONTAINERS = "containers"
    KERNEL_LOG = "kernel_log"
    HELPER = "helper"
    AGENT = "agent"
    DRIVER = "driver"


@dataclass(frozen=True, slots=True)
class Unseen:
    """Why a look found nothing: it was not allowed, did not return in time, or was not made."""

    why: str


Seen: TypeAlias = Union[T, Unseen]  # noqa: UP007 (a generic alias)

NOT_LOOKED_AT = Unseen("not looked at")


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who may open files, or not."""

    uid: int
    gids: tuple[int, ...]
    name: str


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Where this is, and who looks."""

    user: User
    kernel: str  # its release: "6.8.0-45-generic"
    container: str  # "docker", "kubernetes", ...; empty: none
    has_systemd: bool


@dataclass(frozen=True, slots=True)
class PciDevice:
    """One device of NVIDIA's on the PCI bus, as the kernel lists it."""

    address: str  # "0000:53:00.0"
    driver: str | None  # the kernel driver that has it: "nvidia", "nouveau", "vfio-pci"
    answers: bool | None  # False: its configuration reads as all ones; None: not readable


@dataclass(frozen=True, slots=True)
class BusFacts:
    """NVIDIA's devices on the PCI bus."""

    gpus: tuple[PciDevice, ...]
    switches: tuple[PciDevice, ...]  # NVSwitches


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """The kernel's part of the driver."""

    version: str | None  # None: it is not loaded, or does not tell
    is_open: bool | None  # the open kernel modules
    # Of nvidia, nvidia_uvm, nouveau and the like; None: the list of modules is not readable.
    loaded: tuple[str, ...] | None
    is_built: bool | None  # for the kernel that runs; None: it is not known what is
    has_modprobe: bool  # nvidia-modprobe loads nvidia_uvm when it is needed

    @property
    def is_loaded(self) -> bool | None:
        """Whether the kernel has it; None: a sandbox shows neither its version nor the list."""
        if self.version is not None:
            return True
        return None if self.loaded is None else "nvidia" in self.loaded


@dataclass(frozen=True, slots=True)
class LibraryFacts:
    """The library that whoever asks NVML gets."""

    path: str | None
    version: str | None  # None: its name does not tell
    folders: tuple[str, ...]  # where the dynamic loader looks


@dataclass(frozen=True, slots=True)
class DeviceFile:
    """A file of the driver in /dev."""

    path: str
    mode: int
    uid: int
    gid: int

    def admits(self, user: User) -> bool:
        """Whether the user may read and write it."""
        if user.uid == 0:
            return True
        shift = 6 if user.uid == self.uid else 3 if self.gid in user.gids else 0
        return self.mode >> shift & 0o6 == 0o6


@dataclass(frozen=True, slots=True)
class DevicesFacts:
    """The driver's files in /dev."""

    files: tuple[DeviceFile, ...]
    has_char_link: bool  # /dev/char has the link by which runc knows nvidiactl


@dataclass(frozen=True, slots=True)
class GpuInstance:
    """A MIG GPU instance, as the kernel module lists it."""

    gpu: int  # the N of /dev/nvidiaN
    instance: int
    compute_instances: int


@dataclass(frozen=True, slots=True)
class InstancesFacts:
    """MIG's instances."""

    instances: tuple[GpuInstance, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of systemd; the words are systemd's."""

    name: str
    load: str  # "loaded", "not-found", "masked"
    active: str  # "active", "inactive", "failed", "activating"
    sub: str
    result: str  # "success", "exit-code", ...


@dataclass(frozen=True, slots=True)
class ServicesFacts:
    """Services that GPUs need."""

    units: tuple[Unit, ...]

    def unit(self, name: str) -> Unit | None:
        """Return the unit of that name."""
        return next((unit for unit in self.units if unit.name == name), None)


@dataclass(frozen=True, slots=True)
class FabricFacts:
    """The fabric manager that is installed."""

    path: str | None
    version: str | None


@dataclass(frozen=True, slots=True)
class Engine:
    """A container engine that is installed."""

    name: str  # "docker", "containerd", "podman", "cri-o"
    config: str  # the file that would name NVIDIA's runtime; empty: it goes by CDI alone
    has_runtime: bool | None  # None: the file is not readable


@dataclass(frozen=True, slots=True)
class CdiSpec:
    """A file that tells engines what a GPU is made of."""

    path: str
    versions: tuple[str, ...]  # of the driver's libraries that it names


@dataclass(frozen=True, slots=True)
class ContainersFacts:
    """How containers get at GPUs."""

    engines: tuple[Engine, ...]
    toolkit: str | None  # the path of nvidia-ctk
    specs: tuple[CdiSpec, ...]


@dataclass(frozen=True, slots=True)
class LogLine:
    """What the kernel's log says of a GPU."""

    at: float  # Unix seconds
    gpu: str  # "0000:53:00"; empty: not told
    check: Check
    code: str  # of an Xid its number, and what else tells its kind
    text: str


@dataclass(frozen=True, slots=True)
class KernelLogFacts:
    """The kernel's log of this boot."""

    source: str  # where it was read
    now: float  # Unix seconds
    lines: tuple[LogLine, ...]  # oldest first


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has files of the driver in /dev open."""

    pid: int
    user: str
    command: str
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HelperFacts:
    """The root helper, and what it tells."""

    path: str
    is_there: bool
    why: str  # it does not answer
    holders: tuple[Holder, ...] = ()


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """The agent of this host, as it tells."""

    status: "AgentStatus | None"  # None: no agent answers
    why: str  # none does
    is_there: bool  # somebody listens at a socket, whether or not it answers
    user: User | None = None  # who runs it; None: its process is not visible


class WhyNot(StrEnum):
    """Why NVML was not asked."""

    RELEASED = "released"
    HANGS = "hangs"  # the agent's own driver host does
    STARTING = "starting"  # the agent is
    UNSAID = "unsaid"  # an agent is there and does not answer
    UNLOADED = "unloaded"
    EARLIER = "earlier"  # an earlier look has not ended: the kernel holds it
    BUSY = "busy"  # another look is under way
    NO_LOCK = "no_lock"


@dataclass(frozen=True, slots=True)
class Trouble:
    """An error of the driver."""

    kind: str  # `DriverError.kind`
    text: str
    function: str | None = None
    gpu: str | None = None


@dataclass(frozen=True, slots=True)
class DriverFacts:
    """What NVML told a child of ours."""

    why_not: str = ""  # it was not asked
    reason: WhyNot | None = None  # the same, for checks
    trouble: Trouble | None = None
    stuck: str = ""  # the kernel does not let go of the child: who it is, and where it hangs
    inventory: Inventory | None = None
    readings: tuple[GpuReading, ...] = ()
    processes: ProcessesReading | None = None
    seconds: float = 0.0  # until all was told


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything that was looked at."""

    host: Seen[HostFacts] = NOT_LOOKED_AT
    bus: Seen[BusFacts] = NOT_LOOKED_AT
    module: Seen[ModuleFacts] = NOT_LOOKED_AT
    library: Seen[LibraryFacts] = NOT_LOOKED_AT
    devices: Seen[DevicesFacts] = NOT_LOOKED_AT
    instances: Seen[InstancesFacts] = NOT_LOOKED_AT
    services: Seen[ServicesFacts] = NOT_LOOKED_AT
    fabric: Seen[FabricFacts] = NOT_LOOKED_AT
    containers: Seen[ContainersFacts] = NOT_LOOKED_AT
    kernel_log: Seen[KernelLogFacts] = NOT_LOOKED_AT
    helper: Seen[HelperFacts] = NOT_LOOKED_AT
    agent: Seen[AgentFacts] = NOT_LOOKED_AT
    driver: Seen[DriverFacts] = NOT_LOOKED_AT
    seconds: float = field(default=0.0, compare=False)  # that all looks took
