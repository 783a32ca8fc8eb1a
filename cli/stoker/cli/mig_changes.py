"""A change of a node's partitions from the command line: asked for, waited for, accounted for."""

import signal
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import click
from msgspec.structs import replace

from stoker.cli import render_mig, screen
from stoker.cli.mig_asking import Ask, wait
from stoker.cli.mig_outcomes import exit_code, outcomes
from stoker.cli.mig_progress import telling
from stoker.cli.settings import Settings
from stoker.cli.text import as_json, document, one_line
from stoker.core.errors import BadInput, ExitCode, StokerError
from stoker.core.mig.reports import MigAsk, MigEntry, MigReport, Verb
from stoker.core.units import format_duration, parse_duration

C = TypeVar("C", bound=Callable[..., Any])

_ID_CHARACTERS = 12  # few enough to type, enough to be unique on a node

_OPTIONS = (
    click.option(
        "--drain",
        default="60s",
        show_default=True,
        metavar="DURATION",
        help="How long users of what has to go may take to leave; 0: none is waited for.",
    ),
    click.option(
        "--evict",
        is_flag=True,
        help="End who is not gone by then, processes of others too; else nothing is changed.",
    ),
    click.option(
        "--operation-id",
        metavar="ID",
        help="Of this wish: with an ID that the agent knows it is not done again, only waited for.",
    ),
    click.option("--yes", is_flag=True, help="Do not ask for confirmation."),
    click.option("--no-wait", is_flag=True, help="Return once the agent has it in writing."),
)


def change_options(command: C) -> C:
    """Add what a change takes: how users are treated, whether to ask, whether to wait."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class Change:
    """What the options say."""

    settings: Settings
    drain_seconds: float
    evict: bool
    operation_id: str
    is_agreed: bool  # nobody is to be asked
    is_awaited: bool

    @classmethod
    def of(cls, settings: Settings, how: dict[str, Any], *, is_input_taken: bool = False) -> Self:
        """Return it, or raise BadInput; `is_input_taken`: no answer can come from standard input.

        Whether --yes is needed does not depend on what the plan will be: a script that lacks it
        fails on its first day.
        """
        if how["operation_id"] == "":
            raise BadInput("--operation-id: wanted a value, found none")
        can_ask = sys.stdin.isatty() and not is_input_taken and not settings.json
        if not how["yes"] and not can_ask:
            why = "with --json" if settings.json else "without a terminal"
            raise BadInput(f"--yes: {why} nobody can be asked to confirm; nothing was changed")
        return cls(
            settings,
            parse_duration(how["drain"], "--drain"),
            how["evict"],
            how["operation_id"] or uuid.uuid4().hex[:_ID_CHARACTERS],
            how["yes"],
            not how["no_wait"],
        )

    def ask(
        self,
        verb: Verb,
        gpus: tuple[str, ...],
        config: str = "",
        entries: tuple[MigEntry, ...] = (),
    ) -> MigAsk:
        """Return what is asked of the agent."""
        return MigAsk(
            verb,
            operation_id=self.operation_id,
            config=config,
            entries=entries,
            gpus=gpus,
            drain_seconds=self.drain_seconds,
            evict=self.evict,
        )

    def show_terms(self, planned: MigReport) -> None:
        """Say what becomes of those who are in the way."""
        if not any(each.in_the_way for each in planned.plans):
            return
        drain = format_duration(self.drain_seconds) if self.drain_seconds else "no time"
        then = "is ended" if self.evict else "stays, and nothing is changed"
        print(f"Who is in the way has {drain} to leave; who is there after it {then}.")

    def is_confirmed(self, question: str) -> bool:
        """Whether the person agrees, now or by --yes."""
        if self.is_agreed or click.confirm(question, err=True):
            return True
        print("stoker: nothing was changed", file=sys.stderr)
        return False

    def carry_out(self, ask: Ask, wish: MigAsk) -> int:
        """Have it done, wait for it unless told not to, and print what came of it."""
        id_ = self.operation_id
        try:
            begun = ask(wish)
        except (StokerError, KeyboardInterrupt) as error:
            if not isinstance(error, StokerError) or error.exit_code is ExitCode.UNREACHABLE:
                self._say(f"it is not known whether operation {id_} has begun")
            raise
        if wish.verb == "undo" and not self.settings.json:  # of an apply it was shown before
            screen.show(render_mig.plan(begun))
            self.show_terms(begun)
        if not self.is_awaited:
            return self._begun(begun)
        try:
            with telling(is_silent=self.settings.json) as tell:
                now = wait(ask, begun, tell, self._away)
        except KeyboardInterrupt:
            self._say(f"not waited for any longer; operation {id_} goes on")
            return 128 + signal.SIGINT
        except StokerError:
            self._say(f"operation {id_} goes on, as far as is known")
            raise
        found = outcomes(begun, now)
        if self.settings.json:
            print(as_json(document(replace(begun, gpus=now.gpus))))
        else:
            for each in found:
                print(one_line(f"GPU {each.gpu}: {each.sentence}"))
        return exit_code(found)

    def _away(self, error: StokerError) -> None:
        if not self.settings.json:
            print(f"stoker: {one_line(str(error))}; trying again", file=sys.stderr)

    def _begun(self, begun: MigReport) -> int:
        if self.settings.json:
            print(as_json(document(begun)))
        else:
            print(one_line(f"operation {begun.operation_id} has begun"))
        return ExitCode.OK

    def _say(self, text: str) -> None:
        hint = "`stoker mig status` shows it, the same command with --operation-id waits for it"
        print(f"stoker: {one_line(text)} ({hint})", file=sys.stderr)
