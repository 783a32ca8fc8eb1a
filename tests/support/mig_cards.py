"""Simulated GPUs that are partitioned by calls, as short as a test wants to say it."""

from ctypes import byref, c_uint, pointer
from typing import Any

from tests.support.simulated_nodes import NVML, World, node

from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.agent.simulated.scenario import NOTHING_HAPPENS, Scenario
from stoker.core.gpu_models import MODELS
from stoker.core.mig.geometry import MigProfile

MOST = 64  # no board has more of anything


def profile_of(model: str, name: str) -> MigProfile:
    """Return a GPU instance profile of a board."""
    geometry = MODELS[model].mig
    assert geometry is not None
    found = geometry.profile(name)
    assert found is not None, f"{model} has no {name}"
    return found


class MigCard:
    """One GPU of a node, and the calls that partition it; each raises what the driver raises."""

    def __init__(self, nvml: SimulatedNvml, index: int = 0) -> None:
        self.nvml = nvml
        self.gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        self.model: str = self.gpu.model.name

    def enable(self) -> int:
        """Turn MIG mode on; return what became of it."""
        return self.nvml.nvmlDeviceSetMigMode(self.gpu, 1)

    def disable(self) -> int:
        """Turn MIG mode off; return what became of it."""
        return self.nvml.nvmlDeviceSetMigMode(self.gpu, 0)

    @property
    def mode(self) -> list[int]:
        """The mode now, and the pending one."""
        return self.nvml.nvmlDeviceGetMigMode(self.gpu)

    def create(self, name: str, start: int | None = None) -> Any:
        """Make a GPU instance; without a start the driver chooses."""
        profile = profile_of(self.model, name)
        if start is None:
            return self.nvml.nvmlDeviceCreateGpuInstance(self.gpu, profile.profile_id)
        place = NVML.c_nvmlGpuInstancePlacement_t(start, profile.memory_slices)
        return self.nvml.nvmlDeviceCreateGpuInstanceWithPlacement(
            self.gpu, profile.profile_id, pointer(place)
        )

    def split(self, instance: Any, name: str, slices: int | None = None) -> Any:
        """Make a compute instance in a GPU instance of this profile, of all its slices or some."""
        parts = profile_of(self.model, name).compute_profiles
        wanted = next(
            part
            for part in parts
            if (part.is_whole if slices is None else part.compute_slices == slices)
        )
        return self.nvml.nvmlGpuInstanceCreateComputeInstance(instance, wanted.profile_id)

    def device(self, name: str, start: int | None = None) -> str:
        """Make a GPU instance with one compute instance of all of it; return the device's UUID."""
        instance = self.create(name, start)
        self.split(instance, name)
        number = self.nvml.nvmlGpuInstanceGetInfo(instance).id
        devices = [self.nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in self.uuids]
        (made,) = (each for each in devices if self.nvml.nvmlDeviceGetGpuInstanceId(each) == number)
        return self.nvml.nvmlDeviceGetUUID(made)

    @property
    def instances(self) -> list[Any]:
        """The handles of all GPU instances, by profile."""
        geometry = MODELS[self.model].mig
        assert geometry is not None
        found: list[Any] = []
        for profile in geometry.profiles:
            handles, count = (NVML.c_nvmlGpuInstance_t * MOST)(), c_uint()
            self.nvml.nvmlDeviceGetGpuInstances(self.gpu, profile.profile_id, handles, byref(count))
            found += handles[: count.value]
        return found

    @property
    def places(self) -> dict[int, tuple[int, int]]:
        """Start and profile ID of all GPU instances, by ID."""
        infos = [self.nvml.nvmlGpuInstanceGetInfo(each) for each in self.instances]
        return {info.id: (info.placement.start, info.profileId) for info in infos}

    def remaining(self, name: str) -> int:
        """How many more GPU instances of a profile fit."""
        profile = profile_of(self.model, name)
        return self.nvml.nvmlDeviceGetGpuInstanceRemainingCapacity(self.gpu, profile.profile_id)

    @property
    def uuids(self) -> list[str]:
        """The UUIDs of the MIG devices, in the driver's order."""
        found: list[str] = []
        for place in range(self.nvml.nvmlDeviceGetMaxMigDeviceCount(self.gpu)):
            try:
                device = self.nvml.nvmlDeviceGetMigDeviceHandleByIndex(self.gpu, place)
            except NVML.NVMLError:
                break
            found.append(self.nvml.nvmlDeviceGetUUID(device))
        return found


def in_mig_mode(
    model: str = "A100-40GB", scenario: Scenario = NOTHING_HAPPENS, *, is_root: bool = True
) -> MigCard:
    """Return the first of two cards, in MIG mode where root can turn it on."""
    made = MigCard(node(World(), 2, model, scenario=scenario, is_root=is_root))
    if is_root:
        assert made.enable() == NVML.NVML_SUCCESS
    return made
