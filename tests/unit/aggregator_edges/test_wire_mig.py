"""Partitions of GPUs over the wire: read whole, refused by the field that cannot be, told again."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.aggregator import limits
from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.leaving import Leave
from stoker.aggregator.limits import Malformed
from stoker.aggregator.model import Claim, Gpu, MigDevice, Node, NodeFacts, NodeStatus
from stoker.aggregator.wire import read_frame
from stoker.aggregator.wire_fleet import node_message
from stoker.aggregator.wire_mig import (
    STATES,
    check_ask,
    gpu_mig_message,
    leave_message,
    read_node_mig,
)
from stoker.core.mig.geometry import Geometry, MigProfile, MigState, Placed
from stoker.v1 import agent_pb2, mig_pb2

GIB = 1 << 30


def profile(name: str, compute: int, memory: int, starts: tuple[int, ...]) -> MigProfile:
    engines = (0, 0, 0, 0, 0)  # which are not told
    return MigProfile(name, 0, 0, compute, memory, starts, memory * 10240, *engines, len(starts))


GEOMETRY = Geometry(
    7, 8, (profile("1g.10gb", 1, 1, (0, 1, 2, 3, 4, 5, 6)), profile("3g.40gb", 3, 4, (0, 4)))
)
MIG = GpuMig(
    gpu_uuid="GPU-1",
    state=MigState.DRAINING,
    reason="1 process is in the way",
    config="all-balanced",
    operation_id="op-1",
    is_withheld=True,
    leave_by=1060.0,
    is_evicting=True,
    leaving=("a", "b"),
    changed_at=900.0,
    layout=(Placed(0, 1, "1g.10gb"), Placed(4, 4, "3g.40gb", (1, 2))),
    geometry=GEOMETRY,
)


def message(mig: GpuMig = MIG) -> mig_pb2.GpuMig:
    told = gpu_mig_message(mig)
    assert told is not None
    return told


def node(*gpus: mig_pb2.GpuMig) -> mig_pb2.NodeMig:
    return mig_pb2.NodeMig(gpus=gpus)


BARE = GpuMig("GPU-1")


# What a driver tells to those who are not root: no places.
UNPLACED = Geometry(7, 0, (replace(GEOMETRY.profiles[0], memory_slices=0, starts=(), count_max=7),))


@pytest.mark.parametrize(
    "mig",
    [
        MIG,
        BARE,
        replace(MIG, layout=(), geometry=None),
        replace(MIG, layout=None, geometry=UNPLACED),
        replace(MIG, geometry=UNPLACED),
    ],
)
def test_what_a_node_tells_is_what_clients_see(mig: GpuMig) -> None:
    assert read_node_mig(node(message(mig)), 0.0) == {"GPU-1": mig}


@pytest.mark.parametrize("state", list(STATES))
def test_every_state_can_be_told(state: MigState | None) -> None:
    assert read_node_mig(node(message(GpuMig("GPU-1", state))), 0.0)["GPU-1"].state is state


def test_nothing_told_is_nothing_shown() -> None:
    assert gpu_mig_message(None) is None
    assert leave_message(None) is None


def test_a_frame_tells_it_on_the_aggregators_clock() -> None:
    frame = agent_pb2.Frame(sequence=1, at=1000.0, mig=node(message()))
    mig = read_frame(frame, {}, sampled_at=1007.5).mig
    assert mig is not None
    assert (mig["GPU-1"].leave_by, mig["GPU-1"].changed_at) == (1067.5, 907.5)
    assert read_frame(agent_pb2.Frame(sequence=1), {}, 0.0).mig is None
    empty = agent_pb2.Frame(sequence=1, mig=node())
    assert read_frame(empty, {}, 0.0).mig == {}


def test_long_words_for_people_are_cut() -> None:
    long = replace(MIG, reason="x" * 5000, config="y" * 5000, operation_id="z" * 5000)
    read = read_node_mig(node(message(long)), 0.0)["GPU-1"]
    assert (len(read.reason), len(read.config)) == (
        limits.REASON_BYTES_MAX,
        limits.TEXT_BYTES_MAX,
    )
    assert len(read.operation_id) == limits.ID_BYTES_MAX


def test_what_a_holder_is_asked() -> None:
    told = leave_message(Leave("GPU 0 is to be partitioned anew", 1060.0, is_evicting=True))
    assert told == mig_pb2.LeaveRequest(
        reason="GPU 0 is to be partitioned anew", leave_by=1060.0, is_evicting=True
    )


Spoil = Callable[[mig_pb2.GpuMig], object]


def instance(start: int, size: int) -> mig_pb2.MigInstance:
    return mig_pb2.MigInstance(profile="1g.10gb", start=start, size=size)


BAD: dict[str, tuple[str, Spoil]] = {
    "no name": ("gpu_uuid", lambda m: m.ClearField("gpu_uuid")),
    "long name": ("gpu_uuid", lambda m: setattr(m, "gpu_uuid", "G" * 129)),
    "state of tomorrow": ("state", lambda m: setattr(m, "state", 99)),
    "no time": ("leave_by", lambda m: setattr(m, "leave_by", float("nan"))),
    "no time of change": ("changed_at", lambda m: setattr(m, "changed_at", float("inf"))),
    "instances that overlap": (
        "layout.instances[2].start",
        lambda m: m.layout.instances.append(instance(7, 1)),
    ),
    "instances out of order": (
        "layout.instances[1].start",
        lambda m: m.layout.instances.insert(0, instance(5, 1)),
    ),
    "an instance without slices": (
        "layout.instances[0].size",
        lambda m: setattr(m.layout.instances[0], "size", 0),
    ),
    "an instance beyond the board": (
        "layout.instances[1].size",
        lambda m: setattr(m.layout.instances[1], "size", 5),
    ),
    "an instance of no profile": (
        "layout.instances[0].profile",
        lambda m: m.layout.instances[0].ClearField("profile"),
    ),
    "a compute instance of nothing": (
        "layout.instances[1].compute[0]",
        lambda m: m.layout.instances[1].compute.__setitem__(0, 0),
    ),
    "a board of too much compute": (
        "geometry.compute_slices",
        lambda m: setattr(m.geometry, "compute_slices", 65),
    ),
    "a profile with places and without a size": (
        "geometry.profiles[0].memory_slices",
        lambda m: setattr(m.geometry.profiles[0], "memory_slices", 0),
    ),
    "a board of too many slices": (
        "geometry.memory_slices",
        lambda m: setattr(m.geometry, "memory_slices", 65),
    ),
    "too many profiles": (
        "geometry.profiles",
        lambda m: m.geometry.profiles.extend([m.geometry.profiles[0]] * 63),
    ),
    "a profile twice": (
        "geometry.profiles[].name",
        lambda m: m.geometry.profiles.append(m.geometry.profiles[0]),
    ),
    "a profile without a name": (
        "geometry.profiles[0].name",
        lambda m: m.geometry.profiles[0].ClearField("name"),
    ),
    "a profile larger than its board": (
        "geometry.profiles[0].memory_slices",
        lambda m: setattr(m.geometry.profiles[0], "memory_slices", 9),
    ),
    "a profile with more compute than its board": (
        "geometry.profiles[1].compute_slices",
        lambda m: setattr(m.geometry.profiles[1], "compute_slices", 8),
    ),
    "a start from which it does not fit": (
        "geometry.profiles[1].starts[2]",
        lambda m: m.geometry.profiles[1].starts.append(5),
    ),
    "a start twice": (
        "geometry.profiles[1].starts[]",
        lambda m: m.geometry.profiles[1].starts.append(4),
    ),
    "a profile without memory": (
        "geometry.profiles[0].memory_bytes",
        lambda m: m.geometry.profiles[0].ClearField("memory_bytes"),
    ),
    "too many of a profile": (
        "geometry.profiles[0].count_max",
        lambda m: setattr(m.geometry.profiles[0], "count_max", 65),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_named_by_its_field(name: str) -> None:
    field, spoil = BAD[name]
    bad = message()
    spoil(bad)
    good = message(replace(MIG, gpu_uuid="GPU-0"))
    with pytest.raises(Malformed) as refused:
        read_node_mig(node(good, bad), 0.0)
    assert refused.value.field == f"frame.mig.gpus[1].{field}"


def test_a_gpu_twice_and_too_many_gpus_are_refused() -> None:
    with pytest.raises(Malformed, match="GPU-1.*twice") as refused:
        read_node_mig(node(message(), message(BARE)), 0.0)
    assert refused.value.field == "frame.mig.gpus[].gpu_uuid"
    many = [message(GpuMig(f"GPU-{n}")) for n in range(limits.JUDGED_GPUS_MAX + 1)]
    with pytest.raises(Malformed) as refused:
        read_node_mig(node(*many), 0.0)
    assert refused.value.field == "frame.mig.gpus"


PLACES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4)


@given(PLACES)
def test_a_layout_is_read_just_where_its_places_can_be(places: list[tuple[int, int]]) -> None:
    told = message()
    del told.layout.instances[:]
    told.layout.instances.extend(instance(start, size) for start, size in places)
    taken = [slice_ for start, size in places for slice_ in range(start, start + size)]
    is_right = (
        len(set(taken)) == len(taken)
        and max(taken, default=0) < GEOMETRY.memory_slices
        and all(size > 0 for _, size in places)
        and places == sorted(places)
    )
    if not is_right:
        with pytest.raises(Malformed, match=r"^frame\.mig\.gpus\[0\]\.layout\.instances\["):
            read_node_mig(node(told), 0.0)
        return
    layout = read_node_mig(node(told), 0.0)["GPU-1"].layout
    assert [(each.start, each.size) for each in layout or ()] == places


PLAIN = Gpu("GPU-1", "NVIDIA H100 80GB HBM3", 0, 80 * GIB)
NODE = Node(NodeFacts("n1", "i", "b", "1", simulated=True, gpus=(PLAIN,)), 1.0, 1)


def test_mig_devices_are_told_with_who_holds_each() -> None:
    devices = tuple(MigDevice(f"MIG-{n}", "1g.10gb", 10 * GIB, n, 0) for n in (1, 2))
    cut = replace(PLAIN, mig_enabled=True, mig_devices=devices)
    node = replace(NODE, facts=replace(NODE.facts, gpus=(cut,)))
    claims = tuple(Claim("a", 10 * GIB, 0, each.uuid) for each in devices)
    (told,) = node_message(node, NodeStatus(), {"GPU-1": claims[:1]}, None, 1.0).gpus
    assert told.mig_enabled
    assert [(each.uuid, each.profile, each.allocation_id) for each in told.mig_devices] == [
        ("MIG-1", "1g.10gb", "a"),
        ("MIG-2", "1g.10gb", ""),
    ]
    (both,) = node_message(node, NodeStatus(), {"GPU-1": claims}, None, 1.0).gpus
    assert list(both.allocation_ids) == ["a"], "who holds two of them is one holder"
    (whole,) = node_message(NODE, NodeStatus(), {}, None, 1.0).gpus
    assert not whole.HasField("mig_enabled")
    assert not whole.HasField("mig")


# --- what is asked


def ask(verb: str = "APPLY", **fields: Any) -> mig_pb2.MigAsk:
    """A right wish but for `fields`."""
    half = mig_pb2.MigEntry(mig_enabled=True, mig_devices={"3g.40gb": 2})
    right: dict[str, Any] = {"operation_id": "op-1", "config": "half", "entries": [half]}
    return mig_pb2.MigAsk(verb=mig_pb2.MigVerb.Value(f"MIG_VERB_{verb}"), **(right | fields))


@pytest.mark.parametrize(
    "right",
    [
        ask(),
        ask("PLAN", operation_id=""),
        ask("UNDO", entries=[]),
        ask("STATUS", operation_id="", entries=[]),
        ask(entries=[mig_pb2.MigEntry(mig_enabled=False, devices=[0, 1])], gpus=["0", "GPU-1"]),
        ask(drain_seconds=600.0, evict=True),
    ],
    ids=lambda each: str(each.verb),
)
def test_what_can_be_asked(right: mig_pb2.MigAsk) -> None:
    check_ask(right)


def entry(**fields: Any) -> dict[str, Any]:
    enabled: dict[str, Any] = {"mig_enabled": True}
    return {"entries": [mig_pb2.MigEntry(**(enabled | fields))]}


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("ask.verb", ask("UNSPECIFIED")),
        ("ask.operation_id", ask(operation_id="")),
        ("ask.operation_id", ask("UNDO", operation_id="", entries=[])),
        ("ask.operation_id", ask(operation_id="o" * 129)),
        ("ask.config", ask(config="c" * 257)),
        ("ask.entries", ask(entries=[])),
        ("ask.entries", ask("PLAN", entries=[])),
        ("ask.entries", ask("UNDO")),
        ("ask.entries", ask("STATUS")),
        ("ask.gpus[1]", ask(gpus=["0", ""])),
        ("ask.drain_seconds", ask(drain_seconds=-1.0)),
        ("ask.drain_seconds", ask(drain_seconds=float("nan"))),
        ("ask.drain_seconds", ask(drain_seconds=limits.DRAIN_SECONDS_MAX + 1)),
        ("ask.entries", ask(entries=[mig_pb2.MigEntry()] * (limits.MIG_ENTRIES_MAX + 1))),
        ("ask.entries[0].device_filter[0]", ask(**entry(device_filter=[""]))),
        ("ask.entries[0].mig_devices", ask(**entry(mig_enabled=False, mig_devices={"1g.5gb": 1}))),
        ("ask.entries[0].mig_devices key", ask(**entry(mig_devices={"": 1}))),
        ("ask.entries[0].mig_devices['1g.5gb']", ask(**entry(mig_devices={"1g.5gb": 65}))),
    ],
)
def test_what_cannot_be_asked_is_named_by_its_field(field: str, wrong: mig_pb2.MigAsk) -> None:
    with pytest.raises(Malformed) as refused:
        check_ask(wrong)
    assert refused.value.field == field
