"""The GPUs of a simulated host that can be partitioned (MIG), and what the driver does to them.

What is admitted is decided by the rules of the simulated driver. It is all a card's own: it
outlives agents and helpers, and goes with a reboot or the driver as it does on real cards.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from stoker.agent.mig.failures import FailureKind, StepFailed
from stoker.agent.partitions import (
    Activation,
    ComputeInstance,
    CreateComputeInstance,
    CreateGpuInstance,
    DestroyComputeInstance,
    DestroyGpuInstance,
    GpuInstance,
    GpuPartitions,
    SetMode,
    Step,
)
from stoker.agent.readings import GpuIdentity, MigDeviceIdentity
from stoker.agent.simulated import partitions as rules
from stoker.agent.simulated.partitions import CardRecord, InstanceRecord
from stoker.core.mig.boards import Board
from stoker.core.mig.geometry import MigProfile

T = TypeVar("T")

MIB = 1 << 20

_ACTIVATIONS = {
    rules.Activation.SUCCESS: Activation.DONE,
    rules.Activation.IN_USE: Activation.IN_USE,
    rules.Activation.RESET_REQUIRED: Activation.RESET_REQUIRED,
}
_KINDS = {
    rules.Refusal.INVALID_ARGUMENT: FailureKind.UNKNOWN,
    rules.Refusal.INSUFFICIENT_RESOURCES: FailureKind.NO_ROOM,
    rules.Refusal.IN_USE: FailureKind.BUSY,
}


@dataclass(slots=True)
class MigCards:
    """The partitions of the GPUs of one host, all of one board."""

    board: Board
    gpus: tuple[GpuIdentity, ...]
    records: dict[str, CardRecord] = field(default_factory=dict[str, CardRecord])
    resets: dict[str, int] = field(default_factory=dict[str, int])  # and losses of the driver

    def record(self, uuid: str) -> CardRecord:
        """Return how a GPU is partitioned."""
        return self.records.get(uuid, CardRecord())

    def is_enabled(self, uuid: str) -> bool:
        """Whether MIG mode is in force."""
        return self.record(uuid).is_enabled

    def partitions(self, uuid: str) -> GpuPartitions:
        """Return how a GPU is partitioned, as root is told."""
        gpu, record = next(each for each in self.gpus if each.uuid == uuid), self.record(uuid)
        instances = tuple(
            GpuInstance(
                each.id,
                each.profile_id,
                self._profile(each.profile_id).name,
                each.start,
                each.size,
                tuple(
                    ComputeInstance(part.id, part.profile_id, part.size, part.start, part.uuid)
                    for part in each.compute
                ),
            )
            for each in sorted(record.instances, key=lambda each: each.start)
        )
        return GpuPartitions(
            uuid=uuid,
            index=gpu.index,
            model=gpu.model,
            pci_device_id=self.board.pci_device_ids[0],
            is_enabled=record.is_enabled,
            is_pending=record.is_pending,
            toggles_at_once=self.board.is_toggled_at_once,
            geometry=self.board.geometry,
            instances=instances,
        )

    def identity(self, gpu: GpuIdentity) -> GpuIdentity:
        """Return a GPU as anybody is told, with its MIG devices."""
        record = self.record(gpu.uuid)
        devices = tuple(
            MigDeviceIdentity(
                part.uuid,
                profile.name,
                profile.memory_mib * MIB,
                each.id,
                part.id,
            )
            for each in record.instances
            for profile in (self._profile(each.profile_id),)
            for part in each.compute
        )
        return replace(gpu, mig_enabled=record.is_enabled, mig_devices=devices)

    def instance_of(self, uuid: str, device: str) -> int | None:
        """Return the GPU instance that a MIG device is in; None: it is not there any more."""
        for each in self.record(uuid).instances:
            if any(part.uuid == device for part in each.compute):
                return each.id
        return None

    def partition(self, uuid: str, config: Mapping[str, int]) -> None:
        """Have a GPU partitioned so from the start, as if by hand; the driver chooses places."""
        geometry = self.board.geometry
        record = CardRecord(is_enabled=bool(config), is_pending=bool(config))
        for name in sorted(config, reverse=True):
            profile = geometry.profile(name)
            assert profile is not None, name
            for _ in range(config[name]):
                record, made = _admitted(uuid, rules.with_instance(geometry, record, profile, None))
                (whole,) = [each for each in profile.compute_profiles if each.is_whole]
                device = self._device_name(uuid, record)
                with_part = rules.with_compute(record, made, profile, whole, None, device)
                record, _ = _admitted(uuid, with_part)
        self.records[uuid] = record

    # --- what root may do

    def set_mode(self, uuid: str, is_enabled: bool, *, is_busy: bool) -> Activation:
        """Change the mode, unless somebody has the GPU open."""
        after, activation = rules.with_mode(
            self.record(uuid),
            is_enabled,
            is_toggled_at_once=self.board.is_toggled_at_once,
            is_busy=is_busy,
            can_reset=True,
        )
        self.records[uuid] = after
        return _ACTIVATIONS[activation]

    def do(self, uuid: str, step: Step, is_used: Callable[[int], bool]) -> None:
        """Do a step, or raise StepFailed; `is_used`: whether processes run in a GPU instance."""
        record, geometry = self.record(uuid), self.board.geometry
        match step:
            case SetMode():
                raise AssertionError("a change of mode is a call of its own")
            case CreateGpuInstance(profile_id, _, start):
                if not record.is_enabled:
                    raise StepFailed(FailureKind.NOT_SUPPORTED, f"{uuid}: MIG mode is off")
                profile = self._profile(profile_id)
                made = rules.with_instance(geometry, record, profile, start)
                self.records[uuid] = _admitted(uuid, made)[0]
            case CreateComputeInstance(start, profile_id):
                inside = self._found(uuid, lambda each: each.start == start)
                whole = self._profile(inside.profile_id)
                part = next(
                    each for each in whole.compute_profiles if each.profile_id == profile_id
                )
                device = self._device_name(uuid, record)
                made_part = rules.with_compute(record, inside, whole, part, None, device)
                self.records[uuid] = _admitted(uuid, made_part)[0]
            case DestroyComputeInstance(id_, compute_id):
                inside = self._found(uuid, lambda each: each.id == id_)
                gone = next((each for each in inside.compute if each.id == compute_id), None)
                if gone is None:
                    raise StepFailed(FailureKind.NOT_FOUND, f"{uuid}: no compute instance there")
                is_busy = is_used(id_)
                left = rules.without_compute(record, inside, gone, is_busy=is_busy)
                self.records[uuid] = _admitted(uuid, left)
            case DestroyGpuInstance(id_):
                inside = self._found(uuid, lambda each: each.id == id_)
                self.records[uuid] = _admitted(uuid, rules.without_instance(record, inside))

    def devices_ended_by(self, uuid: str, step: Step) -> tuple[str, ...]:
        """Return the MIG devices that are gone once a step is done."""
        match step:
            case DestroyComputeInstance(_, _, device):
                return (device,)
            case DestroyGpuInstance(id_):
                instances = [each for each in self.record(uuid).instances if each.id == id_]
                return tuple(part.uuid for each in instances for part in each.compute)
            case SetMode() | CreateGpuInstance() | CreateComputeInstance():
                return ()

    # --- what happens to the cards

    def unload(self) -> None:
        """Lose the driver, by a reboot or without: no instances, and from Hopper on no MIG mode."""
        for uuid in [gpu.uuid for gpu in self.gpus]:
            self.resets[uuid] = self.resets.get(uuid, 0) + 1
            self.records[uuid] = rules.after_unload(
                self.record(uuid), is_toggled_at_once=self.board.is_toggled_at_once
            )

    def _device_name(self, uuid: str, record: CardRecord) -> str:
        """Return the UUID of the next MIG device: no other ever had it."""
        return f"MIG-{uuid.removeprefix('GPU-')}-{record.made + 1}"

    def _profile(self, profile_id: int) -> MigProfile:
        profiles = self.board.geometry.profiles
        return next(each for each in profiles if each.profile_id == profile_id)

    def _found(self, uuid: str, is_it: Callable[[InstanceRecord], bool]) -> InstanceRecord:
        found = next((each for each in self.record(uuid).instances if is_it(each)), None)
        if found is None:
            raise StepFailed(FailureKind.NOT_FOUND, f"{uuid}: no GPU instance there")
        return found


def _admitted(uuid: str, told: T | rules.Refusal) -> T:
    if isinstance(told, rules.Refusal):
        raise StepFailed(_KINDS[told], f"{uuid}: {told}")
    return told
