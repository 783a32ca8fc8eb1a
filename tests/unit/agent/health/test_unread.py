"""GPUs that cannot be read: what the driver says of them, and when nothing is known any more."""

import pytest

from stoker.agent.facts import Fact
from stoker.agent.verdicts import Check, RepairAction, Verdict
from stoker.testing.judged_node import JudgedNode

BAD, GOOD, UNKNOWN = Verdict.UNHEALTHY, Verdict.HEALTHY, Verdict.UNKNOWN
NONE, RESET, REBOOT = RepairAction.NONE, RepairAction.RESET_GPU, RepairAction.REBOOT

LOST = [
    (
        "gpu_lost",
        REBOOT,
        "the driver has lost the GPU; only a reboot brings it back; the host needs a reboot",
    ),
    (
        "reset_required",
        RESET,
        (
            "the driver can do nothing with the GPU; it does not work before a reset; "
            "the GPU needs a reset"
        ),
    ),
]


@pytest.mark.parametrize(("kind", "action", "reason"), LOST, ids=[row[0] for row in LOST])
def test_gpu_that_the_driver_gives_up_is_unhealthy_at_once(
    kind: str, action: RepairAction, reason: str
) -> None:
    node = JudgedNode()
    node.run(30.0)
    node.cards[0].failure = (kind, "nvmlDeviceGetPowerUsage: the driver gave it up")
    node.tick()
    health = node.gpu()
    assert (health.verdict, health.action, health.check) == (BAD, action, Check.GPU_LOST)
    assert health.reason == reason
    node.run(60.0)
    faults = [(each.check, each.code) for each in node.gpu().faults]
    assert faults == [(Check.GPU_LOST, kind), (Check.STALE, "")]
    node.cards[0].failure = None
    node.tick()
    assert node.gpu().faults == ()


def test_gpu_that_is_not_read_is_unknown_after_some_time() -> None:
    node = JudgedNode()
    node.run(30.0)
    node.cards[0].failure = ("driver_timeout", "no answer within 1 s")
    node.run(9.0, step=1.0)
    assert node.gpu().verdict is GOOD
    node.tick()
    assert (node.gpu().verdict, node.gpu().action) == (UNKNOWN, NONE)
    assert node.gpu().reason == (
        "not read: no answer within 1 s; nothing is known of it now; nothing is to be done about "
        "the GPU"
    )
    assert node.gpu(1).verdict is GOOD
    node.cards[0].failure = None
    node.tick()
    assert node.gpu().verdict is GOOD


def test_one_tick_that_fails_says_nothing_however_far_apart_ticks_are() -> None:
    node = JudgedNode()
    node.run(300.0, step=60.0)
    node.cards[0].failure = ("driver_timeout", "no answer within 1 s")
    node.run(120.0, step=60.0)
    assert node.gpu().verdict is GOOD
    node.run(60.0, step=60.0)
    assert node.gpu().verdict is UNKNOWN


def test_all_gpus_are_unknown_while_the_driver_is_silent_and_worse_stays_worse() -> None:
    node = JudgedNode()
    node.cards[0].facts[Fact.REMAPPED_ROWS_FAILED] = 1.0
    node.run(30.0)
    node.silence(20.0, "the driver is released by an operator")
    assert (node.gpu(0).verdict, node.gpu(0).check) == (BAD, Check.ROW_REMAP_FAILED)
    assert node.gpu(1).verdict is UNKNOWN
    assert node.gpu(1).reason.startswith("not read: the driver is released by an operator; ")
    node.tick()
    assert node.gpu(1).verdict is GOOD
