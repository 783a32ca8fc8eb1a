"""Boards, and layouts written as words, for tests of what fits on a GPU."""

from dataclasses import replace

import pytest

from stoker.core.mig.boards import (
    A30_24GB,
    A100_40GB,
    BOARDS,
    H100_80GB,
    RTX_PRO_6000,
)
from stoker.core.mig.geometry import Geometry, Layout, MigProfile, Placed
from stoker.core.mig.layouts import layouts

A30, A100, H100, RTX = (board.geometry for board in (A30_24GB, A100_40GB, H100_80GB, RTX_PRO_6000))
every_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)


def at(geometry: Geometry, *words: str) -> Layout:
    """Return the layout written as "3g.40gb@4" or "3g.40gb@4(2c+1c)", in the order given."""
    found: list[Placed] = []
    for word in words:
        name, _, rest = word.partition("@")
        start, _, parts = rest.rstrip(")").partition("(")
        compute = tuple(int(part.rstrip("c")) for part in parts.split("+") if part)
        found.append(Placed(int(start), profile(geometry, name).memory_slices, name, compute))
    return tuple(found)


def profile(geometry: Geometry, name: str) -> MigProfile:
    found = geometry.profile(name)
    assert found is not None
    return found


def only(geometry: Geometry, constants: set[int]) -> Geometry:
    return replace(
        geometry, profiles=tuple(p for p in geometry.profiles if p.constant in constants)
    )


LAYOUTS = {geometry: tuple(layouts(geometry, plain=False)) for geometry in (A30, A100, RTX)}
