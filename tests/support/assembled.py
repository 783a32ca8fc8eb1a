"""A real agent put together in the process of a test, with driver hosts that the test holds."""

import contextlib
from collections.abc import Generator
from random import Random

from stoker.agent.config import Settings
from stoker.agent.daemon import Agent
from stoker.agent.driver_host.frames import DriverSource
from stoker.agent.driver_host.link import DriverHost
from stoker.agent.driver_host.states import Patience
from stoker.agent.journal import Journal
from stoker.agent.local import LocalDoor
from stoker.agent.mig.journal import MigJournal
from stoker.agent.mig.stepping import available_stepper
from stoker.agent.model import NodeIdentity
from stoker.agent.privileged import Helper
from stoker.agent.proctable import ProcTable
from stoker.core.clock import SystemClock
from stoker.core.sdnotify import Notifier
from stoker.testing.undying import Undying


@contextlib.contextmanager
def assembled(
    settings: Settings,
    source: DriverSource,
    patience: Patience,
    hosts: Undying,
    boot_id: str = "boot",
) -> Generator[Agent]:
    """Give an agent that does not run yet; its journal and its door are closed in the end."""
    clock, name, interval = SystemClock(), settings.node, settings.interval_seconds
    helper = Helper(settings.helper_socket)
    with contextlib.ExitStack() as opened:
        journal = Journal.open(settings.data_dir)
        opened.callback(journal.close)
        door = LocalDoor.open(settings.socket)
        opened.callback(door.close)
        yield Agent(
            settings,
            NodeIdentity(name, "0.1.0", boot_id, True, "", {}, interval, f"process-{name}"),
            journal=journal,
            mig_journal=MigJournal(settings.data_dir),
            stepper=available_stepper(helper, source),
            host=DriverHost(
                source, patience=patience, clock=clock, spawn=hosts, read_state=hosts.read_state
            ),
            door=door,
            user="ann",
            proctable=ProcTable(),
            helper=helper,
            attribution=None,
            notifier=Notifier({}),
            clock=clock,
            rng=Random(1),
        )
