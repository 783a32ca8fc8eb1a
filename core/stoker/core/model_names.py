"""Whether the GPU model that a person asks for is the one that a driver names."""

import re

from stoker.core.gpu_models import MODELS

_WORD = re.compile(r"[A-Z0-9]+", re.ASCII)


def names_match(asked: str, driver_name: str) -> bool:
    """Whether `asked`, such as `H100` or `H100-80GB`, names the card NVML calls `driver_name`.

    Every word of `asked` must be a word of the driver's name, whatever the case and the separators; a name
    of the catalogue also matches the driver's name that stands beside it there ("H200-141GB": "NVIDIA H200").
    """
    known = MODELS.get(asked)
    if known is not None and known.driver_name == driver_name:
        return True
    words = _words(asked)
    return bool(words) and words <= _words(driver_name)


def _words(name: str) -> frozenset[str]:
    return frozenset(_WORD.findall(name.upper()))
