"""Values on the wire: absent stays absent, nothing is lost, nonsense is refused."""

import math
from dataclasses import replace

import pytest

from stoker.agent.model import (
    AttributedProcess,
    DriverState,
    DriverStatus,
    Drop,
    Frame,
    HeldAllocation,
    Hello,
    Hold,
    HoldRefusal,
    Host,
    NodeIdentity,
    NumberedGpu,
    NumberedInventory,
    NumberedSample,
    ProcessSeen,
    ProcessTable,
)
from stoker.agent.readings import (
    GpuFault,
    GpuIdentity,
    GpuSample,
    MigDeviceIdentity,
    NvlinkPeer,
)
from stoker.agent.wire import (
    Ack,
    MalformedMessage,
    Order,
    Welcome,
    frame_message,
    hello_message,
    read_message,
)
from stoker.v1 import agent_pb2, types_pb2

SHARE = HeldAllocation("a", ("GPU-0",), 2**30, "ann", 600.0, 12.5)
WHOLE = HeldAllocation("b", ("GPU-1", "GPU-2"), None, "bob", 60.0, 13.5)
FULL_GPU = GpuIdentity(
    index=1,
    uuid="GPU-1",
    model="Tesla T4",
    memory_total_bytes=2**34,
    pci_bus_id="00000000:18:00.0",
    serial="123",
    vbios_version="90.04",
    minor_number=0,
    compute_capability="7.5",
    power_limit_watts=70.0,
    mig_enabled=False,
    numa_node=0,
    nvlink_peers=(NvlinkPeer("GPU-0", 4),),
    nvswitch_links=8,
    mig_devices=(
        MigDeviceIdentity("MIG-1", "1g.10gb", 2**33, 9, 0),
        MigDeviceIdentity("MIG-2", "1c.2g.20gb", 2**34, 3, 1),
    ),
)
BARE_GPU = GpuIdentity(index=0, uuid="GPU-0", model="Tesla T4", memory_total_bytes=2**34)
INVENTORY = NumberedInventory(
    "580.1",
    "13.0",
    (NumberedGpu(7, FULL_GPU), NumberedGpu(3, BARE_GPU)),
    host=Host(192_000, 2**41),
)


def crossed(message: agent_pb2.AgentMessage) -> agent_pb2.AgentMessage:
    return agent_pb2.AgentMessage.FromString(message.SerializeToString())


def test_hello() -> None:
    identity = NodeIdentity("n1", "0.1.0", "boot", True, "train", {"rack": "r1"}, 0.5, "proc")
    hello = crossed(hello_message(Hello(identity, "life", 5.25, 42, INVENTORY, (SHARE, WHOLE))))
    assert hello.hello == agent_pb2.Hello(
        protocol_version=1,
        node="n1",
        agent_version="0.1.0",
        incarnation="life",
        first_sequence=42,
        boot_id="boot",
        simulated=True,
        pool="train",
        labels={"rack": "r1"},
        interval_seconds=0.5,
        inventory=agent_pb2.Inventory(
            driver_version="580.1",
            cuda_version="13.0",
            gpus=[
                agent_pb2.Gpu(
                    number=7,
                    uuid="GPU-1",
                    model="Tesla T4",
                    memory_total_bytes=2**34,
                    index=1,
                    pci_bus_id="00000000:18:00.0",
                    serial="123",
                    compute_capability="7.5",
                    power_limit_watts=70.0,
                    minor_number=0,
                    vbios_version="90.04",
                    mig_enabled=False,
                    numa_node=0,
                    nvlink_peers=[agent_pb2.NvlinkPeer(number=3, links=4)],
                    nvswitch_links=8,
                    mig_devices=[
                        agent_pb2.MigDevice(
                            uuid="MIG-1",
                            profile="1g.10gb",
                            memory_total_bytes=2**33,
                            gpu_instance_id=9,
                        ),
                        agent_pb2.MigDevice(
                            uuid="MIG-2",
                            profile="1c.2g.20gb",
                            memory_total_bytes=2**34,
                            gpu_instance_id=3,
                            compute_instance_id=1,
                        ),
                    ],
                ),
                agent_pb2.Gpu(
                    number=3, uuid="GPU-0", model="Tesla T4", memory_total_bytes=2**34, index=0
                ),
            ],
            host=agent_pb2.Host(cpu_milli=192_000, memory_bytes=2**41),
        ),
        held=agent_pb2.Held(
            allocations=[
                agent_pb2.HeldAllocation(
                    id="a",
                    gpu_uuids=["GPU-0"],
                    memory_bytes=2**30,
                    holder="ann",
                    ttl_seconds=600.0,
                    held_since=12.5,
                ),
                agent_pb2.HeldAllocation(
                    id="b",
                    gpu_uuids=["GPU-1", "GPU-2"],
                    holder="bob",
                    ttl_seconds=60.0,
                    held_since=13.5,
                ),
            ]
        ),
        process_id="proc",
        monotonic_seconds=5.25,
    )
    bare = hello.hello.inventory.gpus[1]
    optional = ("power_limit_watts", "minor_number", "mig_enabled", "numa_node")
    assert not any(bare.HasField(f) for f in optional)  # type: ignore[arg-type]
    assert all(hello.hello.inventory.gpus[0].HasField(f) for f in optional)  # type: ignore[arg-type]


