"""Reads how GPUs are partitioned: the mode, what can be made, and the instances with their places.

What the driver tells wins over the table of boards, which fills in the rest: a driver tells the
kinds of compute instances only of a GPU instance that is there, and places only to root.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from stoker.agent.mig.calls import Calls
from stoker.agent.mig.failures import FailureKind, StepFailed
from stoker.agent.nvml.table import (
    COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED,
    Code,
    ComputeInstanceProfileInfo,
    GpuInstanceHandle,
    GpuInstanceProfileInfo,
    Handle,
    InstanceInfo,
    PciInfo,
    Placement,
)
from stoker.agent.nvml.units import as_text
from stoker.agent.partitions import ComputeInstance, GpuInstance, GpuPartitions
from stoker.core.mig.boards import Board, board_of, told
from stoker.core.mig.geometry import ComputeProfile, Geometry, MigProfile

# Kinds of instances are numbered from zero until the driver knows no more; newer ones know more.
_CONSTANTS_MAX: Final = 64
# Instances come and go while they are read: a reading that loses one begins once more.
_ATTEMPTS: Final = 3
_HOPPER: Final = 9  # first part of the compute capability
# How drivers and cards say that they do not have what was asked for.
_OLDER_FORM: Final = (Code.FUNCTION_NOT_FOUND, Code.ARGUMENT_VERSION_MISMATCH)
_LACKING: Final = (Code.NOT_SUPPORTED, Code.DEPRECATED, *_OLDER_FORM)
_MEBIBYTES_PER_GIBIBYTE: Final = 1024


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as the driver finds it now; its handle holds until the mode is changed."""

    index: int
    uuid: str
    handle: Handle


@dataclass(frozen=True, slots=True)
class Listing:
    """How the GPUs are partitioned that have MIG."""

    gpus: tuple[GpuPartitions, ...]  # by index
    shortfall: str = ""  # which GPUs could not be read, and why; empty: all were


def find_gpu(calls: Calls, uuid: str) -> Gpu:
    """Return the GPU of this UUID; raises StepFailed, also when one that is lost may be it."""
    unread: list[str] = []
    for found in _gpus(calls):
        if isinstance(found, StepFailed):
            unread.append(str(found))
        elif found.uuid == uuid:
            return found
    if unread:
        raise StepFailed(FailureKind.GPU_LOST, f"{uuid} was not found; {'; '.join(unread)}")
    raise StepFailed(FailureKind.NOT_FOUND, f"{uuid}: the driver has no such GPU")


def read_all(calls: Calls) -> Listing:
    """Return the GPUs that have MIG; one that cannot be read hides no other. Raises StepFailed."""
    read: list[GpuPartitions] = []
    unread: list[str] = []
    for found in _gpus(calls):
        if isinstance(found, StepFailed):
            unread.append(str(found))
            continue
        try:
            if _mode(calls, found) is not None:
                read.append(read_gpu(calls, found))
        except StepFailed as failure:
            if failure.kind is FailureKind.DRIVER_GONE:
                raise
            unread.append(str(failure))
    return Listing(tuple(read), "; ".join(unread))


def read_gpu(calls: Calls, gpu: Gpu) -> GpuPartitions:
    """Return how a GPU is partitioned; raises StepFailed, also when it has no MIG."""
    is_enabled, is_pending = read_mode(calls, gpu)
    what = f"{gpu.uuid} cannot be read"
    model = as_text(calls.ask(what, "nvmlDeviceGetName", gpu.handle)) or ""
    pci: PciInfo = calls.ask(what, "nvmlDeviceGetPciInfo", gpu.handle)
    board = board_of(pci.pciDeviceId, model)
    known = board.geometry if board else Geometry(0, 0, ())
    profiles = tuple(
        sorted(
            _profiles(calls, gpu, known),
            key=lambda each: (each.compute_slices, each.memory_mib, each.name),
        )
    )
    made = _all_made(calls, gpu, profiles) if is_enabled else _Made()
    return GpuPartitions(
        uuid=gpu.uuid,
        index=gpu.index,
        model=model,
        pci_device_id=pci.pciDeviceId,
        is_enabled=is_enabled,
        is_pending=is_pending,
        toggles_at_once=_toggles_at_once(calls, gpu, known=board),
        geometry=told(
            known,
            Geometry(
                compute_slices=0,
                memory_slices=0,
                profiles=tuple(
                    replace(each, compute_profiles=made.parts.get(each.profile_id, ()))
                    for each in profiles
                ),
            ),
        ),
        instances=made.instances,
    )


def read_mode(calls: Calls, gpu: Gpu) -> tuple[bool, bool]:
    """Return whether MIG mode is on now, and after the next reset; raises StepFailed."""
    mode = _mode(calls, gpu)
    if mode is None:
        raise StepFailed(FailureKind.NOT_SUPPORTED, f"{gpu.uuid}: this card has no MIG")
    return mode


