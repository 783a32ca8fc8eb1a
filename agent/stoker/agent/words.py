"""What the node says of itself in one line: to the service manager, the aggregator, and people."""

from datetime import UTC, datetime

import msgspec

from stoker.agent.model import DriverState, NodeView, Release
from stoker.agent.verdicts import GpuHealth
from stoker.core.local import GpuFacts
from stoker.core.units import format_duration

# More GPUs than these are counted: they are out for the same reason, most often.
_GPUS_NAMED_MAX = 4


def describe_release(release: Release, held: int) -> str:
    """Return who had the driver released, when and for how long, and what is held meanwhile."""
    time = datetime.fromtimestamp(release.at, UTC)
    if release.until is None:
        until = "until it is resumed"
    else:
        until = f"for {format_duration(release.until - release.at)}"
    return f"released by {release.by} at {time:%Y-%m-%d %H:%M} UTC {until}, {_are_held(held)}"


def summarize(view: NodeView) -> str:
    """Return what is read, what is not and why, what is held, and how the link is."""
    link = "connected" if view.connected else "not connected"
    parts = [_reading(view), f"aggregator {link}"]
    if view.driver.state is not DriverState.RELEASED:  # its reason says what is held
        parts.insert(1, _are_held(len(view.held)))
    return "; ".join(parts)


def list_gpus(view: NodeView) -> tuple[GpuFacts, ...]:
    """Return every GPU that is known of, in the driver's order, and why those out are not read."""
    if view.inventory is None:
        return ()
    samples = {sample.uuid: sample for sample in view.samples}
    found: list[GpuFacts] = []
    for gpu in (each.identity for each in view.inventory.gpus):
        sample = samples.get(gpu.uuid)
        unread = view.unread.get(gpu.uuid) or _why_none(view)
        facts = GpuFacts(
            uuid=gpu.uuid,
            index=gpu.index,
            model=gpu.model,
            is_read=sample is not None,
            reason="" if sample else unread,
            memory_used_bytes=sample.memory_used_bytes if sample else None,
            memory_unattributed_bytes=view.memory_unattributed_bytes.get(gpu.uuid),
        )
        found.append(facts)
    found += [
        GpuFacts(uuid=each.uuid, index=each.index, model="", is_read=False, reason=each.message)
        for each in view.inventory.missing
    ]
    health = {each.uuid: each for each in view.health}
    judged = [_judged(gpu, health.get(gpu.uuid or "")) for gpu in found]
    return tuple(sorted(judged, key=lambda gpu: gpu.index))


def list_blind(view: NodeView) -> tuple[str, ...]:
    """Return what the agent cannot see and why, a sentence each."""
    found: list[str] = []
    if not view.kernel_log.is_followed:
        reason = view.kernel_log.reason
        is_named = reason.startswith("the kernel's log")
        found.append(reason if is_named else f"the kernel's log: {reason}")
    if view.processes is not None and view.processes.assignments_unknown:
        found.append(f"what others have handed out: {view.processes.assignments_unknown}")
    return tuple(found)


def _judged(gpu: GpuFacts, health: GpuHealth | None) -> GpuFacts:
    if health is None:
        return gpu
    return msgspec.structs.replace(
        gpu,
        verdict=health.verdict,
        action=health.action,
        faults=tuple(fault.reason for fault in health.faults),
    )


def _reading(view: NodeView) -> str:
    gpus = list_gpus(view)
    out = [gpu for gpu in gpus if not gpu.is_read]
    if view.driver.state is not DriverState.READING:
        return f"no GPU is read: {_why_none(view)}"
    if not out:
        return f"{_counted(len(gpus), 'GPU')} read"
    named = "; ".join(f"GPU {gpu.index}: {gpu.reason}" for gpu in out[:_GPUS_NAMED_MAX])
    more = f"; and {len(out) - _GPUS_NAMED_MAX} more" if len(out) > _GPUS_NAMED_MAX else ""
    return f"{len(gpus) - len(out)} of {_counted(len(gpus), 'GPU')} read (out: {named}{more})"


def _why_none(view: NodeView) -> str:
    driver = view.driver
    if driver.state is DriverState.READING:
        return "not read yet"
    if driver.state is DriverState.RELEASED:
        return driver.reason
    return f"driver {driver.state}: {driver.reason}" if driver.reason else f"driver {driver.state}"


def _are_held(count: int) -> str:
    return f"{_counted(count, 'allocation')} held"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
