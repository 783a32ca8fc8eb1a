"""How those who have device files open are told to people."""

import os
import pwd
from pathlib import Path

from tests.support.proc_tree import BOOTED_AT, ProcTree

from stoker.agent.attribution.holders import describe_holders
from stoker.agent.attribution.pod_names import PodNames
from stoker.agent.owners import DeviceHolder, Owner
from stoker.agent.privileged import RawHolder
from stoker.agent.proctable import ProcTable

UID = "1a2b3c4d-0001-4002-8003-a1b2c3d4e5f6"
ID = "a" * 64
POD_CGROUP = f"0::/kubepods/pod{UID}/{ID}\n"
NO_SUCH_USER = 3_999_999_999


def test_holders_have_names(tmp_path: Path) -> None:
    table = ProcTable(str(ProcTree(tmp_path / "proc").root))
    (tmp_path / f"ml_train-0_{UID}").mkdir()
    names = PodNames(tmp_path, None)
    raw = (
        RawHolder(
            7, os.getuid(), "dcgm", 500, "0::/system.slice/dcgm.service\n", ("/dev/nvidiactl",)
        ),
        RawHolder(8, NO_SUCH_USER, "python", 600, POD_CGROUP, ("/dev/nvidia0", "/dev/nvidiactl")),
    )
    me = pwd.getpwuid(os.getuid()).pw_name
    in_pod = Owner(container_id=ID, pod_uid=UID, pod_namespace="ml", pod_name="train-0")
    devices = ("/dev/nvidia0", "/dev/nvidiactl")
    dcgm = Owner(unit="dcgm.service")
    assert describe_holders(raw, table, names) == (
        DeviceHolder(7, me, "dcgm", ("/dev/nvidiactl",), dcgm, BOOTED_AT + 5.0),
        DeviceHolder(8, str(NO_SUCH_USER), "python", devices, in_pod, BOOTED_AT + 6.0),
    )


def test_without_the_folders_of_logs_a_pod_has_its_uid(tmp_path: Path) -> None:
    table = ProcTable(str(ProcTree(tmp_path / "proc").root))
    (holder,) = describe_holders([RawHolder(8, 0, "python", 600, POD_CGROUP, ())], table)
    assert holder.owner.described() == f"pod with UID {UID}"
