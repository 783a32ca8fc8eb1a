"""The node's state by stories: sampling, holding, letting go, processes."""

import pytest
from tests.support.node import GIB, Node, allocation, held_in, inventory

from stoker.agent.actions import (
    ReadInventory,
    ReadProcesses,
    SaveJournal,
    SendFrame,
)
from stoker.agent.events import (
    DriverChanged,
    InventoryRead,
    ProcessesTaken,
    ProcessReadingBegun,
    ProcessReadingFailed,
    SampleTaken,
    SamplingFailed,
)
from stoker.agent.model import (
    DriverState,
    DriverStatus,
    HeldAllocation,
    HoldRefusal,
    ProcessSeen,
)
from stoker.agent.readings import GpuReading
from stoker.agent.records import (
    AllocationDropped,
    AllocationHeld,
    IncarnationBegun,
    SequencesReserved,
)
from stoker.agent.saving import SEQUENCES_RESERVED_AT_ONCE
from stoker.agent.state import PROCESSES_RESEND_SECONDS, WAITING_MAX

# --- start, sampling


def test_a_new_journal_begins_a_life_named_after_the_process() -> None:
    node = Node()
    assert node.disk == [IncarnationBegun("first"), SequencesReserved(4001)]
    assert node.state.view().incarnation == "first"


def test_a_later_process_goes_on_with_the_life_and_above_its_numbers() -> None:
    first = Node().ready()
    first.tick()
    second = Node(first.disk, process_id="second").ready()
    second.tick()
    assert second.state.view().incarnation == "first"
    assert second.frames[0].sequence > first.frames[-1].sequence
    assert second.hellos[0].incarnation == "first"
    assert second.hellos[0].identity.process_id == "second"


def test_numbers_are_reserved_on_disk_before_they_are_used() -> None:
    node = Node().ready()
    for _ in range(2 * SEQUENCES_RESERVED_AT_ONCE):
        node.tick()
        node.ack()
        reserved = max(r.below for r in node.disk if isinstance(r, SequencesReserved))
        assert node.frames[-1].sequence < reserved
    assert sum(isinstance(r, SequencesReserved) for r in node.disk) < 8


def test_a_full_disk_does_not_stop_telemetry_and_is_tried_again_later() -> None:
    node = Node().ready()
    node.disk_works = False
    for _ in range(SEQUENCES_RESERVED_AT_ONCE + 10):
        node.tick()
        node.ack()
    assert node.frames[-1].sequence > SEQUENCES_RESERVED_AT_ONCE
    node.disk_works = True
    for _ in range(61):
        node.tick()
    reserved = max(r.below for r in node.disk if isinstance(r, SequencesReserved))
    assert node.frames[-1].sequence < reserved


def test_a_tick_is_one_frame_with_the_gpus_that_were_read_and_nothing_else() -> None:
    node = Node().ready()
    node.tick(1)
    (frame,) = node.frames
    assert [(s.number, s.sample.uuid) for s in frame.samples] == [(2, "GPU-1")]
    assert frame.is_telemetry_only
    assert frame.at == node.now


def test_gpu_numbers_are_kept_and_never_given_to_another() -> None:
    node = Node().ready(0, 1)
    node.happen(InventoryRead(node.now, inventory(1)))
    node.happen(InventoryRead(node.now, inventory(1, 2)))
    numbers = {g.identity.uuid: g.number for g in node.frames[-1].inventory.gpus}  # type: ignore[union-attr]
    assert numbers == {"GPU-1": 2, "GPU-2": 3}
    again = Node(node.disk, "second")
    again.happen(InventoryRead(again.now, inventory(2, 3, 0)))
    told = again.connect().inventory
    assert told is not None
    assert {g.identity.uuid: g.number for g in told.gpus} == {"GPU-2": 3, "GPU-3": 4, "GPU-0": 1}


def test_a_sample_of_an_unknown_gpu_asks_for_the_inventory() -> None:
    node = Node().ready(0)
    assert ReadInventory() in node.tick(0, 1)
    assert [s.number for s in node.frames[-1].samples] == [1]
    assert ReadInventory() not in node.tick(0)


