"""Requirements on addresses, and on environment variables set for a while."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.client import InvalidRequest
from stoker.client.environment import (
    ContextVariables,
    Layers,
    default_holder,
    host_boot_id,
    resolve_address,
)

ADDRESSES = {
    "10.0.0.1:7000": "10.0.0.1:7000",
    "head.cluster": "head.cluster:7070",
    "127.0.0.1": "127.0.0.1:7070",
    "[::1]:7000": "[::1]:7000",
    "[::1]": "[::1]:7070",
}


@pytest.mark.parametrize("text", ADDRESSES)
def test_addresses_get_a_port(text: str) -> None:
    assert resolve_address(text) == ADDRESSES[text]


@pytest.mark.parametrize(
    "text",
    ["", ":7070", "head:0", "head:65536", "head:x", "http://head:80", "a b:1", "::1", "[::1"],
)
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"address: .*{re.escape(text)}"):
        resolve_address(text)


def test_port_zero_cannot_be_dialled() -> None:
    with pytest.raises(InvalidRequest, match="address: head:0 has no port"):
        resolve_address("head:0")


def test_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOKER_ADDRESS", raising=False)
    assert resolve_address(None) == "127.0.0.1:7070"
    monkeypatch.setenv("STOKER_ADDRESS", "head:1")
    assert resolve_address(None) == "head:1"
    assert resolve_address("other:2") == "other:2"
    monkeypatch.setenv("STOKER_ADDRESS", "a:b:c")
    with pytest.raises(InvalidRequest, match="STOKER_ADDRESS"):
        resolve_address(None)


def test_host_is_named_by_its_boot() -> None:
    assert host_boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_holder_is_user_at_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    monkeypatch.setattr("socket.gethostname", lambda: "gpu7")
    assert default_holder() == "ada@gpu7"


def test_user_without_a_name_goes_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.setattr("os.getuid", lambda: 4711)
    monkeypatch.setattr("socket.gethostname", lambda: "gpu7")
    assert default_holder() == "4711@gpu7"


def test_variables_are_set_and_given_back() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1"}
    layers = Layers(environ)
    layer = layers.push({"CUDA_VISIBLE_DEVICES": "GPU-a", "STOKER_NODE": "n1"})
    assert environ == {"CUDA_VISIBLE_DEVICES": "GPU-a", "STOKER_NODE": "n1"}
    layers.pop(layer)
    assert environ == {"CUDA_VISIBLE_DEVICES": "0,1"}


def test_inner_layer_wins_whichever_ends_first() -> None:
    environ: dict[str, str] = {}
    layers = Layers(environ)
    outer = layers.push({"D": "outer"})
    inner = layers.push({"D": "inner"})
    layers.pop(outer)
    assert environ == {"D": "inner"}
    layers.pop(inner)
    assert environ == {}


def test_a_replaced_layer_stays_below_what_was_set_after_it() -> None:
    environ = {"D": "ours", "E": "ours"}
    layers = Layers(environ)
    outer = ContextVariables(layers, {"D": "outer", "E": "outer"})
    inner = layers.push({"D": "inner"})
    outer.replace({"D": "moved", "F": "moved"})
    assert environ == {"D": "inner", "E": "ours", "F": "moved"}
    layers.pop(inner)
    assert environ == {"D": "moved", "E": "ours", "F": "moved"}
    outer.end()
    assert environ == {"D": "ours", "E": "ours"}


names = st.sampled_from(["A", "B", "C"])
variables = st.dictionaries(names, st.sampled_from(["1", "2"]))


@given(variables, st.lists(variables, max_size=5), st.data())
def test_any_order_of_ends_restores_everything(
    before: dict[str, str], pushed: list[dict[str, str]], data: st.DataObject
) -> None:
    environ = dict(before)
    layers = Layers(environ)
    alive = [layers.push(each) for each in pushed]
    while alive:
        place = data.draw(st.integers(0, len(alive) - 1))
        if data.draw(st.booleans()):
            alive[place] = layers.replace(alive[place], data.draw(variables))
        else:
            layers.pop(alive.pop(place))
        for name in {each for layer in alive for each in layer}:
            assert environ[name] == [layer[name] for layer in alive if name in layer][-1]
    assert environ == before
