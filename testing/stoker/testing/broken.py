"""How a simulated world says that a promise does not hold."""

from collections.abc import Callable


class Broken(AssertionError):
    """An invariant does not hold: its name, its promise, and what was found."""

    def __init__(self, invariant: Callable[..., None], **found: object) -> None:
        self.invariant = invariant.__name__
        promise = (invariant.__doc__ or "").strip()
        values = "".join(f"\n    {name} = {value}" for name, value in found.items())
        super().__init__(f"{self.invariant}: {promise}{values}")
