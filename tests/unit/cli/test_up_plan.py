"""Requirements on what `stoker up` starts and says."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.conftest import Golden

from stoker.cli.children import (
    RESTART_SECONDS_MAX,
    ChildFailed,
    how_it_ended,
    restart_pause_seconds,
)
from stoker.cli.up_plan import (
    ANY_PORT,
    NODES_MAX,
    NodePlan,
    Options,
    agent_command,
    aggregator_command,
    dialled,
    fallback_notice,
    plan_nodes,
    prometheus_targets,
    ready_lines,
)
from stoker.core.errors import BadInput, ExitCode

PORT = "127.0.0.1:9410"

# specs, --nodes -> what each node simulates
PLANS: dict[str, tuple[Sequence[str], int | None, list[str]]] = {
    "one spec": (["2xT4"], None, ["2xT4"]),
    "one spec, many nodes": (["2xT4"], 3, ["2xT4", "2xT4", "2xT4"]),
    "a spec for each node": (["2xT4", "8xB200"], None, ["2xT4", "8xB200"]),
    "a spec for each node, counted": (["2xT4", "8xB200"], 2, ["2xT4", "8xB200"]),
}


@pytest.mark.parametrize("name", PLANS)
def test_simulated_nodes(name: str) -> None:
    specs, count, expected = PLANS[name]
    nodes = plan_nodes(specs, count, PORT)
    assert [node.simulate for node in nodes] == expected
    assert [node.name for node in nodes] == [f"sim-{n}" for n in range(1, len(expected) + 1)]
    # The first has the usual port, the others any.
    assert [node.metrics_listen for node in nodes] == [PORT, *[ANY_PORT] * (len(expected) - 1)]


def test_this_machine_is_one_node() -> None:
    assert plan_nodes([], None, PORT) == (NodePlan(None, None, PORT),)
    assert plan_nodes([], 1, PORT) == (NodePlan(None, None, PORT),)


BAD_PLANS: dict[str, tuple[Sequence[str], int | None, str]] = {
    "several of this machine": ([], 2, "this machine's GPUs are one node"),
    "another count than specs": (["2xT4", "2xT4"], 3, "--simulate is given 2 times"),
    "unknown model": (["2xT5"], None, "T5"),
    "too many": (["2xT4"], NODES_MAX + 1, f"at most {NODES_MAX}, found {NODES_MAX + 1}"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_plans_that_cannot_be(name: str) -> None:
    specs, count, text = BAD_PLANS[name]
    with pytest.raises(BadInput, match=text):
        plan_nodes(specs, count, PORT)


OPTIONS = Options(Path("/data"), "127.0.0.1:7070", "127.0.0.1:9411", PORT, "warning")


def test_command_lines() -> None:
    aggregator = aggregator_command(OPTIONS, Path("/data/aggregator"), "127.0.0.1:1", ANY_PORT)
    assert aggregator[1:] == [
        *("-P", "-m", "stoker.aggregator", "--data-dir", "/data/aggregator"),
        *("--listen", "127.0.0.1:1", "--metrics-listen", ANY_PORT, "--log-level", "warning"),
    ]
    node = NodePlan("sim-1", "2xT4", PORT)
    agent = agent_command(OPTIONS, node, Path("/data/a"), "127.0.0.1:1", PORT)
    assert agent[1:] == [
        *("-P", "-m", "stoker.agent", "--data-dir", "/data/a", "--aggregator", "127.0.0.1:1"),
        *("--metrics-listen", PORT, "--node", "sim-1", "--simulate", "2xT4"),
        *("--log-level", "warning"),
    ]


def test_agent_of_this_machine_names_itself() -> None:
    real = agent_command(OPTIONS, NodePlan(None, None, PORT), Path("/d"), "127.0.0.1:1", PORT)
    assert "--node" not in real
    assert "--simulate" not in real


def test_beyond_this_machine_is_passed_on() -> None:
    open_to_all = Options(Path("/d"), "0.0.0.0:7070", ANY_PORT, PORT, "info", insecure=True)
    assert aggregator_command(open_to_all, Path("/d"), "0.0.0.0:7070", PORT)[-1] == "--insecure"


@pytest.mark.parametrize(
    ("listen", "dialled_at"),
    [
        ("0.0.0.0:7070", "127.0.0.1:7070"),
        ("[::]:7070", "[::1]:7070"),
        ("10.0.0.1:7070", "10.0.0.1:7070"),
        ("localhost:1", "localhost:1"),
    ],
)
def test_what_listens_everywhere_is_dialled_on_loopback(listen: str, dialled_at: str) -> None:
    assert dialled(listen) == dialled_at


def test_fallback_says_what_lacks_and_that_it_simulates() -> None:
    line = fallback_notice("library_missing", "8xH100-80GB")
    assert "no NVML library (libnvidia-ml.so.1) was found" in line
    assert line.endswith("SIMULATED, 8 x H100-80GB")
    assert "driver is not loaded" in fallback_notice("driver_not_loaded", "T4")
    assert "(some_new_kind)" in fallback_notice("some_new_kind", "T4")


def test_targets_are_what_prometheus_reads() -> None:
    assert prometheus_targets("127.0.0.1:1", {"sim-1": "127.0.0.1:2"}) == [
        {"targets": ["127.0.0.1:1"], "labels": {"job": "stoker-aggregator"}},
        {"targets": ["127.0.0.1:2"], "labels": {"job": "stoker-agent", "node": "sim-1"}},
    ]


def test_ready(golden: Golden) -> None:
    nodes = {f"sim-{n}": "8 x NVIDIA H100 80GB HBM3, SIMULATED" for n in range(1, 11)}
    metrics = ["127.0.0.1:9411", "127.0.0.1:9410", "127.0.0.1:40001"]
    lines = ready_lines("stoker", "127.0.0.1:7070", nodes, metrics, Path("/data/targets.json"))
    golden("cli/ready.txt", "\n".join(lines) + "\n")


def test_ready_names_an_unusual_address() -> None:
    lines = ready_lines("stoker", "127.0.0.1:9", {"n": "1 x T4"}, ["127.0.0.1:1"], Path("/t"))
    assert "  stoker --address 127.0.0.1:9 status" in lines


def test_pauses_before_restarts_grow_to_a_bound() -> None:
    assert [restart_pause_seconds(n) for n in (1, 2, 3)] == [1.0, 2.0, 4.0]
    assert restart_pause_seconds(1_000_000) == RESTART_SECONDS_MAX


ENDS = {0: "ended with exit code 0", 7: "ended with exit code 7", -9: "was ended by SIGKILL"}


@pytest.mark.parametrize("code", ENDS)
def test_ends_are_told_in_words(code: int) -> None:
    assert how_it_ended(code) == ENDS[code]


def test_end_before_ready_keeps_the_daemons_exit_code() -> None:
    assert ChildFailed("aggregator", 7).exit_code is ExitCode.STORE
    assert ChildFailed("aggregator", -9).exit_code is ExitCode.FAILED
    assert ChildFailed("aggregator", 77).exit_code is ExitCode.FAILED
