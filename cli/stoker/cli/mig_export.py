"""What a node's GPUs are partitioned into as a configuration that would make them so again."""

from collections import Counter

from stoker.cli.render_mig import device_names
from stoker.core.errors import ExitCode, StokerError
from stoker.core.mig.files import MigFile
from stoker.core.mig.reports import GpuMigFacts, MigEntry, MigReport


class NotTold(StokerError):
    """What is there cannot be written down."""

    exit_code = ExitCode.MISSING


def exported(report: MigReport, config: str, *, is_whole: bool) -> MigFile:
    """Return a file with one configuration; raises NotTold for instances that cannot be read.

    `is_whole`: the report is about every GPU of the node.
    """
    alike: dict[tuple[bool, tuple[tuple[str, int], ...]], list[GpuMigFacts]] = {}
    for gpu in sorted(report.gpus, key=lambda each: each.index):
        alike.setdefault((bool(gpu.mode), _devices(gpu)), []).append(gpu)
    entries = tuple(
        MigEntry(
            mig_enabled=is_enabled,
            devices=None if is_whole and len(alike) == 1 else tuple(each.index for each in gpus),
            mig_devices=dict(devices),
        )
        for (is_enabled, devices), gpus in alike.items()
    )
    return MigFile({config: entries})


def lost(report: MigReport) -> list[str]:
    """Return what the format has no words for, a sentence each."""
    return [
        f"GPU {gpu.index}: {each.profile} at slice {each.start} has no compute instance, so it is "
        "no device, and is left out"
        for gpu in report.gpus
        for each in gpu.instances
        if not each.compute
    ]


def _devices(gpu: GpuMigFacts) -> tuple[tuple[str, int], ...]:
    if gpu.unread:
        raise NotTold(f"GPU {gpu.index}: its instances are not known: {gpu.unread}")
    found = Counter(
        name for each in gpu.instances for name in device_names(each.profile, each.compute)
    )
    return tuple(sorted(found.items()))
