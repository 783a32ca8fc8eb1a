"""Generates the Python of proto/stoker/v1 from its .proto files, or checks what is committed.

The generators are pinned in pyproject.toml: the same .proto files give the same bytes everywhere.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "proto"
PACKAGE = Path("stoker/v1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only, change nothing")
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = generated_files(Path(folder))
    committed = generated_files(SOURCE)
    differences = compare(committed, fresh)
    for difference in differences:
        print(difference, file=sys.stderr)
    if check:
        if differences:
            print("generated code and .proto files differ: run `make proto`", file=sys.stderr)
        return 1 if differences else 0
    for name in committed.keys() - fresh.keys():
        (SOURCE / name).unlink()
    for name, content in fresh.items():
        if committed.get(name) != content:
            (SOURCE / name).write_bytes(content)
    return 0


def generate(target: Path) -> None:
    """Writes messages, services and their typed stubs for every .proto file under `target`."""
    names = sorted(str(path.relative_to(SOURCE)) for path in (SOURCE / PACKAGE).glob("*.proto"))
    if not names:
        sys.exit(f"no .proto file in {SOURCE / PACKAGE}")
    # protoc finds the mypy plugins by name on PATH; they lie beside this interpreter.
    beside = str(Path(sys.executable).parent)
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{SOURCE}"]
    command += [f"--python_out={target}", f"--grpc_python_out={target}"]
    command += [f"--mypy_out=quiet:{target}", f"--mypy_grpc_out=quiet:{target}"]
    environment = {**os.environ, "PATH": os.pathsep.join([beside, os.environ["PATH"]])}
    done = subprocess.run([*command, *names], env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"protoc refused {', '.join(names)}: see above")


def generated_files(root: Path) -> dict[Path, bytes]:
    """What was generated below `root`, by path from there."""
    found = (root / PACKAGE).glob("*_pb2*.py*")
    return {path.relative_to(root): path.read_bytes() for path in found}


def compare(committed: Mapping[Path, bytes], fresh: Mapping[Path, bytes]) -> list[str]:
    """One line for each file that differs, in order of name."""
    lines = [f"proto/{name}: no .proto file gives it" for name in committed.keys() - fresh.keys()]
    for name, content in fresh.items():
        if name not in committed:
            lines.append(f"proto/{name}: new")
        elif committed[name] != content:
            lines.append(f"proto/{name}: changed")
    return sorted(lines)


if __name__ == "__main__":
    sys.exit(main())
