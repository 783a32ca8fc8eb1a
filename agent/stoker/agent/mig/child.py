"""Does one thing with partitions in place of the root helper, told on a pipe, and ends.

The agent starts it as `python -m stoker.agent.mig.child`, says one line of JSON, and gets one. It
does what the helper does, by the same code, with the same locks and alarms.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence

from stoker.agent.helper.files import why_unsafe
from stoker.agent.helper.ground import Ground
from stoker.agent.helper.partitions import GPU_VERBS
from stoker.agent.helper.requests import Refused, Told, understood
from stoker.agent.processes import die_with_parent

REQUEST_BYTES_MAX = 1 << 14


def main(arguments: Sequence[str]) -> int:
    """Answer one line; the exit code is 0 also for a refusal."""
    parser = argparse.ArgumentParser(prog="stoker.agent.mig.child", allow_abbrev=False)
    parser.add_argument("--parent", type=int, required=True, help="PID of the agent")
    parser.add_argument("--locks", required=True, metavar="FOLDER")
    options, standin = parser.parse_known_args(arguments)
    # What it has begun goes on in the kernel; nothing further is begun for an agent that is gone.
    die_with_parent(options.parent, signal.SIGKILL)
    said = sys.stdin.buffer.readline(REQUEST_BYTES_MAX)
    try:
        told = _answer(said, Ground("/proc", _locks(options.locks, standin), tuple(standin)))
    except Refused as refusal:
        told = {"refused": str(refusal)}
    sys.stdout.write(json.dumps(told) + "\n")
    return 0


def _answer(said: bytes, ground: Ground) -> Told:
    verb, wish = understood(said, {name: arguments for name, (_, arguments) in GPU_VERBS.items()})
    return GPU_VERBS[verb][0](ground, wish)


def _locks(folder: str, standin: Sequence[str]) -> str:
    """Return the folder, made where it is not there; raises Refused when it is not safe."""
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
        if not standin and (reason := why_unsafe(folder)):
            raise Refused(reason)
    except OSError as error:
        raise Refused(f"{folder}: {error.strerror}") from error
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
