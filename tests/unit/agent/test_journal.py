"""The journal on a real disk: what survives, what is refused, what is named."""

import errno
import logging
import os
import resource
import subprocess
import sys
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.agent import journal as journal_module
from stoker.agent.journal import JOURNAL_NAME, Journal, decode_batch, encode_batch
from stoker.agent.model import HeldAllocation, Release
from stoker.agent.records import (
    AllocationDropped,
    AllocationHeld,
    DriverReleased,
    DriverResumed,
    Durable,
    GpuNumbered,
    IncarnationBegun,
    Record,
    SequencesReserved,
)
from stoker.core.errors import InUse, StoreCorrupt, StoreError, StoreFull, StoreTooNew

BEGUN = (IncarnationBegun("life"), SequencesReserved(4001))


def held(id_: str, memory: int | None = None) -> AllocationHeld:
    return AllocationHeld(HeldAllocation(id_, ("GPU-0",), memory, "ann", 600.0, 12.5))


@contextmanager
def opened(folder: Path) -> Generator[Journal]:
    journal = Journal.open(folder)
    try:
        yield journal
    finally:
        journal.close()


def test_what_was_appended_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "agent"
    with opened(folder) as journal:
        assert journal.records == ()
        journal.append([BEGUN])
        journal.append([(held("a"),), (held("b", 2**30), GpuNumbered("GPU-0", 1))])
        journal.append([(AllocationDropped("a"), SequencesReserved(8001))])
    with opened(folder) as journal:
        assert set(journal.records) == {
            IncarnationBegun("life"),
            SequencesReserved(8001),
            GpuNumbered("GPU-0", 1),
            held("b", 2**30),
        }


