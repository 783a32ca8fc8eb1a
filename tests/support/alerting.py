"""Stories for alert rules: which series there are, and which alert fires when with which words.

A story has a sample a minute. `promtool test rules` plays it in no time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Series by text, and promtool's values: "81" goes on for the whole story, "0+60" grows by it.
Story = Mapping[str, str]

# A story goes on for so long after the alert fires; then its series are gone.
MINUTES_MORE = 5
# The widest range of a rule: after it, what is gone has no effect any more.
MINUTES_REMEMBERED = 20

AGENT = {"job": "stoker-agent", "instance": "n1:9410"}
AGGREGATOR = {"job": "stoker-aggregator", "instance": "hub:9411"}
NODE = {**AGENT, "node": "n1"}
GPU = {**NODE, "gpu": "3", "uuid": "GPU-3f2", "model": "H100"}


@dataclass(frozen=True, slots=True)
class Case:
    """One alert: the story in which it fires, and those in which it does not."""

    alert: str
    severity: str
    minutes: int  # after the beginning of the story; a minute earlier it does not fire
    fires: Story  # the first series is what it is about: without it the alert is silent
    labels: Mapping[str, str]  # all but the severity; an empty one is none
    summary: str
    description: str
    silent: Mapping[str, Story] = field(default_factory=dict[str, Story])  # by why

    def promtool(self, rules: str) -> Mapping[str, Any]:
        """Return what `promtool test rules` is to play."""
        length = self.minutes + MINUTES_MORE
        about = next(iter(self.fires))
        without = {series: values for series, values in self.fires.items() if series != about}
        never = {"it is absent": without, **self.silent}
        return {
            "rule_files": [rules],
            "evaluation_interval": "1m",
            "tests": [
                self._firing(length),
                *(self._silence(why, story, length) for why, story in never.items()),
            ],
        }

    def _firing(self, length: int) -> Mapping[str, Any]:
        labels = {name: text for name, text in self.labels.items() if text}
        expected = {
            "exp_labels": {**labels, "severity": self.severity},
            "exp_annotations": {"summary": self.summary, "description": self.description},
        }
        moments: list[tuple[int, Sequence[Mapping[str, Any]]]] = [
            (self.minutes, [expected]),
            (length + MINUTES_REMEMBERED, []),  # what it is about is gone
        ]
        if self.minutes:
            moments.insert(0, (self.minutes - 1, []))
        return {
            "name": f"{self.alert} fires after {self.minutes} minutes",
            "interval": "1m",
            "input_series": _series(self.fires, length, ending=" stale"),
            "alert_rule_test": [
                {"eval_time": f"{minute}m", "alertname": self.alert, "exp_alerts": alerts}
                for minute, alerts in moments
            ],
        }

    def _silence(self, why: str, story: Story, length: int) -> Mapping[str, Any]:
        ever = f'count_over_time(ALERTS{{alertname="{self.alert}",alertstate="firing"}}[7d])'
        return {
            "name": f"{self.alert}: {why}",
            "interval": "1m",
            "input_series": _series(story, length),
            "promql_expr_test": [{"expr": ever, "eval_time": f"{length}m", "exp_samples": []}],
        }


def series(name: str, *labels: Mapping[str, str], **more: str) -> str:
    """Return a series as promtool reads it."""
    named = {key: value for each in (*labels, more) for key, value in each.items()}
    text = ",".join(f'{key}="{value}"' for key, value in named.items())
    return f"{name}{{{text}}}"


def _series(story: Story, length: int, ending: str = "") -> list[Mapping[str, str]]:
    return [
        {"series": name, "values": f"{_lasting(values, length)}{ending}"}
        for name, values in story.items()
    ]


def _lasting(values: str, length: int) -> str:
    return values if " " in values else f"{values}x{length}"
