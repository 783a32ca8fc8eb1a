"""What is remembered is bounded: how much of it, how often it is written, and for how long."""

import pytest

from stoker.agent.facts import Fact
from stoker.agent.health.conditions import has_fallen
from stoker.agent.health.echoes import BURSTS_MAX, Echoes, Teller
from stoker.agent.health.history import FAULTS_PER_GPU_MAX
from stoker.agent.health.notes import ENDS_PER_MINUTE_MAX, SETTLE_SECONDS
from stoker.agent.health.windows import PARTS, Window
from stoker.agent.records import FaultForgotten, FaultNoted, KernelLogTaken, Record
from stoker.agent.verdicts import LIVES_MAX, Check, Verdict
from stoker.testing.judged_node import JudgedNode

DAY = 86400.0


def noted(records: list[Record], code: str | None = None) -> list[FaultNoted]:
    return [
        each for each in records if isinstance(each, FaultNoted) and code in (None, each.fault.code)
    ]


def test_storm_counts_and_is_written_once_a_minute() -> None:
    node = JudgedNode()
    node.run(30)
    text = "NVRM: Xid ({}): 13, pid=7, name=a, Graphics Exception"
    for _ in range(600):
        node.log(*[text] * 20)
        node.tick(xids={0: (13,) * 20})
    assert len(noted(node.written)) <= 600 / SETTLE_SECONDS + 1
    node.run(SETTLE_SECONDS)
    fault = node.fault(Check.XID)
    assert fault is not None
    assert fault.count == 600 * 20
    node.restart()
    assert node.fault(Check.XID) == fault


def test_storm_keeps_the_fault_from_being_quiet() -> None:
    node = JudgedNode()
    node.run(30)
    for _ in range(100):
        node.tick(60.0, xids={0: (13,)})
    assert node.fault(Check.XID) is not None
    node.run(600)
    assert node.fault(Check.XID) is None


def test_fault_that_comes_and_goes_is_written_some_times_a_minute_at_most() -> None:
    node = JudgedNode()
    node.run(60)
    before = len(node.written)
    for turn in range(300):
        node.cards[0].facts[Fact.REMAPPED_ROWS_PENDING] = float(turn % 2)
        node.tick(2.0, slow=True)
    assert len(node.written) - before <= (2 * ENDS_PER_MINUTE_MAX + 2) * 600 / SETTLE_SECONDS
    fault = node.history.faults[node.cards[0].uuid, Check.ROW_REMAP_PENDING, ""]
    node.cards[0].facts.clear()
    node.run(2 * SETTLE_SECONDS)
    fault = node.history.faults[node.cards[0].uuid, Check.ROW_REMAP_PENDING, ""]
    assert fault.count == 150
    assert fault.ended_at is not None


def test_condition_that_lasts_is_not_written_again_and_again() -> None:
    node = JudgedNode()
    node.cards[0].facts[Fact.REMAPPED_ROWS_PENDING] = 1.0
    node.run(DAY, step=60.0)
    assert len(noted(node.written)) <= 26


def test_detail_follows_what_the_driver_tells() -> None:
    node = JudgedNode()
    node.cards[0].facts[Fact.ECC_UNCORRECTED_VOLATILE_ERRORS] = 1.0
    node.run(120)
    node.cards[0].facts[Fact.ECC_UNCORRECTED_VOLATILE_ERRORS] = 2.0
    node.run(20)
    assert node.gpu().reason.startswith("2 uncorrected memory errors since")


def test_position_in_the_log_is_written_once_a_minute() -> None:
    node = JudgedNode()
    node.run(30)
    for _ in range(600):
        node.log("NVRM: Xid ({}): 13, x", after=1.0)
        node.tick()
    taken = [each for each in node.written if isinstance(each, KernelLogTaken)]
    assert len(taken) <= 1200 / SETTLE_SECONDS + 1
    node.run(120)
    assert node.history.kernel_log is not None
    assert node.history.kernel_log.sequence == 600


def test_crash_right_after_a_line_does_not_tell_of_it_again() -> None:
    node = JudgedNode()
    node.run(30)
    for number in (79, 119, 48):
        node.log(f"NVRM: Xid ({{}}): {number}, x", after=1.0)
        assert node.history.kernel_log is not None
        assert node.history.kernel_log.sequence == node.sequence


def test_crash_in_a_storm_loses_less_than_a_minute_and_counts_nothing_twice() -> None:
    node = JudgedNode()
    node.run(30)
    for _ in range(200):
        node.log("NVRM: Xid ({}): 13, x", after=1.0)
        node.tick(0.0)
    node.restart()
    node.run(120)
    fault = node.fault(Check.XID)
    assert fault is not None
    assert 200 - SETTLE_SECONDS <= fault.count <= 200


def test_what_could_not_be_written_is_written_once_there_is_room() -> None:
    node = JudgedNode()
    node.run(30)
    node.tick(xids={0: (13,)})
    node.disk_is_full = True
    node.log("NVRM: Xid ({}): 79, x")
    node.tick(xids={1: (119,)})
    node.reset(1)
    node.run(200)
    assert {key[2] for key in node.history.faults} == {"13"}
    node.disk_is_full = False
    node.run(SETTLE_SECONDS + 10)
    before = node.judge.gpus()
    assert node.gpu(1).verdict is Verdict.HEALTHY
    node.restart()
    assert node.judge.gpus() == before
    assert node.history.kernel_log is not None
    assert node.history.lives[node.cards[1].uuid].resets == 1
    written = len(node.written)
    node.run(600)
    assert len(node.written) <= written + 1  # nothing is told again for good


