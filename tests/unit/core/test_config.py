"""Configuration: three places in rising order, and an error that names what is wrong and where."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

import pytest

from stoker.core.config import FILE_BYTES_MAX, defaults_yaml, load, option, section
from stoker.core.errors import BadInput

_NO_LABELS: Mapping[str, str] = MappingProxyType({})


class Level(StrEnum):
    DEBUG = "debug"
    INFO = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    listen: str = option("127.0.0.1:9410", "Where to listen.")
    backlog: int = option(16, "Connections that may wait.", minimum=1, maximum=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    node: str = option("", "Name of the node.")
    aggregator: tuple[str, ...] = option(("127.0.0.1:7070",), "Where to report.")
    labels: Mapping[str, str] = option(_NO_LABELS, "Words about the node.", flag="--label")
    interval_seconds: float = option(1.0, "Time between samples.", minimum=0.1, maximum=60.0)
    reserve_bytes: int = option(0, "Memory left alone.")
    weight: float = option(1.0, "A bare number.")
    insecure: bool = option(default=False, doc="Whether to listen beyond loopback.")
    level: Level = option(Level.INFO, "How much is logged.")
    data_dir: Path | None = option(None, "Where state is kept.")
    metrics: Listener = section(Listener)


def loaded(
    tmp_path: Path,
    yaml: str | bytes | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Schema:
    file = None
    if yaml is not None:
        file = tmp_path / "a.yaml"
        file.write_bytes(yaml.encode() if isinstance(yaml, str) else yaml)
    return load(Schema, file, environ or {}, "STOKER_AGENT_", flags or {})


def test_nothing_given_is_the_defaults(tmp_path: Path) -> None:
    assert loaded(tmp_path) == Schema()
    assert loaded(tmp_path, "") == Schema()
    assert loaded(tmp_path, "# only a comment\nmetrics:\n") == Schema()


def test_each_place_overrides_the_one_before(tmp_path: Path) -> None:
    yaml = "node: file\ninterval_seconds: 2s\nmetrics:\n  listen: 127.0.0.1:1\n  backlog: 2\n"
    environ = {"STOKER_AGENT_NODE": "environment", "STOKER_AGENT_METRICS_LISTEN": "127.0.0.1:2"}
    config = loaded(tmp_path, yaml, environ, {"metrics.listen": "127.0.0.1:3", "node": None})
    assert config.node == "environment"
    assert config.interval_seconds == 2.0
    assert config.metrics == Listener(listen="127.0.0.1:3", backlog=2)


@pytest.mark.parametrize(
    ("yaml", "key", "expected"),
    [
        ("interval_seconds: 0.5", "interval_seconds", 0.5),
        ("interval_seconds: 500ms", "interval_seconds", 0.5),
        ("reserve_bytes: 2GiB", "reserve_bytes", 2 << 30),
        ("reserve_bytes: 4096", "reserve_bytes", 4096),
        ("weight: 3", "weight", 3.0),
        ("insecure: yes", "insecure", True),
        ("level: debug", "level", Level.DEBUG),
        ("data_dir: /srv/x", "data_dir", Path("/srv/x")),
        ("data_dir:", "data_dir", None),
        ("node: '007'", "node", "007"),
        ("aggregator: [a:1, b:2]", "aggregator", ("a:1", "b:2")),
        ("aggregator: a:1, b:2", "aggregator", ("a:1", "b:2")),
        ("labels: {rack: r1, zone: z}", "labels", {"rack": "r1", "zone": "z"}),
        ("labels: rack=r1,zone=z", "labels", {"rack": "r1", "zone": "z"}),
    ],
)
def test_values_of_the_file(tmp_path: Path, yaml: str, key: str, expected: object) -> None:
    assert getattr(loaded(tmp_path, yaml), key) == expected


@pytest.mark.parametrize(
    ("variable", "text", "key", "expected"),
    [
        ("INTERVAL_SECONDS", "250ms", "interval_seconds", 0.25),
        ("RESERVE_BYTES", "1MB", "reserve_bytes", 1_000_000),
        ("INSECURE", "On", "insecure", True),
        ("INSECURE", "0", "insecure", False),
        ("LEVEL", "debug", "level", Level.DEBUG),
        ("AGGREGATOR", "a:1,b:2", "aggregator", ("a:1", "b:2")),
        ("LABELS", "a=1,b=x=y", "labels", {"a": "1", "b": "x=y"}),
        ("WEIGHT", "0.25", "weight", 0.25),
        ("DATA_DIR", "/srv/y", "data_dir", Path("/srv/y")),
    ],
)
def test_values_of_the_environment(
    tmp_path: Path, variable: str, text: str, key: str, expected: object
) -> None:
    assert getattr(loaded(tmp_path, environ={f"STOKER_AGENT_{variable}": text}), key) == expected


def test_flags_may_be_repeated_or_hold_values(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        flags={"aggregator": ["a:1", "b:2"], "labels": ["a=1", "b=2"], "insecure": True},
    )
    assert config.aggregator == ("a:1", "b:2")
    assert config.labels == {"a": "1", "b": "2"}
    assert config.insecure


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("nod: x", "a.yaml, line 1: unknown key 'nod'; did you mean node?"),
        (
            "\nmetrics:\n  lisen: x",
            "line 3: unknown key 'metrics.lisen'; did you mean metrics.liste",
        ),
        ("zzz: x", "unknown key 'zzz'; known are aggregator, data_dir, insecure, interval_seconds"),
        ("node: 12", "line 1: node: wanted text, found 12 (quote it)"),
        ("node: no", "line 1: node: wanted text, found false (quote it)"),
        ("node: [a]", "line 1: node: wanted text, found ['a']"),
        ("node: 2024-02-31", "node: '2024-02-31' cannot be read"),
        ("node: !!python/object:os.system x", "line 1: node: 'x' cannot be read"),
        ("node: a\nnode: b", "line 2: 'node' is given twice"),
        ("labels: {a: x, a: y}", "labels: 'a' is given twice"),
        ("labels: {a: 1}", "labels: a: wanted text, found 1 (quote it)"),
        ("labels: a", "labels: wanted key=value, found 'a'"),
        ("labels: 3", "labels: wanted a mapping of text to text, found 3"),
        ("labels: {a: {b: c}}", "labels: wanted a single value, found a mapping"),
        ("aggregator: {a: b}", "aggregator: wanted a list of text, found {'a': 'b'}"),
        ("interval_seconds: fast", "line 1: interval_seconds: 'fast' is not a duration"),
        ("interval_seconds: 1m30s", "interval_seconds: wanted 0.1 to 60, found '1m30s'"),
        ("interval_seconds: 0", "interval_seconds: wanted 0.1 to 60, found 0"),
        ("interval_seconds: true", "wanted a duration such as 45s or 10m, found true"),
        ("interval_seconds: .nan", "interval_seconds: wanted 0.1 to 60, found nan"),
        ("weight: .inf", "weight: wanted a finite number, found inf"),
        ("weight: heavy", "weight: wanted a number, found 'heavy'"),
        ("reserve_bytes: 20G", "reserve_bytes: '20G' is not a size"),
        ("reserve_bytes: 1.5", "reserve_bytes: wanted a size such as 512MiB or 20GiB, found 1.5"),
        ("insecure: perhaps", "insecure: wanted true or false, found 'perhaps'"),
        ("level: loud", "level: wanted one of debug, info, found 'loud'"),
        ("metrics: 3", "metrics: wanted keys with values, found a single value"),
        ("metrics:\n  backlog: 1.5", "metrics.backlog: wanted a whole number, found 1.5"),
        ("metrics:\n  backlog: 0", "metrics.backlog: wanted 1 to 1024, found 0"),
        ("node:", "node: wanted text, found nothing"),
        ("- a", "line 1: the file: wanted keys with values, found a list"),
        ("[a]: b", "a key must be text, found a list"),
        ("node: 'a", "not YAML: found unexpected end of stream"),
        ("a: b: c", "a.yaml, line 1: not YAML: mapping values are not allowed here"),
        ("[" * 20_000, "nested too deeply"),
        (b"node: \xff\xfe", "not UTF-8 at byte 6"),
        ("node: x\x00", "not YAML"),
        ("#" * (FILE_BYTES_MAX + 1), "this is no configuration"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, yaml: str | bytes, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        loaded(tmp_path, yaml)
    assert str(caught.value).startswith(str(tmp_path / "a.yaml"))
    assert "\n" not in str(caught.value)


def test_a_hostile_value_is_cut(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        loaded(tmp_path, f"level: {'x' * 500_000}")
    assert len(str(caught.value)) < 300


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no\.yaml: cannot be read: No such file"):
        load(Schema, tmp_path / "no.yaml", {}, "X_", {})
    with pytest.raises(BadInput, match="cannot be read: Is a directory"):
        load(Schema, tmp_path, {}, "X_", {})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"STOKER_AGENT_NODES": "x"},
            "unknown key 'STOKER_AGENT_NODES'; did you mean STOKER_AGENT_",
        ),
        ({"STOKER_AGENT_WEIGHT": "x"}, "environment variable STOKER_AGENT_WEIGHT: wanted a number"),
    ],
)
def test_a_wrong_variable_is_named(
    tmp_path: Path, environ: Mapping[str, str], message: str
) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        loaded(tmp_path, environ=environ)


def test_variables_that_a_cluster_injects_are_not_ours(tmp_path: Path) -> None:
    injected = {
        "STOKER_AGENT_SERVICE_HOST": "10.0.0.1",
        "STOKER_AGENT_SERVICE_PORT_GRPC": "7070",
        "STOKER_AGENT_PORT": "tcp://10.0.0.1:7070",
        "STOKER_AGENT_PORT_7070_TCP_ADDR": "10.0.0.1",
        "STOKER_ALLOCATION_ID": "another prefix",
    }
    assert loaded(tmp_path, environ=injected) == Schema()


def test_a_wrong_flag_is_named_as_it_was_typed(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--interval: wanted 0\.1 to 60, found '90'"):
        loaded(tmp_path, flags={"interval_seconds": "90"})
    with pytest.raises(BadInput, match="--metrics-backlog: wanted a whole number"):
        loaded(tmp_path, flags={"metrics.backlog": "many"})
    with pytest.raises(BadInput, match="--label: wanted key=value"):
        loaded(tmp_path, flags={"labels": ["x"]})


def test_rendered_defaults_load_as_the_defaults_commented_or_not(tmp_path: Path) -> None:
    text = defaults_yaml(Schema)
    assert loaded(tmp_path, text) == Schema()
    assert "# Time between samples.\n#interval_seconds: 1s\n" in text
    assert "metrics:\n  # Where to listen.\n  #listen: 127.0.0.1:9410\n" in text
    uncommented = re.sub(r"^( *)#(?! )", r"\1", text, flags=re.MULTILINE)
    assert "\nnode: ''\n" in uncommented
    assert loaded(tmp_path, uncommented) == Schema()
