"""Data folders and ports that cannot be used: damaged, too new, in use; nothing is changed."""

import hashlib
import shutil
import socket
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from tests.support.daemons import Daemon, Stage, free_nodes

from stoker.core.errors import ExitCode

pytestmark = pytest.mark.asyncio(loop_scope="module")

LEDGER = "ledger.sqlite3"
JOURNAL = "journal.jsonl"
AGGREGATOR, AGENT = "aggregator", "node-a"
# Files that a start may touch before it finds that it cannot go on.
TRANSIENT = {"lock", f"{LEDGER}-wal", f"{LEDGER}-shm"}


def garble_the_head(folder: Path) -> None:
    overwrite(folder / LEDGER, 0, b"this is no database")


def garble_the_middle(folder: Path) -> None:
    size = (folder / LEDGER).stat().st_size
    for page in range(1, size // 4096):
        overwrite(folder / LEDGER, page * 4096, b"\xa5" * 512)


def cut_short(folder: Path) -> None:
    with (folder / LEDGER).open("r+b") as file:
        file.truncate(4096 + 100)


def replace_by_a_text(folder: Path) -> None:
    (folder / LEDGER).write_text("not a database at all\n" * 1000, encoding="utf-8")


def replace_by_a_folder(folder: Path) -> None:
    (folder / LEDGER).unlink()
    (folder / LEDGER).mkdir()


def replace_by_another_program_s(folder: Path) -> None:
    (folder / LEDGER).unlink()
    execute(folder, "CREATE TABLE bookmarks (url TEXT)")


def write_with_a_newer_stoker(folder: Path) -> None:
    execute(
        folder,
        "INSERT INTO _sqlite_migrations (migration_set, name, applied_at)"
        " VALUES ('stoker', '9999_from_the_future', '2099-01-01')",
    )


def write_an_event_that_nobody_knows(folder: Path) -> None:
    execute(folder, "INSERT INTO events (at, kind, payload) VALUES (1, 'GpuMelted', '{}')")


def write_an_event_that_cannot_be(folder: Path) -> None:
    execute(
        folder,
        "INSERT INTO events (at, kind, payload) VALUES"
        """ (1, 'AllocationEnded', '{"at": 1, "id": "nobody", "reason": ""}')""",
    )


def garble_a_line(folder: Path) -> None:
    overwrite(folder / JOURNAL, 40, b"#")


def cut_out_a_line(folder: Path) -> None:
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (folder / JOURNAL).write_bytes(b"".join([lines[0][:-20] + b"\n", *lines[1:]]))


def replace_the_journal_by_a_folder(folder: Path) -> None:
    (folder / JOURNAL).unlink()
    (folder / JOURNAL).mkdir()


@dataclass(frozen=True, slots=True)
class Row:
    """What was done to the folder of a daemon, and what its next start says."""

    daemon: str
    harm: Callable[[Path], None]
    named: Sequence[str]


ROWS = {
    "head garbled": Row(AGGREGATOR, garble_the_head, [LEDGER, "not a healthy ledger"]),
    "middle garbled": Row(AGGREGATOR, garble_the_middle, [LEDGER, "not a healthy ledger"]),
    "cut short": Row(AGGREGATOR, cut_short, [LEDGER, "not a healthy ledger"]),
    "a text": Row(AGGREGATOR, replace_by_a_text, [LEDGER, "not a healthy ledger"]),
    "a folder": Row(AGGREGATOR, replace_by_a_folder, [LEDGER]),
    "another program's": Row(AGGREGATOR, replace_by_another_program_s, [LEDGER, "bookmarks"]),
    "a newer schema": Row(
        AGGREGATOR, write_with_a_newer_stoker, [LEDGER, "9999_from_the_future", "newer stoker"]
    ),
    "an unknown event": Row(AGGREGATOR, write_an_event_that_nobody_knows, [LEDGER, "GpuMelted"]),
    "an impossible event": Row(AGGREGATOR, write_an_event_that_cannot_be, [LEDGER, "nobody"]),
    "journal garbled": Row(AGENT, garble_a_line, [JOURNAL, "line 1", "checksum"]),
    "journal with a hole": Row(AGENT, cut_out_a_line, [JOURNAL, "line 1", "damaged"]),
    "journal that is a folder": Row(AGENT, replace_the_journal_by_a_folder, [JOURNAL]),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folders of an aggregator and an agent that have worked and were stopped."""
    folder = tmp_path_factory.mktemp("worked")
    async with Stage(folder) as stage:
        aggregator, agent = stage.aggregator(), stage.agent(AGENT, "2xT4")
        await aggregator.start()
        await agent.start()
        async with stage.fleet() as fleet:
            await free_nodes(fleet, 1)
            for number in range(50):
                one = await fleet.request(memory="1GiB", holder=f"holder {number}")
                await fleet.release(one.id, wait=0)
            await fleet.request(gpus=1, holder="holder", wait="30s")
        assert await agent.stop() == ExitCode.OK
        assert await aggregator.stop() == ExitCode.OK
    return folder


@pytest.mark.parametrize("name", ROWS)
async def test_damaged_folder_is_left_alone(name: str, folders: Path, tmp_path: Path) -> None:
    row = ROWS[name]
    shutil.copytree(folders / row.daemon, tmp_path / row.daemon)
    row.harm(tmp_path / row.daemon)
    before = contents(tmp_path / row.daemon)
    async with Stage(tmp_path) as stage:
        daemon = stage.aggregator() if row.daemon == AGGREGATOR else stage.agent(AGENT, "2xT4")
        said = await refusal_of(daemon, ExitCode.STORE)
    assert [word for word in row.named if word not in said] == [], said
    assert contents(tmp_path / row.daemon) == before


async def test_torn_last_line_of_a_journal_is_dropped(folders: Path, tmp_path: Path) -> None:
    """It is what a crash leaves of what nobody was told."""
    shutil.copytree(folders / AGENT, tmp_path / AGENT)
    with (tmp_path / AGENT / JOURNAL).open("ab") as journal:
        journal.write(b'{"crc32":"0000')
    async with Stage(tmp_path) as stage:
        agent = stage.agent(AGENT, "2xT4")
        await agent.start()
        assert "torn last line" in agent.log
        assert await agent.stop() == ExitCode.OK
    assert b'{"crc32":"0000\n' not in (tmp_path / AGENT / JOURNAL).read_bytes()


@pytest.mark.parametrize("name", [AGGREGATOR, AGENT])
async def test_folder_in_use_is_refused_and_its_user_goes_on(name: str, tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        first = make(stage, name)
        told = await first.start()
        second = stage.other(Daemon("second", own_ports(first.command), tmp_path, "nowhere"))
        said = await refusal_of(second, ExitCode.IN_USE)
        assert str(first.data_dir) in said
        assert str(told["pid"]) in said
        assert first.read_told() == told
        assert first.is_running
        # The kernel lets go of the lock with the process, whatever ends it.
        first.kill()
        await first.start()


@pytest.mark.parametrize("path", ["file", "file/below", "/proc/nowhere"])
@pytest.mark.parametrize("name", [AGGREGATOR, AGENT])
async def test_folder_that_cannot_be_made_is_named(name: str, path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    given = str(tmp_path / path) if not path.startswith("/") else path
    async with Stage(tmp_path) as stage:
        first = make(stage, name)
        command = [given if each == str(first.data_dir) else each for each in first.command]
        daemon = stage.other(Daemon("second", command, tmp_path, "nowhere"))
        assert given in await refusal_of(daemon, ExitCode.STORE)


@dataclass(frozen=True, slots=True)
class Port:
    """An option that names a port, and what it is called in messages."""

    daemon: str
    option: str
    key: str


PORTS = [
    Port(AGGREGATOR, "--listen", "listen"),
    Port(AGGREGATOR, "--metrics-listen", "metrics.listen"),
    Port(AGENT, "--metrics-listen", "metrics.listen"),
]


@pytest.mark.parametrize("port", PORTS, ids=lambda port: f"{port.daemon} {port.option}")
async def test_port_in_use_is_named(port: Port, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with Stage(tmp_path) as stage:
            daemon = make(stage, port.daemon)
            wanted = daemon.command[daemon.command.index(port.option) + 1]
            command = [address if each == wanted else each for each in daemon.command]
            daemon.spawn(command)
            said = await ended_with(daemon, ExitCode.IN_USE)
            assert port.key in said
            assert address.rpartition(":")[2] in said
            # It has let go of all it had: with a free port it starts.
            await daemon.start()


async def test_second_aggregator_does_not_share_the_port_of_the_first(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        first = stage.aggregator()
        await first.start()
        command = [each.replace(str(first.data_dir), str(tmp_path / "b")) for each in first.command]
        second = stage.other(Daemon("second", command, tmp_path, "nowhere"))
        said = await refusal_of(second, ExitCode.IN_USE)
        assert stage.address.rpartition(":")[2] in said
        assert f"PID {first.process.pid}" in said


def make(stage: Stage, name: str) -> Daemon:
    return stage.aggregator() if name == AGGREGATOR else stage.agent(AGENT, "2xT4")


def own_ports(command: Sequence[str]) -> list[str]:
    """The command with a free port in place of the stage's."""
    at = command.index("--listen") + 1 if "--listen" in command else -1
    return ["127.0.0.1:0" if place == at else each for place, each in enumerate(command)]


async def refusal_of(daemon: Daemon, status: ExitCode) -> str:
    """Start a daemon that cannot start; return the one line that it says."""
    daemon.spawn()
    return await ended_with(daemon, status)


async def ended_with(daemon: Daemon, status: ExitCode) -> str:
    found = await daemon.ended()
    assert found == status, daemon.log
    said = daemon.log
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("stoker-"), said
    return said.splitlines()[-1]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def execute(folder: Path, statement: str) -> None:
    connection = sqlite3.connect(folder / LEDGER)
    try:
        with connection:
            connection.execute(statement)
    finally:
        connection.close()


def contents(folder: Path) -> Mapping[str, str]:
    """A digest of every file, but for those that come and go."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in TRANSIENT]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
