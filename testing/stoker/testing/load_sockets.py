"""What the kernel counts on this process's TCP connections: how many there are, and their bytes."""

import os
import socket
import struct
from dataclasses import dataclass

# struct tcp_info of linux/tcp.h: tcpi_bytes_acked (sent, and acknowledged by the peer's kernel) and
# tcpi_bytes_received stand at this offset since Linux 4.2.
_BYTES_ACKED_RECEIVED = struct.Struct("=120xQQ")


@dataclass(frozen=True, slots=True)
class Traffic:
    """The connections to one target; bytes are payload of TCP, both ways."""

    connections: int
    stream_bytes: int


def count_traffic(target: str) -> Traffic:
    """Return what this process's connections to `target` (host:port) have carried so far."""
    connections = stream_bytes = 0
    for name in os.listdir("/proc/self/fd"):
        counted = _counted(int(name), target)
        if counted is not None:
            connections += 1
            stream_bytes += counted
    return Traffic(connections, stream_bytes)


def _counted(fd: int, target: str) -> int | None:
    """Return the bytes of that connection; None: the descriptor is no connection to `target`."""
    try:
        # A duplicate, so that closing it leaves the connection to its owner.
        with socket.socket(fileno=os.dup(fd)) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            host, port = connection.getpeername()[:2]
            if f"{host.removeprefix('::ffff:')}:{port}" != target:
                return None
            size = _BYTES_ACKED_RECEIVED.size
            told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    except OSError:  # it is no socket, it listens, or it was closed meanwhile
        return None
    counted: tuple[int, int] = _BYTES_ACKED_RECEIVED.unpack(told)
    return sum(counted)
