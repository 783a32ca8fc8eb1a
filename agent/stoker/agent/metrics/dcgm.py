"""The page with dcgm-exporter's names, units, labels and order of labels.

Existing dashboards and alerts read it unchanged. It differs where dcgm-exporter does not tell what
is: a value that was not read is left out, and a value of a whole GPU that is partitioned (its
power, say) stands here once, where dcgm-exporter repeats it for every instance, so that sums are
wrong. Integer fields are cut off, as DCGM does.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from stoker.agent.metrics.dcgm_fields import FIELDS, Field, Told
from stoker.agent.metrics.exposition import Family, FamilyKind, pairs
from stoker.agent.metrics.single_holder import holder_of_gpu, holder_of_mig
from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.readings import GpuIdentity, MigDeviceReading
from stoker.agent.telemetry import GpuTelemetry, XidCount

GPU_LABELS = ("gpu", "UUID", "pci_bus_id", "device", "modelName")
MIG_LABELS = ("GPU_I_PROFILE", "GPU_I_ID")
VERSION_LABEL = "DCGM_FI_DRIVER_VERSION"
XID_LABELS = ("err_code", "err_msg")
XID_FIELD = "DCGM_FI_DEV_XID_ERRORS"
XID_DOC = "The last Xid since the agent started; absent before the first."

# A share that was divided by 100 and is multiplied by it again is the same number.
_ROUNDING = 1 + 1e-12
_OTHER_XID = "Unknown Error"
# In our words; what to do about each is NVIDIA's catalogue of Xids.
XID_MEANINGS: Mapping[int, str] = MappingProxyType(
    {
        8: "GPU stopped processing",
        13: "Exception in the graphics engine",
        31: "Page fault in GPU memory",
        32: "Corrupt command stream",
        38: "Firmware error",
        43: "GPU stopped processing",
        45: "Channel torn down before its work was done",
        48: "Uncorrectable (double bit) memory error",
        61: "Internal microcontroller halted",
        62: "Internal microcontroller halted",
        63: "Row remapped or page retired",
        64: "Row remapping or page retirement failed",
        68: "Exception in a video engine",
        69: "Exception in the graphics engine",
        74: "NVLink error",
        79: "GPU has fallen off the bus",
        92: "Many corrected memory errors",
        94: "Memory error contained to one application",
        95: "Memory error not contained",
        109: "Context switch timed out",
        119: "GSP does not answer",
        120: "GSP error",
        122: "SPI failure while reading the InfoROM",
        123: "SPI failure while writing the InfoROM",
        140: "Memory error that was not recovered from",
        144: "NVLink error",
        145: "NVLink error",
        154: "The driver asks for an action to recover",
    }
)

_Row = tuple[str, Told]  # labels as text, and the values


def dcgm_families(snapshot: Snapshot, hostname_label: str) -> Iterator[Family]:
    """Yield every family; `hostname_label` is how the label of the host is spelt."""
    told = snapshot.telemetry
    tail = _tail(snapshot, hostname_label)
    rows: list[tuple[_Row, Sequence[_Row]]] = [
        (
            (_whole_labels(snapshot, gpu, read, tail), Told(read.facts, read.by_label)),
            _instance_rows(snapshot, gpu, read, tail),
        )
        for gpu in snapshot.gpus
        if (read := told.get(gpu.uuid)) is not None
    ]
    for field in FIELDS:
        lines: list[str] = []
        for whole, instances in rows:
            # What the instances tell, the whole does not tell too: a sum is right.
            lines += _lines(field, instances) or _lines(field, [whole])
        yield Family(field.name, field.kind, field.doc, lines)
    yield _xid_family(snapshot, tail)


def _whole_labels(snapshot: Snapshot, gpu: GpuIdentity, read: GpuTelemetry, tail: str) -> str:
    """Return the labels of a GPU; what a partitioned one tells as a whole is nobody's alone."""
    base = pairs(GPU_LABELS, _gpu_values(gpu)) + tail
    if read.mig_devices or gpu.mig_enabled:
        return base
    return base + _named(holder_of_gpu(snapshot.processes, gpu.uuid).labels)


def _instance_rows(
    snapshot: Snapshot, gpu: GpuIdentity, read: GpuTelemetry, tail: str
) -> Sequence[_Row]:
    """Return a row for each GPU instance; its compute instances share its memory and engines."""
    instances: dict[int, list[MigDeviceReading]] = {}
    for device in read.mig_devices:
        instances.setdefault(device.gpu_instance_id, []).append(device)
    base = pairs(GPU_LABELS, _gpu_values(gpu))
    rows: list[_Row] = []
    for number, devices in instances.items():
        own = pairs(MIG_LABELS, (_profile(devices[0]), str(number)))
        holder = holder_of_mig(snapshot.processes, (device.uuid for device in devices))
        text = f"{base},{own}{tail}{_named(holder.labels)}"
        rows.append((text, Told(devices[0].facts, {})))
    return rows


def _lines(field: Field, rows: Sequence[_Row]) -> list[str]:
    return [
        f"{field.name}{{{text}}} {_number(value, is_integer=field.is_integer)}"
        for text, told in rows
        if (value := field.value(told)) is not None
    ]


def _xid_family(snapshot: Snapshot, tail: str) -> Family:
    lines: list[str] = []
    for gpu in snapshot.gpus:
        counts = snapshot.view.xids.get(gpu.uuid, {})
        if counts:
            xid = max(counts, key=lambda each: _seen(counts[each]))
            words = (str(xid), XID_MEANINGS.get(xid, _OTHER_XID))
            named = _named(dict(zip(XID_LABELS, words, strict=True)))
            base = pairs(GPU_LABELS, _gpu_values(gpu))
            lines.append(f"{XID_FIELD}{{{base}{tail}{named}}} {xid}")
    return Family(XID_FIELD, FamilyKind.GAUGE, XID_DOC, lines)


def _seen(count: XidCount) -> float:
    return count.last_at


def _tail(snapshot: Snapshot, hostname_label: str) -> str:
    """Return the labels that are the same for all series, with the comma before them."""
    view = snapshot.view
    version = None if view.inventory is None else view.inventory.driver_version
    text = "," + pairs((hostname_label,), (view.identity.node,))
    return text if version is None else f"{text},{pairs((VERSION_LABEL,), (version,))}"


def _named(values: Mapping[str, str]) -> str:
    """Return labels that not every series has, with the comma before them."""
    return f",{pairs(values, values.values())}" if values else ""


def _gpu_values(gpu: GpuIdentity) -> tuple[str, ...]:
    index = str(gpu.index)
    return (index, gpu.uuid, gpu.pci_bus_id or "", f"nvidia{index}", gpu.model)


def _profile(device: MigDeviceReading) -> str:
    """Return the GPU instance's profile: "2g.20gb" of "1c.2g.20gb"."""
    first, _, rest = device.profile.partition(".")
    return rest if first.endswith("c") and rest else device.profile


def _number(value: float, *, is_integer: bool) -> str:
    return str(int(value * _ROUNDING)) if is_integer else f"{value:f}"
