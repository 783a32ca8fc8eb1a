"""A port that a daemon can be given before it starts, and again after it was killed."""

import errno
import socket
from pathlib import Path
from random import Random

_LOWEST = 20_000
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Return a free TCP port of 127.0.0.1 that the kernel gives to nobody unasked.

    It lies below the ports of outgoing connections: a client that dials a daemon while that is
    down could otherwise be given the daemon's port, and even be connected to itself.
    """
    first_ephemeral = int(_EPHEMERAL.read_text(encoding="ascii").split()[0])
    rng = Random()
    while True:
        port = rng.randrange(_LOWEST, max(_LOWEST + 1_000, first_ephemeral))
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port
