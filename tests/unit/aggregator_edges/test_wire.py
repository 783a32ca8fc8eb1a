"""Messages to values and back: what is absent stays absent, what cannot be is named."""

import pytest

from stoker.aggregator import limits
from stoker.aggregator.inventories import with_inventory
from stoker.aggregator.limits import Malformed
from stoker.aggregator.malformed import find_fault
from stoker.aggregator.model import (
    Allocation,
    AllocationState,
    Claim,
    Command,
    Device,
    DriverState,
    Gpu,
    GpuSample,
    HeldAllocation,
    MissingGpu,
    Node,
    NodeFacts,
    NodeStatus,
    Placement,
    Request,
)
from stoker.aggregator.processes import Process, ProcessTable
from stoker.aggregator.sessions import OFFSET_WINDOW_SECONDS, ClockOffset
from stoker.aggregator.wire import (
    command_message,
    read_frame,
    read_hello,
    read_inventory,
)
from stoker.aggregator.wire_allocations import allocation_message, environment
from stoker.aggregator.wire_fleet import node_message, node_state
from stoker.aggregator.wire_requests import read_request, request_message
from stoker.v1 import agent_pb2, fleet_pb2, types_pb2

UUIDS = {1: "GPU-1", 2: "GPU-2"}
GIB = 1 << 30


# --- samples


def read_sample(**fields: object) -> GpuSample:
    frame = agent_pb2.Frame(sequence=1)
    frame.samples.add(number=1, **fields)
    samples = read_frame(frame, UUIDS, sampled_at=100.0).samples
    assert samples is not None
    return samples["GPU-1"]


def test_what_was_not_read_is_none_and_zero_is_zero() -> None:
    assert read_sample() == GpuSample(at=100.0)
    assert not read_sample().is_read
    zeros = {
        "memory_used_bytes": 0,
        "memory_reserved_bytes": 0,
        "utilization_ratio": 0.0,
        "memory_utilization_ratio": 0.0,
        "temperature_celsius": 0.0,
        "power_watts": 0.0,
        "energy_joules": 0.0,
        "sm_clock_hertz": 0,
        "memory_clock_hertz": 0,
    }
    assert read_sample(**zeros) == GpuSample(at=100.0, **zeros)  # type: ignore[arg-type]
    ones = {name: type(value)(1) for name, value in zeros.items()}
    assert read_sample(**ones) == GpuSample(at=100.0, **ones)  # type: ignore[arg-type]


def test_sample_is_as_old_as_its_frame_and_its_own_age() -> None:
    assert read_sample(age_seconds=0.5, power_watts=1.0).at == 99.5


def test_frame_without_samples_says_nothing_of_them() -> None:
    assert read_frame(agent_pb2.Frame(sequence=1), UUIDS, 0.0).samples is None


def test_sample_of_a_gpu_that_left_the_inventory_is_left_out() -> None:
    frame = agent_pb2.Frame(sequence=1)
    frame.samples.add(number=1, power_watts=1.0)
    frame.samples.add(number=9, power_watts=1.0)
    assert list(read_frame(frame, UUIDS, 0.0).samples or ()) == ["GPU-1"]


@pytest.mark.parametrize("state", list(DriverState))
def test_every_state_of_a_driver_can_be_told(state: DriverState) -> None:
    frame = agent_pb2.Frame(sequence=1)
    frame.driver.state = agent_pb2.DriverState.Value(f"DRIVER_STATE_{state.name}")
    assert read_frame(frame, UUIDS, 0.0).driver is state


# --- the rest of a frame


def test_empty_list_of_what_is_held_is_not_the_same_as_none() -> None:
    frame = agent_pb2.Frame(sequence=1)
    assert read_frame(frame, UUIDS, 0.0).held is None
    frame.held.SetInParent()
    assert read_frame(frame, UUIDS, 0.0).held == ()


