"""Has partitions read and changed by whoever may: the root helper, or a child process with root.

Both are asked in the same words, one line of JSON each way, and neither is waited for longer than
it may take. A step whose answer does not come may be done or not: that is a failure of its own
kind, and reading the GPU tells.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, assert_never

import msgspec

from stoker.agent.driver_host.frames import DriverSource, RealDriver, SimulatedDriver
from stoker.agent.helper.ending import KILL_SECONDS_MAX, TERM_SECONDS_MAX
from stoker.agent.helper.partitions import (
    MODE_SECONDS_MAX,
    READ_SECONDS_MAX,
    STEP_SECONDS_MAX,
)
from stoker.agent.mig.failures import FailureKind, StepFailed, StepsUnavailable
from stoker.agent.mig.library import within
from stoker.agent.partitions import (
    Activation,
    CreateComputeInstance,
    CreateGpuInstance,
    DestroyComputeInstance,
    DestroyGpuInstance,
    GpuPartitions,
    SetMode,
    Step,
)
from stoker.agent.privileged import Helper, HelperInterrupted, HelperUnavailable
from stoker.core.errors import shown

__all__ = [
    "ChildStepper",
    "FailureKind",
    "HelperStepper",
    "LineStepper",
    "StepFailed",
    "Stepper",
    "StepsUnavailable",
    "available_stepper",
]

# What is waited for beyond what a step may take, until whoever does it must have been ended.
_MARGIN_SECONDS = 5.0
# A child that was killed is gone within that, or held by the kernel.
_KILL_SECONDS = 1.0
_SECONDS: Mapping[str, float] = {
    "mig_read": READ_SECONDS_MAX,
    "mig_set_mode": MODE_SECONDS_MAX,
    "end_holder": max(TERM_SECONDS_MAX, KILL_SECONDS_MAX),
}
# How an error begins.
_PHRASES: Mapping[str, str] = {
    "mig_read": "partitions cannot be read",
    "mig_set_mode": "MIG mode cannot be changed",
    "mig_create_gpu_instance": "no GPU instance can be made",
    "mig_create_compute_instance": "no compute instance can be made",
    "mig_destroy_compute_instance": "the compute instance cannot be destroyed",
    "mig_destroy_gpu_instance": "the GPU instance cannot be destroyed",
    "end_holder": "the process cannot be ended",
}
_NOT_PASSED_ON = "NOTIFY_SOCKET"  # a stray message at it would end our unit


class Stepper(Protocol):
    """Reads and changes partitions.

    Every method raises StepFailed, and StepsUnavailable when nobody here may do it.
    """

    async def read(self, uuid: str | None) -> tuple[GpuPartitions, ...]:
        """Return how a GPU is partitioned; None: every GPU that has MIG and can be read."""
        ...

    async def set_mode(self, uuid: str, is_enabled: bool) -> Activation:
        """Turn MIG mode on or off, unless it is; the answer says whether it is in force."""
        ...

    async def do(self, uuid: str, step: Step, actual: GpuPartitions) -> None:
        """Do a step that was decided on when the GPU was like this.

        A change of mode that is not in force afterwards is a failure.
        """
        ...

    async def end_holder(self, uuid: str, pid: int, started_ticks: int) -> bool:
        """Have a process end that has the GPU open; whether it is gone, at the latest in 15 s."""
        ...


class _Answer(msgspec.Struct, frozen=True):
    """The line that comes back."""

    ok: bool = False
    refused: str = ""
    failed: str = ""  # of FailureKind
    message: str = ""
    is_simulated: bool = False
    gpus: tuple[GpuPartitions, ...] = ()
    shortfall: str = ""
    activation: Activation | None = None
    is_gone: bool = False


_ANSWERS: msgspec.json.Decoder[_Answer] = msgspec.json.Decoder(_Answer)


class Line(Protocol):
    """One who reads and changes partitions when he is told to in a line of JSON."""

    is_simulated: bool  # whether simulated GPUs are meant

    async def say(self, what: str, request: Mapping[str, object], seconds: float) -> bytes:
        """Return the line of his answer; `what` is how an error begins.

        Raises StepsUnavailable when he was not told, StepFailed when he does not answer.
        """
        ...


class LineStepper:
    """A Stepper that tells the first one who is there."""

    def __init__(self, *lines: Line) -> None:
        """Take whom to tell, and who else where that one is not there, or may not do it."""
        # Which GPUs were lacking when all were read last, and why; empty: none was.
        self.shortfall = ""
        self._lines = lines

    async def read(self, uuid: str | None) -> tuple[GpuPartitions, ...]:
        answer = await self._ask("mig_read", uuid)
        if uuid is None:
            self.shortfall = answer.shortfall
        return answer.gpus

    async def set_mode(self, uuid: str, is_enabled: bool) -> Activation:
        answer = await self._ask("mig_set_mode", uuid, is_enabled=is_enabled)
        if answer.activation is None:
            raise StepFailed(FailureKind.UNKNOWN, f"{uuid}: MIG mode: the answer does not say how")
        return answer.activation

    async def do(self, uuid: str, step: Step, actual: GpuPartitions) -> None:
        match step:
            case SetMode():
                activation = await self.set_mode(uuid, step.is_enabled)
                if activation is not Activation.DONE:
                    found = f"{uuid}: the change of MIG mode is not in force: {activation}"
                    raise StepFailed(FailureKind.BUSY, found)
            case CreateGpuInstance():
                await self._ask(
                    "mig_create_gpu_instance",
                    uuid,
                    profile=step.profile,
                    profile_id=step.profile_id,
                    start=step.start,
                    size=step.size,
                )
            case CreateComputeInstance():
                where = within(step, actual)
                await self._ask(
                    "mig_create_compute_instance",
                    uuid,
                    gpu_instance_id=where.gpu_instance_id,
                    profile=where.profile,
                    start=where.start,
                    beside=where.compute_instances,
                    profile_id=step.profile_id,
                    compute_slices=step.compute_slices,
                )
            case DestroyComputeInstance():
                where = within(step, actual)
                await self._ask(
                    "mig_destroy_compute_instance",
                    uuid,
                    gpu_instance_id=where.gpu_instance_id,
                    profile=where.profile,
                    start=where.start,
                    compute_instance_id=step.compute_instance_id,
                    uuid=step.uuid,
                )
            case DestroyGpuInstance():
                await self._ask(
                    "mig_destroy_gpu_instance",
                    uuid,
                    gpu_instance_id=step.gpu_instance_id,
                    profile=step.profile,
                    start=step.start,
                )
            case _:
                assert_never(step)

    async def end_holder(self, uuid: str, pid: int, started_ticks: int) -> bool:
        for each in ("TERM", "KILL"):
            answer = await self._ask(
                "end_holder", uuid, pid=pid, started_ticks=started_ticks, signal=each
            )
            if answer.is_gone:
                return True
        return False

    async def _ask(self, verb: str, gpu: str | None, **arguments: object) -> "_Answer":
        request = {"verb": verb, "gpu": gpu, **arguments}
        what = f"{gpu or 'the GPUs'}: {_PHRASES[verb]}"
        seconds = _SECONDS.get(verb, STEP_SECONDS_MAX) + _MARGIN_SECONDS
        reasons: list[str] = []
        for line in self._lines:
            try:
                return _understood(what, await line.say(what, request, seconds), line)
            except StepsUnavailable as reason:
                reasons.append(str(reason))
        raise StepsUnavailable("; ".join(reasons) or f"{what}: nobody here may do it")


def _understood(what: str, said: bytes, line: Line) -> _Answer:
    try:
        answer = _ANSWERS.decode(said)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = shown(said.decode("utf-8", "replace"))
        raise StepFailed(
            FailureKind.UNKNOWN,
            f"{what}: the answer is {text}, which cannot be understood: {error}",
        ) from error
    if answer.refused:
        raise StepsUnavailable(f"{what}: it is refused: {answer.refused}")
    if answer.is_simulated is not line.is_simulated:
        found = "simulated GPUs" if answer.is_simulated else "the real ones"
        raise StepsUnavailable(f"{what}: whoever answers does so for {found}")
    if answer.failed:
        kinds = {kind.value: kind for kind in FailureKind}
        raise StepFailed(kinds.get(answer.failed, FailureKind.UNKNOWN), answer.message)
    if not answer.ok:
        raise StepFailed(FailureKind.UNKNOWN, f"{what}: the answer says neither yes nor no")
    return answer


class HelperLine:
    """The root helper."""

    def __init__(self, helper: Helper, *, is_simulated: bool = False) -> None:
        """Take the helper; `is_simulated`: only one that has simulated GPUs will do."""
        self.is_simulated = is_simulated
        self._helper = helper

    async def say(self, what: str, request: Mapping[str, object], seconds: float) -> bytes:
        """Return its answer."""
        try:
            return await self._helper.ask(what, request, seconds)
        except HelperInterrupted as error:
            raise StepFailed(FailureKind.INTERRUPTED, str(error)) from error
        except HelperUnavailable as error:
            raise StepsUnavailable(str(error)) from error


class ChildLine:
    """A child process for each thing that is said: for an agent that is root, or simulates."""

    def __init__(self, source: DriverSource, locks: Path) -> None:
        """Take the driver, and a folder for locks, the helper's where there may be one."""
        self.is_simulated = isinstance(source, SimulatedDriver)
        self._options = (f"--locks={locks}", *_options(source))

    async def say(self, what: str, request: Mapping[str, object], seconds: float) -> bytes:
        """Return its answer; a child that does not give one in time is killed."""
        argv = [sys.executable, "-P", "-m", "stoker.agent.mig.child", f"--parent={os.getpid()}"]
        environment = {key: each for key, each in os.environ.items() if key != _NOT_PASSED_ON}
        try:
            request_end = _filled_pipe(msgspec.json.encode(request) + b"\n")
        except OSError as error:
            raise StepsUnavailable(f"{what}: no pipe can be made: {error.strerror}") from error
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                *self._options,
                env=environment,
                stdin=request_end,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            found = f"no process can be started: {error.strerror}"
            raise StepsUnavailable(f"{what}: {found}") from error
        finally:
            os.close(request_end)
        try:
            async with asyncio.timeout(seconds):
                said, complaint = await process.communicate()
        except TimeoutError as error:
            found = f"process {process.pid} has not answered for {seconds:g} s"
            raise StepFailed(FailureKind.INTERRUPTED, f"{what}: {found}") from error
        finally:
            await _end(process)
        line, newline, _ = said.partition(b"\n")
        if not newline:
            how = _ending(process.returncode)
            last = complaint.decode("utf-8", "replace").strip().rpartition("\n")[2]
            found = f"the process that did it {how}" + f": {shown(last)}" * bool(last)
            raise StepFailed(FailureKind.INTERRUPTED, f"{what}: {found}")
        return line


