"""What a host has beside its GPUs: as the kernel tells it, and as a simulated node has it."""

import logging
from pathlib import Path

import pytest

from stoker.agent.host_facts import (
    CPUS,
    MEMORY,
    parse_cpus,
    parse_memory_total,
    read_host,
    simulated_host,
)
from stoker.agent.model import Host
from stoker.core.gpu_models import parse_simulate_spec

GIB = 2**30
MEMINFO = "MemTotal:       16384 kB\nMemFree:         1024 kB\n"


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0\n", (0,)),
        ("0-3\n", (0, 1, 2, 3)),
        ("0-1,8,10-11", (0, 1, 8, 10, 11)),
        ("\n", ()),
        ("", ()),
    ],
)
def test_a_list_of_cpus(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == set(cpus)


@pytest.mark.parametrize("text", ["3-1", "a", "0-", "-1", "0-99999999", "0x2"])
def test_what_is_no_list_of_cpus(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (some are told by `int` in its own words)
        parse_cpus(text)


def test_memory_is_that_of_the_whole_host() -> None:
    assert parse_memory_total(MEMINFO) == 16 * 2**20
    assert parse_memory_total("MemFree: 1 kB\nMemTotal: 8 kB\n") == 8192


@pytest.mark.parametrize("text", ["", "MemFree: 1 kB\n", "MemTotal: 16 MB\n", "MemTotal:\n"])
def test_memory_that_is_not_told(text: str) -> None:
    with pytest.raises(ValueError, match="no line `MemTotal"):
        parse_memory_total(text)


def kernel(folder: Path, online: str = "0-7\n", isolated: str = "\n") -> tuple[Path, Path]:
    (folder / "online").write_text(online)
    (folder / "isolated").write_text(isolated)
    (folder / "meminfo").write_text(MEMINFO)
    return folder, folder / "meminfo"


@pytest.mark.parametrize(
    ("online", "isolated", "cpus"),
    [("0-7\n", "\n", 8), ("0-7\n", "2-3,6\n", 5), ("0,2,4\n", "\n", 3), ("0-3\n", "2-9\n", 2)],
    ids=["all", "some are isolated", "some are offline", "isolated ones are offline too"],
)
def test_cpus_are_those_that_processes_run_on(
    tmp_path: Path, online: str, isolated: str, cpus: int
) -> None:
    assert read_host(*kernel(tmp_path, online, isolated)) == Host(cpus * 1000, 16 * 2**20)


@pytest.mark.parametrize("name", ["online", "isolated", "meminfo"])
def test_a_host_that_is_not_told_is_not_guessed(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = kernel(tmp_path)
    (tmp_path / name).unlink()
    with caplog.at_level(logging.WARNING):
        assert read_host(*files) is None
    assert name in caplog.text


@pytest.mark.skipif(
    not (CPUS / "isolated").exists() or not MEMORY.exists(), reason="this kernel does not tell"
)
def test_this_host_is_known() -> None:
    host = read_host()
    assert host is not None
    assert host.cpu_milli >= 1000
    assert host.memory_bytes >= GIB // 4


@pytest.mark.parametrize(
    ("specs", "cpus", "gib"),
    [
        (("8xH100-80GB",), 192, 2048),
        (("1xH100-80GB",), 24, 256),
        (("8xA100-40GB",), 96, 1152),
        (("2xT4",), 24, 96),
        (("4xL40S", "2xT4"), 120, 864),
    ],
)
def test_a_simulated_host_has_its_part_for_each_gpu(
    specs: tuple[str, ...], cpus: int, gib: int
) -> None:
    models = [model for count, model in map(parse_simulate_spec, specs) for _ in range(count)]
    assert simulated_host(models) == Host(cpus * 1000, gib * GIB)
