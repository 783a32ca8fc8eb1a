"""The kubelet through the root helper, where this user may not connect: the real parts of both."""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import grpc
import pytest
from tests.support.root_helper import RunningHelper, open_folder, running
from tests.support.waiting import until, until_true

from stoker.agent.attribution import kubernetes
from stoker.agent.attribution.assignments import PodDevices
from stoker.agent.attribution.bridge import Bridge
from stoker.agent.attribution.kubernetes import Listing, PodResources
from stoker.agent.privileged import Helper
from stoker.testing.kubelet import Kubelet

HELD = (PodDevices("ml", "train-0", "trainer", "nvidia.com/gpu", ("GPU-a",)),)
READINGS = 1000
REFUSED = "Permission denied"


@pytest.fixture
def folder() -> Generator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture
def found(folder: Path) -> Generator[RunningHelper]:
    with running(folder, "--pod-resources", str(folder / "k.sock")) as found:
        yield found


@pytest.fixture
async def kubelet(folder: Path) -> AsyncGenerator[Kubelet]:
    async with Kubelet(folder / "k.sock") as kubelet:
        kubelet.give("ml", "train-0", "trainer", "nvidia.com/gpu", ["GPU-a"])
        yield kubelet


@pytest.fixture
def barred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the test may not connect; a test that is run by root cannot be barred."""

    def refuse(path: Path) -> str:
        return REFUSED

    monkeypatch.setattr(kubernetes, "_refusal", refuse)


@pytest.fixture
async def pods(folder: Path, barred: None) -> AsyncGenerator[PodResources]:
    pods = PodResources(folder / "k.sock", helper=Helper(folder / "helper.sock"))
    yield pods
    await pods.close()


def unknown(folder: Path, why: str) -> Listing:
    return Listing(unknown=f"what the kubelet has handed out is not known: {folder}/k.sock: {why}")


@pytest.mark.usefixtures("found")
async def test_who_may_not_connect_reads_over_a_connection_of_the_helper(
    pods: PodResources, kubelet: Kubelet
) -> None:
    assert await pods.list() == Listing(HELD)
    kubelet.take_away("ml", "train-0")
    assert await pods.list() == Listing()
    assert kubelet.calls == 2


async def test_who_may_connect_does_not_ask_the_helper(folder: Path, kubelet: Kubelet) -> None:
    pods = PodResources(kubelet.socket_path, helper=Helper(folder / "nowhere.sock"))
    assert await pods.list() == Listing(HELD)
    await pods.close()


@pytest.mark.usefixtures("barred", "kubelet")
async def test_without_a_helper_it_is_unknown(folder: Path) -> None:
    pods = PodResources(folder / "k.sock")
    assert await pods.list() == unknown(folder, f"{REFUSED}, and there is no root helper to ask")


@pytest.mark.usefixtures("kubelet")
async def test_without_an_answer_of_the_helper_both_reasons_are_named(
    folder: Path, pods: PodResources
) -> None:
    assert await pods.list() == unknown(
        folder,
        f"{REFUSED}; the kubelet cannot be reached through the helper: helper at "
        f"{folder}/helper.sock: nothing is there; is stoker-agent-helper running?",
    )


@pytest.mark.usefixtures("kubelet")
async def test_a_helper_that_says_nothing_is_waited_for_only_so_long(
    folder: Path, pods: PodResources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "ANSWER_SECONDS_MAX", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(folder / "helper.sock"))
        silent.listen()
        told = await pods.list()
    assert told == unknown(folder, f"{REFUSED}; the helper at {folder}/helper.sock takes too long")


@pytest.mark.usefixtures("found")
async def test_a_machine_that_has_no_such_socket_is_no_kubernetes_node(
    folder: Path, pods: PodResources, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> os.stat_result:
        raise PermissionError(13, REFUSED, str(path))

    with monkeypatch.context() as hidden:
        hidden.setattr("stoker.agent.attribution.kubernetes.os.stat", refuse)
        await kubelet.vanish()
        assert await pods.list() == Listing()
        # Once there was one, it is known to be one.
        await kubelet.start()
        assert await pods.list() == Listing(HELD)
        await kubelet.vanish()
        gone = await until("the end of the connection", lambda: told_otherwise(pods))
        assert gone == unknown(folder, "there is no such socket")


async def told_otherwise(pods: PodResources) -> Listing | None:
    """Return what is told, once that does not depend on a connection that has just ended."""
    told = await pods.list()
    return None if told == Listing(HELD) or "nobody answers" in told.unknown else told


@pytest.mark.usefixtures("found")
async def test_a_kubelet_that_has_left_its_socket_is_unknown(
    folder: Path, pods: PodResources, kubelet: Kubelet
) -> None:
    await kubelet.vanish(leaving_socket=True)
    why = f"the helper at {folder}/helper.sock: {folder}/k.sock: Connection refused"
    assert await pods.list() == unknown(folder, f"{REFUSED}; {why}")
    await kubelet.start()
    assert await pods.list() == Listing(HELD)


@pytest.mark.usefixtures("found")
async def test_a_kubelet_that_was_restarted_is_dialled_anew(
    pods: PodResources, kubelet: Kubelet
) -> None:
    assert await pods.list() == Listing(HELD)
    await kubelet.vanish()
    await kubelet.start()
    told = await until("the kubelet's answer", lambda: told_something(pods))
    assert told == Listing(HELD)


async def told_something(pods: PodResources) -> Listing | None:
    told = await pods.list()
    return None if told.unknown else told


@pytest.mark.usefixtures("found")
async def test_a_kubelet_that_hangs_is_waited_for_only_so_long(
    folder: Path, pods: PodResources, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await pods.list() == Listing(HELD)
    kubelet.hang()
    with monkeypatch.context() as hasty:
        hasty.setattr(kubernetes, "ANSWER_SECONDS_MAX", 0.1)
        assert await pods.list() == unknown(
            folder, "it has not answered within 0.1 s (through the helper)"
        )
    kubelet.go_on()
    assert await pods.list() == Listing(HELD)


@pytest.mark.usefixtures("found")
async def test_a_long_answer_comes_whole(pods: PodResources, kubelet: Kubelet) -> None:
    ids = [f"GPU-{number:036}" for number in range(50_000)]
    kubelet.give("ml", "many-0", "trainer", "nvidia.com/gpu", ids)
    told = await pods.list()
    assert (told.unknown, told.holdings[1:]) == (
        "",
        (PodDevices("ml", "many-0", "trainer", "nvidia.com/gpu", tuple(ids)),),
    )


# --- nothing is left behind


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_many_readings_leave_no_descriptor_and_no_task(
    found: RunningHelper, pods: PodResources, kubelet: Kubelet
) -> None:
    async def read(count: int) -> None:
        for number in range(count):
            if number % 10 == 9:
                kubelet.fail(grpc.StatusCode.UNAVAILABLE, "no")
                assert (await pods.list()).unknown
                kubelet.mend()
            else:
                assert await pods.list() == Listing(HELD)

    await read(20)
    await pods.close()
    before, tasks = descriptors(), len(asyncio.all_tasks())
    await read(READINGS)
    await pods.close()
    await until_true("the closing of descriptors", lambda: descriptors() <= before)
    await until_true("the end of tasks", lambda: len(asyncio.all_tasks()) <= tasks)
    await until_true("the end of callers' processes", lambda: not found.children)


async def test_what_was_not_used_is_closed(
    found: RunningHelper, kubelet: Kubelet, folder: Path
) -> None:
    helper = Helper(folder / "helper.sock")
    told = await helper.connect_pod_resources()
    assert told.line is not None
    assert told.line.getpeername() == str(kubelet.socket_path)
    assert not told.line.get_inheritable()
    before = descriptors()
    for _ in range(20):
        again = await helper.connect_pod_resources()
        assert again.line is not None
        again.line.close()
    # The kubelet is in this process, and notices only later.
    await until_true("the end of all connections", lambda: descriptors() <= before)
    told.line.close()
    # Who does not take the connection leaves none behind either.
    assert found.ask(b'{"verb": "connect_pod_resources"}\n') == [{"ok": True, "is_there": True}]
    await until_true("the end of callers' processes", lambda: not found.children)


# --- the bridge


@pytest.fixture
async def bridged() -> AsyncGenerator[tuple[Bridge, socket.socket]]:
    """A bridge, and its far end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for each in (ours, theirs):
        each.setblocking(False)
    bridge = Bridge(ours)
    yield bridge, theirs
    await bridge.close()
    theirs.close()


