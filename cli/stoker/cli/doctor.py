"""`stoker agent doctor`: what is wrong with this host and what to do, with Nagios' exit codes."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.exceptions import Exit

from stoker.cli import screen
from stoker.cli.agent_socket import SERVICE_SOCKET, VARIABLE
from stoker.cli.settings import Settings, json_option
from stoker.cli.text import as_json, one_line
from stoker.cli.up_plan import default_up_dir
from stoker.core.daemons import default_data_dir
from stoker.core.errors import BadInput, StokerError
from stoker.core.units import parse_duration

if TYPE_CHECKING:  # half of the agent stands behind it, and `stoker agent --help` needs none
    from stoker.agent.doctor.findings import Finding
    from stoker.agent.doctor.names import Name

HELPER_VARIABLE = "STOKER_AGENT_HELPER_SOCKET"  # the agent's own name for its option
HELPER_SOCKET = SERVICE_SOCKET.with_name("helper.sock")
# Rises when a name of the JSON changes or goes; new ones may come at any time.
JSON_SCHEMA = 1
UNKNOWN = 3
DEBUG_VARIABLE = "STOKER_DEBUG"
SECONDS_MIN = 1.0
SECONDS_MAX = 600.0

_EPILOG = """\b
Exit codes, as of a Nagios plugin; they are not those of the other commands:
  0  OK        all is well
  1  WARNING   something should be mended; work can go on
  2  CRITICAL  GPUs, or some of them, cannot be used until something is mended
  3  UNKNOWN   it cannot be told; also: a wrong option, or no NVIDIA GPU on this host

\b
As a probe of Kubernetes or a HealthCheckProgram of Slurm, leave out what is not theirs to judge:
  stoker agent doctor --timeout 5s --checks kernel_module,library,driver,gpus,errors
  stoker agent doctor --only-problems --skip aggregator,containers,kernel_log
