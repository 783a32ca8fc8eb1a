"""The pages for Prometheus: what the node last read, never older than it may be, and the agent.

`/metrics` is the agent's own set, `/metrics/dcgm` the same facts under dcgm-exporter's names. A
scrape takes the newest snapshot, which never changes, and makes its text in a thread of its own;
neither waits for the driver nor for the event loop.
"""

import os
from collections.abc import Callable, Iterator

from prometheus_client import ProcessCollector

from stoker.agent import procfs
from stoker.agent.config import MetricsConfig
from stoker.agent.metrics.dcgm import dcgm_families
from stoker.agent.metrics.exposition import Family, family, openmetrics_text, prometheus_text
from stoker.agent.metrics.own import own_families
from stoker.agent.metrics.page_access import load_tls, load_users
from stoker.agent.metrics.page_server import Answer, PageServer
from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.metrics.table import METRICS
from stoker.core.addresses import Address

OWN_PATH = "/metrics"
DCGM_PATH = "/metrics/dcgm"

_PLAIN_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Pages:
    """Makes both pages, each from a snapshot of its own."""

    def __init__(self, take: Callable[[], Snapshot], config: MetricsConfig) -> None:
        """`take` is called in the thread of the scrape."""
        self._take = take
        self._hostname_label = config.dcgm_hostname_label
        self._process = ProcessCollector(registry=None)

    def own(self, accept: str) -> Answer:
        """Return the page of the agent's own names, in OpenMetrics if it is asked for."""
        families = self._own_families()
        if accepts_openmetrics(accept):
            return Answer(_OPENMETRICS_TYPE, openmetrics_text(families))
        return Answer(_PLAIN_TYPE, prometheus_text(families))

    def dcgm(self, _accept: str) -> Answer:
        """Return the page of dcgm-exporter's names; OpenMetrics does not allow those."""
        return Answer(
            _PLAIN_TYPE, prometheus_text(dcgm_families(self._take(), self._hostname_label))
        )

    def _own_families(self) -> Iterator[Family]:
        snapshot = self._take()
        yield from own_families(snapshot)
        if snapshot.host_pid is not None:
            yield from _host_memory(snapshot.host_pid)
        for metric in self._process.collect():
            for sample in metric.samples:
                row = METRICS[sample.name]
                yield family(row.name, row.kind, row.doc, [("", sample.value)])


class MetricsServer:
    """Serves the pages until closed."""

    def __init__(
        self,
        address: Address,
        take: Callable[[], Snapshot],
        config: MetricsConfig | None = None,
    ) -> None:
        """Listen with the certificate and the users of `config`.

        Raises InUse when the port is taken, BadInput when the address is not ours or a file of
        `config` cannot be used.
        """
        config = config or MetricsConfig()
        pages = Pages(take, config)
        tls = None
        if config.tls_cert is not None and config.tls_key is not None:
            tls = load_tls(config.tls_cert, config.tls_key, config.tls_client_ca)
        users = None
        if config.basic_auth_file is not None:
            users = load_users(config.basic_auth_file, "metrics.basic_auth_file")
        self._server = PageServer(
            address,
            {OWN_PATH: pages.own, DCGM_PATH: pages.dcgm},
            option="metrics.listen",
            tls=tls,
            users=users,
        )
        self.address = self._server.address

    def close(self) -> None:
        """Stop listening; scrapes under way are left to end."""
        self._server.close()


def accepts_openmetrics(accept: str) -> bool:
    """Whether the header `Accept` has OpenMetrics 1, or OpenMetrics and no version, in it.

    The client library's own `choose_encoder` fails on a version that is no number.
    """
    for each in accept.split(","):
        kind, *parameters = (part.strip() for part in each.split(";"))
        versions = [text[8:] for text in parameters if text.startswith("version=")]
        is_known = all(version.startswith("1.") for version in versions)
        if kind == "application/openmetrics-text" and is_known:
            return True
    return False


def _host_memory(pid: int) -> Iterator[Family]:
    # Unlike /proc/PID/cmdline, statm needs no lock of the process: it answers when that one hangs.
    fields = procfs.read(f"/proc/{pid}/statm").split()
    if fields:
        row = METRICS["stoker_agent_driver_host_resident_memory_bytes"]
        yield family(row.name, row.kind, row.doc, [("", int(fields[1]) * _PAGE_BYTES)])
