"""MIG mode and the GPU instances of a simulated card: what it offers, what is there, changes."""

# ruff: noqa: N802 (the names are the driver's own)

from typing import Any

from stoker.agent.facts import Fact
from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.handles import read_placement, write_list
from stoker.agent.simulated.instance_calls import (
    GpuInstance,
    InstanceCalls,
    geometry_of,
    of_gpu_instance,
)
from stoker.agent.simulated.library import NVML, error
from stoker.agent.simulated.partitioning import is_toggled_at_once
from stoker.agent.simulated.partitions import (
    Activation,
    CardRecord,
    InstanceRecord,
    Refusal,
    remaining,
    with_instance,
    with_mode,
    without_instance,
)
from stoker.agent.simulated.session import of_card
from stoker.core.mig.geometry import MigProfile

_PROFILE_INFO = "nvmlDeviceGetGpuInstanceProfileInfo"
_NEWEST = 2  # the version of the structs that tell of profiles


class GpuInstanceFunctions(InstanceCalls):
    """Questions about GPU instances, and what makes and destroys them."""

    # MIG mode ---------------------------------------------------------------------------------

    @of_card
    def nvmlDeviceGetMigMode(self, card: SimulatedCard, /) -> list[int]:
        geometry_of(card)
        record = self._record(card)
        return [
            int(record.is_enabled),
            int(card.fact(Fact.MIG_MODE_PENDING, int(record.is_pending))),
        ]

    @of_card
    def nvmlDeviceSetMigMode(self, card: SimulatedCard, mode: int, /) -> int:
        """Return what became of it: the code of an error where the mode is not in force."""
        self._fail_unless_root()
        geometry_of(card)
        if mode not in (NVML.NVML_DEVICE_MIG_DISABLE, NVML.NVML_DEVICE_MIG_ENABLE):
            raise error("INVALID_ARGUMENT")
        is_used = self._is_used(card)

        def change(record: CardRecord) -> tuple[CardRecord, Activation]:
            return with_mode(
                record,
                mode == NVML.NVML_DEVICE_MIG_ENABLE,
                is_toggled_at_once=is_toggled_at_once(card.model),
                is_busy=is_used or self._partitions.state.is_in_session_elsewhere(),
                can_reset=not self._scenario.pass_through,
            )

        activation: int = getattr(NVML, f"NVML_{self._change(card, change)}")
        return activation

    # What a card offers -----------------------------------------------------------------------

    def nvmlDeviceGetGpuInstanceProfileInfo(
        self, card: SimulatedCard, constant: int, version: int = _NEWEST, /
    ) -> Any:
        ask = self._profile_info_v1 if version == 1 else self._profile_info
        return ask(card, constant, version)

    def nvmlDeviceGetGpuInstanceProfileInfoV(
        self, card: SimulatedCard, constant: int, version: int = _NEWEST, /
    ) -> Any:
        return self._profile_info_v(card, constant, version)

    def _read_profile_info(self, card: SimulatedCard, constant: int, version: int, /) -> Any:
        profiles = geometry_of(card).profiles
        if not 0 <= constant < NVML.NVML_GPU_INSTANCE_PROFILE_COUNT:
            raise error("INVALID_ARGUMENT")
        for profile in profiles:
            if profile.constant == constant:
                return _info(profile, version)
        raise error("NOT_SUPPORTED")

    _profile_info_v1 = of_card(_read_profile_info, _PROFILE_INFO)
    _profile_info = of_card(_read_profile_info, _PROFILE_INFO, f"{_PROFILE_INFO}V")
    _profile_info_v = of_card(_read_profile_info, f"{_PROFILE_INFO}V")

    @of_card
    def nvmlDeviceGetGpuInstanceProfileInfoById(
        self, card: SimulatedCard, profile_id: int, /
    ) -> Any:
        return _info(_profile(card, profile_id), _NEWEST)

    @of_card
    def nvmlDeviceGetGpuInstanceProfileInfoByIdV(
        self, card: SimulatedCard, profile_id: int, /
    ) -> Any:
        return _info(_profile(card, profile_id), _NEWEST)

    @of_card
    def nvmlDeviceGetGpuInstancePossiblePlacements(
        self, card: SimulatedCard, profile_id: int, placements: Any, count: Any, /
    ) -> int:
        # All of them, whatever is there now, and with MIG mode off too.
        self._fail_unless_root()
        profile, struct = _profile(card, profile_id), NVML.c_nvmlGpuInstancePlacement_t
        found = [struct(start, profile.memory_slices) for start in profile.starts]
        write_list(placements, count, found, struct, may_be_null=True)
        return int(NVML.NVML_SUCCESS)

    @of_card
    def nvmlDeviceGetGpuInstanceRemainingCapacity(
        self, card: SimulatedCard, profile_id: int, /
    ) -> int:
        self._fail_unless_root()
        geometry, profile = self._fail_unless_in_mig_mode(card), _profile(card, profile_id)
        return remaining(geometry, self._record(card), profile)

    # What is there ----------------------------------------------------------------------------

    @of_card
    def nvmlDeviceGetGpuInstances(
        self, card: SimulatedCard, profile_id: int, instances: Any, count: Any, /
    ) -> int:
        self._fail_unless_root()
        self._fail_unless_in_mig_mode(card)
        profile = _profile(card, profile_id)
        found = [
            self._instance_handle(card, each)
            for each in self._record(card).instances
            if each.profile_id == profile.profile_id
        ]
        write_list(instances, count, found, NVML.c_nvmlGpuInstance_t, may_be_null=False)
        return int(NVML.NVML_SUCCESS)

    @of_card
    def nvmlDeviceGetGpuInstanceById(self, card: SimulatedCard, number: int, /) -> Any:
        self._fail_unless_root()
        self._fail_unless_in_mig_mode(card)
        for each in self._record(card).instances:
            if each.id == number:
                return self._instance_handle(card, each)
        raise error("NOT_FOUND")

    @of_gpu_instance
    def nvmlGpuInstanceGetInfo(self, instance: GpuInstance, /) -> Any:
        # Its `device` stays NULL: the handle of a simulated GPU is no pointer.
        info, record = NVML.c_nvmlGpuInstanceInfo_t(), instance.record
        info.id, info.profileId = record.id, record.profile_id
        info.placement.start, info.placement.size = record.start, record.size
        return info

    # Changes ----------------------------------------------------------------------------------

    @of_card
    def nvmlDeviceCreateGpuInstance(self, card: SimulatedCard, profile_id: int, /) -> Any:
        return self._create(card, profile_id, None)

    @of_card
    def nvmlDeviceCreateGpuInstanceWithPlacement(
        self, card: SimulatedCard, profile_id: int, placement: Any, /
    ) -> Any:
        return self._create(
            card, profile_id, read_placement(placement, NVML.c_nvmlGpuInstancePlacement_t)
        )

    @of_gpu_instance
    def nvmlGpuInstanceDestroy(self, instance: GpuInstance, /) -> int:
        self._fail_unless_root()
        number = instance.record.number

        def change(record: CardRecord) -> tuple[CardRecord, None]:
            there = record.instance(number)
            if there is None:
                raise error("INVALID_ARGUMENT")
            after = without_instance(record, there)
            if isinstance(after, Refusal):
                raise error(after)
            return after, None

        self._change(instance.card, change)
        return int(NVML.NVML_SUCCESS)

    def _create(self, card: SimulatedCard, profile_id: int, place: tuple[int, int] | None) -> Any:
        self._fail_unless_root()
        geometry, profile = self._fail_unless_in_mig_mode(card), _profile(card, profile_id)
        if place is not None and place[1] != profile.memory_slices:
            raise error("INVALID_ARGUMENT")

        def change(record: CardRecord) -> tuple[CardRecord, InstanceRecord]:
            if not record.is_enabled:
                raise error("NOT_SUPPORTED")
            made = with_instance(geometry, record, profile, None if place is None else place[0])
            if isinstance(made, Refusal):
                raise error(made)
            return made

        return self._instance_handle(card, self._change(card, change))


def _profile(card: SimulatedCard, profile_id: int) -> MigProfile:
    for profile in geometry_of(card).profiles:
        if profile.profile_id == profile_id:
            return profile
    raise error("INVALID_ARGUMENT")


def _info(profile: MigProfile, version: int) -> Any:
    if version not in (1, _NEWEST):
        raise error("FUNCTION_NOT_FOUND")  # as nvidia-ml-py answers, without asking
    if version == 1:
        info = NVML.c_nvmlGpuInstanceProfileInfo_t()
    else:
        info = NVML.c_nvmlGpuInstanceProfileInfo_v2_t()
        info.name = f"MIG {profile.name}"
    info.id, info.isP2pSupported = profile.profile_id, 0
    info.sliceCount, info.instanceCount = profile.compute_slices, profile.count_max
    info.multiprocessorCount, info.copyEngineCount = profile.sm_count, profile.copy_engines
    info.decoderCount, info.encoderCount = profile.decoders, 0
    info.jpegCount, info.ofaCount = profile.jpeg_decoders, profile.optical_flow
    info.memorySizeMB = profile.memory_mib
    return info
