"""What becomes of a node when its driver or a card fails: each row on a real agent with real driver
hosts and a real aggregator.

Beside each row stands a golden file: what `/metrics` tells of every GPU during the fault compared
with before, the node's state, and what comes of a request. Afterwards everything is as before.
"""

import sys
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import pytest_asyncio
from tests.conftest import Golden
from tests.support.daemons import Stage
from tests.support.faulty_node import (
    ALL_READ_SECONDS,
    FLEET,
    INTERVAL_SECONDS,
    LATE_SECONDS_MAX,
    FaultyNode,
    faulty_node,
)
from tests.support.waiting import until_true

from stoker.agent.events import ReleaseAsked, ResumeAsked
from stoker.client import Refused

pytestmark = pytest.mark.asyncio(loop_scope="module")

FAST_CALL = "nvmlDeviceGetTemperatureV"  # of every sample
PID = 5_000_001  # above the kernel's largest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage_node(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[FaultyNode]:
    """One node for all rows: each of them leaves it as it was."""
    async with Stage(tmp_path_factory.mktemp("fleet")) as stage:
        told = await stage.aggregator(environment=FLEET).start()
        folder = tmp_path_factory.mktemp("node")
        async with faulty_node(folder, "n1", told["listen"], told["metrics"]) as node:
            yield node


@pytest_asyncio.fixture(loop_scope="module")
async def node(
    stage_node: FaultyNode, request: pytest.FixtureRequest
) -> AsyncGenerator[FaultyNode]:
    stage_node.script()  # a row that failed may have left something
    await stage_node.until_well()
    began = time.monotonic()
    yield stage_node
    sys.stdout.write(f"{request.function.__name__}: {stage_node.check_scrapes(began)}\n")


def hang(gpu: int, **fields: Any) -> dict[str, Any]:
    return {"fault": "hang", "gpu": gpu, "function": FAST_CALL, **fields}


async def refused_in_time(node: FaultyNode) -> None:
    """Nothing is placed from three intervals after the first call that does not return."""
    seconds, reason = await node.seconds_until_refused()
    sys.stdout.write(f"refused {seconds:.2f} s after the fault: {reason}\n")
    # The call comes with the next sample.
    assert seconds <= 4 * INTERVAL_SECONDS + LATE_SECONDS_MAX
    with pytest.raises(Refused):
        async with node.fleet.allocate(gpus=1, node=node.name, set_environment=False):
            pass


async def placed(node: FaultyNode, gpus: int) -> None:
    async with node.fleet.allocate(gpus=gpus, node=node.name, set_environment=False):
        pass


async def test_one_call_hangs(node: FaultyNode, golden: Golden) -> None:
    node.script(faults=[hang(1, seconds=60, until_seconds=1)])
    await refused_in_time(node)
    blocked = await node.until_told("the call to be waited for", "beyond three", "only")
    golden("fault_table/call_hangs.txt", blocked)
    alone = await node.until_told("the others to be read", "GPU 1 is out", "GPU 0: all series")
    golden("fault_table/one_call_hung.txt", alone)
    await placed(node, 3)
    await node.until_well()


async def test_calls_hang_for_ever(node: FaultyNode, golden: Golden) -> None:
    node.script(faults=[hang(2)])
    await refused_in_time(node)
    alone = await node.until_told("the others to be read", "GPU 2 is out", "GPU 0: all series")
    golden("fault_table/hung_for_ever.txt", alone)
    restarts = node.agent.snapshot().host.restarts_total

    def is_tried_again() -> bool:
        return node.agent.snapshot().host.restarts_total > restarts

    await until_true("it to be tried again", is_tried_again)
    await node.until_told("the others to be read again", "GPU 2 is out", "GPU 0: all series")
    node.script()
    await node.until_well()


async def test_driver_host_is_held_by_the_kernel(node: FaultyNode, golden: Golden) -> None:
    node.hosts.hold()
    started = len(node.hosts.started)
    node.script(faults=[hang(1)])
    await refused_in_time(node)
    held = await node.until_told("the host to be held", "uninterruptible sleep")
    golden("fault_table/uninterruptible.txt", held)
    assert len(node.hosts.started) == started, "another was started beside it"
    node.script()
    node.hosts.let_go()
    await node.until_well()
    assert len(node.hosts.started) > started


