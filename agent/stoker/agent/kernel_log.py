"""Follows the kernel's log for what it says of GPUs: through the root helper, or else directly.

The driver tells there what NVML keeps to itself, such as a card that has fallen off the bus. A
simulated node may have a file in its place, with records as /dev/kmsg tells them.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

from stoker.agent.events import Event, KernelLogChanged, KernelLogRead
from stoker.agent.helper.log import KernelLog
from stoker.agent.helper.records import Record, is_about_gpus, parse_record, wall_time
from stoker.agent.privileged import Helper, HelperUnavailable, LogPart
from stoker.agent.verdicts import KernelLine, KernelLogPosition, KernelLogStatus
from stoker.core.clock import Clock

KMSG = Path("/dev/kmsg")
# Between two tries to follow the log. What is written meanwhile is still there afterwards.
RETRY_SECONDS = 30.0
# Between two looks at a file that stands in for the log.
FILE_SECONDS = 0.2
_FILE_BYTES_MAX = 1 << 20  # taken at one look

_log = logging.getLogger(__name__)


class LogUnavailable(Exception):
    """Why the kernel's log cannot be followed in one of the ways."""


class KernelLogFollower:
    """Tells the state what the kernel's log says of GPUs, and whether it can be followed."""

    def __init__(
        self,
        helper: Helper,
        boot_id: str,
        *,
        position: Callable[[], KernelLogPosition | None],
        happen: Callable[[Event], None],
        clock: Clock,
        kmsg: Path = KMSG,
        script: Path | None = None,
    ) -> None:
        """`position`: the last record that is known; `script`: a file to follow instead."""
        self._helper = helper
        self._boot_id = boot_id
        self._position = position
        self._happen = happen
        self._clock = clock
        self._kmsg = kmsg
        self._script = script
        self._told: KernelLogStatus | None = None

    async def run(self) -> None:
        """Follow the log for ever; what stands in the way is told, and tried again."""
        while True:
            reasons: list[str] = []
            for source, parts in self._ways():
                try:
                    await self._follow(source, parts)
                except (HelperUnavailable, LogUnavailable) as error:
                    reasons.append(str(error))
            self._tell(KernelLogStatus(is_followed=False, source="", reason="; ".join(reasons)))
            await self._clock.sleep(RETRY_SECONDS)

    def _ways(self) -> Iterator[tuple[str, AsyncGenerator[LogPart]]]:
        """Yield one way after the other, each from what is known by then."""
        if self._script is not None:
            yield "file", self._parts_of_file(self._script)
        else:
            yield "helper", self._helper.follow_kernel_log(self._boot_id, self._position())
            yield "direct", self._parts_of_kmsg()

    async def _follow(self, source: str, parts: AsyncGenerator[LogPart]) -> None:
        async with aclosing(parts):
            async for part in parts:
                self._tell(KernelLogStatus(is_followed=True, source=source, reason=""))
                if part.has_lost:
                    _log.warning(
                        "the kernel's log: some records were overwritten before being read"
                    )
                if part.lines:
                    self._happen(KernelLogRead(self._clock.now(), part.lines))

    def _tell(self, status: KernelLogStatus) -> None:
        if status == self._told:
            return
        self._told = status
        if status.is_followed:
            _log.info("the kernel's log is followed (%s)", status.source)
        else:
            _log.warning("the kernel's log is not followed: %s", status.reason)
        self._happen(KernelLogChanged(self._clock.now(), status))

    async def _parts_of_kmsg(self) -> AsyncGenerator[LogPart]:
        """Yield what is read here, where that is allowed; the first part is empty."""
        try:
            log = KernelLog(os.fspath(self._kmsg), self._known())
        except OSError as error:
            raise LogUnavailable(f"{self._kmsg}: {error.strerror}") from error
        loop = asyncio.get_running_loop()
        came = asyncio.Event()
        try:
            loop.add_reader(log.descriptor, came.set)
            yield LogPart()
            while not log.is_over:
                came.clear()
                records = log.read()
                has_lost = log.take_lost()
                if records or has_lost:
                    yield LogPart(tuple(_line(record, at) for record, at in records), has_lost)
                if log.has_more:
                    await asyncio.sleep(0)
                elif not log.is_over:
                    await came.wait()
            raise LogUnavailable(f"{self._kmsg} has ended")
        except OSError as error:
            raise LogUnavailable(f"{self._kmsg}: {error.strerror}") from error
        finally:
            loop.remove_reader(log.descriptor)
            log.close()

    async def _parts_of_file(self, path: Path) -> AsyncGenerator[LogPart]:
        """Yield what is in a file, and what is added to it; the first part is empty."""
        after = self._known()
        offset = 0
        begun = b""
        while True:
            try:
                with path.open("rb") as file:
                    if os.fstat(file.fileno()).st_size < offset:  # written anew
                        offset, begun = 0, b""
                    file.seek(offset)
                    part = file.read(_FILE_BYTES_MAX)
            except OSError as error:
                raise LogUnavailable(f"{path}: {error.strerror}") from error
            offset += len(part)
            *whole, begun = (begun + part).split(b"\n")
            records = [record for line in whole if (record := parse_record(line))]
            lines = [
                self._dated(record)
                for record in records
                if record.sequence > after and is_about_gpus(record.text)
            ]
            yield LogPart(tuple(lines))
            if not part:
                await self._clock.sleep(FILE_SECONDS)

    def _known(self) -> int:
        """Return the sequence of the last record of this boot that is known, or less than any."""
        position = self._position()
        if position is None or position.boot_id != self._boot_id:
            return -1
        return position.sequence

    def _dated(self, record: Record) -> KernelLine:
        # Whoever writes a scenario need not know how long ago the host was booted.
        is_new = record.microseconds == 0
        now, monotonic = self._clock.now(), time.monotonic()
        return _line(record, wall_time(record.microseconds, now, monotonic, is_new=is_new))


def _line(record: Record, at: float) -> KernelLine:
    return KernelLine(record.sequence, at, record.text)
