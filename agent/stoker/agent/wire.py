"""Values to messages of `stoker.v1` and back: the only module of the agent that knows protobuf."""

import math
from dataclasses import dataclass

import msgspec

from stoker.agent.model import (
    COMPUTE_MILLI,
    AttributedProcess,
    Command,
    DriverState,
    DriverStatus,
    Drop,
    Frame,
    HeldAllocation,
    Hello,
    Hold,
    Host,
    NumberedGpu,
    NumberedInventory,
    NumberedSample,
    ProcessTable,
)
from stoker.agent.owners import NOBODY, Assignment, Owner
from stoker.agent.partitions import GpuMigStatus
from stoker.agent.readings import GpuFault, MigDeviceIdentity
from stoker.agent.verdicts import Fault, GpuHealth, RepairAction, Verdict
from stoker.core.errors import StokerError
from stoker.core.mig.geometry import Geometry, Layout, MigState
from stoker.core.mig.reports import MigAsk, MigEntry, MigReport, Verb
from stoker.v1 import agent_pb2, mig_pb2, types_pb2

PROTOCOL_VERSION = 1
# What the aggregator may call an allocation; longer is no id of ours.
ALLOCATION_ID_CHARACTERS_MAX = 128
# A sample is told to be older than its frame when it differs by more than this.
_AGE_SECONDS_MIN = 0.001

_DRIVER_STATES = {
    DriverState.STARTING: agent_pb2.DRIVER_STATE_STARTING,
    DriverState.READING: agent_pb2.DRIVER_STATE_READING,
    DriverState.BLOCKED: agent_pb2.DRIVER_STATE_BLOCKED,
    DriverState.FAILED: agent_pb2.DRIVER_STATE_FAILED,
    DriverState.RELEASED: agent_pb2.DRIVER_STATE_RELEASED,
}
_VERDICTS = {
    Verdict.HEALTHY: types_pb2.GPU_VERDICT_HEALTHY,
    Verdict.DEGRADED: types_pb2.GPU_VERDICT_DEGRADED,
    Verdict.UNHEALTHY: types_pb2.GPU_VERDICT_UNHEALTHY,
    Verdict.UNKNOWN: types_pb2.GPU_VERDICT_UNKNOWN,
}
_REPAIR_ACTIONS = {
    RepairAction.NONE: types_pb2.REPAIR_ACTION_NONE,
    RepairAction.RESTART_APP: types_pb2.REPAIR_ACTION_RESTART_APP,
    RepairAction.DRAIN: types_pb2.REPAIR_ACTION_DRAIN,
    RepairAction.RESET_GPU: types_pb2.REPAIR_ACTION_RESET_GPU,
    RepairAction.REBOOT: types_pb2.REPAIR_ACTION_REBOOT,
    RepairAction.RMA: types_pb2.REPAIR_ACTION_RMA,
}
_MIG_STATES = {
    None: mig_pb2.MIG_STATE_UNSPECIFIED,
    MigState.PENDING: mig_pb2.MIG_STATE_PENDING,
    MigState.DRAINING: mig_pb2.MIG_STATE_DRAINING,
    MigState.APPLYING: mig_pb2.MIG_STATE_APPLYING,
    MigState.ROLLING_BACK: mig_pb2.MIG_STATE_ROLLING_BACK,
    MigState.REBOOT_REQUIRED: mig_pb2.MIG_STATE_REBOOT_REQUIRED,
    MigState.SUCCESS: mig_pb2.MIG_STATE_SUCCESS,
    MigState.FAILED: mig_pb2.MIG_STATE_FAILED,
}
_MIG_VERBS: dict[int, Verb] = {
    mig_pb2.MIG_VERB_PLAN: "plan",
    mig_pb2.MIG_VERB_APPLY: "apply",
    mig_pb2.MIG_VERB_UNDO: "undo",
    mig_pb2.MIG_VERB_STATUS: "status",
}
_MIB = 2**20
# `HealthFault.count` is 32 bits wide.
_COUNT_MAX = 2**32 - 1


class MalformedMessage(StokerError):
    """The aggregator sent something that means nothing in this protocol."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The aggregator's answer to a hello."""

    protocol_version: int
    aggregator_version: str
    acked_sequence: int


