"""A whole fleet on one virtual clock: real agent states, the real aggregator, clients, and
everything that goes wrong.

    World(Scenario(seed=7)).run()

The same scenario gives the same run, event for event. After every event the invariants are checked;
once the faults stop, the world has LIVENESS_SECONDS to come to rest. What does not hold is told
with the seed, the virtual time, the invariant with its values and the end of the story.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import cast

from stoker.aggregator.answers import node_row
from stoker.core.mig.boards import Board
from stoker.testing import liveness
from stoker.testing.agent_process import AgentProcess
from stoker.testing.aggregator_process import AggregatorProcess
from stoker.testing.broken import Broken
from stoker.testing.client_process import ClientProcess
from stoker.testing.faults import Adversary, Faults
from stoker.testing.invariants import Invariants
from stoker.testing.machine import Machine, build_machine
from stoker.testing.mig_town import MigTown
from stoker.testing.mig_witness import MigWitness
from stoker.testing.network import Network
from stoker.testing.process import Process
from stoker.testing.rebalancer import Rebalancer
from stoker.testing.scheduler import Scheduler
from stoker.testing.story import Story
from stoker.testing.witness import Witness

# Calm begins when the troubled time is over. By then what was lost needs at most: an end that waits
# for a peer in vain (25 s), a redial, a hello without a welcome (10 s), and the longest TTL (20 s)
# of a client that died.
SETTLE_SECONDS = 65.0
# Then everybody asks once more and waits; what fits must be granted and told by then.
LIVENESS_SECONDS = 95.0
LAST_WAIT_SECONDS = 1000.0

DOWN_SECONDS = {"aggregator": (0.2, 4.0), "node": (0.2, 10.0), "client": (2.0, 10.0)}
CLOCK_ERROR_SECONDS = 5.0
# By how much deadlines may be wrong that are told from one clock to another.
DEADLINE_ERROR_SECONDS = 0.5
# How often somebody looks at the nodes, as clients and dashboards do.
LOOK_SECONDS = 0.7


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a run is made of; the seed decides everything else."""

    seed: int
    seconds: float = 180.0  # of trouble
    nodes: int = 6
    gpus: int = 4  # per node
    clients: int = 12
    mig: bool = False  # whether some of the nodes have GPUs that are partitioned
    faults: Faults | None = None  # None: drawn by the seed

    def command(self) -> str:
        """Return the command that runs it again."""
        return (
            f"make simulate SEED={self.seed} TROUBLE_SECONDS={self.seconds:g} NODES={self.nodes} "
            f"GPUS={self.gpus} CLIENTS={self.clients}{' MIG=1' * self.mig}"
        )


