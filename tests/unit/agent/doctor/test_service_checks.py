"""What the checks beside the driver make of what was found: a table of what no page shows."""

from dataclasses import replace

import pytest
from tests.support.doctor_hosts import VERSION, well, with_gpu
from tests.support.doctor_values import (
    CRITICAL,
    DOCKER,
    IDENTITY,
    INSIDE,
    INVENTORY,
    OK,
    SWITCHED,
    UNKNOWN,
    WARNING,
    WELL,
    Row,
    agent_says,
    log,
    state,
)

from stoker.agent.doctor.checkup import chosen, examine
from stoker.agent.doctor.names import Name
from stoker.agent.doctor.observed import (
    AgentFacts,
    CdiSpec,
    ContainersFacts,
    DriverFacts,
    Engine,
    FabricFacts,
    User,
)
from stoker.agent.verdicts import Check

ROWS: dict[str, Row] = {
    "no fabric manager": Row(
        SWITCHED,
        Name.FABRIC_MANAGER,
        CRITICAL,
        "not installed, and NVSwitches need it: CUDA does not start",
    ),
    "the fabric manager of the host is not seen": Row(
        replace(SWITCHED, host=INSIDE.host),
        Name.FABRIC_MANAGER,
        UNKNOWN,
        "not to be seen from within a container",
    ),
    "a fabric manager without a unit": Row(
        replace(SWITCHED, fabric=FabricFacts("/usr/bin/nv-fabricmanager", VERSION)),
        Name.FABRIC_MANAGER,
        UNKNOWN,
        "installed, and systemd knows no nvidia-fabricmanager.service",
    ),
    "no container toolkit": Row(
        replace(WELL, containers=ContainersFacts((DOCKER,), None, ())),
        Name.CONTAINERS,
        WARNING,
        "docker without NVIDIA's runtime: the container toolkit is not installed",
    ),
    "a configuration that is not readable": Row(
        replace(WELL, containers=ContainersFacts((replace(DOCKER, has_runtime=None),), "/ctk", ())),
        Name.CONTAINERS,
        UNKNOWN,
        "not readable: /etc/docker/daemon.json",
    ),
    "podman goes by CDI": Row(
        replace(
            WELL,
            containers=ContainersFacts(
                (Engine("podman", "", None),), "/ctk", (CdiSpec("/etc/cdi/n.yaml", (VERSION,)),)
            ),
        ),
        Name.CONTAINERS,
        OK,
        "CDI (/etc/cdi/n.yaml)",
    ),
    "podman without CDI": Row(
        replace(WELL, containers=ContainersFacts((Engine("podman", "", None),), "/ctk", ())),
        Name.CONTAINERS,
        WARNING,
        "neither NVIDIA's runtime nor a CDI description of the GPUs for podman",
    ),
    "a program's own Xid is no fault of the host": Row(
        replace(WELL, kernel_log=log("13", "31")),
        Name.KERNEL_LOG,
        OK,
        "within a day: Xid 13 Graphics Engine Exception, Xid 31 GPU memory page fault",
    ),
    "an Xid of another day": Row(
        replace(WELL, kernel_log=log("79", ago=90_000.0)),
        Name.KERNEL_LOG,
        OK,
        "no Xid within a day; 1 older one (helper)",
    ),
    "a GPU that did not start": Row(
        replace(WELL, kernel_log=log("init_failed", check=Check.GPU_LOST)),
        Name.KERNEL_LOG,
        CRITICAL,
        "within a day: init failed",
    ),
    "an agent of root needs no helper": Row(
        replace(
            agent_says(blind=("kernel log: none",)),
            agent=AgentFacts(well(1), "", True, User(0, (0,), "root")),
        ),
        Name.HELPER,
        OK,
        "not needed: the agent runs as root",
    ),
    "the agent starts": Row(
        agent_says(driver=state("starting", "nvmlInit")),
        Name.AGENT,
        WARNING,
        "starting for 10s, in nvmlInit",
    ),
    "the agent has failed": Row(
        agent_says(driver=state("failed")), Name.AGENT, CRITICAL, "driver failed: why", Name.DRIVER
    ),
    "the agent reads nothing": Row(
        agent_says(last_success_age_seconds=3600.0),
        Name.AGENT,
        CRITICAL,
        "reads nothing: the last sample was 1h ago",
    ),
    "the agent never read anything": Row(
        agent_says(last_success_age_seconds=None),
        Name.AGENT,
        CRITICAL,
        "reads nothing: the last sample was never",
    ),
    "the agent's disk is full": Row(
        agent_says(release_unsaved="no room"),
        Name.AGENT,
        WARNING,
        "cannot write its journal: no room",
    ),
    "a simulated agent says so": Row(
        agent_says(simulated=True), Name.AGENT, OK, "stoker 0.1.0 reads 1 of 1 GPU, SIMULATED"
    ),
    "a GPU that is not judged": Row(
        replace(
            WELL,
            agent=AgentFacts(
                with_gpu(well(1), 0, verdict="unknown", is_read=False, reason="not read yet"),
                "",
                True,
            ),
        ),
        Name.HEALTH,
        UNKNOWN,
        "1 unknown of 1 GPU",
    ),
    "memory that cannot be told": Row(
        replace(
            WELL,
            agent=AgentFacts(with_gpu(well(1), 0, memory_unattributed_bytes=None), "", True),
        ),
        Name.MEMORY,
        UNKNOWN,
        "the agent cannot tell of GPU 0",
    ),
    "memory of MIG devices is nobody's secret": Row(
        replace(
            WELL,
            agent=AgentFacts(with_gpu(well(1), 0, memory_unattributed_bytes=None), "", True),
            driver=DriverFacts(
                inventory=replace(INVENTORY, gpus=(replace(IDENTITY, mig_enabled=True),))
            ),
        ),
        Name.MEMORY,
        OK,
        "every MiB has an owner; of GPUs in MIG mode it cannot be told",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_check(name: str) -> None:
    row = ROWS[name]
    (finding,) = examine(row.observed, chosen({row.check}, ()))
    expected = (row.status, row.found, row.because_of)
    assert (finding.status, finding.found, finding.because_of) == expected
