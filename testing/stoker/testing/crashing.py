"""An aggregator that ends itself, as kill -9 would, at an exact point of its work.

Run as `python -m stoker.testing.crashing POINT PASSES OPTION...`, with options of an aggregator. It
is the real server with the real store, which is told where its transactions begin and end. From
SIGUSR1 on the process counts how often it passes POINT, and at the PASSES-th time it is gone: no
handler runs, no buffer is flushed, nobody is told. Snapshots, pruning and forgetting, which come
once in hours elsewhere, come every few hundred events here, so that a test meets them.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from stoker.aggregator import codec, config, decisions, ledger, store
from stoker.aggregator.server import Aggregator
from stoker.aggregator.store import OnCommit, Outcome, Store
from stoker.core.clock import SystemClock
from stoker.core.sdnotify import Notifier

if TYPE_CHECKING:  # only the store itself imports it
    import sqlite3

# After the loop has handed the answers to gRPC, and most likely on their way.
REPLY_SECONDS = 0.005
# Turns of the event loop from a commit to its answers: applied, recorded, replied to, answered.
REPLYING_TURNS = 4


class Point(StrEnum):
    """Where the process ends."""

    BEFORE_COMMIT = "before-commit"  # the transaction is written and not committed
    AFTER_COMMIT = "after-commit"  # durable, and not applied to the fleet
    AFTER_APPLY = "after-apply"  # applied, and nobody was told
    WHILE_REPLYING = "while-replying"  # some of those who asked were told, perhaps
    AFTER_REPLY = "after-reply"  # they were told
    MID_SNAPSHOT = "mid-snapshot"  # a part of a snapshot, or of the pruning after it, is committed


class Trigger:
    """Counts how often the process passes its point, once armed, and ends it at the last time."""

    def __init__(self, point: Point, passes: int) -> None:
        self._point = point
        self._passes_left = passes
        self._is_armed = False

    def arm(self) -> None:
        """Count from now on."""
        self._is_armed = True

    def passed(self, point: Point) -> None:
        """Note that the process is at `point`; it may end here."""
        if not self._is_armed or point is not self._point:
            return
        self._passes_left -= 1
        if self._passes_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class CrashingStore(Store):
    """The store, with a word to the trigger at every step of a transaction."""

    def __init__(self, trigger: Trigger, folder: Path, on_commit: OnCommit) -> None:
        self._trigger = trigger
        super().__init__(folder, on_commit)

    def commit(self, connection: "sqlite3.Connection") -> None:
        """Commit, on the writer's thread."""
        self._trigger.passed(Point.BEFORE_COMMIT)
        super().commit(connection)
        self._trigger.passed(Point.AFTER_COMMIT)
        if self._chores:
            self._trigger.passed(Point.MID_SNAPSHOT)

    def deliver(self, outcomes: Sequence[Outcome]) -> None:
        """Hand the outcomes to the loop, and follow them there."""
        super().deliver(outcomes)
        if outcomes:
            loop = outcomes[0][0].future.get_loop()
            loop.call_soon_threadsafe(self._follow, loop, 0)

    def _follow(self, loop: asyncio.AbstractEventLoop, turns: int) -> None:
        # What became of the outcomes in a turn of the loop was scheduled before this.
        if turns == 1:
            self._trigger.passed(Point.AFTER_APPLY)
        if turns < REPLYING_TURNS:
            loop.call_soon(self._follow, loop, turns + 1)
            return
        self._trigger.passed(Point.WHILE_REPLYING)
        loop.call_later(REPLY_SECONDS, self._trigger.passed, Point.AFTER_REPLY)


def main() -> None:
    """Run until the point is passed, or until SIGTERM."""
    options = _parse(sys.argv[1:])
    trigger = Trigger(options.point, options.passes)
    flags = {
        "data_dir": options.data_dir,
        "listen": options.listen,
        "metrics.listen": options.metrics_listen,
        "log_level": options.log_level,
    }
    settings = config.load(None, {}, flags)
    logging.basicConfig(level=settings.log_level.upper())
    _live_fast()
    uvloop.run(_run(settings, trigger))


async def _run(settings: config.Settings, trigger: Trigger) -> None:
    aggregator = Aggregator(
        settings,
        version=version("stoker"),
        clock=SystemClock(),
        notifier=Notifier(),
        open_store=partial(CrashingStore, trigger),
    )
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, trigger.arm)
    loop.add_signal_handler(signal.SIGTERM, aggregator.stop)
    await aggregator.run()


def _live_fast() -> None:
    """Have often what is seldom: snapshots in many parts, pruning, forgetting."""
    ledger.SNAPSHOT_EVERY_EVENTS = 100
    codec.OBJECTS_PER_PART = 20
    store.EVENTS_KEPT = 200
    store.PRUNED_AT_ONCE = 20
    decisions.REMEMBERED_MAX = 300
    decisions.FORGOTTEN_AT_ONCE = 20


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="stoker.testing.crashing", description=__doc__)
    parser.add_argument("point", type=Point, choices=list(Point))
    parser.add_argument("passes", type=int)
    for option in ("--data-dir", "--listen", "--metrics-listen", "--log-level"):
        parser.add_argument(option)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
