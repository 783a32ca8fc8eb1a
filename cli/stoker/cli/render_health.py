"""The health of the fleet as tables for people. Nothing here prints."""

from collections.abc import Iterable, Mapping

from rich.console import Group, RenderableType

from stoker.cli.columns import Columns
from stoker.cli.wording import ABSENT, ago, counted, verdict, words
from stoker.cli.wording import action as action_words
from stoker.client import Finding, FleetHealth, GpuCondition, GpuVerdict
from stoker.core.units import format_duration

# The protocol's names; one that is not here is of a newer aggregator, and shown as it came.
_FINDINGS: Mapping[str, str] = {
    "lemon_gpu": "lemon GPU",
    "lemon_slot": "lemon slot",
    "straggler": "straggler",
}


def health(found: FleetHealth, address: str, now: float) -> RenderableType:
    """Return the GPUs that are not well, what was noticed, and how many more may be cordoned."""
    parts: list[RenderableType] = [words(f"{address}: {_headline(found)}")]
    if found.gpus:
        parts += ["", _gpu_table(found.gpus, now)]
    if found.findings:
        parts += ["", _finding_table(found.findings, now)]
    return Group(*parts, "", _budget(found))


def _headline(found: FleetHealth) -> str:
    total = counted(found.gpus_total, "GPU")
    judged = [each.health.verdict for each in found.gpus if each.health is not None]
    counts = [
        f"{judged.count(each)} {each}"
        for each in (GpuVerdict.UNHEALTHY, GpuVerdict.UNKNOWN, GpuVerdict.DEGRADED)
        if each in judged
    ]
    if unjudged := len(found.gpus) - len(judged):
        counts.append(f"{unjudged} not judged")
    return f"{total}, {', '.join(counts) or 'none known to be unwell'}"


def _gpu_table(gpus: Iterable[GpuCondition], now: float) -> Columns:
    table = Columns(
        ("NODE", "GPU", "VERDICT", "ACTION", "SINCE", "CORDON", "HELD BY", "REASON"),
        numbers=("GPU",),
        prose="REASON",
        dispensable=("HELD BY", "SINCE", "CORDON", "ACTION"),
    )
    for gpu in gpus:
        judged = gpu.health
        table.add(
            words(gpu.node),
            words(str(gpu.index)),
            verdict(None if judged is None else judged.verdict),
            words((judged and action_words(judged.action)) or ABSENT),
            words(ago(None if judged is None else judged.since, now)),
            words(_cordon(gpu)),
            words(", ".join(gpu.allocation_ids) or ABSENT),
            words(_reason(gpu, now)),
        )
    return table


def _cordon(gpu: GpuCondition) -> str:
    if gpu.cordon is not None:
        by = "health" if gpu.cordon.by_health else "operator"
        return by if gpu.cordon.drain_at is None else f"{by}, draining"
    return "withheld" if gpu.cordon_withheld else ABSENT


def _reason(gpu: GpuCondition, now: float) -> str:
    """Return what is wrong, and what is said of its cordon beyond that."""
    wrong = "" if gpu.health is None else gpu.health.reason
    said = [wrong] if wrong else []
    if gpu.cordon is not None and gpu.cordon.reason not in ("", wrong):
        said.append(f"cordoned: {gpu.cordon.reason}")
    if gpu.cordon is not None and gpu.cordon.drain_at is not None:
        left = format_duration(max(0.0, gpu.cordon.drain_at - now))
        said.append(f"what it holds is ended in {left}")
    if gpu.cordon_withheld:
        said.append(f"not cordoned: {gpu.cordon_withheld}")
    return "; ".join(said)


def _finding_table(findings: Iterable[Finding], now: float) -> Columns:
    table = Columns(
        ("FOUND", "NODE", "WHAT", "SINCE", "REASON"),
        prose="REASON",
        dispensable=("SINCE", "WHAT"),
    )
    for each in findings:
        place = each.gpu_uuid or (f"slot {each.pci_bus_id}" if each.pci_bus_id else ABSENT)
        where = f"allocation {each.allocation_id}: " if each.allocation_id else ""
        table.add(
            words(_FINDINGS.get(each.kind, each.kind)),
            words(each.node),
            words(place),
            words(ago(each.since, now)),
            words(f"{where}{each.reason}"),
        )
    return table


def _budget(found: FleetHealth) -> str:
    at_most = counted(found.cordoned_by_health_max, "GPU")
    cordoned = found.cordoned_by_health
    verb = "is cordoned for its" if cordoned == 1 else "are cordoned for their"
    return f"{cordoned} of at most {at_most} {verb} health"
