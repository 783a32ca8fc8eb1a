"""Where the command looks for the agent of this machine."""

import contextlib
import socket
from collections.abc import Generator
from pathlib import Path

import pytest

from stoker.cli import agent_socket
from stoker.cli.agent_socket import socket_paths
from stoker.core.errors import BadInput


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the agent of the service manager would answer."""
    path = tmp_path / "run" / "agent.sock"
    monkeypatch.setattr(agent_socket, "SERVICE_SOCKET", path)
    return path


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"STATE_DIRECTORY": str(tmp_path / "own"), "XDG_STATE_HOME": str(tmp_path / "home")}


@contextlib.contextmanager
def listening(*paths: Path) -> Generator[None]:
    with contextlib.ExitStack() as stack:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.bind(str(path))
            one.listen()
        yield


def simulated(tmp_path: Path, name: str) -> Path:
    return tmp_path / "home" / "stoker" / "agents" / name / "agent.sock"


def test_the_one_that_is_named_is_the_only_one(service: Path, tmp_path: Path) -> None:
    given, named = tmp_path / "given", tmp_path / "named"
    environ = {"STOKER_AGENT_SOCKET": str(named)}
    with listening(service):
        assert socket_paths(given, environ) == [given]
        assert socket_paths(None, environ) == [named]


def test_without_a_name_the_usual_places_are_tried(
    service: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    assert socket_paths(None, environ) == [service, tmp_path / "own" / "agent.sock"]


def test_an_agent_in_a_usual_place_goes_before_those_of_up(
    service: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    own = tmp_path / "own" / "agent.sock"
    with listening(own, simulated(tmp_path, "sim-1"), simulated(tmp_path, "sim-2")):
        assert socket_paths(None, environ) == [service, own]


def test_the_agent_of_up_is_found(service: Path, environ: dict[str, str], tmp_path: Path) -> None:
    with listening(simulated(tmp_path, "sim-2")):
        dead = simulated(tmp_path, "sim-1")
        with listening(dead):
            pass
        usual = [service, tmp_path / "own" / "agent.sock"]
        assert socket_paths(None, environ) == [*usual, simulated(tmp_path, "sim-2")]


def test_of_several_agents_of_up_one_must_be_named(
    service: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    paths = [simulated(tmp_path, "sim-1"), simulated(tmp_path, "sim-2")]
    with listening(*paths), pytest.raises(BadInput) as raised:
        socket_paths(None, environ)
    assert str(raised.value) == (
        f"2 agents of `stoker up` run here, --socket names one of: {paths[0]}, {paths[1]}"
    )
    assert not service.exists()
