"""What a board can be cut into: GPU instance profiles, their places, compute instance profiles.

Places count memory slices, as NVML does. The tables of `core.mig.boards` are what is known of a
board before its driver was asked; what the driver tells wins.
"""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class ComputeProfile:
    """One kind of compute instance in a GPU instance of some profile."""

    constant: int  # NVML_COMPUTE_INSTANCE_PROFILE_...
    profile_id: int  # what creating one takes; not the constant
    compute_slices: int
    count_max: int
    sm_count: int
    is_whole: bool  # it takes the whole GPU instance: what is created when nothing else is asked


@dataclass(frozen=True, slots=True)
class MigProfile:
    """One kind of GPU instance that a board offers."""

    name: str  # "3g.40gb", with its attributes: "1g.10gb+me"
    constant: int  # NVML_GPU_INSTANCE_PROFILE_..., the argument of ...GetGpuInstanceProfileInfo
    profile_id: int  # what creating one takes; not the constant
    compute_slices: int
    memory_slices: int
    starts: tuple[int, ...]  # the memory slices at which it may begin
    memory_mib: int
    sm_count: int
    copy_engines: int
    decoders: int
    jpeg_decoders: int
    optical_flow: int
    count_max: int
    compute_profiles: tuple[ComputeProfile, ...] = ()
    is_estimated: bool = False  # figures (never places) that were not seen in a listing


@dataclass(frozen=True, slots=True)
class Geometry:
    """All that a board can be cut into."""

    compute_slices: int
    memory_slices: int
    profiles: tuple[MigProfile, ...]

    def profile(self, name: str) -> MigProfile | None:
        """Return the profile of that name."""
        return next((each for each in self.profiles if each.name == name), None)


@dataclass(frozen=True, slots=True, order=True)
class Placed:
    """A GPU instance of a layout: where it is, and which compute instances it has."""

    start: int  # its first memory slice
    size: int  # in memory slices
    profile: str  # "2g.20gb"
    # The compute slices of each compute instance; empty: one that takes the whole GPU instance.
    compute: tuple[int, ...] = ()

    @property
    def mask(self) -> int:
        """Its memory slices as bits."""
        return (1 << self.size) - 1 << self.start


# GPU instances in the order of their places, none overlapping another.
Layout = tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of one GPU."""

    is_enabled: bool  # MIG mode
    # How many of each MIG device: "2g.20gb", or "1c.2g.20gb" for a part of a GPU instance.
    devices: tuple[tuple[str, int], ...] = ()


class MigState(StrEnum):
    """How far a GPU is on the way to what was declared for it."""

    PENDING = "pending"  # wanted, not begun: something is in the way, or it is not its turn
    DRAINING = "draining"  # its users are asked to leave
    APPLYING = "applying"
    ROLLING_BACK = "rolling-back"  # it failed, and the layout before is being restored
    REBOOT_REQUIRED = "reboot-required"  # the mode takes effect with the next reset or reboot
    SUCCESS = "success"
    FAILED = "failed"  # it is as it was before, or the reason says how it is
