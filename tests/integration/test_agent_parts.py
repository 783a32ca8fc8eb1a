"""The agent as a process on partitioned GPUs: what it tells of parts, holds, and refuses."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.daemons import Daemon, python_module
from tests.support.recorder import Recorder, Stream
from tests.support.waiting import until, until_true

from stoker.core.errors import ExitCode
from stoker.v1 import agent_pb2, types_pb2

LAYOUT = ("3g.40gb", "1g.10gb")
GIB, MIB = 2**30, 2**20


def partition(scenario: Path, devices: Sequence[str] = LAYOUT) -> None:
    """Let the first GPU be in MIG mode with these devices."""
    draft = scenario.with_suffix(".new")
    draft.write_text(json.dumps({"mig": [{"gpu": 0, "devices": devices}]}))
    draft.rename(scenario)


@pytest.fixture
async def recorder() -> AsyncIterator[Recorder]:
    async with Recorder() as recorder:
        yield recorder


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "scenario.json"
    partition(path)
    return path


@pytest.fixture
def agent(tmp_path: Path, recorder: Recorder, scenario: Path) -> Iterator[Daemon]:
    command = [
        *python_module("stoker.agent"),
        *("--node", "node-a", "--aggregator", recorder.address),
        *("--data-dir", str(tmp_path / "node-a"), "--metrics-listen", "127.0.0.1:0"),
        *("--interval", "0.1s", "--processes-interval", "0.2s", "--slow-interval", "1s"),
        *("--simulate", "2xH100-80GB", "--scenario", str(scenario)),
    ]
    agent = Daemon("node-a", command, tmp_path, "agent.json")
    yield agent
    agent.end()
    assert "Traceback" not in agent.log


@contextmanager
def workload(uuid: str) -> Generator[int]:
    """Run a process that uses this device."""
    environment = {"CUDA_VISIBLE_DEVICES": uuid, "STOKER_SIMULATED_WORKLOAD": "memory=2GiB"}
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(sleep, env={**os.environ, **environment}) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def hold(stream: Stream, id_: str, gpu: str, *devices: str, share: int | None = None) -> None:
    allocation = agent_pb2.HeldAllocation(
        id=id_,
        gpu_uuids=[gpu],
        mig_device_uuids=devices,
        memory_bytes=share,
        cpu_milli=4000,
        host_memory_bytes=16 * GIB,
        holder="ann",
        ttl_seconds=60.0,
        gang_nodes=2,
    )
    stream.command(agent_pb2.Command(hold=agent_pb2.Hold(allocation=allocation)))


def mig_devices(gpu: agent_pb2.Gpu) -> Mapping[str, agent_pb2.MigDevice]:
    return {each.profile: each for each in gpu.mig_devices}


async def processes(stream: Stream, *pids: int) -> Mapping[int, types_pb2.Process]:
    """Wait until exactly these are told, and return them."""

    async def look() -> Mapping[int, types_pb2.Process] | None:
        tables = [frame.processes for frame in stream.frames if frame.HasField("processes")]
        found = {each.pid: each for each in tables[-1].processes} if tables else {}
        return found if set(found) == set(pids) else None

    return await until(f"processes {pids}", look)


async def refusal(stream: Stream, id_: str) -> str:
    async def look() -> str | None:
        told = (each for frame in stream.frames for each in frame.refusals)
        return next((each.reason for each in told if each.allocation_id == id_), None)

    return await until(f"the refusal of {id_}", look)


async def test_a_node_tells_of_its_host_and_of_how_its_gpus_lie(
    agent: Daemon, recorder: Recorder
) -> None:
    await agent.start()
    told = (await recorder.stream()).hello.inventory
    assert (told.host.cpu_milli, told.host.memory_bytes) == (48_000, 512 * GIB)
    first, second = told.gpus
    assert [gpu.numa_node for gpu in (first, second)] == [0, 1]
    assert [gpu.nvswitch_links for gpu in (first, second)] == [18, 18]
    assert not first.nvlink_peers
    devices = mig_devices(first)
    assert {profile: each.memory_total_bytes for profile, each in devices.items()} == {
        "3g.40gb": 40448 * MIB,
        "1g.10gb": 9984 * MIB,
    }
    assert not second.mig_devices


async def test_a_mig_device_is_held_until_its_processes_were_looked_at(
    agent: Daemon, recorder: Recorder
) -> None:
    await agent.start()
    stream = await recorder.stream()
    gpu = stream.hello.inventory.gpus[0]
    large, small = mig_devices(gpu)["3g.40gb"], mig_devices(gpu)["1g.10gb"]
    hold(stream, "small", gpu.uuid, small.uuid, share=small.memory_total_bytes)
    frame = await stream.holds("small")
    (held,) = frame.held.allocations
    assert list(held.mig_device_uuids) == [small.uuid]
    assert (held.cpu_milli, held.host_memory_bytes, held.gang_nodes) == (4000, 16 * GIB, 2)

    with workload(small.uuid) as tenant, workload(large.uuid) as stranger:
        seen = await processes(stream, tenant, stranger)
        assert {pid: each.allocation_id for pid, each in seen.items()} == {
            tenant: "small",
            stranger: "",
        }
        assert seen[tenant].gpu_instance_id == small.gpu_instance_id
        assert seen[stranger].gpu_instance_id == large.gpu_instance_id
        stream.drop("small")
        frame = await stream.holds()
        # Who is still there is told with the news, under nobody's name.
        left = {each.pid: each.allocation_id for each in frame.processes.processes}
        assert left[tenant] == ""


async def test_what_cannot_be_held_beside_it_is_refused_by_name_also_after_kill_9(
    agent: Daemon, recorder: Recorder
) -> None:
    await agent.start()
    stream = await recorder.stream()
    gpu, whole = stream.hello.inventory.gpus
    large, small = mig_devices(gpu)["3g.40gb"], mig_devices(gpu)["1g.10gb"]
    hold(stream, "small", gpu.uuid, small.uuid)
    await stream.holds("small")
    agent.kill()
    await until_true("the stream to end", lambda: stream.is_over)

    await agent.start()
    stream = await recorder.stream(2)
    (held,) = stream.hello.held.allocations
    assert (list(held.mig_device_uuids), held.gang_nodes) == ([small.uuid], 2)
    hold(stream, "large", gpu.uuid, large.uuid)
    await stream.holds("small", "large")
    hold(stream, "again", gpu.uuid, small.uuid)
    device = f"{small.uuid} (1g.10gb of {gpu.uuid})"
    assert await refusal(stream, "again") == f"{device} is held by allocation small of 'ann'"
    hold(stream, "none", gpu.uuid, "MIG-none")
    reason = await refusal(stream, "none")
    assert reason.startswith(f"{gpu.uuid} does not have MIG-none; it has {large.uuid} (3g.40gb), ")
    hold(stream, "whole", gpu.uuid)
    reason = await refusal(stream, "whole")
    assert reason.startswith(f"{gpu.uuid} is held in part by allocation ")
    hold(stream, "mistaken", whole.uuid, small.uuid)
    reason = await refusal(stream, "mistaken")
    assert reason == f"{whole.uuid} is not in MIG mode, so it does not have {small.uuid}"


async def test_a_layout_that_changes_is_told_anew(
    agent: Daemon, recorder: Recorder, scenario: Path
) -> None:
    await agent.start()
    stream = await recorder.stream()
    partition(scenario, ("2g.20gb", "1g.10gb"))
    frame = await stream.frame_with("inventory")
    assert set(mig_devices(frame.inventory.gpus[0])) == {"2g.20gb", "1g.10gb"}
    partition(scenario, ())
    frame = await stream.frame_with("inventory")
    assert (frame.inventory.gpus[0].mig_enabled, len(frame.inventory.gpus[0].mig_devices)) == (
        True,
        0,
    )


async def test_the_agent_s_own_door_tells_what_is_held_of_parts(
    agent: Daemon, recorder: Recorder
) -> None:
    told = await agent.start()
    stream = await recorder.stream()
    gpu = stream.hello.inventory.gpus[0]
    small = mig_devices(gpu)["1g.10gb"]
    hold(stream, "small", gpu.uuid, small.uuid)
    await stream.holds("small")
    command = [
        *python_module("stoker.cli"),
        "agent",
        "status",
        "--json",
        "--socket",
        told["socket"],
    ]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=False)
    assert done.returncode == ExitCode.OK, done.stderr
    (held,) = json.loads(done.stdout)["users"]["held"]
    assert held["mig_device_uuids"] == [small.uuid]
    assert (held["cpu_milli"], held["host_memory_bytes"]) == (4000, 16 * GIB)
