"""Looks into the kernel's log for faults of GPUs: itself, or through the root helper."""

import asyncio
import contextlib
import os
import time
from pathlib import Path

from stoker.agent.doctor.host import user_name
from stoker.agent.doctor.observed import HelperFacts, Holder, KernelLogFacts, LogLine, Unseen
from stoker.agent.doctor.parse import kmsg_records
from stoker.agent.doctor.roots import Roots
from stoker.agent.health.checks import INIT_FAILED, PCIE_FATAL, PCIE_NONFATAL
from stoker.agent.health.kernel_log import Happening, KernelLogReader, PciAddress
from stoker.agent.privileged import Helper, HelperUnavailable
from stoker.agent.verdicts import Check

KMSG = "/dev/kmsg"
# A record of the kernel's is at most so long; a shorter read fails.
_RECORD_BYTES_MAX = 8192
# The kernel keeps less than this.
_LOG_BYTES_MAX = 1 << 26
# Of what the log says of GPUs, the newest.
LINES_MAX = 200
# The helper tells what there is at once, then waits for more.
_QUIET_SECONDS = 0.5
# The driver tells of a GPU that fell off by an Xid and in words; both come within this.
_SAME_SECONDS = 60.0
_KINDS = {
    Happening.XID: (Check.XID, ""),
    Happening.FALLEN_OFF: (Check.XID, ""),
    Happening.INIT_FAILED: (Check.GPU_LOST, INIT_FAILED),
    Happening.PCIE_FATAL: (Check.PCIE_LINK, PCIE_FATAL),
    Happening.PCIE_NONFATAL: (Check.PCIE_LINK, PCIE_NONFATAL),
}


def kernel_log(roots: Roots, helper: Path | None, seconds: float) -> KernelLogFacts | Unseen:
    """Return what the kernel's log of this boot says of GPUs' faults."""
    try:
        lines = _read(roots)
        source = KMSG
    except OSError as error:
        why = f"{KMSG}: {error.strerror}"
        if helper is None:
            return Unseen(why)
        try:
            lines = asyncio.run(_followed(helper, _boot_id(roots), seconds))
        except HelperUnavailable as unavailable:
            return Unseen(f"{why}; {str(unavailable).partition(': ')[2]}")
        source = "helper"
    return KernelLogFacts(source, time.time(), tuple(lines[-LINES_MAX:]))


def helper_there(path: Path | None, seconds: float) -> HelperFacts:
    """Return whether the root helper answers us, and who has device files open."""
    if path is None:
        return HelperFacts("", False, "where it listens is not known")
    try:
        holders = asyncio.run(Helper(path, timeout_seconds=seconds).holders())
    except HelperUnavailable as error:
        return HelperFacts(str(path), False, str(error))
    named = (Holder(each.pid, user_name(each.uid), each.command, each.devices) for each in holders)
    return HelperFacts(str(path), True, "", tuple(named))


def _read(roots: Roots) -> list[LogLine]:
    booted_at = time.time() - float(roots.text("/proc/uptime").split()[0])
    log = _Faults()
    for since_boot, text in kmsg_records(_kmsg(roots.path(KMSG))):
        log.take(booted_at + since_boot, text)
    return log.lines


def _kmsg(path: Path) -> str:
    """Return all that the kernel's log holds now; raises OSError."""
    parts: list[bytes] = []
    size = 0
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while size < _LOG_BYTES_MAX:
            try:
                part = os.read(file, _RECORD_BYTES_MAX)
            except BrokenPipeError:
                continue  # the next record was overwritten meanwhile: on with those after it
            except BlockingIOError:  # that was the last one
                break
            if not part:
                break
            parts.append(part)
            size += len(part)
    finally:
        os.close(file)
    return b"".join(parts).decode("utf-8", "replace")


def _boot_id(roots: Roots) -> str:
    return (roots.text_or_none("/proc/sys/kernel/random/boot_id") or "").strip()


async def _followed(helper: Path, boot_id: str, seconds: float) -> list[LogLine]:
    """Return what the helper tells until it falls quiet."""
    log = _Faults()
    parts = Helper(helper, timeout_seconds=seconds).follow_kernel_log(boot_id, None)
    async with contextlib.aclosing(parts):
        with contextlib.suppress(TimeoutError, StopAsyncIteration):
            while True:
                async with asyncio.timeout(_QUIET_SECONDS):
                    part = await anext(parts)
                for each in part.lines:
                    log.take(each.at, each.text)
    return log.lines


class _Faults:
    """What the log says of GPUs' faults; some messages are of several lines."""

    def __init__(self) -> None:
        self.lines: list[LogLine] = []
        self._reader = KernelLogReader()

    def take(self, at: float, text: str) -> None:
        told = self._reader.read(text)
        kind = None if told is None else _KINDS.get(told.happening)
        if told is not None and kind is not None:
            check, code = kind
            name = "" if told.address is None else _name(told.address)
            line = LogLine(at, name, check, told.code or code, told.text)
            if not (told.happening is Happening.FALLEN_OFF and self._is_told(line)):
                self.lines.append(line)

    def _is_told(self, line: LogLine) -> bool:
        """Whether the Xid of a GPU that fell off was there just before, as the words for it."""
        return any(
            (each.gpu, each.code) == (line.gpu, line.code) and line.at - each.at < _SAME_SECONDS
            for each in self.lines
        )


def _name(address: PciAddress) -> str:
    domain, bus, device = address
    return f"{domain:04x}:{bus:02x}:{device:02x}"
