"""What holds whatever happens: of any order of faults, repairs, restarts and lines of the log."""

from collections.abc import Callable
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.agent.facts import Fact
from stoker.agent.health.history import FAULTS_PER_GPU_MAX
from stoker.agent.health.judging import judge_gpu
from stoker.agent.health.meanings import ACTION_RANK, VERDICT_RANK
from stoker.agent.health.options import HealthConfig
from stoker.agent.health.policy import Policy, policy_of
from stoker.agent.verdicts import (
    Check,
    FaultRecord,
    GpuHealth,
    KernelLine,
    Life,
    RepairAction,
    Verdict,
)
from stoker.testing.judged_node import JudgedNode

# One step of what may happen to a node: its words, and what they do.
Step = tuple[str, float]

_FACTS = {
    "uncorrected": (Fact.ECC_UNCORRECTED_VOLATILE_ERRORS, 2.0),
    "corrected": (Fact.ECC_CORRECTED_VOLATILE_ERRORS, 500.0),
    "pending": (Fact.REMAPPED_ROWS_PENDING, 1.0),
    "failed": (Fact.REMAPPED_ROWS_FAILED, 1.0),
    "replays": (Fact.PCIE_REPLAYS, 5000.0),
    "narrow": (Fact.PCIE_LINK_WIDTH, 8.0),
    "hot": (Fact.TEMPERATURE_CELSIUS, 99.0),
    "asked": (Fact.RECOVERY_ACTION, 1.0),
    "impersistent": (Fact.PERSISTENCE_MODE, 0.0),
}
_LINES = (
    "NVRM: Xid ({}): 79, pid=1, name=a, GPU has fallen off the bus.",
    "NVRM: Xid ({}): 13, Graphics Exception",
    "NVRM: Xid ({}): 119, Timeout",
    "NVRM: Xid ({}): 145, RLW_REMAP Fatal XC0 i0 Link 01 (0x00000004 0x00000040)",
    "NVRM: Xid ({}): 154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset)",
    "NVRM: Xid ({}): 154, GPU recovery action changed from 0x1 (GPU Reset) to 0x0 (None)",
    "NVRM: GPU 0000:10:00.0: GPU has fallen off the bus.",
    "NVRM: GPU 0000:10:00.0: RmInitAdapter failed! (0x26:0x56:1474)",
    "NVRM: The NVIDIA GPU 0000:10:00.0",
    "NVRM: fallen off the bus and is not responding to commands.",
    "NVRM: loading NVIDIA UNIX x86_64 Kernel Module  570.86.15",
    "nvidia 0000:10:00.0: PCIe Bus Error: severity=Uncorrected (Fatal), type=Data",
)
_REASONS = ("hw_thermal_slowdown", "hw_slowdown", "hw_power_brake_slowdown", "sw_power_cap")


def _mended(node: JudgedNode) -> None:
    card = node.cards[0]
    card.facts.clear()
    card.by_label.clear()
    card.reasons.clear()
    card.failure, card.is_gone = None, False
    node.look()


def _gone(node: JudgedNode) -> None:
    node.cards[0].is_gone = True
    node.look()


def _link_down(node: JudgedNode) -> None:
    node.cards[0].by_label = {Fact.NVLINK_UP: {"3": 0.0}}


def _link_errors(node: JudgedNode) -> None:
    node.cards[0].by_label = {Fact.NVLINK_RECOVERY_ERRORS: {"3": 1.0}}


ACTS: dict[str, Callable[[JudgedNode, float], object]] = {
    "wait": lambda node, amount: node.run(amount * 30),
    "event": lambda node, amount: node.tick(xids={0: ((13, 79, 119, 145, 999)[int(amount) % 5],)}),
    "log": lambda node, amount: node.log(_LINES[int(amount) % len(_LINES)], after=1.0),
    "fact": lambda node, amount: node.cards[0].facts.update(
        [list(_FACTS.values())[int(amount) % len(_FACTS)]]
    ),
    "slowed": lambda node, amount: node.cards[0].reasons.update(
        {_REASONS[int(amount) % len(_REASONS)]: 1.0}
    ),
    "link": lambda node, _: _link_down(node),
    "link errors": lambda node, _: _link_errors(node),
    "lost": lambda node, amount: setattr(
        node.cards[0], "failure", (("gpu_lost", "reset_required", "timeout")[int(amount) % 3], "x")
    ),
    "gone": lambda node, _: _gone(node),
    "mended": lambda node, _: _mended(node),
    "silence": lambda node, amount: node.silence(amount),
    "reset": lambda node, _: node.reset(),
    "reboot": lambda node, amount: node.reboot(keeps=bool(int(amount) % 2)),
    "forgive": lambda node, _: node.forgive(),
}
STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(ACTS)), st.floats(0, 25, allow_nan=False)), max_size=14
)


def act(node: JudgedNode, steps: list[Step]) -> None:
    for name, amount in steps:
        ACTS[name](node, amount)
        node.tick(slow=True)


def judged(health: GpuHealth) -> GpuHealth:
    """Return it without how often: what is still so after a restart was seen once more."""
    seen = (replace(fault, count=0, last_at=0.0) for fault in health.faults)
    return replace(health, faults=tuple(seen))


