"""Who goes first: order, priorities, nobody overtakes, and those who do not compete pass."""

from dataclasses import replace

from tests.unit.aggregator.builders import (
    A100,
    Scene,
    make_facts,
    make_gpus,
    share,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.decisions import consider
from stoker.aggregator.model import AllocationState, Refusals
from stoker.aggregator.queueing import Hosts, Kept, kept_ahead_of, shape_of
from stoker.aggregator.wishes import (
    Refused,
)


def full_node() -> tuple[Scene, list[str]]:
    """A node of four GPUs, all granted one by one."""
    scene = Scene(make_facts(gpus=4))
    return scene, [scene.grant(whole(ttl_seconds=1e6)).id for _ in range(4)]


def granted(scene: Scene) -> set[str]:
    scene.decide(serve=True)
    allocations = scene.fleet.allocations.values()
    return {a.id for a in allocations if a.state is AllocationState.GRANTED}


def test_queue_is_in_order_of_priority_then_of_arrival() -> None:
    scene, _ = full_node()
    ids = [scene.wait(whole(priority=priority)).id for priority in (0, 5, 0, 5, -1)]
    order = [ids[1], ids[3], ids[0], ids[2], ids[4]]
    assert [waiting.id for waiting in scene.fleet.queue()] == order


def test_those_who_wait_are_served_in_order() -> None:
    scene, held = full_node()
    first, second, third = (scene.wait(whole()).id for _ in range(3))
    scene.hand_back(held[0])
    assert granted(scene) & {first, second, third} == {first}
    scene.hand_back(held[1])
    scene.hand_back(held[2])
    assert granted(scene) & {first, second, third} == {first, second, third}


def test_small_request_does_not_overtake_a_large_one() -> None:
    scene, held = full_node()
    large, small = scene.wait(whole(4)).id, scene.wait(whole(1)).id
    for id_ in held[:3]:
        scene.hand_back(id_)
        assert not granted(scene) & {large, small}
    scene.hand_back(held[3])
    assert granted(scene) & {large, small} == {large}


def test_share_does_not_overtake_whole_gpus() -> None:
    scene, held = full_node()
    large, small = scene.wait(whole(2)).id, scene.wait(share(1)).id
    scene.hand_back(held[0])
    assert not granted(scene) & {large, small}


def test_newcomer_does_not_overtake_those_who_wait() -> None:
    scene, held = full_node()
    waiting = scene.wait(whole(2)).id
    scene.hand_back(held[0])
    refused = consider(whole(1), scene.fleet, scene.now)
    assert isinstance(refused, Refusals)
    assert [(r.filter, r.found) for r in refused.nodes] == [("queue", waiting)]
    assert refused.ahead == 1
    assert isinstance(scene.allocate(whole(1)), Refused)


def test_newcomer_of_higher_priority_goes_first() -> None:
    scene, held = full_node()
    scene.wait(whole(2))
    scene.hand_back(held[0])
    assert scene.grant(whole(1, priority=1)).state is AllocationState.GRANTED


def test_higher_priority_goes_first_among_those_who_wait() -> None:
    scene, held = full_node()
    low, high = scene.wait(whole()).id, scene.wait(whole(priority=1)).id
    scene.hand_back(held[0])
    assert granted(scene) & {low, high} == {high}


def test_those_who_do_not_compete_pass() -> None:
    scene, _ = full_node()
    scene.join(make_facts("n2", make_gpus("n2", 2, A100, 40), pool="small"))
    scene.wait(whole(4, models=("H100",)))
    for request in (whole(models=("A100",)), whole(pool="small")):
        assert scene.grant(request).node == "n2"


def test_waiting_request_passes_one_that_waits_for_other_nodes() -> None:
    scene, held = full_node()
    scene.join(make_facts("n2", make_gpus("n2", 1, A100, 40)))
    scene.grant(whole(models=("A100",), ttl_seconds=1e6))
    other, mine = scene.wait(whole(models=("A100",))).id, scene.wait(whole(models=("H100",))).id
    scene.hand_back(held[0])
    assert granted(scene) & {other, mine} == {mine}


def test_request_that_can_never_be_hosted_keeps_nothing() -> None:
    scene = Scene(make_facts(gpus=4))
    scene.wait(whole(5))
    scene.wait(share(1000))
    assert scene.grant(whole(4)).node == "n1"


def test_cordoned_node_is_kept_too() -> None:
    # Whoever waits for it is first when it comes back.
    scene, held = full_node()
    waiting = scene.wait(whole()).id
    scene.record(e.NodeCordoned(scene.now, "n1", "repair"))
    scene.hand_back(held[0])
    assert waiting not in granted(scene)
    scene.record(e.NodeUncordoned(scene.now, "n1"))
    refused = consider(whole(), scene.fleet, scene.now)
    assert isinstance(refused, Refusals)
    assert waiting in granted(scene)


def test_request_without_a_client_on_the_line_keeps_its_place() -> None:
    scene, held = full_node()
    first, second = scene.wait(whole()).id, scene.wait(whole()).id
    scene.fleet.note(e.WaiterDetached(scene.now, first))
    scene.hand_back(held[0])
    assert not granted(scene) & {first, second}
    scene.fleet.note(e.WaiterAttached(scene.now, first))
    assert granted(scene) & {first, second} == {first}


def test_only_competitors_are_counted_as_ahead() -> None:
    scene, _ = full_node()
    scene.join(make_facts("n2", make_gpus("n2", 1, A100, 40)))
    scene.grant(whole(models=("A100",), ttl_seconds=1e6))
    for request in (whole(), whole(), whole(2, models=("H100",)), whole(models=("A100",))):
        scene.wait(request)
    mine = scene.wait(whole(models=("H100",))).id
    answer = consider(whole(models=("H100",)), scene.fleet, scene.now, until=mine)
    assert isinstance(answer, Refusals)
    assert answer.ahead == 3
    newcomer = consider(whole(node="n2"), scene.fleet, scene.now)
    assert isinstance(newcomer, Refusals)
    assert newcomer.ahead == 3  # two that take any GPU, and the one that wants an A100


def test_kept_nodes_name_the_first_they_are_kept_for() -> None:
    scene, _ = full_node()
    first, second = scene.wait(whole()), scene.wait(whole(2))
    kept = kept_ahead_of(0, scene.fleet.queue(), scene.view())
    assert kept.nodes == {"n1": first.id}
    assert kept_ahead_of(0, scene.fleet.queue(), scene.view(), until=first.id).nodes == {}
    assert kept_ahead_of(1, scene.fleet.queue(), scene.view()).nodes == {}
    ahead = kept_ahead_of(0, scene.fleet.queue(), scene.view(), until=second.id)
    assert ahead.leaves_nothing_for(whole())
    assert not ahead.leaves_nothing_for(whole(2))


def test_hosts_are_worked_out_anew_when_nodes_change() -> None:
    scene = Scene(make_facts("n1", 4), make_facts("n2", 2))
    hosts = Hosts()
    assert hosts.of(whole(4), scene.view()) == {"n1"}
    scene.change_facts("n2", gpus=make_gpus("n2", 4))
    assert hosts.of(whole(4), scene.view()) == {"n1", "n2"}
    kept = Kept(scene.view(), hosts)
    kept.keep_for(scene.wait(whole(5)))
    assert kept.nodes == {}


def test_gang_that_could_never_be_hosted_keeps_nothing() -> None:
    scene = Scene(make_facts("n1", gpus=2), make_facts("n2", make_gpus("n2", 2, A100, 40)))
    scene.wait(whole(2, nodes=2))  # all of its GPUs are of one model
    scene.wait(whole(2, nodes=3))
    assert scene.grant(whole(2, node="n1")).node == "n1"


def test_gang_keeps_all_nodes_that_could_host_a_part() -> None:
    scene = Scene(*(make_facts(name, gpus=2) for name in ("n1", "n2", "n3")))
    holder = scene.grant(whole(1, node="n1", ttl_seconds=1e6))
    scene.grant(whole(1, node="n2", ttl_seconds=1e6))
    waiting = scene.wait(whole(2, nodes=2))
    refused = consider(whole(1), scene.fleet, scene.now)
    assert isinstance(refused, Refusals)
    assert {(each.node, each.filter, each.found) for each in refused.nodes} == {
        (name, "queue", waiting.id) for name in ("n1", "n2", "n3")
    }
    scene.obey("n1")
    scene.hand_back(holder.id)
    assert waiting.id in granted(scene)


def test_whatever_a_filter_looks_at_makes_another_shape() -> None:
    plain = whole(2)
    others = (
        *(whole(3), whole(2, nodes=2), share(1), whole(2, cpu_milli=1), whole(2, pool="a")),
        *(whole(2, models=("T4",)), whole(2, node="n1"), whole(2, node_labels={"rack": "r1"})),
        *(whole(2, host_memory_bytes=1), whole(2, gpu_memory_min_bytes=1), whole(compute_milli=1)),
        *(whole(2, compute_capability_min=(8, 0)), whole(2, driver_version_min=(570,))),
        *(
            whole(2, gpu_topology_required=True),
            whole(2, same_label="rack"),
            whole(mig_profile="x"),
        ),
        *(whole(2, service="s"), whole(2, anti_affinity="node"), whole(2, host_boot_id="b")),
    )
    assert len({shape_of(each) for each in (plain, *others)}) == len(others) + 1
    alike = replace(plain, holder="bob", priority=3, movable=True, near_service="db")
    assert shape_of(alike) == shape_of(plain)
