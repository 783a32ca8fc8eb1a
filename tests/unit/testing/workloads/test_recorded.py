"""Workloads from files: what the columns mean, and what is wrong with a bad file, by its place."""

from pathlib import Path

import pytest

from stoker.core.errors import BadInput
from stoker.testing.workloads.recorded import parse_hosts, parse_tasks, read_workload
from stoker.testing.workloads.tasks import Host, Task

MIB = 2**20
NODES = "sn,cpu_milli,memory_mib,gpu,model"
TASKS = "name,cpu_milli,memory_mib,num_gpu,gpu_milli"
TIMED = f"{TASKS},gpu_spec,creation_time,deletion_time,scheduled_time"
HOSTS = parse_hosts(f"{NODES}\nn1,96000,1024,8,G2\nn2,64000,512,4,V100M16\nn3,9000,99,0,\n", "n")


def task_of(row: str, head: str = TASKS) -> Task:
    (task, *_) = parse_tasks(
        f"{head}\n{row}\nlast,1,0,1,1000{',' * (head.count(',') - 4)}", "t", HOSTS
    )
    return task


def test_a_line_is_a_host_and_one_without_gpus_names_no_model() -> None:
    assert (
        Host("n1", "G2", 8, 96_000, 1024 * MIB),
        Host("n2", "V100M16", 4, 64_000, 512 * MIB),
        Host("n3", "", 0, 9_000, 99 * MIB),
    ) == HOSTS


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ("t,6000,12288,1,460", Task("t", 6000, 12288 * MIB, 1, 460)),
        ("t,6000,12288,1,1000", Task("t", 6000, 12288 * MIB, 1, 1000)),
        ("t,6000,12288,8,1000", Task("t", 6000, 12288 * MIB, 8, 1000)),
        # Of a task that takes CPU alone, the share means nothing.
        ("t,6000,12288,0,0", Task("t", 6000, 12288 * MIB, 0, 0)),
        ("t,6000,12288,0,1000", Task("t", 6000, 12288 * MIB, 0, 0)),
        # More GPUs than a host has: over as few nodes as can be, evenly; CPU and memory too.
        ("t,6001,20,16,1000", Task("t", 3001, 10 * MIB, 8, 1000, nodes=2)),
        ("t,6000,12,12,1000", Task("t", 3000, 6 * MIB, 6, 1000, nodes=2)),
        ("t,11000,11,11,1000", Task("t", 1000, MIB, 1, 1000, nodes=11)),
    ],
)
def test_a_line_is_a_task(row: str, task: Task) -> None:
    assert task_of(row) == task


def test_a_gang_may_be_told_as_such() -> None:
    gang = task_of("t,6000,12,4,1000,3", head=f"{TASKS},num_node")
    assert (gang.nodes, gang.gpus, gang.cpu_milli, gang.gpu_milli_total) == (3, 4, 6000, 12_000)


def test_models_are_alternatives_and_one_named_twice_is_one() -> None:
    task = task_of("t,1,0,1,500,V100M16|G2|G2|H100,,,", head=TIMED)
    assert task.models == ("V100M16", "G2", "H100")  # the last one is not in the fleet


