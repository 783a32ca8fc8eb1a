"""What the `stoker` command says to input that cannot be: exit code, one line, nothing taken."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from tests.support.daemons import Stage, free_nodes, stoker
from tests.support.ports import free_port

from stoker.client import AsyncFleet
from stoker.core.errors import ExitCode

pytestmark = pytest.mark.asyncio(loop_scope="module")

USAGE, REFUSED, NOT_FOUND = ExitCode.USAGE, ExitCode.REFUSED, ExitCode.NOT_FOUND


@dataclass(frozen=True, slots=True)
class Row:
    """A command line, its exit code, and words that its message has."""

    arguments: Sequence[str]
    code: ExitCode
    named: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


ROWS = {
    "unknown verb": Row(["aloc"], USAGE, ["aloc"]),
    "unknown option": Row(["alloc", "--gpu-count", "1"], USAGE, ["--gpu-count"]),
    "malformed size": Row(["alloc", "--memory", "20parsecs"], USAGE, ["memory", "20parsecs"]),
    "negative size": Row(["alloc", "--memory", "-1GiB"], USAGE, ["memory", "-1GiB"]),
    "no size": Row(["alloc", "--memory", "0"], USAGE, ["memory", "0"]),
    "negative TTL": Row(["alloc", "--ttl=-5s"], USAGE, ["ttl", "-5s"]),
    "TTL of nothing": Row(["alloc", "--ttl", "0s"], USAGE, ["ttl"]),
    "TTL that is a word": Row(["alloc", "--ttl", "forever"], USAGE, ["ttl", "forever"]),
    "malformed wait": Row(["alloc", "--wait=soon"], USAGE, ["wait", "soon"]),
    "no GPUs": Row(["alloc", "--gpus", "0"], USAGE, ["gpus", "0"]),
    "GPUs that are no number": Row(["alloc", "--gpus", "many"], USAGE, ["gpus", "many"]),
    "gang with memory": Row(
        ["alloc", "--gpus", "2", "--memory", "1GiB"], USAGE, ["gpus", "memory", "2"]
    ),
    "unknown GPU model": Row(["alloc", "--model", "H100-80BG"], USAGE, ["H100-80BG", "H100-80GB"]),
    "model that no node has": Row(["alloc", "--model", "B200"], REFUSED, ["B200", "T4"]),
    "label without a value": Row(["alloc", "--label", "job"], USAGE, ["--label", "job"]),
    "label too long": Row(["alloc", "--label", "job=" + "x" * 300], USAGE, ["job", "256"]),
    "too many labels": Row(
        ["alloc", *(f"--label=key{number}=x" for number in range(65))], USAGE, ["labels", "64"]
    ),
    "holder with a line break": Row(["alloc", "--holder", "a\nb"], USAGE, ["holder"]),
    "holder that is not UTF-8": Row(["alloc", "--holder", "a\udcff"], USAGE, ["holder", "UTF-8"]),
    "node that is not there": Row(["alloc", "--node", "node-z"], REFUSED, ["node"]),
    "command that is not there": Row(
        ["alloc", "--", "no-such-command"], USAGE, ["no-such-command"]
    ),
    "release of nobody's": Row(["release", "nobody"], NOT_FOUND, ["nobody"]),
    "release of nothing": Row(["release"], USAGE, ["ID"]),
    "why of nobody's": Row(["why", "nobody"], NOT_FOUND, ["nobody"]),
    "why of nothing": Row(["why"], USAGE, ["ID"]),
    "why of both": Row(["why", "a-1", "--gpus", "2"], USAGE, ["a-1", "options"]),
    "place that is meant": Row(["place", "--gpus", "1"], USAGE, ["--dry-run", "alloc"]),
    "supposition that nobody understands": Row(
        ["place", "--dry-run", "--what-if", "drain node-a"], USAGE, ["--what-if", "drain node-a"]
    ),
    "supposition about nobody": Row(
        ["place", "--dry-run", "--what-if", "remove node-z"], USAGE, ["what_if[0]", "node-z"]
    ),
    "supposition with an unknown model": Row(
        ["place", "--dry-run", "--what-if", "add 2xH100-80BG"], USAGE, ["what_if[0]", "H100-80GB"]
    ),
    "cordon of nobody": Row(["cordon", "node-z", "--reason", "x"], NOT_FOUND, ["node-z"]),
    "cordon without a reason": Row(["cordon", "node-a"], USAGE, ["--reason"]),
    "cordon of a GPU that cannot be": Row(
        ["cordon", "node-a", "--gpu", "first", "--reason", "x"], USAGE, ["--gpu", "first", "UUID"]
    ),
    "cordon of a GPU that is not there": Row(
        ["cordon", "node-a", "--gpu", "7", "--reason", "x"], NOT_FOUND, ["GPU 7", "node-a", "0"]
    ),
    "cordon of a GPU of nobody": Row(
        ["cordon", "node-z", "--gpu", "0", "--reason", "x"], NOT_FOUND, ["node-z"]
    ),
    "drain of nobody": Row(["drain", "node-z", "--reason", "x"], NOT_FOUND, ["node-z"]),
    "drain without a reason": Row(["drain", "node-a"], USAGE, ["--reason"]),
    "drain with a word for a grace": Row(
        ["drain", "node-a", "--reason", "x", "--grace", "lunch"], USAGE, ["--grace", "lunch"]
    ),
    "malformed address": Row(["--address", "a:b:c", "status"], USAGE, ["a:b:c", "HOST:PORT"]),
    "malformed address in a variable": Row(
        ["status"], USAGE, ["STOKER_ADDRESS", "::"], {"STOKER_ADDRESS": "::"}
    ),
    "nobody there": Row(
        ["--address", f"127.0.0.1:{free_port()}", "status"], ExitCode.UNREACHABLE, ["127.0.0.1:"]
    ),
    "agent that is not there": Row(
        ["agent", "status", "--socket", "/nowhere/agent.sock"],
        ExitCode.UNREACHABLE,
        ["/nowhere/agent.sock: not there"],
    ),
    "agent that is not there, by a variable": Row(
        ["agent", "release"],
        ExitCode.UNREACHABLE,
        ["/nowhere/agent.sock: not there"],
        {"STOKER_AGENT_SOCKET": "/nowhere/agent.sock"},
    ),
    "socket that is a folder": Row(
        ["agent", "status", "--socket", "/"], USAGE, ["--socket", "directory"]
    ),
    "socket with a path too long": Row(
        ["agent", "status", "--socket", f"/{'s' * 107}"], USAGE, ["108 bytes", "107"]
    ),
    "release for no time": Row(["agent", "release", "--for", "0s"], USAGE, ["--for", "0s"]),
    "release for less than no time": Row(
        ["agent", "release", "--for=-5m"], USAGE, ["--for", "-5m"]
    ),
    "release for a word": Row(["agent", "release", "--for", "lunch"], USAGE, ["--for", "lunch"]),
    "release for an age": Row(["agent", "release", "--for", "520000w"], USAGE, ["--for", "years"]),
    "profiler's pause for a word": Row(
        ["agent", "profiling", "pause", "--for", "lunch"], USAGE, ["--for", "lunch"]
    ),
    "faults of a GPU that cannot be": Row(
        ["agent", "set-healthy", "all"], USAGE, ["GPU", "all", "UUID"]
    ),
    "agent of another machine": Row(
        ["--address", "10.0.0.1:7070", "agent", "release"], USAGE, ["--address", "--socket"]
    ),
    "GPUs to simulate that are none": Row(["up", "--simulate", "8xT5000"], USAGE, ["T5000"]),
    "more nodes than can be": Row(["up", "--nodes", "0"], USAGE, ["nodes", "0"]),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[AsyncFleet]:
    """A fleet with one node of one GPU."""
    async with Stage(tmp_path_factory.mktemp("door")) as stage:
        await stage.aggregator().start()
        await stage.agent("node-a", "1xT4").start()
        async with stage.fleet() as fleet:
            await free_nodes(fleet, 1)
            yield fleet


@pytest.mark.parametrize("name", ROWS)
async def test_command_refuses(name: str, fleet: AsyncFleet) -> None:
    row = ROWS[name]
    before = (await fleet.allocations(include_ended=True)).resource_version
    done = stoker(*row.arguments, environment={"STOKER_ADDRESS": fleet.address, **row.environment})
    assert done.returncode == row.code, done
    assert [word for word in row.named if word not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert len(done.stderr) < 1000
    assert done.stdout == ""
    assert (await fleet.allocations(include_ended=True)).resource_version == before


async def test_with_json_the_error_is_json_too(fleet: AsyncFleet) -> None:
    done = stoker("alloc", "--gpus", "2", "--json", "--address", fleet.address)
    assert done.returncode == REFUSED
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == REFUSED
    (refusal,) = error["refusals"]
    assert refusal["node"] == "node-a"
    assert refusal["filter"] == "gpus_total"
    assert (refusal["wanted"], refusal["found"]) == ("2", "1")


@pytest.mark.parametrize("verb", [["why"], ["place", "--dry-run"]])
async def test_what_cannot_be_placed_ends_with_its_own_code(
    verb: list[str], fleet: AsyncFleet
) -> None:
    environment = {"STOKER_ADDRESS": fleet.address}
    refused = stoker(*verb, "--gpus", "2", "--json", environment=environment)
    assert refused.returncode == REFUSED, refused
    told = json.loads(refused.stdout)
    assert not told["placeable"]
    assert told["change"]["kind"] == "fewer_gpus"
    assert told["change"]["request"]["gpus"] == 1
    placed = stoker(*verb, "--gpus", "1", "--json", environment=environment)
    assert placed.returncode == ExitCode.OK, placed
    told = json.loads(placed.stdout)
    assert told["placeable"]
    assert [each["node"] for each in told["placements"]] == ["node-a"]
    assert told["choice"].startswith("policy ")


async def test_what_is_supposed_is_not_done(fleet: AsyncFleet) -> None:
    environment = {"STOKER_ADDRESS": fleet.address}
    supposed = ("--what-if", "remove node-a", "--what-if", "add 2 nodes 8xH100-80GB")
    placed = stoker(
        *("place", "--dry-run", "--nodes", "2", "--gpus", "8", *supposed), environment=environment
    )
    assert placed.returncode == ExitCode.OK, placed
    assert "new-1" in placed.stdout
    assert "new-2" in placed.stdout
    assert [node.name for node in (await fleet.nodes()).nodes] == ["node-a"]
