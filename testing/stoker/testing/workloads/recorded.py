"""Workloads from CSV files in the columns of the public openb trace (cluster-trace-gpu-v2023).

A file of nodes has a line for every host, one of tasks for every task; further columns are passed
over. A gang of tasks is either told as such (`num_node`, everything else then being that of one
node) or is a task for more GPUs than any host has: it is spread evenly over as few nodes as can be.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from stoker.aggregator.model import COMPUTE_MILLI
from stoker.core.errors import BadInput, shown
from stoker.core.gpu_models import GPUS_PER_NODE_MAX
from stoker.testing.workloads.tasks import Host, Task, Workload

MIB = 2**20
_NODE_COLUMNS = ("sn", "cpu_milli", "memory_mib", "gpu", "model")
_TASK_COLUMNS = ("name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli")
_MODELS_APART = "|"
# Far beyond every machine; what is larger is a column in the wrong place.
_CPU_MILLI_MAX = 10**7
_MEMORY_MIB_MAX = 10**9
_GPUS_MAX = 100_000
_SECONDS_MAX = 1e12


def read_workload(nodes: Path, tasks: Path) -> Workload:
    """Return the workload of these two files; raises BadInput, naming file, line and column."""
    hosts = parse_hosts(_read(nodes), str(nodes))
    return Workload(hosts, parse_tasks(_read(tasks), str(tasks), hosts))


def parse_hosts(text: str, name: str) -> tuple[Host, ...]:
    """Return the hosts that the text of a file of that name lists; raises BadInput."""
    hosts: list[Host] = []
    lines: dict[str, int] = {}  # host -> its line
    for row in _rows(text, name, _NODE_COLUMNS):
        gpus = row.whole("gpu", 0, GPUS_PER_NODE_MAX)
        host = Host(
            name=row.word("sn"),
            model=row.word("model") if gpus else "",
            gpus=gpus,
            cpu_milli=row.whole("cpu_milli", 1, _CPU_MILLI_MAX),
            memory_bytes=row.whole("memory_mib", 1, _MEMORY_MIB_MAX) * MIB,
        )
        if host.name in lines:
            raise row.bad("sn", "a name of its own", f"that of line {lines[host.name]}")
        lines[host.name] = row.line
        hosts.append(host)
    if not any(host.gpus for host in hosts):
        raise BadInput(f"{name}: wanted hosts with GPUs, found {len(hosts)} without any")
    return tuple(hosts)


def parse_tasks(text: str, name: str, hosts: Sequence[Host]) -> tuple[Task, ...]:
    """Return the tasks that the text of a file of that name lists; raises BadInput.

    Of `hosts` it goes by how many GPUs one has at most. A task may name a model that none has: it
    will get no place.
    """
    gpus_max = max(host.gpus for host in hosts)
    tasks = tuple(_task(row, gpus_max) for row in _rows(text, name, _TASK_COLUMNS))
    if not any(task.gpu_milli_total for task in tasks):
        raise BadInput(f"{name}: wanted tasks that take GPUs, found {len(tasks)} that do not")
    return tasks


class _Row:
    """One line of a file, whose cells are read by column."""

    def __init__(self, file: str, line: int, cells: Mapping[str, str]) -> None:
        self.line = line
        self._file = file
        self._cells = cells

    def word(self, column: str) -> str:
        """Return a cell that may not be empty."""
        text = self._cells[column].strip()
        if not text:
            raise self.bad(column, "a name", "nothing")
        return text

    def whole(self, column: str, least: int, most: int) -> int:
        """Return a whole number within bounds."""
        text = self._cells[column].strip()
        value = int(text) if text.isascii() and text.isdigit() else None
        if value is None or not least <= value <= most:
            raise self.bad(column, f"a whole number from {least} to {most}", shown(text))
        return value

    def seconds(self, column: str) -> float | None:
        """Return a time; None where the column or the cell is absent."""
        text = self._cells.get(column, "").strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= _SECONDS_MAX:
            raise self.bad(column, "seconds, 0 or later", shown(text))
        return value

    def models(self, column: str) -> tuple[str, ...]:
        """Return the alternatives that the cell names; none where it, or the column, is absent."""
        text = self._cells.get(column, "").strip()
        if not text:
            return ()
        named = tuple(dict.fromkeys(each.strip() for each in text.split(_MODELS_APART)))
        if not all(named):
            raise self.bad(column, f"names of models with {_MODELS_APART} between", shown(text))
        return named

    def has(self, column: str) -> bool:
        """Whether the cell is there and says something."""
        return bool(self._cells.get(column, "").strip())

    def bad(self, column: str, wanted: str, found: str) -> BadInput:
        """Return what is wrong with the cell."""
        return BadInput(
            f"{self._file}: line {self.line}, column {column}: wanted {wanted}, found {found}"
        )


def _read(path: Path) -> str:
    try:
        # Not the locale's; a spreadsheet may have put a byte order mark before it.
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: wanted UTF-8 text, found {error.reason}") from error


def _rows(text: str, name: str, wanted: Sequence[str]) -> Iterator[_Row]:
    """Yield the lines below the head; blank ones are passed over."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        head, *lines = [(reader.line_num, cells) for cells in reader] or [(1, [])]
    except csv.Error as error:
        raise BadInput(f"{name}: line {reader.line_num}: wanted CSV, found {error}") from error
    columns = [cell.strip() for cell in head[1]]
    for column in wanted:
        if column not in columns:
            found = ", ".join(columns) or "nothing"
            raise BadInput(f"{name}: line 1: wanted a column {column}, found {shown(found)}")
    for line, cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(columns):
            raise BadInput(f"{name}: line {line}: wanted {len(columns)} cells, found {len(cells)}")
        yield _Row(name, line, dict(zip(columns, cells, strict=True)))


