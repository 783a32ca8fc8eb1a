"""What an agent answers, for people. Nothing here prints."""

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stoker.cli.columns import GAP, Columns
from stoker.cli.wording import ABSENT, counted, verdict_and_action, words
from stoker.core.local import (
    AssignmentFacts,
    DriverFacts,
    GpuFacts,
    HeldFacts,
    HolderFacts,
    ProcessFacts,
    Profiling,
    Released,
    ReleaseFacts,
    Resumed,
    SetHealthy,
    Status,
    UsersFacts,
)
from stoker.core.units import format_bytes, format_duration

Shown = RenderableType

RESUME = "stoker agent resume"
OTHERS = "others that have device files of the driver open"
_GPU_DEVICE = re.compile(r"/dev/nvidia(\d{1,6})", re.ASCII)
_STATE_STYLES = {"reading": "green", "starting": "yellow", "released": "yellow"}


def status(answer: Status) -> Shown:
    """Return how the agent is: a line for each part of it, then its GPUs and who uses them."""
    rows = [
        ("node", words(answer.node + (" SIMULATED" if answer.simulated else ""))),
        ("agent", words(f"stoker {answer.version}, PID {answer.pid}")),
        ("driver", _driver(answer)),
        *_call(answer.driver),
        *([("release", words(_release(answer.release)))] if answer.release else []),
        *([("not saved", words(answer.release_unsaved, "red"))] if answer.release_unsaved else []),
        ("samples", words(_samples(answer))),
        ("host", words(_host(answer.driver))),
        *([("profiling", words(_pause(answer.profiling)))] if answer.profiling.is_paused else []),
        ("link", words(_link(answer))),
        *(("not seen", words(each, "yellow")) for each in answer.blind),
    ]
    lines = Table.grid(padding=(0, GAP, 0, 0))
    for name, text in rows:
        lines.add_row(name, text)
    parts: list[Shown] = [lines]
    if answer.gpus:
        parts += ["", _gpu_table(answer.gpus)]
    if any(gpu.faults for gpu in answer.gpus):
        parts += ["", _fault_table(answer.gpus)]
    return Group(*parts, *_users(answer.users, answer.blind), *_holders(answer.users))


def released(answer: Released) -> Shown:
    """Return how it went, what it means, and what still uses the GPUs."""
    if answer.pending:
        lines = [
            words(answer.pending, "red"),
            Text("the kernel holds it; the driver is released as soon as it is gone"),
        ]
    else:
        lines = [Text(f"released in {answer.took_seconds:.2f} s: the agent has no handle open")]
    until = "" if answer.release.until is None else f", or wait until {_time(answer.release.until)}"
    lines.append(Text(f"to have it read again: {RESUME}{until}"))
    if answer.unsaved:
        found = f"not noted down ({answer.unsaved}): a restart of the agent takes the driver again"
        lines.append(words(found, "red"))
    # Who unloads the driver or resets a GPU has to know that nobody else is in the way.
    holders = _holders(answer.users) or ["", words(f"{OTHERS}: none")]
    return Group(*lines, *_users(answer.users), *holders)


def resumed(answer: Resumed) -> Shown:
    """Return what comes now."""
    found = "the driver is taken again" if answer.was_released else "the driver was not released"
    lines = [Text(found)]
    if answer.unsaved:
        unsaved = f"not noted down ({answer.unsaved}): a restart of the agent releases it again"
        lines.append(words(unsaved, "red"))
    return Group(*lines)


def set_healthy(answer: SetHealthy) -> Shown:
    """Return what was forgotten, and what that means."""
    if answer.forgotten:
        lines = [words(f"{answer.gpu_uuid}: {counted(len(answer.forgotten), 'fault')} forgotten")]
        lines += [words(f"  {fault}") for fault in answer.forgotten]
        lines.append(words("what is still so will be found again"))
    else:
        lines = [words(f"{answer.gpu_uuid}: no fault of it was remembered")]
    if answer.unsaved:
        unsaved = f"not noted down ({answer.unsaved}): a restart of the agent remembers them"
        lines.append(words(unsaved, "red"))
    return Group(*lines)


def profiling(answer: Profiling) -> Shown:
    """Return whether the hardware counters are read."""
    return Text(_pause(answer))


