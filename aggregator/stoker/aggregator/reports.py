"""What a node last reported, after one more report."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from stoker.aggregator.events import AgentConnected, FrameArrived
from stoker.aggregator.gpu_mig import is_asking, withheld
from stoker.aggregator.model import DriverState, Frame, GpuSample, MissingGpu, NodeStatus
from stoker.aggregator.processes import ProcessTable

# What a driver is said to be that cannot be read. One of which nothing was said on this stream yet
# is `STARTING`, too: frames that are sent again come before the one that says it.
_SILENT = (DriverState.BLOCKED, DriverState.FAILED, DriverState.RELEASED)


def after_connect(before: NodeStatus, event: AgentConnected) -> NodeStatus:
    """Return the status at the beginning of a stream.

    Of the last stream only telemetry still holds, as it tells its own age. Processes, driver,
    health and partitions are not known until a frame of this stream tells them: meanwhile the host
    may have been rebooted. GPUs that were out of use are so until an inventory tells.
    """
    return NodeStatus(
        session=event.session,
        disconnected_reason="",
        last_frame_at=before.last_frame_at,
        last_sample_at=before.last_sample_at,
        samples=before.samples,
        held={held.id: held for held in event.held},
        missing=before.missing if event.missing is None else event.missing,
        acked_sequence=event.acked_sequence,
    )


def after_frame(before: NodeStatus, event: FrameArrived, tenants: Collection[str]) -> NodeStatus:
    """Return the status with what the frame tells; what it leaves out has not changed.

    Refusals are kept for `tenants` (what the ledger wants of the node) and matter to nobody else.
    """
    frame = event.frame
    samples, sampled_at = before.samples, before.last_sample_at
    if frame.samples is not None and event.sampled_at >= (sampled_at or 0.0):
        samples, sampled_at = frame.samples, min(event.sampled_at, event.at)
    refusals = before.refusals
    if frame.refusals:
        known = {**(refusals or {}), **{r.allocation_id: r.reason for r in frame.refusals}}
        refusals = {id_: known[id_] for id_ in tenants if id_ in known}
    has_driver = frame.driver is not None
    driver = before.driver if frame.driver is None else frame.driver
    missing = before.missing if frame.missing is None else frame.missing
    processes = before.processes if frame.processes is None else frame.processes
    if frame.missing is not None:
        # Of what goes nothing is known any more, of what comes back nothing yet.
        changed = _uuids(before.missing) ^ _uuids(missing)
        samples = _without(samples, _uuids(missing))
        if frame.processes is None and processes is not None:
            processes = _doubted(processes, changed)
    if driver not in (DriverState.READING, before.driver) or driver in _SILENT:
        samples = None  # a driver that does not answer tells nothing: not even what was so just now
    health, health_at = before.health, before.health_at
    if frame.health is not None:
        health = {each.uuid: each for each in frame.health}
        health_at = event.at if health_at is None else health_at
    return replace(
        before,
        last_frame_at=event.at,
        last_sample_at=sampled_at,
        samples=samples,
        processes=processes,
        held=before.held if frame.held is None else {held.id: held for held in frame.held},
        refusals=refusals,
        commands_done=max(before.commands_done, frame.commands_done),
        missing=missing,
        driver=driver,
        driver_reason=frame.driver_reason if has_driver else before.driver_reason,
        health=health,
        health_at=health_at,
        mig=before.mig if frame.mig is None else frame.mig,
        frames_dropped=frame.frames_dropped,
        acked_sequence=frame.sequence,
    )


def tells_of_allocations(before: NodeStatus, frame: Frame) -> bool:
    """Whether the frame tells something new of what the node holds."""
    return (
        frame.held is not None or bool(frame.refusals) or frame.commands_done > before.commands_done
    )


def changes_placement(before: NodeStatus, after: NodeStatus) -> bool:
    """Whether something other than time decides differently where a request can go."""
    return (
        after.held is not before.held
        or after.missing != before.missing
        or (after.driver, after.driver_reason) != (before.driver, before.driver_reason)
        or _withheld_otherwise(before, after)
        or not _are_same_processes(after.processes, before.processes)
        or not _are_same_gpus(after.samples, before.samples)
    )


def after_listing(before: NodeStatus, new: Collection[str]) -> NodeStatus:
    """Return the status once the node lists GPUs more: who uses those nobody has looked at yet."""
    if before.processes is None:
        return before
    unread = (*before.processes.unread_gpu_uuids, *sorted(new))
    return replace(before, processes=replace(before.processes, unread_gpu_uuids=unread))


def asks_to_leave(status: NodeStatus) -> bool:
    """Whether the node asks holders of its GPUs to be gone."""
    return is_asking(status.mig)


def _withheld_otherwise(before: NodeStatus, after: NodeStatus) -> bool:
    return after.mig is not before.mig and withheld(after.mig) != withheld(before.mig)


def _uuids(missing: tuple[MissingGpu, ...]) -> frozenset[str]:
    return frozenset(each.uuid for each in missing if each.uuid)


def _without(
    samples: Mapping[str, GpuSample] | None, uuids: frozenset[str]
) -> Mapping[str, GpuSample] | None:
    if samples is None or uuids.isdisjoint(samples):
        return samples
    return {uuid: sample for uuid, sample in samples.items() if uuid not in uuids}


def _doubted(table: ProcessTable, uuids: frozenset[str]) -> ProcessTable:
    """Return the table without what it says of these GPUs."""
    return replace(
        table,
        processes=tuple(each for each in table.processes if each.gpu_uuid not in uuids),
        unread_gpu_uuids=tuple(sorted(uuids | set(table.unread_gpu_uuids))),
    )


def _are_same_processes(one: ProcessTable | None, other: ProcessTable | None) -> bool:
    if one is other:
        return True
    return one is not None and one.says_the_same_as(other)


def _are_same_gpus(
    one: Mapping[str, GpuSample] | None, other: Mapping[str, GpuSample] | None
) -> bool:
    """Whether the same GPUs could be read, and the driver keeps as much of each for itself."""
    if one is other:
        return True
    if one is None or other is None or len(one) != len(other):
        return False
    for uuid, sample in one.items():
        earlier = other.get(uuid)
        if (
            earlier is None
            or earlier.memory_reserved_bytes != sample.memory_reserved_bytes
            or earlier.is_read != sample.is_read
        ):
            return False
    return True
