"""What is so of all checks: order, names, what they need, and the whole that they make."""

from dataclasses import replace

import pytest
from tests.support.doctor_hosts import well, with_gpu
from tests.support.doctor_values import (
    CRITICAL,
    OK,
    UNKNOWN,
    WARNING,
    WELL,
)

from stoker.agent.doctor.checkup import CHECKS, chosen, examine, looks_of, summarize, worst
from stoker.agent.doctor.findings import Status
from stoker.agent.doctor.names import Name
from stoker.agent.doctor.observed import (
    AgentFacts,
    HelperFacts,
    Holder,
    Look,
    Observed,
    Unseen,
)


def test_nothing_is_wrong_where_nothing_is() -> None:
    findings = examine(WELL)
    assert [each for each in findings if each.status is not OK] == []
    assert summarize(findings, WELL) == "OK: 17 checks"


def test_whoever_else_has_the_devices_open_is_named_with_memory_of_nobody() -> None:
    observed = replace(
        WELL,
        agent=AgentFacts(with_gpu(well(1), 0, memory_unattributed_bytes=2**30), "", True),
        helper=HelperFacts("", True, "", (Holder(7, "eve", "python3", ("/dev/nvidia0",)),)),
    )
    (finding,) = examine(observed, chosen({Name.MEMORY}, ()))
    assert finding.details == ("GPU 0: 1 GiB", "PID 7 (eve) has /dev/nvidia0: python3")


def test_every_check_judges_whatever_was_not_seen() -> None:
    """No look needs another one to have succeeded: nothing was seen, and that is said."""
    for finding in examine(Observed()):
        assert finding.status is UNKNOWN, finding
    assert worst(examine(Observed())) is UNKNOWN


@pytest.mark.parametrize("look", Look)
def test_a_look_that_failed_is_no_stumbling_block(look: Look) -> None:
    findings = examine(replace(WELL, **{look.value: Unseen("for a reason")}))  # type: ignore[arg-type]
    assert len(findings) == len(CHECKS)


def test_every_name_is_checked_once_and_has_source_and_question() -> None:
    assert [check.name for check in CHECKS] == list(Name)
    for check in CHECKS:
        assert check.source
        assert check.question.endswith("?")


def test_what_is_not_asked_for_is_not_looked_at() -> None:
    asked = chosen({Name.AGGREGATOR, Name.AGENT}, {Name.AGENT})
    assert [check.name for check in asked] == [Name.AGGREGATOR]
    assert looks_of(asked) == (Look.HOST, Look.BUS, Look.MODULE, Look.AGENT)
    everything_else = chosen((), {Name.AGENT})
    assert len(everything_else) == len(CHECKS) - 1


@pytest.mark.parametrize(
    ("statuses", "whole"),
    [
        ((OK, OK), OK),
        ((OK, UNKNOWN), UNKNOWN),
        ((UNKNOWN, WARNING), WARNING),
        ((WARNING, CRITICAL, UNKNOWN), CRITICAL),
        ((), UNKNOWN),
    ],
)
def test_the_whole_is_as_bad_as_its_worst_part(statuses: tuple[Status, ...], whole: Status) -> None:
    (sound,) = examine(WELL, chosen({Name.BUS}, ()))
    assert worst([replace(sound, status=status) for status in statuses]) is whole


def test_the_first_line_has_no_bar() -> None:
    """Nagios takes what follows one for figures."""
    observed = replace(WELL, bus=Unseen("a|b"))
    line = summarize(examine(observed), observed)
    assert line.startswith("UNKNOWN: 2 of 17 checks: bus: a/b; fabric_manager: a/b")
    assert "|" not in line
