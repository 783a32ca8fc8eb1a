"""What has to hold of what a node tells: at the moment of a frame, and of what is shown of it.

As in `stoker.testing.moments` each docstring is the promise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stoker.aggregator.fleet import INTERVALS_FRESH
from stoker.aggregator.model import GpuSample
from stoker.testing.broken import Broken
from stoker.testing.machine import DRIFT_RATIO_MAX
from stoker.testing.moments import TOLERANCE_SECONDS


def nothing_shown_is_old(
    node: str,
    shown: Mapping[str, float],
    interval_seconds: float,
    now: float,
    travel_seconds: float,
) -> None:
    """A value of a GPU that the aggregator shows to clients was truly read within three intervals,
    give or take the time of the fastest message of its stream.
    """
    for what, read_at in shown.items():
        drift = DRIFT_RATIO_MAX * (now - read_at)
        late_seconds = now - read_at - drift - travel_seconds - TOLERANCE_SECONDS
        if late_seconds > INTERVALS_FRESH * interval_seconds:
            raise Broken(
                nothing_shown_is_old,
                node=node,
                what=what,
                read_at=read_at,
                interval_seconds=interval_seconds,
                travel_seconds=travel_seconds,
            )


def samples_are_not_older_than_they_claim(
    node: str,
    samples: Mapping[str, GpuSample],
    virtual: Callable[[float], float],
    now: float,
    travel_seconds: float,
) -> None:
    """The time that the aggregator gives a sample is later than the true one by no more than the
    fastest message of the last minute took, whatever the wall clocks of the hosts show.
    """
    for uuid, sample in samples.items():
        if sample.energy_joules is None:
            continue
        ahead = virtual(sample.at) - sample.energy_joules
        # Over the sample's age the two hosts' clocks drift apart.
        drift = DRIFT_RATIO_MAX * (now - sample.energy_joules)
        if ahead > travel_seconds + drift + TOLERANCE_SECONDS:
            raise Broken(
                samples_are_not_older_than_they_claim,
                node=node,
                gpu=uuid,
                claimed_at=virtual(sample.at),
                taken_at=sample.energy_joules,
                travel_seconds=travel_seconds,
            )


def frames_are_taken_in_once_and_in_order(node: str, sequence: int, taken: int) -> None:
    """Within one incarnation the numbers of the frames that one aggregator takes in rise."""
    if sequence <= taken:
        raise Broken(
            frames_are_taken_in_once_and_in_order, node=node, sequence=sequence, taken=taken
        )


def what_is_taken_in_shows(node: str, sequence: int, taken: int) -> None:
    """A frame that is counted as taken in is so in the tables: what is left aside is not
    acknowledged.
    """
    if sequence != taken:
        raise Broken(what_is_taken_in_shows, node=node, sequence=sequence, taken=taken)


def what_was_acknowledged_is_not_sent_again(
    node: str, sequence: int, made_at: float, acked: int, acked_at: float
) -> None:
    """A frame is not taken in after its agent has heard that it was taken in; a number may come
    again only on a frame that was made later (the disk could not reserve numbers, and both sides
    have restarted).
    """
    if sequence <= acked and made_at <= acked_at:
        raise Broken(
            what_was_acknowledged_is_not_sent_again,
            node=node,
            sequence=sequence,
            made_at=made_at,
            acked=acked,
            acked_at=acked_at,
        )


@dataclass(frozen=True, slots=True)
class Told:
    """The GPUs of an inventory: those that can be read, and how many beside them there are."""

    gpus: frozenset[str]
    missing: int


def acknowledged_frames_are_durable(
    node: str, acked: int, told: Told, known: frozenset[str]
) -> None:
    """When a frame is acknowledged, the GPUs that the node told of last are in the ledger, and none
    beside them but such as are missing: it is never needed again.
    """
    if not told.gpus <= known or len(known - told.gpus) > told.missing:
        raise Broken(
            acknowledged_frames_are_durable, node=node, acked=acked, told=told, in_the_ledger=known
        )
