"""The book of partitions on disk: whole or not at all, and never taken for what it is not."""

import errno
import os
from pathlib import Path

import msgspec
import pytest

from stoker.agent.mig.journal import FILE_NAME, VERSION, MigJournal
from stoker.agent.mig.operations import (
    Book,
    Declared,
    Direction,
    GpuRecord,
    Operation,
    Origin,
)
from stoker.agent.partitions import Target
from stoker.core.errors import StoreCorrupt, StoreError, StoreFull, StoreTooNew
from stoker.core.mig.geometry import MigState, Placed, Wanted

WANTED = Wanted(is_enabled=True, devices=(("1g.10gb", 2), ("1c.2g.20gb", 1)))
LAYOUT = (Placed(0, 2, "2g.20gb", (1, 1)), Placed(2, 1, "1g.10gb"))
OPERATION = Operation(
    id="op-1",
    origin=Origin.ASKED,
    config="mixed",
    wanted=WANTED,
    state=MigState.ROLLING_BACK,
    asked_at=1_700_000_000.5,
    declares=Declared(WANTED, "mixed"),
    declared_before=None,
    reason="no room",
    leave_by=1_700_000_060.0,
    evict=True,
    direction=Direction.BACK,
    target=Target(is_enabled=True, layout=LAYOUT),
    before=Target(is_enabled=False),
    steps_done=3,
    steps_total=5,
)
BOOK = (
    Book()
    .noting("GPU-0", GpuRecord(declared=Declared(WANTED, "mixed")).asked(OPERATION))
    .noting("GPU-1", GpuRecord(known=("a", "b"), changed_at=7.25))
)


@pytest.fixture
def journal(tmp_path: Path) -> MigJournal:
    return MigJournal(tmp_path)


def test_what_was_never_saved_is_an_empty_book(journal: MigJournal) -> None:
    assert journal.load() == Book()


def test_what_was_saved_is_there_for_the_next(journal: MigJournal, tmp_path: Path) -> None:
    journal.save(Book())
    journal.save(BOOK)
    assert MigJournal(tmp_path).load() == BOOK
    assert [each.name for each in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("at", ["write", "fsync", "rename"])
def test_what_cannot_be_saved_leaves_the_old_book(
    at: str, journal: MigJournal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.save(BOOK)

    def fail(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if at == "write":
        journal.path.with_suffix(".new").mkdir()
        expected: type[StoreError] = StoreError
    else:
        monkeypatch.setattr(os, "fsync", fail) if at == "fsync" else monkeypatch.setattr(
            Path, "replace", fail
        )
        expected = StoreFull
    with pytest.raises(expected, match=FILE_NAME):
        journal.save(Book())
    assert MigJournal(tmp_path).load() == BOOK


def test_the_book_is_on_disk_before_it_takes_the_old_ones_place(
    journal: MigJournal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def noted_sync(file: int) -> None:
        done.append("folder" if Path(f"/proc/self/fd/{file}").is_dir() else "file")
        sync(file)

    def noted_replace(fresh: Path, target: Path) -> Path:
        done.append("rename")
        return replace(fresh, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    journal.save(BOOK)
    assert done == ["file", "rename", "folder"]


def test_what_a_crash_left_beside_it_is_no_matter(journal: MigJournal, tmp_path: Path) -> None:
    journal.save(BOOK)
    (tmp_path / "mig.new").write_text('{"version":1,"boo')
    assert journal.load() == BOOK
    journal.save(Book())
    assert journal.load() == Book()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"book":{}}',
        '{"version":"1","book":{}}',
        '{"version":1}',
        '{"version":1,"book":{"gpus":{"GPU-0":{"operation":{"id":"x"}}}}}',
        '{"version":1,"book":{"gpus":{"GPU-0":{"undo":{"is_enabled":"yes"}}}}}',
        "\xff",
    ],
)
def test_what_is_no_book_is_said_to_be_damaged(text: str, journal: MigJournal) -> None:
    journal.path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreCorrupt, match=r"mig\.json: .*damaged.*Move the file away"):
        journal.load()


def test_a_newer_agents_book_is_left_alone(journal: MigJournal) -> None:
    text = msgspec.json.encode({"version": VERSION + 1, "book": "of another shape"})
    journal.path.write_bytes(text)
    with pytest.raises(StoreTooNew, match=rf"version is {VERSION + 1}.*a newer one wrote it"):
        journal.load()
    assert journal.path.read_bytes() == text
