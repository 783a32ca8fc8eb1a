"""The command `stoker-agent-helper`: its options, its socket, and a word when it is ready."""

import fcntl
import os
import pwd
import socket
import stat
import sys
from collections.abc import Sequence

from stoker.agent.helper.server import Server
from stoker.agent.helper.verbs import Paths

HELP = """\
usage: stoker-agent-helper [--user NAME|UID] [--socket PATH] [--proc PATH] [--kmsg PATH]
                           [--pod-resources PATH]

Tells the agent of this host, which runs without root, what only root can read: the kernel's log
as far as it is about GPUs, who has /dev/nvidia* open, which Slurm job and which allocation a
process names in its environment, and which devices the kubelet has given to pods.

  --user NAME|UID       who may ask, beside root
  --socket PATH         where (default: helper.sock in $RUNTIME_DIRECTORY, or in /run/stoker);
                        a socket that systemd hands over is taken instead
  --proc PATH           the host's /proc (default: /proc)
  --kmsg PATH           the kernel's log (default: /dev/kmsg); tests put a pipe here
  --pod-resources PATH  the socket of the kubelet's pod-resources API
                        (default: /var/lib/kubelet/pod-resources/kubelet.sock)
"""
_OPTIONS = ("--user", "--socket", "--proc", "--kmsg", "--pod-resources")
USAGE = 2
FAILED = 1
IN_USE = 8

_FIRST_HANDED_OVER = 3
_WAITING_MAX = 64


class Unusable(Exception):
    """Why the helper cannot run."""

    def __init__(self, reason: str, exit_code: int = FAILED) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the helper until SIGTERM or SIGINT; return the exit code."""
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        if "--help" in options:
            sys.stdout.write(HELP)
            return 0
        uid = _uid(options.get("--user", "0"))
        path = options.get("--socket") or _default_path()
        handed_over = _handed_over()
        listener, lock = (handed_over, None) if handed_over else _listen(path, uid)
        paths = Paths(
            options.get("--proc", "/proc"),
            options.get("--kmsg", "/dev/kmsg"),
            options.get("--pod-resources", "/var/lib/kubelet/pod-resources/kubelet.sock"),
        )
        try:
            server = Server(listener, uid, paths, lock=lock)
            _tell_ready()
            server.serve()
        finally:
            if handed_over is None:
                os.unlink(path)
    except Unusable as error:
        sys.stderr.write(f"stoker-agent-helper: {error}\n")
        return error.exit_code
    return 0


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if word in ("--help", "-h"):
            return {"--help": ""}
        if name not in _OPTIONS:
            raise Unusable(f"no such option: {name}; --help lists them", USAGE)
        value = value if equals else next(words, "")
        if not value:
            raise Unusable(f"{name} wants a value", USAGE)
        options[name] = value
    return options


def _uid(user: str) -> int:
    try:
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise Unusable(f"--user: there is no user {user!r} here", USAGE) from None


def _default_path() -> str:
    folder = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or "/run/stoker"
    return f"{folder}/helper.sock"


def _handed_over() -> socket.socket | None:
    """Return the socket that the service manager listens at for us (sd_listen_fds(3))."""
    is_for_us = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = os.environ.pop("LISTEN_FDS", "0")
    if not is_for_us or count == "0":
        return None
    if count != "1":
        raise Unusable(f"{count} sockets were handed over; one is wanted")
    try:
        listener = socket.socket(fileno=_FIRST_HANDED_OVER)
        is_listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise Unusable(f"what was handed over is no socket: {error.strerror}") from error
    kind = (listener.family, listener.type)
    if kind != (socket.AF_UNIX, socket.SOCK_STREAM) or not is_listening:
        raise Unusable("what was handed over is no Unix stream socket that listens")
    os.set_inheritable(_FIRST_HANDED_OVER, False)
    return listener


def _listen(path: str, uid: int) -> tuple[socket.socket, int]:
    """Listen at `path`, for `uid` alone; return the lock too.

    What a dead helper left there is replaced.
    """
    try:
        _expect_safe_folder(os.path.dirname(os.path.abspath(path)))
        lock = _lock(path)
        _clear(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)  # who may not ask cannot even fill the queue of those who may
        try:
            listener.bind(os.fsencode(path))
        finally:
            os.umask(mask)
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror or error}") from error
    try:
        if uid != os.geteuid():
            os.chown(path, uid, -1, follow_symlinks=False)
        listener.listen(_WAITING_MAX)
    except OSError as error:
        os.unlink(path)
        raise Unusable(f"{path} cannot be given to UID {uid}: {error.strerror}") from error
    return listener, lock


def _expect_safe_folder(folder: str) -> None:
    """Raise Unusable when others than root could put something of theirs in the socket's place."""
    facts = os.stat(folder)
    if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unusable(f"{folder} can be written to by others; the socket wants a folder of root's")


def _lock(path: str) -> int:
    """Return the lock that says that a helper lives at `path`; held until this process ends."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    file = os.open(f"{path}.lock", flags, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Unusable(f"another helper answers at {path}", IN_USE) from None
    return file


def _clear(path: str) -> None:
    """Remove the socket of a dead helper; raises Unusable for anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Unusable(f"{path} is there, and it is no socket; move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # so many wait that one more would have to
            pass
    raise Unusable(f"another program answers at {path}", IN_USE)


def _tell_ready() -> None:
    """Tell the service manager that callers are answered (sd_notify(3))."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    # "@" begins a name in the abstract namespace, which the kernel writes as a zero byte.
    address = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(b"READY=1", address)
        except OSError as error:
            raise Unusable(f"$NOTIFY_SOCKET: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
