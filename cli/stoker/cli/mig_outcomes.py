"""What came of an operation on a node's partitions: a line for each GPU, and the exit code."""

from collections.abc import Sequence
from dataclasses import dataclass

from stoker.cli.render_mig import changes_something, layout
from stoker.core.errors import ExitCode
from stoker.core.mig.reports import GpuMigFacts, GpuPlan, InstanceFacts, MigReport

# Nothing more happens in them by itself.
FINAL = frozenset({"success", "failed", "reboot-required"})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one GPU."""

    gpu: int  # its number on the node
    exit_code: ExitCode
    sentence: str


def is_settled(gpu: GpuMigFacts, operation_id: str) -> bool:
    """Whether the operation does nothing more to this GPU: it is through, or another's by now."""
    return gpu.operation_id != operation_id or gpu.state in FINAL


def outcomes(begun: MigReport, now: MigReport) -> tuple[Outcome, ...]:
    """Return what came of the operation that was answered with `begun`, for each of its GPUs."""
    before = {gpu.uuid: gpu for gpu in begun.gpus}
    found = {gpu.uuid: gpu for gpu in now.gpus}
    return tuple(
        _outcome(plan, before.get(plan.uuid), found[plan.uuid], begun.operation_id)
        if plan.uuid in found
        else Outcome(plan.index, ExitCode.FAILED, "its agent tells nothing of it any more")
        for plan in begun.plans
    )


def exit_code(found: Sequence[Outcome]) -> ExitCode:
    """Return that of the GPU which needs a person most."""
    codes = {each.exit_code for each in found}
    gravest = (ExitCode.FAILED, ExitCode.REFUSED, ExitCode.PENDING)
    return next((code for code in gravest if code in codes), ExitCode.OK)


def _outcome(
    plan: GpuPlan, before: GpuMigFacts | None, now: GpuMigFacts, operation_id: str
) -> Outcome:
    there = f"it has {_partitions(now)}"
    if now.operation_id != operation_id:
        if before is None or before.operation_id == operation_id:
            sentence = f"operation {now.operation_id} took the place of this one; {there}"
            return Outcome(now.index, ExitCode.FAILED, sentence)
        if changes_something(plan):
            sentence = f"operation {operation_id} is known, and is not done again; {there}"
            return Outcome(now.index, ExitCode.REFUSED, sentence)
        return Outcome(now.index, ExitCode.OK, f"nothing to do; {there}")
    match now.state:
        case "success":
            return Outcome(now.index, ExitCode.OK, f"done; {there}")
        case "reboot-required":
            return Outcome(now.index, ExitCode.PENDING, f"reboot-required: {now.reason}")
        case "failed" if before is not None and _is_same(before, now):
            return Outcome(now.index, ExitCode.REFUSED, f"{now.reason}; it is as it was: {there}")
        case "failed":
            return Outcome(now.index, ExitCode.FAILED, f"{now.reason}; {there}")
        case _:
            return Outcome(now.index, ExitCode.OK, f"{now.state}; {there}")


def _is_same(before: GpuMigFacts, now: GpuMigFacts) -> bool:
    """Whether the GPU is partitioned as it was; UUIDs may be others after a way there and back."""
    if before.unread or now.unread:
        return False
    return before.mode == now.mode and _places(before.instances) == _places(now.instances)


def _places(instances: Sequence[InstanceFacts]) -> set[tuple[str, int, tuple[int, ...]]]:
    return {(each.profile, each.start, each.compute) for each in instances}


def _partitions(gpu: GpuMigFacts) -> str:
    if gpu.unread:
        return f"partitions that cannot be told: {gpu.unread}"
    return layout(gpu.instances) if gpu.mode else "MIG mode off"
