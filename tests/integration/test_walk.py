"""A newcomer's walk: bring a fleet up, ask for GPUs, be refused, be told why, give them back."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.daemons import Stage, python_module, run_command, stoker
from tests.support.up import stoker_up
from tests.support.waiting import until

from stoker.core.errors import ExitCode

MODEL = "NVIDIA H100 80GB HBM3"

Run = Callable[..., tuple[int, Any]]


def runner(address: str) -> Run:
    """Return what runs a verb with --json and gives its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, Any]:
        verb, *rest = arguments
        done = stoker(verb, "--json", "--address", address, *rest)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout)

    return run


async def test_walk(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        up = stoker_up(stage, "--simulate", "8xH100-80GB")
        await up.ready()
        run = runner(up.address)

        code, status = run("status")
        assert code == ExitCode.OK
        (node,) = status["nodes"]
        assert (node["state"], node["simulated"]) == ("ready", True)
        assert node["name"]
        assert node["last_sample_at"] > 0
        assert len({gpu["uuid"] for gpu in node["gpus"]}) == 8
        for gpu in node["gpus"]:
            assert gpu["uuid"].startswith("GPU-")
            assert gpu["model"] == MODEL
            assert gpu["memory_total_bytes"] == 81559 * 2**20
            assert 0 <= gpu["memory_used_bytes"] <= gpu["memory_total_bytes"]
            assert 0 <= gpu["utilization_ratio"] <= 1
            assert 10 < gpu["temperature_celsius"] < 100
            assert 20 < gpu["power_watts"] < 800
            assert gpu["last_sample_at"] > 0
        assert status["allocations"] == []
        # For a person the simulation is plain to see.
        shown = stoker("status", "--address", up.address).stdout
        assert "SIMULATED" in shown.splitlines()[0]

        code, first = run("alloc", "--gpus", "1")
        assert code == ExitCode.OK
        assert first["node"] == node["name"]
        (device,) = first["devices"]
        assert device["uuid"] in {gpu["uuid"] for gpu in node["gpus"]}
        assert first["env"]["CUDA_VISIBLE_DEVICES"] == device["uuid"]
        assert first["expires_at"] > first["granted_at"]

        code, status = run("status")
        assert [each["id"] for each in status["allocations"]] == [first["id"]]

        # Eight are there, the ninth is refused, with the reason of each node.
        code, rest = run("alloc", "--gpus", "7")
        assert code == ExitCode.OK
        assert len({each["uuid"] for each in rest["devices"]} | {device["uuid"]}) == 8
        code, refused = run("alloc", "--gpus", "1")
        assert code == ExitCode.REFUSED
        (reason,) = refused["error"]["refusals"]
        assert (reason["node"], reason["filter"]) == (node["name"], "gpus_free")
        assert reason["reason"]

        code, released = run("release", first["id"])
        assert code == ExitCode.OK
        assert [each["state"] for each in released["allocations"]] == ["ended"]
        code, again = run("alloc", "--gpus", "1")
        assert code == ExitCode.OK
        assert again["devices"] == first["devices"]


async def test_waiting_is_explained_and_ends(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        up = stoker_up(stage, "--simulate", "2xT4")
        await up.ready()
        run = runner(up.address)
        _, both = run("alloc", "--gpus", "2")
        waiting = stage.verb("alloc", "--json", "--gpus", "1", "--wait", "1h")
        waiting.spawn()

        async def is_listed() -> str | None:
            _, status = run("status")
            ids = [each["id"] for each in status["allocations"] if each["state"] == "waiting"]
            return ids[0] if ids else None

        id_ = await until("the request to wait", is_listed)
        code, why = run("why", id_)
        assert code == ExitCode.OK
        assert why["placeable"] is False
        assert why["allocation"]["queue_position"] == 1
        assert [each["filter"] for each in why["refusals"]["nodes"]] == ["gpus_free"]
        assert id_ in waiting.log  # its user is told under which id it waits

        run("release", both["id"])
        assert await waiting.ended() == ExitCode.OK
        assert f'"id": "{id_}"' in waiting.log


async def test_cordoned_node_takes_nothing_new(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        up = stoker_up(stage, "--simulate", "2xT4")
        await up.ready()
        run = runner(up.address)
        _, status = run("status")
        (node,) = status["nodes"]
        _, before = run("alloc", "--gpus", "1")
        code, _ = run("cordon", node["name"], "--reason", "fan is loud")
        assert code == ExitCode.OK
        code, refused = run("alloc", "--gpus", "1")
        assert code == ExitCode.REFUSED
        (reason,) = refused["error"]["refusals"]
        assert reason["filter"] == "cordoned"
        assert "fan is loud" in reason["reason"]
        _, status = run("status")
        assert [each["id"] for each in status["allocations"]] == [before["id"]]
        assert status["nodes"][0]["cordoned"] == "fan is loud"
        run("uncordon", node["name"])
        code, _ = run("alloc", "--gpus", "1")
        assert code == ExitCode.OK


async def test_command_runs_on_exactly_its_gpus(tmp_path: Path) -> None:
    script = "import os; print(os.environ['CUDA_VISIBLE_DEVICES']); raise SystemExit(7)"
    async with Stage(tmp_path) as stage:
        up = stoker_up(stage, "--simulate", "2xT4")
        await up.ready()
        run = runner(up.address)
        _, status = run("status")
        uuids = [gpu["uuid"] for gpu in status["nodes"][0]["gpus"]]
        done = stoker(
            *("alloc", "--address", up.address, "--gpus", "2"),
            *("--", sys.executable, "-c", script),
        )
        assert done.returncode == 7
        assert sorted(done.stdout.strip().split(",")) == sorted(uuids)
        _, status = run("status")
        assert status["allocations"] == []


async def test_signal_ends_the_command_and_gives_the_gpus_back(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        up = stoker_up(stage, "--simulate", "2xT4")
        await up.ready()
        run = runner(up.address)
        command = stage.verb("alloc", "--", "sleep", "1000")
        command.spawn()

        async def is_running() -> bool:
            children = psutil.Process(command.process.pid).children()
            return any(child.name() == "sleep" for child in children)

        await until("the command to run", is_running)
        _, status = run("status")
        assert [each["state"] for each in status["allocations"]] == ["granted"]
        command.process.send_signal(signal.SIGTERM)
        assert await command.ended() == 128 + signal.SIGTERM
        _, status = run("status")
        assert status["allocations"] == []


@pytest.mark.tmpfs  # it needs the same right: to mount
async def test_command_of_another_host_is_refused(tmp_path: Path) -> None:
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("00000000-0000-4000-8000-000000000000\n", encoding="ascii")
    elsewhere = (
        *("unshare", "--mount", "--propagation", "private", "sh", "-c"),
        'mount --bind "$1" /proc/sys/kernel/random/boot_id && shift && exec "$@"',
        *("sh", str(boot_id)),
    )
    async with Stage(tmp_path) as stage:
        up = stoker_up(stage, "--simulate", "2xT4")
        await up.ready()
        alloc = [*python_module("stoker.cli"), "alloc", "--address", up.address]
        done = run_command(*elsewhere, *alloc, "--json", "--", "true")
        assert done.returncode == ExitCode.REFUSED, done
        (reason,) = json.loads(done.stdout)["error"]["refusals"]
        assert reason["filter"] == "host"
        assert boot_id.read_text(encoding="ascii").strip() in reason["wanted"]
        # What runs nothing may be anywhere.
        assert run_command(*elsewhere, *alloc).returncode == ExitCode.OK
