"""How a GPU's partitions are, and what would be done to them: as values that people are shown."""

from collections.abc import Sequence
from typing import Literal

from stoker.agent.mig.choosing import Refusal, admit, choose, disturbed_instances
from stoker.agent.mig.comparing import compute_of, is_as_wanted, layout_of, target_of
from stoker.agent.mig.in_the_way import GpuUsers
from stoker.agent.mig.operations import GpuRecord
from stoker.agent.mig.steps import (
    compute_changes,
    kept_places,
    needs_reset,
    next_steps,
    obstacle,
    sentence,
)
from stoker.agent.partitions import GpuInstance, GpuMigStatus, GpuPartitions, Target
from stoker.core.mig.geometry import MigState, Placed, Wanted
from stoker.core.mig.layouts import describe
from stoker.core.mig.reports import GpuMigFacts, GpuPlan, InstanceChange, InstanceFacts, InTheWay


def plan_of(gpu: GpuPartitions, wanted: Wanted, users: GpuUsers) -> GpuPlan:
    """Return what would be done to get there."""
    found = choose(gpu, wanted, users)
    if isinstance(found, Target):
        return _plan(gpu, found, users, ())
    if found.target is not None:
        return _plan(gpu, found.target, users, found.in_the_way)
    return _refused(gpu, wanted.is_enabled, found.reason)


def plan_of_target(gpu: GpuPartitions, target: Target, users: GpuUsers) -> GpuPlan:
    """Return what would be done to get to just these places."""
    if reason := obstacle(gpu, target):
        return _refused(gpu, target.is_enabled, f"{gpu.uuid} ({gpu.model}): {reason}")
    found = admit(gpu, target, users)
    return _plan(gpu, target, users, found.in_the_way if isinstance(found, Refusal) else ())


def refused_plan(gpu: GpuPartitions, reason: str) -> GpuPlan:
    """Return that nothing would be done, and why."""
    return _refused(gpu, gpu.is_enabled, reason)


def status_of(
    gpu_uuid: str, record: GpuRecord, gpu: GpuPartitions | None, leaving: Sequence[InTheWay] = ()
) -> GpuMigStatus:
    """Return how far a GPU is. `gpu` None: its partitions were not read; `leaving`: who should."""
    operation = record.operation
    is_draining = operation is not None and operation.state is MigState.DRAINING
    state, reason = _state(record, gpu)
    return GpuMigStatus(
        gpu_uuid=gpu_uuid,
        state=state,
        reason=reason,
        config=_config(record),
        operation_id=operation.id if operation else "",
        is_withheld=_is_withheld(record, gpu),
        leave_by=operation.leave_by if operation and is_draining else None,
        is_evicting=operation is not None and is_draining and operation.evict,
        leaving_allocation_ids=tuple(
            dict.fromkeys(each.allocation_id for each in leaving if each.allocation_id)
        )
        if is_draining
        else (),
        changed_at=record.changed_at,
        layout=layout_of(gpu) if gpu else None,
        geometry=gpu.geometry if gpu else None,
    )


def facts_of(gpu: GpuPartitions, record: GpuRecord, unread: str = "") -> GpuMigFacts:
    """Return how a GPU is; `unread`: why it may be otherwise by now."""
    status = status_of(gpu.uuid, record, gpu)
    operation = record.operation
    return GpuMigFacts(
        uuid=gpu.uuid,
        index=gpu.index,
        model=gpu.model,
        pci_device_id=f"0x{gpu.pci_device_id:08X}",
        mode=gpu.is_enabled,
        mode_pending=gpu.is_pending,
        instances=tuple(
            InstanceFacts(
                each.profile,
                each.start,
                each.size,
                tuple(part.compute_slices for part in each.compute_instances),
                _uuids(each),
            )
            for each in gpu.instances
        ),
        state=status.state or "",
        reason=status.reason,
        config=status.config,
        operation_id=status.operation_id,
        is_withheld=status.is_withheld,
        leave_by=status.leave_by,
        changed_at=status.changed_at,
        steps_done=operation.steps_done if operation else 0,
        steps_total=operation.steps_total if operation else 0,
        undo=in_words(past.target) if (past := record.before(target_of(gpu))) else "",
        unread=unread,
    )


def in_words(target: Target) -> str:
    """Return how a GPU is, or was, or is to be."""
    return describe(target.layout) if target.is_enabled else "MIG mode off"


def how_it_is(gpu: GpuPartitions) -> str:
    """Return how a GPU is now, with what is half made of it."""
    if not gpu.is_enabled:
        return "MIG mode off" + (", on with the next reset" if gpu.is_pending else "")
    half_made = [each for each in gpu.instances if not each.compute_instances]
    halves = ", ".join(f"{each.profile}@{each.start}" for each in half_made)
    return (
        describe(layout_of(gpu))
        + (f", and without compute instances {halves}" if halves else "")
        + ("" if gpu.is_pending else ", MIG mode off with the next reset")
    )


