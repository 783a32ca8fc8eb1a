"""The fleet by story: what nodes report, leases, drafts, snapshots."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.unit.aggregator.builders import (
    GIB,
    START,
    Scene,
    make_facts,
    make_gpus,
    make_process,
    make_samples,
    share,
    waiting_scene,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.model import (
    DriverState,
    Frame,
    GpuSample,
    HeldAllocation,
    MissingGpu,
    Request,
)
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.processes import ProcessTable
from stoker.aggregator.views import describe_foreign

# --- leases


def test_lease_runs_from_the_grant_for_its_ttl() -> None:
    scene = Scene(make_facts())
    mine = scene.grant(whole(ttl_seconds=60.0))
    assert scene.fleet.expires_at(mine.id) == START + 60.0
    assert scene.fleet.next_deadline() == START + 60.0
    assert scene.fleet.expired(START + 59.999) == []
    assert scene.fleet.expired(START + 60.0) == [mine.id]
    assert scene.fleet.expired(START + 60.0) == [mine.id], "until it is given up"


def test_keep_alive_extends_the_lease_by_its_ttl_from_then() -> None:
    scene = Scene(make_facts())
    mine = scene.grant(whole(ttl_seconds=60.0))
    for at in (START + 10.0, START + 50.0):
        scene.fleet.note(e.KeptAlive(at, mine.id))
    assert scene.fleet.expires_at(mine.id) == START + 110.0
    assert scene.fleet.expired(START + 109.0) == []
    assert scene.fleet.expired(START + 110.0) == [mine.id]


def test_keep_alive_of_a_clock_that_was_set_back_is_as_long() -> None:
    scene = Scene(make_facts())
    scene.grant(whole(ttl_seconds=30.0))
    mine = scene.grant(whole(ttl_seconds=60.0))
    scene.fleet.note(e.KeptAlive(START - 3600.0, mine.id))
    assert scene.fleet.expired(START - 3540.1) == []
    assert scene.fleet.expired(START - 3540.0) == [mine.id]


@pytest.mark.parametrize("state", ["waiting", "releasing", "ended", "unknown"])
def test_keep_alive_of_what_is_not_granted_changes_nothing(state: str) -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    if state == "waiting":
        mine = scene.wait(whole())
    elif state == "releasing":
        scene.release(mine.id)
    elif state == "ended":
        scene.hand_back(mine.id)
    scene.fleet.note(e.KeptAlive(START + 1.0, mine.id if state != "unknown" else "a99"))
    assert mine.id not in scene.fleet.expires or mine.state == "granted"
    assert scene.fleet.expires_at("a99") is None


def test_after_a_restart_every_lease_has_its_full_ttl() -> None:
    scene = Scene(make_facts())
    short = scene.grant(whole(ttl_seconds=10.0))
    long = scene.grant(whole(ttl_seconds=1000.0))
    for at in (START + 5.0, START + 500.0):
        scene.fleet.note(e.KeptAlive(at, short.id))
    for fleet in (Fleet.restored(scene.fleet.snapshot()), scene.replayed()):
        fleet.note(e.Recovered(START + 510.0))
        assert fleet.expires_at(short.id) == START + 520.0
        assert fleet.expires_at(long.id) == START + 1510.0
        assert fleet.expired(START + 519.9) == []
        assert fleet.expired(START + 520.0) == [short.id]


def test_nothing_is_decided_before_the_recovery() -> None:
    scene = Scene(make_facts())
    scene.grant(whole())
    fleet = Fleet.restored(scene.fleet.snapshot())
    with pytest.raises(AssertionError, match="before Recovered"):
        fleet.draft()
    fleet.note(e.Recovered(START))
    assert fleet.draft().version == fleet.version


def test_next_deadline_is_the_first_of_leases_and_waits() -> None:
    scene = Scene(make_facts(gpus=1))
    assert scene.fleet.next_deadline() is None
    mine = scene.grant(whole(ttl_seconds=60.0))
    scene.wait(whole(), wait_seconds=30.0)
    assert scene.fleet.next_deadline() == START + 30.0
    scene.fleet.note(e.KeptAlive(START + 25.0, mine.id))
    scene.now += 30.0
    scene.decide()
    assert scene.fleet.next_deadline() == START + 85.0


# --- what nodes report


def test_reports_of_a_stream_that_was_replaced_change_nothing() -> None:
    scene = Scene(make_facts())
    old = scene.fleet.status("n1").session
    scene.connect("n1")
    before = scene.fleet.status("n1")
    late = Frame(99, START, START, driver=DriverState.FAILED, held=())
    scene.fleet.note(e.FrameArrived(START, "n1", old, late, START))
    scene.fleet.note(e.AgentDisconnected(START, "n1", old, "late"))
    scene.fleet.note(e.CommandsSent(START, "n1", old, ()))
    assert scene.fleet.status("n1") == before


def test_frame_that_was_taken_in_before_changes_nothing() -> None:
    scene = Scene(make_facts())
    session = scene.fleet.status("n1").session
    before = scene.fleet.status("n1")
    again = Frame(before.acked_sequence, START, START, driver=DriverState.FAILED)
    scene.fleet.note(e.FrameArrived(START, "n1", session, again, START))
    assert scene.fleet.status("n1") == before


def test_what_a_frame_leaves_out_has_not_changed() -> None:
    scene = Scene(make_facts(gpus=1))
    table = ProcessTable(START, (make_process("n1-0"),))
    scene.frame("n1", processes=table)
    scene.frame("n1", driver=DriverState.BLOCKED, driver_reason="no answer")
    status = scene.fleet.status("n1")
    assert (status.processes, status.driver_reason) == (table, "no answer")
    scene.frame("n1")
    later = scene.fleet.status("n1")
    assert replace(later, acked_sequence=status.acked_sequence) == status


def test_after_a_reconnect_only_telemetry_is_still_known() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.frame("n1", processes=ProcessTable(START, ()), driver=DriverState.READING)
    scene.disconnect("n1")
    scene.connect("n1")
    status = scene.fleet.status("n1")
    assert (status.driver, status.processes) == (DriverState.STARTING, None)
    assert status.samples is not None
    assert status.last_sample_at == START
    assert scene.view().nodes["n1"].free_gpus == 0
    scene.report("n1")
    assert scene.view().nodes["n1"].free_gpus == 1


def test_older_samples_do_not_replace_newer_ones() -> None:
    scene = Scene(make_facts(gpus=1))
    old = make_samples(make_gpus("n1", 1), reserved_bytes=7)
    status = scene.fleet.status("n1")
    frame = Frame(status.acked_sequence + 1, START, START, samples=old)
    scene.fleet.note(e.FrameArrived(START + 1.0, "n1", status.session, frame, START - 60.0))
    assert scene.fleet.status("n1").last_sample_at == START
    assert scene.fleet.status("n1").samples == make_samples(make_gpus("n1", 1))


def test_sample_is_never_newer_than_its_arrival() -> None:
    scene = Scene(make_facts(gpus=1))
    status = scene.fleet.status("n1")
    samples = make_samples(make_gpus("n1", 1))
    frame = Frame(status.acked_sequence + 1, START, START, samples=samples)
    scene.fleet.note(e.FrameArrived(START, "n1", status.session, frame, START + 3600.0))
    assert scene.fleet.status("n1").last_sample_at == START
    assert scene.fleet.fresh_until["n1"] == START + 3.0


def test_refusals_are_kept_for_what_the_ledger_wants_and_until_a_reconnect() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.obey("n1")
    scene.refuse("n1", "a99", "unknown")
    scene.refuse("n1", mine.id, "no such GPU")
    assert scene.fleet.status("n1").refusals == {mine.id: "no such GPU"}
    scene.connect("n1")
    assert scene.fleet.status("n1").refusals is None


def test_commands_done_are_counted_anew_on_every_stream() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.grant(whole())
    scene.obey("n1")
    assert scene.fleet.status("n1").commands_done == 1
    scene.connect("n1")
    assert scene.fleet.status("n1").commands_done == 0
    assert scene.fleet.sent["n1"] == {}


def test_commands_of_what_is_over_are_not_remembered() -> None:
    scene = Scene(make_facts(gpus=1))
    for _ in range(5):
        mine = scene.grant(whole())
        scene.obey("n1")
        scene.hand_back(mine.id)
    last = scene.grant(whole())
    scene.obey("n1")
    assert scene.fleet.sent["n1"].keys() == {last.id}


@pytest.mark.parametrize(
    ("parts", "is_news"),
    [
        pytest.param({}, False, id="samples as before"),
        pytest.param({"processes": ProcessTable(START + 5.0, ())}, False, id="the same processes"),
        pytest.param(
            {"processes": ProcessTable(START, (make_process("n1-0"),))}, True, id="other processes"
        ),
        pytest.param({"driver": DriverState.BLOCKED}, True, id="another driver state"),
        pytest.param({"driver": DriverState.READING}, False, id="the same driver state"),
        pytest.param(
            {"samples": make_samples(make_gpus("n1", 2), reserved_bytes=1)}, True, id="reserved"
        ),
        pytest.param({"samples": make_samples(make_gpus("n1", 1))}, True, id="a card less"),
    ],
)
def test_those_who_wait_are_looked_at_when_something_changed(
    parts: dict[str, object], is_news: bool
) -> None:
    scene = Scene(make_facts(gpus=2))
    before = scene.fleet.capacity_version
    scene.frame("n1", **{"samples": make_samples(make_gpus("n1", 2)), **parts})
    assert (scene.fleet.capacity_version > before) is is_news


def test_those_who_wait_are_looked_at_when_a_card_can_be_read_again() -> None:
    scene = Scene(make_facts(gpus=1))
    for sample in (GpuSample(), GpuSample(power_watts=70.0)):
        before = scene.fleet.capacity_version
        scene.frame("n1", samples={"n1-0": sample})
        assert scene.fleet.capacity_version > before


def give_back(scene: Scene) -> None:
    scene.record(e.AllocationEnded(scene.now, "a1", "released"))


def leave_the_queue(scene: Scene) -> None:
    scene.release("a2")


def uncordon(scene: Scene) -> None:
    scene.record(e.NodeUncordoned(scene.now, "n1"))


def come_on_the_line(scene: Scene) -> None:
    scene.fleet.note(e.WaiterAttached(scene.now, "a2"))


def get_more_gpus(scene: Scene) -> None:
    scene.change_facts("n1", gpus=make_gpus("n1", 2))


@pytest.mark.parametrize(
    "happens", [give_back, leave_the_queue, uncordon, come_on_the_line, get_more_gpus]
)
def test_those_who_wait_are_looked_at_when_they_might_fit(
    happens: Callable[[Scene], None],
) -> None:
    scene = Scene(make_facts(gpus=1))
    scene.grant(whole())
    scene.obey("n1")
    scene.release("a1")
    scene.wait(whole())
    before = scene.fleet.capacity_version
    happens(scene)
    assert scene.fleet.capacity_version > before


def test_those_who_wait_are_looked_at_when_a_stale_node_is_fresh_again() -> None:
    scene = Scene(make_facts(gpus=2))
    before = scene.fleet.capacity_version
    scene.later(1.0)
    assert scene.fleet.capacity_version == before
    scene.later(10.0)
    assert scene.fleet.capacity_version > before


# --- GPUs that come, go and move

LOST = MissingGpu(0, "n1-0", "gpu_lost", "it fell off the bus")


def test_node_that_was_stale_when_it_was_looked_at_is_looked_at_again() -> None:
    """A frame is taken in later than it arrived when its inventory is stored first."""
    scene, placer = Scene(make_facts(gpus=1)), Placer()
    stale_after = scene.fleet.fresh_until["n1"]
    assert placer.find(whole(), scene.fleet.draft().view(stale_after + 0.05)) is None
    scene.fleet.draft()  # for wishes that look at no node
    scene.now = stale_after - 0.01
    scene.sample()
    assert placer.find(whole(), scene.fleet.draft().view(stale_after + 0.1)) is not None


def test_card_that_is_out_keeps_its_claim_and_shows_nothing_that_was() -> None:
    scene = Scene(make_facts(gpus=2))
    mine = scene.grant(whole(node="n1"))
    scene.obey("n1")
    (device,) = mine.devices
    assert device.uuid == "n1-0"
    version, events = scene.fleet.capacity_version, len(scene.log)
    scene.frame("n1", processes=ProcessTable(scene.now, (make_process("n1-0"),)))
    scene.frame("n1", missing=(LOST,))
    first, second = scene.view().nodes["n1"].gpus
    assert (first.missing, first.is_read, first.foreign) == (LOST, False, ())
    assert [claim.allocation_id for claim in first.claims] == [mine.id]
    assert second.is_free
    assert scene.fleet.capacity_version > version
    scene.frame("n1", missing=(replace(LOST, reason="it is still not there"),))
    assert len(scene.log) == events, "a reason that changes is stored nowhere"


def test_card_that_comes_back_is_not_free_before_its_processes_were_read() -> None:
    scene = Scene(make_facts(gpus=2))
    scene.frame("n1", missing=(LOST,))
    scene.frame("n1", missing=())
    scene.sample()
    first, second = scene.view().nodes["n1"].gpus
    assert first.missing is None
    assert first.is_read
    assert not first.is_free
    assert second.is_free
    scene.frame("n1", processes=ProcessTable(scene.now, ()))
    assert scene.view().nodes["n1"].free_gpus == 2


def test_card_is_out_until_an_inventory_says_otherwise() -> None:
    """After a reconnect the driver may not have told yet which GPUs there are."""
    scene = Scene(make_facts(gpus=2))
    scene.frame("n1", missing=(LOST,))
    scene.disconnect("n1")
    scene.connect("n1")
    scene.report("n1")
    assert scene.fleet.status("n1").missing == (LOST,)
    assert not scene.view().nodes["n1"].gpus[0].is_free


@pytest.mark.parametrize(
    "driver",
    [DriverState.STARTING, DriverState.BLOCKED, DriverState.FAILED, DriverState.RELEASED],
)
def test_nothing_is_known_of_cards_whose_driver_does_not_answer(driver: DriverState) -> None:
    scene = Scene(make_facts(gpus=2))
    scene.frame("n1", driver=driver)
    assert scene.fleet.status("n1").samples is None
    assert scene.view().nodes["n1"].free_gpus == 0
    scene.frame("n1", driver=DriverState.READING)
    assert scene.view().nodes["n1"].free_gpus == 0, "not before it was read anew"
    scene.sample()
    assert scene.view().nodes["n1"].free_gpus == 2


def test_leases_run_anew_after_a_standstill_and_clients_on_the_line_stay_there() -> None:
    scene, holder, waiting = waiting_scene()
    scene.now += 50.0
    scene.fleet.note(e.Recovered(scene.now))
    assert scene.fleet.expires_at(holder) == scene.now + 1e6
    assert waiting not in scene.fleet.detached_since


def test_new_card_is_not_free_before_its_processes_were_read() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.change_facts("n1", gpus=make_gpus("n1", 2))
    scene.frame("n1", samples=make_samples(make_gpus("n1", 2)))
    assert [gpu.is_free for gpu in scene.view().nodes["n1"].gpus] == [True, False]
    scene.frame("n1", processes=ProcessTable(START, ()))
    assert [gpu.is_free for gpu in scene.view().nodes["n1"].gpus] == [True, True]


def test_claim_on_a_card_that_vanished_still_stands_when_it_is_back() -> None:
    scene = Scene(make_facts(gpus=2))
    mine = scene.grant(whole(2))
    scene.change_facts("n1", gpus=make_gpus("n1", 1))
    assert [claim.allocation_id for claim in scene.fleet.claims["n1-1"]] == [mine.id]
    scene.change_facts("n1", gpus=make_gpus("n1", 2))
    scene.report("n1")
    assert scene.view().nodes["n1"].free_gpus == 0


def test_card_that_two_nodes_list_is_granted_once() -> None:
    scene = Scene(make_facts("n1", 1), make_facts("n2", make_gpus("n1", 1)))
    scene.grant(whole(node="n1"))
    assert [node.free_gpus for node in scene.view().nodes.values()] == [0, 0]


def test_cordon_outlives_a_registration() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.record(e.NodeCordoned(START, "n1", "repair"))
    scene.change_facts("n1", agent_version="2")
    node = scene.fleet.nodes["n1"]
    assert (node.cordoned, node.registered_at, node.version) == ("repair", START, 3)


# --- words


def test_foreign_processes_are_named_up_to_three() -> None:
    processes = [make_process("g", pid=i) for i in range(1, 6)]
    assert describe_foreign(processes[:1]) == "PID 1 (bob, python train.py)"
    assert describe_foreign(processes) == (
        "PID 1 (bob, python train.py), PID 2 (bob, python train.py), "
        "PID 3 (bob, python train.py) and 2 more"
    )
    assert describe_foreign([make_process("g", pid=7, user="")]) == "PID 7 (python train.py)"


@pytest.mark.parametrize(
    ("gpus", "memory_bytes"), [(0, None), (-1, None), (1, 0), (1, -5), (2, GIB)]
)
def test_request_that_cannot_be_is_no_request(gpus: int, memory_bytes: int | None) -> None:
    with pytest.raises(ValueError, match="a request for|a part of a GPU"):
        Request(gpus, "ann", 60.0, memory_bytes=memory_bytes)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param(whole(), whole(), True, id="equal"),
        pytest.param(whole(), whole(labels={}), True, id="no labels and empty labels"),
        pytest.param(whole(labels={"a": "1"}), whole(labels={"a": "1"}), True, id="labels"),
        pytest.param(whole(labels={"a": "1"}), whole(labels={"a": "2"}), False, id="other labels"),
        pytest.param(whole(labels={"a": "1"}), whole(), False, id="labels against none"),
        pytest.param(whole(), whole(2), False, id="more GPUs"),
        pytest.param(whole(), share(1), False, id="a share"),
        pytest.param(whole(), whole(ttl_seconds=61.0), False, id="another TTL"),
    ],
)
def test_is_same_wish(one: Request, other: Request, same: bool) -> None:
    assert one.is_same_wish(other) is same
    assert other.is_same_wish(one) is same


def test_held_at_hello_is_what_the_node_holds() -> None:
    scene = Scene(make_facts(gpus=1))
    held = HeldAllocation("x", ("n1-0",), None, "ann", 60.0, START)
    scene.journals["n1"] = {"x": held}
    scene.connect("n1")
    assert scene.fleet.status("n1").held == {"x": held}
    assert scene.fleet.unreconciled == {"n1"}
