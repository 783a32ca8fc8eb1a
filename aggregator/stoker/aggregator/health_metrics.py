"""What the page for Prometheus tells of health: verdicts, cordons, and what was noticed."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from stoker.aggregator.findings import KINDS
from stoker.aggregator.model import Gpu, NodeStatus
from stoker.aggregator.picture import Picture
from stoker.aggregator.verdicts import Verdict
from stoker.aggregator.wire_fleet import health_of

_NEVER_CONNECTED = NodeStatus()
_VERDICTS = ", ".join(Verdict)


def health_metrics(picture: Picture) -> Iterator[Metric]:
    """Yield the families about health."""
    yield from _verdicts(picture)
    yield from _cordons(picture)
    findings = GaugeMetricFamily(
        "stoker_fleet_findings",
        f"What was noticed by comparing GPUs over time or with their peers: {', '.join(KINDS)}.",
        labels=("kind",),
    )
    count = Counter(str(each.kind) for each in picture.findings)
    for kind in KINDS:
        findings.add_metric((kind,), count[kind])
    yield findings


def _verdicts(picture: Picture) -> Iterator[Metric]:
    """Yield how many GPUs are judged how, and those that are not healthy by themselves.

    A GPU that no agent judged yet counts as unknown; a card that two nodes list counts once.
    """
    count: Counter[Verdict] = Counter()
    ill = GaugeMetricFamily(
        "stoker_fleet_gpu_unhealthy",
        "Always 1; a GPU that is not healthy: its verdict, the check that found the worst fault, "
        "and what mends it.",
        labels=("node", "gpu", "uuid", "verdict", "check", "action"),
    )
    for uuid, (name, gpu) in _gpus(picture).items():
        status = picture.statuses.get(name, _NEVER_CONNECTED)
        health = health_of(status, picture.conditions.get(uuid), uuid)
        count[health.verdict if health else Verdict.UNKNOWN] += 1
        if health is not None and health.verdict is not Verdict.HEALTHY:
            labels = (name, str(gpu.index), uuid)
            ill.add_metric((*labels, health.verdict, health.check, health.action), 1)
    verdicts = GaugeMetricFamily(
        "stoker_fleet_gpu_verdicts",
        f"GPUs by what their agents judge of their health: {_VERDICTS}.",
        labels=("verdict",),
    )
    for verdict in Verdict:
        verdicts.add_metric((verdict,), count[verdict])
    yield from (verdicts, ill)


def _gpus(picture: Picture) -> dict[str, tuple[str, Gpu]]:
    """Return each GPU of the fleet, and in which node it is: that which told of it last."""
    gpus: dict[str, tuple[str, Gpu]] = {}
    for name, node in picture.nodes.items():
        for each in node.gpus:
            uuid = each.gpu.uuid
            known = picture.conditions.get(uuid)
            if uuid not in gpus or (known is not None and known.node == name):
                gpus[uuid] = (name, each.gpu)
    return gpus


def _cordons(picture: Picture) -> Iterator[Metric]:
    cordons = GaugeMetricFamily(
        "stoker_fleet_gpu_cordons",
        "Single GPUs that take nothing new, by who did it: health, operator.",
        labels=("by",),
    )
    cordoned = GaugeMetricFamily(
        "stoker_fleet_gpu_cordoned",
        "Always 1; a GPU that takes nothing new, and who did it: health, operator.",
        labels=("node", "gpu", "uuid", "by"),
    )
    gpus = _gpus(picture)
    for uuid, each in picture.conditions.items():
        if each.cordon is not None:
            index = str(gpus[uuid][1].index) if uuid in gpus else ""
            by = "health" if each.cordon.by_health else "operator"
            cordoned.add_metric((each.node, index, uuid, by), 1)
    yield cordoned
    standing = [each.cordon for each in picture.conditions.values() if each.cordon is not None]
    by_health = sum(cordon.by_health for cordon in standing)
    cordons.add_metric(("health",), by_health)
    cordons.add_metric(("operator",), len(standing) - by_health)
    yield cordons
    yield GaugeMetricFamily(
        "stoker_fleet_gpu_cordons_max",
        "How many GPUs may be cordoned for their health at one time.",
        value=picture.cordons_max,
    )
    yield GaugeMetricFamily(
        "stoker_fleet_gpu_cordons_withheld",
        "GPUs whose health calls for a cordon, and so many are cordoned already.",
        value=picture.cordons_withheld,
    )
