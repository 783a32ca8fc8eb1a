"""Reads the kernel's log as it grows, without ever waiting; also for an agent that may do so."""

import os
import time

from stoker.agent.helper.records import (
    RECORD_BYTES_MAX,
    Record,
    is_about_gpus,
    parse_record,
    wall_time,
)

# Looked at in one reading, so that a flood leaves time for other things.
RECORDS_AT_ONCE = 256


class KernelLog:
    """The kernel's log, from after a record on."""

    def __init__(self, path: str, after: int | None) -> None:
        """Open it; raises OSError. `after`: the sequence of the last record that is known."""
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self.has_more = True  # as of the last reading
        self.is_over = False  # true only of what stands in for the log
        self._after = -1 if after is None else after
        self._is_behind = True
        self._has_lost = False
        self._begun = b""

    def close(self) -> None:
        """Read no more."""
        os.close(self.descriptor)

    def take_lost(self) -> bool:
        """Whether records were overwritten since this was asked last."""
        has_lost, self._has_lost = self._has_lost, False
        return has_lost

    def read(self) -> list[tuple[Record, float]]:
        """Return the next records about GPUs, each with its time (Unix seconds); raises OSError."""
        found: list[tuple[Record, float]] = []
        self.has_more, self.is_over = True, False
        for _ in range(RECORDS_AT_ONCE):
            try:
                # The kernel gives one record at a time; a pipe gives what it has.
                part = os.read(self.descriptor, RECORD_BYTES_MAX)
            except BlockingIOError:
                self.has_more = self._is_behind = False
                break
            except BrokenPipeError:  # what was next is overwritten; reading goes on with the oldest
                self._has_lost = self._is_behind = True
                continue
            if not part:
                self.has_more, self._is_behind, self.is_over = False, False, True
                break
            found += self._parse(part)
        return found

    def _parse(self, part: bytes) -> list[tuple[Record, float]]:
        *lines, begun = (self._begun + part).split(b"\n")
        self._begun = begun[:RECORD_BYTES_MAX]
        now, monotonic = time.time(), time.monotonic()
        records = [record for line in lines if (record := parse_record(line))]
        return [
            (record, wall_time(record.microseconds, now, monotonic, is_new=not self._is_behind))
            for record in records
            if record.sequence > self._after and is_about_gpus(record.text)
        ]
