"""A small disk for one daemon: a tmpfs in a mount namespace of its own, gone with the process."""

from pathlib import Path

from tests.support.daemons import Daemon

_FILLER = "filler"
# The daemon takes the place of the shell, so its process id is the one that was started.
_SCRIPT = 'mount -t tmpfs -o "size=$1" none "$2" && { [ -z "$3" ] || cat /dev/zero >"$2/$3"; }'


def on_small_disk(folder: Path, size: str, *, is_full: bool = False) -> list[str]:
    """Return what to put before a daemon's command so that `folder` is a disk of that size."""
    folder.mkdir(parents=True)
    script = f'{_SCRIPT} 2>/dev/null; shift 3; exec "$@"'
    filler = _FILLER if is_full else ""
    return [
        *("unshare", "--mount", "--propagation", "private"),
        *("sh", "-c", script, "sh", size, str(folder), filler),
    ]


def fill(daemon: Daemon) -> None:
    """Take all the room that is left on the daemon's disk."""
    with (daemon.seen_data_dir / _FILLER).open("ab", buffering=0) as filler:
        for size in (4096, 1):
            try:
                while True:
                    filler.write(b"\0" * size)
            except OSError:
                continue


def make_room(daemon: Daemon) -> None:
    """Give back what `fill` took."""
    (daemon.seen_data_dir / _FILLER).unlink()
