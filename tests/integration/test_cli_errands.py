"""Commands as `alloc` runs them: variables, exit codes, and the end when GPUs are lost."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from tests.support.waiting import until_true

from stoker.cli.errands import Errand

SLOW = """trap 'sleep 0.2; exit 9' TERM; : > "$MARK"; while :; do sleep 0.05; done"""
STUBBORN = """trap '' TERM; : > "$MARK"; while :; do sleep 0.05; done"""


async def test_command_has_our_variables_and_those_of_its_allocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "1")
    seen = tmp_path / "seen"
    script = f'echo "$OURS $CUDA_VISIBLE_DEVICES" > {seen}'
    assert await Errand(["sh", "-c", script]).run({"CUDA_VISIBLE_DEVICES": "GPU-1"}) == 0
    assert seen.read_text(encoding="utf-8") == "1 GPU-1\n"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("script", "code"), [("exit 7", 7), ("kill -TERM $$", 128 + 15), ("exit 255", 255)]
)
async def test_exit_code_is_the_commands(script: str, code: int) -> None:
    assert await Errand(["sh", "-c", script]).run({}) == code


async def test_command_that_will_not_end_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    errand = Errand(["sh", "-c", STUBBORN], grace_seconds=0.0)
    run = asyncio.create_task(errand.run({"MARK": str(mark)}))
    await until_true("the command to ignore SIGTERM", mark.exists)
    errand.forward(signal.SIGTERM)
    errand.stop()
    assert await run == 128 + signal.SIGKILL


async def test_nothing_to_signal_before_it_runs() -> None:
    errand = Errand(["true"])
    errand.forward(signal.SIGTERM)
    errand.stop()
    assert await errand.run({}) == 0


async def test_command_that_is_asked_to_end_may_take_its_time(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    errand = Errand(["sh", "-c", SLOW], grace_seconds=0.0)
    errand.end()  # it does not run yet
    run = asyncio.create_task(errand.run({"MARK": str(mark)}))
    await until_true("the command to be ready", mark.exists)
    errand.end()
    assert await run == 9
