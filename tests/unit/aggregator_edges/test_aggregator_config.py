"""The aggregator's options: where they come from, and what they must satisfy."""

import re
from pathlib import Path

import pytest

from stoker.aggregator.config import AggregatorConfig, MetricsConfig, load, settle
from stoker.aggregator.cordoning import CordonAt, CordonPolicy
from stoker.aggregator.cuts import PartitioningOptions
from stoker.core.addresses import Address
from stoker.core.config import defaults_yaml
from stoker.core.daemons import LogLevel
from stoker.core.errors import BadInput


def test_defaults_listen_on_this_machine_only() -> None:
    settings = settle(AggregatorConfig(), {}, is_root=True)
    assert settings.listen == Address("127.0.0.1", 7070)
    assert settings.metrics_listen == Address("127.0.0.1", 9411)
    assert settings.data_dir == Path("/var/lib/stoker/aggregator")
    assert settings.log_level is LogLevel.INFO


@pytest.mark.parametrize(
    ("environ", "is_root", "folder"),
    [
        ({"STATE_DIRECTORY": "/s/a:/s/b", "HOME": "/home/ann"}, True, "/s/a"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/home/ann"}, False, "/x/stoker/aggregator"),
        ({"HOME": "/home/ann"}, False, "/home/ann/.local/state/stoker/aggregator"),
        ({"HOME": "/home/ann"}, True, "/var/lib/stoker/aggregator"),
    ],
)
def test_data_folder_is_where_the_user_may_write(
    environ: dict[str, str], is_root: bool, folder: str
) -> None:
    assert settle(AggregatorConfig(), environ, is_root=is_root).data_dir == Path(folder)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "[::]", "head.example.org"])
def test_listening_beyond_this_machine_needs_a_word(host: str) -> None:
    for written in (
        AggregatorConfig(listen=f"{host}:1"),
        AggregatorConfig(metrics=MetricsConfig(listen=f"{host}:1")),
    ):
        with pytest.raises(BadInput, match="--insecure"):
            settle(written, {}, is_root=True)
    allowed = settle(AggregatorConfig(listen=f"{host}:1", insecure=True), {}, is_root=True)
    assert allowed.listen.port == 1


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "aggregator.yaml"
    file.write_text(
        "listen: 127.0.0.1:1\nmetrics: {listen: '127.0.0.1:2'}\ndata_dir: /d\n", encoding="utf-8"
    )
    environ = {"STOKER_AGGREGATOR_LISTEN": "127.0.0.1:3", "STOKER_AGGREGATOR_LOG_LEVEL": "debug"}
    settings = load(file, environ, {"listen": "127.0.0.1:4", "data_dir": None})
    assert settings.listen.port == 4
    assert settings.metrics_listen.port == 2
    assert settings.data_dir == Path("/d")
    assert settings.log_level is LogLevel.DEBUG


def test_printed_defaults_are_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "aggregator.yaml"
    file.write_text(defaults_yaml(AggregatorConfig), encoding="utf-8")
    environ = {"STATE_DIRECTORY": "/s"}
    assert load(file, environ, {}) == settle(AggregatorConfig(), environ, is_root=True)


def test_cordoning_is_what_is_written(tmp_path: Path) -> None:
    file = tmp_path / "aggregator.yaml"
    file.write_text(
        "health: {cordon_at: degraded, cordon_share_max: 0.1, cordon_gpus_min: 2,\n"
        "  uncordon_after_seconds: 5m, lemon_days: 7}\ndata_dir: /d\n",
        encoding="utf-8",
    )
    settings = load(file, {}, {})
    assert settings.cordoning == CordonPolicy(CordonAt.DEGRADED, 0.1, 2, 300.0)
    assert settings.lemons.window_seconds == 7 * 86_400.0
    assert load(None, {"STATE_DIRECTORY": "/s"}, {}).cordoning == CordonPolicy()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("CORDON_AT", "unknown"),
        ("CORDON_SHARE_MAX", "1.1"),
        ("CORDON_SHARE_MAX", "20%"),
        ("CORDON_GPUS_MIN", "-1"),
        ("UNCORDON_AFTER_SECONDS", "-1s"),
        ("LEMON_DAYS", "91"),
        ("LEMON_DAYS", "0"),
    ],
)
def test_cordoning_that_cannot_be_is_named(key: str, value: str) -> None:
    with pytest.raises(BadInput, match=key):
        load(None, {f"STOKER_AGGREGATOR_HEALTH_{key}": value}, {})


def test_policies_of_placement(tmp_path: Path) -> None:
    file = tmp_path / "aggregator.yaml"
    file.write_text(
        "placement: {policy: 2*binpack+energy, pools: {infer: balanced}, compile_from_gpus: 8}\n",
        encoding="utf-8",
    )
    settings = load(file, {}, {})
    assert settings.policies.of("train").name == "2*binpack+energy"
    assert settings.policies.of("infer").name == "balanced"
    assert settings.compile_from_gpus == 8


@pytest.mark.parametrize(
    ("variable", "text", "where"),
    [
        ("POLICY", "best", "placement.policy: there is no placement policy 'best'"),
        ("POOLS", "infer=best", "placement.pools: infer: there is no placement policy 'best'"),
        ("POOLS", "infer=binpack+balanced", "balanced does not score nodes"),
        # Published policies that are there to be compared with.
        ("POOLS", "policy=random", "placement.pools: policy: random is for comparisons only"),
        ("POLICY", "binpack+packing", "placement.policy: packing is for comparisons only"),
    ],
)
def test_a_policy_that_is_not_known(variable: str, text: str, where: str) -> None:
    with pytest.raises(BadInput, match=re.escape(where)):
        load(None, {f"STOKER_AGGREGATOR_PLACEMENT_{variable}": text}, {})


def test_pools_that_are_partitioned_by_demand(tmp_path: Path) -> None:
    file = tmp_path / "aggregator.yaml"
    file.write_text(
        "mig: {pools: {train: automatic dwell=20m wait=1m whole_gpus=2, infer: propose}}\n",
        encoding="utf-8",
    )
    assert load(file, {}, {}).partitioning == {
        "train": PartitioningOptions(
            is_automatic=True, dwell_seconds=1200.0, hysteresis_seconds=60.0, whole_gpus_kept=2
        ),
        "infer": PartitioningOptions(is_automatic=False),
    }
    environ = {"STOKER_AGGREGATOR_MIG_POOLS": "train=automatic whole_gpus=1"}
    assert load(None, environ, {}).partitioning["train"].whole_gpus_kept == 1
    assert load(None, {}, {}).partitioning == {}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("train=", "mig.pools: train: must begin with 'automatic' or 'propose', found ''"),
        ("train=always", "mig.pools: train: must begin with 'automatic' or 'propose'"),
        ("train=automatic dwell=soon", "mig.pools: train: dwell"),
        ("train=automatic whole_gpus=-1", "mig.pools: train: whole_gpus must be a number"),
        ("train=propose speed=1", "mig.pools: train: 'speed=1' is none of"),
    ],
)
def test_partitioning_that_cannot_be_is_named(text: str, where: str) -> None:
    with pytest.raises(BadInput, match=re.escape(where)):
        load(None, {"STOKER_AGGREGATOR_MIG_POOLS": text}, {})
