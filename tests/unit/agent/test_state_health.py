"""The node's state by stories: what is seen of a GPU's health, and what is told and kept of it."""

from dataclasses import replace

from tests.support.node import GIB, Node, inventory, reading

from stoker.agent.actions import SaveJournal
from stoker.agent.events import (
    DriverChanged,
    FaultsForgiven,
    InventoryRead,
    JournalSaved,
    KernelLogChanged,
    KernelLogRead,
    ProcessesTaken,
    ProcessReadingBegun,
    ReleaseTimePassed,
    ResumeAsked,
    SampleTaken,
)
from stoker.agent.facts import Fact
from stoker.agent.model import DriverState, DriverStatus, Frame, ProcessSeen
from stoker.agent.readings import Inventory, XidSeen
from stoker.agent.records import FaultNoted, KernelLogTaken
from stoker.agent.verdicts import (
    Check,
    GpuHealth,
    KernelLine,
    KernelLogPosition,
    KernelLogStatus,
    RepairAction,
    Verdict,
)

ADDRESS = "00000000:3B:00.0"
OFF_THE_BUS = "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python, GPU has fallen off the bus."


def at_address(node_inventory: Inventory) -> Inventory:
    """Return the inventory with its first GPU at ADDRESS."""
    first, *others = node_inventory.gpus
    return replace(node_inventory, gpus=(replace(first, pci_bus_id=ADDRESS), *others))


def sample(node: Node, *xids: int) -> None:
    """Read both GPUs; the first has these Xids."""
    node.now += 1.0
    seen = tuple(XidSeen(node.now, xid) for xid in xids)
    told = (reading(0, node.now), reading(1, node.now))
    first, second = (
        replace(each, facts={**each.facts, Fact.MEMORY_RESERVED_BYTES: 0.0}) for each in told
    )
    readings = (replace(first, xids=seen), second)
    node.happen(SampleTaken(node.now, readings))


def verdicts(node: Node) -> dict[str, Verdict]:
    return {each.uuid: each.verdict for each in node.state.view().health}


def told(frames: list[Frame]) -> tuple[GpuHealth, ...] | None:
    """Return the verdicts that were told last."""
    return next((each.health for each in reversed(frames) if each.health is not None), None)


def test_a_verdict_is_noted_down_and_told_with_the_next_frame() -> None:
    node = Node().ready()
    sample(node)
    before = len(node.frames)
    sample(node, 79)
    (fault,) = [each.fault for each in node.disk if isinstance(each, FaultNoted)]
    assert (fault.uuid, fault.code) == ("GPU-0", "79")
    assert node.frames[before].health is not None
    assert verdicts(node) == {"GPU-0": Verdict.UNHEALTHY, "GPU-1": Verdict.HEALTHY}
    sample(node)
    assert node.frames[-1].health is None, "told though nothing changed"


def test_every_stream_is_told_all_verdicts() -> None:
    node = Node().ready()
    sample(node, 79)
    known = told(node.frames)
    node.reconnect()
    assert told(node.frames[-2:]) == known


def test_a_restart_gives_the_same_verdict() -> None:
    node = Node().ready()
    sample(node, 79)
    before = node.state.view().health
    again = Node(node.disk, process_id="second", now=node.now)
    again.happen(InventoryRead(again.now, inventory(0, 1)))
    assert again.state.view().health == before


def test_a_disk_that_is_full_changes_no_verdict_and_is_said() -> None:
    node = Node().ready()
    node.disk_works = False
    sample(node, 79)
    assert verdicts(node)["GPU-0"] is Verdict.UNHEALTHY
    assert node.state.view().health_unsaved == "no room"
    node.disk_works = True
    for _ in range(100):
        sample(node)
    assert node.state.view().health_unsaved == ""
    again = Node(node.disk, process_id="second", now=node.now)
    assert verdicts(again)["GPU-0"] is Verdict.UNHEALTHY, "it was written once there was room"


def test_on_a_disk_that_hangs_nothing_piles_up_and_nothing_is_lost() -> None:
    node = Node().ready()
    sample(node)
    node.disk_answers = False
    for minute in range(100):
        sample(node, 79, 31)
        node.now += 60.0
        node.happen(FaultsForgiven(node.now, "GPU-0", f"{minute}"))
    sample(node, 48)
    noted = [each for each in node.unanswered if isinstance(each.records[0], FaultNoted)]
    assert len(noted) == 1
    node.disk_answers = True
    for save in node.unanswered:
        node.disk.extend(save.records)
        node.happen(JournalSaved(node.now, save.ticket))
    again = Node(node.disk, process_id="second", now=node.now)
    assert again.view.health[0] == node.view.health[0]
    assert [(each.check, each.code) for each in again.view.health[0].faults] == [(Check.XID, "48")]