def _driver(answer: Status) -> Text:
    driver = answer.driver
    found = words(driver.state, _STATE_STYLES.get(driver.state, "red"))
    if driver.since is not None:
        seconds = answer.at - driver.since
        found.append(f" for {format_duration(seconds)}" if seconds >= 1 else " just now")
    if answer.driver_version is not None:
        found.append_text(words(f", version {answer.driver_version}"))
    if driver.reason:
        found.append_text(words(f": {driver.reason}"))
    return found


def _call(driver: DriverFacts) -> list[tuple[str, Text]]:
    if driver.call is None:
        return []
    index = driver.call.gpu_index
    about = "" if index is None else f" of GPU {index}"
    return [("in a call", words(f"{driver.call.function}{about}"))]


def _host(driver: DriverFacts) -> str:
    pid = "no process" if driver.host_pid is None else f"PID {driver.host_pid}"
    counts = {"restart": driver.host_restarts, "timeout": driver.timeouts, "kill": driver.kills}
    return ", ".join([pid, *(counted(count, noun) for noun, count in counts.items())])


def _release(release: ReleaseFacts) -> str:
    until = "it is resumed" if release.until is None else _time(release.until)
    return f"asked for by {release.by} at {_time(release.at)}, until {until} ({RESUME} ends it)"


def _samples(answer: Status) -> str:
    age = answer.last_success_age_seconds
    last = "none yet" if age is None else f"the last {_ago(age)}"
    failures = sum(answer.sample_failures.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(answer.sample_failures.items()))
    failed = f"; {failures} failed ({kinds})" if failures else ""
    return f"{answer.samples}, {last}{failed}"


def _link(answer: Status) -> str:
    link = answer.link
    to = "connected to" if link.is_connected else "not connected to"
    dropped = f", {link.frames_dropped} dropped" if link.frames_dropped else ""
    waiting = f"{counted(link.outbox_frames, 'frame')} not acknowledged{dropped}"
    return f"{to} {' or '.join(link.aggregators)}, {waiting}"


def _pause(answer: Profiling) -> str:
    if not answer.is_paused:
        return "the hardware counters are read"
    until = "they are resumed" if answer.until is None else _time(answer.until)
    return f"the hardware counters are left alone until {until} (stoker agent profiling resume)"


def _gpu_table(gpus: Sequence[GpuFacts]) -> Columns:
    table = Columns(
        ("GPU", "MODEL", "UUID", "HEALTH", "MEMORY", "UNATTRIBUTED", "READ"),
        numbers=("GPU", "MEMORY", "UNATTRIBUTED"),
        prose="READ",
        dispensable=("UUID", "MODEL", "MEMORY", "UNATTRIBUTED"),
    )
    for gpu in gpus:
        table.add(
            words(str(gpu.index)),
            words(gpu.model or ABSENT),
            words(gpu.uuid or ABSENT),
            verdict_and_action(gpu.verdict, gpu.action),
            words(_size(gpu.memory_used_bytes)),
            words(_size(gpu.memory_unattributed_bytes)),
            words("yes", "green") if gpu.is_read else words(f"no: {gpu.reason}", "red"),
        )
    return table


def _fault_table(gpus: Sequence[GpuFacts]) -> Columns:
    table = Columns(("GPU", "FAULT"), numbers=("GPU",), prose="FAULT")
    for gpu in gpus:
        for fault in gpu.faults:
            table.add(words(str(gpu.index)), words(fault))
    return table


def _users(users: UsersFacts, told: Sequence[str] = ()) -> list[Shown]:
    """Return who uses the GPUs; `told`: sentences that are on the page already."""
    parts: list[Shown] = []
    if users.held:
        parts += ["", _held_table(users.held)]
    if users.assignments:
        parts += ["", _assignment_table(users.assignments)]
    if users.processes:
        parts += ["", _process_table(users.processes)]
    parts += ["", words(_knowledge(users))]
    unknown = users.assignments_unknown
    if unknown and not any(unknown in each for each in told):
        parts.append(words(f"what others have handed out: not known: {unknown}", "yellow"))
    return parts


def _holders(users: UsersFacts) -> list[Shown]:
    """Return who else has device files of the driver open; empty: nobody, or nobody looked."""
    if users.holders:
        return ["", words(f"{OTHERS}:"), _holder_table(users.holders)]
    if users.holders_unknown:
        return ["", words(users.holders_unknown, "yellow")]
    return []


