"""Proves a built wheel: complete, importable with each extra alone, and both daemons start from it.

Every environment is fresh and gets the versions of uv.lock, so what is proved is what was tested.
"""

import argparse
import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = ROOT / ".uv/bin/uv"
PARTS = ("proto", "core", "agent", "aggregator", "client", "cli", "testing")

# What an extra promises: these packages import with nothing else installed.
PROMISES = {
    "agent": ("stoker.core", "stoker.v1", "stoker.agent"),
    "aggregator": ("stoker.core", "stoker.v1", "stoker.aggregator"),
    "client": ("stoker.core", "stoker.v1", "stoker.client"),
    "all": (
        *("stoker.core", "stoker.v1", "stoker.agent", "stoker.aggregator"),
        *("stoker.client", "stoker.cli", "stoker.testing"),
    ),
}

# Runs in the fresh environment, which has no part of this tree on its path.
IMPORT_ALL = """
import importlib, pkgutil, sys
count = 0
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
        count += 1
print(count)
"""

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dist", type=Path, help="folder that holds exactly one wheel")
    dist: Path = parser.parse_args().dist
    (wheel,) = dist.resolve().glob("*.whl")
    check_complete(wheel)
    with tempfile.TemporaryDirectory(prefix="stoker-smoke-") as folder:
        work = Path(folder)
        constraints = work / "constraints.txt"
        exported = run(
            *(UV, "export", "--quiet", "--frozen", "--extra", "all", "--no-dev"),
            *("--no-emit-project", "--no-hashes"),
        )
        constraints.write_text(exported, encoding="utf-8")
        for extra, packages in PROMISES.items():
            home = work / extra
            run(UV, "venv", "--quiet", "--python", sys.executable, home)
            run(
                *(UV, "pip", "install", "--quiet", "--python", home / "bin/python"),
                *("--constraints", constraints, f"{wheel}[{extra}]"),
            )
            count = run(home / "bin/python", "-I", "-c", IMPORT_ALL, *packages, cwd=work).strip()
            print(f"stoker[{extra}]: {count} modules of {', '.join(packages)} import")
        check_daemons(work / "all/bin", work)


def check_complete(wheel: Path) -> None:
    """Every file of the source roots is in the wheel: a wrong setting empties it silently."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *PARTS)
    wanted = {name.split("/", 1)[1] for name in listed.splitlines() if (ROOT / name).exists()}
    with zipfile.ZipFile(wheel) as archive:
        lacking = wanted - set(archive.namelist())
    if lacking:
        sys.exit(f"{wheel.name} lacks {len(lacking)} files, such as {min(lacking)}")
    print(f"{wheel.name}: all {len(wanted)} files of {', '.join(PARTS)}")


def check_daemons(programs: Path, work: Path) -> None:
    """Starts an aggregator and a simulated agent, waits for the node, stops both with SIGTERM."""
    for name in ("stoker", "stoker-agent", "stoker-aggregator"):
        print(run(programs / name, "--version", cwd=work).strip())
    # It knows no version: what would tell it one is larger than all of it.
    print(run(programs / "stoker-agent-helper", "--help", cwd=work).splitlines()[0])
    address = f"127.0.0.1:{free_port()}"
    aggregator = (
        *(programs / "stoker-aggregator", "--data-dir", work / "aggregator-data"),
        *("--listen", address, "--metrics-listen", f"127.0.0.1:{free_port()}"),
    )
    agent = (
        *(programs / "stoker-agent", "--simulate", "2xT4", "--aggregator", address),
        *("--data-dir", work / "agent-data", "--metrics-listen", "127.0.0.1:0"),
    )
    with daemon(work, *aggregator) as is_aggregator_up, daemon(work, *agent) as is_agent_up:
        deadline = time.monotonic() + START_SECONDS_MAX
        while (node := first_node(programs, address)) is None:
            if not (is_aggregator_up() and is_agent_up()) or time.monotonic() > deadline:
                sys.exit("no node showed in `stoker status`: the daemons' output is above")
            time.sleep(0.5)
    print(f"both daemons ran: node {node} was seen by `stoker status`")


def first_node(programs: Path, address: str) -> str | None:
    command = (programs / "stoker", "--address", address, "status", "--json")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    nodes = json.loads(done.stdout)["nodes"]
    return str(nodes[0]["name"]) if nodes and nodes[0]["gpus"] else None


@contextlib.contextmanager
def daemon(work: Path, *command: str | Path) -> Generator[Callable[[], bool]]:
    """Runs a daemon; it must end with status 0 within STOP_SECONDS_MAX of SIGTERM."""
    name = Path(command[0]).name
    is_content = False
    with (work / f"{name}.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=work)
        try:
            yield lambda: process.poll() is None
            is_content = True
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            if status != 0 or not is_content:
                log.seek(0)
                print(f"--- {name} ended with {status}:", log.read(), sep="\n", file=sys.stderr)
        if status != 0:
            sys.exit(f"{name} ended with {status} after SIGTERM")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode != 0:
        words = " ".join(str(word) for word in command)
        sys.exit(f"{words}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
