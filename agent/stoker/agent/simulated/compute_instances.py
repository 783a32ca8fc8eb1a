"""The compute instances of a simulated card: what a GPU instance offers, what is there, changes."""

# ruff: noqa: N802 (the names are the driver's own)

from random import Random
from typing import Any

from stoker.agent.simulated.handles import read_placement, write_list
from stoker.agent.simulated.instance_calls import (
    ComputeInstance,
    GpuInstance,
    InstanceCalls,
    of_compute_instance,
    of_gpu_instance,
)
from stoker.agent.simulated.instances import random_uuid
from stoker.agent.simulated.library import NVML, error
from stoker.agent.simulated.partitions import (
    CardRecord,
    ComputeRecord,
    Refusal,
    compute_remaining,
    compute_starts,
    with_compute,
    without_compute,
)
from stoker.core.mig.geometry import ComputeProfile

_PROFILE_INFO = "nvmlGpuInstanceGetComputeInstanceProfileInfo"
_NEWEST = 2  # the version of the structs that tell of profiles


class ComputeInstanceFunctions(InstanceCalls):
    """Questions about compute instances, and what makes and destroys them."""

    def nvmlGpuInstanceGetComputeInstanceProfileInfo(
        self, instance: Any, constant: int, engines: int, version: int = _NEWEST, /
    ) -> Any:
        ask = self._compute_info_v1 if version == 1 else self._compute_info
        return ask(instance, constant, engines, version)

    def nvmlGpuInstanceGetComputeInstanceProfileInfoV(
        self, instance: Any, constant: int, engines: int, version: int = _NEWEST, /
    ) -> Any:
        return self._compute_info_v(instance, constant, engines, version)

    def _read_compute_info(
        self, instance: GpuInstance, constant: int, engines: int, version: int, /
    ) -> Any:
        if (
            not 0 <= constant < NVML.NVML_COMPUTE_INSTANCE_PROFILE_COUNT
            or engines != NVML.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
        ):
            raise error("INVALID_ARGUMENT")
        for profile in instance.profile.compute_profiles:
            if profile.constant == constant:
                return _info(instance, profile, version)
        raise error("NOT_SUPPORTED")

    _compute_info_v1 = of_gpu_instance(_read_compute_info, _PROFILE_INFO)
    _compute_info = of_gpu_instance(_read_compute_info, _PROFILE_INFO, f"{_PROFILE_INFO}V")
    _compute_info_v = of_gpu_instance(_read_compute_info, f"{_PROFILE_INFO}V")

    @of_gpu_instance
    def nvmlGpuInstanceGetComputeInstancePossiblePlacements(
        self, instance: GpuInstance, profile_id: int, placements: Any, count: Any, /
    ) -> int:
        self._fail_unless_root()
        profile, struct = _profile(instance, profile_id), NVML.c_nvmlComputeInstancePlacement_t
        starts = compute_starts(instance.profile, profile)
        found = [struct(start, profile.compute_slices) for start in starts]
        write_list(placements, count, found, struct, may_be_null=True)
        return int(NVML.NVML_SUCCESS)

    @of_gpu_instance
    def nvmlGpuInstanceGetComputeInstanceRemainingCapacity(
        self, instance: GpuInstance, profile_id: int, /
    ) -> int:
        self._fail_unless_root()
        profile = _profile(instance, profile_id)
        return compute_remaining(instance.record, instance.profile, profile)

    # What is there ----------------------------------------------------------------------------

    @of_gpu_instance
    def nvmlGpuInstanceGetComputeInstances(
        self, instance: GpuInstance, profile_id: int, instances: Any, count: Any, /
    ) -> int:
        self._fail_unless_root()
        profile = _profile(instance, profile_id)
        found = [
            self._compute_handle(instance.card, part)
            for part in instance.record.compute
            if part.profile_id == profile.profile_id
        ]
        write_list(instances, count, found, NVML.c_nvmlComputeInstance_t, may_be_null=False)
        return int(NVML.NVML_SUCCESS)

    @of_gpu_instance
    def nvmlGpuInstanceGetComputeInstanceById(self, instance: GpuInstance, number: int, /) -> Any:
        self._fail_unless_root()
        for part in instance.record.compute:
            if part.id == number:
                return self._compute_handle(instance.card, part)
        raise error("NOT_FOUND")

    @of_compute_instance
    def nvmlComputeInstanceGetInfo(self, part: ComputeInstance, /) -> Any:
        return self._info_of(part)

    @of_compute_instance
    def nvmlComputeInstanceGetInfo_v2(self, part: ComputeInstance, /) -> Any:
        return self._info_of(part)

    def _info_of(self, part: ComputeInstance) -> Any:
        # Its `device` stays NULL: the handle of a simulated GPU is no pointer.
        info, record, within = NVML.c_nvmlComputeInstanceInfo_t(), part.record, part.within
        info.gpuInstance = self._instance_handle(within.card, within.record)
        info.id, info.profileId = record.id, record.profile_id
        info.placement.start, info.placement.size = record.start, record.size
        return info

    # Changes ----------------------------------------------------------------------------------

    @of_gpu_instance
    def nvmlGpuInstanceCreateComputeInstance(
        self, instance: GpuInstance, profile_id: int, /
    ) -> Any:
        return self._create_compute(instance, profile_id, None)

    @of_gpu_instance
    def nvmlGpuInstanceCreateComputeInstanceWithPlacement(
        self, instance: GpuInstance, profile_id: int, placement: Any, /
    ) -> Any:
        place = read_placement(placement, NVML.c_nvmlComputeInstancePlacement_t)
        return self._create_compute(instance, profile_id, place)

    @of_compute_instance
    def nvmlComputeInstanceDestroy(self, part: ComputeInstance, /) -> int:
        self._fail_unless_root()
        card, gone = part.within.card, part.record
        number = part.within.record.number
        device = next((each for each in card.mig_devices if each.uuid == gone.uuid), None)
        is_busy = device is not None and self._is_used(card, device)

        def change(record: CardRecord) -> tuple[CardRecord, None]:
            there = record.instance(number)
            if there is None or gone not in there.compute:
                raise error("INVALID_ARGUMENT")
            after = without_compute(record, there, gone, is_busy=is_busy)
            if isinstance(after, Refusal):
                raise error(after)
            return after, None

        self._change(card, change)
        return int(NVML.NVML_SUCCESS)

    def _create_compute(
        self, instance: GpuInstance, profile_id: int, place: tuple[int, int] | None
    ) -> Any:
        self._fail_unless_root()
        card, number = instance.card, instance.record.number
        profile = _profile(instance, profile_id)
        if place is not None and place[1] != profile.compute_slices:
            raise error("INVALID_ARGUMENT")

        def change(record: CardRecord) -> tuple[CardRecord, ComputeRecord]:
            there = record.instance(number)
            if there is None:
                raise error("INVALID_ARGUMENT")
            # The same at every run of a simulation, and never the same again on one card.
            uuid = random_uuid("MIG", Random(f"{card.uuid}/{record.made + 1}"))
            start = None if place is None else place[0]
            made = with_compute(record, there, instance.profile, profile, start, uuid)
            if isinstance(made, Refusal):
                raise error(made)
            return made

        return self._compute_handle(card, self._change(card, change))


