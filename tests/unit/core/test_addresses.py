"""HOST:PORT as text."""

import pytest

from stoker.core.addresses import Address, parse_address
from stoker.core.errors import BadInput


@pytest.mark.parametrize(
    ("text", "address", "is_loopback"),
    [
        ("127.0.0.1:7070", Address("127.0.0.1", 7070), True),
        ("127.8.9.10:0", Address("127.8.9.10", 0), True),
        ("localhost:7070", Address("localhost", 7070), True),
        ("[::1]:7070", Address("::1", 7070), True),
        ("0.0.0.0:7070", Address("0.0.0.0", 7070), False),
        ("[::]:7070", Address("::", 7070), False),
        ("10.1.2.3:65535", Address("10.1.2.3", 65535), False),
        ("head.cluster:7070", Address("head.cluster", 7070), False),
        ("localhost.evil.example:1", Address("localhost.evil.example", 1), False),
    ],
)
def test_addresses(text: str, address: Address, is_loopback: bool) -> None:
    assert parse_address(f" {text}\n") == address
    assert str(address) == text
    assert address.is_loopback is is_loopback


@pytest.mark.parametrize(
    "text", ["", "head", ":7070", "head:", "head:x", "head:65536", "::1:7070", "[::1]", "a b:1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(BadInput, match=r"listen: wanted HOST:PORT, found '"):
        parse_address(text, "listen")