def faults(node: JudgedNode, without: Check | None = None) -> list[object]:
    return [
        (each.check, each.code, each.verdict, each.action, each.since)
        for health in node.judge.gpus()
        for each in health.faults
        if each.check is not without
    ]


@given(STEPS, st.sampled_from(list(Check)))
@settings(max_examples=150, deadline=None)
def test_check_that_is_off_has_no_effect_and_the_others_have_theirs(
    steps: list[Step], check: Check
) -> None:
    whole = JudgedNode()
    less = JudgedNode(policy=policy_of(HealthConfig(disabled=(check,))))
    for step in steps:
        act(whole, [step])
        act(less, [step])
        assert faults(less) == faults(whole, without=check)
    assert {key for key in less.history.faults if key[1] is check} == set()


@given(STEPS, st.integers(0, 14))
@settings(max_examples=150, deadline=None)
def test_agent_that_is_killed_at_any_time_comes_to_the_same_verdict(
    steps: list[Step], cut: int
) -> None:
    whole, killed = JudgedNode(), JudgedNode()
    for node in (whole, killed):
        act(node, steps[:cut])
    killed.restart()
    for node in (whole, killed):
        node.tick(slow=True)  # a counter that grows while no agent runs is not seen to grow
        act(node, steps[cut:])
    for node in (whole, killed):  # what is measured over time is measured again
        node.run(1300.0)
    told = [
        [(each.uuid, each.verdict, each.action, [f.code for f in each.faults]) for each in gpus]
        for gpus in (whole.judge.gpus(), killed.judge.gpus())
    ]
    assert told[0] == told[1]


@given(STEPS)
@settings(max_examples=100, deadline=None)
def test_records_add_up_to_what_is_judged(steps: list[Step]) -> None:
    node = JudgedNode()
    act(node, steps)
    node.run(130.0)  # what was put off is written
    before = [judged(health) for health in node.judge.gpus()]
    node.restart()
    assert [judged(health) for health in node.judge.gpus()] == before


@given(STEPS)
@settings(max_examples=100, deadline=None)
def test_verdict_is_the_worst_and_the_action_mends_all(steps: list[Step]) -> None:
    node = JudgedNode()
    act(node, steps)
    for health in node.judge.gpus():
        verdicts = [VERDICT_RANK[each.verdict] for each in health.faults]
        actions = [ACTION_RANK[each.action] for each in health.faults]
        assert VERDICT_RANK[health.verdict] == max(verdicts, default=0)
        assert ACTION_RANK[health.action] == max(actions, default=0)
        assert verdicts == sorted(verdicts, reverse=True)
        assert bool(health.reason) is (health.verdict is not Verdict.HEALTHY)
        assert (health.since is None) is (health.verdict is Verdict.HEALTHY)


@given(st.permutations([("79", 3), ("13", 1), ("999", 2), ("119", 2)]))
def test_order_of_the_records_does_not_matter(codes: list[tuple[str, int]]) -> None:
    records = [
        FaultRecord("GPU-a", Check.XID, code, "x", 1.0, 2.0, count, (Life("b"),))
        for code, count in codes
    ]
    health = judge_gpu("GPU-a", records, Policy())
    assert [each.code for each in health.faults] == ["79", "119", "999", "13"]
    assert (health.verdict, health.action) == (Verdict.UNHEALTHY, RepairAction.REBOOT)


@given(
    st.lists(st.sampled_from(_LINES), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_lines_count_once_however_often_they_are_read(
    texts: list[str], slices: list[tuple[int, int]]
) -> None:
    once, often = JudgedNode(), JudgedNode()
    for node in (once, often):
        node.run(30)
    lines = [
        KernelLine(number, once.at, text.replace("{}", "PCI:0000:10:00"))
        for number, text in enumerate(texts, 1)
    ]
    once.judge.take_kernel_log(once.at, lines)
    read = 0
    for begin, end in slices:
        start = min(begin, read)
        often.judge.take_kernel_log(often.at, lines[start : max(end, start)])
        read = max(read, min(end, len(lines)))
    often.judge.take_kernel_log(often.at, lines[read:])
    often.judge.take_kernel_log(often.at, lines)
    for node in (once, often):
        node.run(130.0)
    assert often.judge.gpus() == once.judge.gpus()


@given(st.lists(st.text(max_size=60), max_size=10), st.booleans())
@settings(deadline=None)
def test_any_text_is_taken(texts: list[str], after_a_prefix: bool) -> None:
    node = JudgedNode()
    prefix = "NVRM: Xid (PCI:0000:10:00): 79, " if after_a_prefix else ""
    node.log(*[prefix + text for text in texts])
    node.run(130.0)
    for health in node.judge.gpus():
        assert all(fault.reason.isprintable() for fault in health.faults)


@given(st.lists(st.tuples(st.integers(0, 99_999), st.integers(0, 1)), max_size=300))
@settings(max_examples=40, deadline=None)
def test_what_is_remembered_is_bounded(xids: list[tuple[int, int]]) -> None:
    node = JudgedNode()
    node.run(30)
    for number, index in xids:
        node.tick(xids={index: (number,)})
    for card in node.cards:
        mine = [key for key in node.history.faults if key[0] == card.uuid]
        assert len(mine) <= FAULTS_PER_GPU_MAX
    assert len(node.written) <= 4 * len(xids) + 10