def test_a_failed_tick_shows_no_values_and_is_counted_by_kind() -> None:
    node = Node().ready()
    node.tick()
    assert len(node.state.view().samples) == 2
    before = len(node.frames)
    node.happen(SamplingFailed(node.now, "driver_timeout", "it hangs"))
    view = node.state.view()
    assert view.samples == ()
    assert view.sample_failures == {"driver_timeout": 1}
    assert len(node.frames) == before


def test_a_tick_in_which_no_gpu_was_read_is_a_failure() -> None:
    node = Node().ready()
    total = node.state.view().samples_total
    node.happen(
        SampleTaken(node.now, (GpuReading("GPU-0", node.now), GpuReading("GPU-1", node.now)))
    )
    view = node.state.view()
    assert (view.samples, view.samples_total) == ((), total)
    assert view.sample_failures == {"no_gpu_read": 1}


def test_a_driver_that_blocks_is_told_at_once_and_once() -> None:
    node = Node().ready()
    blocked = DriverStatus(DriverState.BLOCKED, "GPU-1: nvmlDeviceGetPowerUsage", 1)
    node.happen(DriverChanged(node.now, blocked))
    node.happen(DriverChanged(node.now, blocked))
    assert [frame.driver for frame in node.frames] == [blocked]
    assert node.state.view().samples == ()


# --- holding


def test_a_hold_is_on_disk_before_it_is_reported() -> None:
    node = Node().ready()
    node.disk_answers = False
    asked = node.hold(allocation("a", 0))
    assert asked == [SaveJournal(node.unanswered[0].ticket, node.unanswered[0].records)]
    assert node.unanswered[0].records == (AllocationHeld(allocation("a", 0, since=node.now)),)
    assert (node.held, node.frames) == (set(), [])
    asked = node.answer_saves()
    assert node.held == {"a"}
    (frame,) = node.frames
    assert asked == [SendFrame(frame)]
    assert frame.held == (allocation("a", 0, since=node.now),)
    assert frame.commands_done == 1


def test_a_hold_that_is_repeated_changes_nothing_and_is_confirmed_again() -> None:
    node = Node().ready()
    node.hold(allocation("a", 0))
    disk, frame = list(node.disk), node.frames[-1]
    node.now += 5
    node.hold(allocation("a", 0))
    assert node.disk == disk
    assert node.frames[-1].held == frame.held
    assert node.frames[-1].commands_done == 2


def test_a_hold_that_is_repeated_while_it_is_being_journaled_is_one_hold() -> None:
    node = Node().ready()
    node.disk_answers = False
    node.hold(allocation("a", 0))
    assert node.hold(allocation("a", 0)) == []
    node.answer_saves()
    assert [each.id for each in node.state.view().held] == ["a"]
    assert node.frames[-1].commands_done == 2


@pytest.mark.parametrize(
    ("held", "wanted", "reason"),
    [
        ([], allocation("a", 7), "GPU-7 is not on this node, which has GPU-0, GPU-1"),
        ([], allocation("a"), "it names no GPU"),
        ([], allocation("a", 0, 0), "it names a GPU twice: GPU-0, GPU-0"),
        ([], allocation("a", 0, 1, memory=GIB), "a share is of one GPU, and it names 2"),
        ([], allocation("a", 0, memory=17 * GIB), "GPU-0: wanted 17 GiB, 16 GiB left"),
        (
            [allocation("b", 0)],
            allocation("a", 0),
            "GPU-0 is held exclusively by allocation b of 'ann'",
        ),
        (
            [allocation("b", 0)],
            allocation("a", 1, 0),
            "GPU-0 is held exclusively by allocation b of 'ann'",
        ),
        (
            [allocation("b", 0)],
            allocation("a", 0, memory=GIB),
            "GPU-0 is held exclusively by allocation b of 'ann'",
        ),
        (
            [allocation("b", 0, memory=GIB)],
            allocation("a", 0),
            "GPU-0 is held in part by allocation b of 'ann'",
        ),
        (
            [allocation("b", 0, memory=10 * GIB), allocation("c", 0, memory=4 * GIB)],
            allocation("a", 0, memory=3 * GIB),
            "GPU-0: wanted 3 GiB, 2 GiB left",
        ),
        (
            [allocation("a", 0)],
            allocation("a", 1),
            "the node holds it with other devices",
        ),
    ],
)
def test_a_hold_is_refused_with_the_reason(
    held: list[HeldAllocation], wanted: HeldAllocation, reason: str
) -> None:
    node = Node().ready()
    for each in held:
        node.hold(each)
    disk = list(node.disk)
    node.hold(wanted)
    assert node.frames[-1].refusals == (HoldRefusal(wanted.id, reason),)
    assert node.frames[-1].commands_done == node.commands
    assert node.disk == disk
    node.tick()
    assert not node.frames[-1].refusals