def test_frame_tells_all_that_it_says() -> None:
    frame = agent_pb2.Frame(
        sequence=7, at=1.0, monotonic_seconds=2.0, commands_done=3, frames_dropped=4
    )
    frame.driver.state = agent_pb2.DRIVER_STATE_FAILED
    frame.driver.reason = "gone"
    frame.refusals.add(allocation_id="a", reason="full")
    frame.processes.started_at = 5.0
    frame.processes.unread_gpu_uuids.append("GPU-2")
    frame.processes.processes.add(gpu_uuid="GPU-1", pid=1, user="eve", memory_used_bytes=0)
    frame.held.allocations.add(id="a", gpu_uuids=["GPU-1"], ttl_seconds=1.0, memory_bytes=5)
    read = read_frame(frame, UUIDS, 0.0)
    assert (read.sequence, read.commands_done, read.frames_dropped) == (7, 3, 4)
    assert (read.driver, read.driver_reason) == (DriverState.FAILED, "gone")
    assert [(each.allocation_id, each.reason) for each in read.refusals] == [("a", "full")]
    assert read.processes == ProcessTable(
        5.0, (Process("GPU-1", 1, "eve", memory_used_bytes=0),), ("GPU-2",)
    )
    assert read.held == (HeldAllocation("a", ("GPU-1",), 5, "", 1.0, 0.0),)


# --- hello


def hello(**fields: object) -> agent_pb2.Hello:
    right = {"node": "n1", "incarnation": "i", "process_id": "p", "interval_seconds": 1.0}
    return agent_pb2.Hello(**{**right, **fields})  # type: ignore[arg-type]


INVENTORY = agent_pb2.Inventory(
    driver_version="570",
    gpus=[agent_pb2.Gpu(number=1, uuid="GPU-1", model="H100", power_limit_watts=700.0)],
)


def test_driver_that_has_not_answered_leaves_the_known_gpus() -> None:
    said = read_hello(hello())
    assert said.inventory is None
    assert said.complete_facts(None).gpus == ()
    known = with_inventory(said.facts, read_inventory(INVENTORY, "inventory"), None)
    assert said.complete_facts(known) == known
    empty = read_hello(hello(inventory=agent_pb2.Inventory(driver_version="570")))
    assert empty.complete_facts(known).gpus == ()


def test_labels_that_are_not_there_are_none() -> None:
    assert read_hello(hello()).facts.labels is None
    assert read_hello(hello(labels={"a": "b"})).facts.labels == {"a": "b"}


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("hello.node", {"node": ""}),
        ("hello.node", {"node": "-n"}),
        ("hello.node", {"node": "n\u00f6rd"}),
        ("hello.node", {"node": "n" * 254}),
        ("hello.incarnation", {"incarnation": ""}),
        ("hello.process_id", {"process_id": ""}),
        ("hello.boot_id", {"boot_id": "b" * 257}),
        ("hello.pool", {"pool": "a\nb"}),
        ("hello.labels", {"labels": {str(n): "" for n in range(65)}}),
        ("hello.interval_seconds", {"interval_seconds": 0.0}),
        ("hello.interval_seconds", {"interval_seconds": float("nan")}),
        ("hello.interval_seconds", {"interval_seconds": 3601.0}),
        ("hello.monotonic_seconds", {"monotonic_seconds": float("inf")}),
    ],
)
def test_hello_that_cannot_be_is_named_by_its_field(field: str, fields: dict[str, object]) -> None:
    with pytest.raises(Malformed) as caught:
        read_hello(hello(**fields))
    assert caught.value.field == field


def test_missing_cards_are_read_and_a_long_reason_is_cut() -> None:
    message = agent_pb2.Inventory()
    message.missing.add(index=3, uuid="GPU-3", error_kind="gpu_lost", reason="x" * 2000)
    (found,) = read_inventory(message, "inventory").missing
    assert (found.index, found.uuid, found.error_kind) == (3, "GPU-3", "gpu_lost")
    assert len(found.reason) == limits.REASON_BYTES_MAX


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("i.missing[0].uuid", {"uuid": "x" * 129}),
        ("i.missing[0].error_kind", {"error_kind": "a\nb"}),
        ("i.missing", {}),
    ],
)
def test_missing_cards_that_cannot_be_are_named(field: str, fields: dict[str, str]) -> None:
    count = 1 if fields else 65
    missing = [types_pb2.MissingGpu(index=1, **fields) for _ in range(count)]
    with pytest.raises(Malformed) as caught:
        read_inventory(agent_pb2.Inventory(missing=missing), "i")
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["n1", "N1.example.org", "a_b", "1", "n" * 253])
def test_names_of_hosts_are_names(name: str) -> None:
    assert read_hello(hello(node=name)).facts.name == name


# --- down


