"""What an agent can be told: defaults, limits, and what is not allowed together."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from stoker.agent.config import AgentConfig, MetricsConfig, load, settle
from stoker.core.addresses import Address
from stoker.core.config import defaults_yaml
from stoker.core.daemons import LogLevel
from stoker.core.errors import BadInput


def test_defaults() -> None:
    settings = settle(AgentConfig(), {"HOME": "/home/ann"}, hostname="gpu-17.example")
    assert settings.node == "gpu-17.example"
    assert settings.aggregators == (Address("127.0.0.1", 7070),)
    assert settings.metrics_listen == Address("127.0.0.1", 9410)
    assert (settings.interval_seconds, settings.processes_interval_seconds) == (1.0, 5.0)
    assert settings.log_level is LogLevel.INFO
    assert settings.simulate == ()


@pytest.mark.parametrize(
    ("environ", "is_root", "expected"),
    [
        ({"STATE_DIRECTORY": "/var/lib/stoker/agent"}, False, "/var/lib/stoker/agent"),
        ({"STATE_DIRECTORY": "/var/lib/one:/var/lib/two"}, True, "/var/lib/one"),
        ({}, True, "/var/lib/stoker/agent"),
        ({"HOME": "/home/ann"}, False, "/home/ann/.local/state/stoker/agent"),
        ({"HOME": "/home/ann", "XDG_STATE_HOME": "/x"}, False, "/x/stoker/agent"),
    ],
)
def test_where_state_is_kept(
    monkeypatch: pytest.MonkeyPatch, environ: Mapping[str, str], is_root: bool, expected: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0 if is_root else 1000)
    assert settle(AgentConfig(), environ, hostname="n").data_dir == Path(expected)
    given = settle(AgentConfig(data_dir=Path("/given")), environ, hostname="n")
    assert given.data_dir == Path("/given")


def test_file_environment_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("pool: train\nlabels: {rack: r1}\nsimulate: [2xT4]\nseed: 3\n")
    environ = {"STOKER_AGENT_POOL": "infer", "STOKER_AGENT_METRICS_LISTEN": "127.0.0.1:0"}
    settings = load(file, environ, {"node": "n1", "interval_seconds": "500ms"})
    assert (settings.node, settings.pool, settings.seed) == ("n1", "infer", 3)
    assert dict(settings.labels) == {"rack": "r1"}
    assert settings.interval_seconds == 0.5
    assert settings.metrics_listen == Address("127.0.0.1", 0)


def test_the_printed_defaults_are_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(defaults_yaml(AgentConfig))
    assert load(file, {}, {}) == load(None, {}, {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AgentConfig(node="a b"), "node: wanted letters, digits, dots"),
        (AgentConfig(node="x" * 254), "at most 253, found 'xxx"),
        (AgentConfig(node="-a"), "node: wanted letters"),
        (AgentConfig(pool="a/b"), "pool: wanted letters"),
        (AgentConfig(aggregator=()), "aggregator: wanted at least one HOST:PORT"),
        (AgentConfig(aggregator=("head",)), "aggregator: wanted HOST:PORT, found 'head'"),
        (AgentConfig(aggregator=("127.0.0.1:0",)), "aggregator: 127.0.0.1:0 has no port to dial"),
        (AgentConfig(aggregator=("10.0.0.1:70",)), "10.0.0.1:70 is beyond this machine and the"),
        (
            AgentConfig(metrics=MetricsConfig(listen="0.0.0.0:9410")),
            "metrics.listen: 0.0.0.0:9410 is beyond this machine",
        ),
        (
            AgentConfig(metrics=MetricsConfig(tls_cert=Path("/c"))),
            "metrics.tls_cert: /c is of no use without metrics.tls_key",
        ),
        (
            AgentConfig(metrics=MetricsConfig(listen="0.0.0.0:9410", tls_key=Path("/k"))),
            "metrics.tls_key: /k is of no use without metrics.tls_cert",
        ),
        (
            AgentConfig(metrics=MetricsConfig(tls_client_ca=Path("/a"))),
            "metrics.tls_client_ca: /a is of no use without metrics.tls_cert",
        ),
        (
            AgentConfig(
                metrics=MetricsConfig(listen="0.0.0.0:9410", basic_auth_file=Path("/users"))
            ),
            "metrics.listen: 0.0.0.0:9410 is beyond this machine",
        ),
        (AgentConfig(labels={"": "x"}), "labels: wanted a key of 1 to 63 bytes, found ''"),
        (AgentConfig(labels={"k" * 64: "x"}), "labels: wanted a key of 1 to 63 bytes"),
        (
            AgentConfig(labels={"k": "x" * 10_000_000}),
            "labels: k: wanted at most 256 bytes, found 10000000",
        ),
        (
            AgentConfig(labels={f"k{i}": "" for i in range(65)}),
            "labels: wanted at most 64, found 65",
        ),
        (AgentConfig(simulate=("2xQ9",)), "Q9"),
        (AgentConfig(simulate=("0xT4",)), "'0xT4' asks for 0"),
        (AgentConfig(scenario=Path("x.json")), "scenario: it is for simulated GPUs, and simulate"),
    ],
)
def test_what_is_refused(config: AgentConfig, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        settle(config, {}, hostname="n")
    assert len(str(caught.value)) < 500


def test_insecure_allows_other_machines() -> None:
    config = AgentConfig(
        aggregator=("head:7070", "[fe80::1]:7070"),
        metrics=MetricsConfig(listen="0.0.0.0:9410"),
        insecure=True,
    )
    settings = settle(config, {}, hostname="n")
    assert [str(each) for each in settings.aggregators] == ["head:7070", "[fe80::1]:7070"]


def test_a_certificate_lets_the_pages_be_read_from_other_machines_and_nothing_else() -> None:
    tls = MetricsConfig(listen="0.0.0.0:9410", tls_cert=Path("/c"), tls_key=Path("/k"))
    assert settle(AgentConfig(metrics=tls), {}, hostname="n").metrics == tls
    with pytest.raises(BadInput, match="aggregator: head:7070 is beyond this machine"):
        settle(AgentConfig(aggregator=("head:7070",), metrics=tls), {}, hostname="n")


def test_a_name_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(BadInput, match=r"--node: 'caf\\udce9' is not UTF-8"):
        load(None, {}, {"node": "caf\udce9"})
    with pytest.raises(BadInput, match="--label: .* is not UTF-8"):
        load(None, {}, {"labels": ["a=\udcff"]})
    with pytest.raises(BadInput, match="environment variable STOKER_AGENT_POOL: .* is not UTF-8"):
        load(None, {"STOKER_AGENT_POOL": "\udcff"}, {})
