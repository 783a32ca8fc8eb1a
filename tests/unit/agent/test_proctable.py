"""Who a process is: what /proc says about real ones, and how its texts are read."""

import os
import pwd
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.proc_tree import BOOTED_AT, ProcTree
from tests.support.waiting import until_true

from stoker.agent.helper.variables import ALLOCATION
from stoker.agent.procfs import (
    Stat,
    parse_boot_time,
    parse_stat,
    parse_variable,
    parse_variables,
    read,
)
from stoker.agent.proctable import (
    COMMAND_CHARACTERS_MAX,
    REMEMBER_SECONDS,
    ProcessFacts,
    ProcTable,
    parse_command,
)
from stoker.agent.readings import ProcessReading

NO_SUCH_PID = 5_000_001  # above the kernel's largest


@contextmanager
def child(*arguments: str, **environment: str) -> Generator[subprocess.Popen[bytes]]:
    """A process that waits for the end of its input."""
    argv = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", *arguments]
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment}
    )
    assert process.stdout is not None
    process.stdout.readline()  # it is what it was told to be, not a fork of us any more
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_process_of_ours() -> None:
    began = time.time()
    with child("--epochs", "3", **{ALLOCATION: "a-17"}) as process:
        facts = ProcTable().look_up(process.pid)
    assert facts is not None
    assert facts.pid == process.pid
    assert facts.user == pwd.getpwuid(os.getuid()).pw_name
    assert facts.command.startswith(sys.executable)
    assert facts.command.endswith("--epochs 3")
    assert facts.allocation_id == "a-17"
    # The kernel counts in ticks of a hundredth, from a boot time in whole seconds.
    assert facts.started_at == pytest.approx(began, abs=2.5)


def test_without_an_allocation_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOCATION, raising=False)
    with child() as process:
        facts = ProcTable().look_up(process.pid)
    assert facts is not None
    assert facts.allocation_id is None


def test_a_process_that_is_gone_is_none() -> None:
    with child() as process:
        pass
    assert ProcTable().look_up(process.pid) is None
    assert ProcTable().look_up(NO_SUCH_PID) is None


def test_two_looks_at_one_process_agree() -> None:
    table = ProcTable()
    assert table.look_up(os.getpid()) == table.look_up(os.getpid())


@pytest.mark.parametrize(
    ("name", "command"), [("train.py", "train.py"), (None, "(not visible here)")]
)
def test_a_user_of_a_gpu_that_proc_does_not_have(name: str | None, command: str) -> None:
    listed = ProcessReading("GPU-a", NO_SUCH_PID, "compute", 10, name)
    assert ProcTable().describe(listed) == ProcessFacts(NO_SUCH_PID, command)


def test_a_user_of_a_gpu_that_proc_has_is_described_by_proc() -> None:
    listed = ProcessReading("GPU-a", os.getpid(), "compute", 10, "what the driver calls it")
    assert ProcTable().describe(listed) == ProcTable().look_up(os.getpid())


def a_proc(root: Path) -> ProcTable:
    """A /proc with one process, PID 7, that started five seconds after boot."""
    (root / "7").mkdir()
    (root / "stat").write_text("cpu 1 2\nbtime 1700000000\n")
    (root / "7" / "stat").write_text("7 (x) S 1 " + "0 " * 17 + "500 0\n")
    return ProcTable(str(root))


def test_start_counts_from_boot(tmp_path: Path) -> None:
    facts = a_proc(tmp_path).look_up(7)
    assert facts is not None
    assert facts.started_at == 1_700_000_005.0
    assert facts.command == "[x]"


def test_a_pid_that_was_given_away_while_it_was_read_is_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = a_proc(tmp_path)
    stat = tmp_path / "7" / "stat"

    def read_and_replace(path: str) -> bytes:
        text = read(path)
        if path == str(stat):
            stat.write_text(stat.read_text().replace(" 500 ", " 501 "))
        return text

    monkeypatch.setattr("stoker.agent.proctable.read", read_and_replace)
    assert table.look_up(7) is None


LISTED = ProcessReading("GPU-a", 7, "compute", 10, "as the driver calls it")
GONE = ProcessFacts(7, "as the driver calls it")


