"""The names of older dashboards: promtool proves what the rules make of our series."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from stoker.agent.metrics.table import METRICS

ROOT = Path(__file__).parents[2]
RULES = ROOT / "packaging" / "prometheus" / "stoker-recording-rules.yaml"
PAGES = ("aggregator_meters.txt", "aggregator_metrics_services.txt")
AGGREGATOR_PAGES = [ROOT / "tests" / "golden" / name for name in PAGES]


def promtool(*arguments: str | Path) -> str:
    """Return what promtool complains of; empty: nothing."""
    done = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return f"{done.stdout}{done.stderr}" if done.returncode else ""


@pytest.mark.prometheus
def test_promtool_finds_nothing_wrong() -> None:
    assert promtool("check", "rules", RULES) == ""


@pytest.mark.prometheus
def test_the_rules_make_what_the_stories_say() -> None:
    assert promtool("test", "rules", Path(__file__).with_name("recording_rules.yaml")) == ""


def test_the_rules_are_made_of_series_that_exist() -> None:
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    used = {name for text in expressions for name in re.findall(r"\bstoker_\w+", text)}
    told = "".join(page.read_text() for page in AGGREGATOR_PAGES)
    counted = set(re.findall(r"^(stoker_\w+)", told, flags=re.MULTILINE))
    assert len(used) > 8
    assert used - METRICS.keys() - counted == set()


def test_the_names_of_older_dashboards_are_all_there() -> None:
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    recorded = {rule["record"] for group in rules["groups"] for rule in group["rules"]}
    assert recorded >= {
        "gpu_utilization_percent",
        "gpu_memory_usage_mb",
        "gpu_memory_total_mb",
        "gpu_memory_free_mb",
        "gpu_temperature_celsius",
        "gpu_power_usage_watts",
        "gpu_allocation_requests_total",
        "gpu_allocation_duration_seconds",
        "gpu_throughput_ops_total",
        "gpu_operation_latency_seconds",
    }
