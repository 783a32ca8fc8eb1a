"""Where to listen and whom to dial: `HOST:PORT` as text and as a value."""

import ipaddress
import re
from dataclasses import dataclass

from stoker.core.errors import BadInput, shown

_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:/\s]+)):(\d{1,5})", re.ASCII)
PORT_MAX = 65535


@dataclass(frozen=True, slots=True)
class Address:
    """A host by name or number, and a TCP port; port 0 leaves the choice to the system."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine can be at the other end."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(text: str, what: str = "address") -> Address:
    """Return the address that `text` names, such as `10.0.0.1:7070`, `[::1]:7070` or `head:7070`.

    Raises BadInput, naming `what`.
    """
    found = _ADDRESS.fullmatch(text.strip())
    if found is None or int(found[3]) > PORT_MAX:
        raise BadInput(f"{what}: wanted HOST:PORT, found {shown(text)}")
    return Address(found[1] or found[2], int(found[3]))
