"""What an agent tells and is asked about partitions, on the wire."""

import math

import msgspec
import pytest

from stoker.agent.model import (
    Frame,
)
from stoker.agent.partitions import GpuMigStatus
from stoker.agent.wire import (
    MalformedMessage,
    MigRelay,
    frame_message,
    mig_answer_message,
    read_message,
)
from stoker.core.errors import StokerError
from stoker.core.mig.geometry import Geometry, MigProfile, MigState, Placed
from stoker.core.mig.reports import MigAsk, MigEntry, MigReport, Verb
from stoker.v1 import agent_pb2, mig_pb2


def crossed(message: agent_pb2.AgentMessage) -> agent_pb2.AgentMessage:
    return agent_pb2.AgentMessage.FromString(message.SerializeToString())


PROFILE = MigProfile("2g.20gb", 1, 14, 2, 2, (0, 2, 4), 19968, 28, 1, 1, 0, 0, 3)
PARTED = GpuMigStatus(
    "GPU-0",
    MigState.DRAINING,
    "allocation a is asked to leave",
    config="mixed",
    operation_id="op-1",
    is_withheld=True,
    leave_by=1060.5,
    is_evicting=True,
    leaving_allocation_ids=("a", "b"),
    changed_at=900.25,
    layout=(Placed(0, 2, "2g.20gb", (1, 1)), Placed(4, 4, "3g.40gb")),
    geometry=Geometry(7, 8, (PROFILE,)),
)


def test_partitions_are_told_whole() -> None:
    frame = crossed(frame_message(Frame(1, 1000.0, 5.0, mig=(PARTED, GpuMigStatus("GPU-1"))))).frame
    assert frame.HasField("mig")
    parted, plain = frame.mig.gpus
    assert (parted.gpu_uuid, parted.state) == ("GPU-0", mig_pb2.MIG_STATE_DRAINING)
    assert (parted.reason, parted.config) == ("allocation a is asked to leave", "mixed")
    assert (parted.operation_id, parted.is_withheld, parted.is_evicting) == ("op-1", True, True)
    assert (parted.leave_by, parted.changed_at) == (1060.5, 900.25)
    assert list(parted.leaving_allocation_ids) == ["a", "b"]
    places = [(each.profile, each.start, each.size) for each in parted.layout.instances]
    assert places == [("2g.20gb", 0, 2), ("3g.40gb", 4, 4)]
    assert [list(each.compute) for each in parted.layout.instances] == [[1, 1], []]
    assert (parted.geometry.compute_slices, parted.geometry.memory_slices) == (7, 8)
    (profile,) = parted.geometry.profiles
    assert (profile.name, profile.compute_slices, profile.memory_slices) == ("2g.20gb", 2, 2)
    assert (list(profile.starts), profile.count_max) == ([0, 2, 4], 3)
    assert profile.memory_bytes == 19968 * 2**20
    assert plain.state == mig_pb2.MIG_STATE_UNSPECIFIED
    for field in ("leave_by", "changed_at", "layout", "geometry"):
        assert not plain.HasField(field)


def test_of_no_gpu_with_partitions_is_told_and_of_unchanged_ones_nothing() -> None:
    assert frame_message(Frame(1, 1000.0, 5.0, mig=())).frame.HasField("mig")
    assert not frame_message(Frame(1, 1000.0, 5.0)).frame.HasField("mig")
    empty = GpuMigStatus("GPU-0", MigState.SUCCESS, layout=())
    assert frame_message(Frame(1, 1.0, 1.0, mig=(empty,))).frame.mig.gpus[0].HasField("layout")


@pytest.mark.parametrize("state", MigState)
def test_every_state_of_partitions_has_its_word(state: MigState) -> None:
    (told,) = frame_message(Frame(1, 1.0, 1.0, mig=(GpuMigStatus("GPU-0", state),))).frame.mig.gpus
    assert mig_pb2.MigState.Name(told.state) == f"MIG_STATE_{state.name}"


@pytest.mark.parametrize("verb", ["plan", "apply", "undo", "status"])
def test_what_is_asked_about_partitions(verb: Verb) -> None:
    entries = [
        mig_pb2.MigEntry(mig_enabled=True, devices=[0, 2], mig_devices={"1g.10gb": 7}),
        mig_pb2.MigEntry(device_filter=["0x233010DE"]),
    ]
    ask = mig_pb2.MigAsk(
        verb=mig_pb2.MigVerb.Value(f"MIG_VERB_{verb.upper()}"),
        operation_id="op-1",
        config="mixed",
        entries=entries,
        gpus=["GPU-0", "1"],
        drain_seconds=60.0,
        evict=True,
    )
    message = agent_pb2.AggregatorMessage(mig=mig_pb2.MigRelay(id=7, ask=ask))
    expected = MigAsk(
        verb,
        "op-1",
        "mixed",
        (
            MigEntry(mig_enabled=True, devices=(0, 2), mig_devices={"1g.10gb": 7}),
            MigEntry(mig_enabled=False, device_filter=("0x233010DE",)),
        ),
        ("GPU-0", "1"),
        60.0,
        evict=True,
    )
    assert read_message(message) == MigRelay(7, expected)


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (mig_pb2.MigAsk(), "a verb of MIG that this agent does not know: 0"),
        (mig_pb2.MigAsk(verb=mig_pb2.MIG_VERB_PLAN, drain_seconds=-1), "-1.0 seconds to leave in"),
        (mig_pb2.MigAsk(verb=mig_pb2.MIG_VERB_PLAN, drain_seconds=math.nan), "nan seconds"),
    ],
)
def test_a_question_that_means_nothing_can_still_be_answered(
    ask: mig_pb2.MigAsk, reason: str
) -> None:
    said = read_message(agent_pb2.AggregatorMessage(mig=mig_pb2.MigRelay(id=3, ask=ask)))
    assert isinstance(said, MigRelay)
    assert isinstance(said.ask, MalformedMessage)
    assert reason in str(said.ask)
    assert mig_answer_message(said.id, said.ask).mig.refusal == str(said.ask)


def test_the_answer_is_the_report_as_people_get_it() -> None:
    report = MigReport("n1", "plan", "mixed", "op-1", (), ())
    answer = crossed(mig_answer_message(7, report)).mig
    assert (answer.id, answer.refusal) == (7, "")
    assert msgspec.json.decode(answer.report_json, type=MigReport) == report
    assert mig_answer_message(8, StokerError("")).mig.refusal == "StokerError"