@dataclass(frozen=True, slots=True)
class Ack:
    """Every frame up to and including `sequence` has been taken in."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Order:
    """A command with its number on the stream."""

    id: int
    command: Command


@dataclass(frozen=True, slots=True)
class MigRelay:
    """Somebody asks something about partitions, through the aggregator, which awaits an answer."""

    id: int  # unique on the stream
    ask: MigAsk | MalformedMessage


Received = Welcome | Ack | Order | MigRelay


def hello_message(hello: Hello) -> agent_pb2.AgentMessage:
    """Return the message that opens a stream."""
    identity = hello.identity
    return agent_pb2.AgentMessage(
        hello=agent_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            node=identity.node,
            agent_version=identity.agent_version,
            incarnation=hello.incarnation,
            first_sequence=hello.first_sequence,
            boot_id=identity.boot_id,
            simulated=identity.simulated,
            pool=identity.pool,
            labels=dict(identity.labels),
            interval_seconds=identity.interval_seconds,
            inventory=_optional_inventory(hello.inventory),
            held=_held(hello.held),
            process_id=identity.process_id,
            monotonic_seconds=hello.monotonic_seconds,
        )
    )


def frame_message(frame: Frame) -> agent_pb2.AgentMessage:
    """Return the message that carries a frame."""
    return agent_pb2.AgentMessage(
        frame=agent_pb2.Frame(
            sequence=frame.sequence,
            at=frame.at,
            samples=[_sample(each, frame.at) for each in frame.samples],
            processes=None if frame.processes is None else _processes(frame.processes),
            held=None if frame.held is None else _held(frame.held),
            refusals=[
                agent_pb2.HoldRefusal(allocation_id=each.allocation_id, reason=each.reason)
                for each in frame.refusals
            ],
            inventory=_optional_inventory(frame.inventory),
            driver=None if frame.driver is None else _driver(frame.driver),
            frames_dropped=frame.frames_dropped,
            monotonic_seconds=frame.monotonic_seconds,
            commands_done=frame.commands_done,
            health=None if frame.health is None else _health(frame.health),
            mig=None if frame.mig is None else mig_pb2.NodeMig(gpus=map(_gpu_mig, frame.mig)),
        )
    )


def mig_answer_message(relay: int, answer: MigReport | StokerError) -> agent_pb2.AgentMessage:
    """Return the message that answers a relayed question: the report, or why it is refused."""
    if isinstance(answer, StokerError):
        # An empty refusal would say that there is none.
        said = mig_pb2.MigAnswer(id=relay, refusal=str(answer) or type(answer).__name__)
    else:
        said = mig_pb2.MigAnswer(id=relay, report_json=msgspec.json.encode(answer).decode())
    return agent_pb2.AgentMessage(mig=said)


def read_message(message: agent_pb2.AggregatorMessage) -> Received:
    """Return what the aggregator said; raises MalformedMessage."""
    match message.WhichOneof("message"):
        case "ack":
            return Ack(message.ack.sequence)
        case "welcome":
            welcome = message.welcome
            return Welcome(
                welcome.protocol_version, welcome.aggregator_version, welcome.acked_sequence
            )
        case "command":
            return Order(message.command.id, _command(message.command))
        case "mig":
            return MigRelay(message.mig.id, _mig_ask(message.mig.ask))
        case None:
            raise MalformedMessage("a message of a kind that this agent does not know")


def _command(command: agent_pb2.Command) -> Command:
    match command.WhichOneof("command"):
        case "hold":
            return Hold(_allocation(command.hold.allocation, command.id))
        case "drop":
            drop = command.drop
            return Drop(_allocation_id(drop.allocation_id, command.id), drop.reason)
        case None:
            raise MalformedMessage(f"command {command.id} is of a kind that is not known")


def _allocation(message: agent_pb2.HeldAllocation, command: int) -> HeldAllocation:
    if message.HasField("memory_bytes") and message.memory_bytes == 0:
        raise MalformedMessage(f"command {command}: a share of 0 bytes")
    if message.HasField("compute_milli") and not 0 < message.compute_milli <= COMPUTE_MILLI:
        share = message.compute_milli
        raise MalformedMessage(f"command {command}: {share} thousandths of a GPU's compute")
    if not (math.isfinite(message.ttl_seconds) and message.ttl_seconds >= 0):
        raise MalformedMessage(f"command {command}: a TTL of {message.ttl_seconds} seconds")
    return HeldAllocation(
        id=_allocation_id(message.id, command),
        gpu_uuids=tuple(message.gpu_uuids),
        memory_bytes=message.memory_bytes if message.HasField("memory_bytes") else None,
        holder=message.holder,
        ttl_seconds=message.ttl_seconds,
        held_since=message.held_since,
        mig_device_uuids=tuple(message.mig_device_uuids),
        compute_milli=message.compute_milli if message.HasField("compute_milli") else None,
        cpu_milli=message.cpu_milli,
        host_memory_bytes=message.host_memory_bytes,
        gang_nodes=max(1, message.gang_nodes),
    )


def _allocation_id(text: str, command: int) -> str:
    if not 0 < len(text) <= ALLOCATION_ID_CHARACTERS_MAX:
        raise MalformedMessage(f"command {command}: an allocation id of {len(text)} characters")
    return text


def _mig_ask(message: mig_pb2.MigAsk) -> MigAsk | MalformedMessage:
    verb = _MIG_VERBS.get(message.verb)
    if verb is None:
        return MalformedMessage(f"a verb of MIG that this agent does not know: {message.verb}")
    if not (math.isfinite(message.drain_seconds) and message.drain_seconds >= 0):
        return MalformedMessage(f"{message.drain_seconds} seconds to leave in")
    return MigAsk(
        verb=verb,
        operation_id=message.operation_id,
        config=message.config,
        entries=tuple(
            MigEntry(
                mig_enabled=each.mig_enabled,
                device_filter=tuple(each.device_filter),
                devices=tuple(each.devices) or None,
                mig_devices=dict(each.mig_devices),
            )
            for each in message.entries
        ),
        gpus=tuple(message.gpus),
        drain_seconds=message.drain_seconds,
        evict=message.evict,
    )


def _optional_inventory(inventory: NumberedInventory | None) -> agent_pb2.Inventory | None:
    if inventory is None:
        return None
    return agent_pb2.Inventory(
        driver_version=inventory.driver_version or "",
        cuda_version=inventory.cuda_version or "",
        gpus=[_gpu(each, inventory) for each in inventory.gpus],
        missing=[_missing(each) for each in inventory.missing],
        host=None if inventory.host is None else _host(inventory.host),
    )


def _host(host: Host) -> agent_pb2.Host:
    return agent_pb2.Host(cpu_milli=host.cpu_milli, memory_bytes=host.memory_bytes)


def _missing(fault: GpuFault) -> types_pb2.MissingGpu:
    return types_pb2.MissingGpu(
        index=fault.index, uuid=fault.uuid or "", error_kind=fault.error_kind, reason=fault.message
    )


def _gpu(gpu: NumberedGpu, inventory: NumberedInventory) -> agent_pb2.Gpu:
    identity = gpu.identity
    links = {each.uuid: each.links for each in identity.nvlink_peers}
    return agent_pb2.Gpu(
        number=gpu.number,
        uuid=identity.uuid,
        model=identity.model,
        memory_total_bytes=identity.memory_total_bytes,
        index=identity.index,
        pci_bus_id=identity.pci_bus_id or "",
        serial=identity.serial or "",
        compute_capability=identity.compute_capability or "",
        power_limit_watts=identity.power_limit_watts,
        minor_number=identity.minor_number,
        vbios_version=identity.vbios_version or "",
        mig_enabled=identity.mig_enabled,
        numa_node=identity.numa_node,
        nvlink_peers=[
            agent_pb2.NvlinkPeer(number=each.number, links=links[each.identity.uuid])
            for each in inventory.gpus
            if each.identity.uuid in links
        ],
        nvswitch_links=identity.nvswitch_links,
        mig_devices=[_mig_device(each) for each in identity.mig_devices],
    )


def _mig_device(device: MigDeviceIdentity) -> agent_pb2.MigDevice:
    return agent_pb2.MigDevice(
        uuid=device.uuid,
        profile=device.profile,
        memory_total_bytes=device.memory_total_bytes,
        gpu_instance_id=device.gpu_instance_id,
        compute_instance_id=device.compute_instance_id,
    )


def _sample(numbered: NumberedSample, frame_at: float) -> agent_pb2.GpuSample:
    sample = numbered.sample
    age = frame_at - sample.at
    return agent_pb2.GpuSample(
        number=numbered.number,
        memory_used_bytes=sample.memory_used_bytes,
        utilization_ratio=sample.utilization_ratio,
        temperature_celsius=sample.temperature_celsius,
        power_watts=sample.power_watts,
        sm_clock_hertz=_whole(sample.sm_clock_hertz),
        memory_clock_hertz=_whole(sample.memory_clock_hertz),
        memory_utilization_ratio=sample.memory_utilization_ratio,
        energy_joules=sample.energy_joules_total,
        memory_reserved_bytes=sample.memory_reserved_bytes,
        age_seconds=age if age > _AGE_SECONDS_MIN else None,
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _held(allocations: tuple[HeldAllocation, ...]) -> agent_pb2.Held:
    return agent_pb2.Held(
        allocations=[
            agent_pb2.HeldAllocation(
                id=each.id,
                gpu_uuids=each.gpu_uuids,
                memory_bytes=each.memory_bytes,
                holder=each.holder,
                ttl_seconds=each.ttl_seconds,
                held_since=each.held_since,
                is_leaving=each.is_leaving,
                mig_device_uuids=each.mig_device_uuids,
                compute_milli=each.compute_milli,
                cpu_milli=each.cpu_milli,
                host_memory_bytes=each.host_memory_bytes,
                gang_nodes=each.gang_nodes if each.gang_nodes > 1 else 0,  # both mean: no gang
            )
            for each in allocations
        ]
    )


def _processes(table: ProcessTable) -> agent_pb2.ProcessTable:
    return agent_pb2.ProcessTable(
        started_at=table.started_at,
        processes=[_process(each) for each in table.processes],
        unread_gpu_uuids=table.unread_gpu_uuids,
        assignments=[_assignment(each) for each in table.assignments],
        assignments_unknown=table.assignments_unknown,
    )


def _process(attributed: AttributedProcess) -> types_pb2.Process:
    process = attributed.process
    return types_pb2.Process(
        pid=process.pid,
        user=process.user,
        command=process.command,
        memory_used_bytes=process.memory_used_bytes,
        allocation_id=attributed.allocation_id,
        started_at=process.started_at,
        gpu_uuid=process.gpu_uuid,
        owner=None if process.owner == NOBODY else _owner(process.owner),
        gpu_instance_id=process.gpu_instance_id,
    )


def _owner(owner: Owner) -> types_pb2.Owner:
    return types_pb2.Owner(
        unit=owner.unit,
        container_id=owner.container_id,
        container_runtime=owner.container_runtime,
        container_name=owner.container_name,
        pod_uid=owner.pod_uid,
        pod_namespace=owner.pod_namespace,
        pod_name=owner.pod_name,
        slurm_job=owner.slurm_job,
        slurm_step=owner.slurm_step,
    )


def _assignment(assignment: Assignment) -> types_pb2.Assignment:
    return types_pb2.Assignment(
        gpu_uuid=assignment.gpu_uuid,
        by=assignment.by,
        holder=assignment.holder,
        mig_device_uuid=assignment.mig_device_uuid,
    )


def _health(gpus: tuple[GpuHealth, ...]) -> agent_pb2.NodeHealth:
    return agent_pb2.NodeHealth(
        gpus=[
            types_pb2.GpuHealth(
                uuid=each.uuid,
                verdict=_VERDICTS[each.verdict],
                action=_REPAIR_ACTIONS[each.action],
                check=each.check or "",
                reason=each.reason,
                since=each.since,
                faults=[_health_fault(fault) for fault in each.faults],
            )
            for each in gpus
        ]
    )


def _health_fault(fault: Fault) -> types_pb2.HealthFault:
    return types_pb2.HealthFault(
        check=fault.check,
        code=fault.code,
        verdict=_VERDICTS[fault.verdict],
        action=_REPAIR_ACTIONS[fault.action],
        reason=fault.reason,
        since=fault.since,
        last_at=fault.last_at,
        count=min(fault.count, _COUNT_MAX),
    )


def _gpu_mig(status: GpuMigStatus) -> mig_pb2.GpuMig:
    return mig_pb2.GpuMig(
        gpu_uuid=status.gpu_uuid,
        state=_MIG_STATES[status.state],
        reason=status.reason,
        config=status.config,
        operation_id=status.operation_id,
        is_withheld=status.is_withheld,
        leave_by=status.leave_by,
        is_evicting=status.is_evicting,
        changed_at=status.changed_at,
        layout=None if status.layout is None else _mig_layout(status.layout),
        geometry=None if status.geometry is None else _mig_geometry(status.geometry),
        leaving_allocation_ids=status.leaving_allocation_ids,
    )


def _mig_layout(layout: Layout) -> mig_pb2.MigLayout:
    return mig_pb2.MigLayout(
        instances=[
            mig_pb2.MigInstance(
                profile=each.profile, start=each.start, size=each.size, compute=each.compute
            )
            for each in layout
        ]
    )


def _mig_geometry(geometry: Geometry) -> mig_pb2.MigGeometry:
    return mig_pb2.MigGeometry(
        compute_slices=geometry.compute_slices,
        memory_slices=geometry.memory_slices,
        profiles=[
            mig_pb2.MigProfile(
                name=each.name,
                compute_slices=each.compute_slices,
                memory_slices=each.memory_slices,
                starts=each.starts,
                memory_bytes=each.memory_mib * _MIB,
                count_max=each.count_max,
            )
            for each in geometry.profiles
        ],
    )


def _driver(status: DriverStatus) -> agent_pb2.DriverStatus:
    return agent_pb2.DriverStatus(
        state=_DRIVER_STATES[status.state], reason=status.reason, restarts=status.restarts
    )
