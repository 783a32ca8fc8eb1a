"""Asks NVML whether it works here, in a process of its own: the library may hang, or crash.

Prints one line of JSON: {"kind": null} when it does, else what kind of error it met and its text.
"""

import json

from stoker.agent.driver import DriverError
from stoker.agent.nvml.driver import NvmlDriver, nvidia_ml_py
from stoker.core.errors import ExitCode


def main() -> None:
    """Open NVML as the agent will, and close it again."""
    found: dict[str, object] = {"kind": None}
    try:
        driver = NvmlDriver(nvidia_ml_py())
        driver.open()
        driver.close()
    except DriverError as error:
        is_missing = error.exit_code is ExitCode.MISSING
        found = {"kind": error.kind, "text": str(error), "is_missing": is_missing}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