def _plan(
    gpu: GpuPartitions, target: Target, users: GpuUsers, in_the_way: tuple[InTheWay, ...]
) -> GpuPlan:
    changes = _changes(gpu, target, users)
    steps = next_steps(gpu, target)
    going = disturbed_instances(gpu, target)
    kept = kept_places(gpu, target)
    lost = [
        part.uuid
        for each in gpu.instances
        if each.id in going
        for part in (
            compute_changes(each, kept[each.id], gpu.geometry)[0]
            if each.id in kept
            else each.compute_instances
        )
    ]
    return GpuPlan(
        uuid=gpu.uuid,
        index=gpu.index,
        model=gpu.model,
        mode=gpu.is_enabled,
        mode_wanted=target.is_enabled,
        mode_change=_mode_change(gpu, target),
        changes=changes,
        steps=tuple(map(sentence, steps)),
        in_the_way=in_the_way,
        uuids_lost=tuple(uuid for uuid in lost if uuid),
        notes=_notes(gpu, target),
    )


def _refused(gpu: GpuPartitions, is_enabled: bool, reason: str) -> GpuPlan:
    return GpuPlan(
        uuid=gpu.uuid,
        index=gpu.index,
        model=gpu.model,
        mode=gpu.is_enabled,
        mode_wanted=is_enabled,
        mode_change="none",
        changes=(),
        steps=(),
        in_the_way=(),
        uuids_lost=(),
        refusal=reason,
    )


def _mode_change(gpu: GpuPartitions, target: Target) -> Literal["none", "at_once", "reset"]:
    if gpu.is_enabled == target.is_enabled:
        return "none"
    return "at_once" if gpu.toggles_at_once else "reset"


def _notes(gpu: GpuPartitions, target: Target) -> tuple[str, ...]:
    if needs_reset(gpu, target):
        mode = "on" if target.is_enabled else "off"
        return (f"MIG mode is pending to be {mode}: reset the GPU, or reboot",)
    if gpu.is_enabled == target.is_enabled:
        return ()
    notes = ["the agent lets go of the driver while the mode is changed"]
    if gpu.toggles_at_once:
        if target.is_enabled:
            notes.append("the mode is lost with the driver; the agent sets it again at its start")
    else:
        notes.append("the driver resets the GPU for it; if it cannot, a reset or a reboot is due")
    return tuple(notes)


def _changes(gpu: GpuPartitions, target: Target, users: GpuUsers) -> tuple[InstanceChange, ...]:
    kept = kept_places(gpu, target)
    # Place, what is destroyed before what is created there.
    found: list[tuple[int, bool, InstanceChange]] = []
    for each in gpu.instances:
        is_busy = each.id in users.instances
        placed = kept.get(each.id)
        if placed is None:
            compute = compute_of(each, gpu.geometry)
            change = InstanceChange(
                "destroy", each.profile, each.start, each.size, compute, _uuids(each), is_busy
            )
        else:
            goes, comes = compute_changes(each, placed, gpu.geometry)
            change = InstanceChange(
                "repair" if goes or comes else "keep",
                each.profile,
                each.start,
                each.size,
                placed.compute,
                _uuids(each),
                is_busy,
            )
        found.append((each.start, False, change))
    stays = set(kept.values())
    found += [(each.start, True, _creation(each)) for each in target.layout if each not in stays]
    return tuple(change for _, _, change in sorted(found, key=lambda each: each[:2]))


def _creation(placed: Placed) -> InstanceChange:
    return InstanceChange("create", placed.profile, placed.start, placed.size, placed.compute)


def _uuids(instance: GpuInstance) -> tuple[str, ...]:
    return tuple(each.uuid for each in instance.compute_instances if each.uuid)


def _config(record: GpuRecord) -> str:
    if record.operation is not None and record.operation.state is not MigState.SUCCESS:
        return record.operation.config
    return record.declared.config if record.declared else ""


def _is_in_place(record: GpuRecord, gpu: GpuPartitions | None) -> bool:
    if record.declared is None:
        return True
    return gpu is not None and is_as_wanted(gpu, record.declared.wanted)


def _is_withheld(record: GpuRecord, gpu: GpuPartitions | None) -> bool:
    operation = record.operation
    is_under_way = operation is not None and (not operation.is_final or operation.is_stuck)
    return is_under_way or not _is_in_place(record, gpu)


def _state(record: GpuRecord, gpu: GpuPartitions | None) -> tuple[MigState | None, str]:
    operation = record.operation
    if operation is not None and (operation.state is not MigState.SUCCESS):
        return operation.state, operation.reason
    if record.declared is None:
        return (None, "") if operation is None else (operation.state, operation.reason)
    if gpu is None:
        return MigState.PENDING, "its partitions were not read yet"
    if _is_in_place(record, gpu):
        return MigState.SUCCESS, operation.reason if operation else ""
    if operation is None:
        return MigState.PENDING, f"it has {how_it_is(gpu)}"
    return MigState.FAILED, f"it was changed by somebody else since, and has {how_it_is(gpu)}"
