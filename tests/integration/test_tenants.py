"""Readings of who uses the GPUs: a real driver host, a real kubelet's API, a /proc of files."""

import asyncio
import os
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.driver_hosts import Scene, running
from tests.support.proc_tree import BOOTED_AT, ProcTree
from tests.support.root_helper import open_folder
from tests.support.snapshots import VIEW
from tests.support.waiting import until

from stoker.agent import tenants
from stoker.agent.attribution.resolver import Attribution
from stoker.agent.events import Event, ProcessesTaken, ProcessReadingFailed
from stoker.agent.model import NodeView, NumberedGpu, NumberedInventory
from stoker.agent.owners import NOBODY, AssignedBy, Assignment, Owner
from stoker.agent.proctable import ProcTable
from stoker.agent.tenants import TenantReader
from stoker.core.clock import SystemClock
from stoker.testing.kubelet import Kubelet

ID = "c" * 64
TRAINER = Owner(pod_namespace="ml", pod_name="train-0", container_name="trainer")
PID = 5_000_001  # above the kernel's largest


class Stage:
    """A reader, and what it has told."""

    def __init__(self, folder: Path) -> None:
        self.scene = Scene(folder / "scene.json")
        self.proc = ProcTree(folder / "proc")
        self.socket = folder / "k.sock"
        self.attribution = Attribution(
            pod_resources=self.socket,
            proc_root=str(self.proc.root),
            cgroup_root=folder / "cgroup",
            pods_log_root=None,
            containers_log_root=None,
        )
        self.view: NodeView = replace(VIEW, release=None)
        self.events: list[Event] = []

    def happen(self, event: Event) -> None:
        self.events.append(event)

    def run_on_gpu(self, *pids: int) -> None:
        processes: list[dict[str, Any]] = [
            {"gpu": 0, "pid": pid, "name": "train", "memory": "1GiB"} for pid in pids
        ]
        self.scene.faults(processes=processes)

    @asynccontextmanager
    async def reading(
        self, attribution: Attribution | None, seconds: float = 3600.0
    ) -> AsyncGenerator[TenantReader]:
        """Give a reader that runs."""
        async with running(self.scene.source) as host:
            inventory = await host.ready()
            gpus = tuple(NumberedGpu(n, gpu) for n, gpu in enumerate(inventory.gpus))
            self.view = replace(self.view, inventory=NumberedInventory(None, None, gpus))
            reader = TenantReader(
                host,
                ProcTable(str(self.proc.root)),
                seconds,
                view=lambda: self.view,
                happen=self.happen,
                clock=SystemClock(),
                attribution=attribution,
            )
            task = asyncio.create_task(reader.run())
            try:
                yield reader
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def outcome(self) -> ProcessesTaken | ProcessReadingFailed:
        """Return what the next reading told."""

        async def look() -> ProcessesTaken | ProcessReadingFailed | None:
            for event in self.events:
                if isinstance(event, ProcessesTaken | ProcessReadingFailed):
                    return event
            return None

        return await until("a reading of processes", look)

    async def taken(self, reader: TenantReader | None = None) -> ProcessesTaken:
        """Return what the next reading told, asking for one if it is said whom."""
        if reader is not None:
            self.events.clear()
            reader.want()
        found = await self.outcome()
        assert isinstance(found, ProcessesTaken)
        return found

    @property
    def uuids(self) -> list[str]:
        assert self.view.inventory is not None
        return [gpu.identity.uuid for gpu in self.view.inventory.gpus]


@pytest.fixture
def stage() -> Generator[Stage]:
    with open_folder() as folder:
        yield Stage(folder)


async def test_a_reading_tells_whose_a_process_is_and_what_is_handed_out(stage: Stage) -> None:
    stage.run_on_gpu(PID)
    stage.proc.start(PID, cgroup=f"0::/docker/{ID}\n", environ={"STOKER_ALLOCATION_ID": "a-1"})
    async with Kubelet(stage.socket) as kubelet, stage.reading(stage.attribution) as reader:
        first = await stage.taken()
        assert (first.assignments, first.assignments_unknown) == ((), "")
        (seen,) = first.processes
        assert (seen.pid, seen.claimed_allocation_id) == (PID, "a-1")
        assert seen.owner == Owner(container_id=ID, container_runtime="docker")
        kubelet.give("ml", "train-0", "trainer", "nvidia.com/gpu", [stage.uuids[2]])
        taken = await stage.taken(reader)
        assert taken.assignments == (
            Assignment(stage.uuids[2], AssignedBy.KUBELET, TRAINER.described(), owner=TRAINER),
        )
        await kubelet.vanish()
        taken = await stage.taken(reader)
        assert taken.assignments == ()
        assert "the kubelet" in taken.assignments_unknown
        assert taken.processes == first.processes  # what is not known hides nothing else


async def test_a_pid_that_was_given_away_and_one_that_has_ended(stage: Stage) -> None:
    stage.run_on_gpu(PID, PID + 1)
    stage.proc.start(PID, cgroup="0::/a.service\n", ticks=500)
    stage.proc.start(PID + 1, cgroup="0::/b.service\n")
    async with stage.reading(stage.attribution) as reader:
        first, second = (await stage.taken()).processes
        assert (first.owner.unit, first.started_at) == ("a.service", BOOTED_AT + 5.0)
        assert second.owner.unit == "b.service"
        stage.proc.start(PID, cgroup="0::/c.service\n", ticks=900)
        stage.proc.end(PID + 1)
        first, second = (await stage.taken(reader)).processes
        assert (first.owner.unit, first.started_at) == ("c.service", BOOTED_AT + 9.0)
        # The driver still lists it: so it still uses the GPU, and nothing else is known of it.
        assert (second.owner, second.command, second.started_at) == (NOBODY, "train", None)
        stage.run_on_gpu(PID)

        async def is_gone() -> bool:
            return len((await stage.taken(reader)).processes) == 1

        await until("the end of the second", is_gone)


async def test_without_attribution_nobody_is_an_owner(stage: Stage) -> None:
    stage.run_on_gpu(PID)
    stage.proc.start(PID, cgroup="0::/a.service\n")
    async with stage.reading(None):
        taken = await stage.taken()
    assert [each.owner for each in taken.processes] == [NOBODY]
    assert (taken.assignments, taken.assignments_unknown) == ((), "")


async def test_files_that_hang_fail_a_reading_and_hold_up_nothing_else(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants, "LOOK_UP_SECONDS", 0.2)
    stage.run_on_gpu(PID)
    stage.proc.start(PID)
    pipe = stage.proc.root / str(PID) / "cgroup"
    pipe.unlink()
    os.mkfifo(pipe)  # whoever opens it waits for somebody who writes
    async with stage.reading(stage.attribution) as reader:
        failed = await stage.outcome()
        assert isinstance(failed, ProcessReadingFailed)
        assert failed.reason == "/proc has not told about the processes within 0.2 s"
        assert reader.status.succeeded is False
        pipe.write_text("0::/a.service\n")  # whoever waits for it goes on
        pipe.unlink()
        pipe.write_text("0::/a.service\n")
        monkeypatch.setattr(tenants, "LOOK_UP_SECONDS", 30.0)
        (seen,) = (await stage.taken(reader)).processes
        assert seen.owner.unit == "a.service"
