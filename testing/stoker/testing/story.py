"""What happened in a simulated world: the last lines to read, and one hash over all of it."""

import hashlib
from collections import deque
from collections.abc import Callable

# Lines kept for the message of a failure, which shows the last LINES_SHOWN of them.
LINES_KEPT = 400
LINES_SHOWN = 40


class Story:
    """Takes in one line per happening; the same seed must give the same lines, so the same hash."""

    def __init__(self, now: Callable[[], float], listener: Callable[[str], None] | None) -> None:
        self._now = now
        self._listener = listener
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._hash = hashlib.blake2b(digest_size=16)
        self.lines_told = 0

    def tell(self, who: str, what: str) -> None:
        """Add a line: at which virtual second, who, what."""
        line = f"{self._now():11.6f}  {who:<11} {what}"
        self.lines_told += 1
        self._hash.update(line.encode())
        self._lines.append(line)
        if self._listener is not None:
            self._listener(line)

    def digest(self) -> str:
        """Return the hash over every line so far."""
        return self._hash.hexdigest()

    def tail(self, lines: int = LINES_SHOWN) -> str:
        """Return the last lines."""
        return "\n".join(list(self._lines)[-lines:])
