"""`stoker up` with real daemons: what it says, what it starts again, what it leaves behind."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.daemons import plain_environment, stoker
from tests.support.ports import free_port
from tests.support.waiting import until, until_true

from stoker.client import AsyncFleet, ClientError, Nodes, NodeState
from stoker.core.errors import ExitCode

ANY = "127.0.0.1:0"


class Up:
    """A running `stoker up`, in a group of its own as a shell starts it."""

    def __init__(
        self, folder: Path, *options: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.out, self.err = folder / "out", folder / "err"
        self.listen = f"127.0.0.1:{free_port()}"
        command = [
            *(sys.executable, "-m", "stoker.cli", "up", "--data-dir", str(folder / "data")),
            *("--listen", self.listen, "--metrics-listen", ANY),
            *("--aggregator-metrics-listen", ANY, *options),
        ]
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=plain_environment(environment),
                start_new_session=True,
            )

    def printed(self) -> str:
        return self.out.read_text(encoding="utf-8")

    def said(self) -> str:
        return self.err.read_text(encoding="utf-8")

    async def ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.said()
            return "ready" in self.printed() and self.printed().endswith("\n")

        await until_true("`stoker up` to be ready", is_ready)

    async def ended(self) -> int:
        await until_true("the end of `stoker up`", lambda: self.process.poll() is not None)
        return self.process.returncode

    def children(self) -> list[psutil.Process]:
        """Return the daemons and what they have started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def told(self, file: str) -> Any:
        found: Any = json.loads((self.folder / "data" / file).read_bytes())
        return found


Start = Callable[..., Up]


@pytest.fixture
def start(tmp_path: Path) -> Generator[Start]:
    """Starts `stoker up` with options; it ends with the test."""
    started: list[Up] = []

    def begin(*options: str, environment: Mapping[str, str] | None = None) -> Up:
        started.append(Up(tmp_path, *options, environment=environment))
        return started[-1]

    yield begin
    for up in started:
        up.process.terminate()
        up.process.wait()


@pytest.fixture
def hidden_nvml(tmp_path: Path) -> Mapping[str, str]:
    """An environment in which the loader finds no NVML library that it can load."""
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "libnvidia-ml.so.1").touch()
    return {"LD_LIBRARY_PATH": str(folder)}


async def gone(processes: list[psutil.Process]) -> None:
    def are_gone() -> bool:
        return not any(
            each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes
        )

    await until_true("the daemons to be gone", are_gone)


async def answered(fleet: AsyncFleet, is_so: Any) -> Nodes:
    async def look() -> Nodes | None:
        try:
            found = await fleet.nodes()
        except ClientError:
            return None
        return found if is_so(found) else None

    return await until("the nodes to be as wanted", look)


def are_ready(found: Nodes) -> bool:
    return all(node.state is NodeState.READY for node in found.nodes)


async def test_simulated_fleet_and_its_end(start: Start) -> None:
    up = start("--json", "--simulate", "2xT4", "--simulate", "1xB200")
    await up.ready()
    ready = json.loads(up.printed())
    assert (ready["ready"], ready["address"], ready["notice"]) == (True, up.listen, None)
    assert ready["nodes"] == [
        {"name": "sim-1", "simulated": True},
        {"name": "sim-2", "simulated": True},
    ]
    # What is said to be ready is ready by the API, each node with GPUs of its own.
    async with AsyncFleet(up.listen) as fleet:
        found = await fleet.nodes()
    assert are_ready(found)
    assert {node.name: len(node.gpus) for node in found.nodes} == {"sim-1": 2, "sim-2": 1}
    assert len({gpu.uuid for node in found.nodes for gpu in node.gpus}) == 3

    aggregator = up.told("aggregator/aggregator.json")
    agents = {name: up.told(f"agents/{name}/agent.json") for name in ("sim-1", "sim-2")}
    pages = [aggregator["metrics"], *(agent["metrics"] for agent in agents.values())]
    assert ready["metrics"] == [f"http://{page}/metrics" for page in pages]
    targets = up.told("prometheus-targets.json")
    assert ready["prometheus_targets"] == str(up.folder / "data" / "prometheus-targets.json")
    assert [target["targets"] for target in targets] == [[page] for page in pages]

    children = up.children()
    assert {aggregator["pid"], agents["sim-1"]["pid"], agents["sim-2"]["pid"]} <= {
        child.pid for child in children
    }
    up.process.send_signal(signal.SIGINT)
    assert await up.ended() == ExitCode.OK
    await gone(children)


