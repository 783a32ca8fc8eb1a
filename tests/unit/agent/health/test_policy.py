"""What a person can set: every wrong word is named, with the nearest right one."""

import dataclasses
from pathlib import Path

import pytest

from stoker.agent.health.checks import ROWS
from stoker.agent.health.meanings import Ends, Meaning
from stoker.agent.health.options import HealthConfig
from stoker.agent.health.policy import Policy, policy_of
from stoker.agent.verdicts import Check, RepairAction, Verdict
from stoker.core import config
from stoker.core.config import section
from stoker.core.errors import BadInput
from stoker.testing.judged_node import JudgedNode


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    health: HealthConfig = section(HealthConfig)


def loaded(tmp_path: Path, text: str) -> Policy:
    file = tmp_path / "agent.yaml"
    file.write_text(text)
    return policy_of(config.load(Whole, file, {}, "STOKER_AGENT_", {}).health)


def test_from_a_file(tmp_path: Path) -> None:
    policy = loaded(
        tmp_path,
        "health:\n"
        "  disabled: [persistence, pcie_replays]\n"
        "  xids: {13: drain, 79: ignore, 500: restart_app}\n"
        "  remember_seconds: 10h\n",
    )
    assert policy.disabled == {Check.PERSISTENCE, Check.PCIE_REPLAYS}
    assert policy.limits.remember_seconds == 36000.0
    assert policy.meaning(Check.XID, "79").is_ignored
    assert policy.meaning(Check.XID, "13") == Meaning(
        Verdict.UNHEALTHY, RepairAction.DRAIN, Ends.QUIET
    )
    assert policy.meaning(Check.XID, "500").verdict is Verdict.HEALTHY
    assert policy.meaning(Check.PERSISTENCE, "").is_ignored


def test_from_the_environment() -> None:
    environ = {"STOKER_AGENT_HEALTH_XIDS": "31=drain,149=reboot"}
    written = config.load(Whole, None, environ, "STOKER_AGENT_", {})
    policy = policy_of(written.health)
    assert policy.meaning(Check.XID, "149.NETIR_LINK_EVT").action is RepairAction.REBOOT


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (
            HealthConfig(disabled=("thermall",)),
            "health.disabled: unknown check 'thermall'; did you mean thermal?",
        ),
        (
            HealthConfig(disabled=("",)),
            "health.disabled: unknown check ''; known are xid, ecc_uncorrected, ",
        ),
        (
            HealthConfig(xids={"79": "reboott"}),
            "health.xids: 79: unknown action 'reboott'; did you mean reboot?",
        ),
        (
            HealthConfig(xids={"79": "x" * 5000}),
            "health.xids: 79: unknown action 'xxxx",
        ),
        (
            HealthConfig(xids={"Xid 79": "ignore"}),
            "health.xids: wanted the number of an Xid, found 'Xid 79'",
        ),
        (HealthConfig(xids={"1000000": "ignore"}), "health.xids: wanted the number of an Xid"),
        (HealthConfig(xids={"٧٩": "ignore"}), "health.xids: wanted the number of an Xid"),
        (
            HealthConfig(thermal_share_max=0.1, thermal_share_end=0.2),
            "health.thermal_share_end: wanted at most thermal_share_max, which is 0.1, found 0.2",
        ),
    ],
)
def test_what_is_wrong_is_named(written: HealthConfig, complaint: str) -> None:
    with pytest.raises(BadInput) as caught:
        policy_of(written)
    assert str(caught.value).startswith(complaint)
    assert len(str(caught.value)) < 500


def test_every_check_but_xid_has_a_row_whose_options_exist() -> None:
    assert {row.check for row in ROWS} == set(Check) - {Check.XID}
    options = {field.name for field in dataclasses.fields(HealthConfig)}
    named = {name for row in ROWS for name in row.options}
    assert named <= options
    general = {"disabled", "xids", "xid_quiet_seconds", "remember_seconds"}
    assert options - named - general == {"resets_max", "reboots_max"}


def test_xid_that_is_ignored_leaves_no_trace() -> None:
    node = JudgedNode(policy=policy_of(HealthConfig(xids={"79": "ignore"})))
    node.run(30)
    node.tick(xids={0: (79,)})
    node.log("NVRM: Xid ({}): 79, GPU has fallen off the bus.")
    assert node.gpu().faults == ()
    assert node.history.faults == {}


def test_xid_means_what_it_is_set_to() -> None:
    node = JudgedNode(policy=policy_of(HealthConfig(xids={"13": "reset_gpu"})))
    node.run(30)
    node.tick(xids={0: (13,)})
    assert (node.gpu().verdict, node.gpu().action) == (
        Verdict.UNHEALTHY,
        RepairAction.RESET_GPU,
    )
    node.reset()
    assert node.gpu().verdict is Verdict.HEALTHY


def test_another_policy_judges_the_same_past_anew() -> None:
    node = JudgedNode()
    node.run(30)
    node.tick(xids={0: (13,)})
    assert node.gpu().verdict is Verdict.HEALTHY
    node.policy = policy_of(HealthConfig(xids={"13": "drain"}))
    node.restart()
    assert (node.gpu().verdict, node.gpu().action) == (Verdict.UNHEALTHY, RepairAction.DRAIN)
    node.policy = policy_of(HealthConfig(disabled=("xid",)))
    node.restart()
    assert node.gpu().faults == ()
    node.policy = Policy()
    node.restart()
    assert [fault.code for fault in node.gpu().faults] == ["13"]


def test_fault_that_a_boot_mended_while_its_check_was_off_is_over_when_it_is_on_again() -> None:
    node = JudgedNode()
    node.run(30)
    node.tick(xids={0: (79,)})
    node.policy = policy_of(HealthConfig(disabled=("xid",)))
    node.restart()
    node.reboot()
    node.policy = Policy()
    node.restart()
    assert node.gpu().faults == ()


@pytest.mark.parametrize(("resets", "reboots"), [(1, 1), (2, 4)])
def test_how_often_is_too_often_can_be_set(resets: int, reboots: int) -> None:
    policy = policy_of(HealthConfig(resets_max=resets, reboots_max=reboots))
    node = JudgedNode(policy=policy)
    node.run(30)
    for tried in range(reboots + 1):
        node.tick(xids={0: (79,)})
        wanted = RepairAction.RMA if tried == reboots else RepairAction.REBOOT
        assert node.gpu().action is wanted
        if tried < reboots:
            node.reboot()