def name_of(bridge: Bridge) -> str:
    return "\0" + bridge.address.removeprefix("unix-abstract:")


def dial(bridge: Bridge) -> socket.socket:
    with contextlib.ExitStack() as opened:
        line = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        line.setblocking(False)
        line.connect(name_of(bridge))
        opened.pop_all()
    return line


async def test_both_sides_hear_each_other(bridged: tuple[Bridge, socket.socket]) -> None:
    bridge, far = bridged
    loop = asyncio.get_running_loop()
    with dial(bridge) as near:
        await loop.sock_sendall(near, b"question")
        assert await loop.sock_recv(far, 100) == b"question"
        await loop.sock_sendall(far, b"answer")
        assert await loop.sock_recv(near, 100) == b"answer"


async def test_one_is_let_in_and_no_other_can_take_the_name(
    bridged: tuple[Bridge, socket.socket],
) -> None:
    bridge, far = bridged
    loop = asyncio.get_running_loop()
    with dial(bridge) as near:
        await loop.sock_sendall(near, b"x")
        await loop.sock_recv(far, 100)
        with pytest.raises(ConnectionRefusedError):
            dial(bridge)
    await until_true("the end of the bridge", lambda: bridge.is_over)
    with pytest.raises(ConnectionRefusedError):
        dial(bridge)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other,
        pytest.raises(OSError, match="in use"),
    ):
        other.bind(name_of(bridge))


