"""Which Xids are told twice: the driver's event and the kernel's log tell of the same one.

Over a burst the same Xid of the same GPU has come as often as the source that told the most of it.
"""

from dataclasses import dataclass, field
from enum import StrEnum

# What two sources tell further apart are two Xids.
APART_SECONDS_MAX = 60.0
# Different Xids that are being compared; those that ended first are given up, which counts twice.
BURSTS_MAX = 1024


class Teller(StrEnum):
    """Who tells of an Xid."""

    EVENT = "event"  # NVML
    LOG = "log"  # the kernel's log, by its number
    WORDS = "words"  # the kernel's log, in words


@dataclass(slots=True)
class _Burst:
    at: float
    told: dict[Teller, int] = field(default_factory=dict[Teller, int])


class Echoes:
    """The Xids of the last minute, by who told of them. Times are Unix seconds."""

    def __init__(self) -> None:
        self._bursts: dict[tuple[str, int], _Burst] = {}

    def __len__(self) -> int:
        return len(self._bursts)

    def is_echo(self, uuid: str, number: int, teller: Teller, at: float) -> bool:
        """Take in that an Xid is told; return whether another teller has told of it before."""
        key = (uuid, number)
        burst = self._bursts.pop(key, None)
        if burst is None or abs(at - burst.at) > APART_SECONDS_MAX:
            burst = _Burst(at)
        burst.at = max(at, burst.at)
        self._bursts[key] = burst  # at the end: the first one is that which ended first
        if len(self._bursts) > BURSTS_MAX:
            del self._bursts[next(iter(self._bursts))]
        most = max(burst.told.values(), default=0)
        burst.told[teller] = burst.told.get(teller, 0) + 1
        return burst.told[teller] <= most
