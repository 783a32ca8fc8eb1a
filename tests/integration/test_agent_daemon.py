"""The agent as a process: what it says, what it survives, how it ends."""

import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
from tests.support.daemons import Daemon, python_module
from tests.support.pages import fetch_metrics, read_page, total
from tests.support.recorder import Recorder, Stream
from tests.support.waiting import until, until_true

from stoker.core.errors import ExitCode
from stoker.v1 import agent_pb2

INTERVAL = 0.1
# Makes the driver hang in a call about the second GPU.
HANG = {"faults": [{"fault": "hang", "gpu": 1, "function": "nvmlDeviceGetTemperatureV"}]}

HAS_DRIVER = Path("/dev/nvidiactl").exists()

MakeAgent = Callable[..., Daemon]


@pytest.fixture
async def recorder() -> AsyncIterator[Recorder]:
    async with Recorder() as recorder:
        yield recorder


@pytest.fixture
def make_agent(tmp_path: Path, recorder: Recorder) -> Iterator[MakeAgent]:
    agents: list[Daemon] = []

    def make(
        *options: str, simulate: str | None = "2xT4", environment: dict[str, str] | None = None
    ) -> Daemon:
        command = [
            *python_module("stoker.agent"),
            *("--node", "node-a", "--aggregator", recorder.address),
            *("--data-dir", str(tmp_path / "node-a"), "--metrics-listen", "127.0.0.1:0"),
            *("--interval", f"{INTERVAL}s", "--processes-interval", "1s"),
            *(() if simulate is None else ("--simulate", simulate)),
            *options,
        ]
        agents.append(Daemon("node-a", command, tmp_path, "agent.json", environment))
        return agents[-1]

    yield make
    for agent in agents:
        agent.end()
        assert "Traceback" not in agent.log


def read(path: str) -> str:
    return Path(path).read_text(encoding="ascii")


def uuids(stream: Stream) -> list[str]:
    return [gpu.uuid for gpu in stream.hello.inventory.gpus]


def sequences(stream: Stream) -> list[int]:
    return [frame.sequence for frame in stream.frames]


async def test_hello_then_frames(make_agent: MakeAgent, recorder: Recorder) -> None:
    agent = make_agent("--pool", "train", "--label", "rack=r1")
    told = await agent.start()
    stream = await recorder.stream()
    hello = stream.hello
    assert (hello.protocol_version, hello.node, hello.pool) == (1, "node-a", "train")
    assert dict(hello.labels) == {"rack": "r1"}
    assert hello.boot_id == read("/proc/sys/kernel/random/boot_id").strip()
    assert hello.simulated
    assert hello.interval_seconds == pytest.approx(INTERVAL)
    assert [gpu.model for gpu in hello.inventory.gpus] == ["Tesla T4", "Tesla T4"]
    assert len(hello.held.allocations) == 0
    first = await stream.holds()
    assert first.driver.state == agent_pb2.DRIVER_STATE_READING
    await until_true("frames", lambda: len(stream.frames) > 5)
    numbers = [gpu.number for gpu in hello.inventory.gpus]
    ticks = [frame for frame in stream.frames if frame.samples]
    assert all([sample.number for sample in tick.samples] == numbers for tick in ticks)
    assert all(b == a + 1 for a, b in pairwise(sequences(stream)))
    plain = [frame for frame in ticks if not frame.HasField("processes")]
    assert all(not frame.HasField("held") and not frame.HasField("driver") for frame in plain)
    page = read_page(await fetch_metrics(told["metrics"]))
    assert total(page, "stoker_agent_connected") == 1
    assert len(page["stoker_gpu_temperature_celsius"]) == 2


