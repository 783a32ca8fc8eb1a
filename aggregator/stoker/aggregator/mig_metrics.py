"""What the page for Prometheus tells of partitions (MIG): how far GPUs are, and their devices.

Only what nodes tell that can be heard: of others nobody knows how they are partitioned by now.
"""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from stoker.aggregator.picture import Picture
from stoker.aggregator.views import GpuView
from stoker.core.mig.geometry import MigState

_UNDECLARED = "undeclared"
_STATES = (*MigState, _UNDECLARED)
_USES = ("free", "allocated", "unavailable")


def mig_metrics(picture: Picture) -> Iterator[Metric]:
    """Yield the families about partitions."""
    yield from _gpus(picture)
    yield _devices(picture)


def _gpus(picture: Picture) -> Iterator[Metric]:
    count: Counter[str] = Counter()
    withheld = GaugeMetricFamily(
        "stoker_fleet_gpu_mig_withheld",
        "Always 1; a GPU on which nothing new is placed until its MIG layout is in place.",
        labels=("node", "gpu", "uuid", "state"),
    )
    for name, gpu in _heard(picture):
        if gpu.mig is None:
            continue
        state = gpu.mig.state or _UNDECLARED
        count[state] += 1
        if gpu.is_withheld:
            withheld.add_metric((name, str(gpu.gpu.index), gpu.gpu.uuid, state), 1)
    states = GaugeMetricFamily(
        "stoker_fleet_mig_gpus",
        "GPUs that can be partitioned, by how far they are on the way to the MIG layout that was "
        f"declared: {', '.join(_STATES)}.",
        labels=("state",),
    )
    for state in _STATES:
        states.add_metric((state,), count[state])
    yield from (states, withheld)


def _devices(picture: Picture) -> Metric:
    """Return how many MIG devices there are; of a profile that nobody has there is no series."""
    count: Counter[tuple[str, str]] = Counter()
    profiles: set[str] = set()
    for _, gpu in _heard(picture):
        claimed = {claim.mig_device_uuid for claim in gpu.claims}
        free = {device.uuid for device in gpu.mig_free}
        for device in gpu.gpu.mig_devices:
            profiles.add(device.profile)
            taken = "allocated" if device.uuid in claimed else "unavailable"
            count[device.profile, "free" if device.uuid in free else taken] += 1
    devices = GaugeMetricFamily(
        "stoker_fleet_mig_devices",
        "MIG devices by profile and use: free, allocated, unavailable (used by others, handed out "
        "by them, withheld, cordoned, or not read).",
        labels=("profile", "use"),
    )
    for profile in sorted(profiles):
        for use in _USES:
            devices.add_metric((profile, use), count[profile, use])
    return devices


def _heard(picture: Picture) -> Iterator[tuple[str, GpuView]]:
    for name, node in picture.nodes.items():
        if node.connected:
            for gpu in node.gpus:
                if gpu.missing is None:
                    yield name, gpu
