"""Reads GPUs through NVML: the driver's errors and its habits end here.

`NvmlDriver` is given a table of functions: `nvidia_ml_py()` for the real thing, a
`SimulatedNvml` for a simulated node. The library is found by nvidia-ml-py and by nothing else, so
whatever `libnvidia-ml.so.1` the dynamic loader finds is the one that is asked.

What this module knows about NVML, and why it looks as it does:

- A fact that is not supported, or whose function is missing, stays so until the GPUs are looked
  for anew; asking again is a wasted call into a driver that takes a global lock.
- A function may have a newer form: the forms are tried in order until one is there.
- A lost GPU answers every call with GPU_IS_LOST, and some drivers answer slowly: it is not asked
  again until the GPUs are looked for anew. The others are read on.
- A missing symbol behind an unversioned function raises NVMLLibraryMismatchError, which is no
  NVMLError. Bytes that are no UTF-8 raise UnicodeDecodeError.
- Values that mean "not available" look like numbers: `nvml_facts` knows them, and the units.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar, cast

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
    Suspect,
    UnknownDriverError,
)
from stoker.agent.nvml_facts import (
    COMPUTE_PROCESSES,
    FACTS,
    GRAPHICS_PROCESSES,
    MEMORY,
    Fact,
    as_text,
    cuda_version,
    only_node,
    watts,
)
from stoker.agent.nvml_table import Handle, NvmlTable
from stoker.agent.readings import (
    WHOLE_GPU,
    GpuFault,
    GpuIdentity,
    GpuReading,
    Inventory,
    ProcessesReading,
    ProcessKind,
    ProcessReading,
    ReadFailure,
)

T = TypeVar("T")

LIBRARY = "libnvidia-ml.so.1"
NO_GPU: Final = -1  # what `announce` is told when a call is about no GPU in particular

_ERRORS_BY_CODE: dict[int, type[DriverError]] = {
    1: NotInitialized,
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

_NUMA_NODE_WORDS = 16  # of 64 bits: 1024 nodes, the kernel's limit


def nvidia_ml_py() -> NvmlTable:
    """Return nvidia-ml-py; importing it loads no library. Raises LibraryMissing without it."""
    try:
        import pynvml  # type: ignore[import-untyped]  # noqa: PLC0415 (not in every installation)
    except ImportError as error:
        raise LibraryMissing(
            f"the Python package nvidia-ml-py is not installed ({error}); "
            "it comes with stoker[agent]"
        ) from error
    return cast("NvmlTable", pynvml)


@dataclass(slots=True)
class _Gpu:
    """A GPU that was found, and what was learnt about asking it."""

    index: int
    handle: Handle
    uuid: str | None = None
    lost: GpuLost | None = None
    unavailable: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])

    @property
    def label(self) -> str:
        return self.uuid or f"GPU {self.index}"


class NvmlDriver:
    """A session with NVML; see `stoker.agent.driver.Driver` for what its methods answer."""

    def __init__(
        self,
        table: NvmlTable,
        *,
        simulated: bool = False,
        now: Callable[[], float] = time.time,
        announce: Callable[[int, str], None] = lambda index, function: None,
    ) -> None:
        """Take the functions to call; `announce` hears of every call before it is made."""
        self._table = table
        self._simulated = simulated
        self._now = now
        self._announce = announce
        self._gpus: list[_Gpu] = []
        self._names_are_told = True

    def open(self) -> None:
        """Begin the session; raises DriverUnavailable when there is nothing to talk to."""
        try:
            self._call(None, "nvmlInit", self._table.nvmlInit)
        except DriverUnavailable:
            raise
        except DriverError as error:
            raise DriverUnavailable(error.found, function=error.function) from error

    def close(self) -> None:
        """End the session and let go of the devices."""
        self._gpus = []
        self._call(None, "nvmlShutdown", self._table.nvmlShutdown)

    def inventory(self, suspects: Sequence[Suspect] = ()) -> Inventory:
        """Find the GPUs anew, leaving the suspects alone; later questions are about those found."""
        table, at = self._table, self._now()
        self._gpus = []
        gpus: list[GpuIdentity] = []
        missing: list[GpuFault] = []
        count = self._call(None, "nvmlDeviceGetCount", table.nvmlDeviceGetCount)
        alone = {s.index: s for s in suspects if s.gpu_count in (None, count)}
        alone_by_uuid = {s.uuid: s for s in suspects if s.uuid is not None}
        for index in range(count):
            gpu = _Gpu(index, None)
            suspect = alone.get(index)
            try:
                if suspect is None:
                    self._find(gpu)
                    suspect = alone_by_uuid.get(gpu.uuid or "")
                if suspect is not None:
                    raise DriverTimeout(f"left alone: {suspect.found}", gpu=suspect.uuid)
                gpus.append(self._identify(gpu))
                self._gpus.append(gpu)
            except DriverUnavailable:
                raise
            except DriverError as error:
                uuid = gpu.uuid or (suspect.uuid if suspect else None)
                missing.append(GpuFault(index, uuid, error.kind, str(error)))
        return Inventory(
            at=at,
            driver_version=self._text(
                None, "nvmlSystemGetDriverVersion", table.nvmlSystemGetDriverVersion
            ),
            nvml_version=self._text(
                None, "nvmlSystemGetNVMLVersion", table.nvmlSystemGetNVMLVersion
            ),
            cuda_driver_version=cuda_version(
                self._if_told(
                    None, "nvmlSystemGetCudaDriverVersion", table.nvmlSystemGetCudaDriverVersion
                )
            ),
            simulated=self._simulated,
            gpus=tuple(gpus),
            missing=tuple(missing),
        )

    def sample(self) -> tuple[GpuReading, ...]:
        """Read every GPU found; one that cannot be read is a reading without facts."""
        return tuple(self._read(gpu) for gpu in self._gpus)

    def processes(self) -> ProcessesReading:
        """List who uses every GPU found."""
        started_at = self._now()
        users: list[ProcessReading] = []
        failed: list[GpuFault] = []
        for gpu in self._gpus:
            try:
                if gpu.lost:
                    raise gpu.lost
                users.extend(self._users(gpu))
            except DriverUnavailable:
                raise
            except DriverError as error:
                self._remember_loss(gpu, error)
                failed.append(GpuFault(gpu.index, gpu.uuid, error.kind, str(error)))
        return ProcessesReading(started_at, self._now(), tuple(users), tuple(failed))

    def _find(self, gpu: _Gpu) -> None:
        """Fill in handle and UUID."""
        table = self._table
        gpu.handle = self._call(
            gpu, "nvmlDeviceGetHandleByIndex", lambda: table.nvmlDeviceGetHandleByIndex(gpu.index)
        )
        gpu.uuid = as_text(
            self._call(gpu, "nvmlDeviceGetUUID", lambda: table.nvmlDeviceGetUUID(gpu.handle))
        )
        if gpu.uuid is None:
            raise NotAvailable("the UUID is empty", function="nvmlDeviceGetUUID", gpu=gpu.label)

    def _identify(self, gpu: _Gpu) -> GpuIdentity:
        """Return what the GPU is; raises DriverError when model or memory is not told."""
        table, handle = self._table, gpu.handle
        assert gpu.uuid is not None
        model = as_text(
            self._call(gpu, "nvmlDeviceGetName", lambda: table.nvmlDeviceGetName(handle))
        )
        memory_total = self._ask(gpu, MEMORY)["memory_total_bytes"]
        if model is None or memory_total is None:
            raise NotAvailable("model or size of memory is not told", gpu=gpu.label)

        def text(function: str, ask: Callable[[Handle], Any]) -> str | None:
            return self._text(gpu, function, lambda: ask(handle))

        def told(function: str, ask: Callable[[Handle], T]) -> T | None:
            return self._if_told(gpu, function, lambda: ask(handle))

        capability = told(
            "nvmlDeviceGetCudaComputeCapability", table.nvmlDeviceGetCudaComputeCapability
        )
        mig = told("nvmlDeviceGetMigMode", table.nvmlDeviceGetMigMode)
        return GpuIdentity(
            index=gpu.index,
            uuid=gpu.uuid,
            model=model,
            memory_total_bytes=int(memory_total),
            pci_bus_id=text(
                "nvmlDeviceGetPciInfo", lambda handle: table.nvmlDeviceGetPciInfo(handle).busId
            ),
            serial=text("nvmlDeviceGetSerial", table.nvmlDeviceGetSerial),
            board_part_number=text(
                "nvmlDeviceGetBoardPartNumber", table.nvmlDeviceGetBoardPartNumber
            ),
            vbios_version=text("nvmlDeviceGetVbiosVersion", table.nvmlDeviceGetVbiosVersion),
            minor_number=told("nvmlDeviceGetMinorNumber", table.nvmlDeviceGetMinorNumber),
            compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
            power_limit_watts=watts(
                told("nvmlDeviceGetEnforcedPowerLimit", table.nvmlDeviceGetEnforcedPowerLimit)
            ),
            mig_enabled=None if mig is None else mig[0] == 1,
            numa_node=only_node(
                told(
                    "nvmlDeviceGetMemoryAffinity",
                    lambda handle: table.nvmlDeviceGetMemoryAffinity(
                        handle, _NUMA_NODE_WORDS, table.NVML_AFFINITY_SCOPE_NODE
                    ),
                )
            ),
        )

    def _read(self, gpu: _Gpu) -> GpuReading:
        assert gpu.uuid is not None
        at = self._now()
        facts: dict[str, Any] = {}
        failures: list[ReadFailure] = []
        for fact in FACTS:
            try:
                if gpu.lost:
                    raise gpu.lost
                told = self._ask(gpu, fact)
            except FactUnavailable:
                continue
            except DriverUnavailable:
                raise
            except GpuUnavailable as error:
                # What was read before it went is of a GPU that is not there any more.
                self._remember_loss(gpu, error)
                failure = ReadFailure(WHOLE_GPU, error.kind, str(error))
                return GpuReading(gpu.uuid, at, failures=(failure,))
            except DriverError as error:
                failures.append(ReadFailure(fact.name, error.kind, str(error)))
                continue
            facts |= told
            failures.extend(
                ReadFailure(name, NotAvailable.kind, f"{gpu.label}: {name} is not told")
                for name, value in told.items()
                if value is None
            )
        return GpuReading(gpu.uuid, at, **facts, failures=tuple(failures))

    def _users(self, gpu: _Gpu) -> Iterable[ProcessReading]:
        """Return one entry per process; raises when compute processes cannot be listed."""
        assert gpu.uuid is not None
        found: dict[int, tuple[ProcessKind, int | None]] = {}
        for pid, used in self._ask(gpu, COMPUTE_PROCESSES).items():
            found[pid] = ("compute", used)
        try:
            graphics = self._ask(gpu, GRAPHICS_PROCESSES)
        except FactUnavailable:
            graphics = {}  # a card or driver that draws nothing
        for pid, used in graphics.items():
            found.setdefault(pid, ("graphics", used))
        return [
            ProcessReading(gpu.uuid, pid, kind, used, self._process_name(pid))
            for pid, (kind, used) in found.items()
        ]

    def _process_name(self, pid: int) -> str | None:
        if not self._names_are_told:
            return None
        ask = self._table.nvmlSystemGetProcessName
        try:
            return as_text(self._call(None, "nvmlSystemGetProcessName", lambda: ask(pid)))
        except FactUnavailable:
            self._names_are_told = False
            return None
        except DriverUnavailable:
            raise
        except DriverError:
            return None  # it ended since it was listed, or belongs to another user

    def _ask(self, gpu: _Gpu, fact: Fact[T]) -> T:
        """Return what the first form that this GPU has answers; raises NotSupported without one."""
        for function, ask in fact.forms:
            if (fact.name, function) in gpu.unavailable:
                continue
            try:
                answer = self._call(gpu, function, partial(ask, self._table, gpu.handle))
            except FactUnavailable:
                gpu.unavailable.add((fact.name, function))
                continue
            return fact.meaning(answer)
        functions = " or ".join(function for function, _ in fact.forms)
        raise NotSupported("not on this card or driver", function=functions, gpu=gpu.label)

    def _text(self, gpu: _Gpu | None, function: str, ask: Callable[[], Any]) -> str | None:
        return as_text(self._if_told(gpu, function, ask))

    def _if_told(self, gpu: _Gpu | None, function: str, ask: Callable[[], T]) -> T | None:
        """Return the answer, or None when this one fact cannot be had."""
        try:
            return self._call(gpu, function, ask)
        except (DriverUnavailable, GpuUnavailable):
            raise
        except DriverError:
            return None

    def _call(self, gpu: _Gpu | None, function: str, ask: Callable[[], T]) -> T:
        """Make one call into the driver; its errors become ours here, and nowhere else."""
        table, label = self._table, gpu.label if gpu else None
        self._announce(gpu.index if gpu else NO_GPU, function)
        try:
            return ask()
        except table.NVMLError as error:
            raise _converted(error, function, label) from error
        except table.NVMLLibraryMismatchError as error:
            raise FunctionMissing(str(error), function=function, gpu=label) from error
        except UnicodeDecodeError as error:
            raise NotAvailable(
                f"the text is no UTF-8: {error.object[:40]!r}", function=function, gpu=label
            ) from error

    def _remember_loss(self, gpu: _Gpu, error: DriverError) -> None:
        if isinstance(error, GpuLost):
            gpu.lost = error


def _converted(error: Exception, function: str, gpu: str | None) -> DriverError:
    code = int(getattr(error, "value", 0))
    kind = _ERRORS_BY_CODE.get(code, UnknownDriverError)
    if kind is LibraryMissing:
        return LibraryMissing(_why_no_library(error.__context__), function=function)
    advice = _ADVICE.get(kind)
    found = f"{error} (NVML code {code})" + (f": {advice}" if advice else "")
    return kind(found, function=function, gpu=gpu)


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
