"""Whether the GPU model that a person asks for is the one that a driver names."""

import re
from functools import lru_cache

from stoker.core.gpu_models import MODELS

_WORD = re.compile(r"[A-Z0-9]+", re.ASCII)
_DRIVER_NAMES = {name.casefold(): model.driver_name for name, model in MODELS.items()}


@lru_cache(maxsize=1024)  # placement asks it for every node, and the answer never changes
def names_match(asked: str, driver_name: str) -> bool:
    """Whether `asked`, such as `H100` or `H100-80GB`, names the card NVML calls `driver_name`.

    Every word of `asked` must be a word of the driver's name, whatever the case and the separators;
    a name of the catalogue also matches the driver's name that stands beside it there
    ("H200-141GB": "NVIDIA H200").
    """
    words = _words(asked)
    is_listed = _DRIVER_NAMES.get(asked.casefold()) == driver_name
    return is_listed or (bool(words) and words <= _words(driver_name))


def _words(name: str) -> frozenset[str]:
    return frozenset(_WORD.findall(name.upper()))
