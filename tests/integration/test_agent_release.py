"""`stoker agent release|resume|status|profiling` against real agents and a real aggregator."""

import asyncio
import getpass
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.daemons import Daemon, Stage, free_nodes, python_module, run_command, stoker
from tests.support.driver_hosts import hang, open_devices
from tests.support.pages import fetch_metrics, read_page
from tests.support.waiting import until, until_true

from stoker.client import AsyncFleet, Node, NodeState
from stoker.core.clock import SystemClock
from stoker.core.errors import ExitCode

INTERVAL = 0.1
FOREIGN_PID = 5_000_001
# Somebody's process on the second GPU.
BUSY = {"processes": [{"gpu": 1, "pid": FOREIGN_PID, "name": "train", "memory": "2GiB"}]}
NOBODY_UID = 65534


class Host:
    """An agent of two GPUs and the commands that are given on its machine."""

    def __init__(self, stage: Stage, *options: str, name: str = "node-a") -> None:
        self.scenario = stage.folder / f"{name}.json"
        self.write(BUSY)
        self.daemon = stage.agent(
            name,
            "2xT4",
            *("--interval", f"{INTERVAL}s", "--processes-interval", f"{INTERVAL}s"),
            *("--slow-interval", "1s", "--scenario", str(self.scenario)),
            *options,
        )
        self.socket = self.daemon.data_dir / "agent.sock"

    def write(self, scenario: dict[str, Any]) -> None:
        draft = self.scenario.with_suffix(".new")
        draft.write_text(json.dumps(scenario))
        draft.rename(self.scenario)

    def ask(self, *verb: str, code: ExitCode = ExitCode.OK) -> dict[str, Any]:
        """Give a command and return the document that it prints."""
        done = stoker("agent", *verb, "--socket", str(self.socket), "--json")
        assert done.returncode == code, done
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def say(self, *verb: str, code: ExitCode = ExitCode.OK) -> str:
        """Give a command and return what a person reads."""
        done = stoker("agent", *verb, "--socket", str(self.socket))
        assert done.returncode == code, done
        return done.stdout + done.stderr

    @property
    def handles(self) -> list[str]:
        """The devices that the agent and its children have open."""
        agent = psutil.Process(self.daemon.process.pid)
        pids = [agent.pid, *(child.pid for child in agent.children(recursive=True))]
        return [device for pid in pids for device in open_devices(pid)]

    async def reads(self) -> None:
        """Return once every GPU is read and it is known who uses them."""

        async def look() -> bool:
            found = await asyncio.to_thread(self.ask, "status")
            users = found["users"]
            is_read = found["gpus"] and all(gpu["is_read"] for gpu in found["gpus"])
            return bool(is_read and users["processes"] and not users["unread_gpus"])

        await until("every GPU to be read", look)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with Stage(tmp_path) as stage:
        yield stage


@pytest.fixture
async def host(stage: Stage) -> Host:
    host = Host(stage)
    await host.daemon.start()
    await host.reads()
    return host


async def node_as(fleet: AsyncFleet, state: NodeState) -> Node:
    async def look() -> Node | None:
        nodes = (await fleet.nodes()).nodes
        return nodes[0] if nodes and nodes[0].state is state else None

    return await until(f"a node that is {state}", look)


