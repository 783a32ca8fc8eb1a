"""The comparison runs, on few cycles: its figures are looked at by hand, its arithmetic here."""

import json
from pathlib import Path

import pytest
from tests.bench import compare_exporters
from tests.bench.compare_exporters import Row, table, verdicts

SHORT = ("--gpus=2", "--links=4", "--seconds=1", "--bare-cycles=5", "--sweeps=1", "--warm-up=0")


def row(name: str, **parts: float) -> Row:
    return Row(name, sum(parts.values()), parts, 96.0, 384, 75 * 2**20, "1 Hz")


@pytest.mark.slow
@pytest.mark.compiler
def test_stoker_is_measured_without_the_other_tools(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_exporters.main([*SHORT, f"--json={tmp_path / 'found.json'}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {each["name"]: each for each in found["rows"]}
    assert list(rows) == [
        "nvidia-ml-py",
        "driver host, fast",
        "driver host, fast and slow",
        "driver host, processes",
        "stoker-agent, usual rates",
        "stoker-agent, usual rates, scraped",
        "stoker-agent, all every second",
    ]
    assert rows["nvidia-ml-py"]["calls"] == 8 * 2
    assert all(each["calls"] > 0 and each["rss_bytes"] > 2**20 for each in rows.values())
    assert rows["stoker-agent, usual rates"]["series"] > 100
    assert {"at", "machine", "versions", "plan"} < found.keys()
    told = capsys.readouterr()
    assert "--install" in told.err
    assert len(told.out.splitlines()) == 1 + len(rows)


def test_figures_stand_in_columns() -> None:
    head, line = table([row("gpustat", gpus=0.0027)])
    assert line.split() == ["gpustat", "2700", "gpus", "2700", "96", "384", "75", "1", "Hz"]
    assert head.index("CPU us") == line.index("2700")


def test_the_agent_is_compared_with_the_exporter_and_with_its_gpus_alone() -> None:
    rows = [
        row("nvitop-exporter", host=0.002, gpus=0.008),
        row("driver host, fast", host=0.001),
        row("stoker-agent, usual rates", agent=0.001, host=0.001),
    ]
    (said,) = verdicts(rows)
    assert said.split(": ", 1) == [
        "stoker-agent, usual rates",
        "0.20 of nvitop-exporter, 0.25 of its GPUs alone, 0.20 % of a core",
    ]
    assert verdicts(rows[1:]) == []
