"""One session with the driver for what takes root; the driver's errors become kinds of failures.

nvidia-ml-py has habits that show here: a place is handed over by a pointer, a list is written into
an array that the caller brings, and a missing symbol may raise an error that is no NVMLError.
"""

import contextlib
import ctypes
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from stoker.agent.mig.failures import FailureKind, StepFailed
from stoker.agent.nvml.table import Code, Handle, NvmlTable

_KINDS: Mapping[int, FailureKind] = MappingProxyType(
    {
        Code.UNINITIALIZED: FailureKind.DRIVER_GONE,
        Code.NOT_SUPPORTED: FailureKind.NOT_SUPPORTED,
        Code.NO_PERMISSION: FailureKind.NO_PERMISSION,
        Code.NOT_FOUND: FailureKind.NOT_FOUND,
        Code.DRIVER_NOT_LOADED: FailureKind.DRIVER_GONE,
        Code.LIBRARY_NOT_FOUND: FailureKind.DRIVER_GONE,
        Code.FUNCTION_NOT_FOUND: FailureKind.NOT_SUPPORTED,
        Code.GPU_IS_LOST: FailureKind.GPU_LOST,
        Code.RESET_REQUIRED: FailureKind.GPU_LOST,
        Code.OPERATING_SYSTEM: FailureKind.NO_PERMISSION,  # a control group keeps the device away
        Code.LIB_RM_VERSION_MISMATCH: FailureKind.DRIVER_GONE,
        Code.IN_USE: FailureKind.BUSY,
        Code.INSUFFICIENT_RESOURCES: FailureKind.NO_ROOM,
        Code.ARGUMENT_VERSION_MISMATCH: FailureKind.NOT_SUPPORTED,
        Code.DEPRECATED: FailureKind.NOT_SUPPORTED,
        Code.GPU_NOT_FOUND: FailureKind.NOT_FOUND,
    }
)
_NAMED: Final = frozenset(map(int, Code))
# A profile says how many instances there can be at most; no board has more than these.
_LIST_MAX: Final = 64


class Calls:
    """The functions of nvidia-ml-py, called by their names."""

    def __init__(self, table: NvmlTable) -> None:
        """Take the functions to call; nothing is called yet."""
        self._table = table
        self._foreign = (table.NVMLError, table.NVMLLibraryMismatchError, UnicodeDecodeError)

    def begin(self) -> None:
        """Begin the session; raises StepFailed."""
        self.ask("the driver cannot be opened", "nvmlInit")

    def end(self) -> None:
        """End it; one that cannot be ended properly ends with the process."""
        with contextlib.suppress(*self._foreign):
            self._table.nvmlShutdown()

    def ask(self, what: str, function: str, *arguments: Any) -> Any:
        """Return what a function answers; raises StepFailed that begins with `what`."""
        try:
            return getattr(self._table, function)(*arguments)
        except self._foreign as error:
            raise self._failure(what, function, error) from error

    def ask_unless(self, codes: tuple[Code, ...], what: str, function: str, *arguments: Any) -> Any:
        """Return what a function answers, or a Code that is a regular answer of it."""
        try:
            return getattr(self._table, function)(*arguments)
        except self._foreign as error:
            for code in codes:
                if _code(error) == code:
                    return code
            raise self._failure(what, function, error) from error

    def listed(
        self, codes: tuple[Code, ...], what: str, function: str, of: Handle, number: int, kind: str
    ) -> list[Any]:
        """Return what a function writes into an array of the struct or handle `kind`.

        Empty where it answers with one of the codes.
        """
        found = (self._type(kind) * _LIST_MAX)()
        count = ctypes.c_uint(_LIST_MAX)
        told = self.ask_unless(codes, what, function, of, number, found, ctypes.byref(count))
        return [] if isinstance(told, Code) else list(found[: min(count.value, _LIST_MAX)])

    def placement(self, start: int, size: int) -> Any:
        """Return a place as the functions take it."""
        # The struct is wanted by its address; nvidia-ml-py passes on what it is given.
        return ctypes.pointer(self._type("c_nvmlGpuInstancePlacement_t")(start, size))

    def _type(self, name: str) -> Any:
        """Return a type of nvidia-ml-py, which every table has under its name."""
        return getattr(self._table, name)

    def refused(self, what: str, function: str, code: int) -> StepFailed:
        """Return what a code means that stands within an answer."""
        return self._failure(what, function, self._table.NVMLError(code))

    @staticmethod
    def _failure(what: str, function: str, error: Exception) -> StepFailed:
        if isinstance(error, UnicodeDecodeError):
            return StepFailed(FailureKind.UNKNOWN, f"{what}: {function}: the text is no UTF-8")
        code = _code(error)
        if code is None:  # NVMLLibraryMismatchError
            return StepFailed(FailureKind.NOT_SUPPORTED, f"{what}: {function}: {error}")
        kind = _KINDS.get(code, FailureKind.UNKNOWN)
        word = f"NVML_ERROR_{Code(code).name}" if code in _NAMED else f"NVML code {code}"
        return StepFailed(kind, f"{what}: {function}: {error} ({word})")


def _code(error: Exception) -> int | None:
    code: int | None = getattr(error, "value", None)
    return code
