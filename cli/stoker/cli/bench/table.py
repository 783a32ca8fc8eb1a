"""The figures of a bench for people: one a line, in units that read well."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from stoker.cli.bench.figures import AllocateReport, IngestReport
from stoker.core.units import format_bytes


def report_lines(report: IngestReport | AllocateReport) -> Iterator[str]:
    """Yield the lines."""
    found: dict[str, Any] = msgspec.to_builtins(report)
    machine: dict[str, Any] = found.pop("machine")
    rows = [(name, _readable(name, value)) for name, value in found.items()]
    rows += [(f"machine {name}", _readable(name, value)) for name, value in machine.items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        yield f"{name.replace('_', ' '):<{width}}  {value}"


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
        case float() if name.endswith("_seconds_per_frame"):
            return f"{value * 1e6:.0f} us"
        case float() if name.endswith("_seconds"):
            return f"{value * 1e3:.2f} ms"
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)
