"""Where the agent of this machine may be asked: the sockets to try, in order."""

import os
from collections.abc import Mapping
from pathlib import Path

from stoker.cli.up_plan import default_up_dir
from stoker.core.daemons import default_data_dir
from stoker.core.errors import BadInput
from stoker.core.local import is_answered

VARIABLE = "STOKER_AGENT_SOCKET"  # the agent's own name for its option `socket`
SERVICE_SOCKET = Path("/run/stoker/agent.sock")
_NAME = "agent.sock"


def socket_paths(given: Path | None, environ: Mapping[str, str]) -> list[Path]:
    """Return the socket that was named, or all that an agent of this machine may have.

    Raises BadInput when several agents of `stoker up` run and none was named.
    """
    if given is not None:
        return [given]
    if named := environ.get(VARIABLE):
        return [Path(named)]
    is_root = os.geteuid() == 0
    usual = [SERVICE_SOCKET, default_data_dir("agent", environ, is_root=is_root) / _NAME]
    if any(map(is_answered, usual)):
        return usual
    simulated = sorted(default_up_dir(environ).glob(f"agents/*/{_NAME}"))
    living = [path for path in simulated if is_answered(path)]
    if len(living) > 1:
        raise BadInput(
            f"{len(living)} agents of `stoker up` run here, --socket names one of: "
            f"{', '.join(map(str, living))}"
        )
    return [*usual, *(living or simulated)]
