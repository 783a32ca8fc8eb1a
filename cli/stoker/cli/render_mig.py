"""Partitions of a node's GPUs for people: plans as diffs, how far they are. Nothing here prints."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from rich.console import Group, RenderableType
from rich.text import Text

from stoker.cli.columns import Columns
from stoker.cli.wording import ABSENT, ago, counted, words
from stoker.core.mig.geometry import Placed
from stoker.core.mig.layouts import describe
from stoker.core.mig.reports import (
    GpuMigFacts,
    GpuPlan,
    InstanceChange,
    InstanceFacts,
    InTheWay,
    MigReport,
)
from stoker.core.units import format_duration

Action = Literal["keep", "destroy", "create", "repair"]

# The sign of each action, its colour, and its word in the last line.
_ACTIONS: Mapping[Action, tuple[str, str, str]] = {
    "create": ("+", "green", "to create"),
    "destroy": ("-", "red", "to destroy"),
    "repair": ("~", "yellow", "to repair"),
    "keep": ("=", "dim", "kept"),
}
_MODE_CHANGES = {
    "none": "",
    "at_once": ", at once",
    "reset": ", in force after a reset of the GPU or a reboot",
}
_STATE_STYLES = {
    "success": "green",
    "failed": "red",
    "reboot-required": "red",
}
_UNDER_WAY = frozenset({"draining", "applying", "rolling-back"})


# --- plans


def plan(report: MigReport) -> RenderableType:
    """Return the diff of each GPU and, last, what it comes to."""
    lines = [line for each in report.plans for line in _gpu_plan(each)]
    return Group(*lines, summary(report))


def summary(report: MigReport) -> Text:
    """Return a plan in one line."""
    plans = report.plans
    if not plans:
        return words(f"Plan: nothing to do; {_of(report)} is about no GPU of {report.node}.")
    refused = [each for each in plans if each.refusal]
    if refused:
        return words(f"Plan: cannot be done on {_gpus(refused)}.", "red")
    counts = Counter(change.action for each in plans for change in each.changes)
    if not any(map(changes_something, plans)):
        return words(f"Plan: nothing to do; {counts['keep']} kept.")
    told = [
        ", ".join(
            f"{counts[action]} {word}"
            for action, (_, _, word) in _ACTIONS.items()
            if counts[action] or action != "repair"
        )
    ]
    if modes := [each for each in plans if each.mode != each.mode_wanted]:
        told.append(f"MIG mode changes on {_gpus(modes)}")
    blocked = [each for each in plans if each.in_the_way]
    users = len({(way.kind, way.name) for each in blocked for way in each.in_the_way})
    there = f"{counted(users, 'user')} in the way on {_gpus(blocked)}"
    told.append(there if blocked else "nothing in the way")
    line = f"Plan: {'; '.join(told)}."
    if resets := [each for each in plans if each.mode_change == "reset"]:
        line += f" A reset of {_gpus(resets)} or a reboot is needed."
    return words(line, "bold")


def changes_something(gpu: GpuPlan) -> bool:
    """Whether there is anything to do."""
    return (
        bool(gpu.steps)
        or gpu.mode_change != "none"
        or any(change.action != "keep" for change in gpu.changes)
    )


def _gpu_plan(gpu: GpuPlan) -> Iterator[RenderableType]:
    yield words(f"GPU {gpu.index}  {gpu.model}  {gpu.uuid}", "bold")
    if gpu.mode != gpu.mode_wanted:
        mode = f"{_on(gpu.mode)} -> {_on(gpu.mode_wanted)}{_MODE_CHANGES[gpu.mode_change]}"
        yield words(f"  MIG mode {mode}", "yellow")
    width = max((len(_instance(each.profile, each.compute)) for each in gpu.changes), default=0)
    for change in gpu.changes:
        yield _change(change, width, frozenset(gpu.uuids_lost))
    if gpu.refusal:
        yield words(f"  cannot be done: {gpu.refusal}", "red")
    elif not changes_something(gpu):
        yield words("  nothing to do", "dim")
    for way in gpu.in_the_way:
        yield words(f"  in the way: {_user(way)}", "yellow")
    named = {uuid for change in gpu.changes for uuid in change.uuids}
    for uuid in gpu.uuids_lost:
        if uuid not in named:
            yield words(f"  ends: {uuid}")
    for note in gpu.notes:
        yield words(f"  note: {note}")
    yield ""


def _change(change: InstanceChange, width: int, lost: frozenset[str]) -> Text:
    sign, style, _ = _ACTIONS[change.action]
    name = _instance(change.profile, change.compute)
    told = ["in use"] if change.is_busy else []
    told += ["its compute instances change"] if change.action == "repair" else []
    told += [f"{uuid} ends" if uuid in lost else uuid for uuid in change.uuids]
    return words(
        f"  {sign} {name:<{width}}  {_slices(change):<11}  {', '.join(told)}".rstrip(), style
    )


def _user(way: InTheWay) -> str:
    return f"{way.name}, uses {', '.join(way.uuids)}" if way.uuids else way.name


def _gpus(plans: Sequence[GpuPlan]) -> str:
    return f"GPU {', '.join(str(each.index) for each in plans)}"


def _of(report: MigReport) -> str:
    return report.config or "this"


def _on(is_enabled: bool) -> str:
    return "on" if is_enabled else "off"


def _slices(instance: InstanceChange) -> str:
    if instance.size == 1:
        return f"slice {instance.start}"
    return f"slices {instance.start}-{instance.start + instance.size - 1}"


def _instance(profile: str, compute: Sequence[int]) -> str:
    """Return a GPU instance with its compute instances: "3g.40gb", "3g.40gb(1c+2c)"."""
    if not compute or device_names(profile, compute) == [profile]:
        return profile
    return f"{profile}({'+'.join(f'{each}c' for each in compute)})"


def device_names(profile: str, compute: Sequence[int]) -> list[str]:
    """Return the names of the MIG devices in a GPU instance with these compute instances."""
    whole = profile.partition("g")[0]
    return [profile if str(each) == whole else f"{each}c.{profile}" for each in compute]


# --- how it is


def status(report: MigReport, now: float) -> RenderableType:
    """Return a line for each GPU, then why it is so and what undo would restore.

    `now` is Unix seconds.
    """
    if not report.gpus:
        return words(f"{report.node} has no GPU")
    names = ("GPU", "MODEL", "MIG", "STATE", "CONFIG", "OPERATION", "CHANGED", "LAYOUT")
    table = Columns(
        names,
        numbers=("GPU",),
        prose="LAYOUT",
        dispensable=("MODEL", "CHANGED", "CONFIG", "OPERATION"),
    )
    for gpu in report.gpus:
        table.add(
            words(str(gpu.index)),
            words(gpu.model),
            words(_mode(gpu)),
            words(progress(gpu), _STATE_STYLES.get(gpu.state, "yellow" if gpu.state else "")),
            words(gpu.config or ABSENT),
            words(gpu.operation_id or ABSENT),
            words(ago(gpu.changed_at, now)),
            words(_layout(gpu)),
        )
    told = [
        words(f"GPU {gpu.index}: {sentence}")
        for gpu in report.gpus
        for sentence in _sentences(gpu, now)
    ]
    shown: list[RenderableType] = [words(f"node {report.node}"), table]
    return Group(*shown, "", *told) if told else Group(*shown)


def undo(report: MigReport) -> RenderableType:
    """Return what undo would do to the GPUs that have something to go back to."""
    lines: list[Text] = []
    for gpu in report.gpus:
        if gpu.undo:
            lines.append(words(f"GPU {gpu.index}  {gpu.model}  {gpu.uuid}", "bold"))
            lines.append(words(f"  from {_now(gpu)}"))
            lines.append(words(f"  back to {gpu.undo}"))
    return Group(*lines)


def layout(instances: Sequence[InstanceFacts]) -> str:
    """Return GPU instances for people: "3g.40gb@4 2g.20gb@0"."""
    told = describe(
        tuple(
            Placed(each.start, each.size, each.profile, () if _is_plain(each) else each.compute)
            for each in instances
        )
    )
    bare = [f"{each.profile}@{each.start}" for each in instances if not each.compute]
    return f"{told} (no compute instance: {', '.join(bare)})" if bare else told


def progress(gpu: GpuMigFacts) -> str:
    """Return how far a GPU is: "applying, 3 of 9 steps"."""
    if not gpu.state:
        return ABSENT
    has_steps = gpu.state in _UNDER_WAY and gpu.steps_total
    steps = f", {gpu.steps_done} of {counted(gpu.steps_total, 'step')}" if has_steps else ""
    return gpu.state + steps


def _is_plain(instance: InstanceFacts) -> bool:
    """Whether it is one MIG device, with all that the GPU instance has."""
    return device_names(instance.profile, instance.compute) == [instance.profile]


def _now(gpu: GpuMigFacts) -> str:
    if gpu.unread:
        return "what cannot be told"
    return (
        layout(gpu.instances) if gpu.instances else f"no instances, MIG mode {_on(bool(gpu.mode))}"
    )


def _layout(gpu: GpuMigFacts) -> str:
    if gpu.unread:
        return "not known"
    return layout(gpu.instances) if gpu.mode else ABSENT


def _mode(gpu: GpuMigFacts) -> str:
    if gpu.mode is None:
        return ABSENT
    if gpu.mode_pending is None or gpu.mode_pending == gpu.mode:
        return _on(gpu.mode)
    return f"{_on(gpu.mode)}, {_on(gpu.mode_pending)} pending"


def _sentences(gpu: GpuMigFacts, now: float) -> Iterator[str]:
    if gpu.reason:
        yield gpu.reason
    if gpu.leave_by is not None:
        yield f"its users have {format_duration(max(0.0, gpu.leave_by - now))} to leave"
    if gpu.is_withheld:
        yield "nothing new is placed on it"
    if gpu.unread:
        yield f"its instances are not known: {gpu.unread}"
    if gpu.undo:
        yield f"undo would restore {gpu.undo}"
