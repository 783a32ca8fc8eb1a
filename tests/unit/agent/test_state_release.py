"""The node's state by stories: letting go of the driver, and taking it again."""

import pytest
from tests.support.node import READING, Node, allocation, held_in, inventory, reading

from stoker.agent.actions import ReadProcesses, ReleaseDriver, ResumeDriver
from stoker.agent.events import (
    DriverChanged,
    InventoryRead,
    JournalFailed,
    JournalSaved,
    ProcessesTaken,
    ProcessReadingBegun,
    ProcessReadingFailed,
    ReleaseTimePassed,
    SampleTaken,
)
from stoker.agent.model import DriverState, DriverStatus, ProcessSeen, Release
from stoker.agent.records import DriverReleased, DriverResumed, Durable

RELEASED = DriverStatus(DriverState.RELEASED, "released by root")
TRAIN = ProcessSeen("GPU-0", 42, user="ann", command="train")


def restarted(node: Node, later: float = 0.0) -> Node:
    """The process dies and another one begins with what is on the disk."""
    return Node(node.disk, process_id="second", now=node.now + later)


# --- begun, and durable


def test_a_release_begins_at_once_and_is_noted_down() -> None:
    node = Node().ready()
    assert ReleaseDriver() in node.release(600.0)
    release = Release(node.now, node.now + 600.0, "root")
    assert node.disk[-1] == DriverReleased(release)
    assert (node.view.release, node.view.release_unsaved) == (release, "")


def test_until_it_is_on_disk_it_is_said_that_a_restart_would_undo_it() -> None:
    node = Node().ready()
    node.disk_answers = False
    node.release()
    assert node.view.release is not None
    assert node.view.release_unsaved == "it is being noted down"
    node.answer_saves()
    assert node.view.release_unsaved == ""


def test_on_a_full_disk_it_is_released_and_said_that_a_restart_would_undo_it() -> None:
    node = Node().ready()
    node.disk_works = False
    assert ReleaseDriver() in node.release()
    assert node.view.release is not None
    assert node.view.release_unsaved == "no room"
    assert restarted(node).view.release is None
    node.disk_works = True
    node.release()
    assert node.view.release_unsaved == ""
    assert restarted(node).view.release is not None


def test_on_a_full_disk_it_is_resumed_and_said_that_a_restart_would_undo_it() -> None:
    node = Node().ready()
    node.release()
    node.disk_works = False
    assert ResumeDriver() in node.resume()
    assert (node.view.release, node.view.release_unsaved) == (None, "no room")
    assert restarted(node).view.release is not None
    node.disk_works = True
    node.resume()
    assert node.view.release_unsaved == ""
    assert restarted(node).view.release is None


def test_asked_again_the_newest_word_counts() -> None:
    node = Node().ready()
    node.release(600.0)
    node.release(None, by="ann")
    assert node.view.release == Release(node.now, None, "ann")
    assert restarted(node).view.release == node.view.release


def test_resumed_before_the_release_is_on_disk() -> None:
    node = Node().ready()
    node.disk_answers = False
    node.release()
    assert ResumeDriver() in node.resume()
    first, second = node.unanswered
    node.happen(JournalSaved(node.now, first.ticket))
    assert (node.view.release, bool(node.view.release_unsaved)) == (None, True)
    node.happen(JournalSaved(node.now, second.ticket))
    assert (node.view.release, node.view.release_unsaved) == (None, "")


def test_resumed_before_the_release_is_refused_by_the_disk() -> None:
    node = Node().ready()
    node.disk_answers = False
    node.release()
    node.resume()
    first, second = node.unanswered
    node.happen(JournalFailed(node.now, first.ticket, "no room"))
    assert node.view.release_unsaved == "", "what is on disk says what is so"
    node.happen(JournalSaved(node.now, second.ticket))
    assert node.view.release_unsaved == ""


def test_resuming_what_is_not_released_does_nothing() -> None:
    node = Node().ready()
    disk = list(node.disk)
    assert node.resume() == []
    assert node.disk == disk


# --- its end


def test_it_ends_with_its_time_and_not_before() -> None:
    node = Node().ready()
    node.release(600.0)
    node.now += 599.0
    assert node.happen(ReleaseTimePassed(node.now)) == []
    node.now += 1.0
    assert node.happen(ReleaseTimePassed(node.now)) == [ResumeDriver()]
    assert node.view.release is None
    assert node.disk[-1] == DriverResumed()


def test_without_a_time_it_does_not_end() -> None:
    node = Node().ready()
    node.release()
    node.now += 1e9
    assert node.happen(ReleaseTimePassed(node.now)) == []
    assert node.view.release is not None


def test_the_agent_that_starts_in_between_does_not_open_the_driver() -> None:
    node = Node().ready()
    node.release(600.0)
    second = restarted(node, later=599.0)
    assert second.asked_at_start == [ReleaseDriver()]
    assert second.view.release == node.view.release


def test_the_agent_that_starts_when_its_time_is_over_takes_the_driver() -> None:
    node = Node().ready()
    node.release(600.0)
    second = restarted(node, later=600.0)
    assert second.asked_at_start == []
    assert second.view.release is None
    assert Durable().after(second.disk).release is None


def test_only_what_lasts_is_left_in_a_compacted_journal() -> None:
    node = Node().ready()
    node.release()
    assert DriverReleased(Release(node.now, None, "root")) in Durable().after(node.disk).records()
    node.resume()
    kept = {type(each) for each in Durable().after(node.disk).records()}
    assert not kept & {DriverReleased, DriverResumed}, "an older agent can read it again"


# --- while it lasts


