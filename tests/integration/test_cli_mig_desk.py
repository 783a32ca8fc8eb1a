"""`stoker mig` at a scripted agent: what is asked of it, what people are asked, what is said."""

import asyncio
import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.daemons import plain_environment, python_module
from tests.support.mig_desk import Desk, served
from tests.support.waiting import until_true

from stoker.cli import __main__ as entry
from stoker.core.errors import ExitCode
from stoker.core.local import Refusal
from stoker.core.mig.reports import (
    GpuMigFacts,
    GpuPlan,
    InstanceChange,
    InstanceFacts,
    InTheWay,
    MigEntry,
)

replace = msgspec.structs.replace

FILE = """
version: v1
mig-configs:
  small:
    - devices: all
      mig-enabled: true
      mig-devices: {1g.10gb: 7}
  "off":
    - devices: [0]
      mig-enabled: false
"""
ENTRIES = (MigEntry(True, mig_devices={"1g.10gb": 7}),)
H100 = "NVIDIA H100 80GB HBM3"
BIG = InstanceFacts("7g.80gb", 0, 8, (7,), ("MIG-7",))
SMALL = InstanceFacts("1g.10gb", 0, 1, (1,), ("MIG-1",))
GPU = GpuMigFacts(
    uuid="GPU-0",
    index=0,
    model=H100,
    pci_device_id="0x233010DE",
    mode=True,
    mode_pending=True,
    instances=(BIG,),
    undo="1g.10gb@0",
)
PLAN = GpuPlan(
    uuid="GPU-0",
    index=0,
    model=H100,
    mode=True,
    mode_wanted=True,
    mode_change="none",
    changes=(
        InstanceChange("destroy", "7g.80gb", 0, 8, (7,), ("MIG-7",)),
        InstanceChange("create", "1g.10gb", 0, 1),
    ),
    steps=("one", "two"),
    in_the_way=(),
    uuids_lost=("MIG-7",),
)
THERE = replace(PLAN, changes=(InstanceChange("keep", "7g.80gb", 0, 8, (7,)),), steps=())
NEVER = replace(PLAN, changes=(), steps=(), refusal="a board takes no 8g.80gb")
ANN = InTheWay("allocation", "allocation a1 (ann)", ("MIG-7",), allocation_id="a1")
DONE = replace(GPU, state="success", instances=(SMALL,))
LAST = "Plan: 1 to create, 1 to destroy, 0 kept; nothing in the way."


class Stage:
    """A desk, a file, and the command line."""

    def __init__(self, folder: Path, desk: Desk) -> None:
        self.desk = desk
        self.socket = folder / "agent.sock"
        self.file = folder / "mig.yaml"
        self.file.write_text(FILE, encoding="utf-8")

    def command(self, verb: str, *arguments: str) -> list[str]:
        """Return the arguments, with FILE and --config where the verb takes them."""
        file = [str(self.file), "--config", "small"] if verb in ("plan", "apply") else []
        return ["mig", verb, "--socket", str(self.socket), *file, *arguments]

    def run(self, verb: str, *arguments: str) -> int:
        return entry.run(self.command(verb, *arguments))


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Stage]:
    """A GPU that a plan would change, and a desk that does so at once."""
    for name in [each for each in os.environ if each.startswith("STOKER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("stoker.cli.mig_asking.LOOK_SECONDS", 0.01)
    desk = Desk((PLAN,), (GPU,), ways=[(DONE,)])
    stage = Stage(tmp_path, desk)
    with served(stage.socket, desk):
        yield stage


Capture = pytest.CaptureFixture[str]


# --- plan


def test_plan_sends_the_entries_and_prints_the_diff(stage: Stage, capsys: Capture) -> None:
    assert stage.run("plan", "--gpu", "0", "--gpu", "GPU-1") == ExitCode.OK
    (ask,) = stage.desk.asked
    assert (ask.verb, ask.config, ask.entries) == ("plan", "small", ENTRIES)
    assert (ask.gpus, ask.operation_id) == (("0", "GPU-1"), "")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"GPU 0  {H100}  GPU-0"
    assert lines[-1] == LAST


def test_plan_that_cannot_be_done_is_refused(stage: Stage, capsys: Capture) -> None:
    stage.desk.plans = (NEVER,)
    assert stage.run("plan") == ExitCode.REFUSED
    assert "cannot be done: a board takes no 8g.80gb" in capsys.readouterr().out


def test_plan_as_json_is_the_report(stage: Stage, capsys: Capture) -> None:
    assert stage.run("plan", "--json") == ExitCode.OK
    report = json.loads(capsys.readouterr().out)
    assert report["plans"][0]["changes"][0]["uuids"] == ["MIG-7"]
    assert report["gpus"][0]["undo"] == "1g.10gb@0"


def test_without_a_file_the_agents_own_configuration_is_meant(stage: Stage) -> None:
    assert entry.run(["mig", "plan", "--socket", str(stage.socket)]) == ExitCode.OK
    assert stage.desk.asked[0].entries == ()
    for wrong in (["--config", "small"], ["--node", "n1"]):
        assert entry.run(["mig", "plan", *wrong]) == ExitCode.USAGE


def test_file_from_standard_input(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FILE.encode())))
    plan = ["mig", "plan", "-", "--config", "off", "--socket", str(stage.socket)]
    assert entry.run(plan) == ExitCode.OK, capsys.readouterr().err
    assert stage.desk.asked[0].entries == (MigEntry(False, devices=(0,)),)