async def test_release_then_resume_seen_from_everywhere(stage: Stage) -> None:
    await stage.aggregator().start()
    host = Host(stage)
    told = await host.daemon.start()
    async with stage.fleet() as fleet:
        await host.reads()
        await free_nodes(fleet, 1)
        granted = await fleet.request(gpus=1, holder="ann")
        await until_true("the hold", lambda: bool(host.ask("status")["users"]["held"]))
        assert host.handles != []

        answer = host.ask("release", "--for", "1h")
        assert host.handles == []
        assert answer["took_seconds"] < 1.0
        assert (answer["pending"], answer["unsaved"]) == ("", "")
        assert answer["release"]["by"] == getpass.getuser()
        assert [each["id"] for each in answer["users"]["held"]] == [granted.id]
        (process,) = answer["users"]["processes"]
        assert (process["pid"], process["gpu_index"]) == (FOREIGN_PID, 1)
        assert answer["users"]["processes_age_seconds"] is not None

        # Nothing that was read is told any more, and nothing is placed.
        status = host.ask("status")
        assert status["driver"]["state"] == "released"
        assert status["driver"]["host_pid"] is None
        assert "for 1h, 1 allocation held" in status["driver"]["reason"]
        assert status["release"]["until"] == pytest.approx(status["release"]["at"] + 3600)
        assert status["users"]["processes"] == []
        assert [gpu["index"] for gpu in status["users"]["unread_gpus"]] == [0, 1]
        page = read_page(await fetch_metrics(told["metrics"]))
        assert "stoker_gpu_temperature_celsius" not in page
        states = page["stoker_agent_driver_state"]
        assert {dict(k)["state"] for k, v in states.items() if v} == {"released"}

        async def is_refused() -> bool:
            return not (await fleet.explain_request(gpus=1)).placeable

        await until("the refusal", is_refused)
        node = (await fleet.nodes()).nodes[0]
        assert "released by" in node.state_reason

        # Letting go of what is held waits for the driver: who uses it cannot be seen.
        await fleet.release(granted.id, wait=0)
        await until_true("the drop", lambda: host.ask("status")["users"]["held"][0]["is_leaving"])
        failures = host.ask("status")["sample_failures"]

        assert host.ask("resume") == {"answer": "resumed", "was_released": True, "unsaved": ""}
        await host.reads()
        await until_true("what is held to go", lambda: not host.ask("status")["users"]["held"])
        await node_as(fleet, NodeState.READY)
        status = host.ask("status")
        assert status["sample_failures"] == failures
        assert status["driver"]["host_restarts"] == 0, "a release is no failure"
        assert status["driver"]["host_starts"] == 2
        page = read_page(await fetch_metrics(told["metrics"]))
        assert all(value > 0 for value in page["stoker_gpu_power_watts"].values())


async def test_a_released_agent_that_is_killed_stays_released(host: Host) -> None:
    host.ask("release")
    for end in (host.daemon.kill, host.daemon.end):
        end()
        await host.daemon.start()
        status = host.ask("status")
        assert status["driver"]["state"] == "released"
        assert status["driver"]["host_starts"] == 0, "not even for a moment"
        assert status["samples"] == 0
        assert host.handles == []
    assert host.ask("resume")["was_released"]
    await host.reads()
    assert host.ask("status")["driver"]["host_starts"] == 1
    host.daemon.kill()
    await host.daemon.start()
    await host.reads()
    assert not host.ask("resume")["was_released"]


async def test_a_released_node_is_told_as_such_by_an_agent_that_started_since(
    stage: Stage,
) -> None:
    await stage.aggregator().start()
    host = Host(stage)
    await host.daemon.start()
    async with stage.fleet() as fleet:
        await host.reads()
        await free_nodes(fleet, 1)
        granted = await fleet.request(gpus=1, holder="ann")
        await until_true("the hold", lambda: bool(host.ask("status")["users"]["held"]))
        host.ask("release")
        host.daemon.kill()
        await host.daemon.start()

        async def is_told() -> bool:
            node = (await fleet.nodes()).nodes[0]
            return "released by" in node.state_reason and "1 allocation held" in node.state_reason

        await until("the reason", is_told)
        node = (await fleet.nodes()).nodes[0]
        assert [each for gpu in node.gpus for each in gpu.allocation_ids] == [granted.id]
        assert all(gpu.temperature_celsius is None for gpu in node.gpus)
        assert not (await fleet.explain_request(gpus=1)).placeable
        host.ask("resume")
        await node_as(fleet, NodeState.READY)
        assert [each["id"] for each in host.ask("status")["users"]["held"]] == [granted.id]


