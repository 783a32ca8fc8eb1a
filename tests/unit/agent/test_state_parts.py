"""A node whose GPUs are partitioned: what it tells of the parts, holds of them, and refuses."""

from dataclasses import replace
from typing import Any

import pytest
from tests.support.node import Node, allocation, inventory, reading

from stoker.agent.actions import ReadInventory
from stoker.agent.events import InventoryRead, SampleTaken
from stoker.agent.facts import Fact
from stoker.agent.model import Host, ProcessSeen
from stoker.agent.readings import (
    WHOLE_GPU,
    Inventory,
    MigDeviceIdentity,
    MigDeviceReading,
    ReadFailure,
)


def partitioned(*devices: MigDeviceIdentity) -> Inventory:
    """GPU-0 in MIG mode with these devices, GPU-1 whole."""
    found = inventory(0, 1)
    first = replace(found.gpus[0], mig_enabled=True, mig_devices=devices)
    return replace(found, gpus=(first, found.gpus[1]))


def of_parts(now: float, *devices: MigDeviceIdentity, **changes: Any) -> SampleTaken:
    """A tick in which GPU-0 tells of these MIG devices."""
    told = tuple(
        MigDeviceReading(d.uuid, d.gpu_instance_id, d.compute_instance_id, d.profile)
        for d in devices
    )
    first = replace(reading(0, now), mig_devices=told, **changes)
    return SampleTaken(now, (first, reading(1, now)))


SMALL = MigDeviceIdentity("MIG-a", "1g.10gb", 2**33, 9, 0)
LARGE = MigDeviceIdentity("MIG-b", "3g.40gb", 2**35, 1, 0)
INCOMPLETE = (ReadFailure(Fact.MIG_MODE, "unknown", "the list is not complete"),)
LOST = (ReadFailure(WHOLE_GPU, "gpu_lost", "it fell off the bus"),)


@pytest.mark.parametrize(
    ("known", "tick", "is_asked"),
    [
        ((SMALL, LARGE), of_parts(1e3, SMALL, LARGE), False),
        ((SMALL, LARGE), of_parts(1e3, LARGE, SMALL), False),
        ((SMALL,), of_parts(1e3, SMALL, LARGE), True),
        ((SMALL, LARGE), of_parts(1e3, SMALL), True),
        ((SMALL,), of_parts(1e3), True),
        ((), of_parts(1e3, SMALL), True),
        ((SMALL,), of_parts(1e3, replace(SMALL, gpu_instance_id=10)), True),
        ((SMALL,), of_parts(1e3, replace(SMALL, profile="1g.20gb")), True),
        ((SMALL,), of_parts(1e3, failures=INCOMPLETE), False),
        ((SMALL,), of_parts(1e3, facts={}, failures=LOST), False),
    ],
    ids=[
        "the same",
        "in another order",
        "one came",
        "one went",
        "all went",
        "the first came",
        "the same name in another place",
        "the same name with another size",
        "not all could be listed",
        "the GPU is lost",
    ],
)
def test_other_mig_devices_than_known_ask_for_the_inventory(
    known: tuple[MigDeviceIdentity, ...], tick: SampleTaken, is_asked: bool
) -> None:
    node = Node().ready(0, 1)
    node.happen(InventoryRead(node.now, partitioned(*known)))
    assert (ReadInventory() in node.happen(tick)) is is_asked


@pytest.mark.parametrize(
    ("active", "up", "is_asked"),
    [(2, (1, 1, 0), False), (2, (1, 0, 0), False), (2, (1, 1, 1), True), (0, (), False)],
    ids=["as many as known", "one went down", "one more came up", "not asked in this tick"],
)
def test_more_links_than_known_ask_for_the_inventory(
    active: int, up: tuple[int, ...], is_asked: bool
) -> None:
    node = Node().ready(0, 1)
    found = inventory(0, 1)
    first = replace(found.gpus[0], nvlinks_active=active)
    node.happen(InventoryRead(node.now, replace(found, gpus=(first, found.gpus[1]))))
    links = {Fact.NVLINK_UP: {str(link): float(state) for link, state in enumerate(up)}}
    readings = (replace(reading(0, node.now), by_label=links), reading(1, node.now))
    asked = node.happen(SampleTaken(node.now, readings))
    assert (ReadInventory() in asked) is is_asked


def test_mig_devices_that_changed_are_told_and_the_same_ones_are_not_told_again() -> None:
    node = Node().ready(0, 1)
    node.happen(InventoryRead(node.now, partitioned(SMALL)))
    told = node.frames[-1].inventory
    assert told is not None
    assert told.mig_devices("GPU-0") == (SMALL,)
    assert told.mig_devices("GPU-1") == told.mig_devices("GPU-9") == ()
    node.frames.clear()
    node.happen(InventoryRead(node.now, partitioned(SMALL)))
    assert node.frames == []
    node.happen(InventoryRead(node.now, partitioned(LARGE)))
    assert [f.inventory.mig_devices("GPU-0") for f in node.frames if f.inventory] == [(LARGE,)]


def test_a_process_is_told_under_the_tenant_of_its_mig_device() -> None:
    node = Node().ready(0, 1)
    node.happen(InventoryRead(node.now, partitioned(SMALL, LARGE)))
    for id_, device in (("small", SMALL), ("large", LARGE)):
        node.hold(replace(allocation(id_, 0), mig_device_uuids=(device.uuid,)))
    assert node.held == {"small", "large"}
    seen = [
        ProcessSeen("GPU-0", pid, started_at=node.now, gpu_instance_id=instance)
        for pid, instance in ((1, 9), (2, 1), (3, 5), (4, None))
    ]
    node.read_processes(*seen)
    table = node.view.processes
    assert table is not None
    owners = {each.process.pid: each.allocation_id for each in table.processes}
    assert owners == {1: "small", 2: "large", 3: "", 4: ""}


def test_a_mig_device_that_the_node_does_not_have_is_refused_by_name() -> None:
    node = Node().ready(0, 1)
    node.happen(InventoryRead(node.now, partitioned(SMALL)))
    node.hold(replace(allocation("a", 0), mig_device_uuids=("MIG-x",)))
    (refusal,) = node.frames[-1].refusals
    assert refusal.reason == "GPU-0 does not have MIG-x; it has MIG-a (1g.10gb)"
    assert node.held == set()


def test_the_host_is_told_with_every_inventory() -> None:
    node = Node(host=Host(16_000, 2**37)).ready(0)
    assert node.view.inventory is not None
    assert node.view.inventory.host == Host(16_000, 2**37)
    hello = node.reconnect().inventory
    assert hello is not None
    assert hello.host == Host(16_000, 2**37)
