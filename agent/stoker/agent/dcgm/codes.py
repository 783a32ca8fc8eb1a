"""DCGM's return codes, and which of our errors they are.

Numbers and meanings: dcgmReturn_t in dcgm_structs.h of DCGM 4.6.
"""

from stoker.agent.driver import (
    DriverError,
    DriverTimeout,
    FunctionMissing,
    GpuLost,
    LibraryMismatch,
    LibraryMissing,
    NoPermission,
    NotAvailable,
    NotFound,
    NotInitialized,
    NotSupported,
    ResetRequired,
    UnknownDriverError,
)

PACKAGE = "datacenter-gpu-manager-4-core"

OK, NO_DATA, STALE_DATA, NOT_WATCHED, INSTANCE_NOT_FOUND = 0, -14, -15, -16, -45

_CONNECTION_LOST = frozenset({-10, -21})
_ERRORS_BY_CODE: dict[int, type[DriverError]] = {
    -6: NotSupported,
    -10: NotInitialized,
    -11: DriverTimeout,
    -12: LibraryMismatch,
    -17: NoPermission,
    -18: GpuLost,
    -19: ResetRequired,
    -20: FunctionMissing,
    -21: NotInitialized,
    -22: NotSupported,
    -25: LibraryMissing,
    -29: NoPermission,
    -33: NotSupported,
    -34: NotAvailable,
    -36: NotSupported,
    -37: NotAvailable,
    -44: NotSupported,
    -45: NotFound,
    -54: NotAvailable,
    -56: NotInitialized,
    -57: DriverTimeout,
    -67: NotFound,
}
_ADVICE: dict[int, str] = {
    -12: "nv-hostengine and the bindings should be of one release",
    -21: "is nv-hostengine running there?",
    -25: f"libdcgm.so.4 comes with {PACKAGE}",
    -29: "nv-hostengine must run as root to read hardware counters",
    -33: "nv-hostengine has no profiling module for this machine",
    -37: "before Hopper one program at a time has the hardware counters: "
    "another profiler has them, or a second nv-hostengine",
}


class DcgmFailed(Exception):
    """A call into DCGM failed; `error` is what it is to the agent."""

    def __init__(self, function: str, code: int | None, text: str) -> None:
        self.code = code
        kind = _ERRORS_BY_CODE.get(code, UnknownDriverError) if code else UnknownDriverError
        number = f" (DCGM code {code})" if code else ""
        advice = f": {_ADVICE[code]}" if code in _ADVICE else ""
        self.error = kind(f"{text}{number}{advice}", function=function)
        super().__init__(str(self.error))

    @property
    def is_connection_lost(self) -> bool:
        """Whether everything made over the connection is gone with it."""
        return self.code in _CONNECTION_LOST


def status_error(status: int) -> DriverError:
    """Return the error that the status of a single value means."""
    return DcgmFailed("dcgmEntitiesGetLatestValues", status, "the value was not told").error
