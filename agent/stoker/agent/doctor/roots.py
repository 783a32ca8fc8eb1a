"""The files of a host, under a root: the host's own, or a folder that looks like one."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What is read is short; a file that is longer is some other one.
TEXT_BYTES_MAX = 1 << 22
_PART_BYTES = 1 << 16
# As many as the kernel follows.
_LINKS_MAX = 40


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the host's files are."""

    root: Path = Path("/")

    def path(self, absolute: str) -> Path:
        """Return where that file of the host is."""
        return self.root / absolute.lstrip("/")

    def text(self, absolute: str) -> str:
        """Return the text of a file; raises OSError."""
        try:
            return _read(self.path(absolute)).decode("utf-8", "replace")
        except OSError as error:
            error.filename = absolute  # a read does not name what it is of
            raise

    def text_or_none(self, absolute: str) -> str | None:
        """Return the text of a file, or None when it is not there; raises other OSErrors."""
        try:
            return self.text(absolute)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, absolute: str) -> list[str]:
        """Return what a folder holds, sorted; empty when it is not there. Raises OSError."""
        try:
            return sorted(os.listdir(self.path(absolute)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, absolute: str) -> bool:
        """Whether something is there; raises OSError when that cannot be seen."""
        try:
            self.path(absolute).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def target(self, absolute: str) -> str | None:
        """Return the name at the end of a chain of links, or None when nothing is there."""
        for _ in range(_LINKS_MAX):
            path = self.path(absolute)
            try:
                mode = path.lstat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                return None
            if not stat.S_ISLNK(mode):
                return absolute
            link = os.readlink(path)
            absolute = os.path.normpath(os.path.join(os.path.dirname(absolute), link))
        return None

    def program(self, name: str) -> str | None:
        """Return the path of a program of the host, or None when it has none of that name."""
        return next((path for path in _programs(name) if self.exists(path)), None)


def _read(path: Path) -> bytes:
    # In parts: /proc/sys refuses a read of megabytes with ENOMEM.
    parts: list[bytes] = []
    room = TEXT_BYTES_MAX
    with path.open("rb", buffering=0) as file:
        while part := file.read(min(_PART_BYTES, room)):
            parts.append(part)
            room -= len(part)
    return b"".join(parts)


def _programs(name: str) -> Iterator[str]:
    for folder in ("/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin", "/opt/bin"):
        yield f"{folder}/{name}"
