"""Partitions of GPUs (MIG) as messages and back; raises Malformed with the field's path.

What an agent tells of its GPUs is read whole: a place that cannot be, two instances that overlap or
one beyond the board's end are refused by name. Words that a person chose on the node are cut: a
long one is no reason to lose the node. A GPU that its node does not list is kept as it is
told and looked up by nobody: it may be the one that has just fallen off the bus.
"""

from collections.abc import Mapping, Sequence

from stoker.aggregator import limits
from stoker.aggregator.gpu_mig import GpuMig
from stoker.aggregator.leaving import Leave
from stoker.aggregator.limits import Malformed
from stoker.core.errors import shown
from stoker.core.gpu_models import MIB
from stoker.core.mig.geometry import Geometry, Layout, MigProfile, MigState, Placed
from stoker.v1 import mig_pb2

STATES: Mapping[MigState | None, mig_pb2.MigState.ValueType] = {
    None: mig_pb2.MIG_STATE_UNSPECIFIED,
    MigState.PENDING: mig_pb2.MIG_STATE_PENDING,
    MigState.DRAINING: mig_pb2.MIG_STATE_DRAINING,
    MigState.APPLYING: mig_pb2.MIG_STATE_APPLYING,
    MigState.ROLLING_BACK: mig_pb2.MIG_STATE_ROLLING_BACK,
    MigState.REBOOT_REQUIRED: mig_pb2.MIG_STATE_REBOOT_REQUIRED,
    MigState.SUCCESS: mig_pb2.MIG_STATE_SUCCESS,
    MigState.FAILED: mig_pb2.MIG_STATE_FAILED,
}
_STATES: Mapping[int, MigState | None] = {number: state for state, number in STATES.items()}


# --- what agents say


def read_node_mig(message: mig_pb2.NodeMig, behind_seconds: float) -> dict[str, GpuMig]:
    """Return the partitions of a node's GPUs by UUID.

    `behind_seconds`: what to add to the node's clock to have the aggregator's.
    """
    field = "frame.mig.gpus"
    limits.few(len(message.gpus), limits.JUDGED_GPUS_MAX, field)
    told = [_gpu(each, behind_seconds, f"{field}[{i}]") for i, each in enumerate(message.gpus)]
    limits.unique([each.gpu_uuid for each in told], f"{field}[].gpu_uuid")
    return {each.gpu_uuid: each for each in told}


def _gpu(message: mig_pb2.GpuMig, behind_seconds: float, field: str) -> GpuMig:
    if message.state not in _STATES:
        raise Malformed(f"{field}.state", f"{message.state} is no state of a partitioning")
    geometry = None
    if message.HasField("geometry"):
        geometry = _geometry(message.geometry, f"{field}.geometry")
    layout = None
    if message.HasField("layout"):
        # A driver tells places to root alone; then the board's end is not known.
        slices = geometry.memory_slices if geometry is not None else 0
        slices = slices or limits.MIG_SLICES_MAX
        layout = _layout(message.layout.instances, slices, f"{field}.layout.instances")
    leave_by = changed_at = None
    if message.HasField("leave_by"):
        leave_by = limits.finite(message.leave_by, f"{field}.leave_by") + behind_seconds
    if message.HasField("changed_at"):
        changed_at = limits.finite(message.changed_at, f"{field}.changed_at") + behind_seconds
    return GpuMig(
        gpu_uuid=limits.text(
            message.gpu_uuid, f"{field}.gpu_uuid", limits.ID_BYTES_MAX, required=True
        ),
        state=_STATES[message.state],
        reason=message.reason[: limits.REASON_BYTES_MAX],
        config=message.config[: limits.TEXT_BYTES_MAX],
        operation_id=message.operation_id[: limits.ID_BYTES_MAX],
        is_withheld=message.is_withheld,
        leave_by=leave_by,
        is_evicting=message.is_evicting,
        leaving=_leaving(message.leaving_allocation_ids, f"{field}.leaving_allocation_ids"),
        changed_at=changed_at,
        layout=layout,
        geometry=geometry,
    )


