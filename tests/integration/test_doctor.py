"""Broken hosts and what `stoker agent doctor` says of them: whole pages, as golden files.

Each host is a folder of real files; the looks are made by the real process, the driver is asked by
a real driver host of the simulated driver, the agent over a real socket.
"""

import contextlib
import fcntl
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as replaced
from tests.conftest import Golden
from tests.support.doctor_hosts import (
    GPUS,
    KERNEL,
    OLDER,
    VERSION,
    Host,
    address,
    answering,
    facts,
    healthy,
    library,
    well,
    with_gpu,
)

from stoker.agent.doctor import look as looking
from stoker.agent.doctor.checkup import examine, summarize, worst
from stoker.agent.doctor.findings import Finding, Status
from stoker.agent.doctor.look import look
from stoker.agent.doctor.observed import Observed, Unseen
from stoker.agent.processes import start
from stoker.cli import render_doctor, screen
from stoker.cli.doctor import document
from stoker.core import local
from stoker.core.local import DriverCall, DriverFacts, HolderFacts, LinkFacts, ReleaseFacts

WIDTH = 110

# No agent is there; the unit is told by systemd.
NOBODY = "nobody"
SILENT = "silent"
Agent = local.Status | str


def unload(host: Host) -> None:
    host.remove("/proc/driver/nvidia/version")
    host.write("/proc/modules", "ext4 4096 0 - Live 0x0000000000000000\n")


def new_kernel(host: Host) -> None:
    unload(host)
    host.write(f"/lib/modules/{KERNEL}/modules.dep", "kernel/fs/ext4/ext4.ko.zst:\n")
    for index in range(GPUS):
        host.remove(f"/sys/bus/pci/devices/{address(index)}/driver")


def take_by_nouveau(host: Host) -> None:
    unload(host)
    host.write("/proc/modules", "nouveau 4096 0 - Live 0x0000000000000000\n")
    for index in range(GPUS):
        host.device(address(index), "0x030200", "nouveau")
        host.remove(f"/dev/nvidia{index}")


def upgrade(host: Host) -> None:
    library(host, "590.44.01")
    host.scenario = {"faults": [{"fault": "fail", "error": "LIB_RM_VERSION_MISMATCH"}]}


def close_devices(host: Host) -> None:
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0", "nvidia1", "nvidia2", "nvidia3"):
        (host.root / "dev" / name).chmod(0o660)
    host.scenario = {"faults": [{"fault": "fail", "error": "NO_PERMISSION"}]}


def fall_off(host: Host) -> None:
    config = host.root / f"sys/bus/pci/devices/{address(2)}/config"
    config.write_bytes(b"\xff" * 64)
    host.scenario = {"faults": [{"fault": "lose", "gpu": 2}]}
    host.say(
        (720, f"NVRM: Xid (PCI:{address(2)[:-2]}): 79, pid=1234, name=python3, GPU has fallen off"),
        (720, f"NVRM: GPU {address(2)}: GPU has fallen off the bus."),
    )


def vanish(host: Host) -> None:
    host.scenario = {"faults": [{"fault": "vanish", "gpu": 3}]}


def leave_bus(host: Host) -> None:
    vanish(host)
    host.remove(f"/sys/bus/pci/devices/{address(3)}")


def hang(host: Host) -> None:
    host.scenario = {"faults": [{"fault": "hang", "function": "nvmlInitWithFlags"}]}
    host.scenario["faults"].append({"fault": "hang", "function": "nvmlInit"})
    host.call_seconds = 1.0


def hang_on_one(host: Host) -> None:
    host.scenario = {
        "faults": [{"fault": "hang", "gpu": 1, "function": "nvmlDeviceGetTemperatureV"}]
    }
    host.call_seconds = 1.0


def pend_mig(host: Host) -> None:
    host.scenario = {
        "mig": [{"gpu": 0, "devices": []}, {"gpu": 3, "devices": ["3g.40gb"]}],
        **facts((2, "mig_mode_pending", 1)),
    }
    (host.root / "proc/driver/nvidia/capabilities/gpu3/mig/gi2/ci0").mkdir(parents=True)
    (host.root / "proc/driver/nvidia/capabilities/gpu3/mig/gi5").mkdir(parents=True)


def without_persistence(host: Host) -> None:
    host.scenario = dict(facts(*((index, "persistence_mode", 0) for index in range(GPUS))))
    host.units["nvidia-persistenced"] = "LoadState=loaded ActiveState=inactive SubState=dead"
    host.systemd()


