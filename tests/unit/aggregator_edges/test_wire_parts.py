"""What agents tell of hosts, links, MIG devices and holds of parts: values, and what cannot be."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from stoker.aggregator import limits
from stoker.aggregator.inventories import with_inventory
from stoker.aggregator.limits import Malformed
from stoker.aggregator.model import Command, HeldAllocation, MigDevice, NodeFacts
from stoker.aggregator.wire import command_message, read_frame, read_hello, read_inventory
from stoker.core.gpu_models import GPUS_PER_NODE_MAX
from stoker.v1 import agent_pb2

GIB = 1 << 30
FACTS = NodeFacts("n1", "life", "boot", "0.1.0", simulated=True)
HOST = agent_pb2.Host(cpu_milli=192_000, memory_bytes=2048 * GIB)
SMALL = MigDevice("MIG-a", "1g.10gb", 9984 << 20, gpu_instance_id=9, compute_instance_id=0)
PART = MigDevice("MIG-b", "1c.2g.20gb", 20096 << 20, gpu_instance_id=3, compute_instance_id=1)


def inventory() -> agent_pb2.Inventory:
    """Two GPUs that are linked to one another and to switches; the second one is partitioned."""
    return agent_pb2.Inventory(
        driver_version="580",
        host=HOST,
        gpus=[
            agent_pb2.Gpu(
                number=7,
                uuid="GPU-1",
                index=1,
                numa_node=0,
                nvlink_peers=[agent_pb2.NvlinkPeer(number=3, links=4)],
                nvswitch_links=8,
            ),
            agent_pb2.Gpu(
                number=3,
                uuid="GPU-0",
                nvlink_peers=[agent_pb2.NvlinkPeer(number=7, links=4)],
                mig_enabled=True,
                mig_devices=[
                    agent_pb2.MigDevice(
                        uuid=each.uuid,
                        profile=each.profile,
                        memory_total_bytes=each.memory_total_bytes,
                        gpu_instance_id=each.gpu_instance_id,
                        compute_instance_id=each.compute_instance_id,
                    )
                    for each in (SMALL, PART)
                ],
            ),
        ],
    )


def test_an_inventory_tells_where_gpus_lie_and_of_what_they_are_made() -> None:
    read = read_inventory(inventory(), "i")
    first, second = read.gpus
    assert (first.numa_node, first.nvlink_peers, first.nvswitch_links) == (0, (("GPU-0", 4),), 8)
    assert (second.numa_node, second.nvlink_peers, second.nvswitch_links) == (
        None,
        (("GPU-1", 4),),
        0,
    )
    assert (first.mig_devices, second.mig_devices) == ((), (SMALL, PART))
    facts = with_inventory(FACTS, read, None)
    assert (facts.cpu_milli, facts.host_memory_bytes) == (192_000, 2048 * GIB)
    assert {gpu.uuid: gpu.mig_devices for gpu in facts.gpus} == {
        "GPU-0": (SMALL, PART),
        "GPU-1": (),
    }


def test_what_an_older_agent_does_not_tell_is_not_known() -> None:
    read = read_inventory(agent_pb2.Inventory(gpus=[agent_pb2.Gpu(number=1, uuid="GPU-1")]), "i")
    assert (read.cpu_milli, read.host_memory_bytes) == (None, None)
    (gpu,) = read.gpus
    assert (gpu.numa_node, gpu.nvlink_peers, gpu.nvswitch_links, gpu.mig_devices) == (
        None,
        (),
        0,
        (),
    )


def test_a_host_stays_known_while_its_driver_has_not_answered() -> None:
    known = with_inventory(FACTS, read_inventory(inventory(), "i"), None)
    hello = agent_pb2.Hello(node="n1", incarnation="i", process_id="p", interval_seconds=1.0)
    facts = read_hello(hello).complete_facts(known)
    assert (facts.cpu_milli, facts.host_memory_bytes) == (192_000, 2048 * GIB)
    assert facts.gpus == known.gpus


def test_a_gpu_that_cannot_be_read_keeps_its_links_and_parts() -> None:
    known = with_inventory(FACTS, read_inventory(inventory(), "i"), None)
    message = inventory()
    del message.gpus[1]
    del message.gpus[0].nvlink_peers[:]
    message.missing.add(index=0, uuid="GPU-0", error_kind="driver_timeout", reason="it hangs")
    facts = with_inventory(FACTS, read_inventory(message, "i"), known)
    assert [(gpu.uuid, gpu.nvlink_peers) for gpu in facts.gpus] == [
        ("GPU-0", (("GPU-1", 4),)),
        ("GPU-1", ()),
    ]
    assert facts.gpus[0].mig_devices == (SMALL, PART)


def with_host(memory_bytes: int, cpu_milli: int = 1000) -> agent_pb2.Inventory:
    host = agent_pb2.Host(cpu_milli=cpu_milli, memory_bytes=memory_bytes)
    return agent_pb2.Inventory(host=host)


def with_gpu(switches: int = 0, numa_node: int | None = None) -> agent_pb2.Inventory:
    gpu = agent_pb2.Gpu(number=1, uuid="GPU-1", nvswitch_links=switches, numa_node=numa_node)
    return agent_pb2.Inventory(gpus=[gpu])


def with_peers(*peers: tuple[int, int]) -> agent_pb2.Inventory:
    """GPU 1 with links to these numbers, so many each; beside it there is GPU 2."""
    links = [agent_pb2.NvlinkPeer(number=number, links=count) for number, count in peers]
    first = agent_pb2.Gpu(number=1, uuid="GPU-1", nvlink_peers=links)
    return agent_pb2.Inventory(gpus=[first, agent_pb2.Gpu(number=2, uuid="GPU-2")])


def device(uuid: str = "MIG-a", profile: str = "1g.10gb", size: int = GIB) -> agent_pb2.MigDevice:
    return agent_pb2.MigDevice(uuid=uuid, profile=profile, memory_total_bytes=size)


def with_devices(*of_each_gpu: Sequence[agent_pb2.MigDevice]) -> agent_pb2.Inventory:
    return agent_pb2.Inventory(
        gpus=[
            agent_pb2.Gpu(number=n, uuid=f"GPU-{n}", mig_enabled=True, mig_devices=devices)
            for n, devices in enumerate(of_each_gpu)
        ]
    )


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("host.cpu_milli", with_host(GIB, cpu_milli=limits.CPU_MILLI_MAX + 1)),
        ("host.memory_bytes", with_host(0)),
        ("host.memory_bytes", with_host(2**64 - 1)),
        ("gpus[0].nvlink_peers[1].number", with_peers((2, 4), (3, 4))),
        ("gpus[0].nvlink_peers[0].number", with_peers((1, 4))),
        ("gpus[0].nvlink_peers[1].number", with_peers((2, 4), (2, 4))),
        ("gpus[0].nvlink_peers[0].links", with_peers((2, 0))),
        ("gpus[0].nvlink_peers[0].links", with_peers((2, 1025))),
        ("gpus[0].nvswitch_links", with_gpu(switches=1025)),
        ("gpus[0].numa_node", with_gpu(numa_node=1024)),
        ("gpus[0].mig_devices[0].uuid", with_devices([device(uuid="")])),
        ("gpus[0].mig_devices[1].profile", with_devices([device(), device("MIG-b", profile="")])),
        ("gpus[0].mig_devices[0].memory_total_bytes", with_devices([device(size=0)])),
        ("gpus[].mig_devices[].uuid", with_devices([device()], [device()])),
        ("gpus[1].mig_devices", with_devices([], [device(f"MIG-{n}") for n in range(65)])),
    ],
    ids=[
        "more CPUs than any host has",
        "a host without memory",
        "memory that no field holds",
        "a peer that is no GPU of the node",
        "a GPU that is its own peer",
        "a peer twice",
        "a peer without links",
        "a peer with too many links",
        "too many links to switches",
        "a memory node that no kernel has",
        "a MIG device without a name",
        "a MIG device without a profile",
        "a MIG device without memory",
        "a MIG device of two GPUs",
        "too many MIG devices",
    ],
)
def test_an_inventory_that_cannot_be_is_named_by_its_field(
    field: str, message: agent_pb2.Inventory
) -> None:
    with pytest.raises(Malformed) as refused:
        read_inventory(message, "i")
    assert refused.value.field == f"i.{field}"


# --- processes


@pytest.mark.parametrize("instance", [None, 0, 9])
def test_a_process_tells_its_gpu_instance_where_it_has_one(instance: int | None) -> None:
    frame = agent_pb2.Frame(sequence=1)
    frame.processes.processes.add(gpu_uuid="GPU-0", pid=1, gpu_instance_id=instance)
    processes = read_frame(frame, {}, 0.0).processes
    assert processes is not None
    assert [each.gpu_instance_id for each in processes.processes] == [instance]


# --- what is held

HELD = HeldAllocation(
    id="a",
    gpu_uuids=("GPU-0",),
    memory_bytes=9984 << 20,
    holder="ann",
    ttl_seconds=60.0,
    held_since=5.0,
    mig_device_uuids=("MIG-a",),
    compute_milli=142,
    cpu_milli=8000,
    host_memory_bytes=64 * GIB,
    gang_nodes=2,
)


def report(**fields: object) -> agent_pb2.Frame:
    frame = agent_pb2.Frame(sequence=1)
    frame.held.allocations.add(id="a", gpu_uuids=["GPU-0"], ttl_seconds=1.0, **fields)
    return frame


@pytest.mark.parametrize("held", [HELD, replace(HELD, compute_milli=None, gang_nodes=1)])
def test_what_a_node_is_told_to_hold_it_can_report(held: HeldAllocation) -> None:
    told = command_message(Command(3, "a", held)).command.hold.allocation
    frame = agent_pb2.Frame(sequence=1)
    frame.held.allocations.append(told)
    assert read_frame(frame, {}, 0.0).held == (held,)


def test_a_whole_gpu_says_nothing_of_parts() -> None:
    whole = HeldAllocation("a", ("GPU-0",), None, "ann", 60.0, 5.0)
    told = command_message(Command(3, "a", whole)).command.hold.allocation
    assert {field.name for field, _ in told.ListFields()} == {
        "id",
        "gpu_uuids",
        "holder",
        "ttl_seconds",
        "held_since",
    }


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("compute_milli", {"compute_milli": 0}),
        ("compute_milli", {"compute_milli": 1001}),
        ("cpu_milli", {"cpu_milli": limits.CPU_MILLI_MAX + 1}),
        ("host_memory_bytes", {"host_memory_bytes": 2**64 - 1}),
        ("gang_nodes", {"gang_nodes": 1025}),
        ("mig_device_uuids", {"mig_device_uuids": ["MIG-a", "MIG-a"]}),
        ("mig_device_uuids[1]", {"mig_device_uuids": ["MIG-a", ""]}),
        ("mig_device_uuids[0]", {"mig_device_uuids": ["M" * 129]}),
        (
            "mig_device_uuids",
            {"mig_device_uuids": [f"MIG-{n}" for n in range(GPUS_PER_NODE_MAX + 1)]},
        ),
    ],
)
def test_a_hold_that_cannot_be_is_named_by_its_field(field: str, fields: dict[str, object]) -> None:
    with pytest.raises(Malformed) as refused:
        read_frame(report(**fields), {}, 0.0)
    assert refused.value.field == f"frame.held.allocations[0].{field}"