async def test_a_release_ends_with_its_time(host: Host) -> None:
    host.ask("release", "--for", "300ms")
    await host.reads()
    status = host.ask("status")
    assert status["release"] is None
    assert status["driver"]["host_starts"] == 2
    host.daemon.kill()
    await host.daemon.start()
    assert host.ask("status")["release"] is None, "its end is noted down"


async def test_a_release_whose_time_ends_while_the_agent_is_down(host: Host) -> None:
    until_at = host.ask("release", "--for", "200ms")["release"]["until"]
    host.daemon.kill()
    clock = SystemClock()
    await until_true("its time to be over", lambda: clock.now() >= until_at)
    await host.daemon.start()
    await host.reads()
    assert host.ask("status")["release"] is None


async def test_what_a_person_reads(host: Host) -> None:
    said = host.say("release", "--for", "10m")
    assert said.startswith("released in 0.")
    assert "the agent has no handle open" in said
    assert "stoker agent resume, or wait until " in said
    assert f"{FOREIGN_PID}" in said
    assert "train" in said
    said = host.say("status")
    assert "no: released by " in said
    assert "processes on the GPUs: not known" in said
    assert host.say("resume") == "the driver is taken again\n"
    assert host.say("resume") == "the driver was not released\n"
    assert "left alone until they are resumed" in host.say("profiling", "pause")
    assert host.say("profiling", "resume") == "the hardware counters are read\n"


async def test_profiling_is_paused_for_a_while_and_not_over_a_restart(host: Host) -> None:
    found = host.ask("profiling", "pause", "--for", "1h")
    assert found["is_paused"]
    assert host.ask("status")["profiling"] == {
        "answer": "profiling",
        "is_paused": True,
        "until": pytest.approx(found["until"], abs=1.0),
    }
    assert not host.ask("profiling", "resume")["is_paused"]
    host.ask("profiling", "pause", "--for", "50ms")
    await until_true("its end", lambda: not host.ask("status")["profiling"]["is_paused"])
    host.ask("profiling", "pause")
    host.daemon.kill()
    await host.daemon.start()
    assert not host.ask("status")["profiling"]["is_paused"]


async def test_status_names_the_call_that_hangs_and_then_the_gpu_that_is_out(host: Host) -> None:
    host.write(BUSY | {"faults": [hang(1)]})

    def hangs() -> bool:
        call: dict[str, Any] | None = host.ask("status")["driver"]["call"]
        return call == {"function": "nvmlDeviceGetTemperatureV", "gpu_index": 1}

    await until_true("the call", hangs)

    def is_out() -> bool:
        reads = {gpu["index"]: gpu["is_read"] for gpu in host.ask("status")["gpus"]}
        return reads == {0: True, 1: False}

    await until_true("the other GPU to be read", is_out)
    status = host.ask("status")
    reason = status["gpus"][1]["reason"]
    assert "nvmlDeviceGetTemperatureV" in reason
    assert f"out: GPU 1: {reason}" in status["summary"]
    assert status["driver"]["timeouts"] == 1
    assert reason in host.say("status").replace("\n", " ")


async def test_it_is_released_while_a_call_hangs(host: Host) -> None:
    host.write({"faults": [hang(None, "*")]})
    await until_true("the hang", lambda: host.ask("status")["driver"]["call"] is not None)
    answer = host.ask("release")
    assert answer["pending"] == ""
    assert host.handles == []


async def test_it_is_released_though_the_driver_has_never_opened(stage: Stage) -> None:
    host = Host(stage)
    host.write({"faults": [hang(None, "nvmlInit")]})
    await host.daemon.start()

    def hangs() -> bool:
        call = host.ask("status")["driver"]["call"]
        return bool(call and call["function"] == "nvmlInit")

    await until_true("the call", hangs)
    assert host.ask("release")["pending"] == ""
    assert host.ask("status")["driver"]["state"] == "released"
    assert host.handles == []
    host.write(BUSY)
    host.ask("resume")
    await host.reads()


