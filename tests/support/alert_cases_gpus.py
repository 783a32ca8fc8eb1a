"""Stories for the alerts about GPUs: their health, their faults, their memory."""

from tests.support.alerting import AGENT, GPU, NODE, Case, Story, series

GIB = 2**30


def fault(
    check: str, verdict: str, action: str, code: str = "", value: str = "1", seen: str = "0"
) -> Story:
    """A fault that lasts, and when it was seen last."""
    return {
        series(
            "stoker_gpu_fault", GPU, check=check, code=code, verdict=verdict, action=action
        ): value,
        series("stoker_gpu_fault_last_timestamp_seconds", GPU, check=check, code=code): seen,
    }


def judged(check: str, verdict: str, action: str, code: str = "") -> dict[str, str]:
    """The labels of an alert about that fault."""
    return {**GPU, "check": check, "code": code, "verdict": verdict, "action": action}


def health(verdict: str, value: str = "1") -> Story:
    """A verdict, while the driver is read."""
    return {series("stoker_gpu_health", GPU, verdict=verdict): value, **state("reading")}


def state(name: str) -> Story:
    """The state that the driver is in."""
    states = ("starting", "reading", "blocked", "failed", "released")
    return {
        series("stoker_agent_driver_state", AGENT, state=each): str(int(each == name))
        for each in states
    }


def memory(used: int | str, free: int) -> Story:
    """Memory in use, and the rest."""
    return {
        series("stoker_gpu_memory_used_bytes", GPU): str(used),
        series("stoker_gpu_memory_free_bytes", GPU): str(free),
    }


# What the check of that alert is not about: another check, or what is judged harmless.
def others(check: str) -> dict[str, Story]:
    """Stories of faults that another alert is about, or none."""
    other = "pcie_replays" if check != "pcie_replays" else "pcie_link"
    return {
        "another fault": fault(other, "unhealthy", "reset_gpu"),
        "the fault is judged harmless": fault(check, "healthy", "none"),
    }


def partitioning(now: str, *, is_withheld: bool = True) -> Story:
    """How far a GPU is on the way to its MIG layout."""
    states = ("pending", "draining", "applying", "reboot-required", "success", "failed")
    return {
        series("stoker_gpu_mig_withheld", GPU): str(int(is_withheld)),
        **{
            series("stoker_gpu_mig_state", GPU, state=each): str(int(each == now))
            for each in states
        },
    }


FAILED_ALONE = {series("stoker_gpu_mig_state", GPU, state="failed"): "1"}

MIG_CASES = (
    Case(
        "StokerMigFailed",
        "warning",
        5,
        fires=FAILED_ALONE,
        labels={**GPU, "state": "failed"},
        summary="GPU 3 of node n1 could not be partitioned",
        description="GPU 3 (GPU-3f2, H100) of node n1 did not get the MIG layout that was declared "
        "for it. Run `stoker mig status --node n1`: it tells why, and how the GPU is now.",
        silent={
            "it is in place": partitioning("success", is_withheld=False),
            "it is not its turn": partitioning("pending"),
            "it was tried again": {
                series("stoker_gpu_mig_state", GPU, state="failed"): "1 1 1 0 0 0 1 1 1"
            },
        },
    ),
    Case(
        "StokerMigNotInPlace",
        "warning",
        30,
        fires=partitioning("reboot-required"),
        labels=GPU,
        summary="GPU 3 of node n1 waits for its MIG layout",
        description="Nothing is placed on GPU 3 (GPU-3f2, H100) of node n1, as its MIG layout has "
        "not been in place for 30 minutes: somebody uses it, or it wants a reset or a reboot. "
        "`stoker mig status --node n1` names who is in the way.",
        silent={
            "it is in place": partitioning("success", is_withheld=False),
            "it failed": partitioning("failed"),
            "it took a while": {series("stoker_gpu_mig_withheld", GPU): "1x25 0x10"},
        },
    ),
)

