"""What a simulated world comes to once the faults have stopped, one function per promise; its
docstring is it.
"""

from typing import TYPE_CHECKING

from stoker.aggregator.gpu_mig import withheld
from stoker.aggregator.model import AllocationState, Gpu, Placement
from stoker.testing.broken import Broken
from stoker.testing.machine import RESERVED_BYTES
from stoker.testing.mig_promises import every_gpu_says_how_it_is
from stoker.testing.moments import ever_hosts

if TYPE_CHECKING:
    from stoker.testing.world import World

# GPUs, MIG devices, bytes of a share.
_Claim = tuple[list[str], list[str], int | None]
# Frames that may wait for their acknowledgement: the aggregator acknowledges every two seconds.
UNDER_WAY_MAX = 6


def everybody_is_up_and_heard(world: "World") -> None:
    """Every agent has a stream, its driver is read, its samples are fresh, its outbox is drained,
    and the aggregator knows the GPUs that it has.
    """
    fleet = world.aggregator.fleet
    for agent in world.agents:
        view, status = agent.state.view(), fleet.status(agent.name)
        fresh_until = fleet.fresh_until.get(agent.name, 0.0)
        gpus = {gpu.uuid for gpu in fleet.nodes[agent.name].facts.gpus}
        if (
            not (agent.is_up and view.connected and status.session)
            or view.outbox_frames > UNDER_WAY_MAX
            or fresh_until < world.aggregator.clock.now()
            or gpus != {gpu.uuid for gpu in agent.machine.gpus}
            or status.missing
        ):
            raise Broken(
                everybody_is_up_and_heard,
                node=agent.name,
                connected=view.connected,
                outbox_frames=view.outbox_frames,
                fresh_until=world.aggregator.virtual(fresh_until),
                gpus=gpus,
                status=status,
            )


def every_gpu_can_be_had_again(world: "World") -> None:
    """Of every GPU telemetry and processes are known, and what nobody holds could be granted."""
    view = world.aggregator.fleet.view(world.aggregator.clock.now())
    for node in view.nodes.values():
        for gpu in node.gpus:
            is_known = gpu.is_read and gpu.processes_known and gpu.missing is None
            is_partitioned = gpu.is_withheld or bool(gpu.gpu.mig_enabled)
            claimed = {claim.mig_device_uuid for claim in gpu.claims}
            is_left = all(
                each.uuid in claimed or each in gpu.mig_free for each in gpu.gpu.mig_devices
            )
            is_to_be_had = bool(gpu.claims) or gpu.is_free or is_partitioned
            is_to_be_had &= gpu.is_withheld or is_left
            if node.problem or not is_known or not is_to_be_had:
                raise Broken(
                    every_gpu_can_be_had_again, node=node.name, problem=node.problem, gpu=gpu
                )


def what_is_given_up_ends(world: "World") -> None:
    """Nothing stays in `releasing`."""
    for allocation in world.aggregator.fleet.allocations.values():
        if allocation.state is AllocationState.RELEASING:
            statuses = world.aggregator.fleet.statuses
            held = {name: statuses[name].held for name in allocation.nodes}
            raise Broken(what_is_given_up_ends, allocation=allocation, held_by_nodes=held)


def nodes_hold_what_the_ledger_grants(world: "World") -> None:
    """What a node holds is what the ledger grants on it, devices and bytes too."""
    granted: dict[str, dict[str, _Claim]] = {a.name: {} for a in world.agents}
    for allocation in world.aggregator.fleet.allocations.values():
        if allocation.state is AllocationState.GRANTED:
            for each in allocation.placements:
                granted[each.node][allocation.id] = _claim(each)
    for agent in world.agents:
        held = {
            h.id: (
                sorted(h.gpu_uuids),
                sorted(h.mig_device_uuids),
                None if h.mig_device_uuids else h.memory_bytes,
            )
            for h in agent.held
        }
        if held != granted[agent.name]:
            raise Broken(
                nodes_hold_what_the_ledger_grants,
                node=agent.name,
                held=held,
                granted=granted[agent.name],
            )


