"""The node's state by stories: what goes over the link, through restarts on either side."""

from tests.support.node import GIB, READING, Node, allocation, held_in, inventory

from stoker.agent.events import (
    DriverChanged,
    FrameAcked,
    InventoryRead,
    LinkDown,
)
from stoker.agent.framing import FRAMES_MAX, WINDOW
from stoker.agent.model import (
    Frame,
    Hello,
    ProcessSeen,
)
from stoker.agent.records import (
    GpuNumbered,
    Record,
    SequencesReserved,
)

# --- the link


def test_the_first_frame_after_a_welcome_tells_everything() -> None:
    node = Node()
    node.happen(InventoryRead(node.now, inventory(0)))
    node.happen(DriverChanged(node.now, READING))
    node.read_processes()
    assert node.frames == []
    hello = node.connect()
    assert (hello.first_sequence, hello.held) == (1, ())
    assert hello.inventory is not None
    (frame,) = node.frames
    assert frame.sequence == 1
    assert frame.inventory == hello.inventory
    assert (frame.held, frame.driver) == ((), READING)
    assert frame.processes is not None


def test_what_was_not_acknowledged_is_sent_again_in_order_and_nothing_else() -> None:
    node = Node().ready()
    for _ in range(5):
        node.tick()
    sequences = [frame.sequence for frame in node.frames]
    node.happen(FrameAcked(node.now, sequences[1]))
    node.happen(LinkDown(node.now, "reset"))
    node.tick()
    assert [f.sequence for f in node.frames] == sequences
    node.frames.clear()
    # The aggregator took in one more than it could say.
    hello = node.connect(acked=sequences[2])
    assert hello.first_sequence == sequences[2]
    resent = [frame.sequence for frame in node.frames]
    assert resent == [sequences[3], sequences[4], sequences[4] + 1, sequences[4] + 2]
    assert [bool(frame.samples) for frame in node.frames] == [True, True, True, False]


def test_a_frame_of_an_earlier_stream_says_nothing_about_what_is_held() -> None:
    node = Node().ready()
    node.hold(allocation("a", 0))
    node.hold(allocation("b", 9))
    node.happen(LinkDown(node.now, "reset"))
    told = len(node.frames)
    hello = node.connect()
    assert {each.id for each in hello.held} == {"a"}
    *old, new = node.frames[told:]
    assert len(old) == 2
    assert all(frame.is_telemetry_only and frame.commands_done == 0 for frame in old)
    assert held_in(new) == {"a"}
    assert not new.refusals


def test_a_hello_says_what_the_node_was_told_to_let_go_of() -> None:
    node = Node().ready(0, 1, 2)
    for id_, index in (("kept", 0), ("looked at", 1), ("gone", 2)):
        node.hold(allocation(id_, index))
    node.drop("gone")
    node.read_processes()
    assert held_in(node.frames[-1]) == {"kept", "looked at"}
    node.drop("looked at")
    hello = node.reconnect()  # before the frame without "gone" was acknowledged
    told = {each.id: each.is_leaving for each in hello.held}
    assert told == {"kept": False, "looked at": True, "gone": True}


def test_a_hello_lists_what_is_being_journaled() -> None:
    node = Node().ready()
    node.disk_answers = False
    node.hold(allocation("a", 0))
    node.happen(LinkDown(node.now, "reset"))
    assert {each.id for each in node.connect().held} == {"a"}


def test_a_hello_lists_what_was_let_go_of_until_that_is_acknowledged() -> None:
    node = Node().ready()
    node.hold(allocation("a", 0))
    node.ack()
    node.drop("a")
    node.read_processes()
    assert held_in(node.frames[-1]) == set()
    node.happen(LinkDown(node.now, "reset"))
    assert {each.id for each in node.connect().held} == {"a"}
    assert held_in(node.frames[-1]) == set()
    assert node.frames[-1].processes is not None
    node.ack()
    node.happen(LinkDown(node.now, "reset"))
    assert node.connect().held == ()


def test_holds_that_wait_are_forgotten_with_their_stream() -> None:
    node = Node()
    node.connect()
    node.hold(allocation("a", 0))
    node.happen(LinkDown(node.now, "reset"))
    node.happen(InventoryRead(node.now, inventory(0)))
    assert node.held == set()


def test_commands_are_counted_anew_on_a_new_stream() -> None:
    node = Node().ready()
    node.disk_answers = False
    node.hold(allocation("a", 0))
    node.happen(LinkDown(node.now, "reset"))
    node.connect()
    assert node.frames[-1].commands_done == 0
    node.commands = 0
    node.drop("b")
    assert node.frames[-1].commands_done == 0  # not before its GPUs were looked at
    node.read_processes()
    assert node.frames[-1].commands_done == 1
    node.answer_saves()
    assert node.frames[-1].commands_done == 1


def test_at_most_a_window_of_frames_is_under_way() -> None:
    node = Node().ready()
    for _ in range(3 * WINDOW):
        node.tick()
    assert len(node.frames) == WINDOW
    node.happen(FrameAcked(node.now, node.frames[9].sequence))
    assert len(node.frames) == WINDOW + 10
    assert [f.sequence for f in node.frames] == sorted({f.sequence for f in node.frames})


def test_a_long_cut_loses_the_oldest_telemetry_counts_it_and_nothing_else() -> None:
    node = Node().ready()
    node.happen(LinkDown(node.now, "reset"))
    for _ in range(FRAMES_MAX + 50):
        node.tick()
    view = node.state.view()
    assert (view.outbox_frames, view.frames_dropped) == (FRAMES_MAX, 50)
    node.connect()
    for _ in range(FRAMES_MAX):
        node.ack()
    assert node.state.view().outbox_frames == 0
    assert node.state.view().frames_dropped == 51  # the frame that tells everything needed room
    assert held_in(node.frames[-1]) == set()


def test_an_aggregator_that_has_counted_further_than_a_damaged_disk() -> None:
    node = Node()
    node.tick()
    node.connect(acked=9000)
    assert node.state.view().outbox_frames == 1
    assert node.frames[-1].sequence == 9001
    assert max(r.below for r in node.disk if isinstance(r, SequencesReserved)) > 9001


# --- restart, determinism


def test_what_is_held_survives_the_process() -> None:
    first = Node().ready()
    first.hold(allocation("a", 0))
    first.hold(allocation("b", 1, memory=GIB))
    first.hold(allocation("c", 1, memory=GIB))
    first.drop("b")
    first.read_processes()
    second = Node(first.disk, "second")
    assert second.held == {"a", "c"}
    assert {each.id for each in second.connect().held} == {"a", "c"}
    second.happen(InventoryRead(second.now, inventory(0, 1)))
    second.hold(allocation("d", 0))
    assert "held exclusively by allocation a" in second.frames[-1].refusals[0].reason


def test_gpus_keep_their_numbers_over_a_restart() -> None:
    node = Node().ready()
    assert GpuNumbered("GPU-1", 2) in node.disk


def test_the_same_events_give_the_same_actions() -> None:
    def story() -> tuple[list[Frame], list[Hello], list[Record]]:
        node = Node().ready()
        node.hold(allocation("a", 0))
        node.hold(allocation("b", 1, memory=GIB))
        node.drop("a")
        node.read_processes(ProcessSeen("GPU-1", 7))
        node.happen(LinkDown(node.now, "reset"))
        node.tick()
        node.connect()
        return node.frames, node.hellos, node.disk

    assert story() == story()