@pytest.mark.parametrize(
    ("times", "arrives_at", "runs_seconds"),
    [
        ("100,500,150", 100.0, 350.0),
        ("100,500,", 100.0, 400.0),  # never scheduled: it might have run all the while
        ("100,,150", 100.0, None),
        (",500,", None, None),
    ],
)
def test_a_task_runs_from_when_it_was_scheduled(
    times: str, arrives_at: float | None, runs_seconds: float | None
) -> None:
    task = task_of(f"t,1,0,1,500,,{times}", head=TIMED)
    assert (task.arrives_at, task.runs_seconds) == (arrives_at, runs_seconds)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nodes.csv: line 1: wanted a column sn, found 'nothing'"),
        ("sn,cpu_milli,memory_mib,gpu\n", "nodes.csv: line 1: wanted a column model, found"),
        (f"{NODES}\n", "nodes.csv: wanted hosts with GPUs, found 0 without any"),
        (f"{NODES}\nn1,1,1,0,\n", "nodes.csv: wanted hosts with GPUs, found 1 without any"),
        (f"{NODES}\nn1,1,1,2\n", "nodes.csv: line 2: wanted 5 cells, found 4"),
        (
            f"{NODES}\n\nn1,96000,many,2,G2\n",
            "line 3, column memory_mib: wanted a whole number from 1 to 1000000000, found 'many'",
        ),
        (f"{NODES}\nn1,1,1,-2,G2\n", "line 2, column gpu: wanted a whole number from 0 to 64"),
        (f"{NODES}\nn1,1,1,²,G2\n", "line 2, column gpu: wanted a whole number from 0 to 64"),
        (f"{NODES}\nn1,1,1,65,G2\n", "line 2, column gpu: wanted a whole number from 0 to 64"),
        (f"{NODES}\nn1,1,1,2, \n", "line 2, column model: wanted a name, found nothing"),
        (f"{NODES}\n,1,1,2,G2\n", "line 2, column sn: wanted a name, found nothing"),
        (
            f"{NODES}\nn1,1,1,2,G2\nn1,1,1,2,G2\n",
            "nodes.csv: line 3, column sn: wanted a name of its own, found that of line 2",
        ),
        (f'{NODES}\n"n1,1,1,2,G2\n', "nodes.csv: line 2: wanted CSV, found unexpected end of data"),
    ],
)
def test_bad_nodes_are_told_by_file_line_and_column(text: str, said: str) -> None:
    with pytest.raises(BadInput, match="nodes.csv") as told:
        parse_hosts(text, "nodes.csv")
    assert said in str(told.value)


@pytest.mark.parametrize(
    ("head", "row", "said"),
    [
        (TASKS, "t,1,1,1,0", "line 2, column gpu_milli: wanted a whole number from 1 to 1000"),
        (TASKS, "t,1,1,1,1001", "line 2, column gpu_milli: wanted a whole number from 1 to 1000"),
        (TASKS, "t,1,1,2,500", "column gpu_milli: wanted a whole number from 1000 to 1000"),
        (TASKS, "t,1,1,-1,0", "line 2, column num_gpu: wanted a whole number from 0 to 100000"),
        (TASKS, "t,1.5,1,1,500", "line 2, column cpu_milli: wanted a whole number"),
        (TASKS, "t,0,1,0,0", "column cpu_milli: wanted a whole number from 1 to"),
        (TASKS, "t,1,,1,500", "line 2, column memory_mib: wanted a whole number"),
        (TASKS, ",1,1,1,500", "line 2, column name: wanted a name, found nothing"),
        (TASKS, "t,1,1,0,0", "tasks.csv: wanted tasks that take GPUs, found 1 that do not"),
        (
            f"{TASKS},num_node",
            "t,1,1,9,1000,2",
            "line 2, column num_gpu: wanted at most 8, as one host has, found 9",
        ),
        (
            TIMED,
            "t,1,1,1,500,G2||T4,,,",
            "line 2, column gpu_spec: wanted names of models with | between, found 'G2||T4'",
        ),
        (TIMED, "t,1,1,1,500,,soon,,", "column creation_time: wanted seconds, 0 or later"),
        (TIMED, "t,1,1,1,500,,nan,,", "column creation_time: wanted seconds, 0 or later"),
        (
            TIMED,
            "t,1,1,1,500,,100,90,",
            "line 2, column deletion_time: wanted a time after 100, found 90",
        ),
    ],
)
def test_bad_tasks_are_told_by_file_line_and_column(head: str, row: str, said: str) -> None:
    with pytest.raises(BadInput, match="tasks.csv") as told:
        parse_tasks(f"{head}\n{row}\n", "tasks.csv", HOSTS)
    assert said in str(told.value)


def test_what_is_no_text_and_what_is_not_there_is_told(tmp_path: Path) -> None:
    nodes, tasks = tmp_path / "nodes.csv", tmp_path / "tasks.csv"
    with pytest.raises(BadInput, match=f"{nodes}: No such file"):
        read_workload(nodes, tasks)
    nodes.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match=f"{nodes}: wanted UTF-8 text"):
        read_workload(nodes, tasks)


def test_a_byte_order_mark_and_lines_of_windows_are_no_obstacle(tmp_path: Path) -> None:
    nodes, tasks = tmp_path / "nodes.csv", tmp_path / "tasks.csv"
    nodes.write_bytes(f"\ufeff{NODES}\r\nn1,1,1,2,G2\r\n".encode())
    tasks.write_text(f"{TASKS}\nt,1,1,1,500\n")
    workload = read_workload(nodes, tasks)
    assert (workload.capacity_milli, len(workload.tasks)) == (2000, 1)
