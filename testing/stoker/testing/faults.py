"""What goes wrong in a simulated world, how often, and the adversary that does it.

A seed draws which kinds of trouble its world has at all: a world with everything at once hides what
a world with three kinds of trouble shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import inf
from random import Random
from typing import TYPE_CHECKING, TypeVar

from stoker.agent.facts import Fact
from stoker.testing.calls import call
from stoker.testing.cards import Span
from stoker.testing.machine import GIB, WEAR
from stoker.testing.network import NO_FAULTS, NetworkFaults
from stoker.v1 import fleet_pb2

K = TypeVar("K")
T = TypeVar("T")

# What a card may not tell; not the energy, by which the world knows the age of a sample.
SILENT_FACTS = (
    Fact.UTILIZATION_RATIO,
    Fact.TEMPERATURE_CELSIUS,
    Fact.MEMORY_USED_BYTES,
    Fact.MEMORY_RESERVED_BYTES,
)
# A fault that a GPU has told by now is noted by then.
MENDING_SECONDS = 20
# Of programs, and such as take a reset or a reboot.
XIDS = (31, 94, 48, 119, 79)

if TYPE_CHECKING:
    from stoker.testing.agent_process import AgentProcess
    from stoker.testing.disk import Disk
    from stoker.testing.machine import Machine
    from stoker.testing.world import World


@dataclass(frozen=True, slots=True)
class Faults:
    """Mean seconds between two troubles of a kind in the whole world; None: it does not happen."""

    agent_cut_off: float | None = 12.0
    client_cut_off: float | None = 15.0
    aggregator_killed: float | None = 25.0
    agent_killed: float | None = 12.0
    power_failed: float | None = 60.0
    journal_lost: float | None = 90.0
    aggregator_disk_full: float | None = 50.0
    agent_disk_full: float | None = 25.0
    aggregator_disk_slow: float | None = 40.0
    agent_disk_slow: float | None = 25.0
    driver_hung: float | None = 40.0
    call_hung: float | None = 20.0
    killed_hosts_stay: float | None = 60.0
    driver_unloaded: float | None = 40.0
    driver_upgraded: float | None = 60.0
    driver_released: float | None = 30.0
    mig_toggled: float | None = 40.0
    fact_silent: float | None = 20.0
    gpu_unreadable: float | None = 25.0
    gpu_lost: float | None = 40.0
    gpu_pulled: float | None = 60.0
    aggregator_stalled: float | None = 60.0
    clock_stepped: float | None = 20.0
    cordoned: float | None = 20.0
    xid_told: float | None = 20.0
    card_worn: float | None = 30.0
    handed_out: float | None = 20.0
    kubelet_silent: float | None = 60.0
    foreign_process: float | None = 6.0
    # Breaks a promise by itself, so no seed draws it: nothing acknowledged survives its disk.
    ledger_lost: float | None = None
    fatal_point: float = 0.002  # the probability that a named point of the work is the last
    fatal_step: float = 0.0002  # the same for a step of the aggregator, of which there are many
    network: NetworkFaults = field(default_factory=NetworkFaults)

    @staticmethod
    def none() -> "Faults":
        """Return a world in which everything only takes time."""
        return Faults(
            **{each.name: None for each in fields(Faults) if each.name in KINDS},
            fatal_point=0.0,
            fatal_step=0.0,
            network=NO_FAULTS,
        )

    @staticmethod
    def drawn(rng: Random) -> "Faults":
        """Return a random choice of kinds, some of them more often than usual."""
        share = rng.choice((0.3, 0.6, 1.0))
        drawn: dict[str, float | None] = {}
        for kind in KINDS:
            usual: float | None = getattr(Faults(), kind)
            if usual is not None:
                happens = rng.random() < share
                drawn[kind] = usual * rng.uniform(0.4, 1.5) if happens else None
        return replace(
            Faults(),
            **drawn,
            fatal_point=rng.choice((0.0, 0.002, 0.005)),
            fatal_step=rng.choice((0.0, 0.0002, 0.001)),
            network=rng.choice((NO_FAULTS, NetworkFaults(), NetworkFaults(slow=0.1))),
        )

    def described(self) -> str:
        """Return the kinds that happen."""
        kinds = [f"{kind} {mean:.0f}" for kind in KINDS if (mean := getattr(self, kind))]
        fatal = f"fatal point {self.fatal_point}, step {self.fatal_step}"
        return f"{', '.join(kinds)}; {fatal}; {self.network}"


class Adversary:
    """Does what the faults say, until the world is calm."""

    def __init__(self, world: "World", faults: Faults) -> None:
        self._world = world
        self._rng = world.rng
        self._faults = faults

    def begin(self) -> None:
        """Let the first trouble of each kind come in its time."""
        for kind in KINDS:
            self._later(kind)

    def relent(self) -> None:
        """Mend everything that can be mended, at once; what has died starts again by itself."""
        world = self._world
        world.network.faults = NO_FAULTS
        world.network.heal_all()
        world.aggregator.file.disk.mend()
        for agent in world.agents:
            agent.disk.mend()
        for machine in world.machines.values():
            machine.cards.mend()
            machine.unreadable.clear()
            machine.handed_out.clear()
            machine.is_kubelet_silent = False
            for process in machine.foreign():
                machine.end(process.pid)
        for name in world.machines:
            self._uncordon_surely(name)
        for agent in world.agents:
            self._resume_surely(agent)
            self._mend_surely(agent)

    def _later(self, kind: str) -> None:
        mean = getattr(self._faults, kind)
        if mean is not None:
            self._world.scheduler.after(
                self._rng.expovariate(1.0 / mean), partial(self._strike, kind)
            )

    def _strike(self, kind: str) -> None:
        if not self._world.is_calm:
            KINDS[kind](self)
            self._later(kind)

    def _tell(self, what: str) -> None:
        self._world.story.tell("trouble", what)

    def _for_a_while(self, mean_seconds: float, what: str, mend: Callable[[], None]) -> None:
        seconds = self._rng.expovariate(1.0 / mean_seconds)
        self._tell(f"{what}, for {seconds:.1f} s")

        def mend_now() -> None:
            self._tell(f"no longer: {what}")
            mend()

        self._world.scheduler.after(seconds, mend_now)

    def _any_agent(self) -> "AgentProcess":
        return self._rng.choice(self._world.agents)

    def _any_machine(self) -> "Machine":
        return self._rng.choice(list(self._world.machines.values()))

    def cut_off(self, name: str) -> None:
        """Part a process and the aggregator."""
        network, aggregator = self._world.network, self._world.aggregator.name
        network.partition(name, aggregator)
        what = f"{name} is cut off"
        self._for_a_while(8.0, what, lambda: network.heal(name, aggregator))

    def agent_cut_off(self) -> None:
        """Part a node and the aggregator."""
        self.cut_off(self._any_agent().name)

    def client_cut_off(self) -> None:
        """Part a client and the aggregator."""
        self.cut_off(self._rng.choice(self._world.clients).name)

    def aggregator_killed(self) -> None:
        """Kill the aggregator."""
        self._world.aggregator.crash("killed")

    def ledger_lost(self) -> None:
        """Take the aggregator's disk away; sometimes there is a backup of some age."""
        aggregator = self._world.aggregator
        aggregator.crash("its disk is replaced")
        groups = len(aggregator.file.disk.durable)
        kept = self._rng.choice((0, self._rng.randint(0, groups)))
        aggregator.file.cut_back(kept)
        self._tell(f"of {groups} transactions the ledger has {kept}")
        held = {each.id for agent in self._world.agents for each in agent.held}
        self._world.witness.lost_ledger(aggregator.file, held if kept == 0 else set())

    def agent_killed(self) -> None:
        """Kill an agent."""
        self._any_agent().crash("killed")

    def power_failed(self) -> None:
        """Take a host down with everything on it."""
        agent = self._any_agent()
        if agent.is_up:
            agent.cut_power()

    def journal_lost(self) -> None:
        """Take an agent's disk away."""
        agent = self._any_agent()
        agent.crash("its disk is replaced")
        agent.lose_journal()

    def aggregator_disk_full(self) -> None:
        """Let the aggregator's disk be full."""
        self._disk("full", 3.0, self._world.aggregator.file.disk, "the aggregator")

    def agent_disk_full(self) -> None:
        """Let an agent's disk be full."""
        agent = self._any_agent()
        self._disk("full", 4.0, agent.disk, agent.name)

    def aggregator_disk_slow(self) -> None:
        """Let the aggregator's disk take its time."""
        self._disk("slow", 4.0, self._world.aggregator.file.disk, "the aggregator")

    def agent_disk_slow(self) -> None:
        """Let an agent's disk take its time."""
        agent = self._any_agent()
        self._disk("slow", 5.0, agent.disk, agent.name)

    def _disk(self, how: str, mean_seconds: float, disk: "Disk[T]", whose: str) -> None:
        def turn(on: bool) -> None:
            if how == "full":
                disk.is_full = on
            else:
                disk.is_slow = on

        turn(True)
        self._for_a_while(mean_seconds, f"the disk of {whose} is {how}", lambda: turn(False))

    def driver_hung(self) -> None:
        """Let the whole driver of a machine hang."""
        machine = self._any_machine()
        seconds = self._rng.expovariate(1.0 / 5.0)
        self._hang(machine, [gpu.uuid for gpu in machine.gpus], seconds)
        self._tell(f"the driver of {machine.name} hangs for {seconds:.1f} s")

    def call_hung(self) -> None:
        """Let calls about one GPU hang: for a moment, for a while, or until somebody mends it."""
        machine = self._any_machine()
        gpu = self._rng.choice(machine.gpus)
        seconds = self._rng.choice((0.5, 8.0, inf)) * self._rng.uniform(0.5, 1.5)
        self._hang(machine, [gpu.uuid], seconds)
        self._tell(f"{machine.name}/{gpu.index} hangs for {seconds:.1f} s")

    def _hang(self, machine: "Machine", uuids: list[str], seconds: float) -> None:
        now = self._world.scheduler.now
        for uuid in uuids:
            before = machine.cards.hung.get(uuid)
            is_more = before is not None and before.holds(now)
            since = before.since if before is not None and is_more else now
            machine.cards.hung[uuid] = Span(since, now + seconds)

    def killed_hosts_stay(self) -> None:
        """Let the kernel not let go of driver hosts that are killed, one of which hangs."""
        machine = self._any_machine()
        now, seconds = self._world.scheduler.now, self._rng.expovariate(1.0 / 8.0)
        machine.cards.killed_hosts_stay = Span(now, now + seconds)
        gpu = self._rng.choice(machine.gpus)
        self._hang(machine, [gpu.uuid], self._rng.uniform(0.5, 2.0) * seconds)
        self._tell(f"a driver host of {machine.name} is not reaped for {seconds:.1f} s")

    def driver_unloaded(self) -> None:
        """Take the kernel module away for a while; sometimes another version comes back."""
        machine = self._any_machine()
        now, seconds = self._world.scheduler.now, self._rng.expovariate(1.0 / 5.0)
        machine.cards.unloaded = Span(now, now + seconds)
        machine.cards.version += self._rng.choice((0, 1))
        machine.lose_driver()
        self._tell(f"the driver of {machine.name} is unloaded for {seconds:.1f} s")

    def driver_upgraded(self) -> None:
        """Replace the driver under the library that is loaded."""
        machine = self._any_machine()
        machine.cards.version += 1
        machine.lose_driver()
        self._tell(f"the driver of {machine.name} is replaced")

    def driver_released(self) -> None:
        """Let somebody want the driver, for a time or until it is resumed."""
        agent = self._any_agent()
        seconds = self._rng.choice((None, self._rng.expovariate(1.0 / 5.0)))
        agent.ask_release(seconds, "root")
        what = f"the driver of {agent.name} is wanted by root"
        self._for_a_while(6.0, what, lambda: agent.ask_resume("root"))

    def mig_toggled(self) -> None:
        """Turn the MIG mode of a GPU on, and off again."""
        machine = self._any_machine()
        gpu = self._rng.choice(machine.gpus)
        machine.cards.mig.add(gpu.uuid)
        what = f"{machine.name}/{gpu.index} is in MIG mode"
        self._for_a_while(5.0, what, lambda: machine.cards.mig.discard(gpu.uuid))

    def fact_silent(self) -> None:
        """Let a GPU not tell a fact."""
        machine, now = self._any_machine(), self._world.scheduler.now
        gpu, fact = self._rng.choice(machine.gpus), self._rng.choice(SILENT_FACTS)
        silent = machine.cards.silent.setdefault(gpu.uuid, {})
        silent.setdefault(fact, now)
        what = f"{machine.name}/{gpu.index} does not tell {fact}"
        self._for_a_while(8.0, what, partial(_drop, silent, fact))

    def aggregator_stalled(self) -> None:
        """Stop the aggregator as SIGSTOP does, often for longer than any lease runs."""
        seconds = self._rng.uniform(0.2, 30.0)
        self._world.aggregator.stand_still(seconds)

    def gpu_unreadable(self) -> None:
        """Let the processes of a GPU be unknown."""
        machine = self._any_machine()
        gpu = self._rng.choice(machine.gpus)
        machine.unreadable.add(gpu.uuid)
        what = f"the processes on {machine.name}/{gpu.index} cannot be read"
        self._for_a_while(6.0, what, lambda: machine.unreadable.discard(gpu.uuid))

    def gpu_lost(self) -> None:
        """Let a GPU fall off the bus, and come back."""
        machine, now = self._any_machine(), self._world.scheduler.now
        gpu = self._rng.choice(machine.gpus)
        machine.cards.lost.setdefault(gpu.uuid, now)
        what = f"{machine.name}/{gpu.index} is lost"
        self._for_a_while(5.0, what, partial(_drop, machine.cards.lost, gpu.uuid))

    def gpu_pulled(self) -> None:
        """Let the driver not count a GPU any more, and count it again."""
        machine, now = self._any_machine(), self._world.scheduler.now
        gpu = self._rng.choice(machine.gpus)
        machine.cards.pulled.setdefault(gpu.uuid, now)
        what = f"{machine.name}/{gpu.index} is pulled"
        self._for_a_while(5.0, what, partial(_drop, machine.cards.pulled, gpu.uuid))

    def clock_stepped(self) -> None:
        """Set the wall clock of a machine to another time."""
        machine = self._any_machine()
        step = self._rng.choice((-1, 1)) * 10 ** self._rng.uniform(-1.0, 4.0)
        machine.wall_offset += step
        self._tell(f"the clock of {machine.name} is set by {step:+.1f} s")

    def cordoned(self) -> None:
        """Cordon a node for a while, if the operator gets through."""
        name = self._any_machine().name
        message = fleet_pb2.CordonRequest(node=name, reason="maintenance")
        kind = fleet_pb2.CordonResponse
        call(self._world.network, "operator", "Cordon", message, kind, _ignore)
        self._for_a_while(8.0, f"an operator cordons {name}", lambda: self._uncordon(name))

    def _uncordon(self, name: str) -> None:
        message, kind = fleet_pb2.UncordonRequest(node=name), fleet_pb2.UncordonResponse
        call(self._world.network, "operator", "Uncordon", message, kind, _ignore)

    def _uncordon_surely(self, name: str) -> None:
        """Uncordon again and again until it is so."""
        aggregator = self._world.aggregator
        node = aggregator.fleet.nodes.get(name)
        if not aggregator.is_up or (node is not None and node.cordoned is not None):
            self._uncordon(name)
            self._world.scheduler.after(1.0, partial(self._uncordon_surely, name))

    def _resume_surely(self, agent: "AgentProcess") -> None:
        """Have the driver taken again, until it is so: also when the disk said otherwise."""
        if not agent.is_up or agent.state.view().release or agent.durable.release:
            agent.ask_resume("root")
            self._world.scheduler.after(1.0, partial(self._resume_surely, agent))

    def _mend_surely(self, agent: "AgentProcess", seconds: int = MENDING_SECONDS) -> None:
        """Say that its GPUs are mended, until none has a fault that lasts, or is on its way."""
        if agent.say_healthy() or seconds:
            again = partial(self._mend_surely, agent, max(0, seconds - 1))
            self._world.scheduler.after(1.0, again)

    def xid_told(self) -> None:
        """Let a GPU tell an Xid: of a program, or one that takes a reset or a reboot."""
        machine = self._any_machine()
        gpu, xid = self._rng.choice(machine.gpus), self._rng.choice(XIDS)
        machine.cards.xids.setdefault(gpu.uuid, []).append(xid)
        self._tell(f"{machine.name}/{gpu.index} has an Xid {xid}")

    def card_worn(self) -> None:
        """Let a GPU tell that it is not well, and that it is again."""
        machine = self._any_machine()
        gpu, fact = self._rng.choice(machine.gpus), self._rng.choice(WEAR)
        worn = machine.cards.worn.setdefault(gpu.uuid, {})
        worn[fact] = 1.0
        what = f"{machine.name}/{gpu.index} tells {fact}"
        self._for_a_while(8.0, what, partial(_drop, worn, fact))

    def handed_out(self) -> None:
        """Let a kubelet hand out a GPU."""
        machine = self._any_machine()
        gpu = self._rng.choice(machine.gpus)
        machine.handed_out[gpu.uuid] = "pod ml/train-0"
        what = f"{machine.name}/{gpu.index} is handed out by the kubelet"
        self._for_a_while(8.0, what, partial(_drop, machine.handed_out, gpu.uuid))

    def kubelet_silent(self) -> None:
        """Let a kubelet not answer for a while."""
        machine = self._any_machine()
        machine.is_kubelet_silent = True

        def answer() -> None:
            machine.is_kubelet_silent = False

        self._for_a_while(6.0, f"the kubelet of {machine.name} does not answer", answer)

    def foreign_process(self) -> None:
        """Let somebody who asked nobody use a GPU."""
        machine = self._any_machine()
        now = self._world.scheduler.now
        gpus = self._rng.sample(machine.gpus, self._rng.choice((1, 1, 2)))
        bytes_ = self._rng.randint(1, 8) * GIB
        pid = machine.run(now, [gpu.uuid for gpu in gpus], bytes_, "", is_claim_visible=True)
        where = ",".join(str(gpu.index) for gpu in gpus)
        what = f"a foreign process runs on {machine.name}/{where}"
        self._for_a_while(8.0, what, lambda: machine.end(pid))


