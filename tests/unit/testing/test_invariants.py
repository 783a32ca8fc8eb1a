"""Each invariant sees what breaks it: a quiet world is run to its rest, then tampered with."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from stoker.agent.journal import encode_batch
from stoker.agent.records import AllocationHeld
from stoker.aggregator.events import FrameArrived, GpuCordoned
from stoker.aggregator.model import (
    Allocation,
    AllocationState,
    DriverState,
    Frame,
    MissingGpu,
    Placement,
)
from stoker.aggregator.processes import ProcessTable
from stoker.testing import invariants, liveness, mig_promises
from stoker.testing.broken import Broken
from stoker.testing.faults import Faults
from stoker.testing.world import Scenario, World


@pytest.fixture
def world() -> Iterator[World]:
    world = World(Scenario(seed=1, seconds=10.0, faults=Faults.none()))
    world.live()
    yield world
    world.close()


@pytest.fixture
def partitioned_world() -> Iterator[World]:
    world = World(Scenario(seed=1, seconds=10.0, faults=Faults.none(), mig=True))
    world.live()
    yield world
    world.close()


def granted(world: World, *, exclusive: bool = True) -> Allocation:
    return next(
        each
        for each in world.aggregator.fleet.allocations.values()
        if each.state is AllocationState.GRANTED and each.devices[0].exclusive is exclusive
    )


def put(world: World, allocation: Allocation) -> None:
    world.aggregator.fleet.allocations[allocation.id] = allocation


def grant_twice(world: World) -> None:
    put(world, replace(granted(world), id="twin"))


def grant_too_much(world: World) -> None:
    share = granted(world, exclusive=False)
    whole = world.memory_bytes[share.devices[0].uuid]
    too_much = replace(share.devices[0], memory_bytes=whole + 1)
    put(world, replace(share, placements=(Placement(share.node, (too_much,)),)))


def leave_a_claim_behind(world: World) -> None:
    allocation = granted(world)
    put(world, replace(allocation, state=AllocationState.ENDED))


def hold_twice(world: World) -> None:
    agent = next(agent for agent in world.agents if any(h.memory_bytes is None for h in agent.held))
    held = next(held for held in agent.held if held.memory_bytes is None)
    agent.disk.durable.append(encode_batch((AllocationHeld(replace(held, id="twin")),)))


def believe_twice(world: World) -> None:
    belief = world.witness.beliefs[granted(world).id]
    world.witness.believes("client-99", "twin", belief.devices, belief.until)


def lose_a_grant(world: World) -> None:
    del world.aggregator.fleet.allocations[granted(world).id]


def move_a_grant(world: World) -> None:
    put(world, replace(granted(world), placements=(Placement("node-99", granted(world).devices),)))


def end_what_is_held(world: World) -> None:
    put(world, replace(granted(world), state=AllocationState.ENDED))


def stay_releasing(world: World) -> None:
    put(world, replace(granted(world), state=AllocationState.RELEASING))


def silence_an_agent(world: World) -> None:
    world.agents[0].is_up = False


def leave_a_gpu_unknown(world: World) -> None:
    cards = world.agents[0].machine.cards
    cards.gpus = cards.gpus[1:]


def report(world: World, **parts: Any) -> None:
    """The first node says something else than what is so."""
    fleet, name = world.aggregator.fleet, world.agents[0].name
    status, now = fleet.status(name), world.aggregator.clock.now()
    frame = Frame(status.acked_sequence + 1, now, 0.0, **parts)
    fleet.note(FrameArrived(now, name, status.session, frame, now))


def leave_a_gpu_out(world: World) -> None:
    gpu = world.agents[0].machine.gpus[0]
    report(world, missing=(MissingGpu(gpu.index, gpu.uuid, "gpu_lost", "it fell off the bus"),))


def leave_processes_unknown(world: World) -> None:
    gpu = world.agents[0].machine.gpus[0]
    report(world, processes=ProcessTable(0.0, (), (gpu.uuid,)))


def leave_a_driver_released(world: World) -> None:
    report(world, driver=DriverState.RELEASED)


def forget_a_client(world: World) -> None:
    world.witness.believes_no_more(granted(world).id)


def leave_waiting(world: World) -> None:
    allocation = granted(world)
    put(world, replace(allocation, state=AllocationState.ENDED))
    waiting = replace(allocation, id="waiting", state=AllocationState.WAITING, placements=())
    put(world, waiting)
    world.aggregator.fleet.waiting.clear()
    world.aggregator.fleet.waiting["waiting"] = (0, 1)


def cordon_all(world: World, reason: str, *, by_health: bool) -> None:
    fleet, now = world.aggregator.fleet, world.aggregator.clock.now()
    for name, node in fleet.nodes.items():
        for gpu in node.facts.gpus:
            cordoned = GpuCordoned(now, name, gpu.uuid, reason, by_health=by_health)
            fleet.apply(cordoned, fleet.version + 1)


def cordon_everything(world: World) -> None:
    cordon_all(world, "it is ill", by_health=True)


def cordon_without_a_word(world: World) -> None:
    cordon_all(world, "", by_health=False)


def grant_a_mig_device_twice(world: World) -> None:
    allocation = granted(world)
    device = replace(allocation.devices[0], mig_device_uuid="MIG-1")
    placed = replace(allocation, placements=(Placement(allocation.node, (device,)),))
    put(world, placed)
    put(world, replace(placed, id="twin"))


def destroy_what_is_held(world: World) -> None:
    assert world.partitions is not None
    agent = next(agent for agent in world.agents if agent.held)
    held = replace(agent.held[0], id="cut", mig_device_uuids=("MIG-1",))
    agent.disk.durable.append(encode_batch((AllocationHeld(held),)))
    world.partitions.witness.destroyed.add("MIG-1")


MIG_TAMPERED: tuple[tuple[Callable[[World], None], Callable[[World], None]], ...] = (
    (grant_a_mig_device_twice, mig_promises.mig_devices_have_one_tenant),
    (destroy_what_is_held, mig_promises.what_a_node_holds_was_not_destroyed),
)

TAMPERED: tuple[tuple[Callable[[World], None], Callable[[World], None]], ...] = (
    (grant_twice, invariants.the_ledger_is_not_over_committed),
    (grant_too_much, invariants.the_ledger_is_not_over_committed),
    (leave_a_claim_behind, invariants.the_ledger_is_not_over_committed),
    (hold_twice, invariants.nodes_hold_no_more_than_they_have),
    (believe_twice, invariants.clients_do_not_believe_in_the_same_gpu),
    (lose_a_grant, invariants.acknowledged_grants_are_in_the_ledger),
    (move_a_grant, invariants.acknowledged_grants_are_in_the_ledger),
    (end_what_is_held, invariants.what_has_ended_is_held_by_nobody),
    (cordon_everything, invariants.few_gpus_are_cordoned_for_their_health),
    (cordon_without_a_word, invariants.few_gpus_are_cordoned_for_their_health),
    (silence_an_agent, liveness.everybody_is_up_and_heard),
    (leave_a_gpu_unknown, liveness.everybody_is_up_and_heard),
    (leave_a_gpu_out, liveness.everybody_is_up_and_heard),
    (leave_a_gpu_out, liveness.every_gpu_can_be_had_again),
    (leave_processes_unknown, liveness.every_gpu_can_be_had_again),
    (leave_a_driver_released, liveness.every_gpu_can_be_had_again),
    (stay_releasing, liveness.what_is_given_up_ends),
    (lose_a_grant, liveness.nodes_hold_what_the_ledger_grants),
    (hold_twice, liveness.nodes_hold_what_the_ledger_grants),
    (forget_a_client, liveness.clients_have_what_the_ledger_grants),
    (leave_waiting, liveness.nothing_that_fits_is_left_waiting),
)


@pytest.mark.parametrize(
    ("tamper", "invariant"),
    TAMPERED,
    ids=[f"{tamper.__name__} breaks {invariant.__name__}" for tamper, invariant in TAMPERED],
)
def test_what_breaks_it_is_seen(
    world: World, tamper: Callable[[World], None], invariant: Callable[[World], None]
) -> None:
    invariant(world)
    tamper(world)
    with pytest.raises(Broken, match=invariant.__name__):
        invariant(world)


@pytest.mark.parametrize(
    ("tamper", "invariant"),
    MIG_TAMPERED,
    ids=[f"{tamper.__name__} breaks {invariant.__name__}" for tamper, invariant in MIG_TAMPERED],
)
def test_what_breaks_partitions_is_seen(
    partitioned_world: World, tamper: Callable[[World], None], invariant: Callable[[World], None]
) -> None:
    invariant(partitioned_world)
    tamper(partitioned_world)
    with pytest.raises(Broken, match=invariant.__name__):
        invariant(partitioned_world)


def test_every_invariant_is_tried() -> None:
    tried = {invariant for _, invariant in (*TAMPERED, *MIG_TAMPERED)}
    assert {*invariants.WITH_LEDGER, *invariants.AT_ANY_TIME} <= tried


def test_a_quiet_world_grants_what_is_asked_for() -> None:
    outcome = World(Scenario(seed=2, seconds=60.0, faults=Faults.none())).run()
    assert outcome.counts["AllocationGranted"] > 20
    assert "refused by node" not in outcome.counts
    assert outcome.counts["aggregator starts"] == 1
