"""Requirements on requests: what callers' words mean, and which of them are refused at once."""

import pytest

from stoker.client import InvalidRequest, Request, Wish
from stoker.client.requesting import as_seconds, build_request
from stoker.core.errors import ExitCode

GIB = 2**30


def built(wish: Wish) -> Request:
    return build_request(wish, holder="me@here", ttl_seconds=60.0)


MEANINGS: dict[str, tuple[Wish, Request]] = {
    "nothing said is one GPU": ({}, Request(1, "me@here", 60.0)),
    "memory is a share of one GPU": (
        {"memory": "20GiB"},
        Request(1, "me@here", 60.0, memory_bytes=20 * GIB),
    ),
    "memory in bytes": ({"memory": 5}, Request(1, "me@here", 60.0, memory_bytes=5)),
    "several GPUs": ({"gpus": 4}, Request(4, "me@here", 60.0)),
    "a TTL in words": ({"ttl": "1h30m"}, Request(1, "me@here", 5400.0)),
    "a TTL in seconds": ({"ttl": 5}, Request(1, "me@here", 5.0)),
    "None is as good as unsaid": (
        {"memory": None, "model": None, "pool": None, "node": None, "holder": None},
        Request(1, "me@here", 60.0),
    ),
    "everything": (
        {
            "gpus": 2,
            "model": "H100",
            "pool": "train",
            "node": "n1",
            "host_boot_id": "b",
            "holder": "ci",
            "labels": {"job": "7"},
            "priority": -3,
        },
        Request(2, "ci", 60.0, None, "H100", "train", "n1", "b", {"job": "7"}, -3),
    ),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_words_mean(name: str) -> None:
    wish, expected = MEANINGS[name]
    assert built(wish) == expected


REFUSED: dict[str, tuple[Wish, str]] = {
    "no GPU": ({"gpus": 0}, "gpus: wanted at least 1, found 0"),
    "a share of several": ({"gpus": 2, "memory": "1GiB"}, "a share of one GPU, found 2"),
    "a share of nothing": ({"memory": 0}, "memory: wanted at least 1 byte, found 0"),
    "not a size": ({"memory": "20G"}, "memory: '20G' is not a size"),
    "not a duration": ({"ttl": "soon"}, "ttl: 'soon' is not a duration"),
    "a negative duration": ({"ttl": -1.0}, "ttl: wanted seconds, zero or more, found -1.0"),
    "a duration that is no number": ({"ttl": float("nan")}, "ttl: wanted seconds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_once(name: str) -> None:
    wish, text = REFUSED[name]
    with pytest.raises(InvalidRequest, match=text) as caught:
        built(wish)
    assert caught.value.exit_code is ExitCode.USAGE


def test_waiting_forever_is_no_duration() -> None:
    with pytest.raises(InvalidRequest, match="wait: wanted seconds"):
        as_seconds(float("inf"), "wait")
