"""Which nodes look different since a reader looked last, so that nobody has to compare them all."""

# A reader that falls further behind looks at every node once.
NAMES_MAX = 100_000


class ChangeLog:
    """Names of nodes in the order in which they changed; `parent` is that of the fleet below."""

    def __init__(self, parent: "ChangeLog | None" = None) -> None:
        self.parent = parent
        # As of when the nodes were looked at last, Unix seconds: one may have been stale then whose
        # frame had arrived before, and was taken in after that.
        self.looked_at = float("-inf")
        self._names: list[str] = []
        self._dropped = 0

    @property
    def end(self) -> int:
        """Where a reader that has seen everything stands."""
        return self._dropped + len(self._names)

    def add(self, name: str) -> None:
        """Note that the node looks different, is new, or has become fresh again."""
        if len(self._names) >= NAMES_MAX:
            half = NAMES_MAX // 2
            del self._names[:half]
            self._dropped += half
        self._names.append(name)

    def since(self, position: int) -> dict[str, None] | None:
        """Return the nodes that changed since `position`, in order; None: any may have."""
        if position < self._dropped:
            return None
        return dict.fromkeys(self._names[position - self._dropped :])