def _task(row: _Row, gpus_max: int) -> Task:
    gpus = row.whole("num_gpu", 0, _GPUS_MAX)
    # Of a task without GPUs the trace says 0, and nothing of it matters.
    least = 1 if gpus == 1 else COMPUTE_MILLI
    milli = row.whole("gpu_milli", least, COMPUTE_MILLI) if gpus else 0
    cpu_milli = row.whole("cpu_milli", 0 if gpus else 1, _CPU_MILLI_MAX)
    memory_bytes = row.whole("memory_mib", 0, _MEMORY_MIB_MAX) * MIB
    nodes = row.whole("num_node", 1, _GPUS_MAX) if row.has("num_node") else 1
    if gpus > gpus_max:
        if nodes > 1:
            raise row.bad("num_gpu", f"at most {gpus_max}, as one host has", str(gpus))
        nodes = _nodes_for(gpus, gpus_max)
        gpus //= nodes
        cpu_milli, memory_bytes = -(-cpu_milli // nodes), -(-memory_bytes // nodes)
    arrives_at = row.seconds("creation_time")
    return Task(
        name=row.word("name"),
        cpu_milli=cpu_milli,
        memory_bytes=memory_bytes,
        gpus=gpus,
        gpu_milli=milli,
        models=row.models("gpu_spec") if gpus else (),
        nodes=nodes,
        arrives_at=arrives_at,
        runs_seconds=_runs_seconds(row, arrives_at),
    )


def _runs_seconds(row: _Row, arrives_at: float | None) -> float | None:
    """Return how long it ran: from when it was scheduled (never: from its arrival) until it went.

    How long it had waited for a place was the recorded scheduler's doing.
    """
    deleted_at = row.seconds("deletion_time")
    began_at = row.seconds("scheduled_time")
    if began_at is None:
        began_at = arrives_at
    if deleted_at is None or began_at is None:
        return None
    if deleted_at < began_at:
        raise row.bad("deletion_time", f"a time after {began_at:.15g}", f"{deleted_at:.15g}")
    return deleted_at - began_at


def _nodes_for(gpus: int, gpus_max: int) -> int:
    """Return over how few nodes so many GPUs can be spread evenly."""
    fewest = -(-gpus // gpus_max)
    return next(nodes for nodes in range(fewest, gpus + 1) if gpus % nodes == 0)
