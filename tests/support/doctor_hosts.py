"""Whole hosts to be examined: folders with the files of a host, an agent at a socket, a driver.

Files, links, device modes and programs are real, under a folder in place of `/`; the agent answers
over a real socket; the driver is the simulated one, in its own process.
"""

import contextlib
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace as replaced

from stoker.agent.doctor.look import Wanted
from stoker.agent.doctor.observed import User
from stoker.agent.driver_host.frames import SimulatedDriver
from stoker.core import local
from stoker.core.local import (
    DriverFacts,
    GpuFacts,
    LinkFacts,
    Profiling,
    Status,
    UsersFacts,
)

VERSION = "580.105.08"
OLDER = "570.86.15"
KERNEL = "6.8.0-45-generic"
GPUS = 4
H100 = "NVIDIA H100 80GB HBM3"
AGENT_PID = 4242
UPTIME_SECONDS = 200_000.0
# Nobody has these: they own no file here, and are in no group of one.
AGENT_USER = User(4_000_000_001, (4_000_000_001,), "stoker")
ANN = User(4_000_000_002, (4_000_000_002,), "ann")
_UNITS = ("nvidia-persistenced", "nvidia-fabricmanager", "stoker-agent", "stoker-agent-helper")


@dataclass(slots=True)
class Host:
    """A host as a folder; a test breaks it by writing into that."""

    root: Path
    gpus: int = GPUS
    scenario: dict[str, Any] = field(default_factory=dict[str, Any])
    units: dict[str, str] = field(default_factory=dict[str, str])
    # Long where nothing hangs, so that a slow machine is not taken for a hung driver.
    call_seconds: float = 8.0

    def write(self, path: str, text: str, mode: int | None = None) -> None:
        """Write a file."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        if mode is not None:
            file.chmod(mode)

    def program(self, path: str, prints: str) -> None:
        """Write a program that prints something."""
        self.write(path, f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\n", 0o755)

    def link(self, path: str, target: str) -> None:
        """Make a link."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.symlink_to(target)

    def remove(self, path: str) -> None:
        """Remove a file, a link or a folder."""
        file = self.root / path.lstrip("/")
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()

    def device(self, address: str, kind: str, driver: str | None) -> None:
        """Put a device of NVIDIA's on the bus."""
        folder = f"/sys/bus/pci/devices/{address}"
        self.write(f"{folder}/vendor", "0x10de\n")
        self.write(f"{folder}/class", f"{kind}\n")
        (self.root / folder.lstrip("/") / "config").write_bytes(b"\xde\x10\x30\x23" + bytes(60))
        if driver is not None:
            self.link(f"{folder}/driver", f"../../../../bus/pci/drivers/{driver}")

    def systemd(self) -> None:
        """Have systemd run, with the units as they are."""
        blocks = [
            "\n".join(
                [
                    f"Id={name}.service",
                    *self.units.get(
                        name, "LoadState=loaded ActiveState=active SubState=running Result=success"
                    ).split(),
                ]
            )
            for name in _UNITS
        ]
        (self.root / "run/systemd/system").mkdir(parents=True, exist_ok=True)
        self.program("/usr/bin/systemctl", "\n\n".join(blocks))

    def say(self, *lines: tuple[float, str]) -> None:
        """Have the kernel's log say something so many seconds ago."""
        said = [
            f"4,{number},{int((UPTIME_SECONDS - ago) * 1e6)},-;{text}\n"
            for number, (ago, text) in enumerate(lines, 1000)
        ]
        self.write("/dev/kmsg", "".join(said))

    def source(self) -> SimulatedDriver:
        """Return the driver of this host."""
        path = self.root.parent / f"{self.root.name}.json"
        path.write_text(
            json.dumps({"driver": {"version": VERSION}, **self.scenario}), encoding="utf-8"
        )
        return SimulatedDriver((f"{self.gpus}xH100-80GB",), "host-a", 7, str(path))

    def wanted(self, sockets: Sequence[Path] = (), *, seconds: float = 30.0) -> Wanted:
        """Return the wish to have it examined, by a user who is nobody special."""
        return Wanted(
            seconds=seconds,
            call_seconds=self.call_seconds,
            root=str(self.root),
            sockets=tuple(map(str, sockets)),
            helper=str(self.root / "run/stoker/helper.sock"),
            lock_folders=(str(self.root.parent),),
            user=ANN,
            simulated=self.source(),
        )


def address(index: int) -> str:
    """Return where the simulated GPU of that index is on the bus."""
    return f"0000:{0x18 + index * 0x0D:02x}:00.0"


