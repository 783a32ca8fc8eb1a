"""Partitions in the node's state: told whole, owed like the rest, and in the way of what comes."""

from dataclasses import replace

from tests.support.node import Node, allocation, held_in, inventory

from stoker.agent.events import InventoryRead, MigChanged
from stoker.agent.model import HoldRefusal
from stoker.agent.partitions import GpuMigStatus
from stoker.core.mig.geometry import MigState

PENDING = GpuMigStatus("GPU-0", MigState.PENDING, "not begun", is_withheld=True)
DONE = replace(PENDING, state=MigState.SUCCESS, reason="", is_withheld=False)
PLAIN = GpuMigStatus("GPU-1")


def change(node: Node, *gpus: GpuMigStatus) -> None:
    node.happen(MigChanged(node.now, gpus))


def test_a_change_is_told_at_once_and_once() -> None:
    node = Node().ready()
    change(node, PENDING, PLAIN)
    assert [frame.mig for frame in node.frames] == [(PENDING, PLAIN)]
    assert node.view.mig == (PENDING, PLAIN)
    change(node, PENDING, PLAIN)
    node.tick()
    assert [frame.mig for frame in node.frames] == [(PENDING, PLAIN), None]


def test_every_stream_is_told_all_anew() -> None:
    node = Node().ready()
    change(node, DONE)
    node.reconnect()
    assert node.frames[-1].mig == (DONE,)


def test_what_happens_without_a_stream_is_told_with_the_next() -> None:
    node = Node()
    node.happen(InventoryRead(node.now, inventory(0, 1)))
    change(node, PENDING)
    change(node, DONE)
    node.connect()
    assert [frame.mig for frame in node.frames if frame.mig is not None] == [(DONE,)]


def test_a_withheld_gpu_takes_nothing_new_and_others_do() -> None:
    node = Node().ready()
    change(node, PENDING, PLAIN)
    node.hold(allocation("a", 0))
    node.hold(allocation("b", 1))
    node.hold(allocation("c", 0, memory=1))
    refused = [each for frame in node.frames for each in frame.refusals]
    why = "GPU-0 takes nothing new while its partitions (MIG) are pending: not begun"
    assert refused == [HoldRefusal("a", why), HoldRefusal("c", why)]
    assert node.held == {"b"}


def test_what_is_held_already_stays_held() -> None:
    node = Node().ready()
    node.hold(allocation("a", 0))
    change(node, PENDING)
    node.hold(allocation("a", 0))  # said again on a new stream
    assert held_in(node.frames[-1]) == {"a"}
    assert not node.frames[-1].refusals
    node.drop("a")
    node.read_processes()
    assert node.held == set()


def test_a_gpu_is_free_again_once_it_is_done() -> None:
    node = Node().ready()
    change(node, PENDING)
    change(node, DONE)
    node.hold(allocation("a", 0))
    assert node.held == {"a"}


def test_with_something_declared_nothing_is_held_before_partitions_were_told_of() -> None:
    node = Node(awaits_mig=True)
    node.happen(InventoryRead(node.now, inventory(0, 1)))
    node.connect()
    assert node.frames[-1].mig is None
    node.hold(allocation("a", 0))
    node.hold(allocation("b", 1))
    assert node.held == set()
    assert not any(frame.refusals for frame in node.frames)
    change(node, PENDING, PLAIN)
    assert node.held == {"b"}
    told = [frame for frame in node.frames if frame.mig is not None]
    assert told[0].mig == (PENDING, PLAIN)
    assert [each.allocation_id for frame in node.frames for each in frame.refusals] == ["a"]
    assert node.frames[-1].commands_done == 2


def test_partitions_told_of_before_the_inventory_wait_for_it() -> None:
    node = Node(awaits_mig=True)
    node.connect()
    node.hold(allocation("b", 1))
    change(node, PLAIN)
    assert node.held == set()
    node.happen(InventoryRead(node.now, inventory(0, 1)))
    assert node.held == {"b"}