def _filled_pipe(data: bytes) -> int:
    """Return the end to be read of a pipe that holds this, and ends after it.

    A child that is dead before it has read can then be no trouble for whoever writes. What is
    asked for is far smaller than what a pipe takes (64 KiB).
    """
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, data)
    finally:
        os.close(write_end)
    return read_end


class HelperStepper(LineStepper):
    """Has the root helper do it."""

    def __init__(self, helper: Helper, *, is_simulated: bool = False) -> None:
        """Take the helper; `is_simulated`: only one that has simulated GPUs will do."""
        super().__init__(HelperLine(helper, is_simulated=is_simulated))


class ChildStepper(LineStepper):
    """Has a child process do it."""

    def __init__(self, source: DriverSource, locks: Path) -> None:
        """Take the driver, and a folder for locks."""
        super().__init__(ChildLine(source, locks))


def available_stepper(helper: Helper, source: DriverSource) -> LineStepper:
    """Return one that has the helper do it, or a child process where the helper does not.

    A child can do it for an agent that is root, and on simulated GPUs that are shared by a file.
    """
    simulated = isinstance(source, SimulatedDriver)
    lines: list[Line] = [HelperLine(helper, is_simulated=simulated)]
    if isinstance(source, SimulatedDriver):
        if source.mig_state_path is not None:
            lines.append(ChildLine(source, Path(source.mig_state_path).absolute().parent))
    elif os.geteuid() == 0:
        lines.append(ChildLine(source, helper.path.absolute().parent))
    return LineStepper(*lines)


def _options(source: DriverSource) -> Sequence[str]:
    """Return what tells a child which simulated driver to ask; nothing for the real one."""
    match source:
        case RealDriver():
            return ()
        case SimulatedDriver():
            options = [f"--simulate={spec}" for spec in source.specs]
            options += [f"--node={source.node}", f"--seed={source.seed}"]
            if source.scenario_path is not None:
                options.append(f"--scenario={source.scenario_path}")
            if source.mig_state_path is not None:
                options.append(f"--mig-state={source.mig_state_path}")
            return options
        case _:
            assert_never(source)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill a child that is still there; one that the kernel holds is left to it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILL_SECONDS):
                await process.wait()


def _ending(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with status {status} and no answer"
    return f"was ended by {signal.Signals(-status).name} before it answered"
