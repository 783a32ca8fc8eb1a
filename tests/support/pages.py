"""Pages for Prometheus, fetched and read as values."""

import asyncio
import urllib.request
from collections.abc import Mapping
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

FETCH_SECONDS_MAX = 20.0

# Sample name -> labels, sorted by name, -> value.
Page = Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]


async def fetch(url: str) -> str:
    """Return the text at an http URL of this machine."""
    return await asyncio.to_thread(_fetch, url)


def _fetch(url: str) -> str:
    # No proxy: the environment may name one, and it does not know this machine's loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=FETCH_SECONDS_MAX) as answer:
        text: str = answer.read().decode()
    return text


async def fetch_metrics(address: str) -> str:
    """Return the page of the daemon whose metrics listen at `address`."""
    return await fetch(f"http://{address}/metrics")


def read_page(text: str) -> Page:
    """Return every sample of a page; raises ValueError where it is malformed."""
    page: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            page.setdefault(sample.name, {})[labels] = sample.value
    return page


def read_openmetrics(text: str) -> list[Metric]:
    """Return the families of a page in OpenMetrics; raises ValueError where it is malformed."""
    module: Any = openmetrics  # which tells no types
    families: list[Metric] = list(module.text_string_to_metric_families(text))
    return families


def total(page: Page, name: str) -> float:
    """Return the sum of a metric over its labels; 0 when the page does not have it."""
    return sum(page.get(name, {}).values())
