"""What a holder is told whose GPU is to be partitioned anew: leave, by when, and what then."""

from collections.abc import Callable
from dataclasses import dataclass

# The moment is told again with every keep-alive; less apart than this it is the same one.
SAME_MOMENT_SECONDS = 1.0

# Why, by when (Unix seconds), and whether the allocation is ended then.
LeaveCallback = Callable[[str, float, bool], None]


@dataclass(frozen=True, slots=True)
class LeaveRequest:
    """The fleet asks a holder to give its allocation back."""

    reason: str  # a sentence for a person
    leave_by: float  # Unix seconds, on the aggregator's clock
    is_evicting: bool  # whether the allocation is ended then; else whoever asks gives up

    def is_news_after(self, told: "LeaveRequest | None") -> bool:
        """Whether the holder does not know it yet, having been told `told` last."""
        return (
            told is None
            or (self.reason, self.is_evicting) != (told.reason, told.is_evicting)
            or abs(self.leave_by - told.leave_by) >= SAME_MOMENT_SECONDS
        )