def clients_have_what_the_ledger_grants(world: "World") -> None:
    """Every granted allocation has a client that believes in it."""
    granted = {
        allocation.id
        for allocation in world.aggregator.fleet.allocations.values()
        if allocation.state is AllocationState.GRANTED
    }
    beliefs = world.witness.beliefs.values()
    believed = {belief.id for belief in beliefs if belief.until > world.scheduler.now}
    if granted != believed:
        raise Broken(
            clients_have_what_the_ledger_grants, granted=sorted(granted), believed=sorted(believed)
        )


def nothing_that_fits_is_left_waiting(world: "World") -> None:
    """Of the waiting requests, in their order, none fits on a node that is not kept for one ahead
    of it.
    """
    fleet = world.aggregator.fleet
    free: dict[str, int] = {}  # GPU UUID -> bytes that nobody has
    whole: set[str] = set()  # GPUs that nobody has a part of
    conditions = fleet.conditions.table.items()
    cordoned = {uuid for uuid, condition in conditions if condition.cordon is not None}
    for name in fleet.nodes:
        cordoned |= withheld(fleet.status(name).mig)
    for node in fleet.nodes.values():
        for gpu in node.facts.gpus:
            if gpu.uuid in cordoned or gpu.mig_enabled:
                continue
            free[gpu.uuid] = gpu.memory_total_bytes - RESERVED_BYTES
            whole.add(gpu.uuid)
    for allocation in fleet.allocations.values():
        if allocation.state in (AllocationState.GRANTED, AllocationState.RELEASING):
            for device in allocation.devices:
                whole.discard(device.uuid)
                is_mig = bool(device.mig_device_uuid)  # of a GPU that was in MIG mode
                taken = free.get(device.uuid, 0) if is_mig else device.memory_bytes
                free[device.uuid] = free.get(device.uuid, 0) - taken
    kept: set[str] = set()
    for waiting in fleet.queue():
        request = waiting.request
        hosts = ever_hosts(fleet, request, cordoned)
        if request.mig_profile is not None:
            kept |= fleet.nodes.keys()  # of layouts that are or will be there nothing is sure
        fitting: dict[str, list[str]] = {}  # by model: all GPUs of one allocation are of one
        for name in sorted(hosts - kept):
            gpus: dict[str, list[Gpu]] = {}
            for gpu in fleet.nodes[name].facts.gpus:
                if not request.models or gpu.model in request.models:
                    gpus.setdefault(gpu.model, []).append(gpu)
            for model, alike in gpus.items():
                if request.memory_bytes is None:
                    fits = sum(gpu.uuid in whole for gpu in alike) >= request.gpus
                else:
                    fits = any(free.get(gpu.uuid, 0) >= request.memory_bytes for gpu in alike)
                if fits:
                    fitting.setdefault(model, []).append(name)
        for names in fitting.values():
            if len(names) >= request.nodes:
                raise Broken(nothing_that_fits_is_left_waiting, waiting=waiting, nodes=names)
        kept |= hosts


def check_settled(world: "World") -> None:
    """Raise Broken unless everything that was given up is over and both sides agree."""
    for check in (
        everybody_is_up_and_heard,
        every_gpu_can_be_had_again,
        what_is_given_up_ends,
        nodes_hold_what_the_ledger_grants,
        clients_have_what_the_ledger_grants,
        every_gpu_says_how_it_is,
    ):
        check(world)


def check_rest(world: "World") -> None:
    """Raise Broken unless, beside that, everything that fits was granted."""
    check_settled(world)
    nothing_that_fits_is_left_waiting(world)


def _claim(placement: Placement) -> _Claim:
    devices = placement.devices
    parts = sorted(device.mig_device_uuid for device in devices if device.mig_device_uuid)
    shares = [device.memory_bytes for device in devices if not device.exclusive and not parts]
    return sorted({device.uuid for device in devices}), parts, shares[0] if shares else None