def test_nothing_that_was_read_is_told_any_more() -> None:
    node = Node().ready()
    node.read_processes(TRAIN)
    node.tick()
    node.frames.clear()
    node.release()
    node.happen(DriverChanged(node.now, RELEASED))
    assert (node.view.samples, node.view.telemetry) == ((), ())
    tables = [frame.processes for frame in node.frames if frame.processes]
    assert [(table.processes, table.unread_gpu_uuids) for table in tables] == [
        ((), ("GPU-0", "GPU-1"))
    ]
    assert [frame.driver for frame in node.frames if frame.driver] == [RELEASED]


def test_what_was_under_way_when_it_began_is_not_told() -> None:
    node = Node().ready()
    node.read_processes()
    node.happen(ProcessReadingBegun(node.now))
    node.release()
    node.frames.clear()
    samples = node.view.samples_total
    node.happen(SampleTaken(node.now, (reading(0, node.now),)))
    node.happen(ProcessesTaken(node.now, node.now, (TRAIN,)))
    assert node.view.samples == ()
    assert node.view.samples_total == samples
    assert node.view.processes is not None
    assert node.view.processes.processes == ()
    assert [frame for frame in node.frames if frame.samples] == []


def test_what_is_held_stays_held_and_is_told_to_a_new_stream() -> None:
    node = Node().ready()
    node.hold(allocation("a", 0))
    node.release()
    hello = node.reconnect()
    assert [each.id for each in hello.held] == ["a"]
    assert held_in(node.frames[-1]) == {"a"}


def test_letting_go_of_an_allocation_waits_for_the_driver() -> None:
    node = Node().ready()
    node.hold(allocation("a", 0))
    node.happen(ProcessReadingBegun(node.now))
    node.drop("a")
    node.release()
    node.happen(DriverChanged(node.now, RELEASED))
    node.happen(ProcessesTaken(node.now, node.now, ()))
    node.happen(ProcessReadingBegun(node.now))
    node.happen(ProcessesTaken(node.now, node.now, ()))
    assert node.held == {"a"}
    assert [each.is_leaving for each in node.reconnect().held] == [True]
    node.resume()
    assert ReadProcesses() in node.happen(DriverChanged(node.now, READING))
    node.read_processes()
    assert node.held == set()


def test_a_drop_of_what_is_not_held_waits_for_the_driver_too() -> None:
    node = Node().ready()
    node.release()
    node.drop("a")
    node.reconnect()
    node.drop("a")
    node.happen(ProcessReadingBegun(node.now))
    node.happen(ProcessesTaken(node.now, node.now, ()))
    assert node.frames[-1].commands_done == 0
    node.resume()
    node.read_processes()
    assert node.frames[-1].commands_done == 1


def test_a_hold_is_kept_by_what_is_known_of_the_gpus() -> None:
    node = Node().ready()
    node.release()
    node.hold(allocation("a", 0))
    assert node.held == {"a"}


def test_a_hold_waits_when_the_agent_started_in_between() -> None:
    node = Node().ready()
    node.release()
    second = restarted(node)
    second.connect()
    second.hold(allocation("a", 0))
    assert second.held == set()
    second.resume()
    second.happen(InventoryRead(second.now, inventory(0, 1)))
    assert second.held == {"a"}


def test_once_resumed_it_is_told_as_before() -> None:
    node = Node().ready()
    node.release(600.0)
    node.happen(DriverChanged(node.now, RELEASED))
    node.resume()
    assert ReadProcesses() in node.happen(DriverChanged(node.now, READING))
    node.frames.clear()
    node.tick()
    node.read_processes(TRAIN)
    node.tick()
    assert all(len(frame.samples) == 2 for frame in node.frames)
    assert node.frames[-1].processes is not None
    assert [each.process for each in node.frames[-1].processes.processes] == [TRAIN]


# --- processes that cannot be read, for whatever reason


@pytest.mark.parametrize("state", set(DriverState) - {DriverState.READING})
def test_who_uses_the_gpus_is_unknown_when_the_driver_is(state: DriverState) -> None:
    node = Node().ready()
    node.read_processes(TRAIN)
    node.tick()
    node.frames.clear()
    node.happen(DriverChanged(node.now, DriverStatus(state, "gone")))
    (frame,) = node.frames
    assert node.view.processes_monotonic_seconds is None
    assert frame.processes is not None
    assert frame.processes.processes == ()
    assert frame.processes.unread_gpu_uuids == ("GPU-0", "GPU-1")
    assert ReadProcesses() in node.happen(DriverChanged(node.now, READING))


def test_who_uses_the_gpus_is_unknown_once_a_reading_failed_and_said_once() -> None:
    node = Node().ready()
    node.read_processes(TRAIN)
    node.tick()
    node.frames.clear()
    for _ in range(3):
        node.happen(ProcessReadingBegun(node.now))
        node.happen(ProcessReadingFailed(node.now, "blocked"))
    (frame,) = node.frames
    assert frame.processes is not None
    assert frame.processes.unread_gpu_uuids == ("GPU-0", "GPU-1")
    node.read_processes(TRAIN)
    node.tick()
    told = node.frames[-1].processes
    assert told is not None
    assert [each.process for each in told.processes] == [TRAIN]


def test_before_the_first_reading_nothing_is_said_about_processes() -> None:
    node = Node()
    node.happen(InventoryRead(node.now, inventory(0)))
    node.connect()
    node.happen(ProcessReadingBegun(node.now))
    node.happen(ProcessReadingFailed(node.now, "blocked"))
    node.tick(0)
    assert all(frame.processes is None for frame in node.frames)
