"""Values as tables for people: the fleet, an allocation, an explanation. Nothing here prints."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice

from rich.console import Group, RenderableType
from rich.text import Text

from stoker.cli.columns import Columns
from stoker.cli.text import one_line
from stoker.cli.wording import ABSENT, ago, counted, verdict_and_action, words
from stoker.client import (
    Allocation,
    Device,
    Gpu,
    GpuVerdict,
    MissingGpu,
    Node,
    Nodes,
    NodeState,
    Placement,
    Process,
    Request,
)
from stoker.core.units import format_bytes, format_duration

_STATE_STYLES = {
    NodeState.READY: "green",
    NodeState.STALE: "yellow",
    NodeState.DISCONNECTED: "red",
}


def status(
    nodes: Nodes, allocations: Sequence[Allocation], address: str, now: float
) -> RenderableType:
    """Return the fleet as three tables: nodes, GPUs, allocations."""
    parts: list[RenderableType] = [_headline(nodes, allocations, address)]
    if nodes.nodes:
        parts += ["", _node_table(nodes.nodes, now), "", gpu_table(nodes.nodes, is_folded=True)]
    if allocations:
        parts += ["", _allocation_table(allocations, now)]
    return Group(*parts)


def _headline(nodes: Nodes, allocations: Sequence[Allocation], address: str) -> Text:
    gpus = [gpu for node in nodes.nodes for gpu in node.gpus]
    taken = sum(bool(gpu.allocation_ids) for gpu in gpus)
    waiting = sum(each.queue_position is not None for each in allocations)
    counts = [
        counted(len(nodes.nodes), "node"),
        f"{counted(len(gpus), 'GPU')}, {taken} allocated",
        f"{waiting} waiting",
        *_unwell_count(gpus),
    ]
    simulated = sum(node.simulated for node in nodes.nodes)
    if simulated:
        counts.append(f"{counted(simulated, 'node')} SIMULATED")
    return Text(f"{address} (stoker {nodes.aggregator_version}): {'; '.join(counts)}")


def _node_table(nodes: Iterable[Node], now: float) -> Columns:
    table = Columns(
        ("NODE", "STATE", "GPUS", "POOL", "DRIVER", "SAMPLE", "NOTE"),
        prose="NOTE",
        dispensable=("DRIVER", "POOL", "SAMPLE", "GPUS"),
    )
    for node in nodes:
        table.add(
            words(node.name),
            words(node.state, _STATE_STYLES.get(node.state, "")),
            words(_gpu_counts(node)),
            words(node.pool or ABSENT),
            words(node.driver_version or ABSENT),
            words(ago(node.last_sample_at, now, "never")),
            _note(node, now),
        )
    return table


def _gpu_counts(node: Node) -> str:
    counts: dict[str, int] = {}
    for gpu in node.gpus:
        counts[gpu.model] = counts.get(gpu.model, 0) + 1
    return ", ".join(f"{count} x {model}" for model, count in counts.items()) or "none"


def _note(node: Node, now: float) -> Text:
    note = Text()
    parts: list[tuple[str, str]] = []
    if node.simulated:
        parts.append(("SIMULATED", "bold magenta"))
    if node.cordoned is not None:
        parts.append((f"cordoned: {node.cordoned}", "yellow"))
    if node.drain_at is not None:
        left = format_duration(max(0.0, node.drain_at - now))
        parts.append((f"draining: what it holds is ended in {left}", "yellow"))
    if node.state_reason:
        parts.append((node.state_reason, ""))
    if node.assignments_unknown:
        parts.append((f"what others have handed out: {node.assignments_unknown}", "yellow"))
    parts += [(f"GPU {each.index} is out: {each.reason}", "red") for each in node.missing_gpus]
    for number, (part, style) in enumerate(parts):
        note.append("; " if number else "")
        note.append_text(words(part, style))
    return note


def gpu_table(
    nodes: Sequence[Node], rows_max: int | None = None, *, is_folded: bool = False
) -> Columns:
    """Return a row for each GPU, the first `rows_max` of them; a line each unless it is folded.

    There is a column for health where a GPU is not well.
    """
    names = ["NODE", "GPU", "MODEL", "MEMORY", "UTIL", "TEMP", "POWER", "HEALTH", "HELD BY", "UUID"]
    shows_health = any(_is_unwell(gpu) for node in nodes for gpu in node.gpus)
    if not shows_health:
        names.remove("HEALTH")
    table = Columns(
        names,
        numbers=("GPU", "MEMORY", "UTIL", "TEMP", "POWER"),
        prose="HELD BY" if is_folded else None,
        cut=None if is_folded else "HELD BY",
        dispensable=("UUID", "MODEL", "POWER", "TEMP", "UTIL", "HEALTH", "HELD BY"),
    )
    for cells, health in islice(_gpu_rows(nodes), rows_max):
        row = [words(cell) for cell in cells]
        if shows_health:
            row.insert(names.index("HEALTH"), health)
        table.add(*row)
    return table


def _gpu_rows(nodes: Iterable[Node]) -> Iterator[tuple[tuple[str, ...], Text]]:
    """Yield the cells of each GPU, its health apart."""
    for node in nodes:
        for gpu in node.gpus:
            cells = (
                node.name,
                str(gpu.index),
                gpu.model + (" SIMULATED" if node.simulated else ""),
                _memory(gpu),
                _measured(gpu.utilization_ratio, 100, "%"),
                _measured(gpu.temperature_celsius, 1, "°C"),
                _measured(gpu.power_watts, 1, "W"),
                _held_by(gpu, node),
                gpu.uuid,
            )
            yield cells, _health(gpu)
        for missing in _unknown(node):
            read = (ABSENT,) * 5
            out = (_out(missing), missing.uuid or ABSENT)
            yield (node.name, str(missing.index), *read, *out), words(ABSENT)


def _is_unwell(gpu: Gpu) -> bool:
    return gpu.health is not None and gpu.health.verdict is not GpuVerdict.HEALTHY


def _unwell_count(gpus: Iterable[Gpu]) -> list[str]:
    unwell = sum(map(_is_unwell, gpus))
    return [f"{counted(unwell, 'GPU')} not healthy"] if unwell else []


def _health(gpu: Gpu) -> Text:
    found = gpu.health
    return words(ABSENT) if found is None else verdict_and_action(found.verdict, found.action)


def _unknown(node: Node) -> list[MissingGpu]:
    """Return the GPUs that are out of use and of which no more is known."""
    known = {gpu.uuid for gpu in node.gpus}
    return [each for each in node.missing_gpus if each.uuid not in known]


def _out(missing: MissingGpu) -> str:
    return f"out ({missing.error_kind})"


def _memory(gpu: Gpu) -> str:
    used = ABSENT if gpu.memory_used_bytes is None else f"{gpu.memory_used_bytes / 2**30:.1f}"
    return f"{used} / {gpu.memory_total_bytes / 2**30:.1f} GiB"


def _measured(value: float | None, scale: float, unit: str) -> str:
    return ABSENT if value is None else f"{value * scale:.0f} {unit}"


def _held_by(gpu: Gpu, node: Node) -> str:
    assigned = dict.fromkeys(each.holder or each.by or "somebody" for each in gpu.assignments)
    # The processes of those to whom it is assigned are named with the assignment.
    others = [each for each in gpu.processes if _part_of(each) not in assigned]
    users = [*assigned, *_foreign(others)]
    users += [_out(each) for each in node.missing_gpus if each.uuid == gpu.uuid]
    if gpu.mig is not None and gpu.mig.is_withheld:
        users.append(f"MIG {gpu.mig.state}".strip())
    held = [*gpu.allocation_ids, *users]
    if gpu.cordon is not None:
        return ", ".join([*held, "cordoned" if gpu.cordon.drain_at is None else "draining"])
    # What could not be read is not known to be free.
    is_known = (
        node.state is NodeState.READY
        and gpu.last_sample_at is not None
        and not node.assignments_unknown
    )
    return ", ".join(held) or ("free" if is_known else ABSENT)


def _foreign(processes: Iterable[Process]) -> Iterator[str]:
    """Yield whose processes are on a GPU beside our allocations, and what they are part of."""
    foreign = [each for each in processes if not each.allocation_id]
    for (user, part_of), group in groupby(foreign, key=lambda each: (each.user, _part_of(each))):
        pids = [str(each.pid) for each in group]
        noun = "process" if len(pids) == 1 else "processes"
        where = f" in {part_of}" if part_of else ""
        yield f"{user or 'unknown'}'s {noun} {', '.join(pids)}{where}"


def _part_of(process: Process) -> str:
    return "" if process.owner is None else process.owner.described()


def _allocation_table(allocations: Iterable[Allocation], now: float) -> Columns:
    table = Columns(
        ("ALLOCATION", "STATE", "NODE", "GPUS", "HOLDER", "SINCE", "EXPIRES"),
        prose="EXPIRES",
        dispensable=("SINCE", "GPUS", "HOLDER"),
    )
    for each in allocations:
        table.add(
            words(each.id),
            words(each.state),
            words(each.node or ABSENT),
            words(_devices(each)),
            words(each.request.holder),
            words(ago(each.granted_at or each.requested_at, now)),
            words(_expiry(each, now)),
        )
    return table


def _devices(allocation: Allocation) -> str:
    if not allocation.devices:
        return f"wants {wanted(allocation.request)}"
    held = f"GPU {', '.join(_part(device) for device in allocation.devices)}"
    others = len(allocation.placements) - 1
    return held if others < 1 else f"{held} and {counted(others, 'node')} more"


def _part(device: Device) -> str:
    if device.exclusive:
        return f"{device.index}"
    return f"{device.index} ({device.mig_profile or _size(device.memory_bytes)})"


def wanted(request: Request) -> str:
    """Return what was asked for in a few words: "2 x H100-80GB", "20 GiB of one GPU"."""
    model = " or ".join(request.models) or "GPU"
    if request.mig_profile:
        least = f" with {_size(request.memory_bytes)}" if request.memory_bytes else ""
        return f"MIG {request.mig_profile}{least} of a {model}"
    parts = [] if request.memory_bytes is None else [_size(request.memory_bytes)]
    if request.compute_milli is not None:
        parts.append(f"{request.compute_milli / 10:g} % of the compute")
    if parts:
        return f"{' and '.join(parts)} of one {model}"
    each = f"{request.gpus} x {model}"
    return each if request.nodes == 1 else f"{request.nodes} nodes with {each} each"


def _expiry(allocation: Allocation, now: float) -> str:
    if allocation.queue_position is not None:
        return f"{_ordinal(allocation.queue_position)} in the queue"
    if allocation.expires_at is None:
        return allocation.ended_reason or ABSENT
    return f"in {format_duration(max(0.0, allocation.expires_at - now))}"


# --- one allocation


def allocation(granted: Allocation, now: float) -> RenderableType:
    """Return a granted allocation with what a person does next."""
    rows = [("allocation", granted.id)]
    here = Placement(granted.node, granted.devices, granted.env)
    for placement in granted.placements or (here,):
        rows.append(("node", placement.node))
        for device in placement.devices:
            what = f"GPU {device.index}  {device.model}  {device.uuid}  {_share(device)}"
            rows.append(("device", what))
        rows += [("env", f"{name}={value}") for name, value in sorted(placement.env.items())]
    rows += [("expires", _expiry(granted, now)), ("release", f"stoker release {granted.id}")]
    # Left for the terminal to fold: a person copies from here.
    lines = [one_line(f"{name:<12}{value}") for name, value in rows]
    return Group(*(Text(line, no_wrap=True, overflow="ignore") for line in lines))


def _share(device: Device) -> str:
    if device.exclusive:
        return "exclusive"
    if device.mig_profile:
        return f"MIG {device.mig_profile}  {device.mig_device_uuid}"
    compute = device.compute_milli
    also = "" if compute is None else f", {compute / 10:g} % of its compute"
    return f"{_size(device.memory_bytes)} of it{also}"


# --- live


def top(nodes: Nodes, now: float, rows_max: int | None) -> RenderableType:
    """Return the fleet's sums and its GPUs, as many as fit into `rows_max` lines."""
    gpus = [gpu for node in nodes.nodes for gpu in node.gpus]
    parts: list[RenderableType] = [_sums(nodes, gpus, now)]
    count = len(gpus) + sum(len(_unknown(node)) for node in nodes.nodes)
    if count:
        parts.append(gpu_table(nodes.nodes, rows_max))
    if rows_max is not None and count > rows_max:
        parts.append(f"and {count - rows_max} more GPUs")
    return Group(*parts)