def _ignore(said: object) -> None:
    del said


def _drop(table: dict[K, T], key: K) -> None:
    table.pop(key, None)


KINDS: dict[str, Callable[[Adversary], None]] = {
    kind.__name__: kind
    for kind in (
        Adversary.agent_cut_off,
        Adversary.client_cut_off,
        Adversary.aggregator_killed,
        Adversary.ledger_lost,
        Adversary.agent_killed,
        Adversary.power_failed,
        Adversary.journal_lost,
        Adversary.aggregator_disk_full,
        Adversary.agent_disk_full,
        Adversary.aggregator_disk_slow,
        Adversary.agent_disk_slow,
        Adversary.driver_hung,
        Adversary.call_hung,
        Adversary.killed_hosts_stay,
        Adversary.driver_unloaded,
        Adversary.driver_upgraded,
        Adversary.driver_released,
        Adversary.mig_toggled,
        Adversary.fact_silent,
        Adversary.gpu_unreadable,
        Adversary.gpu_lost,
        Adversary.gpu_pulled,
        Adversary.aggregator_stalled,
        Adversary.clock_stepped,
        Adversary.cordoned,
        Adversary.xid_told,
        Adversary.card_worn,
        Adversary.handed_out,
        Adversary.kubelet_silent,
        Adversary.foreign_process,
    )
}