def test_commands_carry_what_is_to_be_held_or_dropped() -> None:
    held = HeldAllocation("a", ("GPU-1", "GPU-2"), None, "ann", 60.0, 5.0)
    told = command_message(Command(3, "a", held)).command
    assert (told.id, told.hold.allocation.id) == (3, "a")
    assert list(told.hold.allocation.gpu_uuids) == ["GPU-1", "GPU-2"]
    assert not told.hold.allocation.HasField("memory_bytes")
    dropped = command_message(Command(4, "a", None, "released")).command
    assert (dropped.id, dropped.drop.allocation_id, dropped.drop.reason) == (4, "a", "released")


# --- the clients' door


def test_request_of_a_share_is_for_one_gpu() -> None:
    message = types_pb2.Request(holder="ann", ttl_seconds=60.0, memory_bytes=5)
    assert read_request(message) == Request(1, "ann", 60.0, memory_bytes=5)


def test_request_comes_back_as_it_was_sent() -> None:
    message = types_pb2.Request(
        gpus=2,
        nodes=3,
        holder="ann",
        ttl_seconds=60.0,
        cpu_milli=8000,
        host_memory_bytes=GIB,
        models=["H100", "A100"],
        gpu_memory_min_bytes=40 * GIB,
        compute_capability_min="8.0",
        driver_version_min="570.86",
        pool="p",
        node="n1",
        host_boot_id="b",
        node_labels={"zone": "a"},
        gpu_topology=types_pb2.GPU_TOPOLOGY_NVLINK,
        gpu_topology_required=True,
        same_label="rack",
        same_label_required=True,
        service="llm",
        anti_affinity="node",
        spread="zone",
        near_service="cache",
        preferred_gpu_uuid="GPU-1",
        duration_seconds=60.0,
        movable=True,
        labels={"a": "b"},
        priority=-5,
    )
    assert {field.name for field in message.DESCRIPTOR.fields} - {
        field.name for field, _ in message.ListFields()
    } == {"memory_bytes", "compute_milli", "mig_profile"}, "those of parts are tested below"
    waiting = Allocation("a", AllocationState.WAITING, read_request(message), 1.0, 2)
    answer = allocation_message(waiting, queue_position=3)
    assert answer.request == message
    assert (answer.queue_position, answer.HasField("expires_at"), dict(answer.env)) == (
        3,
        False,
        {},
    )


