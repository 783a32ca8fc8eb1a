"""Stands for DCGM's `dcgm_structs.py`: errors, and the structures that its functions take and give.

Names, fields and types are those of testing/python3/dcgm_structs.py in DCGM 4.6; only what stoker
uses is here. As there, text of a structure is `str`, and every code has a class of its own below
DCGMError.
"""

# ruff: noqa: N801, N802, N816 (the names are DCGM's)

from ctypes import (
    Structure,
    Union,
    c_char,
    c_double,
    c_int,
    c_int64,
    c_short,
    c_uint,
    c_uint32,
    c_ushort,
    sizeof,
)
from typing import Any

OK = 0
BADPARAM = -1
NOT_SUPPORTED = -6
UNINITIALIZED = -10
TIMEOUT = -11
NO_DATA = -14
NOT_WATCHED = -16
CONNECTION_NOT_VALID = -21
MAX_LIMIT = -24
LIBRARY_NOT_FOUND = -25
DUPLICATE_KEY = -26
REQUIRES_ROOT = -29
MODULE_NOT_LOADED = -33
PROFILING_LIBRARY_ERROR = -37
PROFILING_MULTI_PASS = -38

_TEXTS = {
    BADPARAM: "Bad parameter passed to function",
    NOT_SUPPORTED: "Feature not supported",
    UNINITIALIZED: "Object is in an undefined state",
    TIMEOUT: "Timeout",
    CONNECTION_NOT_VALID: "The connection to the host engine is not valid any longer",
    MAX_LIMIT: "Max limit reached for the object",
    LIBRARY_NOT_FOUND: "DCGM library could not be found",
    DUPLICATE_KEY: "Duplicate key passed to function",
    REQUIRES_ROOT: "This operation is not supported when the host engine is running as non root",
    MODULE_NOT_LOADED: "This request is serviced by a module of DCGM that is not currently loaded",
    PROFILING_LIBRARY_ERROR: "The third-party Profiling module returned an unrecoverable error",
    PROFILING_MULTI_PASS: "The requested profiling metrics cannot be collected in a single pass",
}

# False: as on a machine with the bindings and without libdcgm.so.4.
library_is_there = True
library_is_loaded = False


class DCGMError(Exception):
    """A function returned a code that is not DCGM_ST_OK."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return _TEXTS.get(self.value, f"DCGM Error with code {self.value}")


def _dcgmInit() -> None:  # pyright: ignore[reportUnusedFunction]
    """Load the library; the real one takes the path of a folder too."""
    global library_is_loaded  # noqa: PLW0603 (as the real one has it)
    if not library_is_there:
        raise DCGMError(LIBRARY_NOT_FOUND)
    library_is_loaded = True


class DcgmStructure(Structure):
    """A structure whose text reads as `str`."""

    def __getattribute__(self, key: str) -> Any:
        value = super().__getattribute__(key)
        return value.decode() if isinstance(value, bytes) else value


class DcgmUnion(Union):
    """A union whose text reads as `str`."""

    def __getattribute__(self, key: str) -> Any:
        value = super().__getattribute__(key)
        return value.decode() if isinstance(value, bytes) else value


class c_dcgmConnectV2Params_v2(DcgmStructure):
    _fields_ = [
        ("version", c_uint),
        ("persistAfterDisconnect", c_uint),
        ("timeoutMs", c_uint),
        ("addressIsUnixSocket", c_uint),
    ]


# The size in the low bits, the number of the version above them (make_dcgm_version).
c_dcgmConnectV2Params_version2 = sizeof(c_dcgmConnectV2Params_v2) | 2 << 24


class c_dcgmGroupEntityPair_t(DcgmStructure):
    _fields_ = [("entityGroupId", c_uint32), ("entityId", c_uint32)]


class c_dcgmFieldValue_v1_value(DcgmUnion):
    _fields_ = [("i64", c_int64), ("dbl", c_double), ("str", c_char * 256), ("blob", c_char * 4096)]


class c_dcgmFieldValue_v2(DcgmStructure):
    _fields_ = [
        ("version", c_uint),
        ("entityGroupId", c_uint),
        ("entityId", c_uint),
        ("fieldId", c_ushort),
        ("fieldType", c_short),
        ("status", c_int),
        ("unused", c_uint),
        ("ts", c_int64),
        ("value", c_dcgmFieldValue_v1_value),
    ]


class c_dcgmMigEntityInfo_t(DcgmStructure):
    _fields_ = [
        ("gpuUuid", c_char * 128),
        ("nvmlGpuIndex", c_uint),
        ("nvmlInstanceId", c_uint),
        ("nvmlComputeInstanceId", c_uint),
        ("nvmlMigProfileId", c_uint),
        ("nvmlProfileSlices", c_uint),
    ]


class c_dcgmMigHierarchyInfo_v2(DcgmStructure):
    _fields_ = [
        ("entity", c_dcgmGroupEntityPair_t),
        ("parent", c_dcgmGroupEntityPair_t),
        ("info", c_dcgmMigEntityInfo_t),
    ]


class c_dcgmMigHierarchy_v2(DcgmStructure):
    _fields_ = [
        ("version", c_uint),
        ("count", c_uint),
        ("entityList", c_dcgmMigHierarchyInfo_v2 * (32 * 14)),
    ]


class c_dcgmProfMetricGroupInfo_v2(DcgmStructure):
    _fields_ = [
        ("majorId", c_ushort),
        ("minorId", c_ushort),
        ("numFieldIds", c_uint32),
        ("fieldIds", c_ushort * 64),
    ]


class c_dcgmProfGetMetricGroups_v3(DcgmStructure):
    _fields_ = [
        ("version", c_uint32),
        ("unused", c_uint32),
        ("gpuId", c_uint32),
        ("numMetricGroups", c_uint32),
        ("metricGroups", c_dcgmProfMetricGroupInfo_v2 * 10),
    ]
