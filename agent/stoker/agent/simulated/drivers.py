"""What older drivers lack: functions and field values by the release that brought them.

Source: the nvml.h of each CUDA toolkit, in which a function or field first appears, and the driver
branch which that toolkit came with. A function may have come with a later driver of the branch
before; the simulation takes the first branch whose header has it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from stoker.core.errors import BadInput, shown

_VERSION = re.compile(r"(\d{3})(?:\.(\d{1,4}))?(?:\.(\d{1,4}))?", re.ASCII)

# By driver branch: the CUDA release that came with it (packed as the driver packs it), and one
# more than the largest field of nvmlDeviceGetFieldValues.
_RELEASES: Final[tuple[tuple[int, int, int], ...]] = (
    (450, 11000, 147),
    (455, 11010, 147),
    (460, 11020, 148),
    (465, 11030, 148),
    (470, 11040, 161),
    (495, 11050, 161),
    (510, 11060, 161),
    (515, 11070, 161),
    (520, 11080, 167),
    (525, 12000, 170),
    (530, 12010, 173),
    (535, 12020, 197),
    (545, 12030, 197),
    (550, 12040, 200),
    (555, 12050, 223),
    (560, 12060, 230),
    (565, 12070, 230),  # no header at hand: as the one before
    (570, 12080, 269),
    (575, 12090, 274),
    (580, 13000, 274),
    (590, 13010, 289),
)
_OLDEST = _RELEASES[0][0]

# The branch that brought a function. What is not listed is older than R450.
_SINCE: Mapping[str, int] = MappingProxyType(
    {
        "nvmlDeviceGetMPSComputeRunningProcesses_v2": 470,
        "nvmlDeviceGetNvLinkRemoteDeviceType": 470,
        "nvmlDeviceCreateGpuInstanceWithPlacement": 460,
        "nvmlComputeInstanceGetInfo_v2": 460,
        "nvmlDeviceGetGpuInstancePossiblePlacements_v2": 470,
        "nvmlDeviceGetGpuInstanceProfileInfoV": 510,
        "nvmlGpuInstanceGetComputeInstanceProfileInfoV": 510,
        "nvmlGpuInstanceGetComputeInstancePossiblePlacements": 525,
        "nvmlGpuInstanceCreateComputeInstanceWithPlacement": 525,
        "nvmlDeviceGetGpuInstanceProfileInfoByIdV": 580,
        "nvmlDeviceGetComputeRunningProcesses_v3": 510,
        "nvmlDeviceGetGraphicsRunningProcesses_v3": 510,
        "nvmlDeviceGetMPSComputeRunningProcesses_v3": 510,
        "nvmlDeviceGetNumFans": 510,
        "nvmlDeviceGetNumGpuCores": 510,
        "nvmlDeviceGetMemoryBusWidth": 510,
        "nvmlDeviceGetMemoryInfo_v2": 510,
        "nvmlGpmQueryDeviceSupport": 520,
        "nvmlGpmSampleAlloc": 520,
        "nvmlGpmSampleGet": 520,
        "nvmlGpmSampleFree": 520,
        "nvmlGpmMetricsGet": 520,
        "nvmlGpmMigSampleGet": 525,
        "nvmlDeviceGetGpuMaxPcieLinkGeneration": 525,
        "nvmlDeviceGetCurrentClocksEventReasons": 535,
        "nvmlDeviceGetSupportedClocksEventReasons": 535,
        "nvmlDeviceGetJpgUtilization": 535,
        "nvmlDeviceGetOfaUtilization": 535,
        "nvmlDeviceGetTemperatureV": 570,
        "nvmlDeviceGetMarginTemperature": 570,
    }
)

# R580.82 moved the fields from 251 on up by eighteen or more: what R575 calls 251 to 253, later
# drivers call 269 to 271, and what R575 calls 269 to 271 are settings of power smoothing.
_RENUMBERED_FROM = (580, 82)
_MOVED: Mapping[int, int] = MappingProxyType({251: 269, 252: 270, 253: 271})
_FIRST_MOVED, _CAME_WITH_MOVED = 251, 575


@dataclass(frozen=True, slots=True)
class DriverRelease:
    """A driver as far as it can be told from its version."""

    version: str
    branch: int
    minor: int
    cuda_version: int
    field_end: int  # one more than the largest field that it knows

    @property
    def nvml_version(self) -> str:
        """As the library tells it: CUDA's major version before the driver's."""
        return f"{self.cuda_version // 1000}.{self.version}"

    def lacks(self, symbol: str) -> bool:
        """Whether the library has no such function."""
        return self.branch < _SINCE.get(symbol, 0)

    def current_field(self, field: int) -> int | None:
        """Return what the newest drivers call this field; None when it is not known here."""
        if field >= self.field_end:
            return None
        if (self.branch, self.minor) >= _RENUMBERED_FROM or field < _FIRST_MOVED:
            return field
        return _MOVED.get(field) if self.branch >= _CAME_WITH_MOVED else None


def parse_release(version: str) -> DriverRelease:
    """Return what is known of a driver; raises BadInput for what is no version, or too old."""
    found = _VERSION.fullmatch(version)
    if found is None:
        raise BadInput(f"driver version {shown(version)} is not like 470.57.02")
    branch, minor = int(found[1]), int(found[2] or 0)
    known = [release for release in _RELEASES if release[0] <= branch]
    if not known:
        raise BadInput(f"driver version {version}: nothing older than R{_OLDEST} is simulated")
    _, cuda_version, field_end = known[-1]
    if (branch, minor) >= _RENUMBERED_FROM:
        field_end = max(field_end, _RELEASES[-1][2])
    return DriverRelease(version, branch, minor, cuda_version, field_end)
