"""The command `stoker`: its verbs by name, loaded when they are called, and its exit codes."""

import importlib
from collections.abc import Mapping

import click

from stoker.cli.settings import Settings, fleet_options
from stoker.core.errors import ExitCode

# verb -> where its click command lies, and what it does.
VERBS: Mapping[str, tuple[str, str]] = {
    "up": ("stoker.cli.up:up", "Bring up a fleet on this machine: aggregator and agents."),
    "agent": ("stoker.cli.agent:agent", "Run the agent of this host, ask it, release its driver."),
    "aggregator": ("stoker.cli.daemons:aggregator", "Run the aggregator."),
    "status": ("stoker.cli.fleet:status", "Show nodes, GPUs and allocations."),
    "top": ("stoker.cli.top:top", "Watch the GPUs of the fleet live."),
    "health": ("stoker.cli.fleet:health", "Show which GPUs are not well, and what mends them."),
    "services": ("stoker.cli.services:services", "Show services, and who gets which calls."),
    "alloc": ("stoker.cli.alloc:alloc", "Get GPUs, or run a command on them."),
    "release": ("stoker.cli.fleet:release", "Give allocations back."),
    "why": ("stoker.cli.why:why", "Explain why a request waits or cannot be placed."),
    "place": ("stoker.cli.why:place", "Say where a request would go, also if the fleet changed."),
    "cordon": ("stoker.cli.cordons:cordon", "Let nothing new go to a node or a GPU."),
    "drain": ("stoker.cli.cordons:drain", "Cordon, and end what is held after a grace."),
    "uncordon": ("stoker.cli.cordons:uncordon", "Let allocations go there again."),
    "mig": ("stoker.cli.mig:mig", "Plan, apply and undo how GPUs are partitioned (MIG)."),
    "rebalance": ("stoker.cli.rebalance:rebalance", "Show moves that mend fragments and hot GPUs."),
    "bench": ("stoker.cli.bench:bench", "Measure the daemons under the load of a fleet."),
    "config": ("stoker.cli.config:config", "Check configurations, show defaults."),
}

EXIT_CODES: Mapping[ExitCode, str] = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "an unexpected failure",
    ExitCode.USAGE: "the input cannot be understood",
    ExitCode.REFUSED: "cannot be placed, or not allowed now; the reason is said",
    ExitCode.MISSING: "a driver or a library is not on this machine",
    ExitCode.UNREACHABLE: "no answer from the aggregator, or from the agent of this machine",
    ExitCode.NOT_FOUND: "no such allocation, node or GPU",
    ExitCode.STORE: "the durable state is corrupt, too new, or cannot be written",
    ExitCode.IN_USE: "a port or a data folder is held by another process",
    ExitCode.PENDING: "begun, and a process has to end, or a GPU to be reset, before it is done",
}


def _epilog() -> str:
    codes = "\n".join(f"  {code.value}  {meaning}" for code, meaning in EXIT_CODES.items())
    return (
        "\b\nExit codes:\n"
        f"{codes}\n"
        "  128+N  ended by signal N; `alloc -- COMMAND` ends with the code of COMMAND"
    )


class Verbs(click.Group):
    """A group that loads a verb's module when the verb is called, so that --help is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, name = VERBS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, meaning) for verb, (_, meaning) in VERBS.items()])


@click.group(cls=Verbs, epilog=_epilog(), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stoker", message="%(prog)s %(version)s")
@fleet_options
@click.pass_context
def stoker(context: click.Context) -> None:
    """Share the GPUs of one machine or of a fleet."""
    context.ensure_object(Settings)