def test_a_host_that_is_not_known_is_absent_and_a_peer_that_is_not_there_is_left_out() -> None:
    inventory = replace(INVENTORY, gpus=INVENTORY.gpus[:1], host=None)
    message = crossed(frame_message(Frame(1, 100.0, 0.0, inventory=inventory))).frame.inventory
    assert not message.HasField("host")
    assert list(message.gpus[0].nvlink_peers) == []


def test_what_is_held_of_parts_is_told() -> None:
    part = replace(
        SHARE,
        mig_device_uuids=("MIG-1",),
        compute_milli=142,
        cpu_milli=8000,
        host_memory_bytes=2**35,
        gang_nodes=2,
    )
    message = crossed(frame_message(Frame(1, 100.0, 0.0, held=(part, WHOLE)))).frame.held
    assert message.allocations[0] == agent_pb2.HeldAllocation(
        id="a",
        gpu_uuids=["GPU-0"],
        memory_bytes=2**30,
        holder="ann",
        ttl_seconds=600.0,
        held_since=12.5,
        mig_device_uuids=["MIG-1"],
        compute_milli=142,
        cpu_milli=8000,
        host_memory_bytes=2**35,
        gang_nodes=2,
    )
    told = {field.name for field, _ in message.allocations[1].ListFields()}
    assert told == {"id", "gpu_uuids", "holder", "ttl_seconds", "held_since"}


@pytest.mark.parametrize("instance", [None, 0, 9])
def test_a_process_tells_its_gpu_instance_where_it_has_one(instance: int | None) -> None:
    process = ProcessSeen("GPU-1", 42, gpu_instance_id=instance)
    table = ProcessTable(98.0, (AttributedProcess(process, ""),), ())
    (told,) = crossed(
        frame_message(Frame(1, 100.0, 0.0, processes=table))
    ).frame.processes.processes
    assert (told.gpu_instance_id if told.HasField("gpu_instance_id") else None) == instance


def test_a_hello_without_inventory_has_none() -> None:
    identity = NodeIdentity("n1", "", "", False, "", {}, 1.0, "p")
    hello = crossed(hello_message(Hello(identity, "life", 0.0, 1, None, ()))).hello
    assert not hello.HasField("inventory")
    assert hello.HasField("held")


