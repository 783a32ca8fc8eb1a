"""The fleet as deciders see it: immutable values made from registered facts, claims and reports."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import assert_never

from stoker.aggregator.changelog import ChangeLog
from stoker.aggregator.gpu_mig import GpuMig, progress
from stoker.aggregator.model import (
    COMPUTE_MILLI,
    Allocation,
    Claim,
    DriverState,
    Gpu,
    MigDevice,
    MissingGpu,
    Node,
    NodeStatus,
    Placement,
)
from stoker.aggregator.processes import Assignment, Process
from stoker.aggregator.verdicts import Condition, GpuCordon
from stoker.core.units import format_duration

_NAMED_MAX = 3  # how many of a kind a sentence names


@dataclass(frozen=True, slots=True)
class GpuView:
    """One GPU as placement sees it; `view_gpu` makes it."""

    gpu: Gpu
    claims: tuple[Claim, ...]
    foreign: tuple[Process, ...]  # processes on it that are none of ours
    strays: tuple[str, ...]  # ids that the node holds it for, and the ledger does not
    assigned: tuple[Assignment, ...]  # what others have handed out of it, idle or not
    cordon: GpuCordon | None  # why nothing new goes to it
    mig: GpuMig | None  # its partitions; None: not told
    missing: MissingGpu | None  # why it is out of use; None: it is not
    is_read: bool  # the newest sample told something of it
    processes_known: bool  # the newest process table has it
    reserved_bytes: int  # kept by the driver
    is_free: bool  # a whole-GPU request could take it
    room_bytes: int  # a share could take: total less the driver's, all shares, foreign processes
    compute_free_milli: int  # a share could be promised; 0 where it could have no memory either
    mig_free: tuple[MigDevice, ...]  # that a request could take

    @property
    def is_withheld(self) -> bool:
        """Whether nothing new goes to it because its partitions are not as they shall be."""
        return self.mig is not None and self.mig.is_withheld

    @property
    def usable_bytes(self) -> int:
        """Its memory without what the driver keeps for itself."""
        return max(0, self.gpu.memory_total_bytes - self.reserved_bytes)


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node as placement sees it; freshness is apart, in `FleetView.fresh_until`."""

    node: Node
    connected: bool
    driver: DriverState
    problem: str  # why nothing at all can be placed, apart from staleness and cordon; empty: none
    gpus: tuple[GpuView, ...]
    missing: tuple[MissingGpu, ...]  # all that are out of use, also those that nobody ever read
    cpu_free_milli: int | None  # that no allocation holds; None: the node tells of no CPUs
    host_memory_free_bytes: int | None
    # Service -> the GPUs that its allocations hold here, one for each device; ("",) for none.
    services: Mapping[str, tuple[str, ...]]
    assignments_unknown: str  # why it is not known what others have handed out; empty: it is
    cordoned_gpus: int  # one by one; the node's own cordon is `node.cordoned`
    withheld_gpus: int  # whose partitions are not as they shall be
    free_gpus: int
    free_by_model: Mapping[str, int]  # of every model that the node has
    room_bytes_max: int  # the largest share that one of its GPUs can take

    @property
    def name(self) -> str:
        """The node's name, unique in the fleet."""
        return self.node.facts.name

    @property
    def gpus_total(self) -> int:
        """How many GPUs the host has, those included that cannot be read."""
        known = {gpu.gpu.uuid for gpu in self.gpus}
        return len(self.gpus) + sum(each.uuid not in known for each in self.missing)