HEALTH_CASES = (
    Case(
        "StokerGpuLost",
        "critical",
        1,
        fires=fault("gpu_lost", "unhealthy", "reboot"),
        labels=judged("gpu_lost", "unhealthy", "reboot"),
        summary="GPU 3 of node n1 is lost",
        description="GPU 3 (GPU-3f2, H100) of node n1 does not answer the driver any more: it has "
        "fallen off the bus, or wants a reset. What mends it: reboot. Drain it first, with "
        "`stoker drain --gpu`.",
        silent=others("gpu_lost"),
    ),
    Case(
        "StokerGpuMissing",
        "critical",
        5,
        fires={
            series("stoker_gpu_missing", NODE, gpu="3", uuid="GPU-3f2", error_kind="gpu_lost"): "1",
            **fault("gpu_missing", "unhealthy", "rma"),
        },
        labels={**NODE, "gpu": "3", "uuid": "GPU-3f2", "error_kind": "gpu_lost"},
        summary="GPU 3 of node n1 is missing",
        description="GPU 3 (GPU-3f2) of node n1 should be there and cannot be read: gpu_lost. See "
        "whether `stoker agent doctor` there finds it on the PCIe bus; if it does not after a cold "
        "start, have the card and its slot inspected.",
        silent={
            "it was found again": {
                series("stoker_gpu_missing", NODE, gpu="3", uuid="", error_kind="unknown"): "1 1 1 "
                "stale _ _ 1 1 1 1"
            },
            "it is told as lost": {
                series(
                    "stoker_gpu_missing", NODE, gpu="3", uuid="GPU-3f2", error_kind="gpu_lost"
                ): "1",
                **fault("gpu_lost", "unhealthy", "reboot"),
            },
        },
    ),
    Case(
        "StokerGpuUnknown",
        "warning",
        10,
        fires=health("unknown"),
        labels={**GPU, "verdict": "unknown"},
        summary="GPU 3 of node n1 is not read",
        description="Nothing is known of GPU 3 (GPU-3f2) of node n1 for 10 minutes, though the "
        "driver answers for others. Nothing is placed on it. `stoker agent status` there says why "
        "it is not read.",
        silent={
            "it is known": health("unknown", "0"),
            "it is healthy": health("healthy"),
            "the driver is released": {**health("unknown"), **state("released")},
            "the driver is blocked": {**health("unknown"), **state("blocked")},
        },
    ),
    Case(
        "StokerGpuXidCritical",
        "critical",
        0,
        # It was seen two minutes before the story began.
        fires=fault("xid", "unhealthy", "reset_gpu", code="119", seen="-120"),
        labels=judged("xid", "unhealthy", "reset_gpu", code="119"),
        summary="GPU 3 of node n1: Xid 119",
        description="GPU 3 (GPU-3f2, H100) of node n1 met Xid 119 2m 0s ago, after which no work "
        "should run on it. What mends it: reset gpu. `stoker health` tells what the Xid means.",
        silent={
            "it degrades": fault("xid", "degraded", "restart_app", code="94"),
            "it is the program's": fault("xid", "healthy", "restart_app", code="31"),
            "another fault": fault("ecc_uncorrected", "unhealthy", "reset_gpu"),
            # The counter of Xids, which appears with its first one.
            "it was counted": {series("stoker_gpu_xid_errors_total", GPU, xid="79"): "_ 1 2 3"},
        },
    ),
    Case(
        "StokerGpuRowRemapPending",
        "warning",
        1,
        fires=fault("row_remap_pending", "degraded", "reset_gpu"),
        labels=judged("row_remap_pending", "degraded", "reset_gpu"),
        summary="GPU 3 of node n1 has rows to remap",
        description="GPU 3 (GPU-3f2, H100) of node n1 met errors in its memory and will use spare "
        "rows after its next reset. What mends it: reset gpu, when its work has ended.",
        silent={
            **others("row_remap_pending"),
            "the check is switched off": {series("stoker_gpu_remapped_rows_pending", GPU): "1"},
        },
    ),
    Case(
        "StokerGpuRowRemapFailed",
        "critical",
        1,
        fires=fault("row_remap_failed", "unhealthy", "rma"),
        labels=judged("row_remap_failed", "unhealthy", "rma"),
        summary="GPU 3 of node n1 cannot remap a row",
        description="GPU 3 (GPU-3f2, H100) of node n1 met an error in its memory and has no spare "
        "row for it. What mends it: rma.",
        silent=others("row_remap_failed"),
    ),
    Case(
        "StokerGpuEccUncorrected",
        "critical",
        0,
        fires=fault("ecc_uncorrected", "unhealthy", "reset_gpu"),
        labels=judged("ecc_uncorrected", "unhealthy", "reset_gpu"),
        summary="GPU 3 of node n1: uncorrected memory errors",
        description="GPU 3 (GPU-3f2, H100) of node n1 met memory errors that ECC could not "
        "correct: results computed on it meanwhile may be wrong. What mends it: reset gpu.",
        silent={
            **others("ecc_uncorrected"),
            "there are errors of long ago": {
                series("stoker_gpu_ecc_uncorrected_aggregate_errors_total", GPU): "7"
            },
        },
    ),
    Case(
        "StokerGpuNvlinkDown",
        "critical",
        2,
        fires=fault("nvlink_down", "unhealthy", "reset_gpu", code="4"),
        labels=judged("nvlink_down", "unhealthy", "reset_gpu", code="4"),
        summary="GPU 3 of node n1: NVLink 4 is down",
        description="NVLink 4 of GPU 3 (GPU-3f2, H100) of node n1 is not active, so work over "
        "several GPUs is slow or fails. What mends it: reset gpu. If several GPUs of the node have "
        "it, look at the fabric manager and the switches first.",
        silent=others("nvlink_down"),
    ),
    Case(
        "StokerGpuNvlinkErrors",
        "warning",
        5,
        fires=fault("nvlink_errors", "degraded", "reset_gpu", code="4"),
        labels=judged("nvlink_errors", "degraded", "reset_gpu", code="4"),
        summary="GPU 3 of node n1: errors on NVLink 4",
        description="NVLink 4 of GPU 3 (GPU-3f2, H100) of node n1 has more errors than a sound "
        "link. What mends it: reset gpu.",
        silent=others("nvlink_errors"),
    ),
    Case(
        "StokerGpuThermal",
        "warning",
        2,
        fires=fault("thermal", "degraded", "drain"),
        labels=judged("thermal", "degraded", "drain"),
        summary="GPU 3 of node n1 is too hot to run at speed",
        description="GPU 3 (GPU-3f2, H100) of node n1 is slowed down by its heat, or about to be. "
        "Look at the fans, the inlet and its neighbours. What mends it: drain.",
        silent=others("thermal"),
    ),
    Case(
        "StokerGpuHot",
        "warning",
        5,
        fires={series("stoker_gpu_temperature_celsius", GPU): "81"},
        labels=GPU,
        summary="GPU 3 of node n1 is at 81 °C",
        description="GPU 3 (GPU-3f2, H100) of node n1 has been above 80 °C for 5 minutes and is at "
        "81 °C. Look at the cooling; stoker_gpu_temperature_margin_celsius tells how far it is "
        "from slowing down.",
        silent={
            "it is at 80": {series("stoker_gpu_temperature_celsius", GPU): "80"},
            "it cools down": {
                series("stoker_gpu_temperature_celsius", GPU): "85 85 85 85 79 85 85 85 85 79"
            },
            "its memory is hot": {series("stoker_gpu_memory_temperature_celsius", GPU): "95"},
        },
    ),
    Case(
        "StokerGpuHwSlowdown",
        "warning",
        5,
        fires=fault("hw_slowdown", "degraded", "drain"),
        labels=judged("hw_slowdown", "degraded", "drain"),
        summary="GPU 3 of node n1 is slowed down by its hardware",
        description="GPU 3 (GPU-3f2, H100) of node n1 has its clocks held down by the hardware "
        "again and again. Look at its power supply and its cooling. What mends it: drain.",
        silent=others("hw_slowdown"),
    ),
    Case(
        "StokerGpuPowerBrake",
        "warning",
        5,
        fires=fault("power_brake", "degraded", "drain"),
        labels=judged("power_brake", "degraded", "drain"),
        summary="GPU 3 of node n1 is braked by the power supply",
        description="GPU 3 (GPU-3f2, H100) of node n1 is held down by the power brake of the host. "
        "Look at the host's power supplies and at the limit of the rack. What mends it: drain.",
        silent=others("power_brake"),
    ),
    Case(
        "StokerGpuPersistenceOff",
        "info",
        60,
        fires=fault("persistence", "degraded", "none"),
        labels=judged("persistence", "degraded", "none"),
        summary="GPU 3 of node n1 has no persistence mode",
        description="The driver of GPU 3 (GPU-3f2, H100) of node n1 is unloaded whenever nobody "
        "uses it, which makes starts slow and counters forget. Start nvidia-persistenced on the "
        "node.",
        silent=others("persistence"),
    ),
    Case(
        "StokerGpuUnhealthy",
        "critical",
        1,
        fires=fault("recovery_action", "unhealthy", "reset_gpu", code="reset"),
        labels=judged("recovery_action", "unhealthy", "reset_gpu", code="reset"),
        summary="GPU 3 of node n1: recovery_action reset",
        description="GPU 3 (GPU-3f2, H100) of node n1 is unhealthy by the check recovery_action "
        "reset: no work should be placed on it. What mends it: reset gpu. `stoker health` tells "
        "what was found.",
        silent={
            "it is degraded": fault("recovery_action", "degraded", "none"),
            "it has an alert of its own": fault("thermal", "unhealthy", "drain"),
        },
    ),
    Case(
        "StokerGpuDegraded",
        "warning",
        10,
        fires=fault("xid", "degraded", "restart_app", code="94"),
        labels=judged("xid", "degraded", "restart_app", code="94"),
        summary="GPU 3 of node n1: xid 94",
        description="GPU 3 (GPU-3f2, H100) of node n1 is degraded by the check xid 94. What mends "
        "it: restart app. `stoker health` tells what was found.",
        silent={
            "it is unhealthy": fault("pcie_replays", "unhealthy", "drain"),
            "it has an alert of its own": fault("thermal", "degraded", "drain"),
            "it recovers": fault(
                "pcie_replays", "degraded", "drain", value="1 1 1 1 stale _ 1 1 1"
            ),
        },
    ),
)

