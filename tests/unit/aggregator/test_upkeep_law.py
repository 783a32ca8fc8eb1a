"""The law of cordons: whatever nodes judge, operators wish and fleets become, in whatever order,
never more GPUs than the share are cordoned for their health, and an operator's word stands.
"""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from tests.unit.aggregator.builders import (
    Scene,
    durable_tables,
    make_facts,
    make_gpus,
    make_health,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.cordoning import CordonAt, CordonPolicy
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.upkeep import CordonWatch
from stoker.aggregator.verdicts import FaultId, RepairAction, Verdict
from stoker.aggregator.wishes import Allocate, Cordon, Drain, Settled, Uncordon

NODES = ("n1", "n2", "n3")
GPUS_MAX = 6
NODE = st.sampled_from(NODES)
NUMBER = st.integers(0, GPUS_MAX - 1)


class Law(RuleBasedStateMachine):
    @initialize(
        share=st.sampled_from((0.0, 0.1, 0.2, 0.5, 1.0)),
        least=st.integers(0, 3),
        cordon_at=st.sampled_from(CordonAt),
    )
    def begin(self, share: float, least: int, cordon_at: CordonAt) -> None:
        self.policy = CordonPolicy(cordon_at, share, least, uncordon_after_seconds=60.0)
        self.scene = Scene(*(make_facts(name, 4) for name in NODES), policy=self.policy)
        self.scene.decide()
        # What operators want, by UUID: a cordon for that reason, or none for that fault.
        self.cordoned: dict[str, str] = {}
        self.acknowledged: dict[str, FaultId] = {}
        self.faults = 0

    def decide(self) -> None:
        """Until nothing is left to do, as the loop does."""
        self.scene.decide()
        version = self.scene.fleet.version
        self.scene.decide()
        assert self.scene.fleet.version == version, "done once is done"
        # Of a card that was taken out and is told of by nobody all is forgotten.
        table = self.scene.fleet.conditions.table
        self.acknowledged = {u: fault for u, fault in self.acknowledged.items() if u in table}

    # --- what happens

    @rule(
        name=NODE,
        verdicts=st.lists(
            st.tuples(
                st.sampled_from(Verdict),
                st.sampled_from(RepairAction),
                st.integers(0, 3),  # so that faults come back, too
            ),
            min_size=GPUS_MAX,
            max_size=GPUS_MAX,
        ),
    )
    def node_judges(self, name: str, verdicts: list[tuple[Verdict, RepairAction, int]]) -> None:
        if self.scene.fleet.status(name).session == 0:
            return
        gpus = self.scene.gpus_of(name)
        told = [
            replace(make_health(gpu.uuid, verdict), action=action, since=float(since))
            for gpu, (verdict, action, since) in zip(gpus, verdicts, strict=False)
        ]
        self.scene.judge(name, *told)
        for each in told:
            if each.verdict is Verdict.HEALTHY:
                self.acknowledged.pop(each.uuid, None)
        self.decide()

    @rule(seconds=st.sampled_from((1.0, 30.0, 60.0, 600.0)))
    def time_passes(self, seconds: float) -> None:
        self.scene.later(seconds)
        self.decide()

    @rule(name=NODE)
    def line_breaks(self, name: str) -> None:
        if self.scene.fleet.status(name).session:
            self.scene.disconnect(name)
        self.decide()

    @rule(name=NODE)
    def node_comes_back(self, name: str) -> None:
        self.scene.connect(name)
        self.scene.report(name)
        self.decide()

    @rule(name=NODE, count=st.integers(0, GPUS_MAX))
    def cards_come_and_go(self, name: str, count: int) -> None:
        self.scene.change_facts(name, gpus=make_gpus(name, count))
        self.decide()

    @rule(left=NODE)
    def most_of_the_fleet_goes(self, left: str) -> None:
        for name in NODES:
            if name != left:
                self.scene.change_facts(name, gpus=())
        self.decide()

    @rule(name=NODE)
    def all_cards_of_a_node_are_bad(self, name: str) -> None:
        if self.scene.fleet.status(name).session == 0:
            return
        self.scene.judge(name, *(make_health(gpu.uuid) for gpu in self.scene.gpus_of(name)))
        self.decide()

    @rule(name=NODE, number=NUMBER, is_drain=st.booleans())
    def operator_cordons(self, name: str, number: int, is_drain: bool) -> None:
        uuid, reason = f"{name}-{number}", f"reason {number}"
        wish = Drain(name, reason, uuid, 30.0) if is_drain else Cordon(name, reason, uuid)
        if self.scene.decide(wish) == [Settled(name)]:
            self.cordoned[uuid] = reason
        self.decide()

    @rule(name=NODE, number=NUMBER)
    def operator_uncordons(self, name: str, number: int) -> None:
        uuid = f"{name}-{number}"
        condition = self.scene.fleet.conditions.get(uuid)
        is_cordoned = condition is not None and condition.cordon is not None
        if self.scene.decide(Uncordon(name, uuid)) == [Settled(name)]:
            self.cordoned.pop(uuid, None)
            health = condition.health if condition is not None and is_cordoned else None
            if health is not None and health.verdict is not Verdict.HEALTHY:
                self.acknowledged[uuid] = health.fault
        self.decide()

    @rule(gpus=st.integers(1, 3))
    def somebody_allocates(self, gpus: int) -> None:
        cordoned = self.scene.cordons().keys()
        (reply,) = self.scene.decide(Allocate(whole(gpus)))
        if isinstance(reply, Settled):
            devices = self.scene.fleet.allocations[reply.id].devices
            assert cordoned.isdisjoint(device.uuid for device in devices)

    @rule(is_snapshot=st.booleans())
    def aggregator_is_restarted(self, is_snapshot: bool) -> None:
        before = self.scene.fleet
        fleet = Fleet.restored(before.snapshot()) if is_snapshot else self.scene.replayed()
        assert durable_tables(fleet) == durable_tables(before)
        fleet.note(e.Recovered(self.scene.now))
        self.scene.fleet = fleet
        self.scene.watch = CordonWatch(self.policy)
        self.decide()

    # --- what holds

    @invariant()
    def share_is_kept(self) -> None:
        fleet = self.scene.fleet
        assert len(fleet.conditions.cordoned_by_health) <= self.policy.limit(len(fleet.homes))

    @invariant()
    def operators_word_stands(self) -> None:
        table = self.scene.fleet.conditions.table
        cordons = {uuid: each.cordon for uuid, each in table.items() if each.cordon is not None}
        by_operator = {uuid: c.reason for uuid, c in cordons.items() if not c.by_health}
        assert by_operator == self.cordoned
        for uuid, fault in self.acknowledged.items():
            cordon = cordons.get(uuid)
            assert cordon is None or not cordon.by_health or cordon.fault != fault


def test_law_of_cordons() -> None:
    run_state_machine_as_test(
        Law, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
