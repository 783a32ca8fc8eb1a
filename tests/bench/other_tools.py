"""Runs one other reader of NVML for a while and prints what it used, as JSON.

It is run by the Python of an environment of its own (see `compare_exporters`), which has no stoker:
`python other_tools.py bare|gpustat|nvitop-exporter CYCLES INTERVAL_SECONDS`. CPU time is that of
this process, user and system, all threads, while cycles ran; what comes before them is not in it.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any

_WARM_UP_CYCLES = 3  # caches of handles and names, and the first difference of counters

Cycle = Callable[[], None]


def main(tool: str, cycles: int, interval_seconds: float) -> None:
    """Run the cycles and print what they used."""
    make = {"bare": _bare, "gpustat": _gpustat, "nvitop-exporter": _nvitop_exporter}[tool]
    parts, series = make()
    for _ in range(_WARM_UP_CYCLES):
        _run(parts, interval_seconds)
    calls = _calls()
    used = dict.fromkeys(parts, 0.0)
    for _ in range(cycles):
        for name, seconds in _run(parts, interval_seconds).items():
            used[name] += seconds
    calls = _calls() - calls
    found = {
        "cpu_seconds_per_cycle": {name: seconds / cycles for name, seconds in used.items()},
        "calls_per_cycle": calls / cycles,
        "rss_bytes": _rss_bytes(),
        "series": series(),
        "version": None if tool == "bare" else version(tool),
    }
    sys.stdout.write(json.dumps(found) + "\n")


def _run(parts: Mapping[str, Cycle], interval_seconds: float) -> dict[str, float]:
    """Run one cycle, then wait until the next is due; return the CPU time of its parts."""
    due = time.monotonic() + interval_seconds
    used: dict[str, float] = {}
    for name, part in parts.items():
        began = time.process_time()
        part()
        used[name] = time.process_time() - began
    time.sleep(max(0.0, due - time.monotonic()))
    return used


def _calls() -> int:
    """Return how many calls the library has counted (see fake_nvml/nvml.c)."""
    with open(os.environ["FAKE_NVML_PAGE"], "rb") as page:
        return int.from_bytes(page.read(8), sys.byteorder)


def _rss_bytes() -> int:
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _bare() -> tuple[dict[str, Cycle], Callable[[], dict[str, int]]]:
    """Eight calls for each GPU, as cheap as Python can make them."""
    nvml: Any = import_module("pynvml")
    nvml.nvmlInit()
    gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]

    def cycle() -> None:
        for gpu in gpus:
            nvml.nvmlDeviceGetMemoryInfo(gpu)
            nvml.nvmlDeviceGetUtilizationRates(gpu)
            nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)
            nvml.nvmlDeviceGetPowerUsage(gpu)
            nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
            nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)
            nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)
            nvml.nvmlDeviceGetPerformanceState(gpu)

    return {"gpus": cycle}, lambda: {"gpus": 11 * len(gpus)}


def _gpustat() -> tuple[dict[str, Cycle], Callable[[], dict[str, int]]]:
    """A query of all GPUs and their processes. It sleeps 0.1 s for each GPU that has any."""
    gpustat: Any = import_module("gpustat")

    def cycle() -> None:
        gpustat.new_query()

    def facts() -> dict[str, int]:
        entries: list[Any] = gpustat.new_query().jsonify()["gpus"]
        told = sum(value is not None for entry in entries for value in entry.values())
        return {"gpus": told - len(entries)}  # `processes` is a list

    return {"gpus": cycle}, facts


def _nvitop_exporter() -> tuple[dict[str, Cycle], Callable[[], dict[str, int]]]:
    """What `nvitop-exporter` does in a cycle: its host's figures, then GPUs with processes."""
    device_type: Any = import_module("nvitop").Device
    exporting: Any = import_module("nvitop_exporter.exporter")
    prometheus: Any = import_module("prometheus_client")
    registry = prometheus.CollectorRegistry()
    devices: list[Any] = device_type.from_indices(range(device_type.count()))
    exporter = exporting.PrometheusExporter(devices, hostname="here", registry=registry)

    def update_gpus() -> None:
        for device in devices:
            exporter.update_device(device)

    def series() -> dict[str, int]:
        page: str = prometheus.generate_latest(registry).decode()
        lines = [each for each in page.splitlines() if each[0] != "#"]
        return {
            "host": sum(each.startswith("host_") for each in lines),
            "gpus": sum(each.startswith("gpu_") for each in lines),
            "processes": sum(each.startswith("process_") for each in lines),
        }

    return {"host": exporter.update_host, "gpus": update_gpus}, series


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