async def test_what_crashes_is_started_again_where_it_was(start: Start) -> None:
    up = start("--simulate", "2xT4")
    await up.ready()
    async with AsyncFleet(up.listen) as fleet:
        granted = await fleet.request(gpus=2)
        before = up.told("aggregator/aggregator.json")
        os.kill(before["pid"], signal.SIGKILL)
        os.kill(up.told("agents/sim-1/agent.json")["pid"], signal.SIGKILL)

        def is_new(found: Nodes) -> bool:
            return up.told("aggregator/aggregator.json") != before and are_ready(found)

        await answered(fleet, is_new)
        after = up.told("aggregator/aggregator.json")
        assert (after["listen"], after["metrics"]) == (before["listen"], before["metrics"])
        assert [each.id for each in (await fleet.allocations()).allocations] == [granted.id]
    said = up.said().splitlines()
    for name in ("aggregator", "agent sim-1"):
        line = f"stoker: {name} was ended by SIGKILL; starting it again in 1 s"
        assert said.count(line) == 1, said
    up.process.send_signal(signal.SIGTERM)
    assert await up.ended() == ExitCode.OK


async def test_nothing_outlives_a_killed_up(start: Start) -> None:
    up = start("--simulate", "1xT4")
    await up.ready()
    children = up.children()
    assert len(children) >= 3  # aggregator, agent, driver host
    up.process.kill()
    await up.ended()
    await gone(children)


async def test_without_nvml_it_says_what_is_missing(
    start: Start, tmp_path: Path, hidden_nvml: Mapping[str, str]
) -> None:
    up = start(environment=hidden_nvml)
    assert await up.ended() == ExitCode.MISSING
    (line,) = up.said().splitlines()
    assert "libnvidia-ml.so.1" in line
    assert "--simulate" in line
    assert up.printed() == ""
    assert not (tmp_path / "data").exists()


async def test_without_nvml_it_may_simulate_and_says_so_first(
    start: Start, hidden_nvml: Mapping[str, str]
) -> None:
    up = start("--or-simulate", "1xT4", environment=hidden_nvml)
    await up.ready()
    first = up.printed().splitlines()[0]
    assert "libnvidia-ml.so.1" in first
    assert "SIMULATED" in first
    async with AsyncFleet(up.listen) as fleet:
        assert [node.simulated for node in (await fleet.nodes()).nodes] == [True]
    up.process.send_signal(signal.SIGTERM)
    assert await up.ended() == ExitCode.OK


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen", "--aggregator-metrics-listen"])
def test_port_in_use_is_said_before_anything_starts(tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        others = {"--listen": ANY, "--metrics-listen": ANY, "--aggregator-metrics-listen": ANY}
        wanted = others | {flag: f"127.0.0.1:{port}"}
        options = [word for pair in wanted.items() for word in pair]
        done = stoker("up", "--simulate", "1xT4", "--data-dir", str(tmp_path / "data"), *options)
    assert done.returncode == ExitCode.IN_USE
    (line,) = done.stderr.splitlines()
    assert flag in line
    assert f"port {port}" in line
    assert not (tmp_path / "data").exists()


async def test_daemon_that_will_not_start_ends_it_with_its_code(start: Start) -> None:
    up = start("--simulate", "1xT4", "--log-level", "loud")
    assert await up.ended() == ExitCode.USAGE
    first, last = up.said().splitlines()
    assert "loud" in first
    assert "aggregator ended with exit code 2" in last