def add_switches(host: Host) -> None:
    for bus in (0xC1, 0xC2, 0xC3, 0xC4):
        host.device(f"0000:{bus:02x}:00.0", "0x068000", "nvidia-nvswitch")
    host.program("/usr/bin/nv-fabricmanager", f"Fabric Manager version is : {VERSION}")


def stop_fabric(host: Host) -> None:
    add_switches(host)
    failed = "LoadState=loaded ActiveState=failed SubState=failed Result=exit-code"
    host.units["nvidia-fabricmanager"] = failed
    host.systemd()


def age_fabric(host: Host) -> None:
    add_switches(host)
    host.program("/usr/bin/nv-fabricmanager", f"Fabric Manager version is : {OLDER}")


def forget_runtime(host: Host) -> None:
    host.write("/etc/docker/daemon.json", '{"log-driver": "journald"}')
    host.program("/usr/bin/containerd", "")
    host.write("/etc/containerd/config.toml", "version = 2\n[plugins]\n")


def age_cdi(host: Host) -> None:
    host.write(
        "/etc/cdi/nvidia.yaml",
        "kind: nvidia.com/gpu\ncontainerEdits:\n  mounts:\n"
        f"  - hostPath: /usr/lib/x86_64-linux-gnu/libcuda.so.{OLDER}\n",
    )


def unlink_char(host: Host) -> None:
    host.remove("/dev/char/195:255")


def tell_xids(host: Host) -> None:
    pci = address(1)[:-2]
    host.say(
        (150_000, f"NVRM: Xid (PCI:{pci}): 119, Timeout after 6s of waiting for RPC response"),
        (5400, f"NVRM: Xid (PCI:{address(0)[:-2]}): 13, Graphics Exception: ESR 0x50ce48=0x1"),
        (1200, f"NVRM: Xid (PCI:{pci}): 48, pid='<unknown>', name=<unknown>, DBE on FBPA 3"),
        (600, f"NVRM: Xid (PCI:{pci}): 79, pid=1234, name=python3, GPU has fallen off the bus."),
    )


def fail_remap(host: Host) -> None:
    host.scenario = dict(
        facts(
            (1, "remapped_rows_failed", 1),
            (1, "ecc_uncorrected_volatile_errors", 3),
            (2, "remapped_rows_pending", 1),
        )
    )


def hide(host: Host) -> None:
    host.remove("/dev/kmsg")


def as_it_is(host: Host) -> None:
    pass


def die(host: Host) -> None:
    host.units["stoker-agent"] = "LoadState=loaded ActiveState=failed Result=signal"
    host.systemd()


def empty(host: Host) -> None:
    unload(host)
    for index in range(GPUS):
        host.remove(f"/sys/bus/pci/devices/{address(index)}")
        host.remove(f"/dev/nvidia{index}")


def crowd_out(host: Host) -> None:
    """The session is refused as in a container whose rights are gone."""
    host.write("/.dockerenv", "")
    host.remove("/run/systemd")
    host.scenario = {"faults": [{"fault": "fail", "error": "UNKNOWN"}]}


BLIND = (
    "kernel log: helper at /run/stoker/helper.sock: nothing is there",
    "holders of device files: helper at /run/stoker/helper.sock: nothing is there",
    "Slurm's variables: helper at /run/stoker/helper.sock: nothing is there",
)
LOST = with_gpu(
    well(),
    2,
    is_read=False,
    reason="GPU_IS_LOST",
    verdict="unhealthy",
    action="reboot",
    faults=("Xid 79: GPU has fallen off the bus",),
)
HELD = replaced(
    with_gpu(well(), 3, memory_unattributed_bytes=40 * 2**30),
    users=replaced(
        well().users,
        holders=(
            HolderFacts(31337, "eve", "python3 serve.py", ("/dev/nvidia3",), "unit serve.service"),
        ),
    ),
)
HUNG = replaced(
    well(),
    driver=DriverFacts(
        "blocked",
        "nvmlDeviceGetPowerUsage has not returned within 1 s",
        1_799_999_980.0,
        4243,
        DriverCall("nvmlDeviceGetPowerUsage", 1),
        1,
        0,
        1,
        0,
    ),
)
RELEASED = replaced(
    well(),
    driver=DriverFacts("released", "", 1_799_999_000.0, None, None, 1, 0, 0, 0),
    release=ReleaseFacts(at=1_799_999_000.0, until=1_800_000_600.0, by="root"),
)
REMAP = with_gpu(
    with_gpu(
        well(),
        1,
        verdict="unhealthy",
        action="rma",
        faults=("a memory row could not be remapped", "3 uncorrected memory errors"),
    ),
    2,
    verdict="degraded",
    action="reset_gpu",
    faults=("a memory row is remapped at the next reset",),
)