def _gpus(calls: Calls) -> Iterator[Gpu | StepFailed]:
    """Yield every GPU, or why it does not even tell who it is; raises StepFailed."""
    count: int = calls.ask("the GPUs cannot be counted", "nvmlDeviceGetCount")
    for index in range(count):
        what = f"GPU {index} cannot be read"
        try:
            handle = calls.ask(what, "nvmlDeviceGetHandleByIndex", index)
            uuid = as_text(calls.ask(what, "nvmlDeviceGetUUID", handle))
            if uuid is None:
                raise StepFailed(FailureKind.UNKNOWN, f"{what}: its UUID is empty")
            yield Gpu(index, uuid, handle)
        except StepFailed as failure:
            if failure.kind is FailureKind.DRIVER_GONE:
                raise
            yield failure


def _mode(calls: Calls, gpu: Gpu) -> tuple[bool, bool] | None:
    """Return the mode now and the one pending; None for a card without MIG."""
    what = f"{gpu.uuid}: its MIG mode cannot be read"
    mode = calls.ask_unless(_LACKING, what, "nvmlDeviceGetMigMode", gpu.handle)
    return None if isinstance(mode, Code) else (mode[0] == 1, mode[1] == 1)


def _toggles_at_once(calls: Calls, gpu: Gpu, *, known: Board | None) -> bool:
    """Return whether a change of mode takes no reset."""
    what, function = f"{gpu.uuid} cannot be read", "nvmlDeviceGetCudaComputeCapability"
    capability = calls.ask_unless(_LACKING, what, function, gpu.handle)
    if isinstance(capability, Code):
        return known is not None and known.is_toggled_at_once
    return bool(capability[0] >= _HOPPER)


# --- what can be made


def _profiles(calls: Calls, gpu: Gpu, known: Geometry) -> Iterator[MigProfile]:
    """Yield the kinds of GPU instances that the driver offers."""
    names = {each.constant: each.name for each in known.profiles}
    what = f"{gpu.uuid}: the kinds of GPU instances cannot be read"
    function = "nvmlDeviceGetGpuInstanceProfileInfo"
    for constant, info in _numbered(calls, what, function, gpu.handle):
        profile: GpuInstanceProfileInfo = info
        places = _places(calls, gpu, profile.id)
        name = as_text(getattr(profile, "name", None))  # the first form has none
        yield MigProfile(
            name=(name or "").removeprefix("MIG ") or names.get(constant) or _made_up(profile),
            constant=constant,
            profile_id=profile.id,
            compute_slices=profile.sliceCount,
            memory_slices=places[0].size if places else 0,
            starts=tuple(sorted(place.start for place in places)),
            memory_mib=profile.memorySizeMB,
            sm_count=profile.multiprocessorCount,
            copy_engines=profile.copyEngineCount,
            decoders=profile.decoderCount,
            jpeg_decoders=profile.jpegCount,
            optical_flow=profile.ofaCount,
            count_max=profile.instanceCount,
        )


def _places(calls: Calls, gpu: Gpu, profile_id: int) -> list[Placement]:
    """Return where such an instance may be, whatever is there now; none where that is not told."""
    return calls.listed(
        (*_LACKING, Code.NO_PERMISSION),
        f"{gpu.uuid}: the places of GPU instances cannot be read",
        "nvmlDeviceGetGpuInstancePossiblePlacements",
        gpu.handle,
        profile_id,
        "c_nvmlGpuInstancePlacement_t",
    )


def _made_up(profile: GpuInstanceProfileInfo) -> str:
    """Return the name of a kind that neither the driver nor the table names."""
    gigabytes = round(profile.memorySizeMB / _MEBIBYTES_PER_GIBIBYTE)
    return f"{profile.sliceCount}g.{gigabytes}gb"


def _numbered(
    calls: Calls, what: str, function: str, handle: Any, *arguments: int
) -> Iterator[tuple[int, Any]]:
    """Yield what a function tells of each kind: newest form first, until it knows no more."""
    version = 2
    for constant in range(_CONSTANTS_MAX):
        info = calls.ask_unless(
            (*_LACKING, Code.INVALID_ARGUMENT),
            *(what, function, handle, constant, *arguments, version),
        )
        if isinstance(info, Code) and info in _OLDER_FORM and version == 2:
            version = 1
            info = calls.ask_unless(
                (*_LACKING, Code.INVALID_ARGUMENT),
                *(what, function, handle, constant, *arguments, version),
            )
        if info is Code.INVALID_ARGUMENT:
            return
        if not isinstance(info, Code):
            yield constant, info


# --- what is there


@dataclass(frozen=True, slots=True)
class _Made:
    """What is there."""

    instances: tuple[GpuInstance, ...] = ()  # by place
    # By profile ID of a GPU instance that is there: which compute instances it can have.
    parts: dict[int, tuple[ComputeProfile, ...]] = field(
        default_factory=dict[int, tuple[ComputeProfile, ...]]
    )


