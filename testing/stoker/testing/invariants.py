"""What has to hold in a simulated world after every single event, one function per promise; its
docstring is it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from stoker.aggregator.model import AllocationState, Device
from stoker.testing.broken import Broken
from stoker.testing.mig_promises import (
    mig_devices_have_one_tenant,
    what_a_node_holds_was_not_destroyed,
)

if TYPE_CHECKING:
    from stoker.testing.world import World

# Allocation, bytes of the GPU or None for all of it; or a MIG device of it, which has its own.
_Claim = tuple[str, int | None]

_LIVE = (AllocationState.GRANTED, AllocationState.RELEASING)


def the_ledger_is_not_over_committed(world: "World") -> None:
    """By the ledger a GPU has either one exclusive tenant or shares that fit into its memory
    together, and the table of claims says the same as the allocations.
    """
    fleet = world.aggregator.fleet
    claims: dict[str, list[_Claim]] = defaultdict(list)
    for allocation in fleet.allocations.values():
        if allocation.state in _LIVE:
            for device in allocation.devices:
                claims[device.uuid].append((allocation.id, _bytes(device)))
    _check_each(the_ledger_is_not_over_committed, world, claims)
    listed = {
        uuid: sorted(
            (claim.allocation_id, 0 if claim.mig_device_uuid else claim.memory_bytes)
            for claim in of_gpu
        )
        for uuid, of_gpu in fleet.claims.items()
        if of_gpu
    }
    if {uuid: sorted(of_gpu) for uuid, of_gpu in claims.items()} != listed:
        raise Broken(the_ledger_is_not_over_committed, allocations=dict(claims), claims=listed)


def nodes_hold_no_more_than_they_have(world: "World") -> None:
    """By its journal a node holds on each GPU either one exclusive tenant or shares that fit
    together.
    """
    claims: dict[str, list[_Claim]] = defaultdict(list)
    for agent in world.agents:
        for held in agent.held:
            for uuid in held.gpu_uuids:
                bytes_ = 0 if held.mig_device_uuids else held.memory_bytes
                claims[uuid].append((held.id, bytes_))
    _check_each(nodes_hold_no_more_than_they_have, world, claims)


def clients_do_not_believe_in_the_same_gpu(world: "World") -> None:
    """Of all clients at most one believes to have a GPU whole, from the answer that told it so
    until it gave it back or its TTL since the last acknowledged keep-alive ran out; shares that
    clients believe in fit together.
    """
    now = world.scheduler.now
    claims: dict[str, list[_Claim]] = defaultdict(list)
    for belief in world.witness.beliefs.values():
        if belief.until > now:
            for device in belief.devices:
                claims[device.uuid].append((f"{belief.client}: {belief.id}", _bytes(device)))
    _check_each(clients_do_not_believe_in_the_same_gpu, world, claims)


def acknowledged_grants_are_in_the_ledger(world: "World") -> None:
    """A grant that was acknowledged is in the ledger, on the same devices, until it is durably
    given up; also in the first moment after a restart.
    """
    allocations = world.aggregator.fleet.allocations
    for promise in world.witness.promises.values():
        found = allocations.get(promise.id)
        if (
            found is None
            or found.state is not AllocationState.GRANTED
            or found.placements != promise.placements
        ):
            raise Broken(acknowledged_grants_are_in_the_ledger, promised=promise, found=found)


def what_has_ended_is_held_by_nobody(world: "World") -> None:
    """When the ledger says that an allocation that it had granted has ended, its node does not hold
    it, and never will again.
    """
    allocations = world.aggregator.fleet.allocations
    for agent in world.agents:
        for held in agent.held:
            known = allocations.get(held.id)
            if known is None or known.granted_at is None:
                continue
            if known.state is AllocationState.ENDED:
                raise Broken(
                    what_has_ended_is_held_by_nobody, node=agent.name, held=held, ledger=known
                )


def few_gpus_are_cordoned_for_their_health(world: "World") -> None:
    """However many GPUs are judged ill, no more are cordoned for it at one time than a share of the
    fleet; what is said of each is kept with it.
    """
    fleet = world.aggregator.fleet
    cordons = {uuid: each.cordon for uuid, each in fleet.conditions.table.items() if each.cordon}
    by_health = [uuid for uuid, cordon in cordons.items() if cordon.by_health]
    gpus = {gpu.uuid for node in fleet.nodes.values() for gpu in node.facts.gpus}
    if len(by_health) > max(1, len(gpus) // 5):
        raise Broken(few_gpus_are_cordoned_for_their_health, cordoned=by_health, gpus=len(gpus))
    for uuid, cordon in cordons.items():
        if not cordon.reason:
            raise Broken(few_gpus_are_cordoned_for_their_health, gpu=uuid, cordon=cordon)


def _bytes(device: Device) -> int | None:
    return None if device.exclusive else 0 if device.mig_device_uuid else device.memory_bytes


def _check_each(
    invariant: Callable[..., None], world: "World", claims: dict[str, list[_Claim]]
) -> None:
    for uuid, of_gpu in claims.items():
        exclusive = [id_ for id_, bytes_ in of_gpu if bytes_ is None]
        if exclusive and len(of_gpu) > 1:
            raise Broken(invariant, gpu=uuid, tenants=of_gpu)
        taken = sum(bytes_ or 0 for _, bytes_ in of_gpu)
        if taken > world.memory_bytes[uuid]:
            raise Broken(
                invariant, gpu=uuid, memory_bytes=world.memory_bytes[uuid], taken=taken, by=of_gpu
            )


# What each looks at, so that it is not asked again while none of that has changed.
def _ledger(world: "World") -> object:
    return world.aggregator.life, world.aggregator.fleet.version


def _journals(world: "World") -> object:
    return [len(agent.disk.durable) for agent in world.agents]


def _steps(world: "World") -> object:
    return None if world.partitions is None else len(world.partitions.witness.destroyed)


def _beliefs(world: "World") -> object:
    return world.witness.version


_Invariant = Callable[["World"], None]
_Sources = tuple[Callable[["World"], object], ...]

WITH_LEDGER: dict[_Invariant, _Sources] = {
    the_ledger_is_not_over_committed: (_ledger,),
    few_gpus_are_cordoned_for_their_health: (_ledger,),
    acknowledged_grants_are_in_the_ledger: (_ledger, _beliefs),
    what_has_ended_is_held_by_nobody: (_ledger, _journals),
    mig_devices_have_one_tenant: (_ledger, _journals),
}
AT_ANY_TIME: dict[_Invariant, _Sources] = {
    nodes_hold_no_more_than_they_have: (_journals,),
    what_a_node_holds_was_not_destroyed: (_journals, _steps),
    clients_do_not_believe_in_the_same_gpu: (_beliefs,),
}


class Invariants:
    """Checks all of them, each when something that it looks at has changed."""

    def __init__(self) -> None:
        self._seen: dict[_Invariant, object] = {}

    def check(self, world: "World") -> None:
        """Raise Broken for the first that does not hold. While the aggregator is down, its tables
        say nothing.
        """
        self._check(world, AT_ANY_TIME.items())
        if world.aggregator.is_up:
            self._check(world, WITH_LEDGER.items())

    def _check(self, world: "World", invariants: Iterable[tuple[_Invariant, _Sources]]) -> None:
        for invariant, sources in invariants:
            looked_at = [source(world) for source in sources]
            if self._seen.get(invariant) != looked_at:
                invariant(world)
                self._seen[invariant] = looked_at
