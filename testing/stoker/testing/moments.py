"""What has to hold at the moment of a decision, a commit or an answer, one function per promise.

Each docstring is the promise. They look at the fleet's tables and at what was reported, never at
the code that decides: a filter that is forgotten there is not forgotten here.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from stoker.aggregator import events as e
from stoker.aggregator.fleet import INTERVALS_FRESH, Fleet
from stoker.aggregator.gpu_mig import withheld
from stoker.aggregator.model import (
    Allocation,
    AllocationState,
    Device,
    DriverState,
    Gpu,
    GpuSample,
    Node,
    NodeStatus,
    Placement,
    Request,
)
from stoker.aggregator.processes import ProcessTable
from stoker.testing.broken import Broken
from stoker.testing.machine import RESERVED_BYTES

# What the rounding of floats may add up to.
TOLERANCE_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class Promise:
    """What a client was told: it has these devices until then (virtual seconds), or later."""

    id: str
    placements: tuple[Placement, ...]
    until: float


@dataclass(slots=True)
class Decided:
    """The fleet as a round has it after the events that were looked at so far."""

    fleet: Fleet
    wall: float
    cordoned: set[str]  # nodes and GPUs
    # GPU UUID -> allocation, bytes, exclusive, MIG device
    claims: dict[str, list[tuple[str, int, bool, str]]]
    waiting: dict[str, tuple[tuple[int, int], Request]]  # id -> its place in the queue, its wish

    @staticmethod
    def of(fleet: Fleet, wall: float) -> "Decided":
        """Return what holds before a round."""
        decided = Decided(fleet, wall, set(), {}, {})
        decided.cordoned = {n for n, node in fleet.nodes.items() if node.cordoned is not None}
        conditions = fleet.conditions.table.items()
        decided.cordoned |= {uuid for uuid, each in conditions if each.cordon is not None}
        for allocation in fleet.allocations.values():
            if allocation.state in (AllocationState.GRANTED, AllocationState.RELEASING):
                decided.claim(allocation.id, allocation.devices)
            elif allocation.state is AllocationState.WAITING:
                place = (-allocation.request.priority, allocation.version)
                decided.waiting[allocation.id] = (place, allocation.request)
        return decided

    def claim(self, id_: str, devices: tuple[Device, ...]) -> None:
        """Take in a grant."""
        for device in devices:
            claim = (id_, device.memory_bytes, device.exclusive, device.mig_device_uuid)
            self.claims.setdefault(device.uuid, []).append(claim)

    def take(self, event: e.DurableEvent, number: int) -> None:
        """Take in an event that was looked at; `number` orders those of one round."""
        match event:
            case e.NodeCordoned():
                self.cordoned.add(event.node)
            case e.NodeUncordoned():
                self.cordoned.discard(event.node)
            case e.AllocationGranted() | e.AllocationAdopted():
                self.waiting.pop(event.id, None)
                for part in parts(event):
                    self.claim(part.id, part.devices)
            case e.AllocationRequested():
                place = (-event.request.priority, self.fleet.version + number)
                self.waiting[event.id] = (place, event.request)
            case e.AllocationEnded():
                self.waiting.pop(event.id, None)
                for uuid, claims in self.claims.items():
                    self.claims[uuid] = [claim for claim in claims if claim[0] != event.id]
            case e.GpuCordoned():
                self.cordoned.add(event.uuid)
            case e.GpuUncordoned() | e.GpuForgotten():
                self.cordoned.discard(event.uuid)
            case (
                e.NodeRegistered()
                | e.GpuHealthChanged()
                | e.AllocationReleasing()
                | e.AllocationsForgotten()
            ):
                pass


@dataclass(frozen=True, slots=True)
class Part:
    """What a grant gives on one node; of a gang there are several."""

    id: str
    node: str
    devices: tuple[Device, ...]
    priority: int


def parts(event: e.AllocationGranted | e.AllocationAdopted) -> tuple[Part, ...]:
    """Return what is granted, node by node."""
    return tuple(
        Part(event.id, each.node, each.devices, event.request.priority) for each in event.placements
    )


def a_gang_is_whole(grant: e.AllocationGranted) -> None:
    """A gang gets as many GPUs as it wants on as many nodes as it wants, each of them another."""
    nodes = {placement.node for placement in grant.placements}
    counts = {len(placement.devices) for placement in grant.placements}
    wanted = grant.request.nodes
    if counts != {grant.request.gpus} or not len(nodes) == len(grant.placements) == wanted:
        raise Broken(a_gang_is_whole, grant=grant)


def grants_fit_the_last_report(decided: Decided, grant: Part) -> None:
    """Nothing is granted on a node that is disconnected, unreadable, stale or cordoned, nor on a
    GPU that was not read, that is cordoned, that somebody has, that a foreign process uses or that
    others have handed out, by the last report at the time of the decision.
    """

    def refuse(why: str, **found: object) -> None:
        raise Broken(grants_fit_the_last_report, why=why, grant=grant, **found)

    node = decided.fleet.nodes[grant.node]
    status = decided.fleet.status(grant.node)
    if status.session == 0:
        refuse("the node is not connected")
    if status.driver is not DriverState.READING:
        refuse("its driver is not read", driver=status.driver)
    if grant.node in decided.cordoned:
        refuse("it is cordoned")
    fresh_seconds = INTERVALS_FRESH * node.facts.interval_seconds
    sampled_at = status.last_sample_at
    if sampled_at is None or decided.wall - sampled_at > fresh_seconds + TOLERANCE_SECONDS:
        refuse("its samples are old", now=decided.wall, sampled_at=sampled_at)
    for device in grant.devices:
        why = _objection(decided, node, status, device)
        if why:
            refuse(why, device=device, claims=decided.claims.get(device.uuid))


def _objection(decided: Decided, node: Node, status: NodeStatus, device: Device) -> str:
    gpu = next((gpu for gpu in node.facts.gpus if gpu.uuid == device.uuid), None)
    table = status.processes
    if gpu is None:
        return "the node does not have the GPU"
    if (partitions := (status.mig or {}).get(device.uuid)) and partitions.is_withheld:
        return f"it is withheld: {partitions}"
    if gpu.mig_enabled and not device.mig_device_uuid:
        return "it is in MIG mode"
    if device.uuid in {each.uuid for each in status.missing}:
        return "it is out of use"
    if table is None or device.uuid in table.unread_gpu_uuids:
        return "its processes are not known"
    if (status.samples or {}).get(device.uuid) is None:
        return "it was not sampled"
    if device.uuid in decided.cordoned:
        return "it is cordoned"
    if table.assignments_unknown:
        return f"others may have handed it out: {table.assignments_unknown}"
    if device.uuid in {each.gpu_uuid for each in table.assignments}:
        return f"others have handed it out: {table.assignments}"
    claims = decided.claims.get(device.uuid, [])
    if device.mig_device_uuid:
        return _mig_objection(gpu, device, table, claims)
    ours = {claim[0] for claim in claims}
    foreign = [
        process
        for process in table.processes
        if process.gpu_uuid == device.uuid and process.allocation_id not in ours
    ]
    if device.exclusive:
        return f"it is used: {claims} {foreign}" if claims or foreign else ""
    if any(exclusive or mig for _, _, exclusive, mig in claims):
        return f"it is held whole, or a MIG device of it: {claims}"
    taken = device.memory_bytes + sum(bytes_ for _, bytes_, _, _ in claims)
    taken += sum(process.memory_used_bytes or 0 for process in foreign)
    if taken > gpu.memory_total_bytes:
        return f"{taken} bytes of {gpu.memory_total_bytes} would be taken, {foreign}"
    return ""


def _mig_objection(
    gpu: Gpu, device: Device, table: ProcessTable, claims: list[tuple[str, int, bool, str]]
) -> str:
    found = next((each for each in gpu.mig_devices if each.uuid == device.mig_device_uuid), None)
    if found is None:
        return f"it does not have that MIG device: {gpu.mig_devices}"
    if any(mig in ("", device.mig_device_uuid) for _, _, _, mig in claims):
        return f"it is held: {claims}"
    ours = {claim[0] for claim in claims}
    foreign = [
        process
        for process in table.processes
        if process.gpu_uuid == device.uuid
        and process.allocation_id not in ours
        and process.gpu_instance_id in (None, found.gpu_instance_id)
    ]
    return f"it is used: {foreign}" if foreign else ""


def nobody_overtakes_the_queue(decided: Decided, grant: Part) -> None:
    """A grant never goes to a node that a waiting request ahead of it (of higher priority, or of
    the same and earlier) could use once it is free.
    """
    known = decided.waiting.get(grant.id)
    own_place = known[0] if known else (-grant.priority, decided.fleet.version + 10**6)
    for id_, (place, request) in decided.waiting.items():
        if id_ == grant.id or place > own_place:
            continue
        if grant.node in ever_hosts(decided.fleet, request, decided.cordoned):
            raise Broken(nobody_overtakes_the_queue, grant=grant, ahead=id_, its_request=request)


def ever_hosts(fleet: Fleet, request: Request, cordoned: Collection[str] = ()) -> set[str]:
    """Return the nodes that would surely host (a part of) the request if they were free and well.

    The GPUs of one allocation are of one model, those of a gang on all of its nodes.
    """
    hosts: dict[str, set[str]] = {}
    for name, node in fleet.nodes.items():
        for model in _able(node, fleet.status(name), request, cordoned):
            hosts.setdefault(model, set()).add(name)
    enough = (names for names in hosts.values() if len(names) >= request.nodes)
    return set[str]().union(*enough)


def _able(
    node: Node, status: NodeStatus, request: Request, cordoned: Collection[str]
) -> Iterator[str]:
    """Yield the models of the node's GPUs of which enough could be used."""
    if request.node not in (None, node.facts.name) or request.mig_profile is not None:
        return  # of layouts that are or will be there nothing is sure
    out = {each.uuid for each in status.missing} | set(cordoned) | withheld(status.mig)
    usable: dict[str, list[Gpu]] = {}
    for gpu in node.facts.gpus:
        is_asked_for = not request.models or gpu.model in request.models
        if is_asked_for and gpu.uuid not in out and not gpu.mig_enabled:
            usable.setdefault(gpu.model, []).append(gpu)
    for model, gpus in usable.items():
        if request.memory_bytes is None:
            is_able = len(gpus) >= request.gpus
        else:
            room = max(gpu.memory_total_bytes for gpu in gpus) - RESERVED_BYTES
            is_able = room >= request.memory_bytes
        if is_able:
            yield model


