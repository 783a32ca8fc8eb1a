"""Libraries that conform to NVML, made by the C compiler of this machine; see fake_nvml/*.c."""

import mmap
import struct
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "integration" / "fake_nvml"
LIBRARY = "libnvidia-ml.so.1"
_FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
_PAGE_BYTES = 4096
_COUNTS = struct.Struct("<QQ")


def build_small(folder: Path) -> Path:
    """Make the library that lacks much into that folder, and return the folder."""
    return _build(folder, "small.c")


def build_full(folder: Path) -> Path:
    """Make the library that answers what monitors ask into that folder, and return the folder."""
    return _build(folder, "nvml.c", "batches.c")


def build_mig(folder: Path) -> Path:
    """Make the library whose GPU can be partitioned into that folder, and return the folder."""
    return _build(folder, "mig.c")


def _build(folder: Path, *sources: str) -> Path:
    inputs = [str(FOLDER / source) for source in sources]
    subprocess.run(["cc", *_FLAGS, "-o", str(folder / LIBRARY), *inputs], check=True)
    return folder


@dataclass(frozen=True, slots=True)
class Counts:
    """What the full library counted, over all processes that it was given to."""

    calls: int
    things: int  # event sets and GPM samples that were made and not freed


class Page:
    """The file in which the full library counts."""

    def __init__(self, path: Path) -> None:
        """Make the file."""
        self.path = path
        path.write_bytes(bytes(_PAGE_BYTES))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _PAGE_BYTES)

    def read(self) -> Counts:
        """Return what was counted so far."""
        return Counts(*_COUNTS.unpack_from(self._map))

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()


@contextmanager
def counting(path: Path) -> Generator[Page]:
    """Make the file in which the full library counts, and let go of it at the end."""
    page = Page(path)
    try:
        yield page
    finally:
        page.close()


def environment(
    folder: Path, *, page: Page | None = None, gpus: int = 8, links: int = 18,
    pids: Sequence[int] = (),
) -> Mapping[str, str]:  # fmt: skip
    """Return the variables that give a process the library, as its driver."""
    found = {
        "LD_LIBRARY_PATH": str(folder),
        "FAKE_NVML_GPUS": str(gpus),
        "FAKE_NVML_LINKS": str(links),
    }
    if page is not None:
        found["FAKE_NVML_PAGE"] = str(page.path)
    if pids:
        found["FAKE_NVML_PIDS"] = ",".join(map(str, pids))
    return found
