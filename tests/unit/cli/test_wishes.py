"""What options say is asked for, and which say nothing that could be meant."""

import pytest

from stoker.cli.wishes import wish_of
from stoker.core.errors import BadInput


def test_only_what_was_said_is_wished_for() -> None:
    said = {"gpus": 2, "models": ("H100",), "node_labels": ("rack=a",), "pool": None, "mig": None}
    assert wish_of(said) == {"gpus": 2, "model": ("H100",), "node_labels": {"rack": "a"}}


@pytest.mark.parametrize(
    ("said", "flag"),
    [
        ({"pool": ""}, "--pool"),
        ({"node": ""}, "--node"),
        ({"mig": ""}, "--mig"),
        ({"same_label": ""}, "--same"),
        ({"prefer_gpu": ""}, "--prefer-gpu"),
        ({"models": ("H100", "")}, "--model"),
        ({"node_labels": ("",)}, "--node-label"),
    ],
)
def test_an_empty_value_does_not_mean_anything(said: dict[str, object], flag: str) -> None:
    """A variable that a shell does not know must not turn one node into any node."""
    with pytest.raises(BadInput, match=f"^{flag}: wanted a value, found none$"):
        wish_of(said)


@pytest.mark.parametrize("label", ["rack", "=a"])
def test_label_has_a_key_and_a_value(label: str) -> None:
    with pytest.raises(BadInput, match="^--node-label: wanted KEY=VALUE, found "):
        wish_of({"node_labels": (label,)})
