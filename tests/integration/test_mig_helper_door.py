"""What may be said to the root helper about partitions, and how it is set up for that."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from tests.support.mig_steps import Node, make
from tests.support.root_helper import SECONDS_MAX, RunningHelper, open_folder, running
from tests.support.waiting import until_true

from stoker.agent.helper.requests import SMALL_MAX
from stoker.agent.mig.stepping import HelperStepper, StepsUnavailable
from stoker.agent.partitions import Activation

GPU = "GPU-0000000a-0000-4000-8000-00000000000f"


@pytest.fixture
def folder() -> Generator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture
def node(folder: Path) -> Node:
    return Node(folder)


# --- what may be said

PROFILE: dict[str, object] = {"profile": "3g.40gb", "profile_id": 9, "start": 4, "size": 4}
WITHIN: dict[str, object] = {"gpu_instance_id": 2, "profile": "3g.40gb", "start": 4}
GOOD: dict[str, dict[str, object]] = {
    "mig_read": {"gpu": GPU},
    "mig_set_mode": {"gpu": GPU, "is_enabled": True},
    "mig_create_gpu_instance": {"gpu": GPU, **PROFILE},
    "mig_create_compute_instance": {
        **WITHIN,
        "gpu": GPU,
        "beside": [0, 1],
        "profile_id": 2,
        "compute_slices": 3,
    },
    "mig_destroy_compute_instance": {
        **WITHIN,
        "gpu": GPU,
        "compute_instance_id": 0,
        "uuid": "MIG-00000000-0000-4000-8000-000000000000",
    },
    "mig_destroy_gpu_instance": {"gpu": GPU, **WITHIN},
    "end_holder": {"gpu": GPU, "pid": 4_194_304, "started_ticks": 1, "signal": "TERM"},
}
NUMBERS: tuple[object, ...] = (-1, SMALL_MAX, 1.5, True, "1", None, [], 1 << 70)
BAD: dict[str, tuple[object, ...]] = {
    "gpu": (
        *("", "GPU-1", GPU.upper(), f"{GPU}\n", f"{GPU}0", f"../{GPU}", "MIG" + GPU[3:]),
        *(0, True, [GPU], {"uuid": GPU}),
    ),
    "is_enabled": (0, 1, "true", None, []),
    "profile": (
        "",
        "3g",
        "3g.40gb\n",
        "3g.40GB",
        "../3g.40gb",
        "3g.40gb+" + "x" * 17,
        "3g.40gb" + "+me" * 4,
        9,
        None,
    ),
    "uuid": ("MIG-1", GPU, f"MIG-{GPU}", f"MIG-{GPU}/0/1000", None, 0),
    "beside": ([-1], [True], ["0"], list(range(65)), {}, "", None, 0),
    "signal": ("", "INT", "SIGTERM", "term", 9, 15, None),
    "pid": (0, -1, 4_194_305, True, "1", None),
    "started_ticks": (-1, 1 << 63, True, "1", None),
    "profile_id": NUMBERS,
    "start": NUMBERS,
    "size": NUMBERS,
    "gpu_instance_id": NUMBERS,
    "compute_instance_id": NUMBERS,
    "compute_slices": NUMBERS,
}
BAD_REQUESTS = [
    pytest.param(verb, name, value, id=f"{verb}-{name}-{value!r:.30}")
    for verb, arguments in GOOD.items()
    for name in arguments
    for value in BAD[name]
]


@pytest.fixture(scope="module")
def shared() -> Generator[RunningHelper]:
    with open_folder() as folder:
        node = Node(folder)
        with running(node.folder, *node.options) as found:
            yield found


def said(verb: str, arguments: dict[str, object]) -> bytes:
    return json.dumps({"verb": verb, **arguments}).encode() + b"\n"


@pytest.mark.parametrize("verb", GOOD)
def test_what_is_well_said_is_not_refused(verb: str, shared: RunningHelper) -> None:
    (told,) = shared.ask(said(verb, GOOD[verb]))
    if verb == "end_holder":
        assert told == {"ok": True, "is_gone": True, "is_simulated": True}
    else:
        assert (told["failed"], told["is_simulated"]) == ("not_found", True)


@pytest.mark.parametrize(("verb", "name", "value"), BAD_REQUESTS)
def test_what_is_ill_said_is_refused_by_name(
    verb: str, name: str, value: object, shared: RunningHelper
) -> None:
    (told,) = shared.ask(said(verb, {**GOOD[verb], name: value}))
    assert told.keys() == {"refused"}
    assert f"{verb}: {name} cannot be" in told["refused"]


@pytest.mark.parametrize("verb", GOOD)
def test_nothing_is_left_out_and_nothing_added(verb: str, shared: RunningHelper) -> None:
    for name in GOOD[verb]:
        less = {key: value for key, value in GOOD[verb].items() if key != name}
        (told,) = shared.ask(said(verb, less))
        assert f"{verb}: {name} cannot be None" in told["refused"] or verb == "mig_read"
    (told,) = shared.ask(said(verb, {**GOOD[verb], "path": "/etc/shadow"}))
    assert told == {"refused": f"{verb} takes no 'path'"}


# --- how it is set up


async def test_a_helper_that_only_reads(node: Node) -> None:
    with running(node.folder, *node.options, "--read-only") as found:
        stepper = HelperStepper(found.helper, is_simulated=True)
        now = node.now()
        for asked in (
            stepper.set_mode(node.uuids[0], True),
            stepper.do(node.uuids[0], make(now, "3g.40gb", 4), now),
            stepper.end_holder(node.uuids[0], os.getpid(), 1),
        ):
            with pytest.raises(StepsUnavailable, match=r"changes nothing .*--read-only"):
                await asked
        assert await stepper.read(node.uuids[0]) == (now,)


def loaded_libraries(pid: int) -> set[str]:
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    return {line.rpartition("/")[2].partition(".")[0] for line in lines if ".so" in line}


async def test_the_process_that_accepts_stays_as_small_as_it_was(node: Node) -> None:
    with running(node.folder, *node.options) as found:
        before = loaded_libraries(found.process.pid)
        stepper = HelperStepper(found.helper, is_simulated=True)
        assert await stepper.set_mode(node.uuids[0], True) is Activation.DONE
        assert loaded_libraries(found.process.pid) == before
        assert "_ctypes" not in before
        await until_true("the end of all who answered", lambda: not found.children)


async def test_a_folder_that_others_can_write_to_has_no_locks(node: Node, folder: Path) -> None:
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    other = Node(folder / "open")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fsencode(folder / "open" / "helper.sock"))
        listener.listen()
        with running(folder / "open", *other.options, inherited=listener) as found:
            stepper = HelperStepper(found.helper, is_simulated=True)
            with pytest.raises(StepsUnavailable, match="no folder for locks"):
                await stepper.read(None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--simulate", "2xNothing"], "Nothing"),
        (["--simulate", "2xH100-80GB", "--seed", "x"], "--seed: invalid int value: 'x'"),
        (["--node", "n1"], "--node is for simulated GPUs (--simulate)"),
    ],
)
def test_a_simulation_that_cannot_be_is_said_in_a_line(
    options: list[str], reason: str, folder: Path
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "stoker.agent.helper"),
            *("--socket", str(folder / "helper.sock"), *options),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS_MAX,
    )
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
