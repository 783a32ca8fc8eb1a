"""Services and their endpoints as a table for people. Nothing here prints."""

from collections.abc import Sequence

from rich.console import Group, RenderableType

from stoker.cli.columns import Columns
from stoker.cli.wording import ABSENT, counted, words
from stoker.client import Endpoint, ServiceEndpoints

_NOT_SETTLED = "the aggregator has just started: replicas may still be on their way back"


def services(found: Sequence[ServiceEndpoints], address: str) -> RenderableType:
    """Return every endpoint with its part of the calls and why."""
    endpoints = [each for service in found for each in service.endpoints]
    called = sum(each.weight > 0 for each in endpoints)
    headline = f"{counted(len(found), 'service')}; {counted(len(endpoints), 'endpoint')}"
    parts: list[RenderableType] = [words(f"{address}: {headline}, {called} called")]
    if endpoints:
        parts += ["", _table(found)]
    if not all(service.settled for service in found):
        parts += ["", words(_NOT_SETTLED, "yellow")]
    return Group(*parts)


def _table(found: Sequence[ServiceEndpoints]) -> Columns:
    table = Columns(
        (
            *("SERVICE", "ENDPOINT", "CALLS", "P50", "OPS/S", "ERRORS", "UNDER WAY"),
            *("UTIL", "MEMORY", "NODE", "ALLOCATION", "WHY"),
        ),
        numbers=("CALLS", "P50", "OPS/S", "ERRORS", "UNDER WAY", "UTIL", "MEMORY"),
        prose="WHY",
        dispensable=("ALLOCATION", "UNDER WAY", "MEMORY", "ERRORS", "OPS/S", "UTIL", "NODE", "P50"),
    )
    for service in found:
        for each in service.endpoints:
            table.add(
                words(service.service),
                words(each.address),
                words(_part(each.weight), "" if each.weight else "red"),
                words(_seconds(each.latency_p50_seconds)),
                words(_number(each.operations_per_second)),
                words(_part(each.error_ratio), "yellow" if each.error_ratio else ""),
                words(_under_way(each)),
                words(_part(each.utilization_ratio)),
                words(_part(each.memory_used_ratio)),
                words(each.node),
                words(each.allocation_id),
                words(each.reason),
            )
    return table


def _part(ratio: float | None) -> str:
    return ABSENT if ratio is None else f"{100 * ratio:.0f} %"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def _under_way(endpoint: Endpoint) -> str:
    known = _number(endpoint.in_flight)
    return known if endpoint.capacity is None else f"{known} of {endpoint.capacity}"
