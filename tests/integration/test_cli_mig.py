"""`stoker mig` on real daemons and simulated GPUs: plan, apply, undo, export, and who is asked."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.support.daemons import Daemon, Stage, free_nodes, plain_environment, python_module
from tests.support.daemons import stoker as run_stoker
from tests.support.waiting import until, until_true

from stoker.client import AsyncFleet, MigAsk, MigEntry, MigRefused, NotFound
from stoker.core.errors import ExitCode

pytestmark = pytest.mark.asyncio(loop_scope="module")

FILE = """
version: v1
mig-configs:
  mixed:
    - devices: [0]
      mig-enabled: true
      mig-devices: {3g.40gb: 1, 2g.20gb: 1}
  small:
    - devices: [0]
      mig-enabled: true
      mig-devices: {1g.10gb: 2}
  wide:
    - devices: [0]
      mig-enabled: true
      mig-devices: {2g.20gb: 1, 1g.10gb: 1}
  big:
    - devices: [0]
      mig-enabled: true
      mig-devices: {7g.80gb: 1}
  too-much:
    - devices: [0]
      mig-enabled: true
      mig-devices: {3g.40gb: 3}
  "off":
    - devices: [0]
      mig-enabled: false
"""
MIXED = "3g.40gb@4 2g.20gb@0"
# Ends with 7 after SIGTERM.
COMMAND = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("running", flush=True)
while True:
    signal.pause()
"""


class Site:
    """One node of two GPUs that are not partitioned, and the command line on it."""

    def __init__(self, stage: Stage, agent: Daemon, fleet: AsyncFleet) -> None:
        self.agent = agent
        self.fleet = fleet
        self.file = stage.folder / "mig.yaml"
        self.file.write_text(FILE, encoding="utf-8")
        self.socket = agent.data_dir / "agent.sock"

    async def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a `stoker` command to its end."""
        environment = {"STOKER_ADDRESS": self.fleet.address}
        return await asyncio.to_thread(run_stoker, *arguments, environment=environment)

    async def mig(self, verb: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a verb of `stoker mig` at the agent's socket."""
        return await self.run("mig", verb, "--socket", str(self.socket), *arguments)

    async def plan(self, config: str, *more: str) -> "subprocess.CompletedProcess[str]":
        return await self.mig("plan", str(self.file), "--config", config, *more)

    async def apply(self, config: str, *more: str) -> "subprocess.CompletedProcess[str]":
        return await self.mig("apply", str(self.file), "--config", config, "--yes", *more)

    async def become(self, config: str) -> None:
        """Bring the first GPU there, whatever it is."""
        done = await self.apply(config, "--evict", "--drain", "0")
        assert done.returncode == ExitCode.OK, done.stdout + done.stderr

    async def profiles(self) -> list[str]:
        """Return what the first GPU is partitioned into, by place."""
        return [each["profile"] for each in (await self.gpu())["instances"]]

    async def gpu(self, index: int = 0) -> dict[str, Any]:
        """Return what is told of a GPU."""
        done = await self.mig("status", "--json", "--gpu", str(index))
        (found,) = json.loads(done.stdout)["gpus"]
        return dict(found)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with Stage(tmp_path_factory.mktemp("mig")) as stage:
        await stage.aggregator().start()
        options = ("--interval", "0.2s", "--processes-interval", "0.5s")
        agent = stage.agent("n1", "2xH100-80GB", *options)
        await agent.start()
        async with stage.fleet() as fleet:
            await free_nodes(fleet, 1)
            yield Site(stage, agent, fleet)


def said(done: "subprocess.CompletedProcess[str]") -> str:
    return f"{done.returncode}\n{done.stdout}\n{done.stderr}"


