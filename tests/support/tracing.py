"""What strace saw of a daemon's fsyncs: when each began and when it was done, on the wall clock."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# -y names the file behind the descriptor; --seccomp-bpf stops the daemon for no other call.
TRACER = ("strace", "-f", "-y", "-ttt", "-T", "--seccomp-bpf", "-e", "trace=fsync,fdatasync")

_BEGUN = re.compile(
    r"(?P<thread>\d+) +(?P<at>\d+\.\d+) (?P<call>f(?:data)?sync)\(\d+<(?P<path>[^>]*)>"
    r"(?:\) += (?P<result>-?\d+).*<(?P<seconds>\d+\.\d+)>| <unfinished \.\.\.>)"
)
_RESUMED = re.compile(
    r"(?P<thread>\d+) +(?P<at>\d+\.\d+) <\.\.\. (?P<call>f(?:data)?sync) resumed>\)"
    r" += (?P<result>-?\d+).*<(?P<seconds>\d+\.\d+)>"
)


@dataclass(frozen=True, slots=True)
class Sync:
    """One fsync or fdatasync that succeeded; times are Unix seconds, those of `time.time()`."""

    path: str
    began_at: float
    done_at: float


def traced(command: Iterable[str], into: Path) -> list[str]:
    """Return the command that runs `command` and writes what it syncs to `into`."""
    return [*TRACER, "-o", str(into), *command]


def parse_syncs(text: str) -> Iterator[Sync]:
    """Yield the syncs that strace reported, in the order in which they were done."""
    begun: dict[str, tuple[str, float]] = {}  # by thread
    for line in text.splitlines():
        if found := _BEGUN.match(line):
            thread, at, path = found["thread"], float(found["at"]), found["path"]
            if found["result"] is None:
                begun[thread] = (path, at)
            elif found["result"] == "0":
                yield Sync(path, at, at + float(found["seconds"]))
        elif (found := _RESUMED.match(line)) and found["thread"] in begun:
            path, at = begun.pop(found["thread"])
            if found["result"] == "0":
                yield Sync(path, at, at + float(found["seconds"]))