class Machine:
    """A /proc of files, what is read there, and a clock."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tree = ProcTree(root)
        self.now = 100.0
        self.read: list[str] = []  # since it was asked last
        self.table = ProcTable(str(root), monotonic=lambda: self.now)
        monkeypatch.setattr("stoker.agent.proctable.read", self._read)

    def ask(self) -> ProcessFacts:
        """Ask about process 7."""
        self.read.clear()
        return self.table.describe(LISTED)

    def _read(self, path: str) -> bytes:
        self.read.append(path)
        return read(path)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "proc", monkeypatch)


def test_everything_that_proc_tells_of_a_process(machine: Machine) -> None:
    environ = {"HOME": "/home/ann", ALLOCATION: "a-1", "SLURM_JOB_ID": "17", "SLURM_X": "y"}
    machine.tree.start(7, cgroup="0::/a.service\n", environ=environ, command="python t.py")
    assert machine.ask() == ProcessFacts(
        pid=7,
        command="python t.py",
        started_at=BOOTED_AT + 5.0,
        user=pwd.getpwuid(os.getuid()).pw_name,
        allocation_id="a-1",
        started_ticks=500,
        cgroup="0::/a.service\n",
        slurm={"SLURM_JOB_ID": "17"},
    )


def test_an_environment_that_may_not_be_read_is_not_an_empty_one(machine: Machine) -> None:
    machine.tree.start(7, environ=None)
    assert machine.ask().slurm is None
    machine.tree.start(7, environ={"HOME": "/"})
    assert machine.ask().slurm == {}


def test_a_process_that_is_the_same_is_not_read_again_for_a_while(machine: Machine) -> None:
    machine.tree.start(7, environ={ALLOCATION: "a-1"})
    facts = machine.ask()
    assert machine.read
    for _ in range(3):
        machine.now += REMEMBER_SECONDS / 4
        assert machine.ask() is facts
        assert machine.read == []
    machine.now += REMEMBER_SECONDS / 4
    assert machine.ask() is facts  # nothing has changed
    assert machine.read


def test_a_process_that_has_moved_to_another_cgroup_is_seen_after_a_while(machine: Machine) -> None:
    machine.tree.start(7, cgroup="0::/a.service\n")
    machine.ask()
    (machine.tree.root / "7" / "cgroup").write_text("0::/b.service\n")
    machine.now += REMEMBER_SECONDS
    assert machine.ask().cgroup == "0::/b.service\n"


def test_a_pid_that_was_given_away_is_another_process_at_once(machine: Machine) -> None:
    machine.tree.start(7, environ={ALLOCATION: "a-1"}, ticks=500)
    assert machine.ask().allocation_id == "a-1"
    machine.tree.start(7, environ={ALLOCATION: "a-2"}, ticks=501)
    assert machine.ask().allocation_id == "a-2"


def test_a_process_that_has_ended_is_what_the_driver_tells_of_it(machine: Machine) -> None:
    machine.tree.start(7)
    machine.ask()
    machine.tree.end(7)
    assert machine.ask() == GONE


def test_processes_that_use_no_gpu_any_more_are_forgotten(machine: Machine) -> None:
    machine.tree.start(7)
    machine.ask()
    machine.table.remember_only({8})
    machine.ask()
    assert machine.read


async def test_a_process_whose_memory_hangs_is_told_without_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.agent.proctable.MEMORY_SECONDS_MAX", 0.05)
    machine.tree.start(7, cgroup="0::/a.service\n", command="python t.py")
    pipe = machine.tree.root / "7" / "cmdline"
    pipe.unlink()
    os.mkfifo(pipe)  # whoever opens it waits for somebody who writes
    for _ in range(3):
        hung = machine.ask()
        assert (hung.command, hung.cgroup, hung.slurm) == ("[python]", "0::/a.service\n", None)
        machine.table.remember_only({7})
    assert machine.read.count(str(pipe)) == 0  # it is not asked again while it hangs
    pipe.write_bytes(b"python\0t.py\0")
    pipe.unlink()
    pipe.write_bytes(b"python\0t.py\0")
    await until_true("its command", lambda: machine.ask().command == "python t.py")


def test_a_process_that_hangs_later_is_told_with_what_it_told_before(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.agent.proctable.MEMORY_SECONDS_MAX", 30.0)
    machine.tree.start(7, environ=None, command="python t.py")
    pipe = machine.tree.root / "7" / "environ"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(f"{ALLOCATION}=a-1\0".encode(),))
    writer.start()
    before = machine.ask()
    writer.join()
    assert (before.command, before.allocation_id) == ("python t.py", "a-1")
    monkeypatch.setattr("stoker.agent.proctable.MEMORY_SECONDS_MAX", 0.05)
    for _ in range(2):
        machine.now += REMEMBER_SECONDS  # it is read anew, and nobody writes
        assert machine.ask() == before
    pipe.write_bytes(b"")  # lets the thread that waits go


@pytest.mark.parametrize(
    ("text", "stat"),
    [
        (b"42 (python3) S 7" + b" 0" * 17 + b" 123 0", Stat("python3", "S", 123)),
        (b"42 (a (b) c) d) Z 7" + b" 0" * 17 + b" 123 0", Stat("a (b) c) d", "Z", 123)),
        (b"42 (\xff) R 7" + b" 0" * 17 + b" 123 0", Stat("\ufffd", "R", 123)),
    ],
)
def test_stat(text: bytes, stat: Stat) -> None:
    assert parse_stat(text) == stat


@pytest.mark.parametrize(
    ("text", "command"),
    [
        (b"python\0train.py\0--lr=1\0", "python train.py --lr=1"),
        (b"", ""),
        (b"\0", ""),
        (b"sh\0-c\0one\ntwo\x1b[31m\0", "sh -c one?two?[31m"),
        (b"caf\xe9\0", "caf\ufffd"),
        (b"x" * 10_000_000, "x" * (COMMAND_CHARACTERS_MAX - 3) + "..."),
    ],
)
def test_command(text: bytes, command: str) -> None:
    assert parse_command(text) == command


@pytest.mark.parametrize(
    ("environ", "value"),
    [
        (b"A=1\0STOKER_ALLOCATION_ID=a-1\0", "a-1"),
        (b"STOKER_ALLOCATION_ID=\0", ""),
        (b"NOT_STOKER_ALLOCATION_ID=a-1\0", None),
        (b"", None),
    ],
)
def test_variable(environ: bytes, value: str | None) -> None:
    assert parse_variable(environ, ALLOCATION) == value


def test_variables() -> None:
    environ = b"A=1\0B=x=y\0A=2\0C\0D=3\0\xff=4\0"
    assert parse_variables(environ, {"A", "B", "C", "E"}) == {"A": "1", "B": "x=y"}
    assert parse_variables(b"", {"A"}) == {}


def test_a_proc_without_a_boot_time_is_refused() -> None:
    with pytest.raises(ValueError, match="btime"):
        parse_boot_time(b"cpu 1 2 3\n")
