"""The clients' door to rebalancing: plans of moves, offers to holders, and their answers.

Nothing moves without its holder: a plan that is applied is but offered, each move in the answers to
the keep-alives of its allocation. What a holder accepts becomes a wish like any other, which grants
a new allocation; the old one stays until its holder releases it, or dies.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from stoker.aggregator import limits
from stoker.aggregator.answers import allocation_row
from stoker.aggregator.board import standing
from stoker.aggregator.failures import CallFailure, Context, cannot_place, not_found
from stoker.aggregator.ledger import Ledger
from stoker.aggregator.model import AllocationState, Refusals
from stoker.aggregator.moves import (
    ANSWER_SECONDS_DEFAULT,
    ANSWER_SECONDS_MAX,
    MOVES_DEFAULT,
    MOVES_MAX,
    MovePlan,
    MovePolicy,
    RebalanceOptions,
)
from stoker.aggregator.offers import KEY_PREFIX, Offers, OfferState
from stoker.aggregator.rebalancing import plan_moves
from stoker.aggregator.wire_moves import move_message, offer_message
from stoker.aggregator.wishes import MoveOver, Refused, Reply, Settled, Unknown, Wish
from stoker.core.clock import Clock
from stoker.v1 import placing_pb2

# Runs a function that only reads what it was given, where it does not hold up the loop.
Aside = Callable[[Callable[[], MovePlan]], Awaitable[MovePlan]]

_log = logging.getLogger(__name__)


async def in_a_thread(work: Callable[[], MovePlan]) -> MovePlan:
    """Run the work in a thread: a plan for a large fleet takes a second or more."""
    return await asyncio.to_thread(work)


class RebalanceService:
    """A part of the service `stoker.v1.Fleet`; raises CallFailure, Malformed or nothing."""

    def __init__(
        self,
        ledger: Ledger,
        wish: Callable[[Wish], Awaitable[Reply]],
        clock: Clock,
        options: RebalanceOptions | None = None,
        policy: MovePolicy | None = None,
    ) -> None:
        """`wish` returns the reply once it is durable; raises CallFailure."""
        self._fleet = ledger.fleet
        self._wish = wish
        self._clock = clock
        self._options = options or RebalanceOptions()
        self._policy = policy or MovePolicy()
        self.aside: Aside = in_a_thread
        self.new_id: Callable[[], str] = partial(secrets.token_hex, 8)
        self._offers = Offers()
        self._planning = asyncio.Lock()  # one plan at a time: the next one sees what it offered

    def methods(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """Return the methods by their names on the wire."""
        return {"Rebalance": self.rebalance, "AnswerMove": self.answer_move}

    def offer_to(self, allocation_id: str) -> placing_pb2.MoveOffer | None:
        """Return what the holder of the allocation is asked now, for its next keep-alive."""
        offer = self._offers.open_for(allocation_id, self._clock.now())
        known = self._fleet.allocations.get(allocation_id)
        if offer is None or known is None or known.state is not AllocationState.GRANTED:
            return None
        return offer_message(offer)

    async def run(self) -> None:
        """Rebalance as often as was asked for, until cancelled."""
        options = self._options
        while options.every_seconds > 0:
            await self._clock.sleep(options.every_seconds)
            plan, ids = await self._plan(options.moves_max, None, options.answer_seconds)
            if plan.moves:
                _log.info("%s; %d holders are asked", plan.summary, sum(map(bool, ids)))

    async def rebalance(
        self, message: placing_pb2.RebalanceRequest, context: Context
    ) -> placing_pb2.RebalanceResponse:
        """Return the moves that are worth their cost; with `apply` ask their holders."""
        moves_max = int(limits.number(message.moves_max, "moves_max", 0, MOVES_MAX))
        pool = limits.text(message.pool, "pool") or None
        answer_seconds = ANSWER_SECONDS_DEFAULT
        if message.HasField("answer_seconds"):
            answer_seconds = limits.number(
                message.answer_seconds, "answer_seconds", 1.0, ANSWER_SECONDS_MAX
            )
        plan, ids = await self._plan(
            moves_max or MOVES_DEFAULT, pool, answer_seconds if message.apply else None
        )
        moves = [move_message(*each) for each in zip(plan.moves, ids, strict=True)]
        return placing_pb2.RebalanceResponse(moves=moves, summary=plan.summary)

    async def answer_move(
        self, message: placing_pb2.AnswerMoveRequest, context: Context
    ) -> placing_pb2.AnswerMoveResponse:
        """Take the holder's answer; grant the new place when it accepts."""
        id_ = limits.text(message.offer_id, "offer_id", limits.ID_BYTES_MAX, required=True)
        now = self._clock.now()
        offer = self._offers.get(id_, now)
        if offer is None:
            # Of an offer before a restart the ledger knows what was granted for it.
            granted = self._fleet.keys.get(KEY_PREFIX + id_)
            if granted is None or not message.accept:
                raise not_found(f"offer {id_}", "it has expired, or was made before a restart")
            return self._granted(granted)
        if not message.accept:
            if offer.state is OfferState.ACCEPTED:
                raise _too_late(f"offer {id_} was accepted before")
            self._offers.answer(id_, OfferState.DECLINED, now)
            return placing_pb2.AnswerMoveResponse()
        if offer.state is OfferState.DECLINED:
            raise _too_late(f"offer {id_} was declined before")
        reply = await self._wish(MoveOver(offer.move, offer.kinds, offer.key))
        match reply:
            case Settled(new_id):
                now = self._clock.now()
                if self._offers.get(id_, now) is not None:
                    self._offers.answer(id_, OfferState.ACCEPTED, now, moved_to=new_id)
                return self._granted(new_id)
            case Refused(refusals):
                self._offers.withdraw(id_)
                raise cannot_place(refusals)
            case Unknown(what):
                self._offers.withdraw(id_)
                raise not_found(what)
            case _:
                raise AssertionError(f"a move was answered with {reply}")

    async def _plan(
        self, moves_max: int, pool: str | None, answer_seconds: float | None
    ) -> tuple[MovePlan, Sequence[str]]:
        """Return a plan and, for each move, the offer that was made; empty: none."""
        async with self._planning:
            now = self._clock.now()
            view, skip = standing(self._fleet.view(now)), self._offers.not_to_ask(now)
            plan = await self.aside(lambda: plan_moves(view, moves_max, self._policy, pool, skip))
            if answer_seconds is None:
                return plan, [""] * len(plan.moves)
            now, ids = self._clock.now(), list[str]()
            for move in plan.moves:
                known = self._fleet.allocations.get(move.allocation_id)
                is_there = known is not None and known.state is AllocationState.GRANTED
                new_id = self.new_id()
                offer = (
                    self._offers.offer(new_id, move, plan.kinds, now, answer_seconds)
                    if is_there
                    else None
                )
                ids.append("" if offer is None else offer.id)
            return plan, ids

    def _granted(self, id_: str) -> placing_pb2.AnswerMoveResponse:
        allocation = self._fleet.allocations[id_]
        return placing_pb2.AnswerMoveResponse(
            allocation=allocation_row(self._fleet, allocation).message()
        )


def _too_late(sentence: str) -> CallFailure:
    return cannot_place(Refusals(sentence, ()))
