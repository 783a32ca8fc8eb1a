"""Moving a lease from one allocation to another, when the fleet asks and the holder agrees.

Theory of operation. An offer comes with the answer to a keep-alive. The holder's callback is asked
first: called with the offer and None, it says whether it will move. If so the new place is granted
as an allocation of its own, and the callback is called again with it: it carries the work over,
for as long as that takes, and says whether that went well. Until then both allocations are kept
alive. Then the lease is the new allocation's and the old one is given back; or, when the callback
said no or failed, the new one is given back and the lease stays what it was. Whatever dies in
between, each of the two is a lease like any other, and ends when nobody keeps it alive.

`Moving` is what both clients know of that; they call it from their keep-alives and their moves.
"""

import threading
from collections.abc import Callable

from stoker.client.errors import AllocationEnded
from stoker.client.lease import Lease
from stoker.client.model import Allocation, MoveOffer

# First with None: whether to move. Then with the new allocation: whether the work is there now.
MoveCallback = Callable[[MoveOffer, Allocation | None], bool]

# The reasons that are given for giving back.
MOVED = "moved to {}"
STAYED = "its holder stayed where it was"


class Moving:
    """Where a lease stands on its way; safe to use from any thread."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._lock = threading.Lock()
        self._is_busy = False
        self._is_closed = False
        self._answered = ""  # the offer that was answered last
        self._new: Allocation | None = None  # while the holder carries its work over
        self._lost: dict[str, AllocationEnded] = {}  # of the two, what ended underneath meanwhile

    def begin(self, offer: MoveOffer) -> bool:
        """Whether the holder is to be asked about this offer now; `end` comes after it."""
        with self._lock:
            is_new = offer.id != self._answered and offer.allocation_id == self._lease.id
            if self._is_busy or self._is_closed or not is_new or self._lease.ended is not None:
                return False
            self._is_busy = True
            return True

    def to_keep(self) -> tuple[str, ...]:
        """Return the ids of what must be kept alive now."""
        with self._lock:
            ids = [self._lease.id] if self._new is None else [self._lease.id, self._new.id]
            return tuple(id_ for id_ in ids if id_ not in self._lost)

    def answered(self, offer: MoveOffer) -> None:
        """Note that the aggregator has the answer."""
        with self._lock:
            self._answered = offer.id

    def granted(self, new: Allocation) -> bool:
        """Note the new place, to be kept alive from now on; False: the lease is over by now."""
        with self._lock:
            if self._lease.ended is not None:
                return False
            self._new = new
            return True

    def ended(self, id_: str, error: AllocationEnded) -> None:
        """Note that an allocation has ended underneath: the lease's, unless it is on its way."""
        with self._lock:
            if self._new is not None and id_ in (self._lease.id, self._new.id):
                self._lost[id_] = error  # what that means is clear once the move is over
                return
            is_ours = id_ == self._lease.id
        if is_ours:
            self._lease.end(error)

    def finish(self, *, is_moved: bool) -> tuple[str, str] | None:
        """The holder is done: return what to give back and why; None: that has ended already.

        With `is_moved` the lease is the new allocation's from here on.
        """
        with self._lock:
            new = self._new
            assert new is not None, "nothing was granted to move to"
            self._new = None
            lost, self._lost = self._lost, {}
            if is_moved:
                left, reason = self._lease.move_to(new).id, MOVED.format(new.id)
            else:
                left, reason = new.id, STAYED
        if self._lease.id in lost:
            self._lease.end(lost[self._lease.id])
        return None if left in lost else (left, reason)

    def end(self) -> None:
        """The move is over, or came to nothing: the next offer may be asked about."""
        with self._lock:
            self._is_busy = False

    def close(self) -> None:
        """No further offer is asked about."""
        with self._lock:
            self._is_closed = True