def test_frame_with_everything() -> None:
    sample = GpuSample(
        uuid="GPU-1",
        at=99.5,
        memory_total_bytes=2**34,
        memory_used_bytes=0,
        memory_reserved_bytes=5,
        memory_free_bytes=6,
        utilization_ratio=0.0,
        memory_utilization_ratio=0.5,
        temperature_celsius=40.0,
        power_watts=30.5,
        energy_joules_total=1e9 + 0.25,
        sm_clock_hertz=1.41e9,
        memory_clock_hertz=5e9,
    )
    process = ProcessSeen("GPU-1", 42, "ann", "train", None, 12.5)
    frame = Frame(
        sequence=9,
        at=100.0,
        monotonic_seconds=50.0,
        samples=(NumberedSample(7, sample),),
        processes=ProcessTable(98.0, (AttributedProcess(process, "a"),), ("GPU-0",)),
        held=(),
        refusals=(HoldRefusal("c", "GPU-9 is not on this node"),),
        inventory=INVENTORY,
        driver=DriverStatus(DriverState.BLOCKED, "it hangs", 2),
        frames_dropped=3,
        commands_done=4,
    )
    message = crossed(frame_message(frame)).frame
    assert message.samples[0] == agent_pb2.GpuSample(
        number=7,
        memory_used_bytes=0,
        utilization_ratio=0.0,
        temperature_celsius=40.0,
        power_watts=30.5,
        sm_clock_hertz=1_410_000_000,
        memory_clock_hertz=5_000_000_000,
        memory_utilization_ratio=0.5,
        energy_joules=1e9 + 0.25,
        memory_reserved_bytes=5,
        age_seconds=0.5,
    )
    assert message.processes == agent_pb2.ProcessTable(
        started_at=98.0,
        processes=[
            types_pb2.Process(
                pid=42,
                user="ann",
                command="train",
                allocation_id="a",
                started_at=12.5,
                gpu_uuid="GPU-1",
            )
        ],
        unread_gpu_uuids=["GPU-0"],
    )
    assert not message.processes.processes[0].HasField("memory_used_bytes")
    assert message.HasField("held")
    assert message.refusals[0].allocation_id == "c"
    assert len(message.inventory.gpus) == 2
    assert message.driver == agent_pb2.DriverStatus(
        state=agent_pb2.DRIVER_STATE_BLOCKED, reason="it hangs", restarts=2
    )
    assert (message.sequence, message.at, message.monotonic_seconds) == (9, 100.0, 50.0)
    assert (message.frames_dropped, message.commands_done) == (3, 4)


def test_what_was_not_read_is_absent_and_zero_is_told() -> None:
    sample = GpuSample(uuid="GPU-1", at=100.0, memory_used_bytes=0)
    frame = Frame(1, 100.0, 0.0, samples=(NumberedSample(1, sample),))
    message = crossed(frame_message(frame)).frame
    told = {field.name for field, _ in message.samples[0].ListFields()}
    assert told == {"number", "memory_used_bytes"}
    assert {field.name for field, _ in message.ListFields()} == {"sequence", "at", "samples"}


def test_a_gpu_that_is_out_is_told_with_its_reason() -> None:
    faults = (
        GpuFault(3, "GPU-3", "driver_timeout", "left alone: it hung"),
        GpuFault(5, None, "gpu_lost", "it fell off the bus"),
    )
    frame = Frame(1, 100.0, 0.0, inventory=replace(INVENTORY, missing=faults))
    message = crossed(frame_message(frame)).frame
    assert list(message.inventory.missing) == [
        types_pb2.MissingGpu(
            index=3, uuid="GPU-3", error_kind="driver_timeout", reason="left alone: it hung"
        ),
        types_pb2.MissingGpu(index=5, error_kind="gpu_lost", reason="it fell off the bus"),
    ]


@pytest.mark.parametrize("state", DriverState)
def test_every_driver_state_has_its_word(state: DriverState) -> None:
    message = frame_message(Frame(1, 1.0, 1.0, driver=DriverStatus(state))).frame
    assert agent_pb2.DriverState.Name(message.driver.state) == f"DRIVER_STATE_{state.upper()}"


