"""DCGM's bindings in a test process: importable for a while, and forgotten afterwards."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from stoker.testing import dcgm_structs
from stoker.testing.dcgm_engine import write_bindings


@contextmanager
def importable_bindings(folder: Path) -> Generator[Path]:
    """A folder of bindings; whatever is imported meanwhile leaves no trace."""
    try:
        yield write_bindings(folder / "bindings")
    finally:
        dcgm_structs.library_is_there, dcgm_structs.library_is_loaded = True, False
        for name in ("dcgm_agent", "dcgm_structs"):
            sys.modules.pop(name, None)
