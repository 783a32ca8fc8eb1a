"""Every error a person can act on ends a command with the code that is documented for it."""

import inspect

import pytest

from stoker.core import errors
from stoker.core.errors import ExitCode, StokerError

CODES = {
    "StokerError": 1,
    "BadInput": 2,
    "Missing": 4,
    "StoreError": 7,
    "StoreCorrupt": 7,
    "StoreTooNew": 7,
    "StoreFull": 7,
    "InUse": 8,
}


@pytest.mark.parametrize("name", CODES)
def test_exit_code(name: str) -> None:
    assert getattr(errors, name)("what").exit_code == CODES[name]


def test_tree_of_errors_is_the_one_in_the_docstring() -> None:
    classes = {
        name
        for name, thing in vars(errors).items()
        if inspect.isclass(thing) and issubclass(thing, StokerError)
    }
    assert classes == CODES.keys()
    assert errors.__doc__ is not None
    assert classes <= set(errors.__doc__.replace("─", " ").split())


def test_exit_codes_are_told_apart() -> None:
    assert [code.value for code in ExitCode] == list(range(10))
    assert (ExitCode.REFUSED, ExitCode.UNREACHABLE, ExitCode.NOT_FOUND) == (3, 5, 6)


def test_text_of_an_error_is_what_was_said() -> None:
    assert str(errors.BadInput("size: 'x' is not a size")) == "size: 'x' is not a size"
