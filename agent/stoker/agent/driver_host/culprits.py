"""What is left alone or waited for on one machine: suspects, lost GPUs, and DCGM.

What a driver host hung in is left alone by the next one; what is lost is seen again only by a fresh
session. This is where all of it is known together, so that one rule can be told from the others:
no session is begun anew for the sake of a lost GPU while another GPU is suspected. Beginning one
touches every GPU, and a host that reads the others is worth more. Trying the suspects ends in a
fresh session, or in no suspect being left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stoker.agent.driver_host.absences import Absences
from stoker.agent.driver_host.absences import Key as AbsentKey
from stoker.agent.driver_host.retrials import Retrials
from stoker.agent.driver_host.suspects import Suspects
from stoker.agent.driver_host.watch import Note
from stoker.agent.readings import (
    WHOLE_GPU,
    GpuFault,
    GpuReading,
    Inventory,
    ReadFailure,
    XidSeen,
)

# Calls of DCGM are announced under names that begin so, and are about no GPU.
_DCGM = "dcgm"


@dataclass(frozen=True, slots=True)
class Trial:
    """What a fresh session with the driver tries."""

    awaited: tuple[AbsentKey, ...]  # lost GPUs whose time has come
    without_dcgm: bool


class Culprits:
    """What was learnt about one machine; it outlives the driver hosts."""

    def __init__(self, *, retrial_seconds_min: float, retrial_seconds_max: float) -> None:
        """Take the time to the first trial of anything, doubled when it is in vain, and its end."""
        least, most = retrial_seconds_min, retrial_seconds_max
        self.suspects = Suspects(retrial_seconds_min=least, retrial_seconds_max=most)
        self.absences = Absences(retrial_seconds_min=least, retrial_seconds_max=most)
        self._dcgm = Retrials[str](seconds_min=least, seconds_max=most)
        self.inventory: Inventory | None = None
        # Of readings that were taken to try a suspect; the driver tells an Xid only once.
        self._xids: dict[str, tuple[XidSeen, ...]] = {}

    @property
    def missing(self) -> tuple[GpuFault, ...]:
        """The GPUs that the last inventory could not read."""
        return self.inventory.missing if self.inventory else ()

    @property
    def awaited_gpus(self) -> tuple[str, ...]:
        """The lost GPUs that are looked for now and then: UUIDs, or "GPU 3"."""
        return tuple(key if isinstance(key, str) else f"GPU {key}" for key in self.absences)

    @property
    def is_dcgm_left_alone(self) -> bool:
        """Whether a host hung in DCGM and it has not been tried since."""
        return _DCGM in self._dcgm

    def name_of(self, note: Note | None) -> str | None:
        """Return which GPU a call is about: a UUID, or "GPU 3"; None: none."""
        if note is None or note.gpu_index is None:
            return None
        return self.suspects.uuid_at(note.gpu_index) or f"GPU {note.gpu_index}"

    def blame(self, call: Note, found: str, now: float) -> None:
        """Leave alone what a host hung or crashed in, if that is one thing."""
        if call.gpu_index is not None:
            self.suspects.exclude(call.gpu_index, f"{call.function} {found}", now)
        elif call.function.startswith(_DCGM):
            self._dcgm.put_off(_DCGM, now)

    def learn(self, inventory: Inventory, now: float) -> None:
        """Take who is there, once `suspects.learn` has told the names."""
        self.inventory = inventory
        self.absences.learn(inventory, now)

    def trial(self, now: float) -> Trial:
        """Return what a session that begins now tries."""
        is_dcgm_tried = not self.is_dcgm_left_alone or bool(self._dcgm.due(now))
        return Trial(self.absences.due(now), without_dcgm=not is_dcgm_tried)

    def conclude(self, trial: Trial, now: float) -> None:
        """Take that the session has begun, and its inventory was learnt."""
        self.absences.renewed(trial.awaited, now)
        if not trial.without_dcgm:
            self._dcgm.settle(_DCGM, now)

    def acquit(self, inventory: Inventory, readings: Sequence[GpuReading], now: float) -> None:
        """Take that suspects were tried and are well; the readings were taken to find that out."""
        self.suspects.acquit(inventory, now)
        self._xids |= {each.uuid: each.xids for each in readings if each.xids}
        self.learn(inventory, now)

    def completed(self, readings: tuple[GpuReading, ...], at: float) -> tuple[GpuReading, ...]:
        """Return the readings, and one without facts of each GPU that is missing and known."""
        if self._xids:
            earlier, self._xids = self._xids, {}
            readings = tuple(
                replace(each, xids=earlier.get(each.uuid, ()) + each.xids) for each in readings
            )
        if not self.missing:
            return readings
        absent = (
            GpuReading(
                fault.uuid,
                at,
                failures=(ReadFailure(WHOLE_GPU, fault.error_kind, fault.message),),
            )
            for fault in self.missing
            if fault.uuid is not None
        )
        return (*readings, *absent)

    def is_renewal_due(self, now: float) -> bool:
        """Whether a fresh session shall look for what was lost."""
        return not tuple(self.suspects) and bool(self.absences.due(now) or self._dcgm.due(now))

    def seconds_until_trial(self, now: float) -> float | None:
        """Return when suspects are due, or a renewal; None: nothing is to be tried."""
        if tuple(self.suspects):
            return self.suspects.seconds_until_due(now)
        times = (self.absences.seconds_until_due(now), self._dcgm.seconds_until_due(now))
        return min((each for each in times if each is not None), default=None)
