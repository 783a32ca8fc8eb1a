"""What the helper finds in the files of a process, and what never leaves them."""

import errno
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.agent.helper.files import (
    DEVICES_MAX,
    Process,
    driver_device,
    real_uid,
    sorted_devices,
)
from stoker.agent.helper.log import RECORDS_AT_ONCE, KernelLog
from stoker.agent.helper.memory import (
    COMMAND_CHARACTERS_MAX,
    FINDERS,
    HANGING_MAX,
    VARIABLE_CHARACTERS_MAX,
    Hanging,
    command_line,
    job_variables,
    mapped_devices,
)
from stoker.agent.helper.variables import ALLOCATION, JOB_VARIABLES

MAPS = b"""\
55d0-55d1 r-xp 00000000 fd:00 123 /usr/bin/python3.11
7f00-7f01 rw-s 00000000 00:05 611 /dev/nvidiactl
7f01-7f02 rw-s 00020000 00:05 612 /dev/nvidia0
7f02-7f03 rw-s 00030000 00:05 612 /dev/nvidia0
7f03-7f04 rw-s 00000000 00:05 613 /dev/nvidia-uvm (deleted)
7f04-7f05 r--p 00000000 fd:00 124 /opt/dev/nvidia0/lib.so
7f05-7f06 rw-p 00000000 00:00 0 [heap]
7f06-7f07 rw-p 00000000 00:00 0
"""


def test_devices_that_are_mapped() -> None:
    assert mapped_devices(MAPS) == ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/dev/nvidia0", "/dev/nvidia0"),
        ("/dev/nvidia-caps/nvidia-cap21", "/dev/nvidia-caps/nvidia-cap21"),
        ("/dev/nvidia-uvm (deleted)", "/dev/nvidia-uvm"),
        ("/dev/null", None),
        ("/tmp/dev/nvidia0", None),
        ("socket:[1234]", None),
        ("/dev/nvidia\udcff\n0", "/dev/nvidia??0"),
    ],
)
def test_which_files_are_the_drivers(path: str, expected: str | None) -> None:
    assert driver_device(path) == expected


def test_no_name_that_a_user_makes_up_crowds_out_a_gpu() -> None:
    made_up = [f"/dev/nvidia-{number:03}" for number in range(2 * DEVICES_MAX)]
    found = sorted_devices(["/dev/nvidiactl", *made_up, "/dev/nvidia10", "/dev/nvidia9"])
    assert found[:3] == ["/dev/nvidia9", "/dev/nvidia10", "/dev/nvidiactl"]
    assert len(found) == DEVICES_MAX


@pytest.mark.parametrize(
    ("cmdline", "expected"),
    [
        (b"python3\0train.py\0--lr\0001e-3\0", "python3 train.py --lr 1e-3"),
        (b"", ""),
        (b"\0\0", ""),
        (b"sh\0-c\0echo \x1b[2J\n\xff\0", "sh -c echo ?[2J??"),
        (b"x" * 5000, "x" * (COMMAND_CHARACTERS_MAX - 3) + "..."),
    ],
)
def test_a_command_is_one_printable_line(cmdline: bytes, expected: str) -> None:
    assert [line.replace("\ufffd", "?") for line in command_line(cmdline)] == [expected]


def test_of_an_environment_only_what_tells_the_job_is_found() -> None:
    environ = (
        b"PATH=/bin\0SLURM_JOB_ID=4711\0SLURM_JWT=secret\0SLURM_JOB_GPUS=0,1\0"
        b"AWS_SECRET_ACCESS_KEY=secret\0SLURM_JOB_ID=4712\0XSLURM_JOB_ID=1\0SLURM_STEP_ID\0"
        b"STOKER_ALLOCATION_ID=a=b\n\0SLURM_CONF=/etc/slurm.conf\0STOKER_TOKEN=secret\0\0"
    )
    assert job_variables(environ) == [
        "SLURM_JOB_ID=4711",
        "SLURM_JOB_GPUS=0,1",
        "SLURM_STEP_ID=",
        "STOKER_ALLOCATION_ID=a=b?",
    ]


