"""The text that Prometheus reads: families of series, in its own format and in OpenMetrics.

Prometheus' client library does the same from objects, one for each series, which costs about ten
times as much; here a GPU's labels are turned into text once and shared by its hundred series.
Formats: prometheus.io/docs/instrumenting/exposition_formats, OpenMetrics 1.0.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

_COUNTER_SUFFIX = "_total"
_EXACT_MAX = 2.0**53  # whole numbers up to here have no other number between them and the next


class FamilyKind(StrEnum):
    """What Prometheus calls the type of a family."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    """All series of one name; `lines` are whole lines without their ends."""

    name: str  # as Prometheus' own format spells it: with a counter's `_total`
    kind: FamilyKind
    doc: str
    lines: Sequence[str]


def family(name: str, kind: FamilyKind, doc: str, series: Iterable[tuple[str, float]]) -> Family:
    """Return a family of series, each a text made by `labels` and a value."""
    return Family(name, kind, doc, [f"{name}{text} {number(value)}" for text, value in series])


def histogram(
    name: str, doc: str, buckets: Iterable[tuple[float, int]], total: float, count: int
) -> Family:
    """Return a histogram without labels; `buckets`: upper bound, how many were no longer."""
    lines = [f'{name}_bucket{{le="{float(bound)!r}"}} {many}' for bound, many in buckets]
    lines += [f'{name}_bucket{{le="+Inf"}} {count}']
    lines += [f"{name}_count {count}", f"{name}_sum {number(total)}"]
    return Family(name, FamilyKind.HISTOGRAM, doc, lines)


def labels(names: Iterable[str], values: Iterable[str], more: str = "") -> str:
    """Return the labels of a series as text, in this order; `more` is text from `pairs`."""
    text = pairs(names, values) + more
    return f"{{{text}}}" if text else ""


def pairs(names: Iterable[str], values: Iterable[str]) -> str:
    """Return `a="1",b="2"`: a part of a series' labels."""
    return ",".join(
        f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True)
    )


def number(value: float) -> str:
    """Return a value as text that reads back as the same number."""
    whole = float(value)
    if whole.is_integer() and abs(whole) < _EXACT_MAX:
        return str(int(whole))
    return repr(whole)


def prometheus_text(families: Iterable[Family]) -> str:
    """Return the page in Prometheus' own format (version 0.0.4)."""
    parts: list[str] = []
    for each in families:
        if each.lines:
            parts.append(f"# HELP {each.name} {_one_line(each.doc)}")
            parts.append(f"# TYPE {each.name} {each.kind}")
            parts += each.lines
    return "\n".join([*parts, ""])


def openmetrics_text(families: Iterable[Family]) -> str:
    """Return the page in the format of OpenMetrics 1.0; counters must be named `*_total`."""
    parts: list[str] = []
    for each in families:
        if each.lines:
            name = each.name
            if each.kind is FamilyKind.COUNTER:
                name = name.removesuffix(_COUNTER_SUFFIX)
            doc = _one_line(each.doc).replace('"', '\\"')
            parts += [f"# HELP {name} {doc}", f"# TYPE {name} {each.kind}", *each.lines]
    return "\n".join([*parts, "# EOF", ""])


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _one_line(doc: str) -> str:
    return doc.replace("\\", "\\\\").replace("\n", "\\n")
