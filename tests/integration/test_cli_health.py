"""`stoker health|cordon|drain|uncordon` and `stoker agent set-healthy`, over real sockets."""

import json
import os
import socket
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from tests.support.fleet_service import Served

from stoker.cli import __main__ as entry
from stoker.core import local
from stoker.core.errors import ExitCode
from stoker.v1 import fleet_pb2, types_pb2

UUID = "GPU-1"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in os.environ if each.startswith("STOKER_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def served() -> Generator[Served]:
    served = Served()
    yield served
    served.stop()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line and returns its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = entry.run(list(arguments))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def say(served: Served, run: Run) -> Callable[..., str]:
    """Runs a verb for the fleet that must succeed, and returns what it printed."""

    def say(*arguments: str) -> str:
        code, out, err = run("--address", served.address, *arguments)
        assert (code, err) == (ExitCode.OK, "")
        return out

    return say


Say = Callable[..., str]


# --- health


def test_health_is_told(served: Served, say: Say) -> None:
    health = types_pb2.GpuHealth(
        uuid=UUID,
        verdict=types_pb2.GPU_VERDICT_UNHEALTHY,
        action=types_pb2.REPAIR_ACTION_REBOOT,
        reason="Xid 79: the GPU fell off the bus\x1b[2J",
    )
    condition = fleet_pb2.GpuCondition(node="n1", uuid=UUID, index=3, health=health)
    served.service.health.gpus.append(condition)
    shown = say("health")
    assert "n1      3  unhealthy  reboot" in shown
    assert r"Xid 79: the GPU fell off the bus\x1b[2J" in shown
    assert shown.endswith("\n0 of at most 1 GPU are cordoned for their health\n")
    told = json.loads(say("health", "--all", "--json"))
    (gpu,) = told["gpus"]
    assert (gpu["health"]["verdict"], gpu["health"]["action"]) == ("unhealthy", "reboot")
    assert (gpu["health"]["since"], gpu["cordon"], told["findings"]) == (None, None, [])
    asked = served.service.called("ListHealth")
    assert [each.include_healthy for each in asked] == [False, True]


# --- cordon, drain, uncordon


def test_node_is_cordoned_and_let_back(say: Say) -> None:
    assert say("cordon", "n1", "--reason", "fan is loud") == "n1 cordoned: fan is loud\n"
    assert json.loads(say("uncordon", "n1", "--json"))["cordoned"] is None
    assert say("uncordon", "n1") == "n1 not cordoned\n"


@pytest.mark.parametrize("name", ["0", UUID])
def test_gpu_is_named_by_its_number_or_its_uuid(name: str, served: Served, say: Say) -> None:
    said = say("cordon", "n1", "--gpu", name, "--reason", "fan is loud")
    assert said == "GPU 0 of n1 cordoned: fan is loud\n"
    (sent,) = served.service.called("Cordon")
    assert (sent.node, sent.gpu_uuid) == ("n1", UUID)
    told = json.loads(say("uncordon", "n1", "--gpu", name, "--json"))
    assert told["gpus"][0]["cordon"] is None


def test_what_stays_cordoned_beside_it_is_told(say: Say) -> None:
    say("cordon", "n1", "--gpu", "0", "--reason", "ECC")
    said = say("cordon", "n1", "--reason", "fan is loud")
    assert said == "n1 cordoned: fan is loud; GPU 0 cordoned: ECC\n"
    assert say("uncordon", "n1", "--gpu", "0") == (
        "GPU 0 of n1 not cordoned; n1 cordoned: fan is loud\n"
    )
    say("cordon", "n1", "--gpu", "0", "--reason", "ECC")
    assert say("uncordon", "n1") == "n1 not cordoned; GPU 0 cordoned: ECC\n"


def test_gpu_that_was_taken_out_can_still_be_let_back(served: Served, say: Say) -> None:
    say("cordon", "n1", "--gpu", UUID, "--reason", "ECC")
    served.service.taken_out.append(served.service.node.gpus.pop())
    assert say("uncordon", "n1", "--gpu", UUID) == f"{UUID} is not on n1 now\n"


def test_drain_tells_what_it_waits_for(served: Served, say: Say) -> None:
    assert say("drain", "n1", "--reason", "new fan") == "n1 cordoned: new fan; nothing is held\n"
    served.service.node.gpus[0].allocation_ids.extend(["a1", "a2"])
    assert say("drain", "n1", "--reason", "new fan") == (
        "n1 cordoned: new fan; 2 allocations held, waited for: a1, a2\n"
    )
    said = say("drain", "n1", "--gpu", "0", "--reason", "new fan", "--grace", "1d")
    assert said.startswith("GPU 0 of n1 cordoned: new fan; n1 cordoned: new fan; 2 allocations")
    assert "held, ended in 23h 59m" in said or "held, ended in 1d" in said
    assert said.endswith(": a1, a2\n")
    told = json.loads(say("drain", "n1", "--reason", "new fan", "--grace", "0", "--json"))
    assert told["drain_at"] > 0
    assert [each.HasField("grace_seconds") for each in served.service.called("Drain")] == [
        *(False, False, True, True),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["cordon", "n1", "--gpu", "7", "--reason", "x"], 6, "GPU 7 is not known on n1"),
        (["cordon", "n2", "--gpu", "0", "--reason", "x"], 6, "node 'n2' is not known"),
        (["cordon", "n1", "--gpu", "GPU-2", "--reason", "x"], 6, "GPU 'GPU-2' is not known"),
        (["cordon", "n1", "--gpu", "first", "--reason", "x"], 2, "found 'first'"),
        (["uncordon", "n1", "--gpu", ""], 2, "--gpu: wanted a GPU's number"),
        (["uncordon", "n1", "--gpu", "MIG-1"], 2, "found 'MIG-1'"),
        (["drain", "n1"], 2, "--reason"),
        (["drain", "n1", "--reason", "x", "--grace", "lunch"], 2, "--grace: 'lunch'"),
        (["drain", "n1", "--reason", "x", "--grace=-5m"], 2, "--grace: '-5m'"),
        (["health", "--all", "n1"], 2, "n1"),
    ],
)
def test_what_cannot_be_is_named_and_nothing_is_cordoned(
    arguments: list[str], code: int, said: str, served: Served, run: Run
) -> None:
    found, out, err = run("--address", served.address, *arguments)
    assert (found, out) == (code, "")
    (line,) = err.splitlines()
    assert said in line
    assert not served.service.node.HasField("cordoned")
    assert not served.service.node.gpus[0].HasField("cordon")