def test_a_variable_is_cut() -> None:
    (found,) = job_variables(b"SLURM_JOB_GPUS=" + b"x" * 100_000)
    assert found == "SLURM_JOB_GPUS=" + "x" * VARIABLE_CHARACTERS_MAX


def test_a_list_of_the_gpus_of_a_large_machine_is_whole() -> None:
    gpus = ",".join(f"GPU-{number:08x}-0000-4000-8000-000000000000" for number in range(16))
    assert job_variables(f"SLURM_JOB_GPUS={gpus}".encode()) == [f"SLURM_JOB_GPUS={gpus}"]


def test_no_variable_that_may_be_a_credential_is_on_the_list() -> None:
    assert all(name.startswith("SLURM_") for name in JOB_VARIABLES - {ALLOCATION})
    for word in ("JWT", "TOKEN", "KEY", "CRED", "SECRET", "PASS", "AUTH", "MUNGE", "CONF"):
        assert not [name for name in JOB_VARIABLES if word in name]


@given(st.sampled_from(sorted(FINDERS)), st.binary(max_size=400))
def test_any_bytes_are_taken(file: str, said: bytes) -> None:
    for line in FINDERS[file](said):
        assert line.isprintable() or "\ufffd" in line


def test_a_status_without_a_user_is_of_a_process_that_ended() -> None:
    assert real_uid(b"Name:\tx\nUid:\t1000\t0\t0\t0\n") == 1000
    with pytest.raises(ProcessLookupError):
        real_uid(b"")


def process(pid: int, ticks: int = 1) -> Process:
    return Process(pid, "x", ticks, is_kernel_thread=False)


def test_a_process_that_hung_is_tried_again_when_its_reader_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stoker.agent.helper.memory._RETRY_SECONDS", -1.0)
    hanging = Hanging()
    hanging.note(f"7 1 {os.getpid()}\n8 1 {1 << 22}\n".encode())
    assert process(7) in hanging
    assert process(7, ticks=2) not in hanging, "another process has that PID by now"
    hanging.review()
    assert process(7) in hanging, "its reader still tries"
    assert process(8) not in hanging


def test_a_process_that_hung_is_left_alone_for_a_while() -> None:
    hanging = Hanging()
    hanging.note(f"8 1 {1 << 22}\n".encode())
    hanging.review()
    assert process(8) in hanging


def test_when_many_hang_nothing_more_is_tried() -> None:
    hanging = Hanging()
    for pid in range(HANGING_MAX):
        assert process(9_999) not in hanging
        hanging.note(f"{pid} 1 {os.getpid()}\n".encode())
    assert process(9_999) in hanging


def test_records_that_were_overwritten_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "kmsg"
    path.touch()
    log = KernelLog(str(path), None)
    answers: list[bytes | OSError] = [
        BlockingIOError(),
        BrokenPipeError(errno.EPIPE, ""),
        b"4,90,1000000,-;NVRM: Xid\n SUBSYSTEM=pci\n",
        BlockingIOError(),
    ]

    def read(descriptor: int, size: int) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr("stoker.agent.helper.log.os.read", read)
    assert log.read() == []
    assert not log.take_lost()
    before = time.time()
    ((record, at),) = log.read()
    assert record.sequence == 90
    assert at < before - 1.0 or time.monotonic() < 2.0, "it was in the log for a while: no new one"
    assert (log.take_lost(), log.take_lost()) == (True, False)
    monkeypatch.undo()
    log.close()


def test_a_flood_is_read_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.write_bytes(b"".join(b"4,%d,1,-;NVRM: flood\n" % n for n in range(1 << 18)))
    log = KernelLog(str(path), None)
    first = log.read()
    assert log.has_more
    second = log.read()
    assert 0 < len(first) < 1 << 18
    assert second[0][0].sequence - first[-1][0].sequence == 1
    assert RECORDS_AT_ONCE > 1
    log.close()