@dataclass(frozen=True, slots=True)
class Row:
    """What is wrong, what the agent says, and which exit code that is."""

    breaks: Callable[[Host], None]
    code: Status
    agent: Agent = NOBODY


ROWS: dict[str, Row] = {
    "healthy": Row(as_it_is, Status.OK, well()),
    "no-gpu": Row(empty, Status.UNKNOWN),
    "driver-not-loaded": Row(unload, Status.CRITICAL),
    "kernel-without-module": Row(new_kernel, Status.CRITICAL),
    "nouveau": Row(take_by_nouveau, Status.CRITICAL),
    "library-mismatch": Row(upgrade, Status.CRITICAL),
    "devices-not-permitted": Row(close_devices, Status.CRITICAL, well()),
    "gpu-fallen-off": Row(fall_off, Status.CRITICAL, LOST),
    "gpu-not-counted": Row(vanish, Status.CRITICAL),
    "gpu-gone-from-bus": Row(leave_bus, Status.CRITICAL, well()),
    "driver-hangs": Row(hang, Status.CRITICAL),
    "driver-hangs-on-one": Row(hang_on_one, Status.CRITICAL),
    "agent-hangs-in-driver": Row(as_it_is, Status.CRITICAL, HUNG),
    "released": Row(as_it_is, Status.WARNING, RELEASED),
    "mig-pending": Row(pend_mig, Status.WARNING, well()),
    "persistence-off": Row(without_persistence, Status.WARNING, well()),
    "fabric-manager-stopped": Row(stop_fabric, Status.CRITICAL, well()),
    "fabric-manager-older": Row(age_fabric, Status.CRITICAL, well()),
    "fabric-manager": Row(add_switches, Status.OK, well()),
    "containers-without-runtime": Row(forget_runtime, Status.WARNING, well()),
    "cdi-outdated": Row(age_cdi, Status.WARNING, well()),
    "containers-will-lose": Row(unlink_char, Status.WARNING, well()),
    "container-lost-gpus": Row(crowd_out, Status.CRITICAL),
    "xids": Row(tell_xids, Status.CRITICAL, well()),
    "agent-not-running": Row(die, Status.CRITICAL),
    "agent-silent": Row(as_it_is, Status.CRITICAL, SILENT),
    "aggregator-away": Row(
        as_it_is,
        Status.WARNING,
        replaced(well(), link=LinkFacts(("10.0.0.1:7070",), False, 600, 12)),
    ),
    "row-remap-failed": Row(fail_remap, Status.CRITICAL, REMAP),
    "memory-of-nobody": Row(as_it_is, Status.WARNING, HELD),
    "no-helper": Row(hide, Status.WARNING, replaced(well(), blind=BLIND)),
}
# An agent that never answers takes a part of the time; the others take what they need.
SECONDS = {"agent-silent": 6.0}


def examined(host: Host, agent: Agent, seconds: float = 30.0) -> tuple[Observed, list[Finding]]:
    with contextlib.ExitStack() as stack:
        sockets = [host.root / "run/stoker/agent.sock"]
        if agent != NOBODY:
            said = agent if isinstance(agent, local.Status) else None
            sockets = [stack.enter_context(answering(said))]
        observed = look(host.wanted(sockets, seconds=seconds))
    return observed, list(examine(observed))


def page(observed: Observed, findings: list[Finding], folder: Path) -> str:
    stream = io.StringIO()
    shown = render_doctor.page(findings)
    assert shown is not None
    screen.show(shown, screen.console(stream, WIDTH))
    text = f"{summarize(findings, observed)}\n{stream.getvalue()}"
    return text.replace(str(folder), "")


@pytest.mark.parametrize("name", ROWS)
def test_page_of_a_host(name: str, tmp_path: Path, golden: Golden) -> None:
    row = ROWS[name]
    # Short, so that its length has no part in how lines fold: it is taken out of the page.
    host = healthy(tmp_path)
    if row.agent == NOBODY:
        host.units["stoker-agent"] = "LoadState=loaded ActiveState=inactive Result=success"
        host.systemd()
    row.breaks(host)
    observed, findings = examined(host, row.agent, SECONDS.get(name, 30.0))
    assert worst(findings) is row.code, [each for each in findings if each.status]
    relative = [
        Finding(
            each.name,
            each.status,
            each.found.replace(str(host.root), ""),
            each.advice,
            tuple(detail.replace(str(host.root), "") for detail in each.details),
            each.because_of,
            each.source,
        )
        for each in findings
    ]
    golden(f"doctor/{name}.txt", page(observed, relative, host.root))


