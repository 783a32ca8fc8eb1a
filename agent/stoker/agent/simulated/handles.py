"""Handles of instances, and the memory that a caller of NVML brings for an answer.

nvidia-ml-py passes pointers on as it gets them: a list goes into an array of the caller's, its
length into a number of the caller's. A handle is a pointer that nobody looks behind; here its
address itself says which card and which instance it leads to, so handles need no table, and one of
an instance that is gone leads nowhere.
"""

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from stoker.agent.simulated.library import NVML, error
from stoker.agent.simulated.partitions import NUMBER_BITS

# ctypes tells the type checker nothing of types that are known only at run time.
_cast: Any = ctypes.cast
_pointer_to: Any = ctypes.POINTER
_KIND_BITS = 4
_CARD_SHIFT = _KIND_BITS + NUMBER_BITS


class Kind(IntEnum):
    """What a handle leads to; none is zero, as no handle is NULL."""

    GPU_INSTANCE = 1
    COMPUTE_INSTANCE = 2


_TYPES: dict[Kind, Any] = {
    Kind.GPU_INSTANCE: NVML.c_nvmlGpuInstance_t,
    Kind.COMPUTE_INSTANCE: NVML.c_nvmlComputeInstance_t,
}


def make_handle(kind: Kind, card_index: int, number: int) -> Any:
    """Return the handle of the instance of this number."""
    address = (card_index + 1) << _CARD_SHIFT | number << _KIND_BITS | kind
    return ctypes.cast(address, _TYPES[kind])


def parse_handle(kind: Kind, handle: Any) -> tuple[int, int] | None:
    """Return the card's index and the instance's number; None for what is no such handle."""
    if not isinstance(handle, _TYPES[kind]):
        return None
    address = ctypes.cast(handle, ctypes.c_void_p).value or 0
    if address & (1 << _KIND_BITS) - 1 != kind:
        return None
    return (address >> _CARD_SHIFT) - 1, address >> _KIND_BITS & (1 << NUMBER_BITS) - 1


def write_list(array: Any, count: Any, items: Sequence[Any], of: Any, *, may_be_null: bool) -> None:
    """Write items into the caller's array and their count into the caller's number.

    Raises INVALID_ARGUMENT where there is no such memory.
    """
    numbers = _at(count, ctypes.c_uint)
    if array is None:
        if not may_be_null:
            raise error("INVALID_ARGUMENT")
    else:
        places = _at(array, of)
        for place, item in enumerate(items):
            places[place] = item
    numbers[0] = len(items)


def read_placement(placement: Any, of: Any) -> tuple[int, int]:
    """Return start and size of a place that is handed over by its address.

    Raises INVALID_ARGUMENT for one that is not: a real driver would take it for an address.
    """
    place = _at(placement, of)[0]
    return place.start, place.size


def _at(memory: Any, of: Any) -> Any:
    """Return what an array, a pointer or `byref` leads to."""
    if memory is None or isinstance(memory, ctypes.Structure):
        raise error("INVALID_ARGUMENT")
    try:
        return _cast(memory, _pointer_to(of))
    except ctypes.ArgumentError as wrong:
        raise error("INVALID_ARGUMENT") from wrong