async def test_what_is_held_survives_kill_9_and_numbers_go_on(
    make_agent: MakeAgent, recorder: Recorder
) -> None:
    agent = make_agent()
    await agent.start()
    first = await recorder.stream()
    gpu_a, gpu_b = uuids(first)
    first.hold("whole", gpu_a)
    first.hold("share", gpu_b, memory=2**30)
    frame = await first.holds("whole", "share")
    assert frame.commands_done == 2
    agent.kill()
    await until_true("the stream to end", lambda: first.is_over)
    taken = sequences(first)[-1]

    await agent.start()
    second = await recorder.stream(2)
    assert {each.id for each in second.hello.held.allocations} == {"whole", "share"}
    assert {each.gpu_uuids[0] for each in second.hello.held.allocations} == {gpu_a, gpu_b}
    assert second.hello.incarnation == first.hello.incarnation
    assert second.hello.process_id != first.hello.process_id
    assert second.frames[0].sequence > taken
    assert uuids(second) == [gpu_a, gpu_b]

    second.hold("again", gpu_a)
    refused = await second.frame_with("refusals")
    assert "held exclusively by allocation whole of 'ann'" in refused.refusals[0].reason
    assert gpu_a in refused.refusals[0].reason
    second.drop("whole")
    frame = await second.holds("share")
    assert frame.HasField("processes")
    assert not frame.processes.unread_gpu_uuids
    second.hold("next", gpu_a)
    await second.holds("share", "next")


async def test_an_aggregator_that_comes_back_gets_what_it_missed_and_only_that(
    make_agent: MakeAgent, recorder: Recorder
) -> None:
    agent = make_agent()
    told = await agent.start()
    first = await recorder.stream()
    await until_true("frames", lambda: len(first.frames) > 3)
    await recorder.stop()

    async def spool() -> bool:
        page = read_page(await fetch_metrics(told["metrics"]))
        return total(page, "stoker_agent_outbox_frames") >= 5

    await until("frames to wait", spool)
    await recorder.start()
    second = await recorder.stream(2)
    assert second.hello.process_id == first.hello.process_id
    numbers = sequences(first) + sequences(second)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


async def test_an_aggregator_that_knows_nothing_is_told_everything(
    make_agent: MakeAgent, recorder: Recorder
) -> None:
    agent = make_agent()
    await agent.start()
    first = await recorder.stream()
    first.hold("a", uuids(first)[0])
    await first.holds("a")
    recorder.forget()
    await recorder.stop()
    await recorder.start()
    second = await recorder.stream(2)
    assert {each.id for each in second.hello.held.allocations} == {"a"}
    frame = await second.holds("a")
    assert all(frame.HasField(part) for part in ("inventory", "driver", "processes"))


async def test_a_version_that_is_not_spoken_is_named_and_the_agent_lives(
    make_agent: MakeAgent, recorder: Recorder
) -> None:
    recorder.refusal = (grpc.StatusCode.FAILED_PRECONDITION, "this aggregator speaks version 7")
    agent = make_agent()
    told = await agent.start()
    await until_true("a line in the log", lambda: "version 7" in agent.log)
    assert "this agent speaks protocol version 1" in agent.log
    page = read_page(await fetch_metrics(told["metrics"]))
    assert total(page, "stoker_agent_connected") == 0
    assert await agent.stop() == ExitCode.OK


async def test_a_command_that_means_nothing_is_logged_and_telemetry_goes_on(
    make_agent: MakeAgent, recorder: Recorder
) -> None:
    agent = make_agent()
    await agent.start()
    stream = await recorder.stream()
    stream.command(agent_pb2.Command())
    stream.hold("", uuids(stream)[0])
    stream.hold("gone", "GPU-not-here")
    refused = await stream.frame_with("refusals")
    assert "GPU-not-here is not on this node" in refused.refusals[0].reason
    assert "command 1 is of a kind that is not known" in agent.log
    assert "command 2: an allocation id of 0 characters" in agent.log
    assert not stream.is_over


