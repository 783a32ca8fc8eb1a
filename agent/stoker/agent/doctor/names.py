"""The names of the checks, in their order; --checks and --skip take them."""

from enum import StrEnum


class Name(StrEnum):
    """A check; those before it explain it."""

    BUS = "bus"
    KERNEL_MODULE = "kernel_module"
    LIBRARY = "library"
    DEVICE_FILES = "device_files"
    DRIVER = "driver"
    GPUS = "gpus"
    ERRORS = "errors"
    MIG = "mig"
    PERSISTENCE = "persistence"
    FABRIC_MANAGER = "fabric_manager"
    CONTAINERS = "containers"
    KERNEL_LOG = "kernel_log"
    HELPER = "helper"
    AGENT = "agent"
    HEALTH = "health"
    AGGREGATOR = "aggregator"
    MEMORY = "memory"
