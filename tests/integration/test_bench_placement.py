"""`stoker bench placement`: it plays what it is given, says what came of it, and leaves nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

BENCH = (sys.executable, "-m", "stoker.cli", "bench", "placement")
# Far more than these runs need; a hang is to fail with its output.
RUN_SECONDS_MAX = 120.0

NODES = "sn,cpu_milli,memory_mib,gpu,model\nn1,96000,393216,8,G2\nn2,64000,262144,2,T4\n"
TASKS = """\
name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,creation_time,deletion_time,scheduled_time
a,1000,1024,1,500,,0,100,0
b,1000,1024,1,810,T4,10,90,20
c,2000,2048,2,1000,,20,60,20
d,4000,1024,0,0,,30,40,30
e,8000,4096,8,1000,,50,200,60
"""


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (*BENCH, *arguments)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False
    )


def measured(*arguments: str) -> dict[str, Any]:
    done = bench(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    nodes, tasks = tmp_path / "nodes.csv", tmp_path / "tasks.csv"
    nodes.write_text(NODES)
    tasks.write_text(TASKS)
    return f"--nodes={nodes}", f"--tasks={tasks}"


def test_fleets_made_by_seed_are_played_by_every_policy_that_is_named() -> None:
    policies = ("--policy=fgd", "--policy=fragmentation", "--policy=random")
    found = measured(*policies, "--seeds=1-2", "--bound", "--jobs=2")
    assert list(found["policies"]) == ["fgd", "fragmentation", "random"]
    assert (found["protocol"], found["mix"], found["seeds"]) == ("fgd", "given", [1, 2])
    assert found["tasks"] is None
    for figures in found["policies"].values():
        for bound in ("allocated_at_100", "allocated_at_130"):
            mine = [each[bound] for each in figures["by_seed"]]
            most = [each[bound] for each in found["bound"]["by_seed"]]
            assert all(50 < one <= best for one, best in zip(mine, most, strict=True))
            assert figures[bound]["mean"] == pytest.approx(sum(mine) / 2)
        assert figures["first_loss_at"] <= found["bound"]["no_loss_at"]["mean"]
        assert figures["decisions_per_second"] > 0
    assert found["policies"]["random"]["better_than_fgd"]["seeds"] == 2
    assert found["machine"]["cores"] > 0


def test_on_large_fleets_the_loops_are_compiled_as_in_production() -> None:
    found = measured("--policy=fgd", "--seeds=1", "--copies=4", "--jobs=1")
    assert (found["gpus"] >= 1000, found["compiled"]) == (True, True)


def test_the_same_seed_gives_the_same_figures_whoever_plays_it(files: tuple[str, str]) -> None:
    def played(*more: str) -> list[Any]:
        found = measured(*files, "--policy=fgd", "--policy=random", *more)
        return [figures["by_seed"] for figures in found["policies"].values()]

    assert played("--seeds=1-3", "--jobs=1") == played("--seeds=1-3", "--jobs=3")


def test_files_are_played_in_copies_and_with_a_mix_that_is_learned(files: tuple[str, str]) -> None:
    found = measured(*files, "--policy=fragmentation", "--seeds=5", "--copies=3", "--learn")
    assert (found["nodes"], found["gpus"], found["tasks"]) == (6, 30, 15)
    assert found["mix"] == "learned"
    (run,) = found["policies"]["fragmentation"]["by_seed"]
    assert 30 <= run["allocated_at_130"] <= 100
    assert run["arrivals"] >= 15


def test_by_time_tasks_come_and_go(files: tuple[str, str]) -> None:
    found = measured(*files, "--protocol=timed", "--policy=bestfit", "--seeds=1-2")
    (figures,) = found["policies"].values()
    # Until 50: a half from 0, 810 from 10 (on T4), 2000 from 20, of 10 GPUs.
    offered = (500 * 50 + 810 * 40 + 2000 * 30) / (10_000 * 50)
    assert found["offered"] == pytest.approx(100 * offered)
    assert figures["allocated_mean"]["mean"] == pytest.approx(100 * offered)
    # All of n1 is not free when the last one comes.
    assert figures["refused"]["mean"] == pytest.approx(100 / 5)
    assert figures["refused_gpu_time"]["mean"] == pytest.approx(
        100 * 8 * 140 / (0.5 * 100 + 0.81 * 70 + 2 * 40 + 8 * 140)
    )
    assert figures["allocated_peak"]["mean"] == pytest.approx(33.1)


def test_without_json_there_is_a_line_for_every_policy(files: tuple[str, str]) -> None:
    done = bench(*files, "--policy=fgd", "--policy=spread", "--seeds=1")
    assert done.returncode == 0, done.stderr
    first, _, _, *rows = done.stdout.splitlines()
    assert first.startswith("2 nodes, 10 GPUs, 5 tasks; seed 1;")
    assert [row.split()[0] for row in rows[:2]] == ["fgd", "spread"]
    assert "fgd, seed 1: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policy=best",), "--policy: wanted all or one of"),
        (("--seeds=9-1",), "--seeds: wanted"),
        (("--copies=0",), "--copies: wanted at least 1 and at most 100, found 0"),
        (("--jobs=0",), "--jobs: wanted at least 1"),
        (("--bound", "--protocol=timed"), "--bound: wanted --protocol fgd"),
        (("--protocol=untimed",), "'untimed' is not one of"),
        (("--nodes=/nowhere.csv",), "/nowhere.csv"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(arguments: tuple[str, ...], said: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert said in line


def test_one_file_alone_is_refused(files: tuple[str, str]) -> None:
    done = bench(files[1])
    assert done.returncode == 2
    assert "--tasks: wanted --nodes beside it" in done.stderr


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        (TASKS + "f,1,1,1,1001,,,,\n", (), "line 7, column gpu_milli: wanted a whole number from"),
        (
            "name,cpu_milli,memory_mib,num_gpu,gpu_milli\na,1,1,1,500\n",
            ("--protocol=timed",),
            "wanted columns creation_time and deletion_time, found no task with both",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_told_before_anything_is_played(
    files: tuple[str, str], text: str, more: tuple[str, ...], said: str
) -> None:
    path = files[1].removeprefix("--tasks=")
    Path(path).write_text(text)
    done = bench(*files, *more)
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert path in line
    assert said in line
    assert "player" not in done.stderr


def test_an_end_from_outside_ends_the_players_too() -> None:
    process = subprocess.Popen(BENCH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "seed 42" in line:
            break
    players = psutil.Process(process.pid).children()
    assert players
    process.terminate()
    process.communicate(timeout=RUN_SECONDS_MAX)
    assert process.returncode == 128 + 15
    assert [player for player in players if player.is_running()] == []
