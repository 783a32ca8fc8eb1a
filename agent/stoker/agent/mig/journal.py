"""The book of what is done about partitions, on disk: `mig.json` beside the agent's journal.

It is small and written whole: beside the old one, synced, renamed over it, the folder synced. So
there is one good book on the disk at any time, the old one or the new. The lock of the agent's
journal keeps two agents from sharing the folder.
"""

import os
from pathlib import Path

import msgspec

from stoker.agent.journal import explained, sync_folder
from stoker.agent.mig.operations import Book
from stoker.core.errors import StoreCorrupt, StoreError, StoreTooNew

FILE_NAME = "mig.json"
# Rises when an older agent could not read what is written, or would read it wrongly.
VERSION = 1


class _Head(msgspec.Struct, frozen=True):
    version: int


class _File(msgspec.Struct, frozen=True):
    version: int
    book: Book


class MigJournal:
    """The file of one folder. Its methods block; one thread at a time uses it."""

    def __init__(self, folder: Path) -> None:
        """Take the agent's data folder, which is there and locked."""
        self.path = folder / FILE_NAME

    def load(self) -> Book:
        """Return what was saved last; an empty book when nothing ever was.

        Raises StoreTooNew for a newer agent's, StoreCorrupt for what is no book, or StoreError.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return Book()
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from error
        try:
            version = msgspec.json.decode(data, type=_Head).version
            if version > VERSION:
                raise StoreTooNew(
                    f"{self.path}: its version is {version}, this stoker-agent knows {VERSION}; "
                    "a newer one wrote it"
                )
            return msgspec.json.decode(data, type=_File).book
        except ValueError as error:  # as msgspec's and those of UTF-8 are
            raise StoreCorrupt(
                f"{self.path}: {error}; it is damaged. Move the file away to begin a new one: the "
                "agent then takes the partitions as they are, and has nothing to undo"
            ) from error

    def save(self, book: Book) -> None:
        """Return when the book is on disk; raises StoreFull or StoreError: the old one is there."""
        fresh = self.path.with_suffix(".new")
        data = msgspec.json.encode(_File(VERSION, book))
        try:
            with fresh.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise explained(self.path, error) from error
