"""The GPU models that stoker can simulate, and the text that asks for them (`8xH100-80GB`)."""

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType

from stoker.core.errors import BadInput, shown
from stoker.core.gpu_catalogue import CATALOGUE, MHZ, MIB, GpuModel

__all__ = [
    "GPUS_PER_NODE_MAX",
    "MHZ",
    "MIB",
    "MODELS",
    "GpuModel",
    "find_model",
    "parse_simulate_spec",
]

# A PCIe root can address more; no server holds more.
GPUS_PER_NODE_MAX = 64

_SPEC = re.compile(r"(?:(\d{1,9})\s*[xX]\s*)?(\S+)", re.ASCII)

MODELS: Mapping[str, GpuModel] = MappingProxyType({model.name: model for model in CATALOGUE})


def find_model(name: str) -> GpuModel:
    """Return the model called `name` (any case); raises BadInput that names the nearest one."""
    for model in CATALOGUE:
        if model.name.casefold() == name.casefold():
            return model
    raise BadInput(f"GPU model {shown(name)} is not known; {_hint(name)}")


def parse_simulate_spec(text: str) -> tuple[int, GpuModel]:
    """Return how many GPUs of which model `text` asks for: `8xH100-80GB`, or `T4` for one.

    Raises BadInput when it cannot be read, names no known model, or asks for none or too many.
    """
    found = _SPEC.fullmatch(text.strip())
    if found is None:
        raise BadInput(f"simulated GPUs: {shown(text)} is not COUNTxMODEL, such as 8xH100-80GB")
    count = int(found[1]) if found[1] else 1
    model = find_model(found[2])
    if not 1 <= count <= GPUS_PER_NODE_MAX:
        raise BadInput(
            f"simulated GPUs: {shown(text)} asks for {count}; a node has 1 to {GPUS_PER_NODE_MAX}"
        )
    return count, model


def _hint(name: str) -> str:
    known = {model.name.casefold(): model.name for model in CATALOGUE}
    asked = name[:60].casefold()
    # "H100" is far from "H100-80GB" by letters, and near to a person.
    near = [key for key in known if asked and key.startswith(asked)]
    near += difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
    nearest = f"the nearest is {known[near[0]]}; " if near else ""
    return f"{nearest}known are {', '.join(MODELS)}"