def _leaving(ids: Sequence[str], field: str) -> tuple[str, ...]:
    limits.few(len(ids), limits.LEAVING_MAX, field)
    return tuple(
        limits.text(each, f"{field}[{number}]", limits.ID_BYTES_MAX, required=True)
        for number, each in enumerate(ids)
    )


def _layout(messages: Sequence[mig_pb2.MigInstance], slices: int, field: str) -> Layout:
    """Return the instances of a board of so many memory slices, in the order of their places."""
    limits.few(len(messages), limits.MIG_SLICES_MAX, field)
    placed: list[Placed] = []
    end = 0
    for i, each in enumerate(messages):
        name = f"{field}[{i}]"
        if each.start < end:
            raise Malformed(f"{name}.start", f"must be {end} or more, found {each.start}")
        if each.size == 0 or each.start + each.size > slices:
            problem = f"{each.size} memory slices from {each.start} on a board of {slices}"
            raise Malformed(f"{name}.size", problem)
        end = each.start + each.size
        limits.few(len(each.compute), limits.MIG_SLICES_MAX, f"{name}.compute")
        for place, compute in enumerate(each.compute):
            limits.number(compute, f"{name}.compute[{place}]", 1, limits.MIG_SLICES_MAX)
        placed.append(
            Placed(each.start, each.size, _profile_name(each.profile, name), tuple(each.compute))
        )
    return tuple(placed)


def _geometry(message: mig_pb2.MigGeometry, field: str) -> Geometry:
    most = limits.MIG_SLICES_MAX
    compute = limits.number(message.compute_slices, f"{field}.compute_slices", 0, most)
    memory = limits.number(message.memory_slices, f"{field}.memory_slices", 0, most)
    limits.few(len(message.profiles), limits.MIG_PROFILES_MAX, f"{field}.profiles")
    profiles = tuple(
        _profile(each, int(compute), int(memory), f"{field}.profiles[{i}]")
        for i, each in enumerate(message.profiles)
    )
    limits.unique([each.name for each in profiles], f"{field}.profiles[].name")
    return Geometry(int(compute), int(memory), profiles)


def _profile(message: mig_pb2.MigProfile, compute: int, memory: int, field: str) -> MigProfile:
    """Return the profile on a board of so many slices; without places it has no size either.

    What creating one takes, and its engines, are its node's business and not told.
    """
    least = 1 if message.starts else 0
    size = int(limits.number(message.memory_slices, f"{field}.memory_slices", least, memory))
    limits.few(len(message.starts), limits.MIG_SLICES_MAX, f"{field}.starts")
    for i, start in enumerate(message.starts):
        limits.number(start, f"{field}.starts[{i}]", 0, memory - size)
    limits.unique([str(start) for start in message.starts], f"{field}.starts[]")
    return MigProfile(
        name=_profile_name(message.name, field, "name"),
        constant=0,
        profile_id=0,
        compute_slices=int(
            limits.number(message.compute_slices, f"{field}.compute_slices", 0, compute)
        ),
        memory_slices=size,
        starts=tuple(message.starts),
        memory_mib=limits.size(message.memory_bytes, f"{field}.memory_bytes") // MIB,
        sm_count=0,
        copy_engines=0,
        decoders=0,
        jpeg_decoders=0,
        optical_flow=0,
        count_max=int(
            limits.number(message.count_max, f"{field}.count_max", 0, limits.MIG_SLICES_MAX)
        ),
    )


def _profile_name(value: str, field: str, of: str = "profile") -> str:
    return limits.text(value, f"{field}.{of}", required=True)


# --- what clients see