class SimulationFailed(AssertionError):
    """A promise did not hold; the message tells the story."""

    def __init__(self, scenario: Scenario, at: float, why: str, invariant: str, tail: str) -> None:
        self.invariant = invariant
        super().__init__(
            f"seed {scenario.seed}, {at:.6f} s: {why}\n\n{tail}\n\nagain: {scenario.command()}"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run that held is told by."""

    digest: str  # of the whole story
    events: int
    lines: int
    counts: dict[str, int]


class World:
    """The surroundings of every process of one run. Parts can be replaced before `run`."""

    aggregator_type: type[AggregatorProcess] = AggregatorProcess
    agent_type: type[AgentProcess] = AgentProcess

    def __init__(self, scenario: Scenario, listener: Callable[[str], None] | None = None) -> None:
        self.scenario = scenario
        self.rng = Random(scenario.seed)
        self.faults = scenario.faults or Faults.drawn(self.rng)
        self.scheduler = Scheduler()
        self.story = Story(lambda: self.scheduler.now, listener)
        self.network = Network(self.scheduler, self.rng, self.faults.network)
        mig_rng = Random(f"{scenario.seed} partitions")
        boards: list[Board | None] = [None] * scenario.nodes
        if scenario.mig:
            boards = MigTown.boards(scenario.nodes, mig_rng)
        machines = [
            build_machine(number, scenario.gpus, self.rng, board)
            for number, board in enumerate(boards, 1)
        ]
        self.machines: dict[str, Machine] = {machine.name: machine for machine in machines}
        self.memory_bytes = {
            gpu.uuid: gpu.memory_total_bytes for machine in machines for gpu in machine.gpus
        }
        self.witness = Witness(self.machines)
        self.aggregator = self.aggregator_type(self, self.witness)
        self.agents = [
            self.agent_type(machine, self.rng.choice((1.0, 2.0)), self, self.witness)
            for machine in machines
        ]
        self.partitions: MigTown | None = None
        if self.faults.clock_stepped is None:
            self.witness.clock_error_seconds = DEADLINE_ERROR_SECONDS
        if scenario.mig:
            self.partitions = MigTown(self, mig_rng, MigWitness(self.witness.counts))
            for agent, board in zip(self.agents, boards, strict=True):
                if board is not None:
                    self.partitions.settle(agent, board)
        self.clients = [
            ClientProcess(f"client-{n}", self, self.witness) for n in range(1, scenario.clients + 1)
        ]
        self.rebalancer = Rebalancer(self, Random(f"{scenario.seed} moves"))
        self.is_calm = False
        self._invariants = Invariants()
        self._error: BaseException | None = None  # the first that was reported

    def run(self) -> Outcome:
        """Live through the troubled time and the calm after it; raises SimulationFailed."""
        try:
            self.live()
        finally:
            self.close()
        events, lines = self.scheduler.events_run, self.story.lines_told
        return Outcome(self.story.digest(), events, lines, dict(self.witness.counts))

    def live(self) -> None:
        """Do the same, and stay as it is at the end; `close` it afterwards."""
        try:
            self._live()
        except Broken as broken:
            raise self._failed(str(broken), broken.invariant) from None
        except Exception as bug:
            raise self._failed(f"{type(bug).__name__}: {bug}", type(bug).__name__) from bug

    def close(self) -> None:
        """End the tasks that are left."""
        self.aggregator.dispose()
        for agent in self.agents:
            agent.dispose()

    def _live(self) -> None:
        seconds = self.scenario.seconds
        self.story.tell("world", f"{self.scenario}, {self.faults.described()}")
        for process in (self.aggregator, *self.agents, *self.clients):
            process.start()
        self.scheduler.after(LOOK_SECONDS, self._look_at_nodes)
        adversary = Adversary(self, self.faults)
        adversary.begin()
        self.rebalancer.begin()
        if self.partitions is not None:
            self.partitions.begin()
        self.scheduler.run_until(seconds, self._after_each)
        self.is_calm = True
        self.story.tell("world", "calm")
        if self.partitions is not None:
            self.partitions.relent()
        adversary.relent()
        self.scheduler.run_until(seconds + SETTLE_SECONDS, self._after_each)
        liveness.check_settled(self)
        for client in self.clients:
            client.want_for_good(LAST_WAIT_SECONDS)
        self.scheduler.run_until(seconds + LIVENESS_SECONDS, self._after_each)
        liveness.check_rest(self)

    def _look_at_nodes(self) -> None:
        """See every node as a client is shown it."""
        self.scheduler.after(LOOK_SECONDS, self._look_at_nodes)
        aggregator = self.aggregator
        if not aggregator.is_up or aggregator.stands_still:
            return
        for node in aggregator.fleet.nodes.values():
            row = node_row(aggregator.fleet, node)
            self.witness.shown(row.message(aggregator.clock.now()), self.scheduler.now)

    def _after_each(self) -> None:
        if self._error is not None:
            raise self._error
        self.witness.stored(self.aggregator.file, self.scheduler.now)
        self._invariants.check(self)

    def _failed(self, why: str, invariant: str) -> SimulationFailed:
        return SimulationFailed(
            self.scenario, self.scheduler.now, why, invariant, self.story.tail()
        )

    # --- what processes find around them

    def is_fatal_point(self) -> bool:
        """Whether the process that has come to a named point of its work dies here."""
        return not self.is_calm and self.rng.random() < self.faults.fatal_point

    def is_fatal_step(self) -> bool:
        """Whether the process that is about to take one more step dies before it."""
        return not self.is_calm and self.rng.random() < self.faults.fatal_step

    def report(self, error: BaseException) -> None:
        """Take in an error that nobody expected: the run ends with it."""
        self._error = self._error or _leaf(error)

    def mourn(self, process: Process) -> None:
        """Start a process that has died again, after a while."""
        kind = process.name.split("-", maxsplit=1)[0]
        self.scheduler.after(self.rng.uniform(*DOWN_SECONDS[kind]), lambda: self._revive(process))

    def _revive(self, process: Process) -> None:
        if process is self.aggregator:
            # It may have been moved to another machine: its clock is another.
            self.aggregator.wall_offset = self.rng.uniform(-1.0, 1.0) * CLOCK_ERROR_SECONDS
        process.start()


def _leaf(error: BaseException) -> BaseException:
    """Return what a TaskGroup's error is about."""
    if isinstance(error, BaseExceptionGroup):
        return _leaf(cast("BaseExceptionGroup[BaseException]", error).exceptions[0])
    return error