async def test_the_agent_of_up_is_found_without_being_named(stage: Stage) -> None:
    environment = {"XDG_STATE_HOME": str(stage.folder / "state")}
    command = [
        *python_module("stoker.cli"),
        *("up", "--simulate", "1xT4", "--listen", stage.address),
        *("--metrics-listen", "127.0.0.1:0", "--aggregator-metrics-listen", "127.0.0.1:0"),
    ]
    up = stage.other(Daemon("up", command, stage.folder, "nowhere", environment))
    up.spawn()
    await until_true("it to be ready", lambda: "ready: " in up.log)
    done = stoker("agent", "status", "--json", environment=environment)
    assert done.returncode == ExitCode.OK, done
    assert json.loads(done.stdout)["node"] == "sim-1"


# --- who may


def test_who_is_neither_root_nor_the_agents_user_may_look_and_no_more() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    try:
        folder.chmod(0o755)
        asyncio.run(_somebody_else_asks(folder))
    finally:
        shutil.rmtree(folder)


async def _somebody_else_asks(folder: Path) -> None:
    async with Stage(folder) as stage:
        host = Host(stage)
        await host.daemon.start()
        await host.reads()
        host.daemon.data_dir.chmod(0o755)
        denied = as_nobody(host, "status")
        assert denied.returncode == ExitCode.UNREACHABLE
        assert "not for this user" in denied.stderr
        host.socket.chmod(0o666)
        assert as_nobody(host, "status").returncode == ExitCode.OK
        for verb in ("release", "resume", "profiling pause", "profiling resume"):
            refused = as_nobody(host, *verb.split())
            assert refused.returncode == ExitCode.REFUSED
            assert f"{verb} is for root (uid 0); this is uid {NOBODY_UID}" in refused.stderr
        assert host.ask("status")["release"] is None


def as_nobody(host: Host, *verb: str) -> subprocess.CompletedProcess[str]:
    """Give a command as another user; what it needs of Python is loaded before."""
    script = (
        "import os, sys; from stoker.cli.__main__ import run; import stoker.cli.agent; "
        f"os.setgid({NOBODY_UID}); os.setuid({NOBODY_UID}); sys.exit(run(sys.argv[1:]))"
    )
    return run_command(
        *(sys.executable, "-c", script, "agent", *verb, "--socket", str(host.socket)),
    )


# --- whose the socket is


async def test_the_socket_of_an_agent_that_was_killed_is_taken_over(host: Host) -> None:
    host.daemon.kill()
    assert "nobody listens" in host.say("status", code=ExitCode.UNREACHABLE)
    await host.daemon.start()
    assert host.ask("status")["pid"] == host.daemon.process.pid


async def test_an_agent_that_ends_leaves_no_socket(host: Host) -> None:
    assert await host.daemon.stop() == ExitCode.OK
    assert "not there" in host.say("status", code=ExitCode.UNREACHABLE)


async def test_two_agents_do_not_share_a_socket(host: Host, stage: Stage) -> None:
    second = Host(stage, "--socket", str(host.socket), name="node-b").daemon
    second.spawn()
    assert await second.ended() == ExitCode.IN_USE
    assert f"another agent answers at {host.socket}" in second.log
    assert host.ask("status")["node"] == "node-a"


async def test_a_socket_whose_path_is_too_long_is_refused_at_the_start(stage: Stage) -> None:
    path = stage.folder / ("s" * 108)
    daemon = Host(stage, "--socket", str(path)).daemon
    daemon.spawn()
    assert await daemon.ended() == ExitCode.USAGE
    assert f"{path} has {len(str(path))} bytes, the kernel takes at most 107" in daemon.log