def test_the_kernels_log_is_taken_in_once_and_remembered() -> None:
    node = Node().ready()
    node.happen(InventoryRead(node.now, at_address(inventory(0, 1))))
    sample(node)
    line = KernelLine(17, node.now, OFF_THE_BUS)
    node.happen(KernelLogRead(node.now, (line,)))
    (judged, _) = node.state.view().health
    assert (judged.verdict, judged.action) == (Verdict.UNHEALTHY, RepairAction.REBOOT)
    assert told(node.frames) == node.state.view().health, "told at once, not with the next sample"
    assert KernelLogTaken(KernelLogPosition("boot", 17)) in node.disk
    node.happen(KernelLogRead(node.now, (line,)))
    assert node.state.view().health == (judged, node.state.view().health[1])
    assert node.state.view().kernel_log_position == KernelLogPosition("boot", 17)


def test_whether_the_kernels_log_is_followed_is_seen() -> None:
    node = Node().ready()
    status = KernelLogStatus(is_followed=True, source="helper", reason="")
    node.happen(KernelLogChanged(node.now, status))
    assert node.state.view().kernel_log == status


def test_a_gpu_that_is_gone_is_missed_until_somebody_says_that_it_is_gone_for_good() -> None:
    node = Node().ready()
    sample(node)
    node.happen(InventoryRead(node.now, inventory(0)))
    seen = node.state.view().inventory
    assert seen is not None
    (missing,) = seen.missing
    assert (missing.uuid, missing.error_kind) == ("GPU-1", "gpu_missing")
    assert verdicts(node)["GPU-1"] is Verdict.UNHEALTHY
    again = Node(node.disk, process_id="second", now=node.now)
    again.happen(InventoryRead(again.now, inventory(0)))
    restarted = again.state.view().inventory
    assert restarted is not None
    assert restarted.missing == seen.missing
    again.happen(FaultsForgiven(again.now, "GPU-1", "root"))
    after = again.state.view().inventory
    assert after is not None
    assert after.missing == ()
    assert verdicts(again).keys() == {"GPU-0"}


def test_while_the_driver_does_not_answer_a_gpu_that_was_well_is_unknown() -> None:
    node = Node().ready()
    sample(node)
    for _ in range(10):
        node.now += 1.0
        node.happen(DriverChanged(node.now, DriverStatus(DriverState.BLOCKED, f"{node.now}")))
    assert set(verdicts(node).values()) == {Verdict.UNKNOWN}
    node.happen(DriverChanged(node.now, DriverStatus(DriverState.READING)))
    sample(node)
    assert set(verdicts(node).values()) == {Verdict.HEALTHY}


def test_while_the_driver_is_released_a_gpu_that_was_well_is_unknown() -> None:
    node = Node().ready()
    sample(node)
    node.release()
    node.frames.clear()
    for _ in range(100):
        node.now += 1.0
        node.happen(ReleaseTimePassed(node.now))
    assert set(verdicts(node).values()) == {Verdict.UNKNOWN}
    assert {each.reason.partition("; ")[0] for each in node.view.health} == {
        "not read: the driver is released by root"
    }
    assert len([frame for frame in node.frames if frame.health is not None]) == 1
    node.happen(ResumeAsked(node.now, "root"))
    node.happen(DriverChanged(node.now, DriverStatus(DriverState.READING)))
    sample(node)
    assert set(verdicts(node).values()) == {Verdict.HEALTHY}


def test_memory_that_no_process_accounts_for_is_told_until_nothing_is_known() -> None:
    node = Node().ready()
    sample(node)
    node.happen(ProcessReadingBegun(node.now))
    seen = ProcessSeen("GPU-0", 4711, memory_used_bytes=GIB // 4)
    node.happen(ProcessesTaken(node.now, node.now, (seen,)))
    assert node.state.view().memory_unattributed_bytes == {}, "the use afterwards is not known"
    sample(node)
    assert node.state.view().memory_unattributed_bytes == {"GPU-0": 3 * GIB // 4, "GPU-1": GIB}
    node.happen(DriverChanged(node.now, DriverStatus(DriverState.FAILED, "gone")))
    assert node.state.view().memory_unattributed_bytes == {}


def test_a_healthy_node_writes_nothing_about_health_as_time_passes() -> None:
    node = Node().ready()
    sample(node)
    written = len(node.disk)
    for _ in range(1000):
        sample(node)
    assert node.disk[written:] == []
    assert not any(isinstance(each, SaveJournal) for each in node.unanswered)
