"""A driver whose readings DCGM completes: hardware counters of GPUs whose NVML does not tell them.

Every call into DCGM is made by one thread of its own, and a reading waits for it only a moment:
the first calls take seconds on real machines (the profiling module is loaded and looks at every
GPU), and a hostengine that hangs must cost DCGM's facts only. Such a thread needs nobody's help to
come back: DCGM's client speaks over a socket, and gives up after a minute. What it cannot do is
hang in the kernel, as a call of NVML can.

While the reading waits, the note page says "dcgm": should the library stop the whole process (as
loading it from a file system that is gone would), the agent knows whose fault that is.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stoker.agent.dcgm.bindings import load_bindings
from stoker.agent.dcgm.merge import DCGM, Question, Sources, Told
from stoker.agent.dcgm.source import DcgmSource
from stoker.agent.driver import Driver, DriverTimeout, Suspect
from stoker.agent.facts import Rate
from stoker.agent.readings import GpuReading, Inventory, ProcessesReading, ReadFailure

# How long a reading waits for DCGM, whose answers take a few milliseconds. Less than the least
# that an agent can be told to allow a call.
PATIENCE_SECONDS = 0.08
# How long closing waits, so that a paused profiling is resumed; whoever wants the devices released
# waits less than half a second for the whole driver host to end.
CLOSE_SECONDS = 0.2

_NO_GPU = -1


def with_dcgm(
    inner: Driver,
    address: str,
    bindings: Path,
    interval_seconds: float,
    announce: Callable[[int, str], None],
) -> "WithDcgm":
    """Return the driver, completed by the nv-hostengine at HOST:PORT or at a socket's path."""
    source = DcgmSource(address, interval_seconds, lambda: load_bindings(bindings), log=_to_stderr)
    return WithDcgm(inner, source, announce=announce)


class WithDcgm:
    """Another driver, and DCGM for what it does not tell; see `stoker.agent.driver.Driver`."""

    def __init__(
        self,
        inner: Driver,
        source: DcgmSource,
        *,
        announce: Callable[[int, str], None] = lambda index, function: None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Take whose readings to complete, and from what; nothing is asked or connected yet."""
        self._inner = inner
        self._announce = announce
        self._patience = patience_seconds
        self._asker = _Asker(source)
        self._sources = Sources()
        self._was_asked = False

    def open(self) -> None:
        """Begin the session with the other driver; DCGM is connected to when it is needed."""
        self._inner.open()

    def close(self) -> None:
        """End both sessions: the other driver's first, which holds devices open."""
        try:
            self._inner.close()
        finally:
            if self._was_asked:
                self._was_asked = False
                self._announce(_NO_GPU, DCGM)
                self._asker.close(CLOSE_SECONDS)

    def inventory(self, suspects: Sequence[Suspect] = ()) -> Inventory:
        """Find the GPUs anew; which of them need DCGM is learnt from what they are."""
        inventory = self._inner.inventory(suspects)
        self._sources.learn(inventory)
        return inventory

    def sample(
        self, rates: Sequence[Rate] = (Rate.FAST,), *, profiling: bool = True
    ) -> tuple[GpuReading, ...]:
        """Read every GPU, and ask DCGM for the profiling facts that were not told."""
        readings = self._inner.sample(rates, profiling=profiling)
        if Rate.FAST not in rates:
            return readings
        question = self._sources.question(readings, profiling=profiling)
        if not question.gpus and not self._was_asked:
            return readings
        self._was_asked = True
        self._announce(_NO_GPU, DCGM)
        told = self._asker.ask(question, self._patience)
        return tuple(self._sources.merged(reading, told) for reading in readings)

    def processes(self) -> ProcessesReading:
        """List who uses every GPU; DCGM has no part in it."""
        return self._inner.processes()


@dataclass(slots=True)
class _Errand:
    """A question on its way, or (None) the wish to close."""

    question: Question | None
    since: float
    done: threading.Event = field(default_factory=threading.Event)
    told: Told = field(default_factory=Told)


class _Asker:
    """The thread that talks to DCGM. An answer that comes too late is not used."""

    def __init__(self, source: DcgmSource) -> None:
        self._source = source
        self._errands: queue.SimpleQueue[_Errand] = queue.SimpleQueue()
        self._last: _Errand | None = None

    def ask(self, question: Question, seconds: float) -> Told:
        """Return what DCGM tells, or that it has not answered in time."""
        if self._last is None:
            # A daemon: at the end nobody waits for it.
            threading.Thread(target=self._run, name="dcgm", daemon=True).start()
        if self._last is not None and not self._last.done.is_set():
            return self._late(question, self._last)
        self._last = self._send(question)
        if not self._last.done.wait(seconds):
            return self._late(question, self._last)
        return self._last.told

    def close(self, seconds: float) -> None:
        """Have DCGM left in order, if that is done in time."""
        self._send(None).done.wait(seconds)

    def _send(self, question: Question | None) -> _Errand:
        errand = _Errand(question, time.monotonic())
        self._errands.put(errand)
        return errand

    def _late(self, question: Question, errand: _Errand) -> Told:
        error = DriverTimeout(
            f"has not returned for {time.monotonic() - errand.since:.1f} s",
            function=self._source.call,
        )
        return Told(
            failures={
                uuid: ReadFailure(DCGM, error.kind, f"{uuid}: {error}") for uuid in question.gpus
            }
        )

    def _run(self) -> None:
        while True:
            errand = self._errands.get()
            if errand.question is None:
                self._source.close()
                errand.done.set()
                return
            errand.told = self._source.ask(errand.question)
            errand.done.set()


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"driver host {os.getpid()}: dcgm: {text}\n")
    sys.stderr.flush()
