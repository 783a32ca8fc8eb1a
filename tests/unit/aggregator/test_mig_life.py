"""Allocations of MIG devices while their card is partitioned anew, or not at all any more."""

from dataclasses import replace

from tests.unit.aggregator.builders import GIB, Scene, make_facts, make_gpus, share, whole

from stoker.aggregator.model import AllocationState, Gpu, MigDevice
from stoker.aggregator.wishes import Refused, Settled

HALVES = tuple(MigDevice(f"MIG-{i}", "3g.40gb", 40 * GIB, i, 0) for i in (1, 2))


def partitioned(gpu: Gpu) -> Gpu:
    return replace(gpu, mig_enabled=True, mig_devices=HALVES)


def one_card(gpu: Gpu) -> Scene:
    return Scene(make_facts(gpus=(gpu,)))


def test_card_whose_mig_mode_went_off_under_a_tenant_gives_nothing_until_that_is_over() -> None:
    (plain,) = make_gpus("n1", 1)
    scene = one_card(partitioned(plain))
    mine = scene.grant(whole(mig_profile="3g.40gb"))
    scene.obey("n1")
    scene.change_facts("n1", gpus=(replace(plain, mig_enabled=False),))
    for request in (share(20), share(1, compute_milli=100), whole()):
        assert isinstance(scene.allocate(request), Refused), request
    assert scene.state(mine.id) is AllocationState.GRANTED
    scene.hand_back(mine.id)
    assert isinstance(scene.allocate(share(20)), Settled)


def test_card_whose_mig_mode_went_on_under_a_share_gives_no_mig_device_until_that_is_over() -> None:
    (plain,) = make_gpus("n1", 1)
    scene = one_card(plain)
    mine = scene.grant(share(20))
    scene.obey("n1")
    scene.change_facts("n1", gpus=(partitioned(plain),))
    assert isinstance(scene.allocate(whole(mig_profile="3g.40gb")), Refused)
    scene.hand_back(mine.id)
    assert isinstance(scene.allocate(whole(mig_profile="3g.40gb")), Settled)
