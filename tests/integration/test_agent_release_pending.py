"""`stoker agent release` while the kernel holds the driver host: it is pending, and says so."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from tests.support.daemons import stoker
from tests.support.driver_hosts import HASTY
from tests.support.ports import free_port
from tests.support.waiting import until

from stoker.agent.config import AgentConfig, settle
from stoker.agent.daemon import Agent
from stoker.agent.driver_host.frames import SimulatedDriver
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.journal import Journal
from stoker.agent.local import LocalDoor
from stoker.agent.model import NodeIdentity
from stoker.agent.proctable import ProcTable
from stoker.core.clock import SystemClock
from stoker.core.errors import ExitCode
from stoker.core.sdnotify import Notifier
from stoker.testing.undying import Undying

INTERVAL = 0.1


@contextlib.asynccontextmanager
async def agent_of(folder: Path, undying: Undying) -> AsyncGenerator[Path]:
    """An agent in this process, whose driver hosts may be held by the kernel; where it answers."""
    clock, patience = SystemClock(), replace(HASTY, kill_seconds=0.1)
    written = AgentConfig(
        node="node-a",
        aggregator=(f"127.0.0.1:{free_port()}",),
        interval_seconds=INTERVAL,
        data_dir=folder,
    )
    settings = settle(written, {}, hostname="node-a")
    source = SimulatedDriver(("2xT4",), "node-a")
    journal = Journal.open(settings.data_dir)
    door = LocalDoor.open(settings.socket)
    agent = Agent(
        settings,
        NodeIdentity("node-a", "0.1.0", "boot", True, "", {}, INTERVAL, "process"),
        journal=journal,
        host=DriverHost(
            source, patience=patience, clock=clock, spawn=undying, read_state=undying.read_state
        ),
        door=door,
        user="ann",
        proctable=ProcTable(),
        notifier=Notifier({}),
        clock=clock,
        rng=Random(1),
    )
    running = asyncio.create_task(agent.run())
    try:
        yield settings.socket
    finally:
        undying.let_go()
        agent.stop()
        await running
        door.close()
        journal.close()


async def test_release_is_pending_while_the_kernel_holds_the_driver_host(tmp_path: Path) -> None:
    undying = Undying()
    async with agent_of(tmp_path, undying) as socket:

        async def ask(*verb: str) -> tuple[int, dict[str, Any]]:
            arguments = ("agent", *verb, "--socket", str(socket), "--json")
            done = await asyncio.to_thread(stoker, *arguments)
            return done.returncode, json.loads(done.stdout)

        async def says(state: str) -> bool:
            _, status = await ask("status")
            return bool(status["driver"]["state"] == state)

        await until("it to read", lambda: says("reading"))
        undying.hold()
        pid = undying.started[-1].pid
        pending = f"pending: PID {pid} in uninterruptible sleep"
        for _ in range(2):
            code, answer = await ask("release")
            assert code == ExitCode.PENDING
            assert answer["pending"].startswith(pending)
        done = await asyncio.to_thread(stoker, "agent", "release", "--socket", str(socket))
        assert (done.returncode, done.stdout.startswith(pending)) == (ExitCode.PENDING, True)
        _, status = await ask("status")
        assert status["driver"]["state"] == "blocked"
        assert status["driver"]["reason"].startswith(pending)
        assert "released by" in status["driver"]["reason"]
        assert status["driver"]["host_pid"] == pid
        assert len(undying.started) == 1

        undying.let_go()
        await until("it to be released", lambda: says("released"))
        code, answer = await ask("release")
        assert (code, answer["pending"]) == (ExitCode.OK, "")
        await ask("resume")
        await until("it to read again", lambda: says("reading"))
        assert len(undying.started) == 2


async def test_resumed_before_the_kernel_lets_go_it_reads_on_with_the_next(tmp_path: Path) -> None:
    undying = Undying()
    async with agent_of(tmp_path, undying) as socket:

        async def ask(*verb: str) -> dict[str, Any]:
            arguments = ("agent", *verb, "--socket", str(socket), "--json")
            done = await asyncio.to_thread(stoker, *arguments)
            found: dict[str, Any] = json.loads(done.stdout)
            return found

        async def says(state: str) -> bool:
            return bool((await ask("status"))["driver"]["state"] == state)

        await until("it to read", lambda: says("reading"))
        undying.hold()
        await ask("release")
        assert (await ask("resume"))["was_released"]
        assert (await ask("status"))["driver"]["state"] == "blocked"
        undying.let_go()
        await until("it to read again", lambda: says("reading"))
        assert (await ask("status"))["release"] is None