def _held_table(held: Sequence[HeldFacts]) -> Columns:
    table = Columns(
        ("HELD", "HOLDER", "GPUS", "MEMORY", "NOTE"), prose="NOTE", dispensable=("GPUS", "MEMORY")
    )
    for each in held:
        size = "all" if each.memory_bytes is None else format_bytes(each.memory_bytes)
        uuids = ", ".join(each.mig_device_uuids or each.gpu_uuids)
        note = ", ".join(_notes(each))
        table.add(words(each.id), words(each.holder), words(uuids), words(size), words(note))
    return table


def _notes(held: HeldFacts) -> Iterator[str]:
    """Give what an allocation takes beside memory of GPUs, and what becomes of it."""
    if held.compute_milli is not None:
        yield f"{held.compute_milli / 10:g} % of the compute"
    if held.cpu_milli:
        yield f"{held.cpu_milli / 1000:g} CPUs"
    if held.host_memory_bytes:
        yield f"{format_bytes(held.host_memory_bytes)} of the host"
    if held.gang_nodes > 1:
        yield f"one of {held.gang_nodes} nodes"
    if held.is_leaving:
        yield "to be let go of once processes are read"


def _assignment_table(assignments: Sequence[AssignmentFacts]) -> Columns:
    table = Columns(("GPU", "ASSIGNED BY", "TO"), numbers=("GPU",), prose="TO")
    for each in assignments:
        cells = (_gpu(each.gpu_uuid, each.gpu_index), each.by, each.holder or ABSENT)
        table.add(*map(words, cells))
    return table


def _process_table(processes: Sequence[ProcessFacts]) -> Columns:
    table = Columns(
        ("GPU", "PID", "USER", "MEMORY", "ALLOCATION", "PART OF", "COMMAND"),
        numbers=("GPU", "PID", "MEMORY"),
        prose="COMMAND",
        dispensable=("MEMORY", "PART OF"),
    )
    for each in processes:
        cells = (
            _gpu(each.gpu_uuid, each.gpu_index),
            str(each.pid),
            each.user or ABSENT,
            _size(each.memory_used_bytes),
            each.allocation_id or ABSENT,
            each.owner or ABSENT,
            each.command or ABSENT,
        )
        table.add(*map(words, cells))
    return table


def _holder_table(holders: Sequence[HolderFacts]) -> Columns:
    table = Columns(
        ("PID", "USER", "DEVICES", "PART OF", "COMMAND"),
        numbers=("PID",),
        prose="COMMAND",
        dispensable=("DEVICES", "PART OF"),
    )
    for each in holders:
        cells = (
            str(each.pid),
            each.user or ABSENT,
            devices(each.devices),
            each.owner or ABSENT,
            each.command or ABSENT,
        )
        table.add(*map(words, cells))
    return table


def devices(paths: Sequence[str]) -> str:
    """Return device files in few words, GPUs in a row as one: "nvidia0-7, nvidiactl"."""
    numbers = sorted({int(found[1]) for path in paths if (found := _GPU_DEVICE.fullmatch(path))})
    others = [path for path in paths if not _GPU_DEVICE.fullmatch(path)]
    # Numbers in a row are as far from their places as each other.
    runs = [[*run] for _, run in groupby(numbers, key=lambda each: each - numbers.index(each))]
    rows = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    named = [*(f"nvidia{row}" for row in rows), *(path.removeprefix("/dev/") for path in others)]
    return ", ".join(named) or ABSENT


def _gpu(uuid: str, index: int | None) -> str:
    return uuid if index is None else str(index)


def _size(size: int | None) -> str:
    return ABSENT if size is None else format_bytes(size)


def _knowledge(users: UsersFacts) -> str:
    """Return how old and how complete the list of processes is."""
    if users.processes_age_seconds is None:
        return "processes on the GPUs: not known"
    count = len(users.processes) or "none"
    found = f"processes on the GPUs: {count}, read {_ago(users.processes_age_seconds)}"
    unread = ", ".join(f"GPU {gpu.index}" for gpu in users.unread_gpus)
    return f"{found}; not known of {unread}" if unread else found


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _ago(seconds: float) -> str:
    return f"{format_duration(seconds)} ago" if seconds >= 1 else "just now"
