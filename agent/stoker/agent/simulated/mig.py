"""The MIG devices of a partitioned simulated GPU: handles, who they are, how large they are."""

# ruff: noqa: N802 (the names are the driver's own)

from typing import Any

from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.instances import MigDevice
from stoker.agent.simulated.library import NVML, error
from stoker.agent.simulated.session import Device, SimulatedSession, of_card, of_device


class MigFunctions(SimulatedSession):
    """Questions about MIG."""

    @of_card
    def nvmlDeviceGetMaxMigDeviceCount(self, card: SimulatedCard, /) -> int:
        return _devices_max(card) if card.mig_enabled else 0

    @of_card
    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: SimulatedCard, index: int, /) -> MigDevice:
        if not card.model.has_mig:
            raise error("NOT_SUPPORTED")
        if not 0 <= index < _devices_max(card):
            raise error("INVALID_ARGUMENT")
        if index >= len(card.mig_devices):
            raise error("NOT_FOUND")
        return card.mig_devices[index]

    @of_device
    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, device: Device, /) -> SimulatedCard:
        return _mig_device(device).card

    @of_device
    def nvmlDeviceIsMigDeviceHandle(self, device: Device, /) -> Any:
        # nvidia-ml-py gives the unpacked number here, and here only.
        return NVML.c_uint(isinstance(device, MigDevice))

    @of_device
    def nvmlDeviceGetGpuInstanceId(self, device: Device, /) -> int:
        return _mig_device(device).place.gpu_instance_id

    @of_device
    def nvmlDeviceGetComputeInstanceId(self, device: Device, /) -> int:
        return _mig_device(device).place.compute_instance_id

    @of_device
    def nvmlDeviceGetAttributes(self, device: Device, /) -> Any:
        return _attributes(device)

    @of_device
    def nvmlDeviceGetAttributes_v2(self, device: Device, /) -> Any:
        return _attributes(device)


def _devices_max(card: SimulatedCard) -> int:
    return card.model.mig.compute_slices if card.model.mig is not None else 0


def _mig_device(device: Device) -> MigDevice:
    if not isinstance(device, MigDevice):
        raise error("INVALID_ARGUMENT")
    return device


def _attributes(device: Device) -> Any:
    place = _mig_device(device).place
    profile = place.profile
    attributes = NVML.c_nvmlDeviceAttributes()
    attributes.multiprocessorCount = place.sm_count
    attributes.sharedCopyEngineCount = profile.copy_engines
    attributes.sharedDecoderCount = profile.decoders
    attributes.sharedEncoderCount = 0
    attributes.sharedJpegCount = profile.jpeg_decoders
    attributes.sharedOfaCount = profile.optical_flow
    attributes.gpuInstanceSliceCount = profile.compute_slices
    attributes.computeInstanceSliceCount = place.compute_slices
    attributes.memorySizeMB = profile.memory_mib
    return attributes
