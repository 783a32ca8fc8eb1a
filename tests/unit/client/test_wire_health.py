"""Requirements on messages about health: they come whole, absent stays absent, new stays said."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from stoker.agent import owners
from stoker.client import (
    Assignment,
    Finding,
    FleetHealth,
    GpuCondition,
    GpuCordon,
    GpuHealth,
    GpuVerdict,
    HealthFault,
    InvalidRequest,
    Owner,
    RepairAction,
    wire,
    wire_health,
)
from stoker.v1 import fleet_pb2, types_pb2

M = TypeVar("M", bound=Message)

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
times = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**32 - 1)
verdicts = st.sampled_from(GpuVerdict)
actions = st.sampled_from([each for each in RepairAction if each is not RepairAction.UNKNOWN])
owned = st.builds(Owner, *[words] * 9)
assigned = st.builds(Assignment, words, words, words, words)
cordons = st.builds(GpuCordon, words, st.booleans(), times, st.none() | times)
faults = st.builds(HealthFault, words, words, verdicts, actions, words, times, times, counts)
judged = st.builds(
    *(GpuHealth, words, verdicts, actions, words, words, st.none() | times),
    st.lists(faults, max_size=2).map(tuple),
)
conditions = st.builds(
    *(GpuCondition, words, words, counts, words, words, st.none() | judged, st.none() | cordons),
    *(words, st.lists(words, max_size=2).map(tuple)),
)
findings = st.builds(Finding, words, words, words, words, words, times, words)
fleets = st.builds(
    *(FleetHealth, st.lists(conditions, max_size=3).map(tuple)),
    *(st.lists(findings, max_size=2).map(tuple), counts, counts, counts),
    st.integers(0, 2**64 - 1),
)


def message_of(value: Any, kind: type[M]) -> M:
    """Return the message that says what a value does, field by field under the same names."""
    sent = ParseDict(_fields(asdict(value)), kind())
    return kind.FromString(sent.SerializeToString())


def _fields(found: Any, name: str = "") -> Any:
    kind = found.__class__
    if kind is dict:
        return {key: _fields(each, key) for key, each in found.items() if each is not None}
    if kind is tuple:
        return [_fields(each) for each in found]
    if kind in (GpuVerdict, RepairAction):
        prefix = {"verdict": "GPU_VERDICT", "action": "REPAIR_ACTION"}[name]
        return f"{prefix}_{found.name}"
    return found


@given(fleets)
def test_health_of_the_fleet_comes_as_it_was_sent(fleet: FleetHealth) -> None:
    message = message_of(fleet, fleet_pb2.ListHealthResponse)
    assert wire.list_health(include_healthy=True).read(message) == fleet


@given(st.none() | judged, st.none() | cordons, st.lists(assigned, max_size=2), st.none() | owned)
def test_gpu_of_a_node_comes_as_it_was_sent(
    health: GpuHealth | None,
    cordon: GpuCordon | None,
    assignments: list[Assignment],
    owner: Owner | None,
) -> None:
    process = types_pb2.Process(pid=7)
    gpu = fleet_pb2.NodeGpu(
        assignments=[message_of(each, types_pb2.Assignment) for each in assignments]
    )
    if owner is not None:
        process.owner.CopyFrom(message_of(owner, types_pb2.Owner))
    if health is not None:
        gpu.health.CopyFrom(message_of(health, types_pb2.GpuHealth))
    if cordon is not None:
        gpu.cordon.CopyFrom(message_of(cordon, fleet_pb2.GpuCordon))
    gpu.processes.append(process)
    answer = fleet_pb2.CordonResponse(node=fleet_pb2.Node(gpus=[gpu]))
    (read,) = wire.cordon("n", "r").read(answer).gpus
    assert (read.health, read.cordon, read.assignments) == (health, cordon, tuple(assignments))
    assert read.processes[0].owner == owner


def test_what_was_not_told_is_absent() -> None:
    bare = fleet_pb2.Node(name="n", gpus=[fleet_pb2.NodeGpu(processes=[types_pb2.Process(pid=7)])])
    node = wire.uncordon("n").read(fleet_pb2.UncordonResponse(node=bare))
    (gpu,) = node.gpus
    assert (node.drain_at, gpu.health, gpu.cordon, gpu.assignments) == (None, None, None, ())
    assert gpu.processes[0].owner is None
    told = fleet_pb2.ListHealthResponse(gpus=[fleet_pb2.GpuCondition(health=types_pb2.GpuHealth())])
    (condition,) = wire.list_health(include_healthy=False).read(told).gpus
    assert condition.health is not None
    assert (condition.health.since, condition.cordon) == (None, None)


def test_words_of_a_newer_aggregator_are_unknown() -> None:
    newer = types_pb2.GpuHealth(uuid="GPU-1")
    newer.MergeFromString(b"\x10\x63\x18\x63")  # verdict = 99, action = 99
    silent = types_pb2.GpuHealth(uuid="GPU-2")
    gpus = [fleet_pb2.GpuCondition(health=each) for each in (newer, silent)]
    answer = fleet_pb2.ListHealthResponse(gpus=gpus)
    for each in wire.list_health(include_healthy=False).read(answer).gpus:
        assert each.health is not None
        assert each.health.verdict is GpuVerdict.UNKNOWN
        assert each.health.action is RepairAction.UNKNOWN


def test_every_word_of_the_protocol_is_read() -> None:
    verdict_numbers = set(types_pb2.GpuVerdict.values()) - {types_pb2.GPU_VERDICT_UNSPECIFIED}
    action_numbers = set(types_pb2.RepairAction.values()) - {types_pb2.REPAIR_ACTION_UNSPECIFIED}
    assert wire_health.VERDICTS.keys() == verdict_numbers
    assert wire_health.ACTIONS.keys() == action_numbers
    assert set(wire_health.VERDICTS.values()) == set(GpuVerdict)
    assert set(wire_health.ACTIONS.values()) == set(RepairAction) - {RepairAction.UNKNOWN}


@given(owned)
def test_owner_is_described_as_its_agent_describes_it(owner: Owner) -> None:
    assert owner.described() == owners.Owner(**asdict(owner)).described()


# --- calls


def test_all_of_a_node_is_meant_unless_a_gpu_is_named() -> None:
    for call in (wire.cordon("n", "r"), wire.uncordon("n"), wire.drain("n", "r")):
        assert (call.message.node, call.message.gpu_uuid) == ("n", "")
    for call in (
        wire.cordon("n", "r", "GPU-1"),
        wire.uncordon("n", "GPU-1"),
        wire.drain("n", "r", "GPU-1"),
    ):
        assert (call.message.node, call.message.gpu_uuid) == ("n", "GPU-1")


@pytest.mark.parametrize(
    "call",
    [
        partial(wire.cordon, "n", "r", ""),
        partial(wire.uncordon, "n", ""),
        partial(wire.drain, "n", "r", ""),
    ],
)
def test_gpu_without_a_name_is_not_all_of_the_node(call: Callable[[], object]) -> None:
    with pytest.raises(InvalidRequest, match="gpu_uuid: wanted the UUID of a GPU"):
        call()


def test_names_that_are_no_text_are_named() -> None:
    with pytest.raises(InvalidRequest, match="gpu_uuid: wanted UTF-8"):
        wire.uncordon("n", "GPU-\udcff")
    with pytest.raises(InvalidRequest, match="node: wanted UTF-8"):
        wire.drain("\udcff", "r")
    with pytest.raises(InvalidRequest, match="reason: wanted UTF-8"):
        wire.drain("n", "\udcff")
