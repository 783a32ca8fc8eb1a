"""What becomes of a GPU that falls ill: each row on a real agent with real driver hosts and a real
aggregator, from the first sign to recovery.

Beside each row stands a golden file: verdict, reason and action, the cordon and what withholds it,
what comes of requests, the fault's metric; then the same once it is mended in the way that mends
it. Windows are cut from minutes to seconds; limits and tables are the usual ones.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
from tests.conftest import Golden
from tests.support.daemons import Stage
from tests.support.health_node import HealthNode

from stoker.agent.health.options import HealthConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEALTH = HealthConfig(
    window_seconds=1.0,
    stale_seconds=1.0,
    nvlink_down_seconds=0.4,
    nvlink_up_seconds=0.4,
    xid_quiet_seconds=1.5,
    pcie_link_seconds=0.5,
)
# Once a GPU is well its cordon ends after so long.
FLEET = {
    "STOKER_AGGREGATOR_HEALTH_UNCORDON_AFTER_SECONDS": "0.3s",
    "STOKER_AGGREGATOR_HEALTH_CHANGES_PER_HOUR_MAX": "1000",  # one GPU falls ill in every row
}
XID_79 = "NVRM: Xid (PCI:{1}): 79, pid=4711, name=python3, GPU has fallen off the bus."

XID_154 = (
    "NVRM: Xid (PCI:{1}): 154, GPU recovery action changed from 0x0 (None) to 0x2 "
    "(Node Reboot Required)"
)


def counter(fact: str, value: float, label: str = "", gpu: int = 1) -> dict[str, Any]:
    return {"gpu": gpu, "fact": fact, "value": value, "label": label}


def growing(fact: str, by: float, label: str = "") -> list[dict[str, Any]]:
    """Return a counter that grows by so much every half second, for half a minute."""
    seconds = [number / 2 for number in range(60)]
    return [
        {**counter(fact, by * 2 * at, label), "from_seconds": at, "until_seconds": at + 0.5}
        for at in seconds
    ]


def xid(number: int, gpu: int = 1) -> dict[str, Any]:
    return {"gpu": gpu, "xid": number}


# The counter of energy begins anew, as after a reset.
RESET: dict[str, Any] = {"faults": [{"fault": "field", "gpu": 1, "field": 83, "value": 1}]}
REBOOT = None
NOTHING: dict[str, Any] = {}


@dataclass(frozen=True)
class Row:
    """One way in which GPU 1 falls ill, and what mends it."""

    name: str
    until: tuple[str, ...]  # words that are told then
    scenario: dict[str, Any] = field(default_factory=dict[str, Any])
    log: tuple[str, ...] = ()
    mended: dict[str, Any] | None = field(default_factory=dict[str, Any])  # None: by a reboot


ROWS = [
    # --- Xids of the event set
    Row("xid_79_event", ("reboot",), {"events": [xid(79)]}, mended=REBOOT),
    Row("xid_48_event", ("reset_gpu",), {"events": [xid(48)]}, mended=RESET),
    Row("xid_95_event", ("reset_gpu",), {"events": [xid(95)]}, mended=RESET),
    Row("xid_119_event", ("reset_gpu",), {"events": [xid(119)]}, mended=RESET),
    Row("xid_31_event", ("xid 31 healthy",), {"events": [xid(31)]}),
    Row("xid_94_event", ("xid 94 healthy",), {"events": [xid(94)]}),
    # --- Xids of the kernel's log, in every form
    Row("xid_79_log", ("reboot",), log=(XID_79,), mended=REBOOT),
    Row(
        "xid_48_log_without_process",
        ("reset_gpu",),
        log=("NVRM: Xid (PCI:{1}): 48, An uncorrectable double bit error (DBE) was found.",),
        mended=RESET,
    ),
    Row(
        "xid_31_log_unknown_process",
        ("xid 31 healthy",),
        log=("NVRM: Xid (PCI:{1}): 31, pid='<unknown>', name=<unknown>, Ch 00000008, intr 0.",),
    ),
    Row(
        "xid_145_log_fatal",
        ("145.RLW_REMAP",),
        log=("NVRM: Xid (PCI:{1}): 145, RLW_REMAP Fatal XC0 i0 Link 03 (0x00200046 0x0 0x0)",),
        mended=RESET,
    ),
    Row(
        "xid_149_log_nonfatal",
        ("149.NETIR_LINK_EVT.nonfatal",),
        log=("NVRM: Xid (PCI:{1}): 149, NETIR_LINK_EVT Nonfatal XC0 i0 Link 09 (0x004505c6 0x0)",),
    ),
    Row(
        "xid_154_log",
        ("154.REBOOT",),
        log=(XID_154,),
        mended=REBOOT,
    ),
    Row(
        "fallen_off_in_one_line",
        ("fallen off",),
        log=("NVRM: GPU {1}.0: GPU has fallen off the bus.",),
        mended=REBOOT,
    ),
    Row(
        "fallen_off_in_three_lines",
        ("fallen off",),
        log=(
            "NVRM: The NVIDIA GPU {1}.0",
            "NVRM: (PCI ID: 10de:2330) installed in this system has",
            "NVRM: fallen off the bus and is not responding to commands.",
        ),
        mended=REBOOT,
    ),
    Row(
        "both_tell_of_one_xid",
        ("pid 4711",),
        {"events": [xid(79)]},
        log=(XID_79,),
        mended=REBOOT,
    ),
    # --- the GPU is gone
    Row(
        "lost_without_xid",
        ("gpu_lost",),
        {"faults": [{"fault": "lose", "gpu": 1}]},
    ),
    Row(
        "lost_with_xid",
        ("gpu_lost", "xid 79"),
        {"faults": [{"fault": "lose", "gpu": 1}], "events": [xid(79)]},
        log=(XID_79,),
        mended=REBOOT,
    ),
    # --- memory
    Row(
        "ecc_uncorrected",
        ("ecc_uncorrected",),
        {"counters": [counter("ecc_uncorrected_volatile_errors", 3)]},
    ),
    Row(
        "row_remap_pending",
        ("row_remap_pending",),
        {"counters": [counter("remapped_rows_pending", 1)]},
    ),
    Row(
        "row_remap_failed",
        ("row_remap_failed",),
        {"counters": [counter("remapped_rows_failed", 1)]},
    ),
    # --- links
    Row(
        "nvlink_down",
        ("nvlink_down",),
        {"counters": [counter("nvlink_up", 0, "4")]},
    ),
    Row(
        "nvlink_recoveries",
        ("nvlink_errors",),
        {"counters": growing("nvlink_recovery_errors", 1, "7")},
    ),
    Row(
        "pcie_replays",
        ("pcie_replays",),
        {"counters": growing("pcie_replays", 1000)},
    ),
    # --- heat and power
    Row(
        "hot",
        ("thermal",),
        {"counters": [counter("clock_event_active", 1, "hw_thermal_slowdown")]},
    ),
    Row(
        "slowed_down_by_hardware",
        ("hw_slowdown",),
        {"counters": [counter("clock_event_active", 1, "hw_slowdown")]},
    ),
    Row(
        "power_brake",
        ("power_brake",),
        {"counters": [counter("clock_event_active", 1, "hw_power_brake_slowdown")]},
    ),
    # --- what the driver says
    Row(
        "driver_asks_for_a_reset",
        ("recovery_action reset",),
        {"counters": [counter("recovery_action", 1)]},
    ),
    Row(
        "persistence_off",
        ("persistence",),
        {"counters": [counter("persistence_mode", 0)]},
    ),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Stage]:
    async with Stage(tmp_path_factory.mktemp("fleet")) as stage:
        await stage.aggregator(environment=FLEET).start()
        yield stage


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_node(
    stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[HealthNode]:
    """One node for all rows: each of them leaves it as it was."""
    async with stage.fleet() as fleet:
        folder = tmp_path_factory.mktemp("node")
        async with HealthNode(folder, stage.address, fleet, HEALTH) as node:
            yield node


@pytest_asyncio.fixture(loop_scope="module")
async def node(shared_node: HealthNode) -> HealthNode:
    shared_node.script()  # a row that failed may have left something
    for gpu in range(4):
        shared_node.set_healthy(gpu)
    await shared_node.until_well()
    return shared_node


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
async def test_row(row: Row, node: HealthNode, golden: Golden) -> None:
    node.script(**row.scenario)
    if row.log and row.scenario.keys() == {"events"}:  # the first gives the cordon its words
        await node.until_told("the event", "cordoned for its health")
    node.log(*row.log)
    ill = await node.until_told(f"{row.name} to be told", *row.until)
    if row.mended is None:
        what = "reboot"
        await node.reboot()
    else:
        what = "reset" if row.mended else "the fault is gone"
        node.script(**row.mended)
    well = await node.until_well()
    node.script()
    golden(f"health_table/{row.name}.txt", f"{ill}\n--- {what}\n\n{well}")


async def test_a_gpu_that_is_missing_after_a_reboot(node: HealthNode, golden: Golden) -> None:
    gone = {"faults": [{"fault": "vanish", "gpu": 3}]}
    await node.reboot(**gone)
    missing = await node.until_told("it to be missed", "gpu_missing")
    await node.restart()
    assert await node.until_told("the same after a restart", "gpu_missing") == missing
    await node.reboot(**gone)
    await node.reboot(**gone)
    still = await node.until_told("another action", "gpu_missing  unhealthy rma")
    await node.reboot()
    well = await node.until_well()
    golden(
        "health_table/missing_after_reboot.txt",
        f"{missing}\n--- two more reboots\n\n{still}\n--- a reboot, and it is there\n\n{well}",
    )


async def test_a_fault_that_comes_back_life_after_life(node: HealthNode, golden: Golden) -> None:
    told: list[str] = []
    for action in ("reset_gpu", "reset_gpu", "reboot"):
        node.script(events=[xid(48)])
        told.append(await node.until_told(action, f"xid 48 unhealthy {action}"))
        node.script(**RESET)
        if action != "reboot":
            await node.until_well()
            node.script()
            await node.until_well()
    for action in ("reboot", "rma"):
        await node.reboot()
        await node.until_well()
        node.script(events=[xid(48)])
        told.append(await node.until_told(action, f"xid 48 unhealthy {action}"))
    node.set_healthy(1)
    told.append(await node.until_well())
    golden("health_table/comes_back.txt", "\n--- mended, and it came back\n\n".join(told))


async def test_restarts_give_the_same_verdicts_and_cordons(
    node: HealthNode, stage: Stage, golden: Golden
) -> None:
    node.script(events=[xid(79)])
    await node.until_told("the first to be cordoned", "cordoned for its health")
    node.script(events=[xid(48, gpu=2), xid(31, gpu=0)])
    told = await node.until_told("all three", "xid 79", "xid 48", "xid 31")
    golden("health_table/two_ill_at_once.txt", told)
    node.script()
    without_31 = await node.until_told("the program's to be over", "xid 79", but_not=("xid 31",))
    await node.restart()
    again = await node.until_told("the same after a restart of the agent", "xid 79", "xid 48")
    assert again == without_31
    (aggregator,) = stage.daemons
    aggregator.kill()
    await aggregator.start()
    words = ("xid 79", "xid 48", "no more may be", "1 GPUs: placed")
    again = await node.until_told("the same after one of the aggregator", *words)
    assert again == without_31