async def test_plan_says_all_and_changes_nothing(site: Site) -> None:
    await site.become("off")
    before = await site.gpu()
    done = await site.plan("mixed")
    assert done.returncode == ExitCode.OK, said(done)
    lines = done.stdout.splitlines()
    assert "  MIG mode off -> on, at once" in lines
    assert [line.split()[:2] for line in lines if line.startswith("  +")] == [
        ["+", "2g.20gb"],
        ["+", "3g.40gb"],
    ]
    assert lines[-1] == (
        "Plan: 2 to create, 0 to destroy, 0 kept; MIG mode changes on GPU 0; nothing in the way."
    )
    assert await site.gpu() == before


async def test_apply_does_what_the_plan_says_once(site: Site) -> None:
    await site.become("off")
    done = await site.apply("mixed", "--operation-id", "first")
    assert done.returncode == ExitCode.OK, said(done)
    assert done.stdout.splitlines()[-1] == f"GPU 0: done; it has {MIXED}"
    first = await site.gpu()
    assert (first["state"], first["config"], first["operation_id"]) == ("success", "mixed", "first")
    again = await site.apply("mixed")
    assert "Plan: nothing to do; 2 kept." in again.stdout, said(again)
    assert again.returncode == ExitCode.OK
    assert (await site.gpu())["instances"] == first["instances"]
    assert (await site.gpu(1))["mode"] is False


@pytest.mark.slow
async def test_an_operation_that_is_known_is_not_begun_again(site: Site) -> None:
    await site.become("small")
    once = await site.apply("big", "--operation-id", "wish")
    await site.become("small")
    twice = await site.apply("big", "--operation-id", "wish")
    assert once.returncode == ExitCode.OK, said(once)
    assert twice.returncode == ExitCode.REFUSED, said(twice)
    assert "operation wish is known, and is not done again" in twice.stdout
    assert await site.profiles() == ["1g.10gb", "1g.10gb"]


async def test_what_the_board_cannot_be_is_refused_before_anything_is_touched(site: Site) -> None:
    await site.become("mixed")
    before = await site.gpu()
    for verb in (site.plan, site.apply):
        done = await verb("too-much")
        assert done.returncode == ExitCode.REFUSED, said(done)
        assert "cannot be done: " in done.stdout
        assert "3x 3g.40gb" in done.stdout
    assert await site.gpu() == before


async def test_export_imports_back_to_the_same_state(site: Site, tmp_path: Path) -> None:
    await site.become("mixed")
    exported = await site.mig("export")
    assert exported.returncode == ExitCode.OK, said(exported)
    file = tmp_path / "exported.yaml"
    file.write_text(exported.stdout, encoding="utf-8")
    planned = await site.mig("plan", str(file))
    assert planned.stdout.splitlines()[-1] == "Plan: nothing to do; 2 kept.", said(planned)
    await site.become("off")
    applied = await site.mig("apply", str(file), "--yes")
    assert applied.returncode == ExitCode.OK, said(applied)
    assert (await site.mig("export")).stdout == exported.stdout


@pytest.mark.slow
async def test_undo_goes_back(site: Site) -> None:
    await site.become("small")
    await site.become("mixed")
    done = await site.mig("undo", "--yes")
    assert done.returncode == ExitCode.OK, said(done)
    assert f"  from {MIXED}" in done.stdout.splitlines()
    assert await site.profiles() == ["1g.10gb", "1g.10gb"]


@pytest.mark.slow
async def test_the_aggregator_says_the_same_as_the_agent(site: Site) -> None:
    await site.become("mixed")
    file = [str(site.file), "--config", "small"]
    there = await site.run("mig", "plan", *file, "--node", "n1", "--json")
    here = await site.plan("small", "--json")
    assert json.loads(there.stdout)["plans"] == json.loads(here.stdout)["plans"] != []
    done = await site.run("mig", "apply", *file, "--node", "n1", "--yes")
    assert done.returncode == ExitCode.OK, said(done)
    assert await site.profiles() == ["1g.10gb", "1g.10gb"]


