"""The daemon as a process: its options, what it says when it cannot start, signals, a full disk."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from grpc import aio
from tests.support.daemons import Daemon, plain_environment
from tests.support.disks import fill, make_room, on_small_disk
from tests.support.pages import fetch_metrics
from tests.support.waiting import until_true

from stoker.core.errors import ExitCode
from stoker.v1 import agent_pb2, agent_pb2_grpc, fleet_pb2, fleet_pb2_grpc

ANY = "127.0.0.1:0"


def command(folder: Path, *more: str) -> list[str]:
    options = ["--data-dir", str(folder), "--listen", ANY, "--metrics-listen", ANY]
    return [sys.executable, "-m", "stoker.aggregator", *options, *more]


def daemon(tmp_path: Path, *prefix: str) -> Daemon:
    line = [*prefix, *command(tmp_path / "aggregator")]
    return Daemon("aggregator", line, tmp_path, "aggregator.json")


def run(
    *arguments: str, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        env=plain_environment(environment),
        timeout=60,
        check=False,
    )


def said_in_one_line(done: "subprocess.CompletedProcess[str]", code: ExitCode) -> str:
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("stoker-aggregator: ")
    return line


async def test_it_tells_where_it_listens_and_takes_it_back(tmp_path: Path) -> None:
    aggregator = daemon(tmp_path)
    try:
        told = await aggregator.start()
        assert told.keys() == {"pid", "version", "listen", "metrics"}
        async with aio.insecure_channel(told["listen"]) as channel:
            answer = await fleet_pb2_grpc.FleetStub(channel).ListNodes(fleet_pb2.ListNodesRequest())
        assert answer.aggregator_version == told["version"]
        assert "stoker_build_info" in await fetch_metrics(told["metrics"])
        assert await aggregator.stop() == ExitCode.OK
    finally:
        aggregator.end()
    assert not (aggregator.data_dir / "aggregator.json").exists()
    assert "Traceback" not in aggregator.log


async def test_it_ends_in_order_though_clients_stay_on_the_line(tmp_path: Path) -> None:
    aggregator = daemon(tmp_path)
    try:
        told = await aggregator.start()
        async with aio.insecure_channel(told["listen"]) as channel:
            watch = fleet_pb2_grpc.FleetStub(channel).Watch(fleet_pb2.WatchRequest())
            await watch.wait_for_connection()
            aggregator.process.send_signal(signal.SIGINT)
            assert await aggregator.ended() == ExitCode.OK
            watch.cancel()
    finally:
        aggregator.end()
    assert "Traceback" not in aggregator.log


async def test_port_in_use_is_named_with_its_holder(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for option in ("--listen", "--metrics-listen"):
            done = run(*command(tmp_path / "a", option, f"127.0.0.1:{port}"))
            line = said_in_one_line(done, ExitCode.IN_USE)
            assert str(port) in line
            if option == "--listen":
                assert f"(PID {os.getpid()})" in line


def test_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    done = run(*command(tmp_path / "a", "--listen", "192.0.2.1:0", "--insecure"))
    assert "192.0.2.1:0" in said_in_one_line(done, ExitCode.USAGE)


def test_listening_to_everybody_needs_a_word(tmp_path: Path) -> None:
    for option in ("--listen", "--metrics-listen"):
        done = run(*command(tmp_path / "a", option, "0.0.0.0:0"))
        assert "--insecure" in said_in_one_line(done, ExitCode.USAGE)
    assert not (tmp_path / "a").exists()


def test_unknown_key_of_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "aggregator.yaml"
    file.write_text("lissten: 127.0.0.1:0\n", encoding="utf-8")
    done = run(sys.executable, "-m", "stoker.aggregator", "--config", str(file))
    line = said_in_one_line(done, ExitCode.USAGE)
    assert "line 1" in line
    assert "listen" in line


def test_defaults_can_be_printed_and_read_again(tmp_path: Path) -> None:
    printed = run(sys.executable, "-m", "stoker.aggregator", "--print-defaults")
    assert printed.returncode == 0
    for key in ("listen:", "data_dir:", "insecure:", "log_level:", "metrics:"):
        assert key in printed.stdout


def test_damaged_ledger_is_named_and_left_alone(tmp_path: Path) -> None:
    ledger = tmp_path / "a" / "ledger.sqlite3"
    ledger.parent.mkdir()
    ledger.write_bytes(b"this is no database" * 1000)
    line = said_in_one_line(run(*command(ledger.parent)), ExitCode.STORE)
    assert str(ledger) in line
    assert "restore a backup" in line
    assert ledger.read_bytes() == b"this is no database" * 1000


def test_version_is_told() -> None:
    done = run(sys.executable, "-m", "stoker.aggregator", "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "stoker-aggregator")


async def test_service_manager_is_told(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.setblocking(False)
        line = command(tmp_path / "aggregator")
        aggregator = Daemon(
            "aggregator", line, tmp_path, "aggregator.json", {"NOTIFY_SOCKET": str(path)}
        )
        heard: list[str] = []

        def has_heard(word: str) -> bool:
            try:
                while True:
                    heard.extend(manager.recv(4096).decode().splitlines())
            except BlockingIOError:
                return word in heard

        try:
            told = await aggregator.start()
            await until_true("READY", lambda: has_heard("READY=1"))
            await until_true("WATCHDOG", lambda: has_heard("WATCHDOG=1"))
            assert f"STATUS=serving on {told['listen']}" in heard
            aggregator.process.terminate()
            await until_true("STOPPING", lambda: has_heard("STOPPING=1"))
            assert await aggregator.ended() == ExitCode.OK
        finally:
            aggregator.end()


@pytest.mark.tmpfs
async def test_full_disk_refuses_one_wish_and_takes_the_next_when_there_is_room(
    tmp_path: Path,
) -> None:
    aggregator = daemon(tmp_path, *on_small_disk(tmp_path / "aggregator", "1m"))
    try:
        told = await aggregator.start()
        async with aio.insecure_channel(told["listen"]) as channel:
            fleet = fleet_pb2_grpc.FleetStub(channel)
            fill(aggregator)
            refused, number = "", 0
            for number in range(1000):  # what the file has allocated may still take some
                try:
                    await register(channel, number)
                except aio.AioRpcError as error:
                    refused = error.details() or ""
                    break
            assert "ledger.sqlite3: no room to write" in refused
            before = len((await fleet.ListNodes(fleet_pb2.ListNodesRequest())).nodes)
            assert before == number
            make_room(aggregator)
            await register(channel, 5000)
            after = len((await fleet.ListNodes(fleet_pb2.ListNodesRequest())).nodes)
            assert after == before + 1
        assert await aggregator.stop() == ExitCode.OK
    finally:
        aggregator.end()
    assert "Traceback" not in aggregator.log


async def register(channel: aio.Channel, number: int) -> None:
    """Say hello as a node of that number, and hang up once it is welcome."""
    hello = agent_pb2.Hello(
        protocol_version=1,
        node=f"n{number}",
        incarnation=f"i{number}",
        process_id="p",
        interval_seconds=1.0,
        labels={str(n): "x" * 200 for n in range(10)},
    )
    call = agent_pb2_grpc.AgentLinkStub(channel).Connect()
    await call.write(agent_pb2.AgentMessage(hello=hello))
    assert isinstance(await call.read(), agent_pb2.AggregatorMessage)
    call.cancel()
