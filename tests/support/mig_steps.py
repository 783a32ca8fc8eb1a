"""A simulated node whose partitions a helper or a child changes, and words for the steps."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.agent.driver_host.frames import SimulatedDriver
from stoker.agent.mig.library import Library
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
from stoker.agent.simulated.nvml import SimulatedNvml
from stoker.core.gpu_models import MODELS

NODE = "n1"


@dataclass(frozen=True)
class Node:
    """A simulated node of two cards, as far as it is files."""

    folder: Path
    model: str = "H100-80GB"
    count: int = 2

    @property
    def scenario(self) -> Path:
        return self.folder / "scenario.json"

    @property
    def state(self) -> Path:
        return self.folder / "mig.json"

    @property
    def uuids(self) -> tuple[str, ...]:
        """The GPUs, by index."""
        return SimulatedNvml([MODELS[self.model]] * self.count, node=NODE).uuids

    @property
    def source(self) -> SimulatedDriver:
        """The driver, as an agent knows it."""
        return SimulatedDriver(
            (f"{self.count}x{self.model}",),
            NODE,
            scenario_path=str(self.scenario),
            mig_state_path=str(self.state),
        )

    @property
    def options(self) -> tuple[str, ...]:
        """What has a helper ask it."""
        return (
            *("--simulate", f"{self.count}x{self.model}", "--node", NODE),
            *("--scenario", str(self.scenario), "--mig-state", str(self.state)),
        )

    def now(self, index: int = 0) -> GpuPartitions:
        """Return how a GPU is partitioned, read by this process."""
        with Library(self._driver()) as library:
            return library.read(self.uuids[index])

    def do(self, *steps: Callable[[GpuPartitions], Step]) -> GpuPartitions:
        """Do one step on the first GPU after the other, each as it follows from what is there.

        Done by this process, for what has to be there before something is tested.
        """
        uuid = self.uuids[0]
        with Library(self._driver()) as library:
            now = library.read(uuid)
            for step in steps:
                assert library.do(uuid, step(now), now) is Activation.DONE
                now = library.read(uuid)
        return now

    def _driver(self) -> SimulatedNvml:
        cards = [MODELS[self.model]] * self.count
        return SimulatedNvml(cards, node=NODE, mig_state=self.state, is_root=True)

    def play(self, *faults: dict[str, Any], **scenario: Any) -> None:
        """Let these faults happen from now on, and none that were before."""
        beside = self.folder / "scenario.next"
        beside.write_text(json.dumps({"faults": faults, **scenario}), encoding="utf-8")
        os.replace(beside, self.scenario)


def instance_at(now: GpuPartitions, start: int) -> GpuInstance:
    """Return the GPU instance at a place."""
    (found,) = [each for each in now.instances if each.start == start]
    return found


def turned_on(now: GpuPartitions) -> SetMode:
    """Return the step that turns MIG mode on."""
    return SetMode(is_enabled=True)


def make(now: GpuPartitions, name: str, start: int) -> CreateGpuInstance:
    """Return the step that makes a GPU instance."""
    profile = now.geometry.profile(name)
    assert profile is not None
    return CreateGpuInstance(profile.profile_id, name, start, profile.memory_slices)


def fill(now: GpuPartitions, start: int, slices: int | None = None) -> CreateComputeInstance:
    """Return the step that makes a compute instance there; of no size: one that takes all."""
    profile = now.geometry.profile(instance_at(now, start).profile)
    assert profile is not None
    (wanted,) = [
        each
        for each in profile.compute_profiles
        if (each.is_whole if slices is None else each.compute_slices == slices)
    ]
    return CreateComputeInstance(start, wanted.profile_id, wanted.compute_slices)


def empty(now: GpuPartitions, start: int, number: int = 0) -> DestroyComputeInstance:
    """Return the step that destroys a compute instance of the GPU instance there."""
    instance = instance_at(now, start)
    compute = instance.compute_instances[number]
    return DestroyComputeInstance(instance.id, compute.id, compute.uuid)


def destroy(now: GpuPartitions, start: int) -> DestroyGpuInstance:
    """Return the step that destroys the GPU instance there."""
    instance = instance_at(now, start)
    return DestroyGpuInstance(instance.id, instance.profile, instance.start)