def test_faults_of_a_gpu_are_bounded_and_those_that_matter_stay() -> None:
    node = JudgedNode()
    node.run(30)
    node.tick(xids={0: (79,)})
    node.cards[0].facts[Fact.REMAPPED_ROWS_FAILED] = 1.0
    node.run(20)
    for number in range(500, 500 + 3 * FAULTS_PER_GPU_MAX):
        node.tick(xids={0: (number,)})
    mine = [key for key in node.history.faults if key[0] == node.cards[0].uuid]
    assert len(mine) == FAULTS_PER_GPU_MAX
    checks = {(key[1], key[2]) for key in mine}
    assert {(Check.XID, "79"), (Check.ROW_REMAP_FAILED, "")} <= checks
    assert (Check.XID, str(499 + 3 * FAULTS_PER_GPU_MAX)) in checks
    assert any(isinstance(each, FaultForgotten) for each in node.written)


def test_lives_are_bounded() -> None:
    node = JudgedNode()
    node.run(30)
    for _ in range(2 * LIVES_MAX):
        node.tick(xids={0: (79,)})
        node.reboot()
    fault = node.history.faults[node.cards[0].uuid, Check.XID, "79"]
    assert len(fault.lives) == LIVES_MAX
    assert fault.count == 2 * LIVES_MAX


def test_what_is_over_is_forgotten_after_a_month() -> None:
    node = JudgedNode()
    node.run(30)
    node.tick(xids={0: (119,)})
    node.reset()
    node.run(29 * DAY, step=3600.0)
    assert len(node.history.faults) == 1
    node.run(2 * DAY, step=3600.0)
    assert node.history.faults == {}


def test_what_lasts_is_not_forgotten() -> None:
    node = JudgedNode()
    node.run(30)
    node.tick(xids={0: (79,)})
    node.run(90 * DAY, step=3600.0)
    assert node.gpu().verdict is Verdict.UNHEALTHY


def test_clock_that_jumps_forgets_nothing() -> None:
    node = JudgedNode()
    node.run(30)
    node.tick(xids={0: (119,)})
    node.reset()
    node.at += 400 * DAY
    node.run(30)
    node.at -= 400 * DAY
    node.run(DAY, step=3600.0)
    assert len(node.history.faults) == 1


@pytest.mark.parametrize(
    ("before", "now", "is_reset"),
    [
        (1e9, 1e9 + 500, False),
        (1e9, 1e9, False),
        (1e9, 1e9 - 500, False),  # read out of step
        (1e9, 1e6, True),
        (1e9, 1e9 - 1e6, True),  # a counter that has nearly caught up
        (1500.0, 600.0, True),  # reset soon after it was loaded
        (1500.0, 800.0, False),
        (0.0, 0.0, False),
    ],
)
def test_energy_that_began_anew_tells_of_a_reset(before: float, now: float, is_reset: bool) -> None:
    assert has_fallen(before, now) is is_reset


# --- who tells of an Xid

EVENT, LOG, WORDS = Teller.EVENT, Teller.LOG, Teller.WORDS


@pytest.mark.parametrize(
    ("told", "count"),
    [
        ([(EVENT, 0)], 1),
        ([(EVENT, 0), (LOG, 1)], 1),
        ([(LOG, 0), (EVENT, 59)], 1),
        ([(LOG, 0), (WORDS, 0), (EVENT, 1)], 1),
        ([(WORDS, 0), (LOG, 0)], 1),
        ([(EVENT, 0), (EVENT, 1)], 2),
        ([(EVENT, 0), (EVENT, 1), (LOG, 2), (LOG, 2)], 2),
        ([(LOG, 0), (LOG, 0), (LOG, 0), (EVENT, 1), (EVENT, 1)], 3),
        ([(EVENT, 0), (LOG, 61)], 2),
        ([(LOG, 0), (LOG, 50), (LOG, 100), (EVENT, 101), (EVENT, 101), (EVENT, 101)], 3),
        ([(EVENT, 100), (LOG, 99)], 1),
    ],
)
def test_xid_that_is_told_twice_came_once(told: list[tuple[Teller, float]], count: int) -> None:
    echoes = Echoes()
    assert sum(not echoes.is_echo("GPU-a", 79, teller, at) for teller, at in told) == count


def test_other_gpus_and_numbers_are_no_echo() -> None:
    echoes = Echoes()
    assert not echoes.is_echo("GPU-a", 79, EVENT, 0)
    assert not echoes.is_echo("GPU-b", 79, LOG, 0)
    assert not echoes.is_echo("GPU-a", 48, LOG, 0)


def test_echoes_are_bounded() -> None:
    echoes = Echoes()
    for number in range(2 * BURSTS_MAX):
        echoes.is_echo("GPU-a", number, EVENT, 0)
    assert len(echoes) == BURSTS_MAX


# --- windows


def test_window_is_the_sum_of_its_seconds_to_one_part() -> None:
    window = Window(100.0)
    for second in range(1000):
        window.add(float(second), 1.0)
        assert len(window) <= PARTS + 1
        total = window.fade(float(second))
        assert min(second + 1, 100 - 100 / PARTS) <= total <= 100 + 100 / PARTS
    assert window.fade(1200.0) == 0.0


def test_window_forgets_exactly() -> None:
    window = Window(10.0)
    for step in range(10_000):
        window.add(step / 10, 0.1)
    assert window.fade(2000.0) == 0.0
