"""Checks the shape of the tree itself: parts, purity, length of files, forbidden words, help."""

import ast
import configparser
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("proto", "core", "agent", "aggregator", "client", "cli", "testing")
LINES_MAX = 500

# Longer than LINES_MAX, each for its reason.
LONG_FILES: dict[str, str] = {}

# Modules that do I/O. All others of these parts stand in the contract `pure` of .importlinter.
EDGES = {
    "core": {"clock", "config", "daemons", "local", "sdnotify"},
    "agent": {
        *("__main__", "config", "daemon", "desk", "driver", "journal", "link", "local"),
        "host_facts",
        *("processes", "procfs", "proctable", "sampler", "tenants", "wire", "words"),
        *("attribution.bridge", "attribution.holders", "attribution.kubernetes"),
        *("attribution.pod_names", "attribution.resolver", "attribution.slurm"),
        *("dcgm.bindings", "dcgm.driver", "dcgm.source"),
        *("doctor.__main__", "doctor.asking", "doctor.host", "doctor.kernel", "doctor.look"),
        *("doctor.roots", "doctor.services"),
        *("driver_host.__main__", "driver_host.frames", "driver_host.link", "driver_host.process"),
        *("helper.__main__", "helper.files", "helper.log", "helper.memory", "helper.server"),
        *("helper.driving", "helper.ending", "helper.partitions", "helper.standin"),
        *("helper.verbs", "kernel_log", "privileged"),
        *("mig.calls", "mig.child", "mig.declared", "mig.journal", "mig.library", "mig.looking"),
        *("mig.reading", "mig.stepping", "mig.worker"),
        *("metrics.exporter", "metrics.page_access", "metrics.page_server"),
        *("nvml.driver", "nvml.events", "nvml.gpm", "nvml.gpu", "nvml.links", "nvml.mig"),
        *("nvml.plan", "nvml.processes", "nvml.samples", "nvml.session"),
        *("simulated.card", "simulated.events", "simulated.fields", "simulated.gauges"),
        *("simulated.compute_instances", "simulated.gpu_instances", "simulated.handles"),
        *("simulated.instance_calls", "simulated.mig_state", "simulated.partitioning"),
        *("simulated.gpm", "simulated.health", "simulated.identity", "simulated.instances"),
        *("simulated.library", "simulated.links", "simulated.mig", "simulated.nvml"),
        *("simulated.processes", "simulated.samples", "simulated.scenario", "simulated.session"),
        "simulated.workloads",
    },
    "aggregator": {
        *("compiled", "__main__", "answers", "api", "config", "control", "exporter", "failures"),
        *("folder_lock", "health", "ledger", "malformed", "meters", "ports", "rpc", "server"),
        *("sessions", "store", "api_upkeep", "health_metrics", "health_report", "wire"),
        *("wire_fleet", "wire_health", "wire_allocations", "wire_requests", "api_services"),
        *("service_metrics", "wire_services", "api_rebalance", "wire_moves"),
        *("api_explain", "wire_explain"),
        *("api_mig", "mig_metrics", "partitioner", "relays", "wire_mig"),
    },
}

# Written so that no pattern finds itself.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.}])/(work|root|farm)\b"),
    "the number of an issue": re.compile(r"\bissues? #?\d", re.IGNORECASE),
    "work left undone": re.compile(r"\b(TO[D]O|FIX[M]E|X[X]X)\b"),
    "the host of a package registry": re.compile(r"\bpypi\.org|\bpythonhosted\.org|\bnpmjs\."),
}


