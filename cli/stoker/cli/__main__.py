"""Runs the command `stoker` and turns what happens into an exit code and one line."""

import os
import signal
import sys

import click

from stoker.cli import documents
from stoker.cli.app import stoker
from stoker.cli.settings import Settings
from stoker.cli.text import as_json, error_lines
from stoker.core.errors import ExitCode, StokerError

DEBUG_VARIABLE = "STOKER_DEBUG"


def main() -> None:
    """Run the command line of this process and exit."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a sign shows another one; that is no reason to fail.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    settings = Settings()
    try:
        code = stoker.main(arguments, prog_name="stoker", standalone_mode=False, obj=settings)
        sys.stdout.flush()
        return int(code or ExitCode.OK)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return ExitCode.USAGE
    except click.UsageError as error:
        settings.json = settings.json or "--json" in arguments
        return _fail(settings, _usage(error), ExitCode.USAGE)
    except click.ClickException as error:
        return _fail(settings, error.format_message(), ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except StokerError as error:
        if DEBUG_VARIABLE in os.environ:
            raise
        return _fail(settings, error, error.exit_code)
    except Exception as error:
        if DEBUG_VARIABLE in os.environ:
            raise
        found = f"{type(error).__name__}: {error}"
        return _fail(settings, f"{found} (a bug; {DEBUG_VARIABLE}=1 shows where)", ExitCode.FAILED)


def _usage(error: click.UsageError) -> str:
    message = error.format_message()
    return message if error.ctx is None else f"{message} (see `{error.ctx.command_path} --help`)"


def _fail(settings: Settings, error: StokerError | str, code: ExitCode) -> int:
    if settings.json:
        print(as_json(documents.error(error, code)))
    else:
        for line in error_lines(error):
            print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
