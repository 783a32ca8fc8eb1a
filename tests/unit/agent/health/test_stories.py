"""Faults over resets, boots and restarts: what lasts, what is mended, what comes back too often.

Every story is also told with the agent killed at each of its points: it knows what was written
down, and judges the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from stoker.agent.facts import Fact
from stoker.agent.health.judge import WAITING_LINES_MAX, Judge
from stoker.agent.health.policy import Policy
from stoker.agent.verdicts import Check, Ending, History, KernelLine, RepairAction, Verdict
from stoker.testing.judged_node import Card, JudgedNode

BAD, LESS, GOOD, UNKNOWN = (
    Verdict.UNHEALTHY,
    Verdict.DEGRADED,
    Verdict.HEALTHY,
    Verdict.UNKNOWN,
)
NONE, RESTART, DRAIN = RepairAction.NONE, RepairAction.RESTART_APP, RepairAction.DRAIN
RESET, REBOOT, RMA = RepairAction.RESET_GPU, RepairAction.REBOOT, RepairAction.RMA

DAY = 86400.0
FALLEN = "NVRM: Xid ({}): 79, pid=1234, name=python3, GPU has fallen off the bus."
GSP = "NVRM: Xid ({}): 119, pid=1, name=a, Timeout after 6s of waiting for RPC response from GSP!"

Step = Callable[[JudgedNode], object]


def log(*texts: str, after: float = 1.0) -> Step:
    return lambda node: node.log(*texts, after=after)


def event(*xids: int) -> Step:
    return lambda node: node.tick(xids={0: xids})


def wait(seconds: float, step: float = 10.0) -> Step:
    return lambda node: node.run(seconds, step)


def set_fact(fact: Fact, value: float, card: int = 0) -> Step:
    def act(node: JudgedNode) -> None:
        node.cards[card].facts[fact] = value
        node.tick(slow=True)

    return act


def lose(kind: str = "gpu_lost") -> Step:
    def act(node: JudgedNode) -> None:
        node.cards[0].failure = (kind, "nvmlDeviceGetUUID: it is lost")
        node.tick()

    return act


def reset(*, keeps: bool = False) -> Step:
    def act(node: JudgedNode) -> None:
        facts = dict(node.cards[0].facts)
        node.reset()
        if keeps:
            node.cards[0].facts.update(facts)
            node.tick(slow=True)

    return act


def reboot(*, keeps: bool = False) -> Step:
    return lambda node: node.reboot(keeps=keeps)


def vanish(node: JudgedNode) -> None:
    node.cards[0].is_gone = True
    node.look()
    node.tick()


def reboot_without(node: JudgedNode) -> None:
    node.cards[0].is_gone = True
    node.reboot(keeps=True)


def swap(node: JudgedNode) -> None:
    """Put another card into the slot of the first."""
    node.cards[0] = Card(77, node.cards[0].slot)
    node.reboot()


def forgive(node: JudgedNode) -> None:
    node.forgive()


def shift_clock(seconds: float) -> Step:
    def act(node: JudgedNode) -> None:
        node.at += seconds
        node.tick()

    return act


def other_driver(node: JudgedNode) -> None:
    node.driver_version = "580.12.01"
    node.look()
    node.tick()


def reset_unseen(node: JudgedNode) -> None:
    """Reset the GPU while no agent runs."""
    node.cards[0].energy_joules = 0.0
    node.restart()
    node.tick(slow=True)


@dataclass(frozen=True, slots=True)
class Story:
    """Steps, and the verdict at their end."""

    name: str
    steps: tuple[Step, ...]
    verdict: Verdict
    action: RepairAction = NONE
    faults: tuple[tuple[Check, str], ...] = ()


def story(
    name: str,
    *steps: Step,
    ends: tuple[Verdict, RepairAction] = (GOOD, NONE),
    faults: tuple[tuple[Check, str], ...] = (),
) -> Story:
    return Story(name, (wait(30), *steps), *ends, faults)


X79, X119 = (Check.XID, "79"), (Check.XID, "119")
LOST = (Check.GPU_LOST, "gpu_lost")

STORIES = [
    # --- Xids, by their tellers
    story("event", event(79), ends=(BAD, REBOOT), faults=(X79,)),
    story("log", log(FALLEN), ends=(BAD, REBOOT), faults=(X79,)),
    story("event and log", event(79), log(FALLEN), ends=(BAD, REBOOT), faults=(X79,)),
    story(
        "words alone",
        log("NVRM: GPU 0000:10:00.0: GPU has fallen off the bus."),
        ends=(BAD, REBOOT),
        faults=(X79,),
    ),
    story(
        "words in several lines",
        log("NVRM: The NVIDIA GPU 0000:10:00.0", "NVRM: (PCI ID: 10de:2330) installed in this"),
        log("NVRM: fallen off the bus and is not responding to commands."),
        ends=(BAD, REBOOT),
        faults=(X79,),
    ),
    story("of an application", event(13), ends=(GOOD, RESTART), faults=((Check.XID, "13"),)),
    story("of an application, long ago", event(13), wait(620)),
    story("not in the table", event(999), ends=(LESS, DRAIN), faults=((Check.XID, "999"),)),
    story("not in the table, a day ago", event(999), wait(DAY + 600, 600)),
    story("contained memory error", log("NVRM: Xid ({}): 94, Contained"), ends=(GOOD, RESTART),
          faults=((Check.XID, "94"),)),
    story(
        "NVLink5, not fatal",
        log("NVRM: Xid ({}): 145, RLW_CTRL Nonfatal XC0 i0 Link 00 (0x00000003 0x80000000)"),
        faults=((Check.XID, "145.RLW_CTRL.nonfatal"),),
    ),
    story(
        "NVLink5, fatal, the event came first",
        event(149),
        log("NVRM: Xid ({}): 149, NETIR_LINK_EVT Fatal XC0 i0 Link 08 (0x004505c6 0x00000000)"),
        ends=(BAD, RESET),
        faults=((Check.XID, "149.NETIR_LINK_EVT"),),
    ),
    story("NVLink5, event alone", event(149), ends=(LESS, DRAIN), faults=((Check.XID, "149"),)),
    story(
        "recovery action in the log",
        log("NVRM: Xid ({}): 154, GPU recovery action changed from 0x0 (None) to 0x2 (Node)"),
        ends=(BAD, REBOOT),
        faults=((Check.XID, "154.REBOOT"),),
    ),
    story(
        "recovery action taken back",
        log("NVRM: Xid ({}): 154, GPU recovery action changed from 0x0 (None) to 0x2 (Node)"),
        log("NVRM: Xid ({}): 154, GPU recovery action changed from 0x2 (Node) to 0x0 (None)"),
    ),
    story(
        "cannot be initialized",
        lose("unknown"),
        log("NVRM: GPU 0000:10:00.0: RmInitAdapter failed! (0x26:0x56:1474)"),
        ends=(BAD, REBOOT),
        faults=((Check.GPU_LOST, "init_failed"),),
    ),
    story(
        "could not be initialized, and is read since",
        lose("unknown"),
        log("NVRM: GPU 0000:10:00.0: RmInitAdapter failed! (0x26:0x56:1474)"),
        reset(),
    ),
    story(
        "PCIe error, fatal",
        log("nvidia 0000:10:00.0: PCIe Bus Error: severity=Uncorrected (Fatal), type=Transaction"),
        ends=(BAD, REBOOT),
        faults=((Check.PCIE_LINK, "aer_fatal"),),
    ),
    story(
        "PCIe error, not fatal, a day ago",
        log("nvidia 0000:10:00.0: PCIe Bus Error: severity=Uncorrected (Non-Fatal), type=Data"),
        wait(DAY + 600, 600),
    ),
    story("of another GPU", log("NVRM: Xid (PCI:0000:11:00): 79, fallen"), wait(30)),
    story("of no GPU of the node", log("NVRM: Xid (PCI:0000:99:00): 79, fallen"), wait(30)),
    # --- repairs
    story("reset clears what a reset clears", event(119), reset()),
    story("reset does not clear what wants a boot", event(79), reset(), ends=(BAD, REBOOT),
          faults=(X79,)),
    story("boot clears it", event(79), reboot()),
    story("boot clears what a reset would", event(119), reboot()),
    story("another driver is a reset", event(119), other_driver),
    story("driver loaded, by the log", event(119),
          log("NVRM: loading NVIDIA UNIX x86_64 Kernel Module  570.86.15")),
    story("reset while no agent ran", event(119), wait(60), reset_unseen),
    story("row remapped by a reset", set_fact(Fact.REMAPPED_ROWS_PENDING, 1), reset()),
    story("lost, and back after a boot", lose(), reboot()),
    story("lost, and still lost", lose(), reboot(keeps=True), ends=(BAD, REBOOT), faults=(LOST,)),
    story("missing", vanish, ends=(BAD, REBOOT), faults=((Check.GPU_MISSING, ""),)),
    story("missing after a boot", reboot_without, ends=(BAD, REBOOT),
          faults=((Check.GPU_MISSING, ""),)),
    story("missing after a boot, back after the next", reboot_without, reboot()),
    story("forgiven", event(79), forgive),
    story("forgiven, and still there", set_fact(Fact.REMAPPED_ROWS_FAILED, 1), forgive, wait(30),
          ends=(BAD, RMA), faults=((Check.ROW_REMAP_FAILED, ""),)),
    # --- escalation
    story("back after a reset", event(119), reset(), event(119), ends=(BAD, RESET), faults=(X119,)),
    story("back after two resets", event(119), reset(), event(119), reset(), event(119),
          ends=(BAD, REBOOT), faults=(X119,)),
    story("twice in one life is once", event(119), wait(120), event(119), reset(), event(119),
          wait(120), event(119), ends=(BAD, RESET), faults=(X119,)),
    story("back after a reboot", event(79), reboot(), event(79), ends=(BAD, REBOOT),
          faults=(X79,)),
    story("back after two reboots", event(79), reboot(), log(FALLEN), reboot(), event(79),
          ends=(BAD, RMA), faults=(X79,)),
    story("reset class, back after two reboots", event(119), reboot(), event(119), reboot(),
          log(GSP), ends=(BAD, RMA), faults=(X119,)),
    story("escalated, and mended", event(79), reboot(), event(79), reboot(), event(79), reboot()),
    story("different faults do not add up", event(79), reboot(), event(119), reboot(), event(74),
          ends=(BAD, RESET), faults=((Check.XID, "74"),)),
    story("pending row that two resets do not clear", set_fact(Fact.REMAPPED_ROWS_PENDING, 1),
          reset(keeps=True), reset(keeps=True), ends=(LESS, REBOOT),
          faults=((Check.ROW_REMAP_PENDING, ""),)),
    story("missing after three boots", reboot_without, reboot_without, reboot_without,
          ends=(BAD, RMA), faults=((Check.GPU_MISSING, ""),)),
    story("away for a month", event(79), reboot(), event(79), reboot(), wait(31 * DAY, 3600),
          event(79), ends=(BAD, REBOOT), faults=(X79,)),
    story("forgiven between", event(79), reboot(), event(79), forgive, reboot(), event(79),
          ends=(BAD, REBOOT), faults=(X79,)),
    story("an application's Xid does not escalate", event(31), reboot(), event(31), reboot(),
          event(31), ends=(GOOD, RESTART), faults=((Check.XID, "31"),)),
    # --- clocks
    story("clock set back over the fault", event(13), shift_clock(-DAY), wait(620)),
    story("clock set ahead does not end what is quiet", event(999), shift_clock(40 * DAY), wait(60),
          ends=(LESS, DRAIN), faults=((Check.XID, "999"),)),
    story("clock set back, then a fault", event(79), shift_clock(-400 * DAY), reboot(), event(79),
          log(FALLEN), ends=(BAD, REBOOT), faults=(X79,)),
]  # fmt: skip


def seen(node: JudgedNode) -> list[object]:
    """Return what is judged, but for counts and times of what only comes again."""
    return [
        (
            health.uuid,
            *(health.verdict, health.action, health.check, health.since),
            [
                (each.check, each.code, each.verdict, each.action, each.since)
                for each in health.faults
            ],
        )
        for health in node.judge.gpus()
    ]


@pytest.mark.parametrize("told", STORIES, ids=[each.name for each in STORIES])
def test_verdict_at_the_end(told: Story) -> None:
    node = JudgedNode()
    for step in told.steps:
        step(node)
    health = node.gpu()
    faults = [(each.check, each.code) for each in health.faults if each.check is not Check.STALE]
    assert (health.verdict, health.action, faults) == (
        told.verdict,
        told.action,
        list(told.faults),
    )
    if "another GPU" not in told.name:
        assert node.gpu(1).verdict is GOOD


# The clock of these is wrong before the agent is killed, and it cannot know.
BY_THE_CLOCK = {"clock set ahead does not end what is quiet"}


@pytest.mark.parametrize("told", STORIES, ids=[each.name for each in STORIES])
def test_agent_that_is_killed_anywhere_judges_the_same(told: Story) -> None:
    whole = JudgedNode()
    uncut: list[list[object]] = []
    for step in told.steps:
        step(whole)
        uncut.append(seen(whole))
    for cut in range(1, len(told.steps)):
        node = JudgedNode()
        for step in told.steps[:cut]:
            step(node)
        node.restart()
        assert seen(node) == uncut[cut - 1], f"at once after step {cut}"
        for number, step in enumerate(told.steps[cut:], cut):
            step(node)
            if told.name not in BY_THE_CLOCK:
                assert seen(node) == uncut[number], f"killed after step {cut}, at step {number + 1}"


@pytest.mark.parametrize("told", STORIES, ids=[each.name for each in STORIES])
def test_log_that_is_read_again_changes_nothing(told: Story) -> None:
    node = JudgedNode()
    for step in told.steps:
        step(node)
    before = node.judge.gpus()
    node.log_again()
    assert node.judge.gpus() is before
    node.restart()
    before = node.judge.gpus()
    node.log_again()
    assert node.judge.gpus() == before


def test_card_in_the_slot_of_another_begins_without_its_faults() -> None:
    node = JudgedNode()
    node.tick(slow=True)
    node.tick(xids={0: (79,)})
    old = node.cards[0].uuid
    swap(node)
    assert node.gpu().verdict is GOOD
    assert old not in {health.uuid for health in node.judge.gpus()}
    assert node.judge.absent() == ()
    fault = node.history.faults[old, Check.XID, "79"]
    assert fault.ending in (Ending.REPLACED, Ending.REBOOT)
    assert [gpu.uuid for gpu in node.history.expected] == [card.uuid for card in node.cards]


def test_lasting_fault_of_a_replaced_card_is_over() -> None:
    node = JudgedNode()
    node.cards[0].facts[Fact.REMAPPED_ROWS_FAILED] = 1.0
    node.run(30)
    old = node.cards[0].uuid
    swap(node)
    assert node.history.faults[old, Check.ROW_REMAP_FAILED, ""].ending is Ending.REPLACED
    node.run(31 * DAY, 3600)
    assert node.history.faults == {}


def test_missing_gpu_that_a_person_gives_up_is_not_expected_any_more() -> None:
    node = JudgedNode()
    vanish(node)
    (absent,) = node.judge.absent()
    assert (absent.uuid, absent.error_kind) == (node.cards[0].uuid, "gpu_missing")
    assert absent.message == (
        "the node had this NVIDIA H100 80GB HBM3 as GPU 0 at 00000000:10:00.0, and it is not there "
        "any more"
    )
    (sentence,) = node.forgive()
    assert sentence.startswith(absent.message)
    assert [health.uuid for health in node.judge.gpus()] == [node.cards[1].uuid]
    assert node.judge.absent() == ()
    node.restart()
    assert [health.uuid for health in node.judge.gpus()] == [node.cards[1].uuid]


def test_forgiving_tells_what_is_forgotten() -> None:
    node = JudgedNode()
    node.tick(slow=True)
    assert node.forgive() == ()
    node.log(FALLEN)
    node.tick(xids={0: (13,)})
    assert node.forgive() == (
        (
            "Xid 79: GPU has fallen off the bus (pid 1234, python3); NVIDIA Xid catalog: the host "
            "needs a reboot"
        ),
        (
            "Xid 13 (Graphics Engine Exception); NVIDIA Xid catalog: the program has to be started "
            "anew"
        ),
    )
    assert node.judge.forgive(node.at, "GPU-of-nobody") == ()


def test_reasons_say_what_was_tried() -> None:
    node = JudgedNode()
    node.tick(slow=True)
    for _ in range(2):
        node.log(FALLEN)
        node.reboot()
    node.log(FALLEN)
    assert node.gpu().reason.endswith(
        "; NVIDIA Xid catalog: the hardware needs inspection, as it came back after 2 reboots"
    )
    other = JudgedNode()
    other.tick(slow=True)
    for _ in range(2):
        other.log(GSP)
        other.reset()
    other.log(GSP)
    assert other.gpu().reason.endswith(": the host needs a reboot, as it came back after 2 resets")


def test_same_xid_of_event_and_log_counts_once_and_again_counts_again() -> None:
    node = JudgedNode()
    node.tick(slow=True)
    node.tick(xids={0: (79,)})
    node.log(FALLEN, "NVRM: GPU 0000:10:00.0: GPU has fallen off the bus.")
    fault = node.fault(Check.XID)
    assert fault is not None
    assert fault.count == 1
    assert "(pid 1234, python3)" in fault.reason  # the log says more
    node.run(120)
    node.log(FALLEN, "NVRM: GPU 0000:10:00.0: GPU has fallen off the bus.")
    node.tick(xids={0: (79,)})
    node.run(120)
    fault = node.fault(Check.XID)
    assert fault is not None
    assert fault.count == 2


def test_reset_is_seen_without_a_counter_of_energy_once_the_driver_is_opened_anew() -> None:
    node = JudgedNode()
    node.cards[0].has_energy = False
    node.cards[0].facts[Fact.PCIE_REPLAYS] = 5.0
    node.tick(slow=True)
    node.tick(xids={0: (119,)})
    node.cards[0].facts[Fact.PCIE_REPLAYS] = 2.0
    node.tick(slow=True)  # somebody set it back
    assert node.gpu().verdict is BAD
    node.reset()
    assert node.gpu().verdict is GOOD


def test_log_of_before_is_known_to_be_over() -> None:
    """A log that is followed late tells of what a reset has mended meanwhile."""
    node = JudgedNode()
    node.run(30)
    node.log(GSP, after=5.0)
    lines = list(node.log_lines)
    late = JudgedNode()
    late.run(30)
    late.run(300)
    late.reset()
    late.run(300)
    late.judge.take_kernel_log(late.at, lines)
    assert late.gpu().verdict is GOOD


def test_lines_wait_for_the_first_inventory() -> None:
    judge = Judge(Policy(), "boot", History())
    text = FALLEN.replace("{}", "PCI:0000:10:00")
    lines = [KernelLine(number, 100.0, text) for number in range(1, WAITING_LINES_MAX + 11)]
    judge.take_kernel_log(100.0, lines)
    assert judge.gpus() == ()
    assert judge.take_records() == ()  # a restart reads them again
    assert judge.lines_dropped == 10
    judge.take_inventory(101.0, JudgedNode().inventory())
    assert [health.verdict for health in judge.gpus()] == [BAD, GOOD]