def _profile(instance: GpuInstance, profile_id: int) -> ComputeProfile:
    for profile in instance.profile.compute_profiles:
        if profile.profile_id == profile_id:
            return profile
    is_one = 0 <= profile_id < NVML.NVML_COMPUTE_INSTANCE_PROFILE_COUNT
    raise error("NOT_SUPPORTED" if is_one else "INVALID_ARGUMENT")


def _info(instance: GpuInstance, profile: ComputeProfile, version: int) -> Any:
    if version not in (1, _NEWEST):
        raise error("FUNCTION_NOT_FOUND")  # as nvidia-ml-py answers, without asking
    whole = instance.profile
    if version == 1:
        info = NVML.c_nvmlComputeInstanceProfileInfo_t()
    else:
        info = NVML.c_nvmlComputeInstanceProfileInfo_v2_t()
        name = whole.name if profile.is_whole else f"{profile.compute_slices}c.{whole.name}"
        info.name = f"MIG {name}"
    info.id, info.sliceCount = profile.profile_id, profile.compute_slices
    info.instanceCount, info.multiprocessorCount = profile.count_max, profile.sm_count
    info.sharedCopyEngineCount, info.sharedDecoderCount = whole.copy_engines, whole.decoders
    info.sharedEncoderCount, info.sharedJpegCount = 0, whole.jpeg_decoders
    info.sharedOfaCount = whole.optical_flow
    return info
