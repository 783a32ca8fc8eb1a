"""The parts of a partitioned (MIG) simulated GPU: what a layout makes of a list of profiles.

A layout names its devices as the driver does: "1g.10gb" is a GPU instance with one compute
instance over all of it, "1c.2g.20gb" a compute instance of one slice; several of those in a row
share a GPU instance while it has slices left.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from stoker.core.errors import BadInput
from stoker.core.gpu_models import MIB, GpuModel
from stoker.core.mig.geometry import ComputeProfile, MigProfile
from stoker.core.mig.layouts import instance_id, place

if TYPE_CHECKING:
    from stoker.agent.simulated.card import SimulatedCard

_COMPUTE_PART = re.compile(r"([1-7])c\.(.+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Work:
    """What processes hold and keep busy."""

    memory_bytes: int = 0
    utilization: float = 0.0  # the share of time in which kernels run
    encoder: float = 0.0  # the share of the video encoders' time
    decoder: float = 0.0

    def plus(self, other: "Work", share: float = 1.0) -> "Work":
        """Return both together; of the other only so much of the engines counts."""
        return Work(
            self.memory_bytes + other.memory_bytes,
            self.utilization + other.utilization * share,
            self.encoder + other.encoder * share,
            self.decoder + other.decoder * share,
        )

    def within(self, room_bytes: int) -> "Work":
        """Return what of it there is room and time for."""
        return Work(
            min(self.memory_bytes, room_bytes),
            min(1.0, max(0.0, self.utilization)),
            min(1.0, max(0.0, self.encoder)),
            min(1.0, max(0.0, self.decoder)),
        )


IDLE = Work()


@dataclass(frozen=True, slots=True)
class Place:
    """Where one MIG device of a layout is, and how large it is."""

    name: str  # "1g.10gb", "1c.2g.20gb"
    profile: MigProfile
    start: int  # the first memory slice of its GPU instance
    compute_slices: int
    gpu_instance_id: int
    compute_instance_id: int

    @property
    def compute_profile(self) -> ComputeProfile:
        """What kind of compute instance it is."""
        return next(
            each
            for each in self.profile.compute_profiles
            if each.compute_slices == self.compute_slices
        )

    @property
    def sm_count(self) -> int:
        """Its share of the SMs of its GPU instance."""
        return self.compute_profile.sm_count


@dataclass(slots=True, eq=False)
class MigDevice:
    """One MIG device: its own handle, which is stale once the layout is another."""

    card: "SimulatedCard"
    place: Place
    uuid: str
    work: Work = IDLE
    busy_seconds: float = field(default=0.0)

    @property
    def memory_bytes(self) -> int:
        """What its GPU instance has; compute instances share it."""
        return self.place.profile.memory_mib * MIB

    @property
    def memory_share(self) -> float:
        """Its part of the whole memory."""
        mig = self.card.model.mig
        return self.place.profile.memory_slices / mig.memory_slices if mig is not None else 0.0

    @property
    def compute_share(self) -> float:
        """Its part of the whole chip."""
        mig = self.card.model.mig
        return self.place.compute_slices / mig.compute_slices if mig is not None else 0.0


def lay_out(model: GpuModel, names: Sequence[str]) -> tuple[Place, ...]:
    """Return the devices in the driver's order; raises BadInput when a GPU cannot hold them."""
    geometry = model.mig
    if geometry is None:
        raise BadInput(f"scenario: a {model.name} cannot be partitioned (MIG)")
    profiles = {profile.name: profile for profile in model.mig_profiles}
    instances: list[MigProfile] = []
    parts: list[list[tuple[str, int]]] = []  # by instance: name and compute slices of each device
    room = 0  # compute slices that the last instance has left for further compute instances
    for name in names:
        part = _COMPUTE_PART.fullmatch(name)
        profile = profiles.get(part[2] if part else name)
        if profile is None:
            raise BadInput(
                f"scenario: {name!r} is no MIG device of {model.name}, which has "
                f"{', '.join(profiles)}"
            )
        slices = int(part[1]) if part else profile.compute_slices
        if slices > profile.compute_slices:
            raise BadInput(f"scenario: {name!r} has more compute slices than its GPU instance")
        if all(each.compute_slices != slices for each in profile.compute_profiles):
            raise BadInput(f"scenario: {profile.name} has no compute instance of {slices} slices")
        if part and slices <= room and instances[-1] == profile:
            parts[-1].append((name, slices))
            room -= slices
            continue
        instances.append(profile)
        parts.append([(name, slices)])
        room = profile.compute_slices - slices if part else 0
    starts = place(geometry, instances)
    if starts is None:
        raise BadInput(f"scenario: {', '.join(names)} do not fit on one {model.name}")
    found = [
        Place(
            name,
            profile,
            start,
            slices,
            instance_id(geometry, profile.memory_slices, start),
            number,
        )
        for profile, start, devices in zip(instances, starts, parts, strict=True)
        for number, (name, slices) in enumerate(devices)
    ]
    return tuple(sorted(found, key=lambda at: (at.gpu_instance_id, at.compute_instance_id)))


def random_uuid(prefix: str, rng: Random) -> str:
    """Return the prefix and a random UUID (RFC 9562, version 4), as real devices have them."""
    bits = rng.getrandbits(128)
    bits = bits & ~(0xF << 76) | 4 << 76
    bits = bits & ~(0b11 << 62) | 0b10 << 62
    text = f"{bits:032x}"
    return f"{prefix}-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
