"""When a question to the driver host counts as hung: judged from looks at its note page.

A question is many calls into the driver. It may take long as a whole, because sixteen slow cards
are no hang; what may not take long is one call. So the asking side looks at the page a few times
in each `call_seconds`, and only while no answer has come: a question that is answered at once costs
no look. A call that stands there at so many looks in a row is hung.

Looks are counted, not seconds: when this machine slept or the agent itself was held up, one look
comes late, and no call is blamed for that. For the same reason the page needs no lock. A torn read
(half of one note, half of the next) differs from what the next look sees, because the host is just
writing; it counts as one look at yet another call.
"""

from collections import Counter
from dataclasses import dataclass

# In each `call_seconds`: a hung call is found out within 1.25 of them.
LOOKS_PER_CALL = 4


@dataclass(frozen=True, slots=True)
class Note:
    """A call into the driver, as the page tells it."""

    gpu_index: int | None  # None: about no GPU in particular
    function: str
    number: int = 0  # of the call: the same function for the same GPU may be called again


@dataclass(frozen=True, slots=True)
class Limits:
    """How long one question may take."""

    call_seconds: float  # in one call into the driver
    question_seconds: float  # in all


@dataclass(frozen=True, slots=True)
class Overdue:
    """Why a question is given up."""

    note: Note | None  # the call under way, if there is one
    gpu_index: int | None  # the GPU that is to blame, if it is one
    found: str


class CallWatch:
    """The looks at one question, each `pause_seconds` after the one before."""

    def __init__(self, limits: Limits) -> None:
        """Begin when the question is asked."""
        self._limits = limits
        self.pause_seconds = limits.call_seconds / LOOKS_PER_CALL
        self._looks_max = round(limits.question_seconds / self.pause_seconds)
        self._last: Note | None = None
        self._repeats = 0  # looks since the first at this call
        self._looks: Counter[int | None] = Counter()  # by the GPU that was being asked

    def look(self, note: Note | None) -> Overdue | None:
        """Take what the page says now; return why to give up, if so."""
        if note != self._last:
            self._last, self._repeats = note, 0
        else:
            self._repeats += 1
        self._looks[None if note is None else note.gpu_index] += 1
        if note is not None and self._repeats >= LOOKS_PER_CALL:
            found = f"has not returned within {self._limits.call_seconds:g} s"
            return Overdue(note, note.gpu_index, found)
        if self._looks.total() >= self._looks_max:
            return self._too_slow(note)
        return None

    def _too_slow(self, note: Note | None) -> Overdue:
        """Every call returned in time and there is no end: blame a GPU that took most of it."""
        seconds = self._limits.question_seconds
        index, looks = self._looks.most_common(1)[0]
        if index is None or looks * 2 <= self._looks.total():
            return Overdue(note, None, f"has not answered within {seconds:g} s")
        return Overdue(note, index, f"took most of {seconds:g} s, and there was no end of it")
