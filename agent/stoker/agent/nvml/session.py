"""One session with NVML: every call is announced before it is made, every error becomes ours.

The announcement is how a call that hangs gets its name, and its GPU. Nothing else of the agent
sees an error of nvidia-ml-py.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from stoker.agent.driver import (
    DriverError,
    DriverNotLoaded,
    DriverTimeout,
    DriverUnavailable,
    FactUnavailable,
    FunctionMissing,
    GpuLost,
    GpuUnavailable,
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
from stoker.agent.nvml.facts import Question
from stoker.agent.nvml.table import Code, Handle, NvmlTable

T = TypeVar("T")

LIBRARY = "libnvidia-ml.so.1"
NO_GPU: Final = -1  # what `announce` is told when a call is about no GPU in particular


class InvalidArgument(UnknownDriverError):
    """The driver does not know what it was asked about: a number that came with a later driver."""


_ERRORS_BY_CODE: dict[int, type[DriverError]] = {
    1: NotInitialized,
    2: InvalidArgument,
    3: NotSupported,
    4: NoPermission,
    6: NotFound,
    9: DriverNotLoaded,
    10: DriverTimeout,
    12: LibraryMissing,
    13: FunctionMissing,
    15: GpuLost,
    16: ResetRequired,
    18: LibraryMismatch,
    25: FunctionMissing,  # ARGUMENT_VERSION_MISMATCH: this form of the function is not there
    26: NotSupported,  # DEPRECATED: newer drivers answer so where older ones had the fact
    28: NotFound,
}
_ADVICE: dict[type[DriverError], str] = {
    DriverNotLoaded: f"{LIBRARY} is there, the kernel module is not: load `nvidia`, see dmesg",
    LibraryMismatch: "the driver was replaced while its old kernel module is loaded: "
    "reload the module or reboot",
    GpuLost: "it fell off the bus; it needs a reset of the GPU or of the machine",
}


@dataclass(slots=True)
class Device:
    """Who is asked: a GPU, or a MIG device of it."""

    index: int  # of the GPU
    handle: Handle
    label: str  # in messages: its UUID, or "GPU 3" before that is known


class Session:
    """The functions of NVML, called one at a time."""

    def __init__(self, table: NvmlTable, announce: Callable[[int, str], None]) -> None:
        """Take the functions to call; `announce` hears of every call before it is made."""
        self._table = table
        self._announce = announce
        self._foreign = (table.NVMLError, table.NVMLLibraryMismatchError, UnicodeDecodeError)

    def find(self, function: str) -> Callable[..., Any]:
        """Return a function of the table; raises FunctionMissing when that is too old for it."""
        found: Callable[..., Any] | None = getattr(self._table, function, None)
        if found is None:
            raise FunctionMissing("this nvidia-ml-py does not have it", function=function)
        return found

    def straight(self, function: str) -> Callable[..., None] | None:
        """Return a function of the library, without what nvidia-ml-py wraps around it.

        None where that is not to be had: it is no part of what nvidia-ml-py promises, and a
        simulated table has no library.
        """
        table = self._table
        find: Callable[[str], Callable[..., int]] | None
        find = getattr(table, "_nvmlGetFunctionPointer", None)
        if find is None:
            return None

        def call(*arguments: Any) -> None:
            code = find(function)(*arguments)
            if code != Code.SUCCESS:
                raise table.NVMLError(code)

        return call

    def ask(self, device: Device | None, function: str, *arguments: Any) -> Any:
        """Call a function by its name; raises DriverError."""
        return self.call(device, function, self.find(function), *arguments)

    def call(
        self, device: Device | None, function: str, ask: Callable[..., T], *arguments: Any
    ) -> T:
        """Call a function that was found before; raises DriverError."""
        self._announce(NO_GPU if device is None else device.index, function)
        try:
            return ask(*arguments)
        except self._foreign as error:
            raise self._ours(error, function, device) from error

    def call_unless(
        self, code: Code, device: Device, function: str, ask: Callable[..., T], *arguments: Any
    ) -> T | None:
        """Call a function of which this code is a regular answer, and no error: None."""
        self._announce(device.index, function)
        try:
            return ask(*arguments)
        except self._foreign as error:
            if getattr(error, "value", None) == code:
                return None
            raise self._ours(error, function, device) from error

    @staticmethod
    def is_lacking(code: int) -> bool:
        """Whether a code that stands within an answer means that this will never be told here."""
        kind = _ERRORS_BY_CODE.get(code, UnknownDriverError)
        return issubclass(kind, FactUnavailable | InvalidArgument)

    def error(self, code: int, function: str, device: Device) -> DriverError:
        """Return what a code means that stands within an answer."""
        return self._ours(self._table.NVMLError(code), function, device)

    def _ours(self, error: Exception, function: str, device: Device | None) -> DriverError:
        label = device.label if device else None
        if isinstance(error, UnicodeDecodeError):
            found = f"the text is no UTF-8: {error.object[:40]!r}"
            return NotAvailable(found, function=function, gpu=label)
        if isinstance(error, self._table.NVMLLibraryMismatchError):
            return FunctionMissing(str(error), function=function, gpu=label)
        code = int(getattr(error, "value", 0))
        kind = _ERRORS_BY_CODE.get(code, UnknownDriverError)
        if kind is LibraryMissing:
            return LibraryMissing(_why_no_library(error.__context__), function=function)
        advice = _ADVICE.get(kind)
        found = f"{error} (NVML code {code})" + (f": {advice}" if advice else "")
        return kind(found, function=function, gpu=label)


def if_told(session: Session, device: Device | None, function: str, *arguments: Any) -> Any:
    """Return the answer, or None when this one thing cannot be had.

    Raises DriverUnavailable and GpuUnavailable.
    """
    try:
        return session.ask(device, function, *arguments)
    except (DriverUnavailable, GpuUnavailable):
        raise
    except DriverError:
        return None


class Prepared:
    """A question to one device, ready to be asked; remembers which of its forms is there."""

    __slots__ = ("_device", "_forms", "_session", "question")

    def __init__(self, session: Session, device: Device, question: Question) -> None:
        """Find the functions; nothing is asked yet."""
        self.question = question
        self._session, self._device = session, device
        self._forms: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = []
        for form in question.forms:
            try:
                function = session.find(form.attribute)
            except FunctionMissing:
                continue
            self._forms.append((form.function, function, (device.handle, *form.arguments)))

    def answer(self) -> Any:
        """Return the answer of the first form that is there; raises DriverError.

        NotSupported means that there is none, and that asking again is vain.
        """
        while self._forms:
            function, ask, arguments = self._forms[0]
            try:
                return self._session.call(self._device, function, ask, *arguments)
            except FactUnavailable:
                del self._forms[0]
        functions = " or ".join(form.function for form in self.question.forms)
        raise NotSupported("not on this card or driver", function=functions, gpu=self._device.label)


def _why_no_library(cause: BaseException | None) -> str:
    """Say which file was looked for, where, what the loader said, and where it comes from."""
    path = os.environ.get("LD_LIBRARY_PATH")
    looked = f"LD_LIBRARY_PATH={path}" if path else "LD_LIBRARY_PATH is not set"
    said = str(cause) if isinstance(cause, OSError) else f"{LIBRARY} was not found"
    return (
        f"{said} (the dynamic loader looked in its cache and its folders; {looked}). "
        f"{LIBRARY} comes with the NVIDIA driver; in a container the NVIDIA Container Toolkit puts "
        "it there when NVIDIA_DRIVER_CAPABILITIES includes utility. Without a GPU, "
        "--simulate 8xH100-80GB makes a simulated node"
    )
