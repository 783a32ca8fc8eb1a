"""A port in use is named with its holder, where that can be seen."""

import os
import socket
from pathlib import Path

import pytest

from stoker.aggregator.ports import check_free, in_use, listening_inodes
from stoker.core.addresses import Address
from stoker.core.errors import BadInput, InUse

TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1B9E 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1
   1: 00000000:1B9E 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 1
   2: 0100007F:1B9F 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1
   3: 0100007F:1B9E 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 4714 1
"""


def test_listeners_are_told_from_connections_and_other_ports() -> None:
    assert listening_inodes(TABLE, 7070) == {"4711", "4712"}
    assert listening_inodes(TABLE, 7072) == set()
    assert listening_inodes("", 7070) == set()


def test_holder_is_named_by_command_and_pid() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address("127.0.0.1", taken.getsockname()[1])
        name = Path("/proc/self/comm").read_text(encoding="utf-8").strip()
        with pytest.raises(InUse) as caught:
            check_free(address, "listen")
    assert str(caught.value) == (
        f"listen: port {address.port} on 127.0.0.1 is in use by {name} (PID {os.getpid()})"
    )


def test_holder_that_cannot_be_seen_is_somebody(tmp_path: Path) -> None:
    error = in_use(Address("127.0.0.1", 7070), "listen", proc=tmp_path)
    assert str(error) == "listen: port 7070 on 127.0.0.1 is in use by another process"


@pytest.mark.parametrize("host", ["192.0.2.1", "host.invalid"])
def test_address_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(BadInput, match=f"listen: {host}:7070: "):
        check_free(Address(host, 7070), "listen")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_free_port_is_free(host: str) -> None:
    check_free(Address(host, 0), "listen")
