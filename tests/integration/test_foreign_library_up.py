"""`stoker up` shows the GPUs of whatever NVML library is there, and says so where there is none."""

import ctypes
import json
from pathlib import Path

import pytest
from tests.support.daemons import Stage, stoker
from tests.support.nvml_library import LIBRARY, build_small
from tests.support.up import stoker_up

from stoker.core.errors import ExitCode

FOREIGN_MODEL = "Foreign Accelerator 24G"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a conforming library that is made here."""
    return build_small(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def no_library() -> None:
    """Leaves a test out on a machine that has a driver."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return
    pytest.skip(f"this machine has {LIBRARY}")


@pytest.mark.compiler
async def test_its_gpus_are_shown(library: Path, tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        up = stoker_up(stage, environment={"LD_LIBRARY_PATH": str(library)})
        await up.ready()
        status = json.loads(stoker("status", "--json", "--address", up.address).stdout)
        (node,) = status["nodes"]
        assert (node["state"], node["simulated"]) == ("ready", False)
        assert [gpu["model"] for gpu in node["gpus"]] == [FOREIGN_MODEL] * 2
        assert "SIMULATED" not in up.daemon.log
        assert len({gpu["uuid"] for gpu in node["gpus"]}) == 2
        assert {gpu["memory_total_bytes"] for gpu in node["gpus"]} == {24 * 2**30}


@pytest.mark.compiler
async def test_a_library_goes_before_a_simulation(library: Path, tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        environment = {"LD_LIBRARY_PATH": str(library)}
        up = stoker_up(stage, "--or-simulate", "8xH100-80GB", environment=environment)
        await up.ready()
        assert "SIMULATED" not in up.daemon.log
        assert FOREIGN_MODEL in up.daemon.log


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("verb", [("agent", "run"), ("up",)], ids=" ".join)
def test_without_a_library_it_says_what_is_missing(verb: tuple[str, ...], tmp_path: Path) -> None:
    done = stoker(*verb, "--data-dir", str(tmp_path / "data"), "--metrics-listen", "127.0.0.1:0")
    assert done.returncode == ExitCode.MISSING
    said = done.stderr.splitlines()[-1]
    for word in (LIBRARY, "LD_LIBRARY_PATH", "--simulate"):
        assert word in said
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("no_library")
async def test_up_simulates_on_request_and_says_so_first(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        up = stoker_up(stage, "--or-simulate", "8xH100-80GB")
        await up.ready()
        first = up.lines[0]
        assert LIBRARY in first
        assert "SIMULATED" in first
        assert "8 x H100-80GB" in first
        status = json.loads(stoker("status", "--json", "--address", up.address).stdout)
        assert [node["simulated"] for node in status["nodes"]] == [True]
        assert [len(node["gpus"]) for node in status["nodes"]] == [8]