"""


class NagiosCommand(click.Command):
    """A command whose failures, wrong options too, are UNKNOWN: 2 would mean CRITICAL."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Read the options; raises Exit with 3 when they cannot be understood."""
        is_json = "--json" in args
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.ClickException as error:
            raise _fail(error.format_message(), is_json=is_json) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; raises Exit with 3 when that fails, and lets BrokenPipeError pass."""
        is_json = ctx.ensure_object(Settings).json
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            raise _fail(error.format_message(), is_json=is_json) from error
        except StokerError as error:
            raise _fail(str(error), is_json=is_json) from error
        except Exception as error:
            if DEBUG_VARIABLE in os.environ:
                raise
            found = f"{type(error).__name__}: {error} (a bug; {DEBUG_VARIABLE}=1 shows where)"
            raise _fail(found, is_json=is_json) from error


def _fail(found: str, *, is_json: bool) -> Exit:
    line = one_line(f"UNKNOWN: {found}")
    if is_json:
        document = {"schema": JSON_SCHEMA, "status": "UNKNOWN", "exit_code": UNKNOWN}
        print(as_json({**document, "summary": line, "checks": []}))
    else:
        print(line)  # a plugin's first line is on standard output, whatever it is
    return Exit(UNKNOWN)


@click.command(cls=NagiosCommand, epilog=_EPILOG)
@json_option
@click.option(
    "--socket",
    type=click.Path(path_type=Path, dir_okay=False, readable=False),
    metavar="PATH",
    help=f"Where the agent answers; else ${VARIABLE}, else where agents usually do.",
)
@click.option("--checks", metavar="A,B", help="Make only these checks.")
@click.option("--skip", metavar="A,B", help="Leave these checks out.")
@click.option(
    "--timeout",
    default="10s",
    show_default=True,
    metavar="DURATION",
    help="For all looks together; what has not answered then is a finding.",
)
@click.option("--only-problems", is_flag=True, help="Show no check that is OK.")
@click.pass_obj
def doctor(
    settings: Settings,
    socket: Path | None,
    checks: str | None,
    skip: str | None,
    timeout: str,
    only_problems: bool,
) -> int:
    """Examine this host: driver, GPUs, services, agent. Say what is wrong, and what to do.

    The driver is asked by a process of its own, and not at all while the agent has released it.
    Nothing is changed, and nothing is waited for longer than --timeout.
    """
    from stoker.agent.doctor.asking import CALL_SHARE, default_lock_folders
    from stoker.agent.doctor.checkup import chosen, examine, looks_of, summarize, worst
    from stoker.agent.doctor.look import Wanted, look

    if settings.address is not None:
        raise click.UsageError("--address: this host is examined, see --socket")
    asked = chosen(_names(checks, "--checks"), _names(skip, "--skip"))
    if not asked:
        raise BadInput("--skip: every check is left out")
    seconds = _seconds(timeout)
    observed = look(
        Wanted(
            looks=looks_of(asked),
            seconds=seconds,
            call_seconds=seconds * CALL_SHARE,
            sockets=tuple(map(str, _sockets(socket, os.environ))),
            helper=os.environ.get(HELPER_VARIABLE, str(HELPER_SOCKET)),
            lock_folders=tuple(map(str, default_lock_folders(os.environ, os.geteuid()))),
        )
    )
    findings = examine(observed, asked)
    status, summary = worst(findings), one_line(summarize(findings, observed))
    if settings.json:
        print(as_json(document(findings, summary, seconds=observed.seconds)))
    else:
        show(findings, summary, only_problems=only_problems)
    return int(status)


def document(
    findings: Sequence["Finding"], summary: str, *, seconds: float
) -> Mapping[str, object]:
    """Return all that was found, as JSON knows it; names stay as they are within a schema."""
    from stoker.agent.doctor.checkup import worst

    status = worst(findings)
    return {
        "schema": JSON_SCHEMA,
        "status": status.name,
        "exit_code": int(status),
        "summary": summary,
        "seconds": round(seconds, 3),
        "checks": [
            {
                "name": each.name,
                "status": each.status.name,
                "found": each.found,
                "details": list(each.details),
                "advice": list(each.advice),
                "because_of": each.because_of or None,
                "source": each.source,
            }
            for each in findings
        ],
    }


def show(findings: Sequence["Finding"], summary: str, *, only_problems: bool = False) -> None:
    """Print the page."""
    from stoker.cli import render_doctor

    print(summary)
    sys.stdout.flush()
    page = render_doctor.page(findings, only_problems=only_problems)
    if page is not None:
        screen.show(page)


def _sockets(given: Path | None, environ: Mapping[str, str]) -> list[Path]:
    """Return where an agent may answer; none is tried here, for trying may hang."""
    if given is not None:
        return [given]
    if named := environ.get(VARIABLE):
        return [Path(named)]
    own = default_data_dir("agent", environ, is_root=os.geteuid() == 0) / SERVICE_SOCKET.name
    up = sorted(default_up_dir(environ).glob(f"agents/*/{SERVICE_SOCKET.name}"))
    return [SERVICE_SOCKET, own, *up]


def _names(text: str | None, option: str) -> frozenset["Name"]:
    from stoker.agent.doctor.names import Name

    if text is None:
        return frozenset()
    known = {name.value: name for name in Name}
    words = [word.strip() for word in text.split(",") if word.strip()]
    strange = [word for word in words if word not in known]
    if strange or not words:
        found = f"found {', '.join(strange) or 'none'}"
        raise BadInput(f"{option}: wanted some of {', '.join(known)}; {found}")
    return frozenset(known[word] for word in words)


def _seconds(text: str) -> float:
    seconds = parse_duration(text, "--timeout")
    if not SECONDS_MIN <= seconds <= SECONDS_MAX:
        raise BadInput(f"--timeout: wanted {SECONDS_MIN:g} to {SECONDS_MAX:g} s, found {text}")
    return seconds
