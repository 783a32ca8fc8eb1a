"""A real Prometheus scrapes both daemons with our rules; promtool finds nothing to say of pages."""

import json
import subprocess
import urllib.parse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from tests.support.daemons import Daemon, Stage, free_nodes
from tests.support.pages import fetch, fetch_metrics
from tests.support.ports import free_port
from tests.support.waiting import until

pytestmark = pytest.mark.prometheus

CONFIG = """
global:
  scrape_interval: 1s
  scrape_timeout: 1s
  evaluation_interval: 1s
rule_files:
  - {rules}/stoker-recording-rules.yaml
  - {rules}/stoker-alerts.yaml
scrape_configs:
  - job_name: agent
    static_configs: [{{targets: ["{agent}"]}}]
  - job_name: dcgm
    metrics_path: /metrics/dcgm
    static_configs: [{{targets: ["{agent}"]}}]
  - job_name: aggregator
    static_configs: [{{targets: ["{aggregator}"]}}]
"""

RULES = Path(__file__).parents[2] / "packaging" / "prometheus"
SCRAPE_LABELS = {"__name__", "instance", "job"}

GPU = {"node", "gpu", "uuid", "model"}
DCGM = {
    *("gpu", "UUID", "pci_bus_id", "device", "modelName", "Hostname"),
    "DCGM_FI_DRIVER_VERSION",
}
# Job, metric, the labels beyond those of every scrape, how many series with one node of 4 GPUs.
SERIES: tuple[tuple[str, str, set[str], int], ...] = (
    ("agent", "stoker_gpu_memory_total_bytes", GPU, 4),
    ("agent", "stoker_gpu_memory_used_bytes", GPU, 4),
    ("agent", "stoker_gpu_utilization_ratio", GPU, 4),
    ("agent", "stoker_gpu_allocations", GPU, 4),
    ("agent", "stoker_gpu_up", GPU, 4),
    ("agent", "stoker_gpu_utilization_max_ratio", GPU, 4),
    ("agent", "stoker_gpu_nvlink_up", GPU | {"link"}, 4 * 18),
    ("agent", "stoker_agent_connected", set(), 1),
    ("agent", "stoker_agent_driver_host_resident_memory_bytes", set(), 1),
    ("agent", "stoker_agent_collector_success", {"collector"}, 4),
    ("agent", "process_resident_memory_bytes", set(), 1),
    ("agent", "stoker_agent_build_info", {"node", "version"}, 1),
    ("dcgm", "DCGM_FI_DEV_FB_USED", DCGM, 4),
    ("dcgm", "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", DCGM, 4),
    ("dcgm", "DCGM_FI_PROF_SM_ACTIVE", DCGM, 4),
    ("aggregator", "stoker_fleet_gpu_memory_total_bytes", GPU, 4),
    ("aggregator", "stoker_fleet_gpu_utilization_ratio", GPU, 4),
    ("aggregator", "stoker_node_ready", {"node"}, 1),
    ("aggregator", "stoker_fleet_gpus", {"state"}, 5),
    ("aggregator", "stoker_allocations", {"state"}, 4),
    ("aggregator", "stoker_frames_total", set(), 1),
    ("aggregator", "stoker_ledger_commits_total", set(), 1),
    ("aggregator", "stoker_allocation_requests_total", {"outcome"}, 6),
)


class Prometheus:
    """A running Prometheus; `query` asks its API."""

    def __init__(self, daemon: Daemon, port: int) -> None:
        self._daemon = daemon
        self._base = f"http://127.0.0.1:{port}"

    async def query(self, expression: str) -> list[dict[str, str]] | None:
        """Return the labels of each series of the expression; None while there is no answer."""
        assert self._daemon.is_running, self._daemon.log_end()
        asked = urllib.parse.urlencode({"query": expression})
        try:
            answer = json.loads(await fetch(f"{self._base}/api/v1/query?{asked}"))
        except OSError:
            return None
        assert answer["status"] == "success", answer
        return [series["metric"] for series in answer["data"]["result"]]


def start_prometheus(stage: Stage, agent: str, aggregator: str) -> Prometheus:
    config = stage.folder / "prometheus.yml"
    config.write_text(
        CONFIG.format(agent=agent, aggregator=aggregator, rules=RULES), encoding="utf-8"
    )
    port = free_port()
    command = (
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={stage.folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    )
    daemon = stage.other(Daemon("prometheus", command, stage.folder, "nowhere"))
    daemon.spawn()
    return Prometheus(daemon, port)


def check_page(page: str) -> str:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False
    )
    return f"{done.stdout}{done.stderr}" + (f"status {done.returncode}" if done.returncode else "")