def test_a_tick_of_eight_gpus_is_small() -> None:
    samples = tuple(
        NumberedSample(
            number,
            GpuSample(
                uuid=f"GPU-{number}",
                at=1.7e9,
                memory_used_bytes=40 * 2**30 + number,
                memory_reserved_bytes=500 * 2**20,
                utilization_ratio=0.87,
                memory_utilization_ratio=0.31,
                temperature_celsius=61.0,
                power_watts=512.25,
                energy_joules_total=3.2e9,
                sm_clock_hertz=1.98e9,
                memory_clock_hertz=2.6e9,
            ),
        )
        for number in range(1, 9)
    )
    frame = Frame(1_000_000, 1.7e9, 1e6, samples=samples)
    assert len(frame_message(frame).SerializeToString()) < 700


def received(**fields: object) -> object:
    message = agent_pb2.AggregatorMessage(**fields)  # type: ignore[arg-type]
    return read_message(agent_pb2.AggregatorMessage.FromString(message.SerializeToString()))


def command(**fields: object) -> object:
    return received(command=agent_pb2.Command(id=3, **fields))  # type: ignore[arg-type]


def hold(**fields: object) -> object:
    allocation = {"id": "a", "gpu_uuids": ["GPU-0"], "ttl_seconds": 60.0, **fields}
    return command(hold=agent_pb2.Hold(allocation=agent_pb2.HeldAllocation(**allocation)))  # type: ignore[arg-type]


def test_what_the_aggregator_says() -> None:
    welcome = agent_pb2.Welcome(protocol_version=1, aggregator_version="0.1.0", acked_sequence=7)
    assert received(welcome=welcome) == Welcome(1, "0.1.0", 7)
    assert received(ack=agent_pb2.Ack(sequence=9)) == Ack(9)
    drop = agent_pb2.Drop(allocation_id="a", reason="released")
    assert command(drop=drop) == Order(3, Drop("a", "released"))
    whole = HeldAllocation("a", ("GPU-0",), None, "ann", 60.0, 5.0)
    assert hold(holder="ann", held_since=5.0) == Order(3, Hold(whole))
    share = HeldAllocation("a", ("GPU-0",), 2**30, "", 60.0, 0.0)
    assert hold(memory_bytes=2**30) == Order(3, Hold(share))
    part = replace(
        whole,
        holder="",
        held_since=0.0,
        mig_device_uuids=("MIG-1",),
        compute_milli=142,
        cpu_milli=8000,
        host_memory_bytes=2**35,
        gang_nodes=3,
    )
    assert hold(
        mig_device_uuids=["MIG-1"],
        compute_milli=142,
        cpu_milli=8000,
        host_memory_bytes=2**35,
        gang_nodes=3,
    ) == Order(3, Hold(part))
    for nodes in (0, 1):  # both mean that there is no gang
        assert hold(memory_bytes=2**30, gang_nodes=nodes) == Order(3, Hold(share))


@pytest.mark.parametrize(
    ("nonsense", "reason"),
    [
        (received, "a message of a kind that this agent does not know"),
        (command, "command 3 is of a kind that is not known"),
        (lambda: hold(id=""), "command 3: an allocation id of 0 characters"),
        (lambda: hold(id="x" * 129), "command 3: an allocation id of 129 characters"),
        (lambda: hold(memory_bytes=0), "command 3: a share of 0 bytes"),
        (lambda: hold(compute_milli=0), "command 3: 0 thousandths of a GPU's compute"),
        (lambda: hold(compute_milli=1001), "command 3: 1001 thousandths of a GPU's compute"),
        (lambda: hold(ttl_seconds=-1.0), "command 3: a TTL of -1.0 seconds"),
        (lambda: hold(ttl_seconds=math.nan), "command 3: a TTL of nan seconds"),
        (lambda: command(drop=agent_pb2.Drop()), "command 3: an allocation id of 0 characters"),
    ],
)
def test_nonsense_is_refused(nonsense: object, reason: str) -> None:
    assert callable(nonsense)
    with pytest.raises(MalformedMessage, match=reason):
        nonsense()
