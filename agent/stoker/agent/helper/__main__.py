"""The command `stoker-agent-helper`: its options, its socket, and a word when it is ready."""

import fcntl
import os
import pwd
import socket
import stat
import sys
from collections.abc import Sequence

from stoker.agent.helper.files import why_unsafe
from stoker.agent.helper.ground import Ground
from stoker.agent.helper.server import Server
from stoker.agent.helper.verbs import Paths

HELP = """\
usage: stoker-agent-helper [--user NAME|UID] [--socket PATH] [--read-only] [--proc PATH]
                           [--kmsg PATH] [--pod-resources PATH]
                           [--simulate COUNTxMODEL [--node NAME] [--seed NUMBER]
                            [--scenario FILE] [--mig-state FILE]]

Tells the agent of this host, which runs without root, what only root can read: the kernel's log
as far as it is about GPUs, who has /dev/nvidia* open, which Slurm job and which allocation a
process names in its environment, which devices the kubelet has given to pods, and how the GPUs
are partitioned (MIG). And does for it, one call of the driver each, what only root can do: turn
MIG mode on or off, make and destroy an instance at a place that is given, end a process that has
a certain GPU open.

  --user NAME|UID       who may ask, beside root
  --socket PATH         where (default: helper.sock in $RUNTIME_DIRECTORY, or in /run/stoker);
                        a socket that systemd hands over is taken instead
  --read-only           change nothing: no MIG mode, no instance, no process
  --proc PATH           the host's /proc (default: /proc)
  --kmsg PATH           the kernel's log (default: /dev/kmsg); tests put a pipe here
  --pod-resources PATH  the socket of the kubelet's pod-resources API
                        (default: /var/lib/kubelet/pod-resources/kubelet.sock)

For tests and demonstrations: simulated GPUs in place of the real ones, for what is about MIG.
  --simulate COUNTxMODEL   such as 8xH100-80GB
  --node NAME, --seed NUMBER, --scenario FILE   as the agent has them, for the same GPUs
  --mig-state FILE      how they are partitioned (default: simulated-mig.json beside the socket)
"""
_OPTIONS = ("--user", "--socket", "--proc", "--kmsg", "--pod-resources", "--simulate")
_SIMULATED_OPTIONS = ("--node", "--seed", "--scenario", "--mig-state")
_READ_ONLY = "--read-only"
USAGE = 2
FAILED = 1
IN_USE = 8

_FIRST_HANDED_OVER = 3
_WAITING_MAX = 64
_REASON_BYTES_MAX = 4096


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
        folder = _folder(handed_over, path)
        ground = Ground(options.get("--proc", "/proc"), _locks(folder), _standin(options, folder))
        listener, lock = (handed_over, None) if handed_over else _listen(path, uid)
        paths = Paths(
            options.get("--kmsg", "/dev/kmsg"),
            options.get("--pod-resources", "/var/lib/kubelet/pod-resources/kubelet.sock"),
            ground,
            only_reads=_READ_ONLY in options,
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
        if word == _READ_ONLY:
            options[word] = ""
            continue
        if name not in (*_OPTIONS, *_SIMULATED_OPTIONS):
            raise Unusable(f"no such option: {name}; --help lists them", USAGE)
        value = value if equals else next(words, "")
        if not value:
            raise Unusable(f"{name} wants a value", USAGE)
        if name == "--simulate" and name in options:  # a node of mixed cards
            value = f"{options[name]},{value}"
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


def _folder(handed_over: socket.socket | None, path: str) -> str:
    """Return the folder of the socket; an empty one for a socket that has none."""
    if handed_over is not None:
        name: object = handed_over.getsockname()
        path = name if isinstance(name, str) else ""
    return os.path.dirname(os.path.abspath(path)) if path else ""


def _locks(folder: str) -> str:
    """Return the folder if locks are safe in it, and an empty one otherwise: then none are had."""
    try:
        return "" if why_unsafe(folder) else folder
    except OSError:
        return ""


def _standin(options: dict[str, str], folder: str) -> tuple[str, ...]:
    """Return the options of the simulated driver, when there shall be one; raises Unusable."""
    given = {name: options[name] for name in _SIMULATED_OPTIONS if name in options}
    if "--simulate" not in options:
        if given:
            raise Unusable(f"{next(iter(given))} is for simulated GPUs (--simulate)", USAGE)
        return ()
    given.setdefault("--mig-state", f"{folder}/simulated-mig.json")
    given["--simulate"] = options["--simulate"]
    standin = tuple(each for pair in given.items() for each in pair)
    if reason := _objection(standin):
        raise Unusable(reason, USAGE)
    return standin


def _objection(standin: tuple[str, ...]) -> str:
    """Return why there can be no such simulated driver; empty: there can.

    Another process tries, so that this one stays without all that it takes.
    """
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            from stoker.agent.helper.standin import objection  # noqa: PLC0415 (loads a lot)

            os.write(tell, objection(standin).encode()[:_REASON_BYTES_MAX])
            os._exit(0)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            raise
        finally:
            os._exit(FAILED)
    os.close(tell)
    with open(told, "rb") as answer:
        reason = answer.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return reason or f"the simulated driver cannot be tried (status {status})" * bool(status)


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
        if reason := why_unsafe(os.path.dirname(os.path.abspath(path))):
            raise Unusable(f"{reason}; the socket wants a folder of root's")
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