async def test_a_driver_that_hangs_is_told_and_its_values_go(
    make_agent: MakeAgent, recorder: Recorder, tmp_path: Path
) -> None:
    scenario = tmp_path / "scenario.json"
    agent = make_agent("--scenario", str(scenario))
    told = await agent.start()
    stream = await recorder.stream()
    gpu_a, gpu_b = uuids(stream)
    stream.hold("a", gpu_b)
    await stream.holds("a")
    fresh = scenario.with_suffix(".new")
    fresh.write_text(json.dumps(HANG))
    fresh.rename(scenario)

    def states() -> list[int]:
        return [int(frame.driver.state) for frame in stream.frames if frame.HasField("driver")]

    await until_true("the hang to be told", lambda: agent_pb2.DRIVER_STATE_BLOCKED in states())

    # The driver is started anew and leaves the culprit alone.
    def known() -> list[str]:
        told = [frame.inventory for frame in stream.frames if frame.HasField("inventory")]
        return [gpu.uuid for gpu in told[-1].gpus]

    await until_true("the culprit to be left out", lambda: known() == [gpu_a])
    await until_true("it to read again", lambda: states()[-1] == agent_pb2.DRIVER_STATE_READING)
    tick = await stream.frame_with("samples")
    assert len(tick.samples) == 1
    page = read_page(await fetch_metrics(told["metrics"]))
    assert {dict(labels)["uuid"] for labels in page["stoker_gpu_power_watts"]} == {gpu_a}
    assert total(page, "stoker_agent_driver_host_restarts_total") == 1
    assert not stream.is_over

    # Nobody knows what runs on it.
    def unknown() -> list[str]:
        told = [frame.processes for frame in stream.frames if frame.HasField("processes")]
        return list(told[-1].unread_gpu_uuids)

    await until_true("its processes to be unknown", lambda: unknown() == [gpu_b])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_it_ends_when_asked_and_leaves_no_process(
    make_agent: MakeAgent, recorder: Recorder, signum: signal.Signals
) -> None:
    agent = make_agent()
    await agent.start()
    stream = await recorder.stream()
    pid = agent.process.pid
    children = read(f"/proc/{pid}/task/{pid}/children").split()
    assert len(children) == 1  # the driver host
    agent.process.send_signal(signum)
    assert await agent.ended() == ExitCode.OK
    with pytest.raises(ProcessLookupError):
        os.kill(int(children[0]), 0)
    assert not (agent.data_dir / "agent.json").exists()
    await until_true("the stream to end", lambda: stream.is_over)


async def test_it_ends_when_asked_though_the_driver_hangs_from_the_start(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    scenario = tmp_path / "scenario.json"
    scenario.write_text(json.dumps({"faults": [{"fault": "hang", "function": "nvmlInit"}]}))
    agent = make_agent("--scenario", str(scenario))
    await agent.start()
    assert await agent.stop() == ExitCode.OK


async def test_the_service_manager_is_told(
    make_agent: MakeAgent, recorder: Recorder, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        agent = make_agent(environment={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        await agent.start()
        await recorder.stream()
        told: list[str] = []

        async def hear(word: str) -> bool:
            while True:
                try:
                    told.append(manager.recv(4096).decode())
                except BlockingIOError:
                    return any(word in message.splitlines() for message in told)

        connected = "STATUS=2 GPUs read; 0 allocations held; aggregator connected"
        await until("the status", lambda: hear(connected))
        assert told[0].startswith("READY=1\nWATCHDOG=1\n")
        assert all("READY=1" not in message for message in told[1:])
        assert all("WATCHDOG=1" in message for message in told)
        await agent.stop()
        assert await hear("STOPPING=1")


@pytest.mark.skipif(HAS_DRIVER, reason="this machine has an NVIDIA driver")
async def test_a_machine_without_a_driver(make_agent: MakeAgent, recorder: Recorder) -> None:
    agent = make_agent(simulate=None, environment={"LD_LIBRARY_PATH": ""})
    agent.spawn()
    assert await agent.ended() == ExitCode.MISSING
    assert "libnvidia-ml.so.1" in agent.log
    assert "--simulate" in agent.log
    assert recorder.streams == []
