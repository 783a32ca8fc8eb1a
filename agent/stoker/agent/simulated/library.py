"""nvidia-ml-py as the simulation uses it: its structs, constants and errors, without a library."""

from typing import Any, Final

import pynvml  # type: ignore[import-untyped]

from stoker.core.errors import BadInput

NVML: Final[Any] = pynvml  # it has no annotations

# What stands for "no MIG instance" in events and process lists.
NO_INSTANCE: Final = 0xFFFFFFFF

# What nvidia-ml-py calls when its own function has another name.
SYMBOLS: Final[dict[str, str]] = {
    "nvmlInit": "nvmlInit_v2",
    "nvmlDeviceGetCount": "nvmlDeviceGetCount_v2",
    "nvmlDeviceGetHandleByIndex": "nvmlDeviceGetHandleByIndex_v2",
    "nvmlDeviceGetHandleByPciBusId": "nvmlDeviceGetHandleByPciBusId_v2",
    "nvmlDeviceGetPciInfo": "nvmlDeviceGetPciInfo_v3",
    "nvmlDeviceGetNvLinkRemotePciInfo": "nvmlDeviceGetNvLinkRemotePciInfo_v2",
    "nvmlDeviceGetComputeRunningProcesses": "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetGraphicsRunningProcesses": "nvmlDeviceGetGraphicsRunningProcesses_v3",
    "nvmlDeviceGetMPSComputeRunningProcesses": "nvmlDeviceGetMPSComputeRunningProcesses_v3",
    "nvmlDeviceGetAttributes": "nvmlDeviceGetAttributes_v2",
    "nvmlEventSetWait": "nvmlEventSetWait_v2",
    "nvmlDeviceGetGpuInstanceProfileInfoById": "nvmlDeviceGetGpuInstanceProfileInfoByIdV",
    "nvmlDeviceGetGpuInstancePossiblePlacements": "nvmlDeviceGetGpuInstancePossiblePlacements_v2",
    "nvmlComputeInstanceGetInfo": "nvmlComputeInstanceGetInfo_v2",
}
# Functions without a version in their name that say so when the library has no newest version.
_UNVERSIONED: Final = {
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
    "nvmlDeviceGetMPSComputeRunningProcesses",
}


def error(name: str) -> Exception:
    """Return the driver's error of that name; raises BadInput when there is none."""
    return _error_of(error_code(name))


def error_code(name: str) -> int:
    """Return the driver's code of that error; raises BadInput when there is none."""
    code: int | None = getattr(NVML, f"NVML_ERROR_{name}", None)
    if code is None:
        raise BadInput(f"scenario: {name!r} is no error of NVML, such as GPU_IS_LOST")
    return code


def missing(function: str) -> Exception:
    """Return what nvidia-ml-py raises when the symbol behind its function is not there."""
    if function in _UNVERSIONED:
        mismatch: Exception = NVML.NVMLLibraryMismatchError(
            "Unversioned function called and the pyNVML version does not match the NVML lib "
            f"version: {function}"
        )
        return mismatch
    return error("FUNCTION_NOT_FOUND")


def _error_of(code: int) -> Exception:
    made: Exception = NVML.NVMLError(code)
    return made
