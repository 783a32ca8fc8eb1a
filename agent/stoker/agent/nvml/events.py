"""Events of one GPU: errors (Xids), and that its partitions changed.

Each GPU has an event set of its own, so that a call that hangs or fails names its GPU. The driver
keeps what happened since the set was made; nothing waits for events, they are collected with every
reading.
"""

from collections import deque
from typing import Final

from stoker.agent.driver import (
    DriverError,
    DriverUnavailable,
    GpuUnavailable,
)
from stoker.agent.nvml.facts import Told
from stoker.agent.nvml.session import Device, Session
from stoker.agent.nvml.table import NOT_A_GPU_INSTANCE, Code, EventData, EventSet, EventType
from stoker.agent.readings import XidSeen

WANTED: Final = EventType.XID_CRITICAL_ERROR | EventType.MIG_CONFIG_CHANGE
# More in one reading are left for the next one.
EVENTS_MAX: Final = 32
# What a failure to collect them is called.
XIDS: Final = "xids"

_WAIT: Final = "nvmlEventSetWait"


class Events:
    """The event set of one GPU. A driver without events has none, and then nothing happens."""

    def __init__(
        self, session: Session, gpu: Device, xids: deque[XidSeen], *, mig_enabled: bool
    ) -> None:
        """Begin to collect Xids into `xids`; raises DriverUnavailable and GpuUnavailable."""
        self._session, self._gpu, self._mig_enabled = session, gpu, mig_enabled
        self._set: EventSet | None = None
        self.tells_mig_changes = False
        self._xids = xids
        try:
            supported: int = session.ask(gpu, "nvmlDeviceGetSupportedEventTypes", gpu.handle)
            if not supported & WANTED:
                return
            self._wait = session.find(_WAIT)
            self._set = session.ask(gpu, "nvmlEventSetCreate")
            wanted = int(supported & WANTED)
            session.ask(gpu, "nvmlDeviceRegisterEvents", gpu.handle, wanted, self._set)
        except (DriverUnavailable, GpuUnavailable):
            self.close()
            raise
        except DriverError:  # a card, a driver or a user without events
            self.close()
        else:
            self.tells_mig_changes = bool(supported & EventType.MIG_CONFIG_CHANGE)

    def collect(self, told: Told, now: float) -> bool:
        """Take in what happened; return whether partitions changed.

        Raises DriverUnavailable and GpuUnavailable.
        """
        if self._set is None:
            return False
        changed = False
        for _ in range(EVENTS_MAX):
            try:
                event: EventData | None = self._session.call_unless(
                    Code.TIMEOUT, self._gpu, _WAIT, self._wait, self._set, 0
                )
            except (DriverUnavailable, GpuUnavailable):
                raise
            except DriverError as error:
                told.fail(XIDS, error)
                break
            if event is None:
                break
            if event.eventType & EventType.MIG_CONFIG_CHANGE:
                changed = True
            if event.eventType & EventType.XID_CRITICAL_ERROR:
                self._xids.append(XidSeen(now, int(event.eventData), self._instance(event)))
        return changed

    def _instance(self, event: EventData) -> int | None:
        # Outside MIG mode older drivers leave the number as they found it.
        if not self._mig_enabled or event.gpuInstanceId == NOT_A_GPU_INSTANCE:
            return None
        return int(event.gpuInstanceId)

    def close(self) -> None:
        """Stop collecting."""
        if self._set is None:
            return
        freed, self._set = self._set, None
        try:
            self._session.ask(self._gpu, "nvmlEventSetFree", freed)
        except DriverError:
            return  # the session is gone, and the set with it