@pytest.mark.parametrize(
    "part",
    [
        types_pb2.Request(memory_bytes=GIB),
        types_pb2.Request(compute_milli=250),
        types_pb2.Request(memory_bytes=GIB, compute_milli=250),
        types_pb2.Request(mig_profile="1g.10gb"),
        types_pb2.Request(mig_profile="any", memory_bytes=GIB),
        types_pb2.Request(mig_profile="any", memory_bytes=GIB, compute_milli=250),
    ],
    ids=lambda part: " and ".join(field.name for field, _ in part.ListFields()),
)
def test_request_of_a_part_comes_back_as_it_was_sent(part: types_pb2.Request) -> None:
    sent = types_pb2.Request(gpus=1, holder="ann", ttl_seconds=60.0)
    sent.MergeFrom(part)
    assert request_message(read_request(sent)) == sent


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (types_pb2.Request(), "gpus"),
        (types_pb2.Request(gpus=2, memory_bytes=5), "gpus"),
        (types_pb2.Request(nodes=2, memory_bytes=5), "nodes"),
        (types_pb2.Request(gpus=65, mig_profile="1g.10gb"), "gpus"),
        (types_pb2.Request(nodes=2, mig_profile="1g.10gb"), "nodes"),
        (types_pb2.Request(mig_profile="half"), "mig_profile"),
        (types_pb2.Request(mig_profile="1g.10gb", compute_milli=5), "compute_milli"),
        (types_pb2.Request(compute_milli=1001), "compute_milli"),
        (types_pb2.Request(compute_milli=0), "compute_milli"),
        (types_pb2.Request(gpus=1, nodes=1025), "nodes"),
        (types_pb2.Request(gpus=1, compute_capability_min="8"), "compute_capability_min"),
        (types_pb2.Request(gpus=1, driver_version_min="new"), "driver_version_min"),
        (types_pb2.Request(gpus=1, spread="node"), "spread"),
        (types_pb2.Request(gpus=1, anti_affinity="node"), "anti_affinity"),
        (types_pb2.Request(gpus=1, models=[""]), "models"),
        (types_pb2.Request(gpus=1, models=[str(i) for i in range(33)]), "models"),
        (types_pb2.Request(gpus=1, cpu_milli=2**63), "cpu_milli"),
        (types_pb2.Request(gpus=1, host_memory_bytes=2**64 - 1), "host_memory_bytes"),
        (types_pb2.Request(gpus=1, duration_seconds=float("nan")), "duration_seconds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_request_that_cannot_be_is_refused_by_field(message: types_pb2.Request, field: str) -> None:
    message.holder, message.ttl_seconds = "ann", 60.0
    with pytest.raises(Malformed) as refused:
        read_request(message)
    assert refused.value.field == f"request.{field}"


def granted_to(request: Request, *placements: Placement) -> Allocation:
    return Allocation("a", AllocationState.GRANTED, request, 1.0, 2, placements=placements)


def test_environment_names_devices_by_uuid_in_order() -> None:
    devices = tuple(Device(f"GPU-{i}", "H100", i, 80 * GIB, exclusive=True) for i in (3, 1))
    allocation = granted_to(Request(2, "ann", 60.0), Placement("n1", devices))
    variables = environment(allocation, allocation.placements[0])
    assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-3,GPU-1"
    assert not {"STOKER_MEMORY_LIMIT_BYTES", "STOKER_NODES"} & set(variables)


def test_environment_of_a_mig_device_names_it_alone() -> None:
    device = Device(
        *("GPU-1", "H100", 1, 10 * GIB),
        exclusive=False,
        mig_device_uuid="MIG-7",
        mig_profile="1g.10gb",
    )
    allocation = granted_to(
        Request(1, "ann", 60.0, mig_profile="1g.10gb"), Placement("n1", (device,))
    )
    variables = environment(allocation, allocation.placements[0])
    assert variables["CUDA_VISIBLE_DEVICES"] == variables["NVIDIA_VISIBLE_DEVICES"] == "MIG-7"


def test_each_node_of_a_gang_has_its_own_environment() -> None:
    here, there = (
        Placement(f"n{i}", (Device(f"GPU-{i}", "H100", 0, 80 * GIB, exclusive=True),))
        for i in (1, 2)
    )
    gang = granted_to(Request(1, "ann", 60.0, nodes=2), here, there)
    told = allocation_message(gang, held_by=("n2",))
    assert (told.node, [each.uuid for each in told.devices]) == ("n1", ["GPU-1"])
    assert [(each.node, each.held_by_node) for each in told.placements] == [
        ("n1", False),
        ("n2", True),
    ]
    assert not told.held_by_node, "one of them has not confirmed it"
    second = dict(told.placements[1].env)
    assert second["CUDA_VISIBLE_DEVICES"] == "GPU-2"
    assert (second["STOKER_NODES"], second["STOKER_NODE_RANK"]) == ("n1,n2", "1")
    assert allocation_message(gang, held_by=("n1", "n2")).held_by_node


# --- nodes

FACTS = NodeFacts(
    "n1", "i", "b", "1", simulated=True, interval_seconds=2.0, gpus=(Gpu("GPU-1", "H100", 0, GIB),)
)
NODE = Node(FACTS, registered_at=1.0, version=1)
FRESH = GpuSample(memory_used_bytes=5, temperature_celsius=0.0, at=100.0)


@pytest.mark.parametrize(
    ("status", "fresh_until", "state", "word"),
    [
        (NodeStatus(), None, fleet_pb2.NODE_STATE_DISCONNECTED, "has not connected"),
        (NodeStatus(session=1), None, fleet_pb2.NODE_STATE_STALE, "driver has not been read"),
        (
            NodeStatus(session=1, driver=DriverState.BLOCKED, driver_reason="hangs"),
            200.0,
            fleet_pb2.NODE_STATE_STALE,
            "driver blocked: hangs",
        ),
        (
            NodeStatus(session=1, driver=DriverState.READING),
            None,
            fleet_pb2.NODE_STATE_STALE,
            "no sample",
        ),
        (
            NodeStatus(session=1, driver=DriverState.READING),
            90.0,
            fleet_pb2.NODE_STATE_STALE,
            "10s beyond three intervals",
        ),
        (
            NodeStatus(session=1, driver=DriverState.RELEASED, driver_reason="released by root"),
            100.0,
            fleet_pb2.NODE_STATE_STALE,
            "released by root: `stoker agent resume` on the host",
        ),
        (NodeStatus(session=1, driver=DriverState.READING), 100.0, fleet_pb2.NODE_STATE_READY, ""),
    ],
)
def test_state_of_a_node_has_a_reason(
    status: NodeStatus, fresh_until: float | None, state: int, word: str
) -> None:
    found, reason = node_state(status, fresh_until, now=100.0)
    assert found == state
    assert (word in reason) if word else reason == ""


@pytest.mark.parametrize(("now", "is_told"), [(100.0, True), (106.0, True), (106.1, False)])
def test_value_older_than_three_intervals_is_absent(now: float, is_told: bool) -> None:
    status = NodeStatus(session=1, samples={"GPU-1": FRESH}, last_sample_at=100.0)
    (gpu,) = node_message(NODE, status, {}, None, now).gpus
    assert gpu.HasField("memory_used_bytes") is is_told
    assert gpu.HasField("temperature_celsius") is is_told, "zero is a value"
    assert not gpu.HasField("power_watts")
    assert gpu.memory_total_bytes == GIB


def test_cards_that_are_out_of_use_are_told_with_the_reason() -> None:
    lost = MissingGpu(0, "GPU-1", "gpu_lost", "it fell off the bus")
    status = NodeStatus(session=1, driver=DriverState.READING, missing=(lost,))
    told = node_message(NODE, status, {"GPU-1": (Claim("a", None),)}, 200.0, 100.0)
    assert [MissingGpu(g.index, g.uuid, g.error_kind, g.reason) for g in told.missing_gpus] == [
        lost
    ]
    assert [(gpu.uuid, list(gpu.allocation_ids)) for gpu in told.gpus] == [("GPU-1", ["a"])]


# --- bytes that are no message


RIGHT = fleet_pb2.AllocateRequest(
    request=types_pb2.Request(holder="HOLDER", labels={"key": "VALUE"})
).SerializeToString()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (RIGHT.replace(b"HOLDER", b"H\xff\xffDER"), "request.holder: not UTF-8 at byte 1 of 6"),
        (RIGHT.replace(b"VALUE", b"VAL\xc3\x28"), "request.labels.value: not UTF-8"),
        (RIGHT[:-2], "AllocateRequest: "),
        (b"\x07", "AllocateRequest: 1 bytes that are cut off or garbled"),
    ],
)
def test_field_at_fault_is_found(data: bytes, said: str) -> None:
    assert str(find_fault(fleet_pb2.AllocateRequest.DESCRIPTOR, data)).startswith(said)


