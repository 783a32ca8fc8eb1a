"""What a client takes from its process and gives to it: address, holder, host, environment."""

import getpass
import os
import socket
import threading
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from stoker.client.errors import InvalidRequest
from stoker.core.addresses import parse_address
from stoker.core.errors import BadInput, Missing

ADDRESS_VARIABLE = "STOKER_ADDRESS"
DEFAULT_ADDRESS = "127.0.0.1:7070"
_DEFAULT_PORT = 7070
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def resolve_address(address: str | None) -> str:
    """Return `address`, else $STOKER_ADDRESS, else 127.0.0.1:7070, always with a port.

    Raises InvalidRequest when the text is no host and port.
    """
    place = "address" if address is not None else ADDRESS_VARIABLE
    text = address if address is not None else os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    # Without a port: a name, an IPv4 address or [IPv6].
    has_port = ":" in text.rpartition("]")[2]
    try:
        found = parse_address(text if has_port else f"{text}:{_DEFAULT_PORT}", place)
    except BadInput as error:
        raise InvalidRequest(str(error)) from error
    if found.port == 0:
        raise InvalidRequest(f"{place}: {found} has no port to dial")
    return str(found)


def default_holder() -> str:
    """Return user@host, the user by number where it has no name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user that nothing names
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def host_boot_id() -> str:
    """Return the kernel's boot id, which names this host as long as it runs; raises Missing."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError as error:
        raise Missing(f"{_BOOT_ID}: cannot be read: {error.strerror}") from error


class Layers:
    """Environment variables set by contexts, restored whatever the order in which these end.

    The layer set last wins; a variable gets its old value back when the last layer with it ends.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._environ = environ
        self._lock = threading.Lock()
        self._layers: list[Mapping[str, str]] = []
        self._originals: dict[str, str | None] = {}  # None: was not set

    def push(self, variables: Mapping[str, str]) -> Mapping[str, str]:
        """Set the variables; returns the layer to give to `pop`."""
        layer = dict(variables)
        with self._lock:
            for name, value in layer.items():
                self._originals.setdefault(name, self._environ.get(name))
                self._environ[name] = value
            self._layers.append(layer)
        return layer

    def pop(self, layer: Mapping[str, str]) -> None:
        """End a layer."""
        with self._lock:
            # By identity: two allocations of one GPU set equal variables.
            self._layers = [each for each in self._layers if each is not layer]
            for name in layer:
                self._show(name)

    def replace(self, layer: Mapping[str, str], variables: Mapping[str, str]) -> Mapping[str, str]:
        """Put variables in the place of a layer, under those that were set after it.

        Returns the layer to give to `pop`.
        """
        fresh = dict(variables)
        with self._lock:
            for name in fresh:
                self._originals.setdefault(name, self._environ.get(name))
            self._layers = [fresh if each is layer else each for each in self._layers]
            for name in {**layer, **fresh}:
                self._show(name)
        return fresh

    def _show(self, name: str) -> None:
        set_to = [each[name] for each in self._layers if name in each]
        value = set_to[-1] if set_to else self._originals.pop(name)
        if value is None:
            self._environ.pop(name, None)
        else:
            self._environ[name] = value


class ContextVariables:
    """The layer of one context, which may change while that lasts."""

    def __init__(self, layers: Layers, variables: Mapping[str, str]) -> None:
        self._layers = layers
        self._layer = layers.push(variables)

    def replace(self, variables: Mapping[str, str]) -> None:
        """Set these instead."""
        self._layer = self._layers.replace(self._layer, variables)

    def end(self) -> None:
        """Restore what was there before."""
        self._layers.pop(self._layer)


# The environment belongs to the process, so its layers do as well.
process_layers = Layers(os.environ)