def test_shares_fill_a_gpu_to_the_last_byte() -> None:
    node = Node().ready()
    for number in range(16):
        node.hold(allocation(f"a{number}", 0, memory=GIB))
    assert len(node.held) == 16
    node.hold(allocation("more", 0, memory=1))
    assert node.frames[-1].refusals[0].reason == "GPU-0: wanted 1 B, 0 B left"


def test_what_is_being_journaled_counts_against_the_next_hold() -> None:
    node = Node().ready()
    node.disk_answers = False
    node.hold(allocation("a", 0))
    node.hold(allocation("b", 0))
    assert "held exclusively by allocation a" in node.frames[-1].refusals[0].reason
    assert node.frames[-1].commands_done == 0  # the first is under way still
    node.answer_saves()
    assert node.frames[-1].commands_done == 2


def test_a_hold_that_cannot_be_journaled_is_refused_and_leaves_nothing() -> None:
    node = Node().ready()
    node.disk_works = False
    node.hold(allocation("a", 0))
    assert node.frames[-1].refusals == (HoldRefusal("a", "the node cannot note it down: no room"),)
    assert node.held == set()
    node.disk_works = True
    node.hold(allocation("b", 0))
    assert node.held == {"b"}


def test_a_hold_before_the_inventory_waits_for_it() -> None:
    node = Node()
    node.connect()
    told = len(node.frames)
    assert node.hold(allocation("a", 0)) == []
    assert node.hold(allocation("b", 9)) == []
    node.happen(InventoryRead(node.now, inventory(0)))
    assert node.held == {"a"}
    refusals = [r for frame in node.frames[told:] for r in frame.refusals]
    assert [each.allocation_id for each in refusals] == ["b"]
    assert node.frames[-1].commands_done == 2


def test_too_many_holds_before_the_inventory_are_refused() -> None:
    node = Node()
    node.connect()
    for number in range(WAITING_MAX + 1):
        node.hold(allocation(f"a{number}", 0, memory=1))
    (refusal,) = node.frames[-1].refusals
    assert refusal.allocation_id == f"a{WAITING_MAX}"


# --- letting go


def test_a_drop_reads_processes_then_tells_both_in_one_frame() -> None:
    node = Node().ready()
    node.hold(allocation("a", 0))
    node.frames.clear()
    assert node.drop("a") == [ReadProcesses()]
    assert node.state.view().ending == {"a"}
    straggler = ProcessSeen("GPU-0", 42, claimed_allocation_id="a")
    node.read_processes(straggler)
    (frame,) = node.frames
    assert held_in(frame) == set()
    assert frame.processes is not None
    assert [(p.process.pid, p.allocation_id) for p in frame.processes.processes] == [(42, "")]
    assert frame.commands_done == 2
    assert node.disk[-1] == AllocationDropped("a")


def test_a_reading_that_began_before_the_drop_does_not_count() -> None:
    node = Node().ready()
    node.hold(allocation("a", 0))
    node.happen(ProcessReadingBegun(node.now))
    node.drop("a")
    node.happen(ProcessesTaken(node.now, node.now, ()))
    assert node.held == {"a"}
    node.read_processes()
    assert node.held == set()


@pytest.mark.parametrize(
    ("unread", "unnamed", "inventory_gpus", "expected"),
    [
        ((), False, (0, 1), set[str]()),
        (("GPU-1",), False, (0, 1), set[str]()),
        (("GPU-0",), False, (0, 1), {"a"}),
        ((), True, (0, 1), set[str]()),
        ((), True, (1,), {"a"}),
        ((), False, (1,), set[str]()),
    ],
    ids=[
        "all GPUs were read",
        "another GPU was not read",
        "its GPU was not read",
        "a GPU without a name was not read, and ours was",
        "a GPU without a name was not read, and it may be ours",
        "its GPU is gone from the machine",
    ],
)
def test_it_stays_held_until_its_own_gpus_were_read(
    unread: tuple[str, ...], unnamed: bool, inventory_gpus: tuple[int, ...], expected: set[str]
) -> None:
    node = Node().ready()
    node.hold(allocation("a", 0))
    node.drop("a")
    node.happen(InventoryRead(node.now, inventory(*inventory_gpus)))
    node.read_processes(unread=unread, unnamed=unnamed)
    assert node.held == expected


