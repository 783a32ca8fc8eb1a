"""What is due when: a heap over a table of times that may move or go at any moment.

The table is the truth, the heap only an order over it. A time that moves later or goes costs
nothing until its old entry comes up (keep-alives are many, expiries few); an entry is always there
at or before the time that the table says.
"""

import heapq
from collections.abc import Mapping

# The heap is made anew when it is more than twice the table and this much: leases that were given
# back long before their time would otherwise stay in it for their whole TTL.
_SLACK = 1024


class Deadlines:
    """An order by time over `times`; tell it each key that is new or becomes due earlier."""

    def __init__(self, times: Mapping[str, float]) -> None:
        self._times = times
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, key: str) -> None:
        """Take in that the time of `key` is new, or earlier than it was."""
        heapq.heappush(self._heap, (self._times[key], key))
        if len(self._heap) > 2 * len(self._times) + _SLACK:
            self._heap = [(at, key) for key, at in self._times.items()]
            heapq.heapify(self._heap)

    def first(self) -> float | None:
        """Return the earliest time in the table; None when it is empty."""
        while self._heap:
            at, key = self._heap[0]
            now_at = self._times.get(key)
            if now_at == at:
                return at
            if now_at is None:
                heapq.heappop(self._heap)
            else:
                heapq.heapreplace(self._heap, (now_at, key))
        return None

    def due(self, now: float) -> list[str]:
        """Return the keys whose time is `now` or earlier, earliest first; they stay."""
        found: dict[str, float] = {}
        while (at := self.first()) is not None and at <= now:
            found[heapq.heappop(self._heap)[1]] = at
        for key, at in found.items():
            heapq.heappush(self._heap, (at, key))
        return list(found)
