"""The operator of a simulated world who has the fleet rebalance, and what clients say to it.

It draws from a source of its own, so that a world without it is what it was. Whether there is one
is drawn as well: a world with everything at once hides what a simpler one shows.
"""

from random import Random
from typing import TYPE_CHECKING

from stoker.testing.calls import Failed, Said, call
from stoker.v1 import placing_pb2

if TYPE_CHECKING:
    from stoker.testing.world import World

OPERATOR = "operator-moves"
# Mean seconds between two rebalances.
PAUSES_SECONDS = (None, 3.0, 10.0)
ANSWER_SECONDS = (1.0, 20.0)
# What an offer comes to, by the holder's mood.
MOVABLE = 0.7
AGREES = 0.7
ASKS_TWICE = 0.3
ARRIVES = 0.8
CARRY_SECONDS = (0.05, 6.0)


class Rebalancer:
    """Has the fleet rebalance every now and then, until the world is calm."""

    def __init__(self, world: "World", rng: Random) -> None:
        self._world = world
        self.rng = rng
        self.pause_seconds = rng.choice(PAUSES_SECONDS)
        self.offered = 0

    def begin(self) -> None:
        """Begin, where there is one at all."""
        if self.pause_seconds is not None:
            pause = self.rng.expovariate(1.0 / self.pause_seconds)
            self._world.scheduler.after(pause, self._rebalance)

    def draws_movable(self) -> bool:
        """Whether the next request is for something that may be moved."""
        return self.pause_seconds is not None and self.rng.random() < MOVABLE

    def _rebalance(self) -> None:
        if self._world.is_calm:
            return
        message = placing_pb2.RebalanceRequest(
            moves_max=self.rng.randint(1, 5),
            apply=True,
            answer_seconds=self.rng.uniform(*ANSWER_SECONDS),
        )
        kind = placing_pb2.RebalanceResponse
        call(self._world.network, OPERATOR, "Rebalance", message, kind, self._planned)
        self.begin()

    def _planned(self, said: Said[placing_pb2.RebalanceResponse] | Failed) -> None:
        if isinstance(said, Said) and said.message.moves:
            self.offered += sum(bool(move.offer_id) for move in said.message.moves)
            self._world.story.tell(OPERATOR, said.message.summary)
