"""What each check of driver and GPUs makes of what was found: a table of what no page shows."""

from dataclasses import replace

import pytest
from tests.support.doctor_hosts import VERSION, well
from tests.support.doctor_values import (
    CRITICAL,
    FILES,
    GPU,
    INSIDE,
    INVENTORY,
    NODE,
    OK,
    UNKNOWN,
    WARNING,
    WELL,
    Row,
    reading,
    said,
)

from stoker.agent.doctor.checkup import chosen, examine
from stoker.agent.doctor.names import Name
from stoker.agent.doctor.observed import (
    AgentFacts,
    BusFacts,
    DevicesFacts,
    DriverFacts,
    LibraryFacts,
    PciDevice,
    Trouble,
    Unseen,
    User,
    WhyNot,
)
from stoker.agent.facts import Fact
from stoker.agent.readings import GpuFault

ROWS: dict[str, Row] = {
    "the bus cannot be seen": Row(
        replace(WELL, bus=Unseen("no /sys")), Name.BUS, UNKNOWN, "no /sys"
    ),
    "a GPU of a virtual machine is not missed": Row(
        replace(WELL, bus=BusFacts((GPU, PciDevice("0000:25:00.0", "vfio-pci", None)), ())),
        Name.GPUS,
        OK,
        "1 GPU, all read",
    ),
    "and is named": Row(
        replace(WELL, bus=BusFacts((GPU, PciDevice("0000:25:00.0", "vfio-pci", None)), ())),
        Name.BUS,
        OK,
        "2 GPUs; given to virtual machines: 0000:25:00.0",
    ),
    "the module is loaded and there is no GPU": Row(
        replace(WELL, bus=BusFacts((), ()), agent=AgentFacts(None, "none", False)),
        Name.BUS,
        CRITICAL,
        "no NVIDIA GPU, and the kernel module for them is loaded",
    ),
    "a GPU that the module did not take": Row(
        replace(WELL, bus=BusFacts((GPU, PciDevice("0000:25:00.0", None, True)), ())),
        Name.KERNEL_MODULE,
        WARNING,
        f"{VERSION} (open) is loaded, and no driver has 0000:25:00.0",
    ),
    "nouveau has one of two": Row(
        replace(WELL, bus=BusFacts((GPU, PciDevice("0000:25:00.0", "nouveau", True)), ())),
        Name.KERNEL_MODULE,
        CRITICAL,
        "nouveau has 0000:25:00.0",
    ),
    "a sandbox that shows no modules": Row(
        replace(WELL, module=replace(NODE, version=None, is_open=None, loaded=None)),
        Name.KERNEL_MODULE,
        UNKNOWN,
        "not to be seen here: neither its version nor the list of modules",
    ),
    "a sandbox that shows no modules has a driver all the same": Row(
        replace(WELL, module=replace(NODE, version=None, is_open=None, loaded=None)),
        Name.DRIVER,
        OK,
        f"{VERSION} answers: 1 GPU",
    ),
    "a module that does not tell its version": Row(
        replace(WELL, module=replace(NODE, version=None, is_open=None)),
        Name.KERNEL_MODULE,
        OK,
        "loaded",
    ),
    "nothing would load nvidia_uvm": Row(
        replace(WELL, module=replace(NODE, loaded=("nvidia",), has_modprobe=False)),
        Name.KERNEL_MODULE,
        WARNING,
        f"{VERSION} (open) is loaded, nvidia_uvm is not: CUDA cannot start",
    ),
    "the list of modules is not readable": Row(
        replace(WELL, module=replace(NODE, is_open=False, loaded=None)),
        Name.KERNEL_MODULE,
        OK,
        f"{VERSION} (proprietary) is loaded",
    ),
    "no library in a container": Row(
        replace(INSIDE, library=LibraryFacts(None, None, ("/lib64",))),
        Name.LIBRARY,
        CRITICAL,
        "libnvidia-ml.so.1 is in none of /lib64",
    ),
    "a library without a version in its name": Row(
        replace(WELL, library=LibraryFacts("/usr/lib/wsl/lib/libnvidia-ml.so.1", None, ())),
        Name.LIBRARY,
        OK,
        "/usr/lib/wsl/lib/libnvidia-ml.so.1, whose name does not tell its version",
    ),
    "nvidiactl is not there": Row(
        replace(WELL, devices=DevicesFacts(FILES[:1], True)),
        Name.DEVICE_FILES,
        CRITICAL,
        "/dev/nvidiactl is not there",
    ),
    "a numbered file is not there": Row(
        replace(WELL, devices=DevicesFacts(FILES[1:], True)),
        Name.DEVICE_FILES,
        CRITICAL,
        "0 of 1 files /dev/nvidiaN are there",
    ),
    "a container is given some GPUs only": Row(
        replace(INSIDE, devices=DevicesFacts(FILES[1:], True)),
        Name.DEVICE_FILES,
        OK,
        "2 files, open to the agent's user stoker",
    ),
    "no file for CUDA": Row(
        replace(WELL, devices=DevicesFacts(FILES[:2], True)),
        Name.DEVICE_FILES,
        WARNING,
        "/dev/nvidia-uvm is not there: CUDA cannot start",
    ),
    "root opens everything": Row(
        replace(
            WELL,
            devices=DevicesFacts(tuple(replace(each, mode=0) for each in FILES), True),
            agent=AgentFacts(well(1), "", True, User(0, (0,), "root")),
        ),
        Name.DEVICE_FILES,
        OK,
        "3 files, open to the agent's user root",
    ),
    "the kernel holds what looked": Row(
        replace(WELL, driver=DriverFacts(stuck="pending: PID 7 in uninterruptible sleep")),
        Name.DRIVER,
        CRITICAL,
        "hangs: pending: PID 7 in uninterruptible sleep",
    ),
    "the kernel holds what looked before": Row(
        replace(WELL, driver=DriverFacts("an earlier look, PID 7, sleeps", WhyNot.EARLIER)),
        Name.DRIVER,
        CRITICAL,
        "hangs: an earlier look, PID 7, sleeps",
    ),
    "no lock can be made": Row(
        replace(WELL, driver=DriverFacts("no lock could be made: /run: no", WhyNot.NO_LOCK)),
        Name.DRIVER,
        UNKNOWN,
        "not asked: no lock could be made: /run: no",
    ),
    "even the look itself hangs": Row(
        replace(WELL, driver=Unseen("no answer within 10 s")),
        Name.DRIVER,
        CRITICAL,
        "hangs: no answer within 10 s",
    ),
    "no binding for NVML": Row(
        replace(WELL, driver=DriverFacts(trouble=Trouble("library_missing", "no nvidia-ml-py"))),
        Name.DRIVER,
        CRITICAL,
        "no nvidia-ml-py",
    ),
    "no answer, none of its own": Row(
        replace(WELL, driver=DriverFacts(trouble=Trouble("unknown", "odd"))),
        Name.GPUS,
        UNKNOWN,
        "no answer",
        Name.DRIVER,
    ),
    "a GPU that needs a reset": Row(
        replace(
            WELL,
            driver=DriverFacts(
                inventory=replace(
                    INVENTORY, gpus=(), missing=(GpuFault(0, None, "reset_required", "reset me"),)
                )
            ),
        ),
        Name.GPUS,
        CRITICAL,
        "1 of 1 GPU cannot be read",
    ),
    "the driver asks for a reboot": Row(
        reading(Fact.RECOVERY_ACTION, 2),
        Name.ERRORS,
        CRITICAL,
        "GPU 0: the driver asks for a reboot",
    ),
    "the driver asks for nothing": Row(
        reading(Fact.RECOVERY_ACTION, 0), Name.ERRORS, OK, "none on 1 GPU"
    ),
    "a page to be retired": Row(
        reading(Fact.RETIRED_PAGES_PENDING, 1),
        Name.ERRORS,
        WARNING,
        "GPU 0: a memory page is taken out of use at the next reset",
    ),
    "heat": Row(
        replace(
            WELL,
            driver=said(by_label={Fact.CLOCK_EVENT_ACTIVE: {"hw_thermal_slowdown": 1.0}}),
        ),
        Name.ERRORS,
        WARNING,
        "GPU 0: it slows itself down for heat",
    ),
    "lanes that are not used": Row(
        replace(
            WELL, driver=said(facts={Fact.PCIE_LINK_WIDTH: 8.0, Fact.PCIE_LINK_WIDTH_MAX: 16.0})
        ),
        Name.ERRORS,
        WARNING,
        "GPU 0: 8 of 16 PCIe lanes are in use",
    ),
    "a link that is down": Row(
        replace(WELL, driver=said(by_label={Fact.NVLINK_UP: {"0": 1.0, "3": 0.0, "12": 0.0}})),
        Name.ERRORS,
        WARNING,
        "GPU 0: NVLink 3, 12 is down",
    ),
    "links that nothing is connected to": Row(
        replace(WELL, driver=said(by_label={Fact.NVLINK_UP: {"0": 0.0, "1": 0.0}})),
        Name.ERRORS,
        OK,
        "none on 1 GPU",
    ),
    "a card without MIG and persistence mode": Row(
        replace(WELL, driver=said(facts={})), Name.PERSISTENCE, OK, "not told by these GPUs"
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_check(name: str) -> None:
    row = ROWS[name]
    (finding,) = examine(row.observed, chosen({row.check}, ()))
    expected = (row.status, row.found, row.because_of)
    assert (finding.status, finding.found, finding.because_of) == expected
