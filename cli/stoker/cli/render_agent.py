"""What an agent answers, for people. Nothing here prints."""

from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stoker.cli.columns import GAP, Columns
from stoker.cli.text import one_line
from stoker.core.local import (
    DriverFacts,
    GpuFacts,
    HeldFacts,
    ProcessFacts,
    Profiling,
    Released,
    ReleaseFacts,
    Resumed,
    Status,
    UsersFacts,
)
from stoker.core.units import format_bytes, format_duration

Shown = RenderableType

ABSENT = "-"
RESUME = "stoker agent resume"
_STATE_STYLES = {"reading": "green", "starting": "yellow", "released": "yellow"}


def status(answer: Status) -> Shown:
    """Return how the agent is: a line for each part of it, then its GPUs and who uses them."""
    rows = [
        ("node", _text(answer.node + (" SIMULATED" if answer.simulated else ""))),
        ("agent", _text(f"stoker {answer.version}, PID {answer.pid}")),
        ("driver", _driver(answer)),
        *_call(answer.driver),
        *([("release", _text(_release(answer.release)))] if answer.release else []),
        *([("not saved", _text(answer.release_unsaved, "red"))] if answer.release_unsaved else []),
        ("samples", _text(_samples(answer))),
        ("host", _text(_host(answer.driver))),
        *([("profiling", _text(_pause(answer.profiling)))] if answer.profiling.is_paused else []),
        ("link", _text(_link(answer))),
    ]
    lines = Table.grid(padding=(0, GAP, 0, 0))
    for name, text in rows:
        lines.add_row(name, text)
    parts: list[Shown] = [lines]
    if answer.gpus:
        parts += ["", _gpu_table(answer.gpus)]
    return Group(*parts, *_users(answer.users))


def released(answer: Released) -> Shown:
    """Return how it went, what it means, and what still uses the GPUs."""
    if answer.pending:
        lines = [
            _text(answer.pending, "red"),
            Text("the kernel holds it; the driver is released as soon as it is gone"),
        ]
    else:
        lines = [Text(f"released in {answer.took_seconds:.2f} s: the agent has no handle open")]
    until = "" if answer.release.until is None else f", or wait until {_time(answer.release.until)}"
    lines.append(Text(f"to have it read again: {RESUME}{until}"))
    if answer.unsaved:
        found = f"not noted down ({answer.unsaved}): a restart of the agent takes the driver again"
        lines.append(_text(found, "red"))
    return Group(*lines, *_users(answer.users))


def resumed(answer: Resumed) -> Shown:
    """Return what comes now."""
    found = "the driver is taken again" if answer.was_released else "the driver was not released"
    lines = [Text(found)]
    if answer.unsaved:
        unsaved = f"not noted down ({answer.unsaved}): a restart of the agent releases it again"
        lines.append(_text(unsaved, "red"))
    return Group(*lines)


def profiling(answer: Profiling) -> Shown:
    """Return whether the hardware counters are read."""
    return Text(_pause(answer))


def _driver(answer: Status) -> Text:
    driver = answer.driver
    found = _text(driver.state, _STATE_STYLES.get(driver.state, "red"))
    if driver.since is not None:
        seconds = answer.at - driver.since
        found.append(f" for {format_duration(seconds)}" if seconds >= 1 else " just now")
    if answer.driver_version is not None:
        found.append_text(_text(f", version {answer.driver_version}"))
    if driver.reason:
        found.append_text(_text(f": {driver.reason}"))
    return found


def _call(driver: DriverFacts) -> list[tuple[str, Text]]:
    if driver.call is None:
        return []
    index = driver.call.gpu_index
    about = "" if index is None else f" of GPU {index}"
    return [("in a call", _text(f"{driver.call.function}{about}"))]


def _host(driver: DriverFacts) -> str:
    pid = "no process" if driver.host_pid is None else f"PID {driver.host_pid}"
    counts = {"restart": driver.host_restarts, "timeout": driver.timeouts, "kill": driver.kills}
    return ", ".join([pid, *(_counted(count, noun) for noun, count in counts.items())])


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
    waiting = f"{_counted(link.outbox_frames, 'frame')} not acknowledged{dropped}"
    return f"{to} {' or '.join(link.aggregators)}, {waiting}"


def _pause(answer: Profiling) -> str:
    if not answer.is_paused:
        return "the hardware counters are read"
    until = "they are resumed" if answer.until is None else _time(answer.until)
    return f"the hardware counters are left alone until {until} (stoker agent profiling resume)"


def _gpu_table(gpus: Sequence[GpuFacts]) -> Columns:
    table = Columns(
        ("GPU", "MODEL", "UUID", "READ"), numbers=("GPU",), prose="READ", dispensable=("UUID",)
    )
    for gpu in gpus:
        found = _text("yes", "green") if gpu.is_read else _text(f"no: {gpu.reason}", "red")
        table.add(
            _text(str(gpu.index)), _text(gpu.model or ABSENT), _text(gpu.uuid or ABSENT), found
        )
    return table


def _users(users: UsersFacts) -> list[Shown]:
    parts: list[Shown] = []
    if users.held:
        parts += ["", _held_table(users.held)]
    if users.processes:
        parts += ["", _process_table(users.processes)]
    parts += ["", _text(_knowledge(users))]
    return parts


def _held_table(held: Sequence[HeldFacts]) -> Columns:
    table = Columns(
        ("HELD", "HOLDER", "GPUS", "MEMORY", "NOTE"), prose="NOTE", dispensable=("GPUS", "MEMORY")
    )
    for each in held:
        size = "all" if each.memory_bytes is None else format_bytes(each.memory_bytes)
        note = "to be let go of once processes are read" if each.is_leaving else ""
        uuids = ", ".join(each.gpu_uuids)
        table.add(_text(each.id), _text(each.holder), _text(uuids), _text(size), _text(note))
    return table


def _process_table(processes: Sequence[ProcessFacts]) -> Columns:
    table = Columns(
        ("GPU", "PID", "USER", "ALLOCATION", "COMMAND"), numbers=("GPU", "PID"), prose="COMMAND"
    )
    for each in processes:
        gpu = each.gpu_uuid if each.gpu_index is None else str(each.gpu_index)
        owner = each.allocation_id or ABSENT
        cells = (gpu, str(each.pid), each.user or ABSENT, owner, each.command or ABSENT)
        table.add(*map(_text, cells))
    return table


def _knowledge(users: UsersFacts) -> str:
    """Return how old and how complete the list of processes is."""
    if users.processes_age_seconds is None:
        return "processes on the GPUs: not known"
    count = len(users.processes) or "none"
    found = f"processes on the GPUs: {count}, read {_ago(users.processes_age_seconds)}"
    unread = ", ".join(f"GPU {gpu.index}" for gpu in users.unread_gpus)
    return f"{found}; not known of {unread}" if unread else found


def _text(value: str, style: str = "") -> Text:
    return Text(one_line(value), style=style)


def _time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _ago(seconds: float) -> str:
    return f"{format_duration(seconds)} ago" if seconds >= 1 else "just now"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
