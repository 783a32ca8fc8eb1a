"""The change that is proposed places the request, and nothing cheaper that is looked at does."""

from hypothesis import HealthCheck, given, settings
from tests.unit.aggregator.placing.small_fleets import Case, cases

from stoker.aggregator.model import Plan
from stoker.aggregator.placing.changes import Change, Situation
from stoker.aggregator.placing.place import explain, find_place, place
from stoker.aggregator.placing.smallest import applied, every, smallest
from stoker.aggregator.placing.why import situation
from stoker.aggregator.queueing import kept_for

LAW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def situation_of(case: Case) -> Situation | None:
    """Return what is to be mended; None: the request can be placed."""
    view = case.scene.view()
    blocked = kept_for(case.ahead, view)
    if find_place(case.request, view, blocked) is not None:
        return None
    refusals = explain(case.request, view, blocked)
    return situation(case.request, view, refusals, blocked, case.ahead, kept_for)


def does_place(change: Change, s: Situation) -> bool:
    view, blocked = applied(change, s)
    return isinstance(place(change.request, view, blocked), Plan)


@LAW
@given(cases())
def test_the_cheapest_change_that_places_the_request_is_proposed(case: Case) -> None:
    s = situation_of(case)
    if s is None:
        return
    ordered = sorted(every(s), key=lambda each: (each[0], each[1].key))
    keys = [(rank, change.key) for rank, change in ordered]
    assert len(set(keys)) == len(keys), "two changes cost the same"
    expected = next((change for _, change in ordered if does_place(change, s)), None)
    found = smallest(s)
    assert (None if found is None else found.change) == expected