def listed(*patterns: str) -> list[str]:
    """Files of the tree as git knows them, those not yet added too, deleted ones left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(name for name in done.stdout.splitlines() if (ROOT / name).is_file())


def is_generated(name: str) -> bool:
    return "_pb2" in name


def modules_of(part: str) -> set[str]:
    folder = ROOT / part / "stoker" / part
    paths = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py"))
    return {".".join(path.parts) for path in paths if path.name != "__init__"}


def pure_modules() -> set[str]:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    return set(contracts["importlinter:contract:pure"]["source_modules"].split())


def module_paths(module: str) -> list[Path]:
    _, part, *rest = module.split(".")
    path = ROOT.joinpath(part, "stoker", part, *rest)
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


@pytest.mark.parametrize("part", PARTS)
def test_part_holds_one_branch_of_the_namespace(part: str) -> None:
    branch = "v1" if part == "proto" else part
    files = listed(part)
    assert files
    assert [name for name in files if not name.startswith(f"{part}/stoker/{branch}/")] == []
    assert f"{part}/stoker/{branch}/py.typed" in files


def test_namespace_has_no_init_of_its_own() -> None:
    assert listed("*/stoker/__init__.py", "stoker/__init__.py") == []


@pytest.mark.parametrize("part", EDGES)
def test_every_module_is_pure_or_an_edge(part: str) -> None:
    prefix = f"stoker.{part}."
    pure = {name.removeprefix(prefix) for name in pure_modules() if name.startswith(prefix)}
    assert pure & EDGES[part] == set()
    assert pure | EDGES[part] == modules_of(part)


@pytest.mark.parametrize("module", sorted(pure_modules()))
def test_decisions_are_plain_functions(module: str) -> None:
    waiting = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    found = [
        f"{path.name}:{node.lineno}"
        for path in module_paths(module)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, waiting)
    ]
    assert found == []


def test_no_file_is_longer_than_one_story() -> None:
    lengths = {
        name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
        for name in listed("*.py", "*.proto", "*.sql", "scripts/*", "Makefile", ".ci/*")
        if not is_generated(name)
    }
    assert {name for name, length in lengths.items() if length > LINES_MAX} == LONG_FILES.keys()


@pytest.mark.parametrize("meaning", FORBIDDEN)
def test_no_file_says(meaning: str) -> None:
    found: list[str] = []
    # uv.lock names where each package comes from; that is what it is for.
    for name in set(listed()) - {"uv.lock", "LICENSE"}:
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text
        for number, line in enumerate(text.splitlines(), 1):
            if FORBIDDEN[meaning].search(line):
                found.append(f"{name}:{number}: {line.strip()[:120]}")
    assert sorted(found) == []


def test_make_help_lists_every_verb() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    verbs = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines()}
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert verbs.keys() == targets == set(phony[1].split())
    assert all(verbs.values()), "a verb without help"


def test_generated_code_says_so() -> None:
    generated = listed("proto/*_pb2*")
    sources = listed("proto/*.proto")
    assert len(generated) == 4 * len(sources) > 0  # messages and services, code and types
    heads = {name: (ROOT / name).read_text(encoding="utf-8")[:400].lower() for name in generated}
    assert [name for name, head in heads.items() if "do not edit" not in head] == []


def test_runtime_is_at_least_as_new_as_the_generators() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = project["project"]["dependencies"]
    tools = next(d for d in project["dependency-groups"]["dev"] if d.startswith("grpcio-tools=="))
    assert f"grpcio>={tools.removeprefix('grpcio-tools==')}" in wanted
    for name in listed("proto/*_pb2.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        version = re.search(r"^# Protobuf Python Version: (\S+)$", text, re.MULTILINE)
        assert version is not None
        assert f"protobuf>={version[1]}" in wanted


def test_scripts_can_be_run_and_parsed() -> None:
    scripts = [name for name in listed("scripts/*", ".ci/*") if not name.endswith(".py")]
    assert scripts
    for name in scripts:
        shell = (ROOT / name).read_text(encoding="utf-8").splitlines()[0].split("/")[-1].split()[-1]
        assert (ROOT / name).stat().st_mode & 0o111, f"{name} is not executable"
        subprocess.run([shell, "-n", ROOT / name], check=True)
