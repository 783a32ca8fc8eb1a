"""Tells the service manager how a daemon is doing, when there is one (sd_notify(3))."""

import os
import socket
from collections.abc import MutableMapping


class Notifier:
    """Sends one datagram per message to $NOTIFY_SOCKET; says nothing when that is not set."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        # Taken out, so that no child speaks for the daemon.
        address = environ.pop("NOTIFY_SOCKET", "")
        # "@" begins a name in the abstract namespace, which the kernel writes as a zero byte.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def tell(self, **state: str) -> None:
        """Send such as READY="1", WATCHDOG="1" or STATUS="one line"; raises OSError."""
        if not self._address:
            return
        message = "\n".join(f"{name}={value}" for name, value in state.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(message.encode(), self._address)
