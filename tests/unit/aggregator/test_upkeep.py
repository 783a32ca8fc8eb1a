"""Health by story: verdicts become events, GPUs are cordoned, and used again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.unit.aggregator.builders import (
    START,
    Scene,
    durable_tables,
    make_facts,
    make_gpus,
    make_health,
    whole,
)

from stoker.aggregator import events as e
from stoker.aggregator.conditions import FAILURES_KEPT_SECONDS, FAILURES_MAX
from stoker.aggregator.cordoning import CordonPolicy
from stoker.aggregator.decisions import Round, next_due
from stoker.aggregator.fleet import Fleet
from stoker.aggregator.lemons import Failure
from stoker.aggregator.lives import InvalidTransition
from stoker.aggregator.model import AllocationState, MissingGpu
from stoker.aggregator.upkeep import CordonWatch
from stoker.aggregator.verdicts import GpuHealth, RepairAction, Verdict
from stoker.aggregator.wishes import Cordon, Drain, Refused, Settled, Uncordon, Unknown

XID = make_health("n1-0")
ECC = make_health("n1-0", check="ecc_uncorrected")


def kinds(events: Sequence[e.DurableEvent]) -> list[str]:
    return [type(event).__name__ for event in events]


def since(scene: Scene, version: int) -> list[str]:
    return kinds(scene.log[version:])


# --- verdicts become events


def test_first_verdicts_are_kept_with_the_slot() -> None:
    gpus = tuple(replace(gpu, pci_bus_id=f"0000:0{gpu.index}") for gpu in make_gpus("n1", 2))
    scene = Scene(make_facts(gpus=gpus))
    before = len(scene.log)
    scene.judge("n1", make_health("n1-1", Verdict.DEGRADED))
    changes = [each for each in scene.log[before:] if isinstance(each, e.GpuHealthChanged)]
    assert [(c.uuid, c.slot, c.health.verdict) for c in changes] == [
        ("n1-0", "0000:00", Verdict.HEALTHY),
        ("n1-1", "0000:01", Verdict.DEGRADED),
    ]
    assert len(scene.log) == before + 2


@pytest.mark.parametrize(
    ("change", "is_event"),
    [
        ({}, False),
        ({"reason": "other words"}, False),
        ({"verdict": Verdict.DEGRADED}, True),
        ({"action": RepairAction.RMA}, True),
        ({"check": "ecc_uncorrected"}, True),
        ({"since": 2.0}, True),
    ],
)
def test_what_changes_nothing_but_words_is_no_event(change: dict[str, Any], is_event: bool) -> None:
    scene = Scene(make_facts())
    scene.judge("n1", XID)
    before = len(scene.log)
    scene.judge("n1", replace(XID, **change))
    assert ("GpuHealthChanged" in since(scene, before)) == is_event


def test_report_of_a_stream_that_broke_decides_nothing() -> None:
    scene = Scene(make_facts())
    scene.frame("n1", health=(XID,))
    scene.disconnect("n1")
    scene.decide()
    assert scene.fleet.conditions.table == {}


def test_verdict_of_a_gpu_that_its_node_misses_is_kept() -> None:
    scene = Scene(make_facts(gpus=7))
    scene.judge("n1", make_health("gone", check="gpu_missing"))
    condition = scene.fleet.conditions.table["gone"]
    assert condition.verdict is Verdict.UNHEALTHY
    assert scene.cordons() == {}, "no node has it, so there is nothing to keep from use"


def test_verdict_of_a_node_that_is_not_known_is_a_bug() -> None:
    with pytest.raises(InvalidTransition, match="no node n9"):
        Fleet().apply(e.GpuHealthChanged(START, "n9", "u", "", make_health("u")), 1)


# --- cordons by health


def test_unhealthy_gpu_is_cordoned_and_the_refusal_says_why() -> None:
    scene = Scene(make_facts(gpus=8))
    scene.judge("n1", XID)
    assert scene.cordons() == {"n1-0": "xid was found"}
    granted = scene.grant(whole(7))
    assert "n1-0" not in {device.uuid for device in granted.devices}
    refused = scene.allocate(whole())
    assert isinstance(refused, Refused)
    assert "GPU 0 is cordoned: xid was found (for 0ms)" in refused.refusals.summary


def test_recovered_gpu_is_used_again_after_a_minute() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.judge("n1", XID)
    scene.later(5.0)
    scene.judge("n1")
    scene.decide()
    assert next_due(scene.fleet, scene.watch) == scene.now + 60.0
    scene.later(59.9)
    scene.decide()
    assert scene.cordons() == {"n1-0": "xid was found"}
    scene.later(0.1)
    scene.decide()
    assert scene.cordons() == {}
    scene.grant(whole())


def test_gpu_that_flaps_is_not_used_again() -> None:
    scene = Scene(make_facts(gpus=1))
    for number in range(10):
        scene.judge("n1", replace(XID, since=float(number)))
        scene.later(59.0)
        scene.judge("n1")
        scene.later(59.0)
        scene.decide()
        assert scene.cordons() != {}


def test_allocation_on_a_gpu_that_becomes_unhealthy_stays() -> None:
    scene = Scene(make_facts(gpus=1))
    mine = scene.grant(whole())
    scene.judge("n1", XID)
    assert scene.state(mine.id) is AllocationState.GRANTED
    assert scene.fleet.claims.keys() == {"n1-0"}


def test_cordon_names_the_fault_that_it_is_for_now() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.judge("n1", XID)
    begun = scene.now
    scene.later(10.0)
    scene.judge("n1", ECC)
    cordon = scene.fleet.conditions.cordon_of("n1-0")
    assert cordon is not None
    assert (cordon.reason, cordon.at) == ("ecc_uncorrected was found", begun)


def test_nothing_is_decided_before_a_node_that_came_back_has_judged() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.judge("n1", XID)
    scene.later(1.0)
    scene.judge("n1")
    scene.disconnect("n1")
    scene.now += 600.0
    scene.decide()
    assert scene.cordons() != {}, "nobody knows how it is"
    scene.connect("n1")
    scene.report("n1")
    scene.decide()
    assert scene.cordons() != {}, "it has not said yet"
    scene.judge("n1")
    assert scene.cordons() != {}, "it has just said it"
    scene.later(60.0)
    scene.decide()
    assert scene.cordons() == {}


def test_gpu_is_not_well_for_longer_than_the_aggregator_has_listened() -> None:
    """While it stood still, frames have gathered that say otherwise."""
    scene = Scene(make_facts(gpus=1))
    scene.judge("n1", XID)
    scene.later(5.0)
    scene.judge("n1")
    scene.now += 600.0
    scene.fleet.note(e.Recovered(scene.now))
    scene.decide()
    assert scene.cordons() != {}
    scene.later(60.0)
    scene.decide()
    assert scene.cordons() == {}


def test_more_than_the_share_are_not_cordoned_and_stay_placeable() -> None:
    scene = Scene(make_facts(gpus=8), policy=CordonPolicy(share_max=0.25))
    scene.judge("n1", *(make_health(f"n1-{i}") for i in range(8)))
    assert scene.cordons().keys() == {"n1-0", "n1-1"}
    scene.grant(whole(6))


def test_place_of_one_that_recovers_goes_to_the_next() -> None:
    scene = Scene(make_facts(gpus=4))
    scene.judge("n1", XID)
    scene.later(1.0)
    ill = make_health("n1-1")
    scene.judge("n1", XID, ill)
    assert scene.cordons().keys() == {"n1-0"}
    scene.judge("n1", ill)
    scene.later(60.0)
    scene.decide()
    assert scene.cordons().keys() == {"n1-1"}


def test_larger_fleet_may_have_more_of_them() -> None:
    scene = Scene(make_facts("n1", 8))
    scene.judge("n1", make_health("n1-0"), make_health("n1-1"))
    assert len(scene.cordons()) == 1
    scene.join(make_facts("n2", 8))
    scene.decide()
    assert len(scene.cordons()) == 2


def test_replaced_card_loses_its_cordon_and_its_verdict() -> None:
    scene = Scene(make_facts(gpus=2))
    scene.judge("n1", XID)
    fresh = replace(make_gpus("n1", 2)[0], uuid="fresh")
    scene.change_facts("n1", gpus=(fresh, make_gpus("n1", 2)[1]))
    scene.decide()
    assert scene.cordons() == {}
    scene.report("n1")
    scene.judge("n1")  # the card that was there is not told of any more
    assert scene.fleet.conditions.table.keys() == {"fresh", "n1-1"}
    scene.grant(whole(2))
    assert [each.uuid for each in scene.fleet.conditions.failures] == ["n1-0"]


def test_card_that_was_moved_takes_its_cordon_along() -> None:
    scene = Scene(make_facts("n1", 1), make_facts("n2", 0))
    scene.decide(Cordon("n1", "loud", "n1-0"))
    scene.disconnect("n1")
    scene.change_facts("n2", gpus=make_gpus("n1", 1))
    scene.report("n2")
    scene.judge("n2", XID)
    assert scene.cordons() == {"n1-0": "loud"}
    assert scene.fleet.conditions.table["n1-0"].node == "n2"
    assert isinstance(scene.allocate(whole()), Refused)


def test_missing_gpu_keeps_its_cordon() -> None:
    scene = Scene(make_facts(gpus=2))
    scene.judge("n1", XID)
    scene.frame("n1", missing=(MissingGpu(0, "n1-0", "gpu_lost", "it fell off the bus"),))
    scene.decide()
    assert scene.cordons().keys() == {"n1-0"}


# --- operators


def test_operators_cordon_is_not_lifted_by_health() -> None:
    scene = Scene(make_facts(gpus=2))
    assert scene.decide(Cordon("n1", "fan is loud", "n1-0")) == [Settled("n1")]
    scene.judge("n1", XID)
    scene.judge("n1")
    scene.later(3600.0)
    scene.decide()
    assert scene.cordons() == {"n1-0": "fan is loud"}
    assert "GpuUncordoned" not in kinds(scene.log)


def test_operators_cordon_takes_the_place_of_one_by_health() -> None:
    scene = Scene(make_facts(gpus=2))
    scene.judge("n1", XID)
    scene.decide(Cordon("n1", "I look at it", "n1-0"))
    scene.judge("n1")
    scene.later(3600.0)
    scene.decide()
    assert scene.cordons() == {"n1-0": "I look at it"}


def test_uncordon_of_an_operator_holds_for_the_same_fault() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.judge("n1", XID)
    scene.decide(Uncordon("n1", "n1-0"))
    scene.later(60.0)
    scene.judge("n1", replace(XID, reason="xid was found, twice"))
    assert scene.cordons() == {}
    scene.judge("n1", replace(XID, verdict=Verdict.UNKNOWN, check="stale", since=9.0))
    scene.judge("n1", XID)  # it is read again, and as it was
    assert scene.cordons() == {}
    scene.judge("n1", replace(XID, since=100.0))
    assert scene.cordons() == {"n1-0": "xid was found"}


def test_fault_that_was_over_and_is_back_is_another_one() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.judge("n1", XID)
    scene.decide(Uncordon("n1", "n1-0"))
    scene.judge("n1")
    assert scene.fleet.conditions.table["n1-0"].acknowledged is None
    scene.judge("n1", replace(XID, since=2.0))
    assert scene.cordons() != {}


def test_uncordon_of_ones_own_cordon_is_not_fought_either() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.decide(Cordon("n1", "I look at it", "n1-0"))
    scene.judge("n1", XID)
    scene.decide(Uncordon("n1", "n1-0"))
    scene.decide()
    assert scene.cordons() == {}


@pytest.mark.parametrize(
    "wish",
    [
        Cordon("n1", "r", "n1-0"),
        Drain("n1", "r", "n1-0"),
        Cordon("n1", "r"),
        Drain("n1", "r", grace_seconds=5.0),
    ],
)
def test_wish_that_is_done_already_is_no_event(wish: Cordon | Drain) -> None:
    scene = Scene(make_facts())
    scene.decide(wish)
    before = len(scene.log)
    scene.decide(wish)
    assert since(scene, before) == []
    scene.decide(Uncordon("n1", wish.gpu_uuid))
    assert len(scene.log) == before + 1
    scene.decide(Uncordon("n1", wish.gpu_uuid))
    assert len(scene.log) == before + 1


def test_gpu_that_is_not_there_is_unknown_and_those_that_are_are_named() -> None:
    scene = Scene(make_facts("n1", 2), make_facts("n2", 1))
    for wish in (Cordon("n1", "r", "n2-0"), Drain("n1", "r", "n2-0"), Uncordon("n1", "n2-0")):
        assert scene.decide(wish) == [
            Unknown("GPU n2-0 of node n1", "it has n1-0 (GPU 0), n1-1 (GPU 1)")
        ]
    assert scene.decide(Drain("n9", "r")) == [Unknown("node n9")]


def test_uncordon_of_a_node_leaves_those_of_its_gpus() -> None:
    scene = Scene(make_facts(gpus=2))
    scene.decide(Cordon("n1", "repair"), Cordon("n1", "fan is loud", "n1-1"))
    scene.decide(Uncordon("n1"))
    assert scene.cordons() == {"n1-1": "fan is loud"}
    scene.grant(whole())
    assert isinstance(scene.allocate(whole()), Refused)


def test_card_that_was_taken_out_stays_cordoned_until_an_operator_ends_it() -> None:
    scene = Scene(make_facts(gpus=2))
    scene.decide(Cordon("n1", "fan is loud", "n1-0"))
    scene.change_facts("n1", gpus=make_gpus("n1", 2)[1:])
    scene.judge("n1")
    assert scene.cordons() == {"n1-0": "fan is loud"}
    scene.decide(Uncordon("n1", "n1-0"))
    scene.judge("n1")
    assert "n1-0" not in scene.fleet.conditions.table


def test_nobody_waits_for_a_gpu_that_is_cordoned() -> None:
    """A request that needs it keeps no place on its node, until it is used again."""
    scene = Scene(make_facts(gpus=2))
    scene.decide(Cordon("n1", "loud", "n1-0"))
    pair = scene.wait(whole(2))
    one = scene.grant(whole())
    scene.obey("n1")
    scene.decide(Uncordon("n1", "n1-0"))
    assert isinstance(scene.allocate(whole()), Refused), "now it is kept for the one that waits"
    scene.hand_back(one.id)
    scene.decide(serve=True)
    assert scene.state(pair.id) is AllocationState.GRANTED


# --- restarts, failures, and when it is looked at


def test_restart_knows_the_same_verdicts_and_cordons() -> None:
    scene = Scene(make_facts("n1", 8), make_facts("n2", 8))
    scene.judge("n1", XID, make_health("n1-1", Verdict.DEGRADED))
    scene.judge("n2", make_health("n2-3"), make_health("n2-4"))
    scene.decide(Cordon("n2", "loud", "n2-5"), Uncordon("n1", "n1-0"))
    scene.decide()
    expected = durable_tables(scene.fleet)
    for fleet in (scene.replayed(), Fleet.restored(scene.fleet.snapshot())):
        assert durable_tables(fleet) == expected
        fleet.note(e.Recovered(scene.now + 3600.0))
        one = Round(fleet, scene.now + 3600.0, scene.new_id, watch=CordonWatch())
        one.housekeep(set(fleet.unreconciled))
        assert one.events == [], "nobody has judged anything since"


def test_failures_are_those_that_made_a_gpu_unhealthy() -> None:
    scene = Scene(make_facts(gpus=2))

    def judge(*verdicts: GpuHealth) -> None:
        scene.later(10.0)
        scene.judge("n1", *verdicts)

    judge(XID)
    judge(replace(XID, action=RepairAction.REBOOT))  # the same
    judge(replace(XID, verdict=Verdict.UNKNOWN, check="stale"))
    judge(XID)  # the same, after it was not read for a while
    judge(make_health("n1-0", Verdict.DEGRADED))
    judge()
    judge(replace(ECC, since=5.0))
    assert scene.fleet.conditions.failures == (
        Failure(START + 10.0, "n1-0", "n1", "", "xid"),
        Failure(START + 70.0, "n1-0", "n1", "", "ecc uncorrected"),
    )


def test_failures_are_forgotten_in_time_and_are_bounded() -> None:
    scene = Scene(make_facts(gpus=1))
    scene.judge("n1", XID)
    scene.now += FAILURES_KEPT_SECONDS
    scene.judge("n1")
    assert not scene.fleet.conditions.failures
    many = tuple(Failure(scene.now, f"other-{i}", "n1", "") for i in range(FAILURES_MAX + 500))
    scene.fleet.conditions.restore((), many)
    scene.judge("n1", replace(XID, since=7.0))
    assert len(scene.fleet.conditions.failures) == FAILURES_MAX
    assert scene.fleet.conditions.failures[-1].uuid == "n1-0"


def test_cordons_are_looked_at_again_only_when_something_changed() -> None:
    scene = Scene(make_facts(gpus=4))
    scene.judge("n1", XID, make_health("n1-1"))
    scene.decide()  # once more on what was stored
    assert next_due(scene.fleet, scene.watch) is None
    scene.later(5.0)
    assert next_due(scene.fleet, scene.watch) is None
    scene.judge("n1", make_health("n1-1"))
    assert next_due(scene.fleet, scene.watch) == 0.0, "what was decided may not have been stored"


def test_what_the_store_refused_is_decided_again() -> None:
    scene = Scene(make_facts(gpus=4))
    scene.frame("n1", health=(XID,))
    refused, stored = (
        Round(scene.fleet, scene.now, scene.new_id, watch=scene.watch) for _ in range(2)
    )
    for one in (refused, stored):
        one.housekeep({"n1"})
        assert kinds(one.events) == ["GpuHealthChanged", "GpuCordoned"]
    scene.record(*stored.events)
    once_more = Round(scene.fleet, scene.now, scene.new_id, watch=scene.watch)
    once_more.housekeep({"n1"})
    assert once_more.events == []
