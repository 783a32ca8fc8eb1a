"""Which GPUs others have handed out: from what the kubelet and Slurm say, to assignments.

What names a GPU and cannot be found on this node is never left out in silence: then it is not known
what is handed out, and no GPU of the node may count as free.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from stoker.agent.attribution.devices import (
    Device,
    NodeGpu,
    find_device,
    find_pci,
    is_elsewhere,
)
from stoker.agent.owners import AssignedBy, Assignment, Owner

# Of one node; time-slicing plugins make many of one GPU. More would be a broken plugin.
ASSIGNMENTS_MAX = 4096

_DRA_DRIVER = "gpu.nvidia.com"
# Kinds of CDI names that are GPUs: of NVIDIA's DRA driver, its container toolkit, its plugin.
_CDI_KINDS = frozenset(
    {
        *(f"k8s.{_DRA_DRIVER}/device", f"k8s.{_DRA_DRIVER}/claim", f"k8s.{_DRA_DRIVER}/gpu"),
        *("nvidia.com/gpu", "runtime.nvidia.com/gpu", "management.nvidia.com/gpu"),
        "k8s.device-plugin.nvidia.com/gpu",
    }
)
_CLAIM_UID_CHARACTERS = 37  # a UUID and the dash that ends it


@dataclass(frozen=True, slots=True)
class PodDevices:
    """Devices of one resource that a container of a pod has."""

    namespace: str
    pod: str
    container: str
    resource: str  # "nvidia.com/gpu"
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PodClaim:
    """A device that a container of a pod has by a resource claim (DRA)."""

    namespace: str
    pod: str
    container: str
    driver: str  # "gpu.nvidia.com"; empty: an older kubelet does not tell
    device: str  # "gpu-0"; empty: the same
    cdi_names: tuple[str, ...]  # "k8s.gpu.nvidia.com/device=gpu-0"


PodHolding = PodDevices | PodClaim


@dataclass(frozen=True, slots=True)
class JobGpus:
    """GPUs of a Slurm job on this node, as Slurm numbers them."""

    job: str
    ids: tuple[str, ...] = ()
    unknown: str = ""  # why they are not known; empty: they are


@dataclass(frozen=True, slots=True)
class Assigned:
    """What others have handed out."""

    assignments: tuple[Assignment, ...] = ()
    unknown: str = ""  # why that is not, or not all; empty: it is all


def join(*parts: Assigned) -> Assigned:
    """Return all of it, in an order that does not depend on who told it first.

    Of a GPU without a UUID nothing is said: it cannot be read, so nobody gets it from us.
    """
    found = {each for part in parts for each in part.assignments if each.gpu_uuid}
    unknown = [part.unknown for part in parts if part.unknown]
    if len(found) > ASSIGNMENTS_MAX:
        unknown.append(f"{len(found)} assignments are told, at most {ASSIGNMENTS_MAX} are believed")
        found = set[Assignment]()
    ordered = sorted(
        found, key=lambda each: (each.gpu_uuid, each.mig_device_uuid, each.by, each.holder)
    )
    return Assigned(tuple(ordered), "; ".join(unknown))


def of_pods(holdings: Iterable[PodHolding], gpus: Sequence[NodeGpu]) -> Assigned:
    """Return what the kubelet has handed out."""
    found: list[Assignment] = []
    strange: list[str] = []
    for holding in holdings:
        owner = Owner(
            pod_namespace=holding.namespace,
            pod_name=holding.pod,
            container_name=holding.container,
        )
        holder = owner.described()
        match holding:
            case PodDevices(resource=resource, ids=ids):
                devices, unfound = _find_all(resource, ids, gpus)
            case PodClaim():
                devices, unfound = _find_claimed(holding, gpus)
        for device in devices:
            uuid, mig = device.gpu_uuid, device.mig_device_uuid
            found.append(Assignment(uuid, AssignedBy.KUBELET, holder, mig, owner))
        strange += [f"{holder} has {name}" for name in unfound]
    return Assigned(tuple(found), _not_here("the kubelet", strange))


def of_jobs(jobs: Iterable[JobGpus], gpus: Sequence[NodeGpu]) -> Assigned:
    """Return what Slurm has handed out.

    Slurm numbers GPUs as they stand on the PCI bus, which is NVML's order, and in MIG mode numbers
    the MIG devices of all GPUs through: then a number does not say which GPU it is.
    """
    found: list[Assignment] = []
    strange: list[str] = []
    unknown: list[str] = []
    numbers_migs = any(gpu.is_mig for gpu in gpus)
    for job in jobs:
        owner = Owner(slurm_job=job.job)
        holder = owner.described()
        if job.unknown:
            unknown.append(f"which GPUs {holder} has is not known: {job.unknown}")
        for id_ in job.ids:
            device = None if id_.isdigit() and numbers_migs else find_device(id_, gpus)
            if device is None:
                strange.append(f"{holder} has GPU {id_}")
                continue
            uuid, mig = device.gpu_uuid, device.mig_device_uuid
            found.append(Assignment(uuid, AssignedBy.SLURM, holder, mig, owner))
    unknown += filter(None, [_not_here("Slurm", strange)])
    return Assigned(tuple(found), "; ".join(unknown))


def _find_all(
    resource: str, ids: Iterable[str], gpus: Sequence[NodeGpu]
) -> tuple[list[Device], list[str]]:
    """Return the GPUs among the devices of a resource, and the names of those not found."""
    is_nvidia = resource.startswith("nvidia.com/")
    # Other plugins of NVIDIA number other things: SR-IOV its NICs, KubeVirt IOMMU groups.
    is_gpu = resource == "nvidia.com/gpu" or resource.startswith(
        ("nvidia.com/gpu.", "nvidia.com/mig-")
    )
    devices: list[Device] = []
    unfound: list[str] = []
    for id_ in ids:
        is_uuid = id_.startswith(("GPU-", "MIG-"))  # whatever the resource is called
        if not is_nvidia and not is_uuid:
            continue
        device = find_device(id_, gpus) if is_gpu or is_uuid else find_pci(id_, gpus)
        if device is not None:
            devices.append(device)
        elif is_gpu or is_uuid or not is_elsewhere(id_, gpus):
            unfound.append(f"{id_} ({resource})")
    return devices, unfound


def _find_claimed(claim: PodClaim, gpus: Sequence[NodeGpu]) -> tuple[list[Device], list[str]]:
    """Return the GPUs of a claim, and its name if it is a GPU's and none was found."""
    values = [
        (kind, value)
        for kind, _, value in (name.partition("=") for name in claim.cdi_names)
        if kind in _CDI_KINDS
    ]
    if claim.driver != _DRA_DRIVER and not values:
        return [], []
    devices = list(_claimed(claim, values, gpus))
    if devices:
        return list(dict.fromkeys(devices)), []
    return [], [claim.device or ", ".join(claim.cdi_names) or f"a device of {claim.driver}"]


def _claimed(
    claim: PodClaim, values: Iterable[tuple[str, str]], gpus: Sequence[NodeGpu]
) -> Iterator[Device]:
    names = [claim.device] if claim.device and claim.driver in {_DRA_DRIVER, ""} else []
    for kind, value in values:
        if value == "all":
            yield from (Device(gpu.uuid) for gpu in gpus)
        names.append(value[_CLAIM_UID_CHARACTERS:] if kind.endswith("/claim") else value)
    for name in names:
        device = find_device(name, gpus)
        if device is not None:
            yield device


def _not_here(who: str, strange: Sequence[str]) -> str:
    """Return a sentence about what was not found; empty: there is nothing to say."""
    if not strange:
        return ""
    more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
    return f"{who} has handed out what is no GPU that this node knows: {strange[0]}{more}"
