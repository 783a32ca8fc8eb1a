"""`stoker up` on a real card: it shows what nvidia-smi shows, and an allocation is that GPU."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

STOKER = (sys.executable, "-m", "stoker.cli")
# What the allocated process is to see, by CUDA's own count and the UUID of its only device.
SEES = (
    "import cupy, json; "
    "props = cupy.cuda.runtime.getDeviceProperties(0); "
    "cupy.arange(1 << 20).sum().item(); "
    "print(json.dumps({'count': cupy.cuda.runtime.getDeviceCount(), 'uuid': props['uuid'].hex()}))"
)


def _smi(*fields: str) -> list[dict[str, str]]:
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    return [dict(zip(fields, map(str.strip, line.split(",")), strict=True)) for line in lines]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A fleet of this machine, brought up by one command on free ports."""
    doors = ("--listen", "--metrics-listen", "--aggregator-metrics-listen")
    anywhere = [word for door in doors for word in (door, "127.0.0.1:0")]
    up = subprocess.Popen(
        [*STOKER, "up", "--data-dir", str(tmp_path), *anywhere], stdout=subprocess.PIPE, text=True
    )
    assert up.stdout is not None
    shown: list[str] = []
    for line in up.stdout:
        shown.append(line)
        if line.startswith("ready"):
            break
    else:
        pytest.fail(f"up never was ready: {''.join(shown)}")
    try:
        yield json.loads((tmp_path / "aggregator" / "aggregator.json").read_text())["listen"]
    finally:
        up.terminate()
        up.wait(20)


def _stoker(address: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [*STOKER, "--address", address, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_status_shows_the_cards_of_nvidia_smi(address: str) -> None:
    status = json.loads(_stoker(address, "status", "--json").stdout)
    (node,) = status["nodes"]
    assert node["simulated"] is False
    seen = {g["uuid"]: g for g in node["gpus"]}
    expected = _smi("uuid", "name", "memory.total")
    assert set(seen) == {card["uuid"] for card in expected}
    for card in expected:
        gpu = seen[card["uuid"]]
        assert gpu["model"] == card["name"]
        assert gpu["memory_total_bytes"] // 2**20 == int(card["memory.total"])
        assert gpu["temperature_celsius"] is not None
        assert gpu["power_watts"] is not None


def test_a_command_in_an_allocation_sees_exactly_its_gpu(address: str) -> None:
    ran = _stoker(address, "alloc", "--gpus", "1", "--", sys.executable, "-c", SEES)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout.splitlines()[-1])
    assert seen["count"] == 1
    uuids = {card["uuid"].removeprefix("GPU-").replace("-", "") for card in _smi("uuid")}
    assert seen["uuid"] in uuids
    left = json.loads(_stoker(address, "status", "--json").stdout)["allocations"]
    assert left == []