def gpu_mig_message(mig: GpuMig | None) -> mig_pb2.GpuMig | None:
    """Return the partitions as a message; None: nothing was told."""
    if mig is None:
        return None
    message = mig_pb2.GpuMig(
        gpu_uuid=mig.gpu_uuid,
        state=STATES[mig.state],
        reason=mig.reason,
        config=mig.config,
        operation_id=mig.operation_id,
        is_withheld=mig.is_withheld,
        leave_by=mig.leave_by,
        is_evicting=mig.is_evicting,
        changed_at=mig.changed_at,
        leaving_allocation_ids=mig.leaving,
    )
    if mig.layout is not None:
        message.layout.SetInParent()
        for each in mig.layout:
            message.layout.instances.add(
                profile=each.profile, start=each.start, size=each.size, compute=each.compute
            )
    if mig.geometry is not None:
        message.geometry.compute_slices = mig.geometry.compute_slices
        message.geometry.memory_slices = mig.geometry.memory_slices
        for profile in mig.geometry.profiles:
            message.geometry.profiles.add(
                name=profile.name,
                compute_slices=profile.compute_slices,
                memory_slices=profile.memory_slices,
                starts=profile.starts,
                memory_bytes=profile.memory_mib * MIB,
                count_max=profile.count_max,
            )
    return message


def leave_message(leave: Leave | None) -> mig_pb2.LeaveRequest | None:
    """Return what a holder is asked as a message; None: nothing."""
    if leave is None:
        return None
    return mig_pb2.LeaveRequest(
        reason=leave.reason, leave_by=leave.leave_by, is_evicting=leave.is_evicting
    )


# --- what clients ask

VERBS = (
    mig_pb2.MIG_VERB_PLAN,
    mig_pb2.MIG_VERB_APPLY,
    mig_pb2.MIG_VERB_UNDO,
    mig_pb2.MIG_VERB_STATUS,
)
_CHANGING = (mig_pb2.MIG_VERB_APPLY, mig_pb2.MIG_VERB_UNDO)
_WITH_ENTRIES = (mig_pb2.MIG_VERB_PLAN, mig_pb2.MIG_VERB_APPLY)


def check_ask(ask: mig_pb2.MigAsk) -> None:
    """Refuse what no agent could be asked; what its GPUs offer is the agent's to say."""
    if ask.verb not in VERBS:
        raise Malformed("ask.verb", f"{ask.verb} is nothing that can be asked of partitions")
    is_changing = ask.verb in _CHANGING
    limits.text(ask.operation_id, "ask.operation_id", limits.ID_BYTES_MAX, required=is_changing)
    limits.text(ask.config, "ask.config")
    limits.few(len(ask.entries), limits.MIG_ENTRIES_MAX, "ask.entries")
    if ask.verb in _WITH_ENTRIES and not ask.entries:
        raise Malformed("ask.entries", "must not be empty: what shall the GPUs be cut into?")
    if ask.verb not in _WITH_ENTRIES and ask.entries:
        raise Malformed("ask.entries", "tells a layout where none is asked for; leave it out")
    limits.few(len(ask.gpus), limits.JUDGED_GPUS_MAX, "ask.gpus")
    for i, gpu in enumerate(ask.gpus):
        limits.text(gpu, f"ask.gpus[{i}]", limits.ID_BYTES_MAX, required=True)
    limits.number(ask.drain_seconds, "ask.drain_seconds", 0.0, limits.DRAIN_SECONDS_MAX)
    for i, entry in enumerate(ask.entries):
        _check_entry(entry, f"ask.entries[{i}]")


def _check_entry(entry: mig_pb2.MigEntry, field: str) -> None:
    limits.few(len(entry.device_filter), limits.MODELS_MAX, f"{field}.device_filter")
    for i, each in enumerate(entry.device_filter):
        limits.text(each, f"{field}.device_filter[{i}]", required=True)
    limits.few(len(entry.devices), limits.JUDGED_GPUS_MAX, f"{field}.devices")
    limits.few(len(entry.mig_devices), limits.MIG_PROFILES_MAX, f"{field}.mig_devices")
    if entry.mig_devices and not entry.mig_enabled:
        raise Malformed(f"{field}.mig_devices", "needs mig_enabled: there are none without it")
    for name, count in sorted(entry.mig_devices.items()):
        limits.text(name, f"{field}.mig_devices key", required=True)
        limits.number(count, f"{field}.mig_devices[{shown(name)}]", 0, limits.MIG_SLICES_MAX)
