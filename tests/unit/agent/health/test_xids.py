"""The table of Xids: what the well-known ones mean, and that no row contradicts itself."""

import pytest

from stoker.agent.health.meanings import Ends
from stoker.agent.health.xids import XIDS, Source, xid_meaning, xid_name, xid_source
from stoker.agent.verdicts import RepairAction, Verdict

BAD, LESS, GOOD = Verdict.UNHEALTHY, Verdict.DEGRADED, Verdict.HEALTHY
NONE, RESTART, DRAIN = RepairAction.NONE, RepairAction.RESTART_APP, RepairAction.DRAIN
RESET, REBOOT, RMA = RepairAction.RESET_GPU, RepairAction.REBOOT, RepairAction.RMA


@pytest.mark.parametrize(
    ("code", "verdict", "action", "ends"),
    [
        # a program's own
        *((str(number), GOOD, RESTART, Ends.QUIET) for number in (13, 31, 32, 43, 45, 68, 69, 109)),
        ("94", GOOD, RESTART, Ends.QUIET),
        # the driver has dealt with it
        *((str(number), GOOD, NONE, Ends.QUIET) for number in (38, 63, 66, 121, 141, 160)),
        ("92", LESS, NONE, Ends.QUIET),
        # the GPU does not work before a reset
        *(
            (str(number), BAD, RESET, Ends.RESET)
            for number in (46, 48, 62, 64, 74, 95, 110, 119, 120, 136, 140, 143, 155, 156, 158)
        ),
        *((str(number), BAD, RESET, Ends.RESET) for number in (61, 167, 169, 171, 172)),
        ("79", BAD, REBOOT, Ends.REBOOT),
        ("151", BAD, REBOOT, Ends.REBOOT),
        ("54", BAD, RMA, Ends.REBOOT),
        ("157", LESS, RMA, Ends.REBOOT),
        ("168", LESS, DRAIN, Ends.REBOOT),
        # NVLink of the fifth generation
        ("144", LESS, DRAIN, Ends.QUIET),
        ("145.RLW_REMAP", BAD, RESET, Ends.RESET),
        ("145.RLW_REMAP.nonfatal", GOOD, NONE, Ends.QUIET),
        ("149.NETIR_LINK_EVT", BAD, RESET, Ends.RESET),
        # the driver changes what it asks for
        ("154", GOOD, NONE, Ends.QUIET),
        ("154.NONE", GOOD, NONE, Ends.QUIET),
        ("154.RESET", BAD, RESET, Ends.RESET),
        ("154.REBOOT", BAD, REBOOT, Ends.REBOOT),
        ("154.DRAIN_P2P", BAD, DRAIN, Ends.RESET),
        ("154.DRAIN_AND_RESET", BAD, RESET, Ends.RESET),
        # nobody knows
        ("999", LESS, DRAIN, Ends.QUIET),
        ("5", LESS, DRAIN, Ends.QUIET),
    ],
)
def test_meaning(code: str, verdict: Verdict, action: RepairAction, ends: Ends) -> None:
    meaning = xid_meaning(code)
    assert (meaning.verdict, meaning.action, meaning.ends) == (verdict, action, ends)


def test_everything_in_use_up_to_172_is_in_the_table() -> None:
    """NVIDIA's catalog calls these numbers unused, and so did the archive for older GPUs."""
    unused = {
        *(*range(1, 8), 9, 10, 12, 15, 17, *range(19, 25), *range(26, 31), *range(33, 37)),
        *(42, 47, *range(49, 54), 55, 73, 81, 87, 90, 91, *range(111, 119), *range(122, 126), 138),
    }
    assert set(range(1, 173)) - set(XIDS) == unused


@pytest.mark.parametrize("number", XIDS)
def test_row_agrees_with_itself(number: int) -> None:
    row = XIDS[number]
    assert row.number == number
    assert row.name
    meaning = row.meaning
    if meaning.ends in (Ends.RESET, Ends.REBOOT):
        assert meaning.verdict is not GOOD
    if meaning.action is RESTART:
        assert meaning.verdict is GOOD
    if row.source is Source.PLUGIN:
        assert row.note, "peers disagree where a plugin is followed: say why"


def test_table_follows_what_kubernetes_takes_for_an_application_s() -> None:
    skipped = {13, 31, 43, 45, 68, 109}
    assert {xid_meaning(str(number)).verdict for number in skipped} == {GOOD}


def test_words() -> None:
    assert xid_name(79) == "GPU has fallen off the bus"
    assert xid_name(999) == "not in the table"
    assert xid_source("79") == "NVIDIA Xid catalog"
    assert xid_source("999") == "a number that is not in the table"
