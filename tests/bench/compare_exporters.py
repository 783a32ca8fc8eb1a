"""Compares what reading eight GPUs costs: stoker, nvitop-exporter, gpustat and bare nvidia-ml-py.

All read the same library (tests/integration/fake_nvml), in which a call takes tens of nanoseconds,
one after the other, on this machine. From the root of the repository:

    .venv/bin/python -m tests.bench.compare_exporters --install --json compare.json

`--install` puts the other tools into a temporary environment (uv, network); `--venv` takes one that
has them; without either, stoker alone is measured.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from tests.support.daemons import Daemon, Stage, ready_nodes
from tests.support.nvml_library import Page, build_full, counting, environment

from stoker.cli.bench.machine import describe_machine, utc_text

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("nvitop-exporter==1.7.*", "gpustat==1.1.*")
OTHERS = Path(__file__).parent / "other_tools.py"
PROCESSES_PER_GPU = 2
NODE = "here"
SCRAPE_SECONDS = 15.0
EVERYTHING_EACH_SECOND = {
    "STOKER_AGENT_SLOW_INTERVAL_SECONDS": "1",
    "STOKER_AGENT_PROCESSES_INTERVAL_SECONDS": "1",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, and how long."""

    gpus: int
    links: int  # NVLinks of each GPU
    seconds: int  # of the agent, and cycles of an exporter
    bare_cycles: int
    sweeps: int
    warm_up_seconds: float  # until every reader has told its first, and Python is warm


@dataclass(frozen=True, slots=True)
class Row:
    """What one reader took for a cycle of one second."""

    name: str
    cpu_seconds: float
    parts: Mapping[str, float]  # CPU seconds of its parts: processes, or what it did
    calls: float  # into the library
    series: int  # or values, where there is no page
    rss_bytes: int
    note: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the JSON where asked to."""
    options = _parse(arguments)
    plan = Plan(
        gpus=options.gpus,
        links=options.links,
        seconds=options.seconds,
        bare_cycles=options.bare_cycles,
        sweeps=options.sweeps,
        warm_up_seconds=options.warm_up,
    )
    with tempfile.TemporaryDirectory(prefix="stoker-compare-") as name:
        folder = Path(name)
        python = _other_python(options, folder)
        began_at = time.time()
        rows, versions = measure(plan, folder, python)
        machine = asdict(describe_machine(folder))
    found = {
        "at": utc_text(began_at),
        "machine": machine,
        "versions": versions,
        "plan": asdict(plan),
        "rows": [asdict(row) for row in rows],
    }
    sys.stdout.write("\n".join([*table(rows), *verdicts(rows)]) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(plan: Plan, folder: Path, python: Path | None) -> tuple[list[Row], dict[str, str]]:
    """Return a row for each reader, and the versions of the other tools."""
    rows: list[Row] = []
    versions: dict[str, str] = {}
    library = folder / "library"
    library.mkdir()
    build_full(library)
    with _users() as pids, counting(folder / "page") as page:
        given = environment(library, page=page, gpus=plan.gpus, links=plan.links, pids=pids)
        others = [("bare", plan.bare_cycles, 0.0)]
        if python is not None:
            others += [("gpustat", max(1, plan.seconds // 6), 0.0)]
            others += [("nvitop-exporter", plan.seconds, 1.0)]
        for tool, cycles, interval_seconds in others:
            _tell(f"{tool}: {cycles} cycles")
            told = _run_other(python or Path(sys.executable), given, tool, cycles, interval_seconds)
            rows.append(_other_row(tool, told))
            if told["version"] is not None:
                versions[tool] = told["version"]
        rows += _sweeps(plan, given)
        agents: tuple[tuple[str, Mapping[str, str], bool], ...] = (
            ("stoker-agent, usual rates", {}, False),
            ("stoker-agent, usual rates, scraped", {}, True),
            ("stoker-agent, all every second", EVERYTHING_EACH_SECOND, False),
        )
        for number, (name, more, is_scraped) in enumerate(agents):
            _tell(f"{name}: {plan.seconds} s")
            here = folder / f"agent-{number}"
            here.mkdir()
            measuring = _agent(name, plan, here, {**given, **more}, page, is_scraped=is_scraped)
            rows.append(asyncio.run(measuring))
    return rows, versions


def _run_other(
    python: Path, given: Mapping[str, str], tool: str, cycles: int, interval_seconds: float
) -> dict[str, Any]:
    command = [str(python), str(OTHERS), tool, str(cycles), str(interval_seconds)]
    done = subprocess.run(command, capture_output=True, text=True, env={**given}, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} failed:\n{done.stderr}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _other_row(tool: str, told: Mapping[str, Any]) -> Row:
    notes = {
        "bare": "8 calls a GPU, in a loop",
        "gpustat": "one query, in a loop",
        "nvitop-exporter": "1 Hz; host: its figures of the machine",
    }
    parts: dict[str, float] = told["cpu_seconds_per_cycle"]
    return Row(
        name={"bare": "nvidia-ml-py"}.get(tool, tool),
        cpu_seconds=sum(parts.values()),
        parts=parts,
        calls=told["calls_per_cycle"],
        series=sum(told["series"].values()),
        rss_bytes=told["rss_bytes"],
        note=notes[tool],
    )


def _sweeps(plan: Plan, given: Mapping[str, str]) -> list[Row]:
    """Return what `stoker bench sampling` finds."""
    command = [sys.executable, "-m", "stoker.cli", "bench", "sampling", "--json", "--interval=1"]
    command.append(f"--sweeps={plan.sweeps}")
    _tell(f"driver host: {plan.sweeps} sweeps of each kind")
    done = subprocess.run(command, capture_output=True, text=True, env={**given}, check=False)
    if done.returncode:
        raise SystemExit(f"stoker bench sampling failed:\n{done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    rows: list[Row] = []
    for kind in ("fast", "fast_and_slow", "processes"):
        told: dict[str, Any] = found[kind]
        parts = {
            "driver host": told["host_cpu_seconds_per_sweep"],
            "asking": told["agent_cpu_seconds_per_sweep"],
        }
        rows.append(
            Row(
                name=f"driver host, {kind.replace('_', ' ')}",
                cpu_seconds=parts["driver host"],
                parts=parts,
                calls=told["calls_per_sweep"],
                series=told["values_per_sweep"],
                rss_bytes=found["host_rss_bytes"],
                note="one sweep; values, not series",
            )
        )
    return rows


async def _agent(
    name: str, plan: Plan, folder: Path, given: Mapping[str, str], page: Page, *, is_scraped: bool
) -> Row:
    """Return what an agent takes in a second, connected to an aggregator that is not counted."""
    async with Stage(folder) as stage:
        await stage.aggregator().start()
        agent = stage.agent(NODE, None, environment=given)
        told = await agent.start()
        async with stage.fleet() as fleet:
            await ready_nodes(fleet, 1)
        await asyncio.sleep(plan.warm_up_seconds)
        processes = _processes(agent)
        before, calls = [_cpu_seconds(each) for each in processes.values()], page.read().calls
        began = time.monotonic()
        while (left := began + plan.seconds - time.monotonic()) > 0:
            await asyncio.sleep(min(left, SCRAPE_SECONDS))
            if is_scraped:
                await asyncio.to_thread(_scrape, told["metrics"])
        seconds = time.monotonic() - began
        after, calls = (
            [_cpu_seconds(each) for each in processes.values()],
            page.read().calls - calls,
        )
        rss_bytes = sum(each.memory_info().rss for each in processes.values())
        text = await asyncio.to_thread(_scrape, told["metrics"])
    parts = {
        part: (late - early) / seconds
        for part, early, late in zip(processes, before, after, strict=True)
    }
    return Row(
        name=name,
        cpu_seconds=sum(parts.values()),
        parts=parts,
        calls=calls / seconds,
        series=sum(line[0] != "#" for line in text.splitlines()),
        rss_bytes=rss_bytes,
        note="both processes, a second at 1 Hz",
    )


def _is_driver_host(process: psutil.Process) -> bool:
    try:
        return "stoker.agent.driver_host" in process.cmdline()
    except psutil.NoSuchProcess:  # it was the other one, which is over
        return False


def _processes(agent: Daemon) -> dict[str, psutil.Process]:
    whole = psutil.Process(agent.process.pid)
    # Beside it there is, for a moment, the process that reads how the GPUs are partitioned.
    (host,) = [each for each in whole.children() if _is_driver_host(each)]
    return {"agent": whole, "driver host": host}


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        page: bytes = response.read()
    return page.decode()


@contextmanager
def _users() -> Generator[list[int]]:
    """Real processes, for the library to list on every GPU."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    users = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(PROCESSES_PER_GPU)]
    try:
        yield [user.pid for user in users]
    finally:
        for user in users:
            user.communicate()


