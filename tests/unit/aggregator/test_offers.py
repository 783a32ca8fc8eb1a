"""The table of offers as a story: what is open, what is remembered, what is asked again."""

from tests.unit.aggregator.builders import START

from stoker.aggregator.model import Device, Placement
from stoker.aggregator.moves import Move, MoveKind
from stoker.aggregator.offers import LEFT_ALONE_SECONDS, OFFERS_MAX, Offers, OfferState

HERE = Placement("n1", (Device("GPU-1", "H100", 0, 80, exclusive=True),))
THERE = Placement("n2", (Device("GPU-2", "H100", 0, 80, exclusive=True),))


def move(allocation_id: str = "a") -> Move:
    return Move(
        *(allocation_id, (HERE,), (THERE,), MoveKind.DEFRAGMENT, "because", 1000, 4000, 0.0),
        frozenset(("n1",)),
    )


def test_an_offer_is_open_until_it_expires() -> None:
    offers = Offers()
    made = offers.offer("o", move(), (), START, 60.0)
    assert made is not None
    assert (made.key, made.expires_at) == ("move/o", START + 60.0)
    assert offers.open_for("a", START + 59.9) == made == offers.get("o", START + 59.9)
    assert offers.open_for("b", START) is None
    assert offers.open_for("a", START + 60.0) is None
    assert offers.get("o", START + 60.0) is None
    assert offers.not_to_ask(START + 60.0) == frozenset()
    assert offers.offer("p", move(), (), START + 60.0, 60.0) is not None  # nobody said no


def test_an_allocation_has_one_open_offer() -> None:
    offers = Offers()
    offers.offer("o", move(), (), START, 60.0)
    assert offers.not_to_ask(START) == {"a"}
    assert offers.offer("p", move(), (), START + 1, 60.0) is None
    assert offers.get("p", START + 1) is None


def test_what_was_declined_is_left_alone_for_a_while() -> None:
    offers = Offers()
    offers.offer("o", move(), (), START, 60.0)
    offers.answer("o", OfferState.DECLINED, START + 1)
    assert offers.open_for("a", START + 2) is None
    known = offers.get("o", START + 2)
    assert known is not None
    assert known.state is OfferState.DECLINED
    soon = START + LEFT_ALONE_SECONDS
    assert offers.offer("p", move(), (), soon, 60.0) is None
    assert offers.offer("p", move(), (), soon + 1, 60.0) is not None
    assert offers.get("o", soon + 1) is None


def test_what_was_moved_stays_for_a_while() -> None:
    offers = Offers()
    offers.offer("o", move(), (), START, 60.0)
    offers.answer("o", OfferState.ACCEPTED, START + 1, moved_to="b")
    assert offers.not_to_ask(START + 1) == {"a", "b"}
    assert offers.not_to_ask(START + 1 + LEFT_ALONE_SECONDS) == frozenset()
    known = Offers()
    assert known.get("o", START) is None


def test_a_withdrawn_offer_is_gone_and_another_may_come() -> None:
    offers = Offers()
    offers.offer("o", move(), (), START, 60.0)
    offers.withdraw("o")
    offers.withdraw("o")
    assert offers.get("o", START) is None
    assert offers.offer("p", move(), (), START, 60.0) is not None
    assert offers.get("p", START) is not None


def test_no_more_are_open_than_fit() -> None:
    offers = Offers()
    for number in range(OFFERS_MAX):
        assert offers.offer(f"o{number}", move(f"a{number}"), (), START, 60.0) is not None
    assert offers.offer("one more", move("z"), (), START, 60.0) is None
    assert offers.offer("later", move("z"), (), START + 60.0, 60.0) is not None
