"""`stoker agent release` while the kernel holds the driver host: it is pending, and says so."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.assembled import assembled
from tests.support.daemons import stoker
from tests.support.driver_hosts import HASTY
from tests.support.ports import free_port
from tests.support.waiting import until, until_true

from stoker.agent.config import AgentConfig, settle
from stoker.agent.daemon import Agent
from stoker.agent.driver_host.frames import SimulatedDriver
from stoker.agent.events import ReleaseAsked, ResumeAsked
from stoker.core.errors import ExitCode
from stoker.testing.undying import Undying

INTERVAL = 0.1


@contextlib.asynccontextmanager
async def agent_of(folder: Path, undying: Undying) -> AsyncGenerator[tuple[Agent, Path]]:
    """An agent in this process, whose driver hosts may be held by the kernel; where it answers."""
    written = AgentConfig(
        node="node-a",
        aggregator=(f"127.0.0.1:{free_port()}",),
        interval_seconds=INTERVAL,
        data_dir=folder,
    )
    settings = settle(written, {}, hostname="node-a")
    source = SimulatedDriver(("2xT4",), "node-a")
    with assembled(settings, source, replace(HASTY, kill_seconds=0.1), undying) as agent:
        running = asyncio.create_task(agent.run())
        try:
            yield agent, settings.socket
        finally:
            undying.let_go()
            agent.stop()
            await running


async def test_a_release_that_is_taken_back_at_once_leaves_the_driver_alone(
    tmp_path: Path,
) -> None:
    """Both are told before the first of them has begun to be carried out."""
    undying = Undying()
    async with agent_of(tmp_path, undying) as (agent, _):

        def samples() -> int:
            return agent.snapshot().view.samples_total

        await until_true("it to read", lambda: samples() > 0)
        agent.happen(ReleaseAsked(0.0, None, "ann"))
        agent.happen(ResumeAsked(0.0, "ann"))
        before = samples()
        await until_true("it to read on", lambda: samples() > before + 3)
        assert len(undying.started) == 1


async def test_release_is_pending_while_the_kernel_holds_the_driver_host(tmp_path: Path) -> None:
    undying = Undying()
    async with agent_of(tmp_path, undying) as (_, socket):

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
    async with agent_of(tmp_path, undying) as (_, socket):

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
