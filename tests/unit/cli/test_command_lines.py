"""Requirements on the command line itself: verbs, help, options before and after, exit codes."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import click
import pytest
from tests.conftest import Golden

from stoker.cli import __main__ as entry
from stoker.cli.app import EXIT_CODES, VERBS, stoker
from stoker.cli.settings import Settings
from stoker.cli.wishes import wish_of
from stoker.core.errors import BadInput, ExitCode

NOBODY = "127.0.0.1:1"  # tcpmux; nobody listens there


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in os.environ if each.startswith("STOKER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("stoker.cli.settings.PATIENCE_SECONDS", 0.0)


def test_help(golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["--help"]) == ExitCode.OK
    golden("cli/help.txt", capsys.readouterr().out)


def test_every_exit_code_is_explained() -> None:
    assert EXIT_CODES.keys() == set(ExitCode)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_there_with_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, _, name = VERBS[verb][0].partition(":")
    command = getattr(importlib.import_module(module), name)
    assert isinstance(command, click.Command)
    assert command.name == verb
    assert entry.run([verb, "--help"]) == ExitCode.OK
    assert f"stoker {verb}" in capsys.readouterr().out


def leaves(group: click.Group, *above: str) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        path = (*above, name)
        found += leaves(command, *path) if isinstance(command, click.Group) else [path]
    return found


# They become the daemon, or print a file.
WITHOUT_JSON = {("agent", "run"), ("aggregator", "run"), ("config", "defaults")}


def test_every_verb_takes_json() -> None:
    for path in leaves(stoker):
        command: click.Command | None = stoker
        for name in path:
            assert isinstance(command, click.Group)
            command = command.get_command(click.Context(command), name)
        assert command is not None
        options = {each for param in command.params for each in param.opts}
        assert ("--json" in options) == (path not in WITHOUT_JSON), path


def test_bare_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run([]) == ExitCode.USAGE
    assert "Usage: stoker" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json", "--address", NOBODY, "status"],
        ["status", "--json", "--address", NOBODY],
        ["--address", NOBODY, "status", "--json"],
        ["--address", "elsewhere:1", "status", "--address", NOBODY, "--json"],
    ],
)
def test_global_options_before_and_after(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.run(arguments) == ExitCode.UNREACHABLE
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert (error["kind"], error["exit_code"]) == ("Unreachable", 5)
    assert NOBODY in error["message"]
    assert printed.err == ""


def test_misspelt_option_with_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["status", "--json", "--al"]) == ExitCode.USAGE
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_json_of_the_command_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    code = entry.run(["--address", NOBODY, "alloc", "--", "true", "--json"])
    assert code == ExitCode.UNREACHABLE
    assert capsys.readouterr().out == ""


def test_nothing_can_be_ended_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["--address", NOBODY, "alloc", "--leave-on-request"]) == ExitCode.USAGE
    assert "there is no COMMAND to end" in capsys.readouterr().err


def test_unexpected_error_is_one_line_and_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Settings) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Settings, "connect", fail)
    assert entry.run(["status"]) == ExitCode.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError: a bug" in line
    assert "STOKER_DEBUG=1" in line
    monkeypatch.setenv("STOKER_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        entry.run(["status"])


def test_wish_has_only_what_was_said() -> None:
    said = {"gpus": 2, "memory": None, "models": ("T4",), "ttl": None}
    assert wish_of(said, ["a=b=c", "d="]) == {
        "gpus": 2,
        "model": ("T4",),
        "labels": {"a": "b=c", "d": ""},
    }
    assert wish_of({}) == {}


@pytest.mark.parametrize("label", ["a", "=b", ""])
def test_label_is_key_and_value(label: str) -> None:
    with pytest.raises(BadInput, match="--label: wanted KEY=VALUE"):
        wish_of({}, [label])


CONFIGS: dict[str, tuple[str, str, list[str], int, str]] = {
    "agent's": ("agent.yaml", "interval_seconds: 2s\n", [], 0, "in order"),
    "aggregator's": ("my-aggregator.yml", "listen: 127.0.0.1:7000\n", [], 0, "in order"),
    "said whose": ("x.yaml", "pool: train\n", ["--for", "agent"], 0, "in order"),
    "not said whose": ("x.yaml", "", [], 2, "whose configuration is it?"),
    "unknown key": ("agent.yaml", "intervall_seconds: 2s\n", [], 2, "did you mean"),
    "not there": ("agent-gone.yaml", "", [], 2, "cannot be read"),
    "open to all": ("aggregator.yaml", "listen: 0.0.0.0:1\n", [], 2, "--insecure"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_is_checked_as_its_daemon_would(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, text, options, code, said = CONFIGS[name]
    path = tmp_path / file
    if "gone" not in file:
        path.write_text(text, encoding="utf-8")
    assert entry.run(["config", "check", str(path), *options]) == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    assert str(path) in printed.out + printed.err


@pytest.mark.parametrize("daemon", ["agent", "aggregator"])
def test_defaults_are_a_configuration(
    daemon: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.run(["config", "defaults", daemon]) == ExitCode.OK
    path = tmp_path / f"{daemon}.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert entry.run(["config", "check", str(path)]) == ExitCode.OK
