"""What a caller may say: a line of JSON with a verb and what it takes, each strictly checked."""

import json
import re
from collections.abc import Callable

PID_MAX = 1 << 22  # the kernel's own bound
TICKS_MAX = 1 << 63
# As mypy and pyright know it: importing `typing` costs more than all else here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeGuard

# Of IDs and places: a board has dozens, and what is larger is no number of one.
SMALL_MAX = 1 << 10
LIST_MAX = 64

_HEX = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_GPU = re.compile(f"GPU-{_HEX}")
# Drivers before 470 name a MIG device by its GPU and the IDs of its instances.
_MIG_DEVICE = re.compile(f"MIG-{_HEX}|MIG-GPU-{_HEX}/[0-9]{{1,3}}/[0-9]{{1,3}}")
_PROFILE = re.compile("[1-9][0-9]?g\\.[1-9][0-9]{0,4}gb(?:[+-][a-z.]{1,16}){0,3}")

Told = dict[str, object]
Arguments = dict[str, Callable[[object], bool]]


class Refused(Exception):
    """Why a caller is not answered."""


def is_pid(value: object) -> bool:
    """Whether it can be a process."""
    return type(value) is int and 0 < value <= PID_MAX


def is_ticks(value: object) -> bool:
    """Whether it can be when a process began."""
    return type(value) is int and 0 <= value < TICKS_MAX


def is_small(value: object) -> bool:
    """Whether it can be an ID, a place or a size."""
    return type(value) is int and 0 <= value < SMALL_MAX


def are_small(value: object) -> "TypeGuard[list[int]]":
    """Whether they can be IDs."""
    return _is_list(value) and len(value) <= LIST_MAX and all(map(is_small, value))


def _is_list(value: object) -> "TypeGuard[list[object]]":
    return isinstance(value, list)


def is_flag(value: object) -> bool:
    """Whether it is yes or no."""
    return type(value) is bool


def is_signal(value: object) -> bool:
    """Whether it is a signal that ends a process: first "TERM", at last "KILL"."""
    return isinstance(value, str) and value in ("TERM", "KILL")


def is_gpu(value: object) -> bool:
    """Whether it is the UUID of a GPU."""
    return isinstance(value, str) and _GPU.fullmatch(value) is not None


def is_gpu_or_none(value: object) -> bool:
    """Whether it is the UUID of a GPU, or stands for all of them."""
    return value is None or is_gpu(value)


def is_mig_device(value: object) -> bool:
    """Whether it is the UUID of a MIG device, or says that there is none."""
    return isinstance(value, str) and (not value or _MIG_DEVICE.fullmatch(value) is not None)


def is_profile(value: object) -> bool:
    """Whether it is the name of a GPU instance profile."""
    return isinstance(value, str) and _PROFILE.fullmatch(value) is not None


class _Object(dict[str, object]):
    """What JSON calls an object."""


def understood(said: bytes, verbs: dict[str, Arguments]) -> tuple[str, Told]:
    """Return the verb and its arguments, those that the verb has and no other; raises Refused."""
    try:
        wish: object = json.loads(said, object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise Refused("the request is no JSON") from error
    if not isinstance(wish, _Object):
        raise Refused("the request is no JSON object")
    verb = wish.pop("verb", None)
    if not isinstance(verb, str) or verb not in verbs:
        raise Refused(f"no such verb: {_named(verb)}; there are {', '.join(verbs)}")
    arguments = verbs[verb]
    for name in wish.keys() - arguments.keys():
        raise Refused(f"{verb} takes no {_named(name)}")
    for name, is_fit in arguments.items():
        if name not in wish or not is_fit(wish[name]):
            raise Refused(f"{verb}: {name} cannot be {_named(wish.get(name))}")
    return verb, wish


def _named(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
