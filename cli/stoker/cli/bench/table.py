"""The figures of a bench for people: one a line, in units that read well."""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import msgspec

from stoker.cli.bench.figures import AllocateReport, IngestReport
from stoker.cli.bench.routing_figures import RoutingReport
from stoker.cli.bench.sampling import SamplingFigures
from stoker.core.units import format_bytes


def report_lines(
    report: IngestReport | AllocateReport | SamplingFigures | RoutingReport,
) -> Iterator[str]:
    """Yield the lines."""
    rows = list(_rows(report))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        yield f"{name:<{width}}  {value}"


def _rows(report: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and figure; a part of the report lends its name to its own figures."""
    for field in fields(report):
        value = getattr(report, field.name)
        name = f"{prefix}{field.name.replace('_', ' ')}"
        if is_dataclass(value):
            yield from _rows(value, f"{name} ")
        else:
            yield name, _readable(field.name, msgspec.to_builtins(value))


def _readable(name: str, value: Any) -> str:
    """Return a figure with its unit, which its name tells."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case tuple() | dict():
            return json.dumps(value) if value else "-"
        case int() if name.endswith("_bytes"):
            return format_bytes(value)
        case float() if name.endswith(("_seconds_per_frame", "_seconds_per_sweep")):
            return f"{value * 1e6:.0f} us"
        case float() if name.endswith("_seconds"):
            return f"{value * 1e3:.2f} ms"
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)