def healthy(folder: Path, gpus: int = GPUS) -> Host:
    """Make a host that has nothing wrong."""
    host = Host(folder / "host", gpus)
    host.write("/proc/sys/kernel/osrelease", f"{KERNEL}\n")
    host.write("/proc/uptime", f"{UPTIME_SECONDS:.2f} 1.00\n")
    host.write(
        "/proc/driver/nvidia/version",
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {VERSION}  Release Build\n"
        "GCC version:  gcc version 13.3.0\n",
    )
    modules = ("nvidia_uvm", "nvidia_drm", "nvidia_modeset", "nvidia", "ext4")
    host.write(
        "/proc/modules", "".join(f"{name} 4096 0 - Live 0x0000000000000000\n" for name in modules)
    )
    host.write(
        f"/lib/modules/{KERNEL}/modules.dep",
        "kernel/fs/ext4/ext4.ko.zst:\nupdates/dkms/nvidia.ko.zst:\n",
    )
    host.write("/etc/ld.so.conf", "include /etc/ld.so.conf.d/*.conf\n")
    host.write(
        "/etc/ld.so.conf.d/x86_64-linux-gnu.conf", "# multiarch\n/usr/lib/x86_64-linux-gnu\n"
    )
    library(host, VERSION)
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{index}" for index in range(gpus))):
        host.write(f"/dev/{name}", "", 0o666)
    host.link("/dev/char/195:255", "../nvidiactl")
    host.say((9000, "EXT4-fs (nvme0n1p2): mounted filesystem"))
    for index in range(gpus):
        host.device(address(index), "0x030200", "nvidia")
    host.device("0000:00:1f.0", "0x040300", "snd_hda_intel")  # sound is of no interest
    host.systemd()
    host.program("/usr/bin/dockerd", "")
    host.program("/usr/bin/nvidia-ctk", "")
    host.program("/usr/bin/nvidia-modprobe", "")
    host.write(
        "/etc/docker/daemon.json",
        json.dumps({"runtimes": {"nvidia": {"path": "nvidia-container-runtime", "args": []}}}),
    )
    host.write(
        f"/proc/{AGENT_PID}/status",
        f"Name:\tstoker-agent\nUid:\t{AGENT_USER.uid}\t{AGENT_USER.uid}\t0\t0\n"
        f"Gid:\t{AGENT_USER.uid}\t{AGENT_USER.uid}\t0\t0\nGroups:\t{AGENT_USER.uid} \n",
    )
    return host


def library(host: Host, version: str) -> None:
    """Install NVML's library of that version."""
    folder = "/usr/lib/x86_64-linux-gnu"
    host.write(f"{folder}/libnvidia-ml.so.{version}", "\x7fELF\x02")
    host.link(f"{folder}/libnvidia-ml.so.1", f"libnvidia-ml.so.{version}")


def well(gpus: int = GPUS) -> Status:
    """Return what an agent says that has nothing to complain about."""
    return Status(
        at=1_800_000_000.0,
        node="host-a",
        pid=AGENT_PID,
        version="0.1.0",
        simulated=False,
        driver_version=VERSION,
        summary="",
        driver=DriverFacts("reading", "", 1_799_990_000.0, 4243, None, 1, 0, 0, 0),
        release=None,
        release_unsaved="",
        profiling=Profiling(is_paused=False, until=None),
        gpus=tuple(
            GpuFacts(
                f"GPU-0000000{index}",
                index,
                H100,
                is_read=True,
                reason="",
                verdict="healthy",
                memory_used_bytes=0,
                memory_unattributed_bytes=0,
            )
            for index in range(gpus)
        ),
        last_success_age_seconds=0.4,
        samples=5400,
        sample_failures={},
        users=UsersFacts((), (), 0.3, ()),
        link=LinkFacts(("10.0.0.1:7070",), is_connected=True, outbox_frames=1, frames_dropped=0),
    )


def with_gpu(status: Status, index: int, **facts: Any) -> Status:
    """Return the same but for one GPU."""
    gpus = list(status.gpus)
    gpus[index] = replaced(gpus[index], **facts)
    return replaced(status, gpus=tuple(gpus))


@contextlib.contextmanager
def answering(status: Status | None) -> Generator[Path]:
    """Have an agent answer so at a socket; None: it listens, and says nothing."""
    with (
        tempfile.TemporaryDirectory(prefix="doctor-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
    ):
        path = Path(folder) / "agent.sock"
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=_answer, args=(listener, status), daemon=True).start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _answer(listener: socket.socket, status: Status | None) -> None:
    silent: list[socket.socket] = []
    with contextlib.suppress(OSError):  # it was closed: the test is over
        while True:
            caller, _ = listener.accept()
            if status is None:
                silent.append(caller)
                continue
            with caller:
                if caller.recv(4096):
                    caller.sendall(local.encode(status))
    for caller in silent:
        caller.close()


def facts(*counters: tuple[int, str, float]) -> Mapping[str, Any]:
    """Return a scenario in which facts of GPUs are so: (index, fact, value)."""
    return {
        "counters": [{"gpu": gpu, "fact": fact, "value": value} for gpu, fact, value in counters]
    }
