"""Reads and changes partitions through the driver, one step at a time, with explicit places.

Before it changes something, a step looks whether that is still what was meant: a GPU instance by
its profile and its place, a compute instance by its UUID. IDs are used again, so a step that comes
late never hits what somebody else has made since.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, assert_never

from stoker.agent.mig.calls import Calls
from stoker.agent.mig.failures import FailureKind, StepFailed
from stoker.agent.mig.reading import Gpu, Listing, find_gpu, read_all, read_gpu, read_mode
from stoker.agent.nvml.table import Code, NvmlTable
from stoker.agent.partitions import (
    Activation,
    CreateComputeInstance,
    CreateGpuInstance,
    DestroyComputeInstance,
    DestroyGpuInstance,
    GpuInstance,
    GpuPartitions,
    SetMode,
    Step,
)

# What stands within the answer to a change of the mode; anything else there is an error.
_ACTIVATIONS: Final = {
    int(Code.SUCCESS): Activation.DONE,
    int(Code.IN_USE): Activation.IN_USE,
    int(Code.RESET_REQUIRED): Activation.RESET_REQUIRED,
}


@dataclass(frozen=True, slots=True)
class Within:
    """The GPU instance that a step is about, as it was read when the step was decided on."""

    gpu_instance_id: int
    profile: str
    start: int
    compute_instances: tuple[int, ...]  # their IDs

    def __str__(self) -> str:
        return f"{self.profile} at {self.start} (GPU instance {self.gpu_instance_id})"


def within(step: CreateComputeInstance | DestroyComputeInstance, actual: GpuPartitions) -> Within:
    """Return the GPU instance that a compute instance is in, or shall be; raises StepFailed."""
    for each in actual.instances:
        match step:
            case CreateComputeInstance():
                is_it = each.start == step.start
            case DestroyComputeInstance():
                is_it = each.id == step.gpu_instance_id
            case _:
                assert_never(step)
        if is_it:
            ids = tuple(sorted(inside.id for inside in each.compute_instances))
            return Within(each.id, each.profile, each.start, ids)
    found = f"among the GPU instances that were read there is none for {step}"
    raise StepFailed(FailureKind.NOT_FOUND, f"{actual.uuid}: {found}")


class Library:
    """A session with the driver, as a context. Every method may block and raises StepFailed."""

    def __init__(self, table: NvmlTable) -> None:
        """Take the functions to call; nothing is called yet."""
        self._calls = Calls(table)

    def __enter__(self) -> Self:
        """Begin the session; raises StepFailed."""
        self._calls.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the session."""
        self._calls.end()

    def read(self, uuid: str) -> GpuPartitions:
        """Return how a GPU is partitioned; a card without MIG is a failure."""
        return read_gpu(self._calls, find_gpu(self._calls, uuid))

    def read_all(self) -> Listing:
        """Return how the GPUs are partitioned that have MIG."""
        return read_all(self._calls)

    def do(self, uuid: str, step: Step, actual: GpuPartitions) -> Activation:
        """Do a step that was decided on when the GPU was like this; a mode may stay pending."""
        match step:
            case SetMode():
                return self.set_mode(uuid, is_enabled=step.is_enabled)
            case CreateGpuInstance():
                self.create_gpu_instance(uuid, step)
            case CreateComputeInstance():
                self.create_compute_instance(uuid, step, within(step, actual))
            case DestroyComputeInstance():
                self.destroy_compute_instance(uuid, step, within(step, actual))
            case DestroyGpuInstance():
                self.destroy_gpu_instance(uuid, step)
            case _:
                assert_never(step)
        return Activation.DONE

    def set_mode(self, uuid: str, *, is_enabled: bool) -> Activation:
        """Turn MIG mode on or off, unless it is; it may take effect only with the next reset."""
        what = f"{uuid}: turning MIG mode {'on' if is_enabled else 'off'}"
        function = "nvmlDeviceSetMigMode"
        gpu = find_gpu(self._calls, uuid)
        mode = read_mode(self._calls, gpu)
        if mode == (is_enabled, is_enabled):
            return Activation.DONE
        if mode[0] and not is_enabled:
            instances = read_gpu(self._calls, gpu).instances
            if instances:
                found = f"{len(instances)} GPU instances are there, and have to be destroyed first"
                raise StepFailed(FailureKind.BUSY, f"{what}: {found}")
        status: int = self._calls.ask(what, function, gpu.handle, int(is_enabled))
        activation = _ACTIVATIONS.get(status)
        if activation is None:
            raise self._calls.refused(what, function, status)
        # The GPU may have been reset: what was known of it may lead nowhere now.
        self._calls.end()
        self._calls.begin()
        if read_mode(self._calls, find_gpu(self._calls, uuid))[0] == is_enabled:
            return Activation.DONE
        return Activation.RESET_REQUIRED if activation is Activation.DONE else activation

    def create_gpu_instance(self, uuid: str, step: CreateGpuInstance) -> None:
        """Make a GPU instance at this place, if the GPU offers it there."""
        what = f"{uuid}: making {step.profile} at {step.start}"
        gpu, now = self._found(uuid)
        offered = now.geometry.profile(step.profile)
        if (
            offered is None
            or (offered.profile_id, offered.memory_slices) != (step.profile_id, step.size)
            or step.start not in offered.starts
        ):
            found = f"the GPU does not offer profile {step.profile_id} of size {step.size} there"
            raise StepFailed(FailureKind.NOT_SUPPORTED, f"{what}: {found}")
        place = self._calls.placement(step.start, step.size)
        function = "nvmlDeviceCreateGpuInstanceWithPlacement"
        self._calls.ask(what, function, gpu.handle, step.profile_id, place)

    def create_compute_instance(
        self, uuid: str, step: CreateComputeInstance, where: Within
    ) -> None:
        """Make a compute instance in this GPU instance, if it has no others than were read."""
        what = f"{uuid}: making a compute instance of {step.compute_slices} slices in {where}"
        gpu, now = self._found(uuid)
        instance = _meant(what, now, where.gpu_instance_id, where.profile, where.start)
        ids = tuple(sorted(each.id for each in instance.compute_instances))
        if ids != where.compute_instances:
            found = f"its compute instances were {_listed(where.compute_instances)}"
            raise StepFailed(FailureKind.NOT_FOUND, f"{what}: {found}, now {_listed(ids)}")
        handle = self._handle(what, gpu, instance)
        function = "nvmlGpuInstanceCreateComputeInstance"
        self._calls.ask(what, function, handle, step.profile_id)

    def destroy_compute_instance(
        self, uuid: str, step: DestroyComputeInstance, where: Within
    ) -> None:
        """Take this compute instance away, if it still is that MIG device."""
        number = step.compute_instance_id
        what = f"{uuid}: destroying compute instance {number} ({step.uuid}) of {where}"
        gpu, now = self._found(uuid)
        instance = _meant(what, now, where.gpu_instance_id, where.profile, where.start)
        uuids = {each.id: each.uuid for each in instance.compute_instances}
        if number not in uuids:
            raise StepFailed(FailureKind.NOT_FOUND, f"{what}: it is not there any more")
        if uuids[number] != step.uuid:
            found = f"compute instance {number} is {uuids[number] or 'without a UUID'} by now"
            raise StepFailed(FailureKind.NOT_FOUND, f"{what}: {found}")
        function = "nvmlGpuInstanceGetComputeInstanceById"
        handle = self._calls.ask(what, function, self._handle(what, gpu, instance), number)
        self._calls.ask(what, "nvmlComputeInstanceDestroy", handle)

    def destroy_gpu_instance(self, uuid: str, step: DestroyGpuInstance) -> None:
        """Take this GPU instance away, if it still is of that profile at that place."""
        number = step.gpu_instance_id
        what = f"{uuid}: destroying {step.profile} at {step.start} (GPU instance {number})"
        gpu, now = self._found(uuid)
        instance = _meant(what, now, number, step.profile, step.start)
        self._calls.ask(what, "nvmlGpuInstanceDestroy", self._handle(what, gpu, instance))

    def _found(self, uuid: str) -> tuple[Gpu, GpuPartitions]:
        gpu = find_gpu(self._calls, uuid)
        return gpu, read_gpu(self._calls, gpu)

    def _handle(self, what: str, gpu: Gpu, instance: GpuInstance) -> object:
        function = "nvmlDeviceGetGpuInstanceById"
        return self._calls.ask(what, function, gpu.handle, instance.id)


def _meant(what: str, now: GpuPartitions, number: int, profile: str, start: int) -> GpuInstance:
    """Return the GPU instance of this ID; raises StepFailed when it is not the one meant."""
    for each in now.instances:
        if each.id != number:
            continue
        if (each.profile, each.start) != (profile, start):
            found = f"GPU instance {number} is {each.profile} at {each.start} by now"
            raise StepFailed(FailureKind.NOT_FOUND, f"{what}: {found}")
        return each
    raise StepFailed(FailureKind.NOT_FOUND, f"{what}: there is no GPU instance {number} any more")


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none"