def devices_were_looked_at_since_the_last_tenant(
    grant: Part,
    status: NodeStatus,
    vacated_at: Mapping[str, float],
    reading_began_at: float | None,
) -> None:
    """Between the end of one tenancy of a GPU and the next there is a reading of the processes on
    it, begun after the first tenant had given it up, and the decision is made with that reading or
    a later one.
    """
    for device in grant.devices:
        given_up = vacated_at.get(device.uuid)
        if given_up is not None and (reading_began_at is None or reading_began_at < given_up):
            raise Broken(
                devices_were_looked_at_since_the_last_tenant,
                grant=grant,
                given_up_at=given_up,
                reading_began_at=reading_began_at,
                processes=status.processes,
            )


def placement_uses_samples_that_are_young(
    grant: Part,
    samples: Mapping[str, GpuSample],
    interval_seconds: float,
    now: float,
    travel_seconds: float,
) -> None:
    """A GPU is granted only on a sample that was truly taken within three intervals, give or take
    the time of the fastest message of its stream.
    """
    for device in grant.devices:
        taken_at = samples[device.uuid].energy_joules or 0.0  # the simulated counter tells the time
        age = now - taken_at
        if age > INTERVALS_FRESH * interval_seconds + travel_seconds + TOLERANCE_SECONDS:
            raise Broken(
                placement_uses_samples_that_are_young,
                grant=grant,
                age_seconds=age,
                interval_seconds=interval_seconds,
                travel_seconds=travel_seconds,
            )


