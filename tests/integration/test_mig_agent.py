"""An agent that partitions its (simulated) GPUs: what it plans, does, undoes, and refuses."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path

import msgspec
import pytest
from tests.support.mig_agent import MigAgent
from tests.support.recorder import Recorder, Stream
from tests.support.waiting import until, until_true

from stoker.core.errors import ExitCode
from stoker.core.local import AskRelease, AskResume, Refused, Released, Resumed, ask
from stoker.core.mig.reports import MigReport
from stoker.v1 import mig_pb2

HALVES = {"4g.40gb": 1, "3g.40gb": 1}
HALVES_CARD = [("4g.40gb", 0, True), ("3g.40gb", 4, True)]
WHOLE_CARD = [("7g.80gb", 0, True)]
# A process on the 3g.40gb of that card, and one on whatever is at the card's first slice.
AT_4 = {"gpu": 0, "pid": 5000001, "name": "train", "memory": "4GiB", "mig_start": 4}
AT_0 = {"gpu": 0, "pid": 5000002, "name": "serve", "memory": "4GiB", "mig_start": 0}

MakeAgent = Callable[..., MigAgent]


@pytest.fixture
async def recorder() -> AsyncIterator[Recorder]:
    async with Recorder() as recorder:
        yield recorder


@pytest.fixture
def make_agent(tmp_path: Path, recorder: Recorder) -> Iterator[MakeAgent]:
    agents: list[MigAgent] = []

    def make(simulate: str = "1xH100-80GB", *options: str) -> MigAgent:
        agents.append(MigAgent(tmp_path, simulate, recorder.address, *options))
        return agents[-1]

    yield make
    for agent in agents:
        agent.daemon.end()
        assert "Traceback" not in agent.daemon.log


def configured(tmp_path: Path, **mig: object) -> tuple[str, str]:
    """The option that names a configuration with this in its section `mig`."""
    path = tmp_path / "agent.yaml"
    path.write_text(json.dumps({"mig": mig}))
    return ("--config", str(path))


def devices(stream: Stream) -> dict[str, str]:
    """The MIG devices of the first GPU, as the node told them last: UUIDs and profiles."""
    told = [stream.hello.inventory]
    told += [frame.inventory for frame in stream.frames if frame.HasField("inventory")]
    return {each.uuid: each.profile for each in told[-1].gpus[0].mig_devices}


@contextlib.contextmanager
def process_on(device: str) -> Generator[subprocess.Popen[bytes]]:
    """A process of this machine that uses a simulated MIG device, and of no allocation."""
    environment = {"STOKER_SIMULATED_WORKLOAD": "memory=1GiB", "CUDA_VISIBLE_DEVICES": device}
    with subprocess.Popen(["sleep", "600"], env={**os.environ, **environment}) as process:
        try:
            yield process
        finally:
            process.kill()


async def free(stream: Stream) -> mig_pb2.GpuMig:
    """The only GPU, once the node has told that it takes something again."""

    async def look() -> mig_pb2.GpuMig | None:
        gpus = list(stream.mig.values())
        return gpus[0] if gpus and not gpus[0].is_withheld else None

    return await until("the GPU not to be withheld", look)


async def test_plan_apply_again_and_undo(make_agent: MakeAgent, recorder: Recorder) -> None:
    agent = make_agent()
    await agent.daemon.start()
    before = await agent.gpu()
    assert (before.mode, before.instances, before.state, before.undo) == (False, (), "", "")

    (plan,) = (await agent.ask("plan", HALVES)).plans
    assert (plan.mode, plan.mode_wanted, plan.mode_change) == (False, True, "at_once")
    assert [(each.action, each.profile, each.start) for each in plan.changes] == [
        ("create", profile, start) for profile, start, _ in HALVES_CARD
    ]
    assert plan.steps[0] == "turn MIG mode on"
    assert (plan.refusal, plan.in_the_way) == ("", ())
    assert agent.card() == []

    after = await agent.applied(HALVES, "op-1")
    assert (after.state, after.reason, after.mode) == ("success", "", True)
    assert agent.card() == HALVES_CARD
    stream = await recorder.stream()
    told = await free(stream)
    assert told.state == mig_pb2.MIG_STATE_SUCCESS
    places = [(each.profile, each.start) for each in told.layout.instances]
    assert places == [(profile, start) for profile, start, _ in HALVES_CARD]
    assert sorted(devices(stream).values()) == ["3g.40gb", "4g.40gb"]
    while_at_it = [
        gpu
        for frame in stream.frames
        if frame.HasField("mig")
        for gpu in frame.mig.gpus
        if gpu.state == mig_pb2.MIG_STATE_APPLYING
    ]
    assert while_at_it
    assert all(gpu.is_withheld for gpu in while_at_it)

    # Twice is once: the same wish, and the same layout wished for anew.
    for operation in ("op-1", "op-2"):
        again = await agent.applied(HALVES, operation)
        assert (again.state, again.changed_at) == ("success", after.changed_at)
        assert again.instances == after.instances

    undone = await agent.ask("undo", operation="op-3")
    assert [each.mode_wanted for each in undone.plans] == [False]
    back = await agent.ended("op-3")
    assert (back.state, back.mode, back.instances) == ("success", False, ())
    assert agent.card() == []


@pytest.mark.slow
async def test_everything_is_to_be_had_through_the_aggregator_too(
    make_agent: MakeAgent, recorder: Recorder
) -> None:
    agent = make_agent()
    await agent.daemon.start()
    await agent.gpu()
    stream = await recorder.stream()
    entries = [mig_pb2.MigEntry(mig_enabled=True, mig_devices={"7g.80gb": 1})]
    ask = mig_pb2.MigAsk(verb=mig_pb2.MIG_VERB_APPLY, operation_id="op", entries=entries)
    for _ in range(2):
        answer = await stream.ask_mig(ask)
        assert answer.refusal == ""
        report = msgspec.json.decode(answer.report_json, type=MigReport)
        assert (report.node, report.verb, report.operation_id) == ("node-a", "apply", "op")
    assert (await agent.ended("op")).state == "success"
    status = await stream.ask_mig(mig_pb2.MigAsk(verb=mig_pb2.MIG_VERB_STATUS))
    report = msgspec.json.decode(status.report_json, type=MigReport)
    assert [each.profile for each in report.gpus[0].instances] == ["7g.80gb"]
    refused = await stream.ask_mig(mig_pb2.MigAsk(verb=mig_pb2.MIG_VERB_PLAN, gpus=["9"]))
    assert "no GPU is called '9' here" in refused.refusal
    nonsense = await stream.ask_mig(mig_pb2.MigAsk())
    assert "a verb of MIG that this agent does not know" in nonsense.refusal


async def test_what_is_not_legal_is_refused_before_anything_is_touched(
    make_agent: MakeAgent,
) -> None:
    agent = make_agent()
    await agent.daemon.start()
    await agent.gpu()
    for wanted in ({"4g.40gb": 2}, {"9g.90gb": 1}):
        (plan,) = (await agent.ask("plan", wanted)).plans
        assert plan.refusal
        with pytest.raises(Refused) as refused:
            await agent.ask("apply", wanted, operation="op")
        assert refused.value.exit_code is ExitCode.REFUSED
        assert next(iter(wanted)) in str(refused.value)
    assert agent.card() == []


@pytest.mark.slow
async def test_declared_is_in_place_before_anything_is_granted_and_anew_after_a_loss(
    make_agent: MakeAgent, recorder: Recorder, tmp_path: Path
) -> None:
    agent = make_agent("1xH100-80GB", *configured(tmp_path, gpus={"0": "4g.40gb, 3g.40gb"}))
    await agent.daemon.start()
    stream = await recorder.stream()
    (uuid,) = [gpu.uuid for gpu in stream.hello.inventory.gpus]
    stream.hold("early", uuid)
    refused = await stream.frame_with("refusals")
    assert refused.refusals[0].allocation_id == "early"

    async def in_place() -> bool:
        gpu = await agent.gpu()
        return gpu.state == "success" and not gpu.is_withheld

    await until("what is declared", in_place)
    first = await agent.gpu()
    assert agent.card() == HALVES_CARD
    await free(stream)
    assert len(devices(stream)) == 2
    stream.hold("one", uuid, mig_devices=[next(iter(devices(stream)))])
    await stream.holds("one")

    # The driver of a Hopper card forgets all of it when it is unloaded.
    stream.drop("one")
    await stream.holds()
    agent.play({"driver_loaded": False})
    await until_true("the driver to be gone", lambda: "driver: failed" in agent.daemon.log)
    agent.play({})

    async def in_place_again() -> bool:
        gpu = await agent.gpu()
        return await in_place() and gpu.operation_id != first.operation_id

    await until("what is declared, again", in_place_again)
    assert agent.card() == HALVES_CARD


@pytest.mark.slow
async def test_while_somebody_is_in_the_way_of_what_is_declared_the_gpu_is_withheld(
    make_agent: MakeAgent, recorder: Recorder, tmp_path: Path
) -> None:
    agent = make_agent()
    await agent.daemon.start()
    await agent.gpu()
    assert (await agent.applied({"7g.80gb": 1}, "op-1")).state == "success"
    await agent.daemon.stop()
    agent.play({"processes": [AT_0]})
    agent = make_agent("1xH100-80GB", *configured(tmp_path, gpus={"all": "3g.40gb, 4g.40gb"}))
    await agent.daemon.start()

    async def pending() -> bool:
        gpu = await agent.gpu()
        return gpu.state == "pending" and "5000002" in gpu.reason

    await until("it to wait for the process", pending)
    assert agent.card() == WHOLE_CARD
    stream = await recorder.stream(2)
    (uuid,) = [gpu.uuid for gpu in stream.hello.inventory.gpus]
    stream.hold("new", uuid, mig_devices=list(devices(stream)))
    reason = (await stream.frame_with("refusals")).refusals[0].reason
    assert "takes nothing new while its partitions (MIG) are pending" in reason
    assert "5000002" in reason
    agent.play({})
    await until_true("it to go on", lambda: len(agent.card()) == 2)


async def test_who_is_in_the_way_is_named_and_what_is_busy_stays(make_agent: MakeAgent) -> None:
    agent = make_agent()
    await agent.daemon.start()
    await agent.gpu()
    await agent.applied(HALVES, "op-1")
    agent.play({"processes": [AT_4]})

    async def busy() -> bool:
        (plan,) = (await agent.ask("plan", {"7g.80gb": 1})).plans
        return bool(plan.in_the_way)

    await until("the process to be seen", busy)
    (plan,) = (await agent.ask("plan", {"7g.80gb": 1})).plans
    assert [each.pid for each in plan.in_the_way] == [5000001]
    failed = await agent.applied({"7g.80gb": 1}, "op-2")
    assert failed.state == "failed"
    assert "process 5000001" in failed.reason
    assert agent.card() == HALVES_CARD
    # What is idle is cut anew around it.
    done = await agent.applied({"3g.40gb": 2}, "op-3")
    assert done.state == "success"
    assert agent.card() == [("3g.40gb", 0, True), ("3g.40gb", 4, True)]
    assert done.instances[1].uuids == failed.instances[1].uuids


@pytest.mark.slow
async def test_allocations_are_asked_to_leave_and_it_goes_on_when_they_have(
    make_agent: MakeAgent, recorder: Recorder
) -> None:
    agent = make_agent()
    await agent.daemon.start()
    uuid = (await agent.gpu()).uuid
    await agent.applied({"7g.80gb": 1}, "op-1")
    stream = await recorder.stream()
    await free(stream)
    stream.hold("a", uuid, mig_devices=list(devices(stream)))
    await stream.holds("a")
    await agent.ask("apply", HALVES, operation="op-2", drain=600.0)
    await until_true("it to be asked to leave", lambda: stream.mig[uuid].HasField("leave_by"))
    told = stream.mig[uuid]
    assert (told.state, told.is_withheld) == (mig_pb2.MIG_STATE_DRAINING, True)
    assert "allocation a" in told.reason
    assert list(told.leaving_allocation_ids) == ["a"]
    assert agent.card() == WHOLE_CARD
    stream.drop("a")
    assert (await agent.ended("op-2")).state == "success"
    assert agent.card() == HALVES_CARD
    assert not stream.mig[uuid].HasField("leave_by")


@pytest.mark.slow
async def test_who_does_not_leave_in_time_stays_and_so_does_the_layout(
    make_agent: MakeAgent, recorder: Recorder
) -> None:
    agent = make_agent()
    await agent.daemon.start()
    await agent.gpu()
    await agent.applied({"7g.80gb": 1}, "op-1")
    stream = await recorder.stream()
    await free(stream)
    stream.hold("a", (await agent.gpu()).uuid, mig_devices=list(devices(stream)))
    await stream.holds("a")
    failed = await agent.applied(HALVES, "op-2", drain=1.0)
    assert failed.state == "failed"
    assert "was not left in time" in failed.reason
    assert "allocation a" in failed.reason
    assert not failed.is_withheld
    assert agent.card() == WHOLE_CARD
    assert stream.held == {"a"}


@pytest.mark.slow
async def test_only_who_says_evict_ends_the_processes_of_others(make_agent: MakeAgent) -> None:
    agent = make_agent()
    await agent.daemon.start()
    await agent.gpu()
    (device,) = (await agent.applied({"7g.80gb": 1}, "op-1")).instances[0].uuids
    with process_on(device) as stranger:

        async def seen() -> bool:
            (plan,) = (await agent.ask("plan", HALVES)).plans
            return [each.pid for each in plan.in_the_way] == [stranger.pid]

        await until("the process to be seen", seen)
        failed = await agent.applied(HALVES, "op-2", drain=0.5)
        assert failed.state == "failed"
        assert str(stranger.pid) in failed.reason
        assert stranger.poll() is None
        done = await agent.applied(HALVES, "op-3", evict=True)
        assert (done.state, done.reason) == ("success", "")
        assert stranger.wait(10.0) == -signal.SIGTERM
    assert agent.card() == HALVES_CARD


@pytest.mark.slow
async def test_on_ampere_a_change_of_mode_waits_for_a_reset(make_agent: MakeAgent) -> None:
    agent = make_agent("1xA100-80GB")
    agent.play({"pass_through": True})
    await agent.daemon.start()
    assert (await agent.gpu()).mode is False
    (plan,) = (await agent.ask("plan", HALVES)).plans
    assert plan.mode_change == "reset"
    waiting = await agent.applied(HALVES, "op-1")
    assert (waiting.state, waiting.mode, waiting.mode_pending) == ("reboot-required", False, True)
    assert waiting.is_withheld
    assert "reset" in waiting.reason
    # A restart of the agent changes nothing about that.
    agent.daemon.kill()
    await agent.daemon.start()
    assert (await agent.ended("op-1")).state == "reboot-required"
    agent.play({"pass_through": True, "resets": [{"gpu": 0}]})

    async def done() -> bool:
        return (await agent.gpu()).state == "success"

    await until("it to go on after the reset", done)
    assert agent.card() == HALVES_CARD


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        "nvmlDeviceSetMigMode",
        "nvmlDeviceCreateGpuInstanceWithPlacement",
        "nvmlGpuInstanceCreateComputeInstance",
    ],
)
async def test_a_step_that_is_not_permitted_leads_back_and_says_what_to_do(
    function: str, make_agent: MakeAgent
) -> None:
    agent = make_agent()
    await agent.daemon.start()
    await agent.gpu()
    if function != "nvmlDeviceSetMigMode":
        await agent.applied({"1g.10gb": 1}, "op-1")
    before = agent.card()
    agent.play({"faults": [{"fault": "fail", "function": function, "error": "NO_PERMISSION"}]})
    failed = await agent.applied({"1g.10gb": 1, "3g.40gb": 1}, "op-2")
    assert failed.state == "failed"
    assert "run as root" in failed.reason
    assert "stoker-agent-helper" in failed.reason
    assert agent.card() == before


async def test_a_release_of_the_driver_is_respected(make_agent: MakeAgent) -> None:
    agent = make_agent()
    await agent.daemon.start()
    await agent.gpu()
    ask([agent.socket], AskRelease(), Released)
    with pytest.raises(Refused, match="stoker agent resume"):
        await agent.ask("apply", HALVES, operation="op-1")
    ask([agent.socket], AskResume(), Resumed)
    assert (await agent.applied(HALVES, "op-1")).state == "success"


async def test_a_configuration_that_means_nothing_ends_the_agent(
    make_agent: MakeAgent, tmp_path: Path
) -> None:
    agent = make_agent("1xH100-80GB", *configured(tmp_path, gpus={"0": "half"}))
    agent.daemon.spawn()
    assert await agent.daemon.ended() == ExitCode.USAGE
    assert "mig.gpus: 0: wanted off, empty, or devices" in agent.daemon.log


async def test_a_book_of_a_newer_agent_ends_the_agent(make_agent: MakeAgent) -> None:
    agent = make_agent()
    agent.daemon.data_dir.mkdir()
    (agent.daemon.data_dir / "mig.json").write_text('{"version": 99}')
    agent.daemon.spawn()
    assert await agent.daemon.ended() == ExitCode.STORE
    assert "a newer one wrote it" in agent.daemon.log
