"""Who may ask the agent for what: everybody may look, root and the agent's own user may act."""

import asyncio
import os
from dataclasses import replace

import pytest
from tests.support.node import Node, inventory, reading

from stoker.agent.desk import LocalDesk
from stoker.agent.driver import DriverError
from stoker.agent.driver_host.frames import SimulatedDriver
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.events import Event, InventoryRead, SampleTaken
from stoker.agent.local import Caller
from stoker.agent.owners import DeviceHolder, Owner
from stoker.agent.privileged import HelperUnavailable
from stoker.agent.readings import XidSeen
from stoker.agent.sampler import Sampler
from stoker.agent.verdicts import Verdict
from stoker.core.errors import ExitCode
from stoker.core.local import (
    AskMig,
    AskProfilingPause,
    AskProfilingResume,
    AskRelease,
    AskResume,
    AskSetHealthy,
    AskStatus,
    HolderFacts,
    Mig,
    Refusal,
    Released,
    Request,
    SetHealthy,
    Status,
)
from stoker.core.mig.reports import MigAsk, MigReport, Verb
from stoker.testing.clock import VirtualClock

AGENT_UID, SOMEBODY_UID = 998, 1000
ACTS: dict[str, Request] = {
    "release": AskRelease(),
    "resume": AskResume(),
    "profiling pause": AskProfilingPause(),
    "profiling resume": AskProfilingResume(),
    "set-healthy": AskSetHealthy("0"),
    "mig apply": AskMig(MigAsk("apply")),
    "mig undo": AskMig(MigAsk("undo")),
}
HOLDER = DeviceHolder(4711, "ann", "python train.py", ("/dev/nvidia0",), Owner(slurm_job="12"))
OURS = DeviceHolder(os.getpid(), "stoker", "stoker-agent", ("/dev/nvidia0",))


def tell(**_state: str) -> None:
    """No service manager listens."""


@pytest.fixture
def node() -> Node:
    return Node().ready()


@pytest.fixture
async def desk(node: Node, monkeypatch: pytest.MonkeyPatch) -> LocalDesk:
    """The desk of an agent that is run by the user `stoker`."""
    monkeypatch.setattr(os, "geteuid", lambda: AGENT_UID)
    host, clock = DriverHost(SimulatedDriver(("1xT4",), "n")), VirtualClock(node.now)

    def happen(event: Event) -> None:
        node.happen(event)

    async def let_go() -> DriverError | None:
        return None

    async def saved() -> None:
        return None

    async def holders() -> tuple[DeviceHolder, ...]:
        return (OURS, HOLDER)

    async def ask_mig(ask: MigAsk) -> MigReport:
        return MigReport("n", ask.verb, ask.config, ask.operation_id, (), ())

    sampler = Sampler(
        host,
        interval_seconds=1.0,
        slow_interval_seconds=10.0,
        view=lambda: node.view,
        happen=happen,
        tell=tell,
        clock=clock,
    )
    return LocalDesk(
        host,
        sampler,
        aggregators=["127.0.0.1:7070"],
        user="stoker",
        view=lambda: node.view,
        happen=happen,
        let_go=let_go,
        saved=saved,
        holders=holders,
        ask_mig=ask_mig,
        clock=clock,
    )


@pytest.mark.parametrize("verb", ACTS)
async def test_somebody_else_is_refused_and_told_who_may(
    verb: str, desk: LocalDesk, node: Node
) -> None:
    answer = await desk.answer(ACTS[verb], Caller(42, SOMEBODY_UID))
    assert answer == Refusal(
        f"{verb} is for root (uid 0) and stoker (uid 998); this is uid {SOMEBODY_UID}"
    )
    assert node.view.release is None


async def test_everybody_may_look(desk: LocalDesk) -> None:
    assert isinstance(await desk.answer(AskStatus(), Caller(42, SOMEBODY_UID)), Status)


@pytest.mark.parametrize(
    ("verb", "uid"),
    [("plan", SOMEBODY_UID), ("status", SOMEBODY_UID), ("apply", AGENT_UID), ("undo", 0)],
)
async def test_what_changes_no_partition_is_for_everybody(
    verb: Verb, uid: int, desk: LocalDesk
) -> None:
    answer = await desk.answer(AskMig(MigAsk(verb, "op", "mixed")), Caller(42, uid))
    assert answer == Mig(MigReport("n", verb, "mixed", "op", (), ()))