# --- clocks


def test_message_that_was_held_up_is_as_late_as_that() -> None:
    """The agent's clock began at another time; only differences count."""
    offset = ClockOffset(sent=5000.0, arrived=10.0)
    assert offset.delay(sent=5001.0, arrived=11.0) == 0.0
    assert offset.delay(sent=5002.0, arrived=15.0) == pytest.approx(3.0)
    assert offset.delay(sent=5009.9, arrived=19.8) == pytest.approx(0.0), "the quickest so far"
    assert offset.delay(sent=5011.0, arrived=21.0) == pytest.approx(0.1)


def test_clocks_that_drift_apart_do_not_make_samples_old() -> None:
    """A day of a clock that loses 50 microseconds in a second."""
    offset = ClockOffset(0.0, 0.0)
    worst = max(offset.delay(second * (1 - 50e-6), float(second)) for second in range(0, 86_400, 5))
    assert worst < 0.01


def test_jam_of_less_than_a_window_is_seen_as_one() -> None:
    offset = ClockOffset(0.0, 0.0)
    for second in range(1, 100):
        assert offset.delay(float(second), float(second)) == 0.0
    jam = OFFSET_WINDOW_SECONDS / 2
    assert offset.delay(100.0, 100.0 + jam) == pytest.approx(jam)


# --- limits


@pytest.mark.parametrize("value", [float("nan"), 0.0, 11.0, float("inf")])
def test_number_out_of_range_is_named(value: float) -> None:
    with pytest.raises(Malformed, match=r"x: must be from 1 to 10, found"):
        limits.number(value, "x", 1, 10)


def test_limit_of_a_text_is_in_bytes() -> None:
    assert limits.text("ä" * 128, "x") == "ä" * 128
    with pytest.raises(Malformed, match="at most 256 bytes, found 258"):
        limits.text("ä" * 129, "x")