@dataclass(frozen=True, slots=True)
class FleetView:
    """What `place` decides on. Valid until the next event is applied."""

    now: float
    nodes: Mapping[str, NodeView]
    fresh_until: Mapping[str, float]
    # Rises when other nodes than before could host a request once they were free.
    hosts_version: int = 0
    statuses: Mapping[str, NodeStatus] = field(default_factory=dict[str, NodeStatus])
    allocations: Mapping[str, Allocation] = field(default_factory=dict[str, Allocation])
    # Which of `nodes` are others than they were, or fresh where they were not.
    log: ChangeLog = field(default_factory=ChangeLog)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A node as it was, of which nothing but its tenants and the claims on some GPUs changed."""

    before: NodeView
    uuids: Collection[str]  # of those GPUs


def view_node(
    node: Node,
    claims: Mapping[str, tuple[Claim, ...]],
    status: NodeStatus,
    conditions: Mapping[str, Condition],
    tenants: Sequence[Allocation] = (),
    claimed: Claimed | None = None,
) -> NodeView:
    """Return the node as placement sees it; `claims` and `conditions` are by GPU UUID.

    `tenants`: the allocations that hold something on it, or have not been seen to let go. With
    `claimed` only what can have changed is looked at; the answer is the same.
    """
    holds: dict[str, list[str]] = {}
    for held in (status.held or {}).values():
        for uuid in held.gpu_uuids:
            holds.setdefault(uuid, []).append(held.id)

    def seen(gpu: Gpu) -> GpuView:
        condition = conditions.get(gpu.uuid)
        cordon = condition.cordon if condition is not None else None
        own = claims.get(gpu.uuid, ())
        return view_gpu(gpu, own, holds.get(gpu.uuid, ()), status, cordon)

    if claimed is None:
        gpus = tuple(seen(gpu) for gpu in node.facts.gpus)
        cordoned = sum(gpu.cordon is not None for gpu in gpus)
        held_back = sum(gpu.is_withheld for gpu in gpus) if status.mig else 0
    else:
        changed = claimed.uuids
        gpus = tuple(
            [seen(one.gpu) if one.gpu.uuid in changed else one for one in claimed.before.gpus]
        )
        cordoned, held_back = claimed.before.cordoned_gpus, claimed.before.withheld_gpus
    known = {tenant.id for tenant in tenants}
    strays = [held for held in (status.held or {}).values() if held.id not in known]
    free: dict[str, int] = {}
    room_bytes_max = 0
    for gpu in gpus:
        model = gpu.gpu.model
        free[model] = free.get(model, 0) + gpu.is_free
        room_bytes_max = max(room_bytes_max, gpu.room_bytes)
    return NodeView(
        node=node,
        connected=status.session != 0,
        driver=status.driver,
        problem=_problem(status),
        gpus=gpus,
        missing=status.missing,
        cpu_free_milli=_left(
            node.facts.cpu_milli,
            chain((t.request.cpu_milli for t in tenants), (held.cpu_milli for held in strays)),
        ),
        host_memory_free_bytes=_left(
            node.facts.host_memory_bytes,
            chain(
                (t.request.host_memory_bytes for t in tenants),
                (held.host_memory_bytes for held in strays),
            ),
        ),
        services=_services(node.facts.name, tenants),
        assignments_unknown=status.processes.assignments_unknown if status.processes else "",
        cordoned_gpus=cordoned,
        withheld_gpus=held_back,
        free_gpus=sum(free.values()),
        free_by_model=free,
        room_bytes_max=room_bytes_max,
    )


def view_gpu(
    gpu: Gpu,
    claims: tuple[Claim, ...],
    held_for: Collection[str],
    status: NodeStatus,
    cordon: GpuCordon | None = None,
) -> GpuView:
    """Return the GPU as placement sees it; `held_for` are the allocations its node holds it for.

    A process is foreign unless it belongs to an allocation that has this GPU. What the node holds
    and the ledger does not know is adopted or dropped; until then nobody else gets the GPU. What
    the kubelet or Slurm has handed out is in use though it may be idle; where that is not known,
    any GPU may be. A card in MIG mode gives nothing but its MIG devices, and one whose partitions
    are not as they shall be gives nothing at all.
    """
    sample = (status.samples or {}).get(gpu.uuid)
    reserved = sample.memory_reserved_bytes or 0 if sample else 0
    ours = {claim.allocation_id for claim in claims}
    table = status.processes
    processes = table.processes if table else ()
    foreign = tuple(p for p in processes if p.gpu_uuid == gpu.uuid and p.allocation_id not in ours)
    missing = next((each for each in status.missing if each.uuid == gpu.uuid), None)
    is_read = sample is not None and sample.is_read and missing is None
    known = table is not None and gpu.uuid not in table.unread_gpu_uuids
    assignments = table.assignments if table else ()
    assigned = tuple(each for each in assignments if each.gpu_uuid == gpu.uuid)
    is_ours_to_give = not assigned and not (table is not None and table.assignments_unknown)
    strays = tuple(id_ for id_ in held_for if id_ not in ours)
    mig = (status.mig or {}).get(gpu.uuid)
    is_open = cordon is None and (mig is None or not mig.is_withheld)
    is_sound = is_read and known and not strays and is_open
    is_usable = is_sound and is_ours_to_give and not gpu.mig_enabled
    room_bytes = _room(gpu, claims, foreign, reserved) if is_usable else 0
    promised = sum(claim.compute_milli for claim in claims)
    told = table is not None and not table.assignments_unknown
    return GpuView(
        gpu=gpu,
        claims=claims,
        foreign=foreign,
        strays=strays,
        assigned=assigned,
        cordon=cordon,
        mig=mig,
        missing=missing,
        is_read=is_read,
        processes_known=known,
        reserved_bytes=reserved,
        is_free=is_usable and not claims and not foreign,
        room_bytes=room_bytes,
        compute_free_milli=max(0, COMPUTE_MILLI - promised) if room_bytes else 0,
        mig_free=_mig_free(gpu, claims, foreign, assigned) if is_sound and told else (),
    )


def describe_foreign(processes: Iterable[Process]) -> str:
    """Return the holders by PID, user, command and what they are part of, the first few named."""
    shown: list[str] = []
    for process in processes:
        owner = process.owner.described() if process.owner is not None else ""
        known = ", ".join(each for each in (process.user, process.command, owner) if each)
        shown.append(f"PID {process.pid} ({known or 'its owner is hidden'})")
    return name_some(shown)


def describe_cordon(gpu: GpuView, now: float) -> str:
    """Return why nothing new goes to the GPU, and since when; empty: it is not cordoned."""
    if gpu.cordon is None:
        return ""
    since = format_duration(max(0.0, now - gpu.cordon.at))
    return f"GPU {gpu.gpu.index} is cordoned: {gpu.cordon.reason} (for {since})"


def describe_withheld(gpu: GpuView) -> str:
    """Return why nothing new goes to the GPU until it is partitioned; empty: it is not withheld."""
    if gpu.mig is None or not gpu.is_withheld:
        return ""
    return f"GPU {gpu.gpu.index}: {progress(gpu.mig)}"


def describe_assigned(gpu: GpuView) -> str:
    """Return who has handed the GPU out, and to whom; empty: nobody beside us."""
    if not gpu.assigned:
        return ""
    holders = {f"{each.by}: {each.holder}": None for each in gpu.assigned}
    return f"GPU {gpu.gpu.index} is handed out by {name_some(list(holders))}"


def describe_missing(missing: Sequence[MissingGpu]) -> str:
    """Return which GPUs are out of use and why, the first few of them with the reason."""
    shown = [f"GPU {each.index} is out: {each.reason}" for each in missing[:_NAMED_MAX]]
    more = [f"GPU {each.index}" for each in missing[_NAMED_MAX:]]
    return "; ".join([*shown, f"out as well: {', '.join(more)}"] if more else shown)


def driver_problem(driver: DriverState, reason: str) -> str:
    """Return why no GPU of a node can be read, in a clause; empty: they can."""
    match driver:
        case DriverState.READING:
            return ""
        case DriverState.STARTING:
            return "its driver has not been read yet"
        case DriverState.BLOCKED | DriverState.FAILED:
            return f"driver {driver}: {reason or 'no reason given'}"
        case DriverState.RELEASED:
            what = reason or "its driver was released"
            return f"{what}: `stoker agent resume` on the host takes the driver again"
        case _:
            assert_never(driver)


def name_nodes(names: Sequence[str]) -> str:
    """Return `node a`, or `nodes a, b and 3 more`."""
    return f"node{'s' if len(names) > 1 else ''} {name_some(list(names))}"


def describe_placements(placements: Sequence[Placement]) -> str:
    """Return `node a, GPU 0, 1`, of a gang for each of the first few nodes."""
    shown: list[str] = []
    for placement in placements:
        what = ", ".join(
            f"{each.index} ({each.mig_profile})" if each.mig_profile else str(each.index)
            for each in placement.devices
        )
        shown.append(f"node {placement.node}" + (f", GPU {what}" if what else ""))
    return "; ".join(shown[:_NAMED_MAX]) + (
        f"; {len(shown) - _NAMED_MAX} more nodes" if len(shown) > _NAMED_MAX else ""
    )


def name_some(names: list[str]) -> str:
    """Return the names for a sentence, the first few of them and how many more there are."""
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return ", ".join(names[:_NAMED_MAX]) + more


def _room(
    gpu: Gpu, claims: tuple[Claim, ...], foreign: tuple[Process, ...], reserved_bytes: int
) -> int:
    taken = reserved_bytes
    for claim in claims:
        if claim.memory_bytes is None or claim.mig_device_uuid:
            return 0  # held whole, or a MIG device of it was, under which MIG mode was turned off
        taken += claim.memory_bytes
    for process in foreign:
        if process.memory_used_bytes is None:
            return 0  # nobody knows how much is left
        taken += process.memory_used_bytes
    return max(0, gpu.memory_total_bytes - taken)


def _mig_free(
    gpu: Gpu,
    claims: tuple[Claim, ...],
    foreign: tuple[Process, ...],
    assigned: tuple[Assignment, ...],
) -> tuple[MigDevice, ...]:
    """Return the card's MIG devices that nobody has; none where somebody may have any of them."""
    if not gpu.mig_enabled:
        return ()
    if any(not claim.mig_device_uuid for claim in claims):
        return ()
    if any(not each.mig_device_uuid for each in assigned):
        return ()
    if any(process.gpu_instance_id is None for process in foreign):
        return ()
    taken = {claim.mig_device_uuid for claim in claims}
    taken.update(each.mig_device_uuid for each in assigned)
    # Compute instances of one GPU instance share its memory: a process is told by the latter.
    busy = {process.gpu_instance_id for process in foreign}
    return tuple(
        each
        for each in gpu.mig_devices
        if each.uuid not in taken and each.gpu_instance_id not in busy
    )


def _left(total: int | None, taken: Iterable[int]) -> int | None:
    return None if total is None else max(0, total - sum(taken))


def _services(node: str, tenants: Sequence[Allocation]) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for tenant in tenants:
        if tenant.request.service is not None:
            uuids = tuple(device.uuid for device in tenant.devices_on(node)) or ("",)
            found[tenant.request.service] = (*found.get(tenant.request.service, ()), *uuids)
    return found


def _problem(status: NodeStatus) -> str:
    if status.session == 0:
        return f"disconnected: {status.disconnected_reason}"
    return driver_problem(status.driver, status.driver_reason)