async def test_another_process_is_hung_up_on(bridged: tuple[Bridge, socket.socket]) -> None:
    bridge, far = bridged
    lines = (
        "import socket, sys",
        "line = socket.socket(socket.AF_UNIX)",
        "line.connect('\\0' + sys.argv[1])",
        "try: line.sendall(b'let me in'); print(line.recv(10))",
        "except (ConnectionResetError, BrokenPipeError): print(b'')",
    )
    stranger = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "\n".join(lines), name_of(bridge)[1:]),
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await stranger.communicate()
    assert said == b"b''\n"
    with dial(bridge) as near:  # the place is still free
        await asyncio.get_running_loop().sock_sendall(near, b"ours")
        assert await asyncio.get_running_loop().sock_recv(far, 100) == b"ours"


@pytest.mark.parametrize("who", ["near", "far"])
async def test_who_hangs_up_ends_both(who: str, bridged: tuple[Bridge, socket.socket]) -> None:
    bridge, far = bridged
    loop = asyncio.get_running_loop()
    with dial(bridge) as near:
        await loop.sock_sendall(near, b"x")
        await loop.sock_recv(far, 100)
        (near if who == "near" else far).close()
        if who == "near":
            assert await loop.sock_recv(far, 100) == b""
        else:
            assert await loop.sock_recv(near, 100) == b""
        await until_true("the end of the bridge", lambda: bridge.is_over)


async def test_what_nobody_takes_is_not_held_without_bound(
    bridged: tuple[Bridge, socket.socket],
) -> None:
    bridge, _ = bridged
    with dial(bridge) as near:
        taken, patience = 0, 50
        while patience:
            try:
                taken += near.send(b"x" * (1 << 16))
            except BlockingIOError:
                patience -= 1
                await asyncio.sleep(0)
        assert 0 < taken < 8 << 20  # what the kernel holds in both sockets, and one part


async def test_a_bridge_that_nobody_has_dialled_leaves_nothing() -> None:
    before = descriptors()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    bridge = Bridge(ours)
    await bridge.close()
    assert theirs.recv(1) == b""
    theirs.close()
    assert descriptors() == before