def nothing_goes_where_nothing_is_read(
    grant: Part,
    out_since: Mapping[str, float],
    interval_seconds: float,
    now: float,
    travel_seconds: float,
) -> None:
    """A GPU of which nothing can be read, because it hangs, is lost, or its node's driver blocks,
    is gone, was replaced or let go of, is granted at most three intervals after that began, give or
    take the time of the fastest message of its stream; whatever the node said of it.
    """
    for device in grant.devices:
        since = out_since.get(device.uuid, now)
        if now - since > INTERVALS_FRESH * interval_seconds + travel_seconds + TOLERANCE_SECONDS:
            raise Broken(
                nothing_goes_where_nothing_is_read,
                grant=grant,
                out_since=since,
                interval_seconds=interval_seconds,
                travel_seconds=travel_seconds,
            )


def processes_were_read_since_the_gpu_came_back(
    grant: Part,
    samples: Mapping[str, GpuSample],
    found_at: Mapping[str, float],
    reading_began_at: float | None,
) -> None:
    """A GPU that could not be read is granted on a sample since then only after a reading of the
    processes on it that was begun when its node could read it again.
    """
    for device in grant.devices:
        found = found_at.get(device.uuid)
        taken_at = samples[device.uuid].energy_joules or 0.0  # the simulated counter tells the time
        if found is None or taken_at < found:
            continue
        if reading_began_at is None or reading_began_at < found:
            raise Broken(
                processes_were_read_since_the_gpu_came_back,
                grant=grant,
                found_at=found,
                reading_began_at=reading_began_at,
            )


