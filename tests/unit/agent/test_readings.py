"""What crosses from driver host to agent arrives as it was sent; errors keep their kind."""

import builtins
import collections.abc
import dataclasses
import re
import typing
from enum import Enum
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.agent import driver
from stoker.agent.driver import ERRORS_BY_KIND, DriverError, Suspect, UnknownDriverError
from stoker.agent.driver_host.frames import (
    FRAME_BYTES_MAX,
    INVENTORY,
    LENGTH,
    PROCESSES,
    READINGS,
    REPLIES,
    REQUESTS,
    Failure,
    NotePage,
    RealDriver,
    Reply,
    Request,
    SimulatedDriver,
    Verb,
    arguments_of,
    encode_body,
    frame_length,
    from_failure,
    pack,
    to_failure,
)
from stoker.agent.driver_host.watch import Note
from stoker.agent.facts import Fact, Rate
from stoker.agent.readings import (
    WHOLE_GPU,
    GpuFault,
    GpuReading,
    GpuSample,
    Inventory,
    ProcessesReading,
    ReadFailure,
)
from stoker.core.errors import ExitCode, StokerError

# MessagePack has 64-bit integers; a driver has no larger ones.
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=20),
    bool: st.booleans(),
    type(None): st.none(),
}


def values_of(type_: Any) -> st.SearchStrategy[Any]:
    """Any value that a field of this type may have."""
    if type_ in SCALARS:
        return SCALARS[type_]
    if isinstance(type_, type) and issubclass(type_, Enum):
        return st.sampled_from(type_)
    if isinstance(type_, type) and dataclasses.is_dataclass(type_):
        hints = typing.get_type_hints(type_)
        return st.builds(type_, **{name: values_of(hint) for name, hint in hints.items()})
    parts = typing.get_args(type_)
    match typing.get_origin(type_):
        case typing.Literal:
            return st.sampled_from(parts)
        case builtins.tuple:
            return st.lists(values_of(parts[0]), max_size=3).map(tuple)
        case collections.abc.Mapping:
            return st.dictionaries(*map(values_of, parts), max_size=3)
        case _:
            return st.one_of(*(values_of(part) for part in parts))


@pytest.mark.parametrize(
    ("type_", "answers"),
    [
        (Inventory, INVENTORY),
        (tuple[GpuReading, ...], READINGS),
        (ProcessesReading, PROCESSES),
    ],
)
@settings(deadline=None)
@given(data=st.data())
def test_an_answer_arrives_as_it_was_sent(
    type_: Any, answers: msgspec.msgpack.Decoder[Any], data: st.DataObject
) -> None:
    sent = data.draw(values_of(type_))
    frame = pack(Reply(7, body=encode_body(sent)))
    assert frame_length(frame) == len(frame) - LENGTH.size
    reply = REPLIES.decode(frame[LENGTH.size :])
    assert (reply.number, reply.failure) == (7, None)
    assert answers.decode(reply.body) == sent


def test_a_question_arrives_with_its_suspects() -> None:
    suspects = (Suspect(2, "GPU-a", 8, "hung"), Suspect(3, None, None, ""))
    asked = Request(Verb.INVENTORY, 3, suspects, (Rate.FAST, Rate.SLOW), profiling=False)
    frame = pack(asked)
    assert REQUESTS.decode(frame[LENGTH.size :]) == asked


def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="more than"):
        frame_length(LENGTH.pack(FRAME_BYTES_MAX + 1))


@pytest.mark.parametrize("value", [GpuReading("GPU-a", 1.0), GpuFault(0, None, "gpu_lost", "x")])
def test_readings_are_values(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, 0)


def test_a_gpu_is_lost_when_it_failed_as_a_whole() -> None:
    lost = ReadFailure(WHOLE_GPU, "gpu_lost", "gone")
    one_fact = ReadFailure(Fact.POWER_WATTS, "unknown", "x")
    assert GpuReading("GPU-a", 1.0, failures=(one_fact, lost)).is_lost
    assert not GpuReading("GPU-a", 1.0, failures=(one_fact,)).is_lost


def test_a_sample_is_empty_until_something_was_read() -> None:
    assert GpuSample("GPU-a", 1.0).is_empty
    assert not GpuSample("GPU-a", 1.0, utilization_ratio=0.0).is_empty


def test_the_tree_in_the_docstring_is_the_tree_of_the_errors() -> None:
    assert driver.__doc__ is not None
    drawn = set(re.findall(r"^ *[│├└─ ]*(\w+)  ", driver.__doc__, re.MULTILINE))
    assert drawn == {error.__name__ for error in ERRORS_BY_KIND.values()}


@pytest.mark.parametrize("error", ERRORS_BY_KIND.values(), ids=lambda error: error.__name__)
def test_every_error_crosses_as_itself(error: type[DriverError]) -> None:
    sent = error("what was found", function="nvmlX", gpu="GPU-a")
    frame = pack(Reply(1, failure=to_failure(sent)))
    failure = REPLIES.decode(frame[LENGTH.size :]).failure
    assert failure is not None
    arrived = from_failure(failure)
    assert type(arrived) is error
    assert str(arrived) == str(sent) == "GPU-a: nvmlX: what was found"
    assert (arrived.function, arrived.gpu, arrived.found) == ("nvmlX", "GPU-a", "what was found")
    assert isinstance(arrived, StokerError)


def test_kinds_are_unique() -> None:
    errors = {
        e for e in vars(driver).values() if isinstance(e, type) and issubclass(e, DriverError)
    }
    assert len(ERRORS_BY_KIND) == len(errors)
    assert set(ERRORS_BY_KIND.values()) == errors


def test_a_kind_of_a_newer_host_is_unknown_and_told_all_the_same() -> None:
    arrived = from_failure(Failure("melted", "too hot", "nvmlX", None))
    assert type(arrived) is UnknownDriverError
    assert str(arrived) == "nvmlX: too hot"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("library_missing", ExitCode.MISSING),
        ("driver_not_loaded", ExitCode.MISSING),
        ("gpu_lost", ExitCode.FAILED),
        ("driver_timeout", ExitCode.FAILED),
    ],
)
def test_a_missing_driver_has_an_exit_code_of_its_own(kind: str, code: ExitCode) -> None:
    assert ERRORS_BY_KIND[kind].exit_code is code


def test_the_note_page_shows_the_other_side_the_call_being_made() -> None:
    fd = NotePage.create()
    host, agent = NotePage(fd), NotePage(fd)
    assert agent.read() is None
    host.write(3, "nvmlDeviceGetPowerUsage")
    assert agent.read() == Note(3, "nvmlDeviceGetPowerUsage", 1)
    host.write(3, "nvmlDeviceGetPowerUsage")
    assert agent.read() == Note(3, "nvmlDeviceGetPowerUsage", 2), "it is another call"
    host.write(-1, "nvmlInit")
    assert agent.read() == Note(None, "nvmlInit", 3)
    host.clear()
    assert agent.read() is None
    host.close()
    agent.close()


def test_sources_as_flags_of_the_driver_host() -> None:
    assert arguments_of(RealDriver()) == []
    assert arguments_of(SimulatedDriver(("1xT4", "2xL40S"), "a b", 7, "/tmp/x.json")) == [
        "--simulate=1xT4",
        "--simulate=2xL40S",
        "--node=a b",
        "--seed=7",
        "--scenario=/tmp/x.json",
    ]