def _sums(nodes: Nodes, gpus: Sequence[Gpu], now: float) -> Text:
    ready = sum(node.state is NodeState.READY for node in nodes.nodes)
    used = [gpu.memory_used_bytes for gpu in gpus if gpu.memory_used_bytes is not None]
    busy = [gpu.utilization_ratio for gpu in gpus if gpu.utilization_ratio is not None]
    power = [gpu.power_watts for gpu in gpus if gpu.power_watts is not None]
    taken = sum(bool(gpu.allocation_ids) for gpu in gpus)
    total = sum(gpu.memory_total_bytes for gpu in gpus)
    parts = [
        f"{_clock_time(now)} UTC",
        f"{ready} of {counted(len(nodes.nodes), 'node')} ready",
        f"{taken} of {counted(len(gpus), 'GPU')} allocated",
        f"memory {_size(sum(used)) if used else ABSENT} of {_size(total)}",
        f"busy {sum(busy) / len(busy):.0%}" if busy else f"busy {ABSENT}",
        f"{sum(power) / 1000:.2f} kW" if power else f"power {ABSENT}",
        *_unwell_count(gpus),
    ]
    simulated = sum(node.simulated for node in nodes.nodes)
    if simulated:
        parts.append(f"{counted(simulated, 'node')} SIMULATED")
    # What could not be read is not in the sums, and that is said.
    lacking = len(gpus) - min(len(used), len(busy), len(power))
    if lacking:
        parts.append(f"{counted(lacking, 'GPU')} not fully read")
    return Text("; ".join(parts))


# --- helpers


def _size(size: int) -> str:
    return format_bytes(size)


def _clock_time(now: float) -> str:
    seconds = int(now) % 86400
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
