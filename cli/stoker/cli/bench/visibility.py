"""How long it takes until a client is shown a frame, estimated from a few looks at the whole fleet.

A look tells of every frame sent before it how old it was and whether it was shown already, never
how long it took: current status data. The distribution that fits such data best is the isotonic
regression of "shown" on age, found by pooling neighbours that contradict "the older, the likelier
shown". Its percentiles are as fine as the ages of all frames in all looks lie close together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

# Of each node at each look: older frames were shown, or the fleet is far behind.
_FRAMES_LOOKED_AT = 3


@dataclass(frozen=True, slots=True)
class Look:
    """What a client was shown."""

    asked_at: float  # monotonic, before it asked
    sampled_at: Mapping[str, float | None]  # node -> when its newest sample was taken (Unix)


@dataclass(frozen=True, slots=True)
class Seen:
    """A frame at a look."""

    age_seconds: float  # since it was sent
    is_shown: bool


def frames_seen(
    look: Look, sends: Mapping[str, Sequence[tuple[float, float]]], interval_seconds: float
) -> Iterator[Seen]:
    """Yield the newest frames of every node; `sends` are (sent, sampled), as reports list them."""
    for node, sent in sends.items():
        shown = look.sampled_at.get(node)
        before = [each for each in sent if each[0] <= look.asked_at]
        for sent_at, sampled_at in before[-_FRAMES_LOOKED_AT:]:
            # The aggregator works out on its own clock when a sample was taken; half an interval
            # tells it from the one before.
            is_shown = shown is not None and shown > sampled_at - interval_seconds / 2
            yield Seen(look.asked_at - sent_at, is_shown)


def seconds_until_shown(seen: Sequence[Seen], ratio: float) -> float | None:
    """Return the age at which that share of the frames is shown; None when it never is."""
    # Blocks of neighbours: the age at which one begins, how many are shown in it, how many it has.
    blocks: list[tuple[float, int, int]] = []
    for each in sorted(seen, key=lambda each: (each.age_seconds, each.is_shown)):
        begins_at, shown, count = each.age_seconds, int(each.is_shown), 1
        # Not rising: what is younger is shown at least as often, so both are taken together.
        while blocks and blocks[-1][1] * count >= shown * blocks[-1][2]:
            begins_at, more_shown, more = blocks.pop()
            shown, count = shown + more_shown, count + more
        blocks.append((begins_at, shown, count))
    return next((at for at, shown, count in blocks if shown >= ratio * count), None)
