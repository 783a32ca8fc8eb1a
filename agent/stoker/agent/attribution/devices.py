"""Which GPU of this node somebody means: the names that kubelets, CDI and Slurm give to GPUs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stoker.agent.model import NumberedInventory
from stoker.agent.telemetry import GpuTelemetry

_UUID_CHARACTERS = 36
_HEXADECIMAL = frozenset("0123456789abcdefABCDEF")


@dataclass(frozen=True, slots=True)
class MigDevice:
    """A MIG device by its names."""

    uuid: str
    gpu_instance_id: int


@dataclass(frozen=True, slots=True)
class NodeGpu:
    """A GPU of this node, by all its names."""

    uuid: str  # empty: it cannot be read, and was not before
    index: int  # in PCI order
    minor_number: int | None = None  # the N of /dev/nvidiaN; None: not told
    pci_bus_id: str | None = None
    is_mig: bool = False
    mig_devices: tuple[MigDevice, ...] = ()


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or a MIG device of it."""

    gpu_uuid: str  # empty: a GPU of this node that cannot be read, so nobody gets it from us
    mig_device_uuid: str = ""  # empty: all of the GPU, or not told which part


def node_gpus(
    inventory: NumberedInventory | None,
    telemetry: Iterable[GpuTelemetry],
    mig_before: Mapping[str, tuple[MigDevice, ...]],
) -> tuple[NodeGpu, ...]:
    """Return the GPUs of the node; of one that is not read now the MIG devices that it had."""
    if inventory is None:
        return ()
    mig = dict(mig_before)
    for told in telemetry:
        mig[told.uuid] = tuple(
            MigDevice(each.uuid, each.gpu_instance_id) for each in told.mig_devices
        )
    missing = tuple(NodeGpu(each.uuid or "", each.index) for each in inventory.missing)
    return missing + tuple(
        NodeGpu(
            uuid=gpu.identity.uuid,
            index=gpu.identity.index,
            minor_number=gpu.identity.minor_number,
            pci_bus_id=gpu.identity.pci_bus_id,
            is_mig=bool(gpu.identity.mig_enabled),
            mig_devices=mig.get(gpu.identity.uuid, ()),
        )
        for gpu in inventory.gpus
    )


def find_device(name: str, gpus: Iterable[NodeGpu]) -> Device | None:
    """Return what a device plugin, a CDI name or Slurm means; None: it cannot be told.

    A UUID says by itself which GPU it is, also one that this node cannot read now. What is a
    number goes by the GPUs that there are.
    """
    name = name.partition("::")[0]  # of NVIDIA's plugin: one of several replicas of a GPU (UUID::3)
    for gpu in gpus:
        if gpu.uuid and name == gpu.uuid:
            return Device(name)
    if name.startswith("GPU-") and _is_uuid(name[4 : 4 + _UUID_CHARACTERS]):
        # HAMi, Volcano and others count their shares of a GPU behind its UUID.
        return Device(name[: 4 + _UUID_CHARACTERS])
    if name.startswith("MIG-GPU-"):
        return _old_mig(name.removeprefix("MIG-"), gpus)
    if name.startswith("MIG-"):
        return _mig(name, gpus)
    if name.startswith("nvidia"):
        return _of_device_file(name.removeprefix("nvidia"), gpus)
    if name.startswith("gpu-"):
        return _of_dra(name.removeprefix("gpu-"), gpus)
    # An index, such as of a plugin with deviceIDStrategy=index; "0:1" is a MIG device of GPU 0.
    index, is_mig, rest = name.partition(":")
    if _is_number(index) and (not is_mig or _is_number(rest)):
        return next((Device(gpu.uuid) for gpu in gpus if gpu.index == int(index)), None)
    return None


def is_elsewhere(name: str, gpus: Iterable[NodeGpu]) -> bool:
    """Whether it is a PCI address, and none of a GPU of this node: a NIC, or a GPU passed on."""
    parts = name.replace(".", ":").split(":")
    is_address = len(parts) in {3, 4} and all(
        part and _HEXADECIMAL.issuperset(part) for part in parts
    )
    return is_address and find_pci(name, gpus) is None


def find_pci(address: str, gpus: Iterable[NodeGpu]) -> Device | None:
    """Return the GPU at a PCI address; NVML writes eight digits of its domain, Linux four."""
    wanted = address.lower().lstrip("0")
    for gpu in gpus:
        if gpu.pci_bus_id is not None and gpu.pci_bus_id.lower().lstrip("0") == wanted:
            return Device(gpu.uuid)
    return None


def _mig(name: str, gpus: Iterable[NodeGpu]) -> Device | None:
    for gpu in gpus:
        for device in gpu.mig_devices:
            if name.startswith(device.uuid):
                return Device(gpu.uuid, device.uuid)
    return None


def _old_mig(name: str, gpus: Iterable[NodeGpu]) -> Device | None:
    """Return the MIG device of GPU-UUID/3/0, as drivers before 470 name them."""
    uuid, _, instances = name.partition("/")
    if not _is_uuid(uuid.removeprefix("GPU-")):
        return None
    instance = instances.partition("/")[0]
    for gpu in gpus:
        if gpu.uuid == uuid:
            return _instance(gpu, instance)
    return Device(uuid)


def _of_device_file(name: str, gpus: Iterable[NodeGpu]) -> Device | None:
    """Return the GPU of /dev/nvidia0, as GKE's plugin names them: nvidia0/gi3, nvidia0/vgpu1."""
    minor, _, rest = name.partition("/")
    part = rest.partition("/")[0]
    if not _is_number(minor):
        return None
    for gpu in gpus:
        if gpu.minor_number == int(minor):
            return _instance(gpu, part.removeprefix("gi") if part.startswith("gi") else "")
    return None


def _of_dra(name: str, gpus: Iterable[NodeGpu]) -> Device | None:
    """Return the GPU that NVIDIA's DRA driver calls gpu-0, or gpu-0-mig-19-4-1 a part of.

    The number is that of its device file. Which of its MIG devices it is cannot be told by a
    profile and a placement, which NVML does not say of a device.
    """
    minor, has_part, part = name.partition("-")
    if not _is_number(minor) or (has_part and not part.startswith("mig-")):
        return None
    return next((Device(gpu.uuid) for gpu in gpus if gpu.minor_number == int(minor)), None)


def _instance(gpu: NodeGpu, instance: str) -> Device:
    """Return the MIG device of that GPU instance; the GPU where there is not exactly one."""
    found = [each.uuid for each in gpu.mig_devices if str(each.gpu_instance_id) == instance]
    return Device(gpu.uuid, found[0] if len(found) == 1 else "")


def _is_uuid(text: str) -> bool:
    groups = text.split("-")
    has_form = [len(group) for group in groups] == [8, 4, 4, 4, 12]
    return has_form and _HEXADECIMAL.issuperset("".join(groups))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4
