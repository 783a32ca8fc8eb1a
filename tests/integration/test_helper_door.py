"""Who may ask the root helper, what it is asked, how its socket comes and goes."""

import asyncio
import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from tests.support.root_helper import (
    NOBODY,
    SECONDS_MAX,
    LogPipe,
    ProcTree,
    RunningHelper,
    command_of,
    open_folder,
    running,
)
from tests.support.waiting import until_true

from stoker.agent.helper.requests import PID_MAX
from stoker.agent.helper.server import CONNECTIONS_MAX, REQUEST_BYTES_MAX
from stoker.agent.helper.verbs import SEQUENCE_MAX, VERBS

IS_ROOT = os.geteuid() == 0
LIST = b'{"verb": "list_holders"}\n'
FOLLOW = b'{"verb": "follow_kernel_log", "boot_id": "", "after": null}\n'


@pytest.fixture
def folder() -> Generator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture
def options(folder: Path) -> Generator[tuple[str, ...]]:
    """A /proc with nobody in it, and a log that says nothing."""
    tree, log = ProcTree(folder / "proc"), LogPipe(folder / "kmsg")
    yield "--proc", str(tree.root), "--kmsg", str(log.path)
    log.close()


@pytest.fixture
def found(folder: Path, options: tuple[str, ...]) -> Generator[RunningHelper]:
    with running(folder, *options, tuning={"server.LINE_SECONDS_MAX": 0.2}) as found:
        yield found


def ask_as(uid: int, path: Path, said: bytes) -> list[dict[str, Any]] | str:
    """Ask as that user, in a process of its own; a text: the kernel did not even let it in."""
    lines = (
        "import os, sys, json, socket",
        "from pathlib import Path",
        "from tests.support.root_helper import ask",
        f"if os.geteuid() != {uid}: os.setgroups([]); os.setgid({uid}); os.setuid({uid})",
        f"try: print(json.dumps(ask(Path({str(path)!r}), {said!r})))",
        "except PermissionError as error: print(json.dumps(error.strerror))",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=SECONDS_MAX,
    )
    assert done.returncode == 0, done.stderr.decode()
    answer: list[dict[str, Any]] | str = json.loads(done.stdout)
    return answer