async def test_gpu_falls_off_the_bus(node: FaultyNode, golden: Golden) -> None:
    async with node.fleet.allocate(gpus=1, node=node.name, set_environment=False) as lease:
        (device,) = lease.allocation.devices
        assert device.index == 0
        node.script(faults=[{"fault": "lose", "gpu": 0}])
        lost = await node.until_told("it to be missed", "GPU 0 is out", "GPU 1: all series")
        golden("fault_table/lost.txt", lost.replace(lease.allocation.id, "ALLOCATION"))
        gpu = (await node.node()).gpus[0]
        assert gpu.allocation_ids == (lease.allocation.id,)
        await placed(node, 3)
        node.script()
    await node.until_well()


async def test_driver_is_unloaded_and_loaded(node: FaultyNode, golden: Golden) -> None:
    node.script(driver_loaded=False)
    await refused_in_time(node)
    unloaded = await node.until_told("it to be missed", "driver failed: nvmlInit", "only")
    golden("fault_table/unloaded.txt", unloaded)
    node.script()
    await node.until_well()


async def test_driver_is_upgraded(node: FaultyNode, golden: Golden) -> None:
    node.script(faults=[{"fault": "fail", "error": "LIB_RM_VERSION_MISMATCH"}])
    await refused_in_time(node)
    replaced = await node.until_told("it to be told", "driver failed: nvmlInit", "only")
    golden("fault_table/upgraded.txt", replaced)
    node.script(driver={"version": "580.126.09"})
    await node.until_well()
    assert (await node.node()).driver_version == "580.126.09"


async def test_mig_is_toggled(node: FaultyNode, golden: Golden) -> None:
    node.script(mig=[{"gpu": 3, "devices": ["3g.40gb", "1g.10gb"]}])
    toggled = await node.until_told(
        "it to be told",
        "MIG mode is on at GPU 3",
        "GPU 2: all series",
        steady_seconds=ALL_READ_SECONDS,
    )
    golden("fault_table/mig_toggled.txt", toggled)
    node.script()
    await node.until_well()


async def test_processes_vanish(node: FaultyNode, golden: Golden) -> None:
    """The driver lists a process of which /proc knows nothing: it ended just now."""
    node.script(processes=[{"gpu": 1, "pid": PID, "name": "train", "memory": "20GiB"}])
    vanished = await node.until_told(
        "it to be told", f"PID {PID}", "GPU 0: all series", steady_seconds=ALL_READ_SECONDS
    )
    golden("fault_table/process_vanished.txt", vanished)
    node.script()
    await node.until_well()


async def test_library_lacks_a_function(node: FaultyNode, golden: Golden) -> None:
    node.script(faults=[{"fault": "missing", "function": "nvmlDeviceGetUtilizationRates"}])
    lacking = await node.until_told(
        "it to be missed", "not stoker_gpu_memory_utilization", steady_seconds=ALL_READ_SECONDS
    )
    golden("fault_table/function_missing.txt", lacking)
    node.script()
    # What a library lacks it lacks until another one is loaded.
    node.agent.happen(ReleaseAsked(time.time(), None, "root"))
    await node.until_told("its end", "driver: released")
    node.agent.happen(ResumeAsked(time.time(), "root"))
    await node.until_well()


async def test_values_that_mean_nothing(node: FaultyNode, golden: Golden) -> None:
    unknown = 2**32 - 1
    utilization = {"gpu": unknown, "memory": unknown}
    node.script(
        faults=[
            {
                "fault": "answer",
                "gpu": 0,
                "function": "nvmlDeviceGetUtilizationRates",
                "value": utilization,
            },
            {"fault": "field", "gpu": 1, "field": 82, "value": unknown},
        ]
    )
    senseless = await node.until_told(
        "them to be left out", "GPU 0: not", "GPU 1: not", steady_seconds=ALL_READ_SECONDS
    )
    golden("fault_table/sentinels.txt", senseless)
    node.script()
    await node.until_well()


async def test_driver_is_released_and_resumed(node: FaultyNode, golden: Golden) -> None:
    node.agent.happen(ReleaseAsked(time.time(), None, "root"))
    await refused_in_time(node)
    released = await node.until_told("it to be told", "node is stale: released by root", "only")
    golden("fault_table/released.txt", released)
    node.agent.happen(ResumeAsked(time.time(), "root"))
    await node.until_well()
