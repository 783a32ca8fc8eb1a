"""A mapping laid over another: a batch of decisions changes it, and that below stays untouched."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Overlay(MutableMapping[K, V]):
    """Reads fall through to `base`; writes and deletions stay here.

    It goes through what is unchanged in `base` first, then through what was written here.
    """

    __slots__ = ("_base", "_changed", "_deleted")

    def __init__(self, base: Mapping[K, V]) -> None:
        self._base = base
        self._changed: dict[K, V] = {}
        self._deleted: set[K] = set()

    def __getitem__(self, key: K) -> V:
        if key in self._changed:
            return self._changed[key]
        if key in self._deleted:
            raise KeyError(key)
        return self._base[key]

    def __setitem__(self, key: K, value: V) -> None:
        self._deleted.discard(key)
        self._changed[key] = value

    def __delitem__(self, key: K) -> None:
        if key not in self:
            raise KeyError(key)
        self._changed.pop(key, None)
        if key in self._base:
            self._deleted.add(key)

    def __contains__(self, key: object) -> bool:
        if key in self._changed:
            return True
        return key not in self._deleted and key in self._base

    def __iter__(self) -> Iterator[K]:
        for key in self._base:
            if key not in self._deleted and key not in self._changed:
                yield key
        yield from self._changed

    def __len__(self) -> int:
        added = sum(1 for key in self._changed if key not in self._base)
        return len(self._base) - len(self._deleted) + added