# A row that waits for a reset, a GPU that falls off the bus, and a program that runs.
FAULTY = {
    "counters": [{"gpu": 1, "fact": "remapped_rows_pending", "value": 1, "from_seconds": 0}],
    "events": [{"gpu": 2, "xid": 79, "at_seconds": 3}],
    "processes": [{"gpu": 0, "pid": 5000001, "name": "train", "memory": "20GiB"}],
}


async def has_series(
    prometheus: Prometheus, job: str, metric: str, wanted: Sequence[set[str]]
) -> bool:
    """Whether the metric of that job has exactly these series, by the names of their labels."""
    found = await prometheus.query(f'{metric}{{job="{job}"}}') or []
    return [set(series) for series in found] == wanted


async def test_prometheus_scrapes_both_daemons(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        told_by_aggregator = await stage.aggregator().start()
        told_by_agent = await stage.agent("node-a", "4xH100-80GB").start()
        targets = {"agent": told_by_agent["metrics"], "aggregator": told_by_aggregator["metrics"]}
        async with stage.fleet() as fleet:
            await free_nodes(fleet, 1)
            await fleet.request(gpus=1, holder="prometheus")
            pages = {job: await fetch_metrics(address) for job, address in targets.items()}
            assert {job: check_page(page) for job, page in pages.items()} == {
                "agent": "",
                "aggregator": "",
            }
            prometheus = start_prometheus(stage, **targets)

            async def is_up() -> bool:
                up = await prometheus.query("up == 1") or []
                found = {series["job"]: series["instance"] for series in up}
                return found == {**targets, "dcgm": targets["agent"]}

            await until("all targets to be up", is_up)
            for job, metric, labels, count in SERIES:
                wanted = [labels | SCRAPE_LABELS] * count
                look = partial(has_series, prometheus, job, metric, wanted)
                await until(f"{count} of {metric} with {sorted(labels)}", look)

            async def is_counted() -> bool:
                """Both daemons tell of the allocation."""
                held = await prometheus.query("sum(stoker_gpu_allocations) == 1")
                granted = await prometheus.query('stoker_allocations{state="granted"} == 1')
                return bool(held) and bool(granted)

            await until("the allocation to be seen", is_counted)


async def test_prometheus_alerts_of_a_gpu_that_breaks(tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.json"
    async with Stage(tmp_path) as stage:
        aggregator = await stage.aggregator().start()
        options = ("--slow-interval", "1s", "--scenario", str(scenario))
        agent = await stage.agent("node-a", "4xH100-80GB", *options).start()
        prometheus = start_prometheus(stage, agent["metrics"], aggregator["metrics"])

        async def is_well() -> bool:
            """All GPUs are healthy, and the alerts are looked at."""
            healthy = await prometheus.query('stoker_gpu_health{verdict="healthy"} == 1') or []
            faults = await prometheus.query("stoker_gpu_fault")
            return len(healthy) == 4 and faults == []

        await until("four healthy GPUs", is_well)
        draft = scenario.with_suffix(".new")
        draft.write_text(json.dumps(FAULTY), encoding="utf-8")
        draft.rename(scenario)

        async def is_alerting() -> bool:
            """Whether what needs no time fires, and what has to last is pending."""
            alerts = await prometheus.query('ALERTS{uuid!=""}') or []
            found = {(each["alertname"], each["alertstate"], each["gpu"]) for each in alerts}
            return found >= {
                ("StokerGpuRowRemapPending", "pending", "1"),
                ("StokerGpuXidCritical", "firing", "2"),
                # The aggregator has cordoned it, and a day is too long.
                ("StokerGpuCordonedLong", "pending", "2"),
            }

        await until("alerts on GPU 1 and 2", is_alerting)

        async def is_joined() -> bool:
            """Whether memory and owner of the process join, as docs/metrics.md says."""
            found = await prometheus.query(
                "stoker_gpu_process_memory_used_bytes "
                "* on (node, uuid, pid) group_left (command) stoker_gpu_process_info"
            )
            return [(each["pid"], each["command"]) for each in found or []] == [
                ("5000001", "train")
            ]

        await until("the process to be told", is_joined)