@contextlib.contextmanager
def anybodys_socket(folder: Path) -> Generator[socket.socket]:
    """Give a socket that listens, and that every user may connect to, as systemd may make one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fsencode(folder / "helper.sock"))
        (folder / "helper.sock").chmod(0o666)
        listener.listen()
        yield listener


# --- who may ask


def test_who_may_not_ask_is_told_so_and_hung_up_on(folder: Path) -> None:
    stranger = NOBODY if IS_ROOT else os.geteuid()
    told_user = str(stranger + 1) if not IS_ROOT else "1"
    with (
        anybodys_socket(folder) as listener,
        running(folder, user=told_user, inherited=listener) as found,
    ):
        for said in (LIST, FOLLOW, b"", b"{}\n", b"x" * 100_000):
            assert ask_as(stranger, found.path, said) == [
                {"refused": f"the user with UID {stranger} may not ask"}
            ]
        assert found.log().count(f"UID {stranger} asked") == 1, "no stranger fills the journal"
        assert found.children == []
        assert found.path.exists()
    assert found.path.exists(), "a socket that was handed over is not ours to remove"


@pytest.mark.root
def test_the_one_user_and_root_may_ask_and_the_kernel_keeps_out_all_others(
    folder: Path, options: tuple[str, ...]
) -> None:
    with running(folder, *options, user=str(NOBODY)) as found:
        facts = found.path.stat()
        assert (facts.st_uid, stat.S_IMODE(facts.st_mode)) == (NOBODY, 0o600)
        agreed: list[dict[str, Any]] = [{"ok": True, "holders": [], "shortfall": ""}]
        assert ask_as(NOBODY, found.path, LIST) == agreed
        assert ask_as(0, found.path, LIST) == agreed
        assert ask_as(1, found.path, LIST) == "Permission denied"


@pytest.mark.root
def test_a_user_may_be_given_by_name(folder: Path, options: tuple[str, ...]) -> None:
    with running(folder, *options, user="nobody") as found:
        assert found.path.stat().st_uid == NOBODY


# --- what is asked


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b'{"verb": "reboot"}\n', "no such verb: 'reboot'; there are follow_kernel_log, "),
        (b'{"verb": "LIST_HOLDERS"}\n', "no such verb: 'LIST_HOLDERS'"),
        (b'{"verb": "__class__"}\n', "no such verb: '__class__'"),
        (b'{"verb": ["list_holders"]}\n', "no such verb: ['list_holders']"),
        (b'{"verb": null}\n', "no such verb: None"),
        (b"{}\n", "no such verb: None"),
        (b'{"verb": "\\ud800' + b"x" * 500 + b'"}\n', "no such verb: '\\ud800xxx"),
        (b"[]\n", "the request is no JSON object"),
        (b"7\n", "the request is no JSON object"),
        (b"list_holders\n", "the request is no JSON"),
        (b"\xff\xfe\x00\n", "the request is no JSON"),
        (b"[" * 1000 + b"\n", "the request is no JSON"),
        (b'{"verb": "list_holders", "pid": 1}\n', "list_holders takes no 'pid'"),
        (b'{"verb": "job_variables"}\n', "job_variables: pid cannot be None"),
        *(
            (b'{"verb": "job_variables", "pid": %s}\n' % pid, "job_variables: pid cannot be")
            for pid in (b'"1"', b"1.5", b"true", b"0", b"-1", b"[1]", b'"self"', b"NaN")
        ),
        (
            f'{{"verb": "job_variables", "pid": {PID_MAX + 1}}}\n'.encode(),
            "job_variables: pid cannot be",
        ),
        (b'{"verb": "job_variables", "pid": 1, "file": "/etc/shadow"}\n', "takes no 'file'"),
        (
            b'{"verb": "connect_pod_resources", "path": "/run/docker.sock"}\n',
            "connect_pod_resources takes no 'path'",
        ),
        (b'{"verb": "follow_kernel_log", "after": 1}\n', "boot_id cannot be None"),
        (b'{"verb": "follow_kernel_log", "boot_id": ""}\n', "after cannot be None"),
        (b'{"verb": "follow_kernel_log", "boot_id": 7, "after": 1}\n', "boot_id cannot be 7"),
        (b'{"verb": "follow_kernel_log", "boot_id": "", "after": "x"}\n', "after cannot be 'x'"),
        (
            f'{{"verb": "follow_kernel_log", "boot_id": "", "after": {SEQUENCE_MAX}}}\n'.encode(),
            "after cannot be",
        ),
        (b"", "the request ends before its line does"),
        (b'{"verb": "list_holders"}', "the request ends before its line does"),
        (LIST + LIST, "one line is one connection"),
        (b" " * REQUEST_BYTES_MAX + LIST, f"longer than {REQUEST_BYTES_MAX} bytes"),
    ],
)
def test_what_is_no_request_is_refused_by_name(
    said: bytes, reason: str, shared: RunningHelper
) -> None:
    (told,) = shared.ask(said)
    assert told.keys() == {"refused"}
    assert reason in told["refused"]
    assert len(told["refused"]) < 400, "what a caller says is not said back whole"


@pytest.fixture(scope="module")
def shared() -> Generator[RunningHelper]:
    with open_folder() as folder, running(folder) as found:
        yield found


def test_the_verbs_are_these() -> None:
    assert VERBS.keys() == {
        *("follow_kernel_log", "list_holders", "job_variables", "connect_pod_resources"),
        *("mig_read", "mig_set_mode", "mig_create_gpu_instance", "mig_create_compute_instance"),
        *("mig_destroy_compute_instance", "mig_destroy_gpu_instance", "end_holder"),
    }


@pytest.mark.parametrize("said", [b"", LIST[:10]])
async def test_half_a_line_is_waited_for_only_so_long(said: bytes, found: RunningHelper) -> None:
    (told,) = await asyncio.to_thread(found.ask, said, is_over=False)
    assert told == {"refused": "no whole line came within 0.2 s"}


async def test_who_takes_no_answer_is_given_up(
    folder: Path, found: RunningHelper, options: tuple[str, ...]
) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller,
        (folder / "kmsg").open("r+b", buffering=0) as log,
    ):
        caller.connect(os.fsencode(found.path))
        caller.sendall(FOLLOW)
        await until_true("a follower", lambda: len(found.children) == 1)
        os.set_blocking(log.fileno(), False)
        sequence = 0

        def flood() -> bool:
            nonlocal sequence
            for _ in range(50):
                sequence += 1
                with contextlib.suppress(BlockingIOError):
                    log.write(b"4,%d,1,-;NVRM: %s\n" % (sequence, b"x" * 2000))
            return not found.children

        await until_true("the end of the follower", flood)
    assert found.ask(LIST)[0]["ok"]


async def test_connections_are_bounded_and_come_back(found: RunningHelper) -> None:
    with contextlib.ExitStack() as opened:
        for _ in range(CONNECTIONS_MAX):
            caller = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            caller.settimeout(SECONDS_MAX)
            caller.connect(os.fsencode(found.path))
            caller.sendall(FOLLOW)
            assert caller.recv(100) == b'{"ok": true}\n'
        assert found.ask(LIST) == [
            {"refused": f"{CONNECTIONS_MAX} connections are being answered; ask again"}
        ]
    await until_true("an answer", lambda: "ok" in found.ask(LIST)[0])
    await until_true("the end of all followers", lambda: not found.children)


async def test_a_follower_who_says_more_is_hung_up_on(found: RunningHelper) -> None:
    reader, writer = await asyncio.open_unix_connection(found.path)
    writer.write(FOLLOW)
    async with asyncio.timeout(SECONDS_MAX):
        assert await reader.readline() == b'{"ok": true}\n'
        writer.write(LIST)
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


# --- how the socket comes and goes


def test_it_leaves_no_socket_behind(folder: Path) -> None:
    with running(folder) as found:
        assert found.path.is_socket()
    assert found.process.returncode == 0
    assert not found.path.exists()


def test_the_socket_of_a_dead_helper_is_replaced(folder: Path) -> None:
    with running(folder) as found:
        found.process.kill()
        found.process.wait()
        assert found.path.exists()
        with running_again(folder) as again:
            assert "ok" in again.ask(LIST)[0]


async def test_whoever_still_answers_for_a_dead_helper_does_not_keep_the_next_one_out(
    found: RunningHelper, folder: Path
) -> None:
    reader, writer = await asyncio.open_unix_connection(found.path)
    writer.write(FOLLOW)
    async with asyncio.timeout(SECONDS_MAX):
        assert await reader.readline() == b'{"ok": true}\n'
    (follower,) = found.children
    follower.suspend()  # as one that hangs in the kernel, it outlives the helper
    try:
        found.process.kill()
        found.process.wait()
        with running_again(folder) as again:
            assert follower.is_running()
            assert "ok" in again.ask(LIST)[0]
    finally:
        follower.kill()
        writer.close()
    with contextlib.suppress(ConnectionResetError):
        await writer.wait_closed()


@contextlib.contextmanager
def running_again(folder: Path) -> Generator[RunningHelper]:
    """Give a helper at the same path; only what it says when it is ready goes elsewhere."""
    (folder / "notify.sock").rename(folder / "notify.before")
    try:
        with running(folder) as found:
            yield found
    finally:
        (folder / "notify.before").rename(folder / "notify.sock")


def refused(*options: str, cwd: Path | None = None, **environment: str) -> tuple[int, str]:
    """Start a helper that cannot run; return its status and what it says."""
    done = subprocess.run(
        [*command_of(), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS_MAX,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_two_helpers_do_not_answer_at_one_path(folder: Path) -> None:
    with running(folder) as found:
        status, said = refused("--socket", str(found.path))
        assert (status, "another helper answers at" in said) == (8, True)
        assert "ok" in found.ask(LIST)[0]


def test_the_socket_of_another_program_is_left_alone(folder: Path) -> None:
    with anybodys_socket(folder):
        status, said = refused("--socket", str(folder / "helper.sock"))
    assert (status, "another program answers at" in said) == (8, True)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_folder_that_others_can_write_to_is_refused(mode: int, folder: Path) -> None:
    folder.chmod(mode)
    status, said = refused("--socket", str(folder / "helper.sock"))
    assert (status, "can be written to by others" in said) == (1, True)


def test_a_file_in_the_place_of_the_socket_is_left_alone(folder: Path) -> None:
    (folder / "helper.sock").write_text("dear to somebody", encoding="ascii")
    status, said = refused("--socket", str(folder / "helper.sock"))
    assert (status, "it is no socket; move it away" in said) == (1, True)
    assert (folder / "helper.sock").read_text(encoding="ascii") == "dear to somebody"


@pytest.mark.root
def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    os.chown(folder, NOBODY, NOBODY)
    status, said = refused("--socket", str(folder / "helper.sock"))
    assert (status, "can be written to by others" in said) == (1, True)


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--user", "nobody-of-that-name"], 2, "no user 'nobody-of-that-name'"),
        (["--verb", "x"], 2, "no such option: --verb"),
        (["--user"], 2, "--user wants a value"),
        (["--socket="], 2, "--socket wants a value"),
        (["--socket", "/nowhere/helper.sock"], 1, "/nowhere/helper.sock: No such file"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(options: list[str], status: int, reason: str) -> None:
    found, said = refused(*options)
    assert found == status
    assert reason in said
    assert said.startswith("stoker-agent-helper: ")
    assert said.count("\n") == 1


def test_a_path_longer_than_the_kernel_takes_is_said_to_be(folder: Path) -> None:
    status, said = refused("--socket", str(folder / ("x" * 120)))
    assert status == 1
    assert "too long" in said


def test_the_socket_is_in_the_folder_that_the_service_manager_made(folder: Path) -> None:
    (folder / "helper.sock").touch()
    _, said = refused(RUNTIME_DIRECTORY=f"{folder}:/elsewhere")
    assert f"{folder}/helper.sock is there" in said


def test_something_else_handed_over_is_refused(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(os.fsencode(folder / "datagrams"))
        done = subprocess.run(
            command_of(inherited=other),
            pass_fds=[other.fileno()],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS_MAX,
        )
    assert done.returncode == 1
    assert "handed over" in done.stderr


def test_what_is_handed_over_to_another_process_is_not_taken(folder: Path) -> None:
    (folder / "helper.sock").touch()
    status, said = refused(
        "--socket", str(folder / "helper.sock"), LISTEN_PID=str(os.getpid()), LISTEN_FDS="1"
    )
    assert (status, "it is no socket" in said) == (1, True)


def test_help_tells_every_option() -> None:
    done = subprocess.run([*command_of(), "--help"], capture_output=True, text=True, check=True)
    for option in ("--user", "--socket", "--proc", "--kmsg", "--pod-resources"):
        assert f"\n  {option} " in done.stdout