def what_is_kept_alive_does_not_expire(
    event: e.AllocationReleasing, ttl_seconds: float, kept_alive_at: float | None, now: float
) -> None:
    """A lease does not run out within its TTL after a keep-alive has come to the aggregator's host,
    whether the aggregator has read it or not.
    """
    if kept_alive_at is None or not event.reason.startswith("expired"):
        return
    if now < kept_alive_at + ttl_seconds - TOLERANCE_SECONDS:
        raise Broken(
            what_is_kept_alive_does_not_expire,
            event=event,
            ttl_seconds=ttl_seconds,
            kept_alive_at=kept_alive_at,
        )


def leases_run_their_time(
    event: e.AllocationReleasing, promise: Promise | None, may_end_early: bool, now: float
) -> None:
    """A lease ends before the time that was acknowledged last only if it was released, its node
    refused it, or its GPU is to be partitioned anew, with evict, and the deadline has passed.
    """
    if promise is None or may_end_early or event.reason.startswith("refused by node"):
        return
    if now < promise.until - TOLERANCE_SECONDS:
        raise Broken(leases_run_their_time, event=event, promise=promise, now=now)


def one_grant_per_key(event: e.AllocationGranted, granted: Mapping[str, str]) -> None:
    """An idempotency key is never granted twice."""
    before = granted.get(event.idempotency_key, event.id)
    if before != event.id:
        raise Broken(one_grant_per_key, key=event.idempotency_key, first=before, second=event)


def acknowledged_is_durable(promise: Promise, durable: Mapping[str, Promise], over: bool) -> None:
    """A grant is acknowledged only when it is on disk, the same, and not given up there."""
    stored = durable.get(promise.id)
    if over or stored is None or stored.placements != promise.placements:
        raise Broken(acknowledged_is_durable, acknowledged=promise, stored=stored, given_up=over)


def what_is_restored_is_what_was_stored(restored: Fleet, replayed: Fleet) -> None:
    """A snapshot and the events after it give the same tables as all events do."""
    for table in ("version", "nodes", "allocations", "keys", "waiting"):
        if getattr(restored, table) != getattr(replayed, table):
            raise Broken(
                what_is_restored_is_what_was_stored,
                table=table,
                restored=getattr(restored, table),
                replayed=getattr(replayed, table),
            )
    if restored.conditions.table != replayed.conditions.table:
        raise Broken(
            what_is_restored_is_what_was_stored,
            table="conditions",
            restored=restored.conditions.table,
            replayed=replayed.conditions.table,
        )


def promise_of(allocation: Allocation, until: float) -> Promise:
    """Return what an answer about `allocation` promises."""
    return Promise(allocation.id, allocation.placements, until)