def _all_made(calls: Calls, gpu: Gpu, profiles: tuple[MigProfile, ...]) -> _Made:
    for _ in range(_ATTEMPTS - 1):
        try:
            return _made(calls, gpu, profiles)
        except StepFailed as failure:
            if failure.kind is not FailureKind.NOT_FOUND:
                raise
    return _made(calls, gpu, profiles)


def _made(calls: Calls, gpu: Gpu, profiles: tuple[MigProfile, ...]) -> _Made:
    what = f"{gpu.uuid}: its instances cannot be read"
    uuids = _mig_uuids(calls, gpu)
    found: list[GpuInstance] = []
    parts: dict[int, tuple[ComputeProfile, ...]] = {}
    for profile in profiles:
        for handle in calls.listed(
            (Code.NOT_SUPPORTED,),
            *(what, "nvmlDeviceGetGpuInstances", gpu.handle, profile.profile_id),
            "c_nvmlGpuInstance_t",
        ):
            info: InstanceInfo = calls.ask(what, "nvmlGpuInstanceGetInfo", handle)
            if profile.profile_id not in parts:
                parts[profile.profile_id] = _compute_profiles(calls, gpu, handle, profile)
            inside = _compute_instances(calls, gpu, handle, parts[profile.profile_id])
            found.append(
                GpuInstance(
                    id=info.id,
                    profile_id=info.profileId,
                    profile=profile.name,
                    start=info.placement.start,
                    size=info.placement.size,
                    compute_instances=tuple(
                        replace(each, uuid=uuids.get((info.id, each.id), "")) for each in inside
                    ),
                )
            )
    return _Made(tuple(sorted(found, key=lambda each: each.start)), parts)


def _compute_profiles(
    calls: Calls, gpu: Gpu, instance: GpuInstanceHandle, profile: MigProfile
) -> tuple[ComputeProfile, ...]:
    what = f"{gpu.uuid}: the kinds of compute instances of {profile.name} cannot be read"
    function = "nvmlGpuInstanceGetComputeInstanceProfileInfo"
    engines = COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
    infos: list[tuple[int, ComputeInstanceProfileInfo]] = [
        *_numbered(calls, what, function, instance, engines)
    ]
    # A slice of double memory has more SMs than one slice, and a kind of its own for all of them.
    sizes = [(info.sliceCount, info.multiprocessorCount) for _, info in infos]
    whole = sizes.index(max(sizes)) if sizes else None
    return tuple(
        ComputeProfile(
            constant=constant,
            profile_id=info.id,
            compute_slices=info.sliceCount,
            count_max=info.instanceCount,
            sm_count=info.multiprocessorCount,
            is_whole=number == whole,
        )
        for number, (constant, info) in enumerate(infos)
    )


def _compute_instances(
    calls: Calls, gpu: Gpu, instance: GpuInstanceHandle, profiles: tuple[ComputeProfile, ...]
) -> list[ComputeInstance]:
    """Return the compute instances of a GPU instance by place, without their UUIDs."""
    what = f"{gpu.uuid}: its compute instances cannot be read"
    found: list[ComputeInstance] = []
    for profile in profiles:
        for handle in calls.listed(
            (Code.NOT_SUPPORTED,),
            *(what, "nvmlGpuInstanceGetComputeInstances", instance, profile.profile_id),
            "c_nvmlComputeInstance_t",
        ):
            info: InstanceInfo = calls.ask(what, "nvmlComputeInstanceGetInfo_v2", handle)
            found.append(
                ComputeInstance(
                    id=info.id,
                    profile_id=info.profileId,
                    compute_slices=profile.compute_slices,
                    start=info.placement.start,
                    uuid="",
                )
            )
    return sorted(found, key=lambda each: (each.start, each.id))


def _mig_uuids(calls: Calls, gpu: Gpu) -> Mapping[tuple[int, int], str]:
    """Return the UUIDs of the MIG devices by GPU instance and compute instance."""
    what = f"{gpu.uuid}: its MIG devices cannot be read"
    places: int = calls.ask(what, "nvmlDeviceGetMaxMigDeviceCount", gpu.handle)
    uuids: dict[tuple[int, int], str] = {}
    for place in range(places):
        empty = (Code.NOT_FOUND, Code.INVALID_ARGUMENT)
        function = "nvmlDeviceGetMigDeviceHandleByIndex"
        device = calls.ask_unless(empty, what, function, gpu.handle, place)
        if isinstance(device, Code):
            continue
        key = (
            calls.ask(what, "nvmlDeviceGetGpuInstanceId", device),
            calls.ask(what, "nvmlDeviceGetComputeInstanceId", device),
        )
        uuids[key] = as_text(calls.ask(what, "nvmlDeviceGetUUID", device)) or ""
    return uuids
