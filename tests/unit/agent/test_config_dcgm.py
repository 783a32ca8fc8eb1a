"""Where an agent can be told that an nv-hostengine is."""

import re
from pathlib import Path

import pytest

from stoker.agent.config import AgentConfig, DcgmConfig, load, settle
from stoker.core.errors import BadInput


def test_unless_told_there_is_none() -> None:
    settings = load(None, {}, {})
    assert settings.dcgm == DcgmConfig(
        address="", bindings=Path("/usr/share/datacenter-gpu-manager-4/bindings/python3")
    )


@pytest.mark.parametrize(
    "address", ["127.0.0.1:5555", "localhost:5555", "[::1]:5555", "/run/d.sock"]
)
def test_what_is_taken(address: str) -> None:
    told = {"STOKER_AGENT_DCGM_ADDRESS": address, "STOKER_AGENT_DCGM_BINDINGS": "/opt/bindings"}
    assert load(None, told, {}).dcgm == DcgmConfig(address=address, bindings=Path("/opt/bindings"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("5555", "dcgm.address: wanted HOST:PORT, found '5555'"),
        ("localhost", "dcgm.address: wanted HOST:PORT, found 'localhost'"),
        ("run/d.sock", "dcgm.address: wanted HOST:PORT, found 'run/d.sock'"),
        ("127.0.0.1:65536", "dcgm.address: wanted HOST:PORT, found '127.0.0.1:65536'"),
        ("127.0.0.1:0", "dcgm.address: 127.0.0.1:0 has no port to dial"),
        ("gpu-17:5555", "dcgm.address: gpu-17:5555 is beyond this machine"),
        ("/" + "d" * 107, "dcgm.address: wanted a path of at most 107 bytes, found '/ddd"),
    ],
)
def test_what_is_refused(address: str, message: str) -> None:
    config = AgentConfig(dcgm=DcgmConfig(address=address))
    with pytest.raises(BadInput, match=re.escape(message)):
        settle(config, {}, hostname="n")


def test_insecure_allows_one_on_another_machine() -> None:
    config = AgentConfig(dcgm=DcgmConfig(address="gpu-17:5555"), insecure=True)
    assert settle(config, {}, hostname="n").dcgm.address == "gpu-17:5555"