def _other_python(options: argparse.Namespace, folder: Path) -> Path | None:
    """Return the Python of an environment with the other tools; None: they are not measured."""
    if options.venv is not None:
        return Path(options.venv) / "bin" / "python"
    if not options.install:
        _tell(
            "the other tools are not measured: --install installs them, --venv says where they are"
        )
        return None
    uv, venv = ROOT / ".uv" / "bin" / "uv", folder / "venv"
    python = venv / "bin" / "python"
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, venv],
        [uv, "pip", "install", "--quiet", "--python", python, *PACKAGES],
    ):
        if subprocess.run([str(part) for part in command], check=False).returncode:
            raise SystemExit(
                f"{' and '.join(PACKAGES)} cannot be installed: that needs the network"
            )
    return python


def table(rows: Sequence[Row]) -> list[str]:
    """Return the rows for people."""
    head = ("", "CPU us", "of which", "calls", "series", "RSS MiB", "")
    lines = [head] + [
        (
            row.name,
            f"{row.cpu_seconds * 1e6:.0f}",
            ", ".join(f"{part} {seconds * 1e6:.0f}" for part, seconds in row.parts.items()),
            f"{row.calls:.0f}",
            str(row.series),
            f"{row.rss_bytes / 2**20:.0f}",
            row.note,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return how the agent compares with the exporter that is most like it."""
    found = {row.name: row for row in rows}
    other = found.get("nvitop-exporter")
    if other is None:
        return []
    gpus = other.parts["gpus"]
    return [
        f"{row.name}: {row.cpu_seconds / other.cpu_seconds:.2f} of nvitop-exporter, "
        f"{row.cpu_seconds / gpus:.2f} of its GPUs alone, {row.cpu_seconds * 100:.2f} % of a core"
        for row in rows
        if row.name.startswith("stoker-agent")
    ]


def _tell(what: str) -> None:
    sys.stderr.write(f"{what}\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare_exporters", description=__doc__)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--links", type=int, default=18, help="NVLinks of each GPU")
    parser.add_argument("--seconds", type=int, default=60, help="of each exporter and agent")
    parser.add_argument("--bare-cycles", type=int, default=2000)
    parser.add_argument("--sweeps", type=int, default=30, help="of each kind, one a second")
    parser.add_argument("--warm-up", type=float, default=12.0, help="seconds before an agent's")
    parser.add_argument("--json", type=Path, help="file for the figures")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--install", action="store_true", help="install the other tools for the run")
    where.add_argument("--venv", type=Path, help="an environment that has them")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
