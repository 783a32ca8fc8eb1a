"""Moves and offers as messages."""

from stoker.aggregator.moves import Move
from stoker.aggregator.offers import Offer
from stoker.aggregator.wire_allocations import placement_message
from stoker.v1 import placing_pb2


def move_message(move: Move, offer_id: str = "") -> placing_pb2.Move:
    """Return a move as a message; with `offer_id` its holder has been asked."""
    return placing_pb2.Move(
        allocation_id=move.allocation_id,
        from_placements=[placement_message(each) for each in move.from_placements],
        to_placements=[placement_message(each) for each in move.to_placements],
        kind=move.kind,
        reason=move.reason,
        cost_milli=move.cost_milli,
        gain_milli=move.gain_milli,
        offer_id=offer_id,
    )


def offer_message(offer: Offer) -> placing_pb2.MoveOffer:
    """Return an offer as its holder sees it."""
    return placing_pb2.MoveOffer(
        id=offer.id,
        allocation_id=offer.move.allocation_id,
        placements=[placement_message(each) for each in offer.move.to_placements],
        reason=offer.move.reason,
        expires_at=offer.expires_at,
    )
