"""How the GPUs are, for the agent's own page: verdicts, faults, and memory that nobody owns.

Verdicts and faults are told as long as the agent is: a GPU that is not read has the verdict that
says so.
"""

from collections.abc import Iterator, Mapping

from stoker.agent.metrics.exposition import Family, pairs
from stoker.agent.metrics.families import absent_gpu_labels, in_braces, written
from stoker.agent.metrics.snapshot import Snapshot
from stoker.agent.verdicts import Verdict


def condition_families(snapshot: Snapshot, base: Mapping[str, str]) -> Iterator[Family]:
    """Yield the families of health; `base`: the labels of the GPUs by UUID."""
    verdicts: list[tuple[str, float]] = []
    faults: list[tuple[str, float]] = []
    times: list[tuple[str, float]] = []
    for gpu in sorted(snapshot.view.health, key=lambda each: each.uuid):
        text = base.get(gpu.uuid) or absent_gpu_labels(snapshot, gpu.uuid)
        verdicts += [(in_braces(text, "verdict", v), v is gpu.verdict) for v in Verdict]
        for fault in gpu.faults:
            named = f"{text},{pairs(('check', 'code'), (fault.check, fault.code))}"
            judged = pairs(("verdict", "action"), (fault.verdict, fault.action))
            faults.append((f"{{{named},{judged}}}", 1))
            times.append((f"{{{named}}}", fault.last_at))
    yield written("stoker_gpu_health", verdicts)
    yield written("stoker_gpu_fault", faults)
    yield written("stoker_gpu_fault_last_timestamp_seconds", times)
    yield written("stoker_gpu_memory_unattributed_bytes", _unattributed(snapshot, base))


def _unattributed(snapshot: Snapshot, base: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    """Yield it where both that it is made of may be told: memory in use, and whose it is."""
    table, told = snapshot.processes, snapshot.telemetry
    if table is not None:
        for uuid, size in sorted(snapshot.view.memory_unattributed_bytes.items()):
            if uuid in base and uuid in told and uuid not in table.unread_gpu_uuids:
                yield in_braces(base[uuid]), size
