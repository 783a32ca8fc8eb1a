"""Virtual time without tasks: what is due, in order."""

from stoker.testing.scheduler import Scheduler


def test_what_is_due_runs_in_order_and_equals_in_the_order_of_asking() -> None:
    scheduler = Scheduler()
    ran: list[tuple[float, str]] = []

    def note(name: str) -> None:
        ran.append((scheduler.now, name))

    scheduler.at(2.0, lambda: note("b"))
    scheduler.at(1.0, lambda: note("a"))
    scheduler.at(2.0, lambda: note("c"))
    scheduler.at(9.0, lambda: note("later"))
    scheduler.run_until(5.0, after_each=lambda: None)
    assert ran == [(1.0, "a"), (2.0, "b"), (2.0, "c")]
    assert scheduler.now == 5.0


def test_what_comes_up_meanwhile_runs_too_and_the_past_is_now() -> None:
    scheduler = Scheduler()
    ran: list[float] = []
    looks: list[int] = []

    def first() -> None:
        scheduler.at(0.5, lambda: ran.append(scheduler.now))
        scheduler.after(1.0, lambda: ran.append(scheduler.now))

    scheduler.at(1.0, first)
    scheduler.run_until(5.0, after_each=lambda: looks.append(len(ran)))
    assert ran == [1.0, 2.0]
    assert looks == [0, 1, 2]
    assert scheduler.events_run == 3