# what is wrong -> the file, the options, what is said
WRONG: dict[str, tuple[str | bytes | None, list[str], str]] = {
    "no such file": (None, ["--config", "small"], "cannot be read: No such file"),
    "no such configuration": (FILE, ["--config", "smal"], "'smal'; it has: small, off"),
    "several, none named": (FILE, [], "has 2 configurations, name one of: small, off"),
    "another format": ("version: v9", ["--config", "a"], "wanted version v1, found 'v9'"),
    "not a text": (b"\xff\xfe", ["--config", "a"], "not UTF-8"),
    "some other file": (b"#" * (2**20 + 1), ["--config", "a"], "that is some other file"),
    "no GPU": (FILE, ["--config", "small", "--gpu", "first"], "--gpu: wanted a GPU's number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file_is_said_before_anybody_is_asked(
    name: str, stage: Stage, capsys: Capture
) -> None:
    content, options, said = WRONG[name]
    stage.file.unlink()
    if content is not None:
        stage.file.write_bytes(content if isinstance(content, bytes) else content.encode())
    code = entry.run(["mig", "plan", str(stage.file), "--socket", str(stage.socket), *options])
    assert code == ExitCode.USAGE
    assert said in capsys.readouterr().err
    assert stage.desk.asked == []


def test_the_only_configuration_needs_no_name(stage: Stage) -> None:
    only = FILE.split('  "off"', maxsplit=1)[0]
    stage.file.write_text(only, encoding="utf-8")
    plan = ["mig", "plan", str(stage.file), "--socket", str(stage.socket)]
    assert entry.run(plan) == ExitCode.OK
    assert stage.desk.asked[0].config == "small"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--address", "127.0.0.1:1"], "--address: without --node"),
        (["--node", "n1", "--socket", "x"], "--socket: with --node"),
    ],
)
def test_one_agent_is_asked(options: list[str], said: str, capsys: Capture) -> None:
    assert entry.run(["mig", "status", *options]) == ExitCode.USAGE
    assert said in capsys.readouterr().err


# --- apply


def test_apply_shows_the_plan_waits_and_tells_the_end(stage: Stage, capsys: Capture) -> None:
    way = replace(GPU, state="applying", steps_total=2)
    stage.desk.ways = [(way,), (replace(way, steps_done=1),), (DONE,)]
    assert stage.run("apply", "--yes", "--operation-id", "op-1") == ExitCode.OK
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-2:] == [LAST, "GPU 0: done; it has 1g.10gb@0"]
    assert printed.err.splitlines() == [
        "stoker: GPU 0: applying, 0 of 2 steps",
        "stoker: GPU 0: applying, 1 of 2 steps",
        "stoker: GPU 0: success",
    ]
    (ask,) = stage.desk.of("apply")
    assert (ask.operation_id, ask.entries, ask.drain_seconds, ask.evict) == (
        *("op-1", ENTRIES),
        *(60.0, False),
    )


def test_how_users_are_treated(stage: Stage, capsys: Capture) -> None:
    stage.desk.plans = (replace(PLAN, in_the_way=(ANN,)),)
    assert stage.run("apply", "--yes", "--drain", "5m", "--evict") == ExitCode.OK
    (ask,) = stage.desk.of("apply")
    assert (ask.drain_seconds, ask.evict) == (300.0, True)
    assert "Who is in the way has 5m to leave; who is there after it is ended." in (
        capsys.readouterr().out
    )
    assert stage.run("apply", "--yes", "--drain", "0") == ExitCode.OK
    assert "has no time to leave; who is there after it stays, and nothing is changed." in (
        capsys.readouterr().out
    )


