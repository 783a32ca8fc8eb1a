"""The outbox: order, bound, window, and what a merge keeps."""

from hypothesis import given
from hypothesis import strategies as st

from stoker.agent.framing import Outbox
from stoker.agent.model import DriverState, DriverStatus, Frame, HeldAllocation, HoldRefusal
from stoker.agent.partitions import GpuMigStatus

HELD = HeldAllocation("a", ("GPU-0",), None, "ann", 60.0, 0.0)


def telemetry(sequence: int) -> Frame:
    return Frame(sequence, at=float(sequence), monotonic_seconds=0.0)


def telling(sequence: int, *held: HeldAllocation) -> Frame:
    return Frame(sequence, at=float(sequence), monotonic_seconds=0.0, held=held)


def sequences(frames: tuple[Frame, ...]) -> list[int]:
    return [frame.sequence for frame in frames]


def test_frames_go_out_in_order_within_the_window_and_stay_until_acknowledged() -> None:
    outbox = Outbox(frames_max=10, window=3)
    for sequence in range(1, 6):
        outbox.add(telemetry(sequence))
    assert sequences(outbox.take_due()) == [1, 2, 3]
    assert outbox.take_due() == ()
    outbox.acknowledge(2)
    assert sequences(outbox.take_due()) == [4, 5]
    assert (len(outbox), outbox.first_sequence) == (3, 3)
    outbox.acknowledge(5)
    assert (len(outbox), outbox.first_sequence) == (0, None)


def test_a_full_outbox_drops_the_oldest_telemetry() -> None:
    outbox = Outbox(frames_max=4, window=2)
    for frame in (telling(1, HELD), telemetry(2), telemetry(3), telling(4)):
        assert not outbox.add(frame)
    assert outbox.add(telemetry(5))
    assert sequences(outbox.take_due()) == [1, 3]


def test_frames_that_were_sent_are_dropped_too_when_they_are_the_oldest() -> None:
    outbox = Outbox(frames_max=3, window=2)
    for sequence in (1, 2, 3):
        outbox.add(telemetry(sequence))
    outbox.take_due()
    assert outbox.add(telemetry(4))
    assert outbox.first_sequence == 2
    assert sequences(outbox.take_due()) == [3]


def test_without_telemetry_the_oldest_frame_is_merged_into_the_next() -> None:
    outbox = Outbox(frames_max=2, window=1)
    blocked = DriverStatus(DriverState.BLOCKED)
    first = Frame(1, 1.0, 1.0, held=(HELD,), driver=blocked, refusals=(HoldRefusal("x", "no"),))
    second = Frame(2, 2.0, 2.0, held=(), refusals=(HoldRefusal("y", "no"),))
    outbox.add(first)
    outbox.add(second)
    assert outbox.add(telling(3, HELD))
    (merged,) = outbox.take_due()
    assert merged == Frame(
        2,
        2.0,
        2.0,
        held=(),  # the later word counts
        driver=blocked,
        refusals=(HoldRefusal("x", "no"), HoldRefusal("y", "no")),
    )


def test_of_partitions_the_later_word_counts_and_none_is_lost() -> None:
    withheld = (GpuMigStatus("GPU-0", is_withheld=True),)
    outbox = Outbox(frames_max=2, window=1)
    outbox.add(Frame(1, 1.0, 1.0, mig=withheld))
    outbox.add(telling(2, HELD))
    assert outbox.add(telling(3))
    (merged,) = outbox.take_due()
    assert (merged.mig, merged.held) == (withheld, (HELD,))
    later = Frame(4, 4.0, 4.0, mig=())
    assert merged.merged_into(later).mig == ()
    assert not later.is_telemetry_only
    assert later.only_telemetry().mig is None


def test_for_another_stream_only_telemetry_remains_and_everything_is_due_again() -> None:
    outbox = Outbox(frames_max=10, window=2)
    outbox.add(telling(1, HELD))
    outbox.add(telemetry(2))
    outbox.take_due()
    outbox.add(telling(3))
    outbox.rewind()
    assert outbox.take_due() == (telemetry(1), telemetry(2))
    outbox.acknowledge(2)
    assert outbox.take_due() == (telemetry(3),)


@given(st.lists(st.sampled_from(["add", "tell", "take", "ack", "rewind"]), max_size=200))
def test_whatever_happens_numbers_rise_and_bounds_hold(steps: list[str]) -> None:
    outbox = Outbox(frames_max=7, window=3)
    made = acked = 0
    stream: list[int] = []  # what was sent on the stream of the moment
    for step in steps:
        match step:
            case "add" | "tell":
                made += 1
                outbox.add(telemetry(made) if step == "add" else telling(made))
            case "take":
                due = sequences(outbox.take_due())
                assert all(sequence > acked for sequence in due)
                stream += due
            case "ack" if stream:
                acked = stream[-1]
                outbox.acknowledge(acked)
            case _:
                outbox.rewind()
                stream.clear()
        assert len(outbox) <= 7
        assert stream == sorted(set(stream))
    outbox.rewind()
    last = acked
    while due := sequences(outbox.take_due()):
        assert due == sorted(set(due))
        assert due[0] > last
        last = due[-1]
        outbox.acknowledge(last)
    assert last == made
    assert len(outbox) == 0