async def test_refusals_through_the_aggregator_are_the_agents(site: Site) -> None:
    entries = (MigEntry(mig_enabled=True, mig_devices={"1g.10gb": 7}),)
    with pytest.raises(MigRefused, match=r"n1: no GPU is called '9' here"):
        await site.fleet.mig("n1", MigAsk("plan", entries=entries, gpus=("9",)))
    with pytest.raises(NotFound):
        await site.fleet.mig("n2", MigAsk("status"))


async def test_who_holds_what_has_to_go_is_named_and_stays(site: Site) -> None:
    await site.become("small")
    granted = await site.fleet.request(mig="1g.10gb", holder="ann", wait="20s", node="n1")
    try:
        before = await site.gpu()
        planned = await site.plan("big")
        assert planned.returncode == ExitCode.OK, said(planned)
        assert f"in the way: allocation {granted.id} (ann" in planned.stdout
        assert "1 user in the way on GPU 0." in planned.stdout
        done = await site.apply("big", "--drain", "0")
        assert done.returncode == ExitCode.REFUSED, said(done)
        assert granted.id in done.stdout
        assert (await site.gpu())["instances"] == before["instances"]
    finally:
        await site.fleet.release(granted.id)


async def test_undo_takes_back_what_waits_for_its_users(site: Site) -> None:
    await site.become("small")
    granted = await site.fleet.request(mig="1g.10gb", wait="20s", node="n1")
    try:
        begun = await site.apply("big", "--drain", "1h", "--no-wait")
        assert begun.returncode == ExitCode.OK, said(begun)
        await until("its users to be asked", lambda: is_draining(site))
        done = await site.mig("undo", "--yes")
        assert done.returncode == ExitCode.OK, said(done)
        found = await site.gpu()
        assert (found["state"], found["is_withheld"]) == ("success", False)
        assert await site.profiles() == ["1g.10gb", "1g.10gb"]
    finally:
        await site.fleet.release(granted.id)


async def is_draining(site: Site) -> bool:
    return bool((await site.gpu())["state"] == "draining")


async def test_an_instance_in_use_stays_where_another_layout_allows_it(site: Site) -> None:
    await site.become("small")
    granted = await site.fleet.request(mig="1g.10gb", wait="20s", node="n1")
    try:
        uuid = granted.devices[0].mig_device_uuid
        done = await site.apply("wide", "--drain", "0")
        assert done.returncode == ExitCode.OK, said(done)
        found = [uuid for each in (await site.gpu())["instances"] for uuid in each["uuids"]]
        assert uuid in found
    finally:
        await site.fleet.release(granted.id)


@pytest.mark.slow
@pytest.mark.parametrize("ends_it", [True, False])
async def test_a_holder_is_asked_to_leave(site: Site, ends_it: bool, tmp_path: Path) -> None:
    await site.become("small")
    log = tmp_path / "stderr"
    option = ["--leave-on-request"] if ends_it else []
    with log.open("wb") as stderr:
        alloc = subprocess.Popen(  # noqa: ASYNC220 (it is waited for below)
            [
                *python_module("stoker.cli"),
                *("alloc", "--mig", "1g.10gb", "--wait", "20s", "--ttl", "2s", *option),
                *("--", sys.executable, "-c", COMMAND),
            ],
            env=plain_environment({"STOKER_ADDRESS": site.fleet.address}),
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    try:
        assert alloc.stdout is not None
        assert await asyncio.to_thread(alloc.stdout.readline) == b"running\n"
        applying = asyncio.create_task(site.apply("big", "--drain", "20s" if ends_it else "3s"))
        await until_true("the person to be told", lambda: b"wanted back" in log.read_bytes())
        done = await applying
        if ends_it:
            assert done.returncode == ExitCode.OK, said(done)
            assert await asyncio.to_thread(alloc.wait, 30.0) == 7
        else:
            assert done.returncode == ExitCode.REFUSED, said(done)
            assert alloc.poll() is None
    finally:
        alloc.terminate()
        await asyncio.to_thread(alloc.wait, 30.0)
        assert alloc.stdout is not None
        alloc.stdout.close()