@pytest.mark.parametrize(("uid", "name"), [(0, "root"), (AGENT_UID, "stoker")])
async def test_a_release_is_in_the_name_of_who_asked(
    uid: int, name: str, desk: LocalDesk, node: Node
) -> None:
    answer = await desk.answer(AskRelease(600.0), Caller(42, uid))
    assert isinstance(answer, Released)
    assert answer.release.by == name
    assert node.view.release is not None
    assert (node.view.release.by, node.view.release.until) == (name, node.now + 600.0)


async def test_a_full_disk_is_said(desk: LocalDesk, node: Node) -> None:
    node.disk_works = False
    answer = await desk.answer(AskRelease(), Caller(42, 0))
    assert isinstance(answer, Released)
    assert answer.unsaved == "no room"
    status = await desk.answer(AskStatus(), Caller(42, 0))
    assert isinstance(status, Status)
    assert status.release_unsaved == "no room"


async def test_a_release_names_who_else_has_the_files_open(desk: LocalDesk) -> None:
    answer = await desk.answer(AskRelease(), Caller(42, 0))
    assert isinstance(answer, Released)
    assert answer.users.holders == (
        HolderFacts(4711, "ann", "python train.py", ("/dev/nvidia0",), "Slurm job 12"),
    )


async def test_what_only_the_helper_could_tell_is_named(
    desk: LocalDesk, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def holders() -> tuple[DeviceHolder, ...]:
        raise HelperUnavailable("who has the files open cannot be seen: nobody listens")

    monkeypatch.setattr(desk, "_holders", holders)
    real = replace(node.view, identity=replace(node.view.identity, simulated=False))
    monkeypatch.setattr(desk, "_view", lambda: real)
    status = await desk.answer(AskStatus(), Caller(42, SOMEBODY_UID))
    assert isinstance(status, Status)
    assert "who has the files open cannot be seen: nobody listens" in status.blind
    assert "the kernel's log: it was not looked for yet" in status.blind


async def test_a_gpu_is_said_to_be_well(desk: LocalDesk, node: Node) -> None:
    xid = XidSeen(node.now, 79)
    node.happen(SampleTaken(node.now, (replace(reading(0, node.now), xids=(xid,)),)))
    assert [each.verdict for each in node.view.health] == [Verdict.UNHEALTHY, Verdict.HEALTHY]
    status = await desk.answer(AskStatus(), Caller(42, SOMEBODY_UID))
    assert isinstance(status, Status)
    assert (status.gpus[0].verdict, status.gpus[0].action) == ("unhealthy", "reboot")
    answer = await desk.answer(AskSetHealthy("GPU-0"), Caller(42, 0))
    assert isinstance(answer, SetHealthy)
    assert answer.forgotten == status.gpus[0].faults
    assert [each.verdict for each in node.view.health] == [Verdict.HEALTHY, Verdict.HEALTHY]
    again = await desk.answer(AskSetHealthy("0"), Caller(42, 0))
    assert isinstance(again, SetHealthy)
    assert again.forgotten == ()


async def test_while_the_disk_does_not_answer_nothing_is_said_to_be_noted_down(
    desk: LocalDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.agent.desk.SAVE_SECONDS_MAX", 0.01)
    monkeypatch.setattr(desk, "_saved", asyncio.Event().wait)
    answer = await desk.answer(AskSetHealthy("GPU-0"), Caller(42, 0))
    assert isinstance(answer, SetHealthy)
    assert answer.unsaved == "it is being noted down"


async def test_a_gpu_that_is_not_here_is_named(desk: LocalDesk, node: Node) -> None:
    node.happen(InventoryRead(node.now, inventory(0)))
    answer = await desk.answer(AskSetHealthy("7"), Caller(42, 0))
    assert answer == Refusal(
        "no GPU is called '7' here; there are 0 (GPU-0), 1 (GPU-1)", int(ExitCode.NOT_FOUND)
    )
