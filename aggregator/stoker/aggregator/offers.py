"""Moves that were offered to the holders of allocations, until these have answered.

Volatile: after a restart of the aggregator no offer is known, and nothing else has happened. An
offer is OFFERED until its holder accepts or declines, or until it expires; at most one is open for
an allocation. What was declined, or was just moved, is left alone for a while. Answered offers are
remembered that long as well, for an answer that is sent again because its reply was lost.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from stoker.aggregator.moves import Move
from stoker.aggregator.usable import Kind

# A holder that declined is not asked again for so long; what moved stays for so long.
LEFT_ALONE_SECONDS = 600.0
# More open offers than a person plans at one time; moves beyond are not offered.
OFFERS_MAX = 1_000

# The idempotency key of what is granted for an offer: accepted twice, it is granted once, also
# across a restart.
KEY_PREFIX = "move/"


class OfferState(StrEnum):
    """What became of an offer."""

    OFFERED = "offered"
    ACCEPTED = "accepted"
    DECLINED = "declined"


@dataclass(frozen=True, slots=True)
class Offer:
    """A move that a holder is asked to make."""

    id: str
    move: Move
    kinds: tuple[Kind, ...]  # of request, by which its gain was measured
    expires_at: float
    state: OfferState = OfferState.OFFERED

    @property
    def key(self) -> str:
        """The idempotency key of what is granted for it."""
        return KEY_PREFIX + self.id


class Offers:
    """The table of offers; times are Unix seconds."""

    def __init__(self) -> None:
        self._offers: dict[str, Offer] = {}
        self._open: dict[str, str] = {}  # allocation -> its open offer
        self._left_alone: dict[str, float] = {}  # allocation -> until when

    def offer(
        self, id_: str, move: Move, kinds: tuple[Kind, ...], now: float, answer_seconds: float
    ) -> Offer | None:
        """Offer the move under a new id; None: the allocation is not to be asked now."""
        if move.allocation_id in self.not_to_ask(now) or len(self._open) >= OFFERS_MAX:
            return None
        made = Offer(id_, move, kinds, now + answer_seconds)
        self._offers[id_] = made
        self._open[move.allocation_id] = id_
        return made

    def open_for(self, allocation_id: str, now: float) -> Offer | None:
        """Return the offer that the allocation's holder is to answer; None: there is none."""
        id_ = self._open.get(allocation_id)
        offer = self._offers[id_] if id_ is not None else None
        return offer if offer is not None and now < offer.expires_at else None

    def get(self, id_: str, now: float) -> Offer | None:
        """Return the offer, answered or not; None: it is not known, or has expired."""
        offer = self._offers.get(id_)
        if offer is None or (offer.state is OfferState.OFFERED and now >= offer.expires_at):
            return None
        return offer

    def answer(self, id_: str, state: OfferState, now: float, moved_to: str = "") -> None:
        """Note an answer; `moved_to` is the allocation that took the place of the old one."""
        offer = self._offers[id_]
        assert state is not OfferState.OFFERED, f"no answer to {offer}"
        until = now + LEFT_ALONE_SECONDS
        self._offers[id_] = replace(offer, state=state, expires_at=until)
        self._open.pop(offer.move.allocation_id, None)
        self._left_alone[offer.move.allocation_id] = until
        if moved_to:
            self._left_alone[moved_to] = until

    def withdraw(self, id_: str) -> None:
        """Forget an open offer of which nothing can come any more."""
        offer = self._offers.pop(id_, None)
        if offer is not None and self._open.get(offer.move.allocation_id) == id_:
            del self._open[offer.move.allocation_id]

    def not_to_ask(self, now: float) -> frozenset[str]:
        """Return the allocations that have an open offer, or are left alone."""
        self._tidy(now)
        return frozenset((*self._open, *self._left_alone))

    def _tidy(self, now: float) -> None:
        for offer in [each for each in self._offers.values() if each.expires_at <= now]:
            self.withdraw(offer.id)
        for id_ in [each for each, until in self._left_alone.items() if until <= now]:
            del self._left_alone[id_]