def test_it_stays_held_while_the_reading_fails_or_the_disk_is_full() -> None:
    node = Node().ready()
    node.hold(allocation("a", 0))
    node.drop("a")
    node.happen(ProcessReadingBegun(node.now))
    node.happen(ProcessReadingFailed(node.now, "blocked"))
    assert node.held == {"a"}
    node.disk_works = False
    node.read_processes()
    assert node.held == {"a"}
    node.disk_works = True
    node.read_processes()
    assert node.held == set()


def test_dropping_what_is_not_held_counts_once_processes_were_read() -> None:
    node = Node().ready()
    node.hold(allocation("b", 1))
    node.happen(ProcessReadingBegun(node.now))
    assert node.drop("a") == [ReadProcesses()]
    node.happen(ProcessesTaken(node.now, node.now, ()))
    node.tick()
    assert node.frames[-1].commands_done == 1, "that reading began before the drop"
    node.read_processes(ProcessSeen("GPU-0", 42, claimed_allocation_id="a"))
    frame = node.frames[-1]
    assert held_in(frame) == {"b"}
    assert frame.processes is not None
    assert [(p.process.pid, p.allocation_id) for p in frame.processes.processes] == [(42, "")]
    assert frame.commands_done == 2


def test_a_hold_that_failed_after_its_drop_is_told_as_held_until_processes_were_read() -> None:
    node = Node().ready()
    node.disk_answers = False
    node.hold(allocation("a", 0))
    node.reconnect()
    node.drop("a")
    node.read_processes()
    assert held_in(node.frames[-1]) == {"a"}
    assert ReadProcesses() in node.fail_saves()
    assert held_in(node.frames[-1]) == {"a"}
    node.read_processes()
    assert held_in(node.frames[-1]) == set()
    assert node.frames[-1].processes is not None


def test_what_is_being_journaled_since_before_the_stream_is_told_as_held() -> None:
    node = Node().ready()
    node.disk_answers = False
    node.hold(allocation("a", 0))
    node.reconnect()
    assert held_in(node.frames[-1]) == {"a"}
    node.fail_saves()
    assert held_in(node.frames[-1]) == set()
    assert [refusal.allocation_id for refusal in node.frames[-1].refusals] == ["a"]


def test_a_hold_of_what_is_ending_is_refused() -> None:
    node = Node().ready()
    node.hold(allocation("a", 0))
    node.drop("a")
    node.hold(allocation("a", 0))
    assert node.frames[-1].refusals == (HoldRefusal("a", "the node is letting go of it"),)


def test_a_drop_that_overtakes_the_journal_of_its_hold() -> None:
    node = Node().ready()
    node.disk_answers = False
    node.hold(allocation("a", 0))
    assert node.drop("a") == [ReadProcesses()]
    node.read_processes()
    assert node.frames == []
    assert ReadProcesses() in node.answer_saves()
    assert held_in(node.frames[-1]) == {"a"}
    assert node.frames[-1].commands_done == 2
    node.read_processes()
    assert held_in(node.frames[-1]) == set()


def test_a_command_that_is_under_way_holds_back_the_count_of_later_ones() -> None:
    node = Node().ready()
    node.disk_answers = False
    node.hold(allocation("a", 0))
    node.drop("b")
    node.read_processes()
    assert node.frames[-1].commands_done == 0
    node.answer_saves()
    assert node.frames[-1].commands_done == 2


# --- processes


def test_processes_are_told_when_they_change_and_sometimes_anyway() -> None:
    node = Node().ready()
    one = ProcessSeen("GPU-0", 42, user="ann", command="train")
    node.read_processes(one)
    node.tick()
    assert node.frames[-1].processes is not None
    node.read_processes(one)
    node.tick()
    assert node.frames[-1].processes is None
    node.now += PROCESSES_RESEND_SECONDS
    node.read_processes(one)
    node.tick()
    assert node.frames[-1].processes is not None
