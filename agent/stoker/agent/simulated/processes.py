"""The process lists of a simulated GPU: scripted processes and real ones that say they use it."""

# ruff: noqa: N802 (the names are the driver's own)

from collections.abc import Iterable
from typing import Any, NamedTuple

from stoker.agent.readings import ProcessKind
from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.instances import MigDevice
from stoker.agent.simulated.library import NO_INSTANCE, NVML
from stoker.agent.simulated.session import Device, SimulatedSession, device_of, of_device


class _Listed(NamedTuple):
    """A process on the GPU, or on one of its MIG devices."""

    pid: int
    memory_bytes: int | None
    device: MigDevice | None


class ProcessFunctions(SimulatedSession):
    """Questions about who uses a GPU. In MIG mode a whole GPU lists those of all its devices."""

    @of_device
    def nvmlDeviceGetComputeRunningProcesses(self, device: Device, /) -> list[Any]:
        return self._list(device, "compute")

    @of_device
    def nvmlDeviceGetComputeRunningProcesses_v2(self, device: Device, /) -> list[Any]:
        return self._list(device, "compute")

    @of_device
    def nvmlDeviceGetComputeRunningProcesses_v3(self, device: Device, /) -> list[Any]:
        return self._list(device, "compute")

    @of_device
    def nvmlDeviceGetGraphicsRunningProcesses(self, device: Device, /) -> list[Any]:
        return self._list(device, "graphics")

    @of_device
    def nvmlDeviceGetGraphicsRunningProcesses_v2(self, device: Device, /) -> list[Any]:
        return self._list(device, "graphics")

    @of_device
    def nvmlDeviceGetGraphicsRunningProcesses_v3(self, device: Device, /) -> list[Any]:
        return self._list(device, "graphics")

    # Nobody runs MPS on a simulated GPU.

    @of_device
    def nvmlDeviceGetMPSComputeRunningProcesses(self, device: Device, /) -> list[Any]:
        return []

    @of_device
    def nvmlDeviceGetMPSComputeRunningProcesses_v2(self, device: Device, /) -> list[Any]:
        return []

    @of_device
    def nvmlDeviceGetMPSComputeRunningProcesses_v3(self, device: Device, /) -> list[Any]:
        return []

    def _list(self, device: Device, kind: ProcessKind) -> list[Any]:
        self._scan()
        card = device.card if isinstance(device, MigDevice) else device
        return [
            NVML.nvmlFriendlyObject(
                {
                    "pid": listed.pid,
                    "usedGpuMemory": listed.memory_bytes,
                    "gpuInstanceId": (
                        listed.device.place.gpu_instance_id if listed.device else NO_INSTANCE
                    ),
                    "computeInstanceId": (
                        listed.device.place.compute_instance_id if listed.device else NO_INSTANCE
                    ),
                }
            )
            for listed in self._running(card, kind)
            if device is card or device is listed.device
        ]

    def _running(self, card: SimulatedCard, kind: ProcessKind) -> Iterable[_Listed]:
        for process in self._scripted_on(card, self._seconds()):
            if process.kind != kind:
                continue
            used = process.memory_bytes if process.memory_known else None
            if not card.mig_enabled:
                yield _Listed(process.pid, used, None)
            elif (device := device_of(card, process)) is not None:
                yield _Listed(process.pid, used, device)
        if kind != "compute":
            return
        if not card.mig_enabled:
            for workload in self._working_on(card.uuid):
                yield _Listed(workload.pid, workload.memory_bytes, None)
        for device in card.mig_devices:
            for workload in self._working_on(device.uuid):
                yield _Listed(workload.pid, workload.memory_bytes, device)
