"""A host on which all is well, as values, and what one check says of a host."""

from dataclasses import dataclass, replace

from msgspec.structs import replace as replaced
from tests.support.doctor_hosts import AGENT_USER, ANN, H100, KERNEL, VERSION, well

from stoker.agent.doctor.findings import Status
from stoker.agent.doctor.names import Name
from stoker.agent.doctor.observed import (
    AgentFacts,
    BusFacts,
    ContainersFacts,
    DeviceFile,
    DevicesFacts,
    DriverFacts,
    Engine,
    FabricFacts,
    HelperFacts,
    HostFacts,
    KernelLogFacts,
    LibraryFacts,
    LogLine,
    ModuleFacts,
    Observed,
    PciDevice,
    ServicesFacts,
)
from stoker.agent.facts import Fact
from stoker.agent.readings import GpuIdentity, GpuReading, Inventory
from stoker.agent.verdicts import Check
from stoker.core.local import DriverCall
from stoker.core.local import DriverFacts as AgentDriver

ADDRESS = "0000:18:00.0"
GPU = PciDevice(ADDRESS, "nvidia", True)
IDENTITY = GpuIdentity(0, "GPU-00000000", H100, 80 * 2**30, f"0000{ADDRESS}", minor_number=0)
READING = GpuReading(IDENTITY.uuid, 0.0, facts={Fact.PERSISTENCE_MODE: 1.0, Fact.MIG_MODE: 0.0})
INVENTORY = Inventory(0.0, VERSION, None, None, False, (IDENTITY,))
FILES = tuple(
    DeviceFile(path, 0o666, 0, 0) for path in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm")
)
NODE = ModuleFacts(VERSION, True, ("nvidia", "nvidia_uvm"), True, True)
WELL = Observed(
    host=HostFacts(ANN, KERNEL, "", True),
    bus=BusFacts((GPU,), ()),
    module=NODE,
    library=LibraryFacts("/lib64/libnvidia-ml.so.1", VERSION, ("/lib64",)),
    devices=DevicesFacts(FILES, True),
    services=ServicesFacts(()),
    fabric=FabricFacts(None, None),
    containers=ContainersFacts((), None, ()),
    kernel_log=KernelLogFacts("/dev/kmsg", 1000.0, ()),
    helper=HelperFacts("/run/stoker/helper.sock", True, ""),
    agent=AgentFacts(well(1), "", True, AGENT_USER),
    driver=DriverFacts(inventory=INVENTORY, readings=(READING,)),
)
SWITCH = PciDevice("0000:c1:00.0", "nvidia-nvswitch", True)
SWITCHED = replace(WELL, bus=BusFacts((GPU,), (SWITCH,)))
INSIDE = replace(WELL, host=HostFacts(ANN, KERNEL, "kubernetes", False))
DOCKER = Engine("docker", "/etc/docker/daemon.json", False)


def said(**parts: object) -> DriverFacts:
    return DriverFacts(inventory=INVENTORY, readings=(replace(READING, **parts),))  # type: ignore[arg-type]


def reading(fact: Fact, value: float) -> Observed:
    return replace(WELL, driver=said(facts={**READING.facts, fact: value}))


def log(*codes: str, check: Check = Check.XID, ago: float = 60.0) -> KernelLogFacts:
    lines = tuple(LogLine(1e6 - ago, ADDRESS[:-2], check, code, "text") for code in codes)
    return KernelLogFacts("helper", 1e6, lines)


def agent_says(**parts: object) -> Observed:
    return replace(WELL, agent=AgentFacts(replaced(well(1), **parts), "", True, AGENT_USER))


def state(name: str, call: str | None = None) -> AgentDriver:
    in_call = None if call is None else DriverCall(call, 0)
    return AgentDriver(name, "why", 1_799_999_990.0, 1, in_call, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Row:
    """What was found, and what the check says of it."""

    observed: Observed
    check: Name
    status: Status
    found: str
    because_of: str = ""


OK, WARNING, CRITICAL, UNKNOWN = Status.OK, Status.WARNING, Status.CRITICAL, Status.UNKNOWN