def test_everything_is_in_the_json(tmp_path: Path, golden: Golden) -> None:
    host = healthy(tmp_path)
    pend_mig(host)
    observed, findings = examined(host, well())
    found = document(findings, summarize(findings, observed), seconds=0.0)
    golden("doctor/mig-pending.json", json.dumps(found, indent=2) + "\n")
    assert (found["status"], found["exit_code"]) == ("WARNING", 1)


LOOKS_THAT_BLOCK = {
    "kernel_module": "/proc/driver/nvidia/version",
    "library": "/etc/ld.so.conf",
    "containers": "/etc/docker/daemon.json",
    "bus": f"/sys/bus/pci/devices/{address(0)}/vendor",
}


@pytest.mark.parametrize("check", LOOKS_THAT_BLOCK)
def test_a_look_that_blocks_for_ever_is_a_finding_of_its_own(check: str, tmp_path: Path) -> None:
    """A pipe that nobody writes to blocks whoever opens it, for ever."""
    host = healthy(tmp_path)
    blocking = LOOKS_THAT_BLOCK[check]
    host.remove(blocking)
    os.mkfifo(host.root / blocking.lstrip("/"))
    observed, findings = examined(host, well(), seconds=5.0)
    told = {each.name: each for each in findings}
    assert (told[check].status, told[check].found) == (Status.UNKNOWN, "no answer within 5 s")
    # The others tell what they find, and nobody waits longer than was said.
    assert told["agent"].status is Status.OK
    assert observed.seconds < 5.0 + 2.0


def test_a_process_that_looks_and_never_answers_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "start", instead("sleep", "3600"))
    observed, findings = examined(healthy(tmp_path), NOBODY, seconds=1.0)
    assert observed.seconds < 1.0 + 2.0
    assert observed.host == Unseen("no answer within 1 s")
    assert {each.status for each in findings} <= {Status.UNKNOWN, Status.CRITICAL}


def test_a_process_that_fails_to_look_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "start", instead(sys.executable, "-c", "raise OSError('odd')"))
    observed, _ = examined(healthy(tmp_path), NOBODY)
    assert observed.host == Unseen("the looking process failed: OSError: odd")


def instead(*argv: str) -> Callable[..., "subprocess.Popen[bytes]"]:
    """Return what starts another program in place of the one that looks."""

    def started(_: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
        return start(argv, **options)

    return started


def test_programs_that_never_end_are_ended(tmp_path: Path) -> None:
    host = healthy(tmp_path)
    add_switches(host)
    host.write("/usr/bin/systemctl", "#!/bin/sh\nexec sleep 3600\n", 0o755)
    _, findings = examined(host, well(), seconds=4.0)
    told = {each.name: each for each in findings}
    assert re.fullmatch(r"systemctl has not ended within \d\.\d+ s", told["fabric_manager"].found)


def test_a_driver_that_was_released_is_not_opened(tmp_path: Path) -> None:
    host = healthy(tmp_path)
    # Whoever opened it would hang, and say so.
    hang(host)
    observed, findings = examined(host, RELEASED)
    told = {each.name: each for each in findings}
    assert told["driver"].found == "not asked: the agent has released the driver"
    assert not (tmp_path / "stoker-doctor.lock").exists()
    assert worst(findings) is Status.WARNING
    assert observed.seconds < 30.0


def test_one_look_at_the_driver_at_a_time(tmp_path: Path) -> None:
    host = healthy(tmp_path)
    lock = tmp_path / "stoker-doctor.lock"
    with lock.open("w", encoding="ascii") as held:
        held.write(f"{os.getpid()}\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        _, findings = examined(host, NOBODY, seconds=4.0)
    told = {each.name: each for each in findings}
    assert told["driver"].status is Status.UNKNOWN
    assert f"another look at the driver is under way (PID {os.getpid()}" in told["driver"].found
    # What it leaves behind is no obstacle to the next one.
    _, findings = examined(host, NOBODY)
    assert {each.name: each.status for each in findings}["driver"] is Status.OK


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """The child that looked, and the one that held the driver, are gone when the look returns."""
    host = healthy(tmp_path)
    hang(host)
    examined(host, NOBODY)
    marks = [f"--scenario={host.source().scenario_path}", f"stoker.agent.doctor {os.getpid()}"]
    assert [line for line in commands() if any(mark in line for mark in marks)] == []


def commands() -> list[str]:
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
    return found