MEMORY_CASES = (
    Case(
        "StokerGpuMemoryUnattributed",
        "warning",
        10,
        fires={series("stoker_gpu_memory_unattributed_bytes", GPU): str(2 * GIB)},
        labels=GPU,
        summary="GPU 3 of node n1: 2GiB of memory without an owner",
        description="On GPU 3 (GPU-3f2, H100) of node n1 2GiB of memory have been in use for 10 "
        "minutes that no process accounts for: a process that died badly, or one that cannot be "
        "seen. `stoker agent status` there lists who has the devices open; if it is nobody, reset "
        "the GPU.",
        silent={
            "it is 1 GiB": {series("stoker_gpu_memory_unattributed_bytes", GPU): str(GIB)},
            "a program ends": {
                series("stoker_gpu_memory_unattributed_bytes", GPU): f"{2 * GIB}x8 0 {2 * GIB}x5"
            },
        },
    ),
    Case(
        "StokerGpuMemoryNearlyFull",
        "info",
        15,
        fires=memory(95 * GIB, 5 * GIB),
        labels=GPU,
        summary="GPU 3 of node n1: 95% of memory in use",
        description="GPU 3 (GPU-3f2, H100) of node n1 has had more than 90 % of its memory in use "
        "for 15 minutes, now 95%. stoker_gpu_process_memory_used_bytes tells by which processes.",
        silent={
            "it is 90 %": memory(90 * GIB, 10 * GIB),
            "for a short time": memory(f"{95 * GIB}x13 {20 * GIB} {95 * GIB}x5", 5 * GIB),
        },
    ),
)
