"""The law: whatever happens, in whatever order, no GPU is given twice and nothing is forgotten.

Agents, streams and the ledger's disk are played here by small models that know nothing of how the
fleet keeps its tables: an agent is its journal, a stream two queues, the disk a list of events.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.unit.aggregator.builders import (
    GIB,
    START,
    durable_tables,
    make_facts,
    make_gpus,
    make_process,
    share,
    whole,
)
from tests.unit.aggregator.playing_agent import GPU_BYTES, Agent, require_room

from stoker.aggregator import commands
from stoker.aggregator import events as e
from stoker.aggregator.decisions import Round
from stoker.aggregator.fleet import Fleet, Snapshot
from stoker.aggregator.model import (
    AllocationState,
    Request,
)
from stoker.aggregator.tenancy import allocations_on
from stoker.aggregator.views import view_node
from stoker.aggregator.wishes import (
    Allocate,
    Cordon,
    KeyReused,
    Queued,
    Refused,
    Release,
    Reply,
    Settled,
    Uncordon,
    Wish,
)

GPUS_PER_AGENT = 2
# So that most nodes are fresh most of the time: the law is about what is granted.
INTERVAL_SECONDS = 100.0
REQUESTS = (
    whole(1),
    whole(2, ttl_seconds=200.0),
    whole(1, priority=1),
    share(4),
    share(7, ttl_seconds=200.0),
    share(12),
    share(3, cpu_milli=3000, compute_milli=400),
    whole(1, nodes=2, cpu_milli=2000),
    whole(2, nodes=2, ttl_seconds=200.0, priority=1),
)
AGENTS = st.integers(0, 1)
PLACES = st.integers(0, 100)  # taken modulo how many there are


FAULTS: dict[str, "Callable[[Law, Agent], None]"] = {
    "a line breaks": lambda law, host: law.line_breaks(host),
    "an agent dials again": lambda law, host: law.connect_agent(host),
    "the aggregator is killed": lambda law, host: law.aggregator_is_killed(host),
    "the ledger is lost": lambda law, host: law.ledger_is_lost(host),
    "a host is renamed": lambda law, host: law.host_is_renamed(host),
    "a journal is lost": lambda law, host: law.journal_is_lost(host),
    "a disk is saved": lambda law, host: host.save_disk(),
    "a disk is restored": lambda law, host: law.disk_is_restored(host),
}


class Law(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self.fleet = Fleet()
        self.disk: list[e.DurableEvent] = []
        self.snapshot = Snapshot(0, (), ())
        self.agents = [self.new_agent(number) for number in (0, 1)]
        self.sessions = 0
        self.ids = 0
        self.names = 0
        # What was granted and not handed back: GPU UUID -> allocation -> bytes, None: all.
        self.tenancy: dict[str, dict[str, int | None]] = {}
        self.alive_until: dict[str, float] = {}
        self.keys: dict[str, tuple[Request, str]] = {}
        for agent in self.agents:
            self.connect_agent(agent)
            self.deliver_all(agent)

    def new_agent(self, number: int) -> Agent:
        gpus = make_gpus(f"g{number}", GPUS_PER_AGENT, gib=GPU_BYTES // GIB)
        facts = make_facts(f"n{number}", gpus)
        host = replace(facts, cpu_milli=8000, host_memory_bytes=64 * GIB)
        return Agent(number, replace(host, interval_seconds=INTERVAL_SECONDS))

    # --- the aggregator's side

    def record(self, event: e.DurableEvent) -> None:
        self.check(event)
        self.disk.append(event)
        self.fleet.apply(event, self.fleet.version + 1)

    def check(self, event: e.DurableEvent) -> None:
        """Hold the event against the models, before it is believed."""
        match event:
            case e.AllocationGranted() | e.AllocationAdopted():
                for device in (d for each in event.placements for d in each.devices):
                    wanted = None if device.exclusive else device.memory_bytes
                    tenants = self.tenancy.setdefault(device.uuid, {})
                    occupants = {**tenants, **self.held_somewhere(device.uuid)}
                    occupants.pop(event.id, None)
                    require_room(device.uuid, wanted, list(occupants.values()))
                    if device.exclusive and not isinstance(event, e.AllocationAdopted):
                        seen = {uuid for agent in self.agents for uuid in agent.seen}
                        assert device.uuid not in seen, "somebody else uses it"
                    tenants[event.id] = wanted
                self.alive_until[event.id] = event.at + event.request.ttl_seconds
            case e.AllocationReleasing(at, id_, reason):
                for agent in self.agents:
                    agent.looked_for.discard(id_)
                if reason.startswith("expired"):
                    assert at >= self.alive_until[id_], f"{id_} ended early"
            case e.AllocationEnded(_, id_, _):
                ending = self.fleet.allocations[id_]
                if ending.state is AllocationState.RELEASING:
                    for agent in self.agents:
                        assert id_ not in agent.journal, "the node has not let go"
                        holds = [c for c in agent.told if c.is_hold and c.allocation_id == id_]
                        assert not holds, "the node is about to hold it"
                        if agent.has_one_of(ending.devices):
                            looked = id_ in agent.looked_for
                            assert looked, "nobody looked at what its tenant left behind"
                    for tenants in self.tenancy.values():
                        tenants.pop(id_, None)
            case _:
                pass

    def held_somewhere(self, uuid: str) -> dict[str, int | None]:
        held = [h for agent in self.agents for h in agent.journal.values()]
        held += [c.hold for agent in self.agents for c in agent.told if c.hold is not None]
        return {h.id: h.memory_bytes for h in held if uuid in h.gpu_uuids}

    def new_id(self) -> str:
        self.ids += 1
        return f"a{self.ids}"

    def decide(self, *wishes: Wish, serve: bool = False) -> list[Reply]:
        nodes, self.fleet.unreconciled = self.fleet.unreconciled, set()
        one = Round(self.fleet, self.now, self.new_id)
        one.housekeep(nodes)
        replies = [one.wish(wish) for wish in wishes]
        if serve:
            one.serve_queue()
        for event in one.events:
            self.record(event)
        for agent in self.agents:
            self.command(agent)
        return replies

    def command(self, agent: Agent) -> None:
        status = self.fleet.status(agent.name)
        if status.session == 0 or agent.name in self.fleet.unreconciled:
            return
        sent = self.fleet.sent[agent.name]
        first = max([agent.last_command, *(c.id for c in agent.told)]) + 1
        told = commands.difference(
            *(agent.name, allocations_on(self.fleet, agent.name), status.held or {}, sent, first),
            inventory_known=True,
        )
        self.fleet.note(e.CommandsSent(self.now, agent.name, status.session, told))
        agent.told.extend(told)

    # --- the streams

    def connect_agent(self, agent: Agent) -> None:
        if agent.session:
            self.disconnect_agent(agent)
        self.sessions += 1
        agent.session = self.sessions
        known = self.fleet.nodes.get(agent.name)
        if known is None or known.facts != agent.facts:
            self.record(e.NodeRegistered(self.now, agent.facts))
        is_same = known is not None and known.facts.incarnation == agent.facts.incarnation
        acked = self.fleet.status(agent.name).acked_sequence if is_same else 0
        held = tuple(agent.journal.values())
        self.fleet.note(e.AgentConnected(self.now, agent.name, agent.session, held, acked))
        agent.report(self.now)

    def disconnect_agent(self, agent: Agent) -> None:
        gone = e.AgentDisconnected(self.now, agent.name, agent.session, "the line broke")
        self.fleet.note(gone)
        agent.hang_up()

    def deliver_all(self, agent: Agent) -> None:
        while agent.reports:
            frame = agent.reports.popleft()
            if frame.processes is not None:
                agent.seen = {p.gpu_uuid: p for p in frame.processes.processes}
            arrived = e.FrameArrived(self.now, agent.name, agent.session, frame, self.now)
            self.fleet.note(arrived)

    # --- what clients do

    @rule(
        request=st.sampled_from(REQUESTS),
        key=st.sampled_from(["", "", "k1", "k2"]),
        wait_seconds=st.sampled_from([0.0, 0.0, 0.0, 100.0]),
    )
    def allocate(self, request: Request, key: str, wait_seconds: float) -> None:
        (reply,) = self.decide(Allocate(request, key, wait_seconds))
        known = self.keys.get(key)
        match reply:
            case KeyReused(id_):
                assert known is not None
                assert known[0] != request
                assert known[1] == id_
            case Settled(id_) | Queued(id_):
                assert known is None or known == (request, id_), "a key is granted once"
                if key:
                    self.keys[key] = (request, id_)
                if isinstance(reply, Queued):
                    self.fleet.note(e.WaiterAttached(self.now, id_))
            case Refused():
                assert known is None
            case _:
                raise AssertionError(reply)

    def some(self, *states: AllocationState) -> list[str]:
        return [a.id for a in self.fleet.allocations.values() if a.state in states]

    @precondition(lambda self: self.fleet.allocations)
    @rule(place=PLACES)
    def release(self, place: int) -> None:
        ids = list(self.fleet.allocations)
        assert self.decide(Release(ids[place % len(ids)])) == [Settled(ids[place % len(ids)])]

    @precondition(lambda self: self.some(AllocationState.GRANTED))
    @rule(place=PLACES)
    def keep_alive(self, place: int) -> None:
        ids = self.some(AllocationState.GRANTED)
        id_ = ids[place % len(ids)]
        self.fleet.note(e.KeptAlive(self.now, id_))
        self.alive_until[id_] = self.now + self.fleet.allocations[id_].request.ttl_seconds

    @precondition(lambda self: self.fleet.waiting)
    @rule(place=PLACES)
    def leave_the_line(self, place: int) -> None:
        ids = list(self.fleet.waiting)
        self.fleet.note(e.WaiterDetached(self.now, ids[place % len(ids)]))

    @rule(agent=AGENTS, on=st.sampled_from([False, False, True]))
    def cordon(self, agent: int, on: bool) -> None:
        name = self.agents[agent].name
        if name in self.fleet.nodes:
            self.decide(Cordon(name, "repair") if on else Uncordon(name))

    # --- what time and nodes do

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for agent in self.agents:
            if agent.session:
                agent.report(self.now)
                self.deliver_all(agent)

    @rule()
    def decide_what_is_due(self) -> None:
        self.decide(serve=True)

    @rule(lines=st.booleans())
    def all_is_well_for_a_while(self, lines: bool) -> None:
        for agent in self.agents:
            if lines and not agent.session:
                self.connect_agent(agent)
        for _ in range(2):
            self.decide(serve=True)
            for agent in self.agents:
                self.do_everything(agent)
        self.decide(serve=True)

    def do_everything(self, agent: Agent) -> None:
        while agent.told:
            agent.obey(self.now)
        while agent.ending:
            agent.let_go(self.now)
        self.deliver_all(agent)

    @rule(agent=AGENTS)
    def agent_obeys(self, agent: int) -> None:
        if self.agents[agent].told:
            self.agents[agent].obey(self.now)

    @rule(agent=AGENTS)
    def agent_lets_go(self, agent: int) -> None:
        if self.agents[agent].ending:
            self.agents[agent].let_go(self.now)

    @rule(agent=AGENTS)
    def agent_refuses(self, agent: int) -> None:
        told = self.agents[agent].told
        if told and told[0].is_hold:
            self.agents[agent].refuse(self.now)

    @rule(agent=AGENTS)
    def reports_arrive(self, agent: int) -> None:
        self.deliver_all(self.agents[agent])

    @rule(agent=AGENTS, gpu=st.integers(0, GPUS_PER_AGENT - 1))
    def somebody_else_comes_or_goes(self, agent: int, gpu: int) -> None:
        host = self.agents[agent]
        uuid = host.facts.gpus[gpu].uuid
        if host.others.pop(uuid, None) is None:
            host.others[uuid] = make_process(uuid, memory_used_bytes=GIB)
        if host.session:
            host.report(self.now)

    # --- faults: one rule, so that they stay the exception

    @rule(agent=AGENTS, what=st.sampled_from(sorted(FAULTS)))
    def fault(self, agent: int, what: str) -> None:
        FAULTS[what](self, self.agents[agent])

    @rule()
    def keep_snapshot(self) -> None:
        self.snapshot = self.fleet.snapshot()

    def host_is_renamed(self, host: Agent) -> None:
        known = self.fleet.nodes.get(host.name)
        if known is None or known.facts.incarnation != host.facts.incarnation:
            return  # the ledger does not know its journal under the former name
        if host.session:
            self.disconnect_agent(host)
        self.names += 1
        host.facts = replace(host.facts, name=f"m{self.names}")
        host.sequence = 0

    def journal_is_lost(self, host: Agent) -> None:
        if self.fleet.tenants.keys() - {agent.name for agent in self.agents}:
            return  # nobody could tell any more that the host let go under its former name
        if host.session:
            self.disconnect_agent(host)
        host.journal.clear()
        self.names += 1
        host.facts = replace(host.facts, incarnation=f"journal {self.names}")
        host.sequence = 0

    def disk_is_restored(self, host: Agent) -> None:
        if host.session:
            self.disconnect_agent(host)
        host.journal = dict(host.saved)

    def line_breaks(self, host: Agent) -> None:
        if host.session:
            self.disconnect_agent(host)

    def aggregator_is_killed(self, _: Agent) -> None:
        before = durable_tables(self.fleet)
        for agent in self.agents:
            agent.hang_up()
        self.fleet = Fleet.restored(self.snapshot)
        for event in self.disk[self.snapshot.version :]:
            self.fleet.apply(event, self.fleet.version + 1)
        assert durable_tables(self.fleet) == before
        replayed = Fleet()
        for version, event in enumerate(self.disk, 1):
            replayed.apply(event, version)
        assert durable_tables(replayed) == before
        self.restart(20.0)

    def ledger_is_lost(self, _: Agent) -> None:
        for agent in self.agents:
            agent.hang_up()
        self.fleet = Fleet.restored(Snapshot(0, (), ()))
        self.disk = []
        self.snapshot = Snapshot(0, (), ())
        self.tenancy.clear()
        self.keys.clear()
        self.restart(0.0)

    def restart(self, seconds: float) -> None:
        self.now += seconds
        self.fleet.note(e.Recovered(self.now))
        for id_ in self.some(AllocationState.GRANTED):
            ttl = self.fleet.allocations[id_].request.ttl_seconds
            self.alive_until[id_] = self.now + ttl

    # --- the law

    @invariant()
    def claims_are_what_was_granted_and_not_handed_back(self) -> None:
        claims = {
            uuid: {claim.allocation_id: claim.memory_bytes for claim in claims}
            for uuid, claims in self.fleet.claims.items()
        }
        assert claims == {uuid: tenants for uuid, tenants in self.tenancy.items() if tenants}

    @invariant()
    def no_gpu_is_given_twice(self) -> None:
        for uuid, tenants in self.tenancy.items():
            for id_, wanted in tenants.items():
                others = [memory for other, memory in tenants.items() if other != id_]
                require_room(uuid, wanted, others)

    @invariant()
    def gang_has_all_of_its_nodes_or_none(self) -> None:
        for id_ in self.some(AllocationState.GRANTED, AllocationState.RELEASING):
            allocation = self.fleet.allocations[id_]
            assert len(set(allocation.nodes)) == allocation.request.nodes

    @invariant()
    def views_are_as_if_made_anew(self) -> None:
        fleet = self.fleet
        for name, seen in fleet.view(self.now).nodes.items():
            tenants = [fleet.allocations[id_] for id_ in fleet.tenants.get(name, ())]
            node, conditions = fleet.nodes[name], fleet.conditions.table
            anew = view_node(node, fleet.claims, fleet.status(name), conditions, tenants)
            assert seen == anew

    @invariant()
    def every_lease_has_an_end(self) -> None:
        granted = set(self.some(AllocationState.GRANTED))
        assert set(self.fleet.expires) == granted
        assert all(self.fleet.expires[id_] == self.alive_until[id_] for id_ in granted)

    def teardown(self) -> None:
        """When the faults stop and everybody goes, everything comes to its end."""
        for agent in self.agents:
            self.connect_agent(agent)
        for _ in range(6):
            ids = self.some(AllocationState.WAITING, AllocationState.GRANTED)
            self.decide(*(Release(id_) for id_ in ids))
            for agent in self.agents:
                self.do_everything(agent)
        left = [a for a in self.fleet.allocations.values() if a.state != "ended"]
        assert left == []
        assert self.fleet.claims == {}
        assert [agent.journal for agent in self.agents] == [{}, {}]


def hold_the_law(examples: int, steps: int, *, same_every_time: bool, shrink: bool = True) -> None:
    run_state_machine_as_test(
        Law,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            phases=list(Phase) if shrink else [Phase.generate],
            derandomize=same_every_time,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_law() -> None:
    hold_the_law(250, 50, same_every_time=True)


@pytest.mark.slow
def test_law_with_other_seeds() -> None:
    hold_the_law(2000, 80, same_every_time=False)
