"""How much of something there was in the last so many seconds, at the same cost however long."""

from collections import deque

# A window is kept in so many parts; what it forgets is exact to one of them.
PARTS = 10


class Window:
    """A sum over the last seconds. Times are seconds on a clock that never goes back."""

    __slots__ = ("_parts", "_seconds", "total")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._parts: deque[list[float]] = deque()  # since when, how much; oldest first
        self.total = 0.0

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, now: float, amount: float) -> None:
        """Add what there was just now."""
        if self._parts and now - self._parts[-1][0] < self._seconds / PARTS:
            self._parts[-1][1] += amount
        else:
            self._parts.append([now, amount])
        self.total += amount

    def fade(self, now: float) -> float:
        """Forget what is older than the window; return what is left."""
        parts = self._parts
        while parts and parts[0][0] <= now - self._seconds:
            self.total -= parts.popleft()[1]
        if not parts:
            self.total = 0.0  # exactly, whatever the sums have lost
        return self.total
