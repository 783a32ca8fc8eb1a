"""The calls of rebalancing as values, and how their answers are read."""

from stoker.client import errors
from stoker.client.model import Allocation, Move, MovePlan
from stoker.client.retrying import Method
from stoker.client.wire import Call
from stoker.client.wire_answers import allocation, placement
from stoker.client.wire_requests import sendable
from stoker.v1 import placing_pb2


def rebalance(
    moves_max: int, pool: str | None, answer_seconds: float | None, *, apply: bool
) -> Call[MovePlan]:
    if moves_max < 1:
        raise errors.InvalidRequest(f"moves: wanted at least 1, found {moves_max}")
    try:
        message = placing_pb2.RebalanceRequest(
            moves_max=moves_max,
            apply=apply,
            pool=sendable(pool or "", "pool"),
            answer_seconds=answer_seconds,
        )
    except ValueError as error:  # a number that its field cannot carry
        raise errors.InvalidRequest(f"moves: {error}") from error
    return Call(Method.REBALANCE, message, _plan)


def answer_move(offer_id: str, *, accept: bool) -> Call[Allocation | None]:
    message = placing_pb2.AnswerMoveRequest(offer_id=sendable(offer_id, "offer_id"), accept=accept)
    return Call(Method.ANSWER_MOVE, message, _moved, about=offer_id)


def _moved(answer: placing_pb2.AnswerMoveResponse) -> Allocation | None:
    return allocation(answer.allocation) if answer.HasField("allocation") else None


def _plan(answer: placing_pb2.RebalanceResponse) -> MovePlan:
    return MovePlan(tuple(_move(each) for each in answer.moves), answer.summary)


def _move(message: placing_pb2.Move) -> Move:
    return Move(
        allocation_id=message.allocation_id,
        from_placements=tuple(placement(each) for each in message.from_placements),
        to_placements=tuple(placement(each) for each in message.to_placements),
        kind=message.kind,
        reason=message.reason,
        cost_milli=message.cost_milli,
        gain_milli=message.gain_milli,
        offer_id=message.offer_id,
    )