def test_every_wish_has_an_operation_of_its_own(stage: Stage) -> None:
    stage.run("apply", "--yes")
    stage.run("apply", "--yes")
    first, second = (each.operation_id for each in stage.desk.of("apply"))
    assert first
    assert first != second


def test_apply_as_json_is_one_report_and_nothing_else(stage: Stage, capsys: Capture) -> None:
    stage.desk.ways = [(replace(GPU, state="applying"),), (DONE,)]
    assert stage.run("apply", "--yes", "--json") == ExitCode.OK
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert printed.err == ""
    assert report["operation_id"] == report["gpus"][0]["operation_id"] != ""
    assert report["plans"][0]["uuids_lost"] == ["MIG-7"]
    assert report["gpus"][0]["state"] == "success"


def test_a_plan_that_cannot_be_done_is_not_applied(stage: Stage) -> None:
    stage.desk.plans = (PLAN, NEVER)
    assert stage.run("apply", "--yes") == ExitCode.REFUSED
    assert stage.desk.of("apply") == []


def test_what_is_there_is_declared_all_the_same(stage: Stage, capsys: Capture) -> None:
    stage.desk.plans = (THERE,)
    stage.desk.ways = [(replace(GPU, state="success"),)]
    assert stage.run("apply", "--yes") == ExitCode.OK
    assert len(stage.desk.of("apply")) == 1
    assert "Plan: nothing to do; 1 kept." in capsys.readouterr().out


ENDS: dict[str, tuple[GpuMigFacts, ExitCode]] = {
    "refused": (replace(GPU, state="failed", reason="ann is there"), ExitCode.REFUSED),
    "between": (replace(DONE, state="failed", reason="no way back"), ExitCode.FAILED),
    "reset": (replace(GPU, state="reboot-required", reason="pending"), ExitCode.PENDING),
}


@pytest.mark.parametrize("name", ENDS)
def test_exit_codes(name: str, stage: Stage, capsys: Capture) -> None:
    gpu, code = ENDS[name]
    stage.desk.ways = [(gpu,)]
    assert stage.run("apply", "--yes") == code
    assert gpu.reason in capsys.readouterr().out


def test_the_agents_refusal_is_passed_on(stage: Stage, capsys: Capture) -> None:
    stage.desk.refusal = Refusal("GPU 0: operation op-0 is under way")
    assert stage.run("apply", "--yes") == ExitCode.REFUSED
    assert capsys.readouterr().err == "stoker: GPU 0: operation op-0 is under way\n"


def test_no_wait_returns_with_the_operation(stage: Stage, capsys: Capture) -> None:
    stage.desk.ways = [(replace(GPU, state="applying"),)]
    assert stage.run("apply", "--yes", "--no-wait", "--operation-id", "op-1") == ExitCode.OK
    assert capsys.readouterr().out.splitlines()[-1] == "operation op-1 has begun"
    assert stage.desk.of("status") == []
    assert stage.run("apply", "--yes", "--no-wait", "--json") == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["verb"] == "apply"


# --- whether people are asked


class Terminal(io.StringIO):
    """Standard input with a person at it."""

    def isatty(self) -> bool:
        return True


