"""Whether a port can be listened on, and which process has it when not."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from stoker.core.addresses import Address
from stoker.core.errors import BadInput, InUse

_LISTENING = "0A"  # the state's number in /proc/net/tcp


def check_free(address: Address, what: str) -> None:
    """Raise InUse when something listens there already, BadInput when the address is not ours."""
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise BadInput(f"{what}: {address}: {error.strerror}") from error
    for family, kind, protocol, _, socket_address in found:
        with contextlib.closing(socket.socket(family, kind, protocol)) as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                attempt.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                attempt.bind(socket_address)
                attempt.listen(1)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise in_use(address, what) from error
                raise BadInput(f"{what}: {address}: {error.strerror}") from error


def in_use(address: Address, what: str, proc: Path = Path("/proc")) -> InUse:
    """Return the error that names the port and, where it can be seen, its holder."""
    holder = next(holders(address.port, proc), "another process")
    return InUse(f"{what}: port {address.port} on {address.host} is in use by {holder}")


def holders(port: int, proc: Path) -> Iterator[str]:
    """Yield the processes that listen on `port`, those that this user may look into."""
    inodes: set[str] = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            inodes |= listening_inodes((proc / "net" / table).read_text(encoding="ascii"), port)
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in sorted(proc.glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):  # not ours to look into, or gone meanwhile
            if any(os.readlink(link) in wanted for link in (process / "fd").iterdir()):
                name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
                yield f"{name} (PID {process.name})"


def listening_inodes(table: str, port: int) -> set[str]:
    """Return the inodes of the sockets that listen on `port`, from the text of /proc/net/tcp."""
    rows = [line.split() for line in table.splitlines()[1:]]
    return {
        row[9]
        for row in rows
        if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port
    }
