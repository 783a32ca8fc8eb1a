"""The alerts of packaging/prometheus: promtool plays a story for and against each of them."""

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from tests.support.alert_cases_agents import AGENT_CASES
from tests.support.alert_cases_fleet import FLEET_CASES
from tests.support.alert_cases_gpus import HEALTH_CASES, MEMORY_CASES, MIG_CASES
from tests.support.alerting import GPU, NODE, Case, series

from stoker.agent.metrics.table import METRICS
from stoker.agent.model import DriverState
from stoker.agent.verdicts import Check, Verdict
from stoker.cli.app import stoker as command
from stoker.core.mig.geometry import MigState

ROOT = Path(__file__).parents[2]
RULES = ROOT / "packaging" / "prometheus" / "stoker-alerts.yaml"
GOLDEN = ROOT / "tests" / "golden"
# One for everybody who may be woken, worked for the day, or told.
SEVERITIES = {"critical", "warning", "info"}
CASES = (*AGENT_CASES, *HEALTH_CASES, *MEMORY_CASES, *MIG_CASES, *FLEET_CASES)
# What Prometheus itself makes for every target.
OF_PROMETHEUS = {"up"}
# What a label of ours may say in a rule.
WORDS = {
    "check": {str(each) for each in Check},
    "verdict": {str(each) for each in Verdict},
    "state": {str(each) for each in (*DriverState, *MigState)},
    "outcome": {"granted", "queued", "refused", "invalid", "repeated", "failed"},
}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments: str | Path) -> str:
    """Return what promtool complains of; empty: nothing."""
    done = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return f"{done.stdout}{done.stderr}" if done.returncode else ""


@pytest.mark.prometheus
def test_promtool_finds_nothing_wrong() -> None:
    assert promtool("check", "rules", RULES) == ""


def test_every_alert_has_a_story_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    assert Counter(case.alert for case in CASES) == Counter(rule["alert"] for rule in rules())
    assert [case.alert for case in CASES if not (case.fires and case.silent)] == []


@pytest.mark.prometheus
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_an_alert_fires_when_its_story_says_so_and_else_never(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "story.yaml"
    file.write_text(yaml.safe_dump(dict(case.promtool(str(RULES)))), encoding="utf-8")
    assert promtool("test", "rules", file) == ""


@pytest.mark.prometheus
def test_every_check_that_finds_a_fault_raises_one_alert(tmp_path: Path) -> None:
    told: dict[str, str] = {}
    faulty = [(check, verdict) for check in Check for verdict in ("degraded", "unhealthy")]
    for check, verdict in faulty:
        uuid = f"{check}-{verdict}"
        gpu = {**GPU, "uuid": uuid, "check": check, "code": "9"}
        told[series("stoker_gpu_fault", gpu, verdict=verdict, action="drain")] = "1x120"
        told[series("stoker_gpu_fault_last_timestamp_seconds", gpu)] = "0x120"
        if check in {Check.GPU_LOST, Check.GPU_MISSING}:
            told[series("stoker_gpu_missing", NODE, uuid=uuid, error_kind="gpu_lost")] = "1x120"
    story = {
        "rule_files": [str(RULES)],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": s, "values": values} for s, values in told.items()],
                "promql_expr_test": [
                    {
                        "expr": 'count by (uuid) (ALERTS{alertstate="firing"})',
                        "eval_time": "2h",
                        "exp_samples": [
                            {"labels": f'{{uuid="{check}-{verdict}"}}', "value": 1}
                            for check, verdict in faulty
                        ],
                    }
                ],
            }
        ],
    }
    file = tmp_path / "story.yaml"
    file.write_text(yaml.safe_dump(story), encoding="utf-8")
    assert promtool("test", "rules", file) == ""


def test_the_rules_are_made_of_series_that_exist() -> None:
    used = {
        name
        for rule in rules()
        for name in re.findall(r"\b(?:stoker|process)_\w+|\bup\b", rule["expr"])
    }
    known = METRICS.keys() | OF_PROMETHEUS
    for page in ("aggregator_meters.txt", "aggregator_metrics.txt"):
        text = (GOLDEN / page).read_text(encoding="utf-8")
        known |= set(re.findall(r"^# TYPE (\w+)", text, flags=re.MULTILINE))
    assert len(used) > 20
    assert used - known == set()


def test_series_that_annotations_name_exist() -> None:
    for rule in rules():
        for text in rule["annotations"].values():
            assert set(re.findall(r"\bstoker_\w+", text)) <= METRICS.keys(), rule["alert"]


def test_the_rules_ask_for_words_that_are_said() -> None:
    asked = [
        (label, word)
        for rule in rules()
        for label, words in re.findall(r'(\w+)(?:=~|!~|!=|=)"([^"]*)"', rule["expr"])
        if label in WORDS
        for word in words.split("|")
    ]
    assert len(asked) > 40
    assert [(label, word) for label, word in asked if word not in WORDS[label]] == []


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_where_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule.keys() - {"alert"} == {"expr", "for", "labels", "annotations"}
    assert set(rule["labels"]) == {"severity"}
    assert rule["labels"]["severity"] in SEVERITIES
    assert rule["annotations"].keys() == {"summary", "description"}
    case = next(case for case in CASES if case.alert == rule["alert"])
    where = {name: case.labels[name] for name in ("node", "gpu", "uuid") if name in case.labels}
    told = f"{case.summary} {case.description}"
    assert [name for name, text in where.items() if text not in told] == []
    assert where or case.labels["instance"] in told


def test_commands_in_annotations_exist() -> None:
    told = {
        found
        for rule in rules()
        for text in rule["annotations"].values()
        for found in re.findall(r"`stoker ([^`]+)`", text)
    }
    assert len(told) > 5
    assert {words: why for words in told if (why := unknown(words.split()))} == {}


def unknown(words: list[str]) -> str:
    """Return what of a command line does not exist; empty: all of it does."""
    found: click.Command = command
    for word in words:
        if word.startswith("--"):
            if word not in {opt for option in found.params for opt in option.opts}:
                return f"{found.name} has no option {word}"
        elif isinstance(found, click.Group):
            following = found.get_command(click.Context(found), word)
            if following is None:
                return f"{found.name} has no verb {word}"
            found = following
    return ""


def test_no_alert_is_made_of_a_counter_that_appears_with_its_first_error() -> None:
    counters = {
        name for rule in rules() for name in re.findall(r"(?:increase|rate)\((\w+)", rule["expr"])
    }
    # These are there with 0 from the start of the aggregator: see `Meters`.
    assert counters == {
        *("stoker_allocation_requests_total", "stoker_allocation_holds_refused_total"),
        "stoker_ledger_failures_total",
    }
