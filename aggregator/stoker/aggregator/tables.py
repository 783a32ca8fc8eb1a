"""Tables of names: each key has a sorted list, and none that is empty.

They are thereby the same, whether the events were replayed or a snapshot was restored.
"""

from collections.abc import MutableMapping

Names = MutableMapping[str, tuple[str, ...]]


def add_name(table: Names, key: str, name: str) -> None:
    """Put `name` on the list of `key`."""
    table[key] = tuple(sorted((*table.get(key, ()), name)))


def drop_name(table: Names, key: str, name: str) -> None:
    """Take `name` off the list of `key`."""
    left = tuple(other for other in table.pop(key) if other != name)
    if left:
        table[key] = left