records = st.one_of(
    st.builds(IncarnationBegun, st.text()),
    st.builds(SequencesReserved, st.integers(0, 2**63)),
    st.builds(GpuNumbered, st.text(), st.integers(1, 2**31)),
    st.builds(AllocationDropped, st.text()),
    st.builds(
        DriverReleased,
        st.builds(
            Release,
            st.floats(allow_nan=False, allow_infinity=False),
            st.none() | st.floats(allow_nan=False, allow_infinity=False),
            st.text(),
        ),
    ),
    st.just(DriverResumed()),
    st.builds(
        AllocationHeld,
        st.builds(
            HeldAllocation,
            st.text(),
            st.lists(st.text()).map(tuple),
            st.none() | st.integers(1, 2**63),
            st.text(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.floats(allow_nan=False, allow_infinity=False),
            mig_device_uuids=st.lists(st.text()).map(tuple),
            compute_milli=st.none() | st.integers(1, 1000),
            cpu_milli=st.integers(0, 2**63),
            host_memory_bytes=st.integers(0, 2**63),
            gang_nodes=st.integers(1, 1024),
        ),
    ),
)


@given(st.lists(records).map(tuple))
def test_a_batch_is_one_line_that_reads_as_it_was_written(batch: tuple[Record, ...]) -> None:
    line = encode_batch(batch)
    assert line.count(b"\n") == 1
    assert decode_batch(line.removesuffix(b"\n")) == batch


@given(st.lists(records, min_size=1).map(tuple), st.data())
def test_a_line_with_any_changed_byte_does_not_read(
    batch: tuple[Record, ...], data: st.DataObject
) -> None:
    line = bytearray(encode_batch(batch).removesuffix(b"\n"))
    place = data.draw(st.integers(0, len(line) - 1))
    line[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match="checksum"):
        decode_batch(bytes(line))


@given(st.lists(records), st.lists(records))
def test_the_fewest_records_add_up_to_the_same(first: list[Record], second: list[Record]) -> None:
    durable = Durable().after(first)
    short = Durable().after(durable.records())
    assert short == durable
    assert short.after(second) == durable.after(second)


# What an agent from before there were releases, and holds of parts, wrote.
OLD_JOURNAL = (
    b'{"crc32":"28ed5842","records":[{"record":"IncarnationBegun","incarnation":"life"},'
    b'{"record":"SequencesReserved","below":4001}]}\n'
    b'{"crc32":"0be1b1f3","records":[{"record":"AllocationHeld","allocation":{"id":"a","gpu_uuids":'
    b'["GPU-0"],"memory_bytes":null,"holder":"ann","ttl_seconds":600.0,"held_since":12.5,'
    b'"is_leaving":false}}]}\n'
)


def test_the_journal_of_an_older_agent_is_read_and_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(OLD_JOURNAL)
    with opened(tmp_path) as journal:
        assert journal.records == (*BEGUN, held("a"))
        journal.append([(DriverReleased(Release(1.0, 2.0, "root")),)])
    with opened(tmp_path) as journal:
        assert journal.records[-1] == DriverReleased(Release(1.0, 2.0, "root"))


def test_once_a_release_is_over_an_older_agent_can_read_the_journal_again(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(OLD_JOURNAL)
    with opened(tmp_path) as journal:
        journal.append([(DriverReleased(Release(1.0, None, "root")),)])
        assert b"DriverReleased" in (tmp_path / JOURNAL_NAME).read_bytes()
        journal.append([(DriverResumed(),)])
        assert b"Driver" not in (tmp_path / JOURNAL_NAME).read_bytes()
        assert journal.records == (*BEGUN, held("a"))


def test_a_line_torn_anywhere_is_dropped_whole_with_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as journal:
        journal.append([BEGUN])
        kept = journal.records
        whole = (tmp_path / JOURNAL_NAME).read_bytes()
        journal.append([(held("a"), held("b"))])
    line = (tmp_path / JOURNAL_NAME).read_bytes()[len(whole) :]
    for size in range(1, len(line)):
        (tmp_path / JOURNAL_NAME).write_bytes(whole + line[:size])
        caplog.clear()
        with opened(tmp_path) as journal:
            assert journal.records == kept
            assert f"dropped {size} bytes of a torn last line" in caplog.text
        assert (tmp_path / JOURNAL_NAME).read_bytes() == whole


def test_zeros_after_the_last_line_are_a_torn_line(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        journal.append([BEGUN])
        kept = journal.records
    with (tmp_path / JOURNAL_NAME).open("ab") as file:
        file.write(b"\0" * 512)
    with opened(tmp_path) as journal:
        assert journal.records == kept
        journal.append([(held("a"),)])
    with opened(tmp_path) as journal:
        assert journal.records == (*kept, held("a"))


@pytest.mark.parametrize("place", ["first line", "last line"])
def test_damage_to_what_was_acknowledged_is_named_and_nothing_is_changed(
    tmp_path: Path, place: str
) -> None:
    with opened(tmp_path) as journal:
        journal.append([BEGUN])
        journal.append([(held("a"),)])
    path = tmp_path / JOURNAL_NAME
    data = path.read_bytes()
    damaged = (
        data.replace(b"life", b"lif3", 1)
        if place == "first line"
        else data.replace(b'"a"', b'"b"', 1)
    )
    path.write_bytes(damaged)
    number = 1 if place == "first line" else 2
    with pytest.raises(StoreCorrupt, match=f"{JOURNAL_NAME}, line {number} of 2: the checksum"):
        Journal.open(tmp_path)
    assert path.read_bytes() == damaged


def test_a_record_of_a_newer_version_is_named(tmp_path: Path) -> None:
    line = encode_batch(BEGUN).replace(b"IncarnationBegun", b"IncarnationLeft_")
    payload = line.split(b'"records":', 1)[1].removesuffix(b"}\n")
    crc = b"%08x" % zlib.crc32(payload)
    (tmp_path / JOURNAL_NAME).write_bytes(line[:10] + crc + line[18:])
    with pytest.raises(StoreTooNew, match="line 1: unknown record 'IncarnationLeft_'; a newer"):
        Journal.open(tmp_path)


def test_two_agents_never_share_a_folder(tmp_path: Path) -> None:
    message = f"another agent, process {os.getpid()}, uses this data folder"
    with opened(tmp_path), pytest.raises(InUse, match=message):
        Journal.open(tmp_path)
    with opened(tmp_path):
        pass


def test_the_lock_goes_with_a_process_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from stoker.agent.journal import Journal\n"
        "journal = Journal.open(pathlib.Path(sys.argv[1]))\n"
        "print('open', flush=True)\n"
        "time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(InUse, match=f"process {other.pid}"):
            Journal.open(tmp_path)
        other.kill()
        other.wait()
    with opened(tmp_path):
        pass


@contextmanager
def files_no_larger_than(size: int) -> Generator[None]:
    """As good as a full disk, and needs no root: writes beyond fail with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_refuses_the_whole_batch_and_keeps_what_was_there(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        journal.append([BEGUN])
        kept, data = journal.records, (tmp_path / JOURNAL_NAME).read_bytes()
        message = f"{JOURNAL_NAME}: File too large"
        with files_no_larger_than(len(data) + 40), pytest.raises(StoreFull, match=message):
            journal.append([(held("a"),)])
        assert journal.records == kept
        assert (tmp_path / JOURNAL_NAME).read_bytes() == data
        journal.append([(held("b"),)])
    with opened(tmp_path) as journal:
        assert journal.records == (*kept, held("b"))


def test_what_a_failed_write_left_behind_never_stands_before_a_good_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as journal:
        journal.append([BEGUN])
        real = os.ftruncate

        def failing(file: int, size: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:

            def fsync(file: int) -> None:
                failing(file, 0)

            patch.setattr(os, "fsync", fsync)
            calls: list[int] = []

            def truncate(file: int, size: int) -> None:
                calls.append(size)
                (real if len(calls) == 1 else failing)(file, size)

            patch.setattr(os, "ftruncate", truncate)
            with pytest.raises(StoreError, match="Input/output error"):
                journal.append([(held("a" * 500),)])
        assert len(calls) == 2
        journal.append([(held("b"),)])
    with opened(tmp_path) as journal:
        assert journal.records == (*BEGUN, held("b"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file/agent: Not a directory"):
        Journal.open(tmp_path / "file" / "agent")


def test_the_file_stays_small_over_many_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "REWRITE_BYTES_MIN", 4096)
    with opened(tmp_path) as journal:
        journal.append([BEGUN])
        for number in range(300):
            journal.append([(held(f"a{number}"),), (AllocationDropped(f"a{number - 1}"),)])
        kept = journal.records
    assert kept == (*BEGUN, held("a299"))
    assert (tmp_path / JOURNAL_NAME).stat().st_size < 8192
    with opened(tmp_path) as journal:
        assert journal.records == kept


@pytest.mark.parametrize("broken", ["open", "rename", "fsync"])
def test_a_rewrite_that_fails_leaves_the_old_file_in_use(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(journal_module, "REWRITE_BYTES_MIN", 512)
    real = getattr(os, broken)

    def failing(*arguments: object, **more: object) -> object:
        fresh = f"{JOURNAL_NAME.removesuffix('.jsonl')}.new"
        is_fresh = any(str(a).endswith(fresh) for a in arguments) or (
            broken == "fsync" and os.readlink(f"/proc/self/fd/{arguments[0]}").endswith(fresh)
        )
        if is_fresh:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **more)

    with opened(tmp_path) as journal:
        journal.append([BEGUN])
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, failing)
            for number in range(20):
                journal.append([(held("a"), SequencesReserved(4001 + number))])
        assert "cannot be rewritten: No space left on device" in caplog.text
        journal.append([(held("b"),)])
        kept = journal.records
    with opened(tmp_path) as journal:
        assert journal.records == kept