def test_drain_and_health_of_an_aggregator_that_is_gone(served: Served, run: Run) -> None:
    served.stop()
    for verb in (["health"], ["drain", "n1", "--reason", "x"], ["cordon", "n1", "--reason", "x"]):
        code, out, _ = run("--address", served.address, "--json", *verb)
        assert code == ExitCode.UNREACHABLE
        assert json.loads(out)["error"]["kind"] == "Unreachable"


# --- the agent of this machine


@pytest.fixture
def agent(tmp_path: Path) -> Generator["FakeAgent"]:
    agent = FakeAgent(tmp_path / "agent.sock")
    yield agent
    agent.close()


class FakeAgent:
    """Answers every caller with one answer, and remembers what was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[local.Request] = []
        self.answer: local.Answer = local.SetHealthy(UUID, ("Xid 79",), "")
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._serving = threading.Thread(target=self._serve)
        self._serving.start()

    def _serve(self) -> None:
        while True:
            caller, _ = self._listening.accept()
            with caller, caller.makefile("rb") as lines:
                if not (line := lines.readline()):
                    return  # `close` hangs up without a word
                self.asked.append(local.decode_request(line))
                caller.sendall(local.encode(self.answer))

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(self.path))
        self._serving.join()
        self._listening.close()


@pytest.mark.parametrize("name", ["3", UUID])
def test_faults_are_forgotten(name: str, agent: FakeAgent, run: Run) -> None:
    code, out, err = run("agent", "set-healthy", name, "--socket", str(agent.path))
    assert (code, err) == (ExitCode.OK, "")
    assert out == f"{UUID}: 1 fault forgotten\n  Xid 79\nwhat is still so will be found again\n"
    assert agent.asked == [local.AskSetHealthy(name)]
    code, out, _ = run("agent", "set-healthy", name, "--socket", str(agent.path), "--json")
    told: dict[str, Any] = json.loads(out)
    assert (code, told["gpu_uuid"], told["forgotten"]) == (ExitCode.OK, UUID, ["Xid 79"])


def test_agent_that_knows_no_such_gpu_says_which_there_are(agent: FakeAgent, run: Run) -> None:
    agent.answer = local.Refusal("no GPU is called '9' here", int(ExitCode.NOT_FOUND))
    code, out, err = run("agent", "set-healthy", "9", "--socket", str(agent.path))
    assert (code, out, err) == (ExitCode.NOT_FOUND, "", "stoker: no GPU is called '9' here\n")


def test_what_can_be_no_gpu_is_not_asked_for(agent: FakeAgent, run: Run) -> None:
    code, _, err = run("agent", "set-healthy", "all", "--socket", str(agent.path))
    assert code == ExitCode.USAGE
    assert "GPU: wanted a GPU's number on its node or its UUID (GPU-...), found 'all'" in err
    assert agent.asked == []
