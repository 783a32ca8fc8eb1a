"""What a host's texts mean, as drivers, systemd and engines really write them."""

import pytest

from stoker.agent.doctor import parse
from stoker.agent.doctor.observed import CdiSpec, Unit

OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  "
    "(dvs-builder@U22-I3-B17-02-5)  Tue Sep 23 09:55:41 UTC 2025\n"
    "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04.2)\n"
)
CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.135  Fri Jan 10 20:00:00 UTC 2025\n"
    "GCC version:  gcc version 13.3.0\n"
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (OPEN, ("580.95.05", True)),
        (CLOSED, ("550.135", False)),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  570.86.15  R\n",
            ("570.86.15", True),
        ),
        ("", (None, False)),
        ("something else 580.95.05\n", (None, False)),
    ],
)
def test_version_of_the_module(text: str, found: tuple[str | None, bool]) -> None:
    assert parse.module_version(text) == found


def test_modules_that_are_loaded() -> None:
    text = (
        "nvidia_uvm 1847296 4 - Live 0x0000000000000000 (POE)\n"
        "nvidia 9715712 44 nvidia_uvm,nvidia_modeset, Live 0x0 (POE)\n"
        "nouveau 2641920 0 - Unloading 0x0000000000000000\n"
        "nvidiafb 53248 0 - Live 0x0\n\n"
    )
    assert parse.loaded_modules(text) == ("nvidia", "nvidia_uvm")


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("updates/dkms/nvidia.ko.zst: kernel/drivers/video/backlight.ko\n", True),
        ("extra/nvidia.ko:\n", True),
        ("kernel/drivers/video/fbdev/nvidia/nvidiafb.ko:\n", False),
        ("updates/dkms/nvidia-uvm.ko.zst: updates/dkms/nvidia.ko.zst\n", False),
        ("", False),
    ],
)
def test_module_that_is_built(text: str, has: bool) -> None:
    assert parse.has_module(text) is has


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("/usr/lib/libnvidia-ml.so.580.95.05", "580.95.05"),
        ("/usr/lib/libnvidia-ml.so.550.135", "550.135"),
        ("/usr/lib/wsl/lib/libnvidia-ml.so.1", None),
    ],
)
def test_version_of_the_library(name: str, version: str | None) -> None:
    assert parse.file_version(name) == version


def test_folders_of_the_loader() -> None:
    text = "# first\n/opt/lib  # ours\ninclude ld.so.conf.d/*.conf\nhwcap 1 x\n\n/usr/local/lib\n"
    assert parse.loader_folders(text) == (["/opt/lib", "/usr/local/lib"], ["ld.so.conf.d/*.conf"])


def test_units() -> None:
    text = (
        "Result=success\nId=a.service\nLoadState=loaded\nActiveState=active\nSubState=running\n\n"
        "Result=success\nId=b.service\nLoadState=not-found\nActiveState=inactive\nSubState=dead\n"
    )
    assert parse.units(text) == (
        Unit("a.service", "loaded", "active", "running", "success"),
        Unit("b.service", "not-found", "inactive", "dead", "success"),
    )


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ('{"runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}}', True),
        ('{"runtimes": {"gpu": {"path": "/usr/bin/nvidia-container-runtime"}}}', True),
        ('{"default-runtime": "nvidia"}', False),
        ("{}", False),
        ("", False),
    ],
)
def test_runtime_of_docker(text: str, has: bool) -> None:
    assert parse.has_docker_runtime(text) is has


@pytest.mark.parametrize("text", ["[]", "{", '{"runtimes": 1}'])
def test_what_is_no_configuration_of_docker(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        parse.has_docker_runtime(text)


@pytest.mark.parametrize(
    ("text", "has"),
    [
        (  # containerd, version 2 of its configuration
            '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nvidia]\na = false\n',
            True,
        ),
        (  # containerd, version 3
            "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.nvidia-cdi]\n",
            True,
        ),
        ('[crio.runtime.runtimes.nvidia]\nruntime_path = "/x"\n', True),
        ('[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]\n', False),
        ("version = 2\n", False),
    ],
)
def test_runtime_of_containerd_and_crio(text: str, has: bool) -> None:
    assert parse.has_toml_runtime(text) is has


def test_what_is_no_toml() -> None:
    with pytest.raises(ValueError, match="."):
        parse.has_toml_runtime("[")


def test_cdi_of_two_drivers_at_once() -> None:
    text = (
        "kind: nvidia.com/gpu\n- hostPath: /usr/lib64/libcuda.so.570.86.15\n"
        "- hostPath: /usr/lib64/libnvidia-ml.so.580.95.05\n"
        "- hostPath: /usr/lib64/libnvidia-ml.so.1\n"
    )
    assert parse.cdi_spec("/a", text) == CdiSpec("/a", ("570.86.15", "580.95.05"))
    assert parse.cdi_spec("/a", "kind: vendor.com/nic\n") is None


def test_records_of_the_kernel() -> None:
    text = (
        "4,1188,5140900,-;NVRM: Xid (PCI:0000:53:00): 79; more\n"
        " SUBSYSTEM=pci\n DEVICE=+pci:0000:53:00.0\n"
        "6,1189,6000000,-,caller=T1;ordinary\nnonsense\n"
        "12,1190,7000000,-;NVRM: Xid (PCI:0000:53:00): 79; as a program says\n"
    )
    assert list(parse.kmsg_records(text)) == [
        (5.1409, "NVRM: Xid (PCI:0000:53:00): 79; more"),
        (6.0, "ordinary"),
    ]


def test_addresses() -> None:
    assert parse.short_address("00000000:3B:00.0") == "0000:3b:00.0"
