"""Who changes partitions in a simulated world, and what goes wrong with it: operators who apply
configurations and take them back, with drain and with evict, on busy and on idle GPUs, through the
aggregator or on the host; helpers that fail, or are not there.

It draws from a source of its own, so that worlds without it are what they were.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from stoker.agent.mig.declared import Declaration
from stoker.core.errors import StokerError
from stoker.core.mig.boards import A100_40GB, H100_80GB, Board
from stoker.core.mig.geometry import Wanted
from stoker.core.mig.reports import MigAsk, MigEntry, MigReport
from stoker.testing.calls import Failed, Said, call
from stoker.testing.disk import Disk
from stoker.testing.machine import GIB
from stoker.testing.mig_agent import MigNode
from stoker.testing.mig_cards import MigCards
from stoker.testing.mig_helper import MigHelper, Trouble
from stoker.testing.mig_witness import MigWitness
from stoker.v1 import mig_pb2, types_pb2

if TYPE_CHECKING:
    from stoker.testing.agent_process import AgentProcess
    from stoker.testing.world import World

# What an operator may want of a board; empty: MIG mode off.
CONFIGS: Mapping[str, tuple[Mapping[str, int], ...]] = {
    A100_40GB.name: (
        {},
        {"1g.5gb": 7},
        {"1g.5gb": 2, "2g.10gb": 1, "3g.20gb": 1},
        {"3g.20gb": 2},
        {"2g.10gb": 3, "1g.5gb": 1},
        {"7g.40gb": 1},
    ),
    H100_80GB.name: (
        {},
        {"1g.10gb": 7},
        {"1g.10gb": 2, "2g.20gb": 1, "3g.40gb": 1},
        {"3g.40gb": 2},
        {"2g.20gb": 3, "1g.10gb": 1},
        {"7g.80gb": 1},
    ),
}
SHARE_OF_NODES = 0.7
SHARE_BY_HAND = 0.6  # of GPUs that are partitioned when the world begins
SHARE_DECLARED = 0.4  # of nodes whose configuration says how
SHARE_OF_REQUESTS = 0.45  # that are for MIG devices

ASK_SECONDS = 3.0  # mean, between two wishes of operators, in the whole world
ASK_PATIENCE_SECONDS = (2.0, 8.0)
ATTEMPTS_MAX = 5
DRAIN_SECONDS = (0.0, 0.0, 2.0, 8.0)
# Mean seconds between two troubles of a kind, in the whole world.
TROUBLE_SECONDS = {Trouble.REFUSED: 12.0, Trouble.UNTOLD: 12.0}
AWAY_SECONDS = 40.0


@dataclass(slots=True)
class _Wish:
    """What an operator asks, always with the same id."""

    ask: MigAsk
    node: str
    attempts: int = 0
    is_answered: bool = False


@dataclass(slots=True)
class MigTown:
    """The part of a world in which GPUs are partitioned."""

    world: "World"
    rng: Random
    witness: MigWitness
    nodes: dict[str, MigNode] = field(default_factory=dict[str, MigNode])
    wishes: int = 0

    @staticmethod
    def boards(machines: int, rng: Random) -> list[Board | None]:
        """Return which machines can be partitioned: at least one."""
        sure = rng.randrange(machines)
        return [
            rng.choice((A100_40GB, H100_80GB))
            if number == sure or rng.random() < SHARE_OF_NODES
            else None
            for number in range(machines)
        ]

    def settle(self, agent: "AgentProcess", board: Board) -> None:
        """Let the GPUs of a node be partitioned."""
        machine, world, rng = agent.machine, self.world, self.rng
        cards = MigCards(board, machine.gpus)
        machine.cards.partitions = cards
        for gpu in machine.gpus:
            if rng.random() < SHARE_BY_HAND:
                cards.partition(gpu.uuid, rng.choice(CONFIGS[board.name]))
        declaration = Declaration("")
        if rng.random() < SHARE_DECLARED:
            declaration = Declaration("declared", entries=_entries(rng.choice(CONFIGS[board.name])))
        helper = MigHelper(machine, cards, world.scheduler, rng, self.witness)
        book: Disk[bytes] = Disk(world.scheduler, rng, beside=agent.disk)
        node = MigNode(agent, cards, declaration, helper, book, self.witness)
        self.witness.meet(machine.name, node)
        self.nodes[machine.name] = node
        agent.mig_node = node

    def draw_request(self, request: types_pb2.Request) -> None:
        """Have some requests be for MIG devices."""
        if self.rng.random() > SHARE_OF_REQUESTS:
            return
        board = self.rng.choice([node.cards.board for node in self.nodes.values()])
        config = self.rng.choice([each for each in CONFIGS[board.name] if each])
        request.mig_profile = self.rng.choice([*config, "any"])
        request.gpus, request.nodes = self.rng.choice((1, 1, 1, 2)), 0
        request.ClearField("memory_bytes")
        if request.mig_profile == "any":
            request.memory_bytes = self.rng.randint(1, 12) * GIB

    # --- trouble

    def begin(self) -> None:
        """Let operators and troubles come in their time."""
        self._later(ASK_SECONDS, self._ask_something)
        for kind, seconds in TROUBLE_SECONDS.items():
            self._later(seconds, partial(self._trouble, kind))
        self._later(AWAY_SECONDS, self._helper_leaves)

    def relent(self) -> None:
        """Have every helper there and well, and every agent try again what it is stuck with."""
        for agent in self.world.agents:
            node = agent.mig_node
            if node is None:
                continue
            node.helper.troubles.clear()
            node.helper.is_there = True
            if any(self._is_stuck(node, gpu.uuid) for gpu in node.cards.gpus):
                agent.crash("restarted by an operator")
            elif any(self._is_pending(node, gpu.uuid) for gpu in node.cards.gpus) and agent.is_up:
                agent.cut_power()

    def _is_stuck(self, node: MigNode, uuid: str) -> bool:
        operation = node.noted(uuid).operation
        return operation is not None and operation.is_stuck

    def _is_pending(self, node: MigNode, uuid: str) -> bool:
        record = node.cards.record(uuid)
        return record.is_enabled != record.is_pending

    def _later(self, mean_seconds: float, what: Callable[[], None]) -> None:
        def strike() -> None:
            if not self.world.is_calm:
                what()
                self._later(mean_seconds, what)

        self.world.scheduler.after(self.rng.expovariate(1.0 / mean_seconds), strike)

    def _trouble(self, kind: Trouble) -> None:
        name, node = self.rng.choice(list(self.nodes.items()))
        count = self.rng.choice((1, 1, 1, 2))  # of two the second meets the way back
        if not node.helper.troubles:
            self._tell(f"the next step on {name} is {kind}, {count} times")
            node.helper.troubles += [kind] * count

    def _helper_leaves(self) -> None:
        name, node = self.rng.choice(list(self.nodes.items()))
        seconds = self.rng.expovariate(1.0 / 4.0)
        self._tell(f"the helper of {name} is not there, for {seconds:.1f} s")
        node.helper.is_there = False

        def come_back() -> None:
            node.helper.is_there = True

        self.world.scheduler.after(seconds, come_back)

    def _tell(self, what: str) -> None:
        self.world.story.tell("trouble", what)

    # --- operators

    def _ask_something(self) -> None:
        rng = self.rng
        self.wishes += 1
        name, node = rng.choice(list(self.nodes.items()))
        gpus = [gpu.uuid for gpu in node.cards.gpus]
        about = tuple(rng.sample(gpus, rng.choice((1, 1, min(2, len(gpus))))))
        drain, evict = rng.choice(DRAIN_SECONDS), rng.random() < 0.4
        id_ = f"wish-{self.wishes}"
        if rng.random() < 0.2:
            ask = MigAsk("undo", id_, gpus=about, drain_seconds=drain, evict=evict)
        else:
            config = rng.choice(CONFIGS[node.cards.board.name])
            entries = _entries(config)
            ask = MigAsk("apply", id_, "wished", entries, about, drain, evict)
            for uuid in about:
                self.witness.wished[id_, uuid] = Wanted(bool(config), tuple(config.items()))
        if evict:
            seen = self.world.witness.evicted_from
            until = self.world.scheduler.now + drain
            seen |= {uuid: min(until, seen.get(uuid, until)) for uuid in about}
        self._tell(f"an operator asks {name}: {ask}")
        self._send(_Wish(ask, name))

    def _send(self, wish: _Wish) -> None:
        wish.attempts += 1
        patience = self.rng.uniform(*ASK_PATIENCE_SECONDS)
        self.world.scheduler.after(patience, partial(self._retry, wish))
        if self.rng.random() < 0.6:
            message = _request(wish)
            network, kind = self.world.network, mig_pb2.MigResponse
            call(network, "operator", "Mig", message, kind, partial(self._heard, wish))
            return
        agent = next(each for each in self.world.agents if each.name == wish.node)
        if agent.is_up and not agent.stands_still:
            agent.ask_mig(wish.ask, partial(self._told, wish))

    def _retry(self, wish: _Wish) -> None:
        # Some ask again though they were answered: it must not be done again.
        is_done = wish.is_answered and self.rng.random() < 0.6
        if not is_done and wish.attempts < ATTEMPTS_MAX and not self.world.is_calm:
            self._send(wish)

    def _heard(self, wish: _Wish, said: Said[mig_pb2.MigResponse] | Failed) -> None:
        if isinstance(said, Said):
            self._end(wish, "")
        elif said.reason.startswith("MIG_REFUSED"):
            self._end(wish, said.reason)

    def _told(self, wish: _Wish, said: MigReport | StokerError) -> None:
        self._end(wish, str(said) if isinstance(said, StokerError) else "")

    def _end(self, wish: _Wish, refusal: str) -> None:
        if not wish.is_answered:
            wish.is_answered = True
            self.witness.counts["MIG refused" if refusal else "MIG noted"] += 1
            self._tell(f"{wish.ask.operation_id} is {refusal or 'noted'}")


def _request(wish: _Wish) -> mig_pb2.MigRequest:
    """Return a wish as it is sent to the aggregator."""
    ask = wish.ask
    verb = mig_pb2.MIG_VERB_UNDO if ask.verb == "undo" else mig_pb2.MIG_VERB_APPLY
    return mig_pb2.MigRequest(
        node=wish.node,
        ask=mig_pb2.MigAsk(
            verb=verb,
            operation_id=ask.operation_id,
            config=ask.config,
            entries=[
                mig_pb2.MigEntry(mig_enabled=each.mig_enabled, mig_devices=each.mig_devices)
                for each in ask.entries
            ],
            gpus=ask.gpus,
            drain_seconds=ask.drain_seconds,
            evict=ask.evict,
        ),
    )


def _entries(config: Mapping[str, int]) -> tuple[MigEntry, ...]:
    return (MigEntry(mig_enabled=bool(config), mig_devices=dict(config)),)