# the answer -> whether it is done
ANSWERS = {"y\n": True, "n\n": False, "\n": False}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_person_is_asked(
    answer: str, stage: Stage, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    code = stage.run("apply")
    assert code == (ExitCode.OK if ANSWERS[answer] else ExitCode.REFUSED)
    assert len(stage.desk.of("apply")) == ANSWERS[answer]
    printed = capsys.readouterr()
    assert "Apply this plan?" in printed.err
    assert ("nothing was changed" in printed.err) != ANSWERS[answer]


def test_nobody_is_asked_when_there_is_nothing_to_do(
    stage: Stage, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    stage.desk.plans = (THERE,)
    assert stage.run("apply") == ExitCode.OK
    assert "Apply this plan?" not in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["apply", "undo"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_where_nobody_can_be_asked_yes_must_be_said(
    verb: str, options: list[str], stage: Stage, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("y\n") if options else io.StringIO("y\n"))
    assert stage.run(verb, *options) == ExitCode.USAGE
    printed = capsys.readouterr()
    assert "--yes: " in (printed.out if options else printed.err)
    assert stage.desk.asked == []


def test_who_gives_the_file_cannot_be_asked(
    stage: Stage, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(FILE))
    assert entry.run(["mig", "apply", "-", "--socket", str(stage.socket)]) == ExitCode.USAGE
    assert "--yes: " in capsys.readouterr().err


# --- undo


def test_undo_is_shown_and_done(stage: Stage, capsys: Capture) -> None:
    other = replace(GPU, uuid="GPU-1", index=1, undo="")
    stage.desk.gpus = (GPU, other)
    assert stage.run("undo", "--yes", "--drain", "10s") == ExitCode.OK
    (ask,) = stage.desk.of("undo")
    assert (ask.gpus, ask.drain_seconds) == (("GPU-0",), 10.0)
    assert ask.operation_id
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"GPU 0  {H100}  GPU-0", "  from 7g.80gb@0", "  back to 1g.10gb@0"]
    assert lines[-2:] == [LAST, "GPU 0: done; it has 1g.10gb@0"]


def test_nothing_to_undo(stage: Stage, capsys: Capture) -> None:
    stage.desk.gpus = (replace(GPU, undo=""),)
    assert stage.run("undo", "--yes") == ExitCode.OK
    assert stage.desk.of("undo") == []
    assert capsys.readouterr().out == "nothing to undo: no operation is remembered\n"


def test_a_person_is_asked_before_an_undo(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert stage.run("undo") == ExitCode.REFUSED
    assert stage.desk.of("undo") == []


# --- status and export


def test_status(stage: Stage, capsys: Capture) -> None:
    assert stage.run("status", "--gpu", "0") == ExitCode.OK
    assert stage.desk.asked[0].gpus == ("0",)
    assert "7g.80gb@0" in capsys.readouterr().out


def test_export_is_a_file_that_plan_takes(stage: Stage, capsys: Capture) -> None:
    assert stage.run("export", "--config", "now") == ExitCode.OK
    stage.file.write_text(capsys.readouterr().out, encoding="utf-8")
    plan = ["mig", "plan", str(stage.file), "--config", "now", "--socket", str(stage.socket)]
    assert entry.run(plan) == ExitCode.OK
    assert stage.desk.asked[-1].entries == (MigEntry(True, mig_devices={"7g.80gb": 1}),)


def test_export_as_json_says_the_same(stage: Stage, capsys: Capture) -> None:
    assert stage.run("export", "--json", "--gpu", "0") == ExitCode.OK
    entries = [{"devices": [0], "mig-enabled": True, "mig-devices": {"7g.80gb": 1}}]
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found == {"version": "v1", "mig-configs": {"current": entries}}


def test_export_tells_what_it_leaves_out(stage: Stage, capsys: Capture) -> None:
    stage.desk.gpus = (replace(GPU, instances=(BIG, replace(SMALL, compute=(), uuids=()))),)
    assert stage.run("export") == ExitCode.OK
    assert "1g.10gb at slice 0 has no compute instance" in capsys.readouterr().err


# --- whoever waits may stop waiting


def test_interrupt_leaves_the_operation_and_names_it(stage: Stage) -> None:
    stage.desk.ways = [(replace(GPU, state="applying"),)]
    command = python_module("stoker.cli") + stage.command("apply", "--yes", "--operation-id", "op")
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=plain_environment()
    ) as process:
        try:
            asyncio.run(until_true("a look at it", lambda: bool(stage.desk.of("status"))))
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30.0)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert b"operation op goes on" in said
    assert b"stoker mig status" in said


def test_a_terminal_shows_bars_and_keeps_the_outcome(stage: Stage) -> None:
    way = replace(GPU, state="applying", steps_done=1, steps_total=2)
    stage.desk.ways = [(way,)]
    ours, theirs = pty.openpty()
    command = python_module("stoker.cli") + stage.command("apply", "--yes")
    with (
        os.fdopen(ours, "rb", buffering=0) as shown,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            env=plain_environment({"TERM": "xterm", "COLUMNS": "100"}),
        ) as process,
    ):
        os.close(theirs)
        text = b""
        while b"applying, 1 of 2 steps" not in text:
            text += shown.read(4096)
        stage.desk.ways = [(DONE,)]
        with contextlib.suppress(OSError):  # EIO: nobody writes to the terminal any more
            while shown.read(4096):
                pass
        assert process.wait(30.0) == ExitCode.OK
