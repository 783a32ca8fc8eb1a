"""What daemons say to options, files and variables that cannot be: one line, and nothing begun."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.support.daemons import plain_environment, python_module

from stoker.core.errors import ExitCode

AGENT, AGGREGATOR = "stoker.agent", "stoker.aggregator"
SECONDS_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Row:
    """What is given, and what must be said of it."""

    module: str
    named: Sequence[str]  # every word stands in the message
    options: Sequence[str | bytes] = ()
    file: str | bytes | None = None  # the text of the configuration
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


ROWS = {
    "unknown key": Row(
        AGENT, ["line 2", "intervall", "interval_seconds"], file="\nintervall: 1s\n"
    ),
    "unknown key of a section": Row(
        AGENT, ["metrics.lisen", "metrics.listen"], file="metrics: {lisen: '127.0.0.1:0'}\n"
    ),
    "unknown key of the aggregator": Row(
        AGGREGATOR, ["lisen", "did you mean listen"], file="lisen: 127.0.0.1:0\n"
    ),
    "unknown variable": Row(
        AGENT,
        ["STOKER_AGENT_SIMULATED", "STOKER_AGENT_SIMULATE"],
        environment={"STOKER_AGENT_SIMULATED": "8xT4"},
    ),
    "unknown variable of the aggregator": Row(
        AGGREGATOR,
        ["STOKER_AGGREGATOR_LISTENS", "STOKER_AGGREGATOR_LISTEN"],
        environment={"STOKER_AGGREGATOR_LISTENS": "127.0.0.1:0"},
    ),
    "unknown option": Row(AGENT, ["--simulat"], ["--simulat", "8xT4"]),
    "unknown option of the aggregator": Row(AGGREGATOR, ["--lisen"], ["--lisen", "x"]),
    "key given twice": Row(AGENT, ["pool", "twice"], file="pool: a\npool: b\n"),
    "not YAML": Row(AGENT, ["config.yaml", "line 2", "YAML"], file="{pool: [a\n"),
    "not UTF-8": Row(AGENT, ["config.yaml", "UTF-8", "byte 6"], file=b"pool: \xff\xfe\n"),
    "too large to be a configuration": Row(
        AGENT, ["config.yaml", "1048576"], file="pool: " + "x" * (10 << 20)
    ),
    "file that is not there": Row(
        AGENT, ["nowhere.yaml", "No such file"], ["--config", "nowhere.yaml"]
    ),
    "file that is a folder": Row(AGGREGATOR, ["config /", "directory"], ["--config", "/"]),
    "malformed duration": Row(AGENT, ["--interval", "5parsecs"], ["--interval", "5parsecs"]),
    "negative duration": Row(AGENT, ["--interval", "-5"], ["--interval=-5s"]),
    "duration out of range": Row(AGENT, ["--interval", "60"], ["--interval", "2h"]),
    "duration that is a list": Row(
        AGENT, ["interval_seconds", "a duration"], file="interval_seconds: [1, 2]\n"
    ),
    "unknown GPU model": Row(AGENT, ["T5000", "T4", "H100-80GB"], ["--simulate", "8xT5000"]),
    "no GPUs to simulate": Row(AGENT, ["0xT4", "1 to 64"], ["--simulate", "0xT4"]),
    "too many GPUs to simulate": Row(AGENT, ["65xT4", "1 to 64"], ["--simulate", "65xT4"]),
    "GPUs to simulate, the wrong way round": Row(AGENT, ["T4x8"], ["--simulate", "T4x8"]),
    "scenario of real GPUs": Row(AGENT, ["scenario", "simulate"], ["--scenario", "x.json"]),
    "node name with a space": Row(AGENT, ["node", "a node"], ["--node", "a node"]),
    "node name too long": Row(AGENT, ["node", "253"], ["--node", "n" * 254]),
    "node name that is not UTF-8": Row(AGENT, ["node", "\\udcff"], ["--node", b"n\xff\xfe"]),
    "label too long": Row(AGENT, ["labels", "rack", "256"], ["--label", "rack=" + "r" * 257]),
    "too many labels": Row(
        AGENT, ["labels", "64", "65"], [f"--label=key{number}=x" for number in range(65)]
    ),
    "label without a value": Row(AGENT, ["--label", "key=value", "rack"], ["--label", "rack"]),
    "aggregator beyond this machine": Row(
        AGENT, ["10.0.0.1:7070", "--insecure"], ["--aggregator", "10.0.0.1:7070"]
    ),
    "aggregator without a port": Row(
        AGENT, ["aggregator", "HOST:PORT", "head"], ["--aggregator", "head"]
    ),
    "metrics for everybody": Row(
        AGENT, ["metrics.listen", "0.0.0.0:0", "--insecure"], ["--metrics-listen", "0.0.0.0:0"]
    ),
    "listening to everybody": Row(
        AGGREGATOR, ["listen", "0.0.0.0:0", "--insecure"], ["--listen", "0.0.0.0:0"]
    ),
    "metrics of the aggregator for everybody": Row(
        AGGREGATOR,
        ["metrics.listen", "0.0.0.0:0", "--insecure"],
        ["--metrics-listen", "0.0.0.0:0"],
    ),
    "port out of range": Row(AGGREGATOR, ["127.0.0.1:99999"], ["--listen", "127.0.0.1:99999"]),
    "unknown log level": Row(AGENT, ["--log-level", "loud", "debug"], ["--log-level", "loud"]),
}


@pytest.mark.parametrize("name", ROWS)
def test_daemon_refuses(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    data_dir = tmp_path / "data"
    given: list[str | bytes] = [*python_module(row.module), "--data-dir", str(data_dir)]
    if row.file is not None:
        data = row.file if isinstance(row.file, bytes) else row.file.encode()
        (tmp_path / "config.yaml").write_bytes(data)
        given += ["--config", "config.yaml"]
    done = subprocess.run(
        [os.fsencode(each) for each in [*given, *row.options]],
        capture_output=True,
        cwd=tmp_path,
        env=plain_environment(row.environment),
        timeout=SECONDS_MAX,
        check=False,
    )
    said = done.stderr.decode()
    assert done.returncode == ExitCode.USAGE, said
    assert [word for word in row.named if word not in said] == []
    assert len(said.splitlines()) == 1, said
    assert len(said) < 1000
    assert done.stdout == b""
    assert not data_dir.exists()
