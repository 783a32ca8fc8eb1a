"""Who the simulated driver and its GPUs are: versions, handles, names, addresses."""

# ruff: noqa: N802 (the names are the driver's own)

from collections.abc import Sequence
from typing import Any

from stoker.agent.simulated.card import SimulatedCard
from stoker.agent.simulated.instances import MigDevice
from stoker.agent.simulated.library import NVML, error
from stoker.agent.simulated.session import Device, SimulatedSession, of_card, of_device, of_system

# By the first part of a chip's compute capability, and the whole where one part has two families.
_ARCHITECTURES = {7: 6, 8: 7, 9: 9, 10: 10, 12: 10}
_ADA, _ADA_ARCHITECTURE = (8, 9), 8


class IdentityFunctions(SimulatedSession):
    """Questions whose answers change only when somebody changes the machine."""

    @of_system
    def nvmlSystemGetDriverVersion(self) -> str:
        return self.release.version

    @of_system
    def nvmlSystemGetNVMLVersion(self) -> str:
        return self.release.nvml_version

    @of_system
    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return self.release.cuda_version

    @of_system
    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self.release.cuda_version

    @of_system
    def nvmlSystemGetProcessName(self, pid: int, /) -> str:
        named = {w.pid: w.name for w in self._workloads}
        seconds = self._seconds()
        named |= {
            p.pid: p.name
            for p in self._scenario.processes
            if p.name is not None and (p.until_seconds is None or seconds < p.until_seconds)
        }
        if pid not in named:
            raise error("NOT_FOUND")
        return named[pid]

    @of_system
    def nvmlDeviceGetCount(self) -> int:
        return len(self._visible())

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> SimulatedCard:
        function = "nvmlDeviceGetHandleByIndex"
        self.admit(function, None)
        visible = self._visible()
        if not 0 <= index < len(visible):
            raise error("INVALID_ARGUMENT")
        return self._found(function, visible[index])

    def nvmlDeviceGetHandleByUUID(self, uuid: str | bytes, /) -> Device:
        function = "nvmlDeviceGetHandleByUUID"
        self.admit(function, None)
        wanted = uuid.decode() if isinstance(uuid, bytes) else uuid
        for card in self._visible():
            if card.uuid == wanted:
                return self._found(function, card)
            for device in card.mig_devices:
                if device.uuid == wanted:
                    self._found(function, card)
                    return device
        raise error("NOT_FOUND")

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str | bytes, /) -> SimulatedCard:
        function = "nvmlDeviceGetHandleByPciBusId"
        self.admit(function, None)
        wanted = bus_id.decode() if isinstance(bus_id, bytes) else bus_id
        for card in self._visible():
            if card.pci_bus_id.casefold() == wanted.casefold():
                return self._found(function, card)
        raise error("NOT_FOUND")

    def _found(self, function: str, card: SimulatedCard) -> SimulatedCard:
        # A fault of one GPU can strike only now that it is known which one is meant.
        if not self._is_plain:
            self._strike(function, card)
        return card

    @of_card
    def nvmlDeviceGetIndex(self, card: SimulatedCard, /) -> int:
        return self._visible().index(card)

    @of_device
    def nvmlDeviceGetUUID(self, device: Device, /) -> str:
        return device.uuid

    @of_device
    def nvmlDeviceGetName(self, device: Device, /) -> str:
        if isinstance(device, MigDevice):
            return f"{device.card.model.driver_name} MIG {device.place.name}"
        return device.model.driver_name

    @of_card
    def nvmlDeviceGetSerial(self, card: SimulatedCard, /) -> str:
        return card.serial

    @of_card
    def nvmlDeviceGetBoardPartNumber(self, card: SimulatedCard, /) -> str:
        return card.model.board_part_number

    @of_card
    def nvmlDeviceGetVbiosVersion(self, card: SimulatedCard, /) -> str:
        return card.model.vbios_version

    @of_card
    def nvmlDeviceGetMinorNumber(self, card: SimulatedCard, /) -> int:
        return card.index

    @of_card
    def nvmlDeviceGetCudaComputeCapability(self, card: SimulatedCard, /) -> tuple[int, int]:
        return card.model.compute_capability

    @of_card
    def nvmlDeviceGetArchitecture(self, card: SimulatedCard, /) -> int:
        capability = card.model.compute_capability
        return _ADA_ARCHITECTURE if capability == _ADA else _ARCHITECTURES[capability[0]]

    @of_card
    def nvmlDeviceGetMemoryAffinity(
        self, card: SimulatedCard, node_set_size: int, scope: int, /
    ) -> Sequence[int]:
        # Two sockets, half of the cards at each, as in most eight-GPU machines.
        node = 0 if card.index * 2 < len(self._cards) else 1
        return [1 << node] + [0] * (node_set_size - 1)

    @of_card
    def nvmlDeviceGetPciInfo(self, card: SimulatedCard, /) -> Any:
        pci = NVML.nvmlPciInfo_t()
        pci.busId, pci.busIdLegacy = card.pci_bus_id, card.pci_bus_id[4:]
        pci.domain, pci.bus, pci.device = 0, card.pci_bus_number, 0
        pci.pciDeviceId = card.model.pci_device_id
        pci.pciSubSystemId = card.model.pci_subsystem_id
        return pci
