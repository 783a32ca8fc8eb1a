"""Messages of the agents' door to values and back; raises Malformed with the field's path."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stoker.aggregator import limits
from stoker.aggregator.inventories import Inventory, named, with_inventory
from stoker.aggregator.limits import Malformed
from stoker.aggregator.model import (
    COMPUTE_MILLI,
    Command,
    DriverState,
    Frame,
    Gpu,
    GpuSample,
    HeldAllocation,
    HoldRefusal,
    MigDevice,
    MissingGpu,
    NodeFacts,
)
from stoker.aggregator.wire_health import read_health, read_processes
from stoker.aggregator.wire_mig import read_node_mig
from stoker.core.gpu_models import GPUS_PER_NODE_MAX
from stoker.v1 import agent_pb2, mig_pb2

PROTOCOL_VERSION = 1

_DRIVER_STATES = {
    agent_pb2.DRIVER_STATE_STARTING: DriverState.STARTING,
    agent_pb2.DRIVER_STATE_READING: DriverState.READING,
    agent_pb2.DRIVER_STATE_BLOCKED: DriverState.BLOCKED,
    agent_pb2.DRIVER_STATE_FAILED: DriverState.FAILED,
    agent_pb2.DRIVER_STATE_RELEASED: DriverState.RELEASED,
}


@dataclass(frozen=True, slots=True)
class Hello:
    """What an agent says first on a stream."""

    facts: NodeFacts  # without GPUs: those are in `inventory`
    inventory: Inventory | None  # None: its driver has not answered yet
    held: tuple[HeldAllocation, ...]
    process_id: str
    monotonic_seconds: float

    def inventory_beside(self, known: NodeFacts | None) -> Inventory | None:
        """Return the inventory, its missing GPUs named where they were `known` before."""
        return None if self.inventory is None else named(self.inventory, known)

    def complete_facts(self, known: NodeFacts | None) -> NodeFacts:
        """Return the facts with GPUs; those known before, while the driver has not answered."""
        inventory = self.inventory_beside(known)
        if inventory is None and known is not None:
            inventory = Inventory(
                known.driver_version,
                known.cuda_version,
                known.gpus,
                cpu_milli=known.cpu_milli,
                host_memory_bytes=known.host_memory_bytes,
            )
        return self.facts if inventory is None else with_inventory(self.facts, inventory, known)


# --- up: what agents say


def read_hello(message: agent_pb2.Hello) -> Hello:
    """Return the hello as a value; its protocol version was looked at before."""
    facts = NodeFacts(
        name=limits.dns_name(message.node, "hello.node"),
        incarnation=_id(message.incarnation, "hello.incarnation"),
        boot_id=limits.text(message.boot_id, "hello.boot_id"),
        agent_version=limits.text(message.agent_version, "hello.agent_version"),
        simulated=message.simulated,
        pool=limits.text(message.pool, "hello.pool"),
        labels=limits.labels(message.labels, "hello.labels"),
        interval_seconds=limits.number(
            message.interval_seconds,
            "hello.interval_seconds",
            0.001,
            limits.INTERVAL_SECONDS_MAX,
        ),
    )
    inventory = None
    if message.HasField("inventory"):
        inventory = read_inventory(message.inventory, "hello.inventory")
    return Hello(
        facts=facts,
        inventory=inventory,
        held=_held(message.held.allocations, "hello.held"),
        process_id=_id(message.process_id, "hello.process_id"),
        monotonic_seconds=limits.finite(message.monotonic_seconds, "hello.monotonic_seconds"),
    )


def read_inventory(message: agent_pb2.Inventory, field: str) -> Inventory:
    """Return the inventory as a value."""
    if len(message.gpus) > GPUS_PER_NODE_MAX:
        raise Malformed(f"{field}.gpus", f"at most {GPUS_PER_NODE_MAX}, found {len(message.gpus)}")
    uuids = {gpu.number: gpu.uuid for gpu in message.gpus}
    gpus = tuple(_gpu(gpu, uuids, f"{field}.gpus[{i}]") for i, gpu in enumerate(message.gpus))
    for name, values in (
        ("number", [str(gpu.number) for gpu in gpus]),
        ("uuid", [gpu.uuid for gpu in gpus]),
        ("mig_devices[].uuid", [each.uuid for gpu in gpus for each in gpu.mig_devices]),
    ):
        limits.unique(values, f"{field}.gpus[].{name}")
    if len(message.missing) > GPUS_PER_NODE_MAX:
        found = len(message.missing)
        raise Malformed(f"{field}.missing", f"at most {GPUS_PER_NODE_MAX}, found {found}")
    host = message.host if message.HasField("host") else None
    return Inventory(
        driver_version=limits.text(message.driver_version, f"{field}.driver_version"),
        cuda_version=limits.text(message.cuda_version, f"{field}.cuda_version"),
        gpus=gpus,
        missing=tuple(
            MissingGpu(
                index=each.index,
                uuid=limits.text(each.uuid, f"{field}.missing[{i}].uuid", limits.ID_BYTES_MAX),
                error_kind=limits.text(each.error_kind, f"{field}.missing[{i}].error_kind"),
                reason=each.reason[: limits.REASON_BYTES_MAX],
            )
            for i, each in enumerate(message.missing)
        ),
        cpu_milli=None if host is None else _cpu_milli(host.cpu_milli, f"{field}.host.cpu_milli"),
        host_memory_bytes=(
            None if host is None else limits.size(host.memory_bytes, f"{field}.host.memory_bytes")
        ),
    )


def read_frame(
    message: agent_pb2.Frame,
    uuids: Mapping[int, str],
    sampled_at: float,
    missing: tuple[MissingGpu, ...] | None = None,
) -> Frame:
    """Return the frame as a value.

    `uuids`: the UUID of each GPU's short number; samples of other GPUs are left out. `sampled_at`:
    when the frame was made, on the aggregator's clock. `missing`: of its inventory, if it has one,
    which was looked at before.
    """
    if message.sequence == 0:
        raise Malformed("frame.sequence", "must be 1 or more, found 0")
    driver = None
    driver_reason = ""
    if message.HasField("driver"):
        driver = _DRIVER_STATES.get(message.driver.state)
        if driver is None:
            raise Malformed("frame.driver.state", f"{message.driver.state} is no state of a driver")
        driver_reason = message.driver.reason[: limits.REASON_BYTES_MAX]
    at = limits.finite(message.at, "frame.at")
    return Frame(
        sequence=message.sequence,
        at=at,
        monotonic_seconds=message.monotonic_seconds,
        commands_done=message.commands_done,
        # Samples of GPUs that are not known (yet) tell nothing, also not that the node is fresh.
        samples=_samples(message.samples, uuids, sampled_at) or None,
        processes=read_processes(message.processes) if message.HasField("processes") else None,
        held=(_held(message.held.allocations, "frame.held") if message.HasField("held") else None),
        refusals=_refusals(message.refusals) if message.refusals else (),
        driver=driver,
        driver_reason=driver_reason,
        health=read_health(message.health) if message.HasField("health") else None,
        mig=read_node_mig(message.mig, sampled_at - at) if message.HasField("mig") else None,
        missing=missing,
        frames_dropped=message.frames_dropped,
    )


# --- down: what they are told


def welcome_message(aggregator_version: str, acked_sequence: int) -> agent_pb2.AggregatorMessage:
    """Return the answer to a hello."""
    return agent_pb2.AggregatorMessage(
        welcome=agent_pb2.Welcome(
            protocol_version=PROTOCOL_VERSION,
            aggregator_version=aggregator_version,
            acked_sequence=acked_sequence,
        )
    )


def ack_message(sequence: int) -> agent_pb2.AggregatorMessage:
    """Return the acknowledgement of every frame up to and including `sequence`."""
    return agent_pb2.AggregatorMessage(ack=agent_pb2.Ack(sequence=sequence))


def command_message(command: Command) -> agent_pb2.AggregatorMessage:
    """Return the command as a message."""
    if command.hold is None:
        drop = agent_pb2.Drop(allocation_id=command.allocation_id, reason=command.reason)
        return agent_pb2.AggregatorMessage(command=agent_pb2.Command(id=command.id, drop=drop))
    held = agent_pb2.HeldAllocation(
        id=command.hold.id,
        gpu_uuids=command.hold.gpu_uuids,
        memory_bytes=command.hold.memory_bytes,
        holder=command.hold.holder,
        ttl_seconds=command.hold.ttl_seconds,
        held_since=command.hold.held_since,
        mig_device_uuids=command.hold.mig_device_uuids,
        compute_milli=command.hold.compute_milli,
        cpu_milli=command.hold.cpu_milli,
        host_memory_bytes=command.hold.host_memory_bytes,
        gang_nodes=command.hold.gang_nodes if command.hold.gang_nodes > 1 else 0,
    )
    hold = agent_pb2.Hold(allocation=held)
    return agent_pb2.AggregatorMessage(command=agent_pb2.Command(id=command.id, hold=hold))


def relay_message(relay: mig_pb2.MigRelay) -> agent_pb2.AggregatorMessage:
    """Return a question about partitions as a message."""
    return agent_pb2.AggregatorMessage(mig=relay)


# --- helpers


def _id(value: str, field: str) -> str:
    return limits.text(value, field, limits.ID_BYTES_MAX, required=True)


def _cpu_milli(value: int, field: str) -> int:
    if value > limits.CPU_MILLI_MAX:
        raise Malformed(field, f"at most {limits.CPU_MILLI_MAX}, found {value}")
    return value


def _gpu(message: agent_pb2.Gpu, uuids: Mapping[int, str], field: str) -> Gpu:
    limit = message.power_limit_watts if message.HasField("power_limit_watts") else None
    if limit is not None:
        limits.finite(limit, f"{field}.power_limit_watts")
    return Gpu(
        uuid=_id(message.uuid, f"{field}.uuid"),
        model=limits.text(message.model, f"{field}.model"),
        index=message.index,
        memory_total_bytes=message.memory_total_bytes,
        number=message.number,
        pci_bus_id=limits.text(message.pci_bus_id, f"{field}.pci_bus_id"),
        serial=limits.text(message.serial, f"{field}.serial"),
        compute_capability=limits.text(message.compute_capability, f"{field}.compute_capability"),
        power_limit_watts=limit,
        minor_number=message.minor_number if message.HasField("minor_number") else None,
        vbios_version=limits.text(message.vbios_version, f"{field}.vbios_version"),
        mig_enabled=message.mig_enabled if message.HasField("mig_enabled") else None,
        numa_node=_numa_node(message, f"{field}.numa_node"),
        nvlink_peers=_nvlink_peers(message, uuids, f"{field}.nvlink_peers"),
        nvswitch_links=_links(message.nvswitch_links, f"{field}.nvswitch_links"),
        mig_devices=_mig_devices(message.mig_devices, f"{field}.mig_devices"),
    )


def _numa_node(message: agent_pb2.Gpu, field: str) -> int | None:
    if not message.HasField("numa_node"):
        return None
    if message.numa_node > limits.NUMA_NODE_MAX:
        raise Malformed(field, f"at most {limits.NUMA_NODE_MAX}, found {message.numa_node}")
    return message.numa_node


def _nvlink_peers(
    message: agent_pb2.Gpu, uuids: Mapping[int, str], field: str
) -> tuple[tuple[str, int], ...]:
    """Return the GPUs that it has links to; `uuids`: those of the inventory by their numbers."""
    peers: dict[str, int] = {}
    for place, each in enumerate(message.nvlink_peers):
        uuid = uuids.get(each.number)
        if uuid is None or uuid == message.uuid or uuid in peers:
            found = "there already" if uuid in peers else f"{each.number}"
            problem = f"must be the number of another GPU of the inventory, found {found}"
            raise Malformed(f"{field}[{place}].number", problem)
        if each.links == 0:
            raise Malformed(f"{field}[{place}].links", "must be 1 or more, found 0")
        peers[uuid] = _links(each.links, f"{field}[{place}].links")
    return tuple(peers.items())


def _links(value: int, field: str) -> int:
    if value > limits.NVLINKS_PER_GPU_MAX:
        raise Malformed(field, f"at most {limits.NVLINKS_PER_GPU_MAX}, found {value}")
    return value


def _mig_devices(messages: Sequence[agent_pb2.MigDevice], field: str) -> tuple[MigDevice, ...]:
    if len(messages) > limits.MIG_DEVICES_PER_GPU_MAX:
        raise Malformed(field, f"at most {limits.MIG_DEVICES_PER_GPU_MAX}, found {len(messages)}")
    return tuple(
        MigDevice(
            uuid=_id(each.uuid, f"{field}[{i}].uuid"),
            profile=limits.text(each.profile, f"{field}[{i}].profile", required=True),
            memory_total_bytes=limits.size(
                each.memory_total_bytes, f"{field}[{i}].memory_total_bytes"
            ),
            gpu_instance_id=each.gpu_instance_id,
            compute_instance_id=each.compute_instance_id,
        )
        for i, each in enumerate(messages)
    )


def _samples(
    messages: Iterable[agent_pb2.GpuSample], uuids: Mapping[int, str], sampled_at: float
) -> dict[str, GpuSample]:
    # The hottest path of the aggregator: a value other than zero is present, which saves most calls
    # of HasField, and one sum tells whether any of the numbers is not finite.
    samples: dict[str, GpuSample] = {}
    for place, message in enumerate(messages):
        uuid = uuids.get(message.number)
        if uuid is None:
            continue  # resent, and made before this GPU left the inventory
        has = message.HasField
        used, reserved = message.memory_used_bytes, message.memory_reserved_bytes
        utilization, memory = message.utilization_ratio, message.memory_utilization_ratio
        temperature, power = message.temperature_celsius, message.power_watts
        energy, age = message.energy_joules, message.age_seconds
        sm_clock, memory_clock = message.sm_clock_hertz, message.memory_clock_hertz
        if not math.isfinite(utilization + memory + temperature + power + energy + age):
            raise _not_finite(message, place)
        samples[uuid] = GpuSample(
            used if used or has("memory_used_bytes") else None,
            reserved if reserved or has("memory_reserved_bytes") else None,
            utilization if utilization or has("utilization_ratio") else None,
            memory if memory or has("memory_utilization_ratio") else None,
            temperature if temperature or has("temperature_celsius") else None,
            power if power or has("power_watts") else None,
            energy if energy or has("energy_joules") else None,
            sm_clock if sm_clock or has("sm_clock_hertz") else None,
            memory_clock if memory_clock or has("memory_clock_hertz") else None,
            sampled_at - age if age > 0.0 else sampled_at,
        )
    return samples


def _not_finite(message: agent_pb2.GpuSample, place: int) -> Malformed:
    for field, value in message.ListFields():
        if isinstance(value, float) and not math.isfinite(value):
            name = f"frame.samples[{place}].{field.name}"
            return Malformed(name, f"must be a finite number, found {value}")
    return Malformed(f"frame.samples[{place}]", "its numbers are too large")


def _held(messages: Iterable[agent_pb2.HeldAllocation], field: str) -> tuple[HeldAllocation, ...]:
    held = tuple(
        _held_allocation(message, f"{field}.allocations[{i}]") for i, message in enumerate(messages)
    )
    limits.unique([each.id for each in held], f"{field}.allocations[].id")
    return held


def _held_allocation(message: agent_pb2.HeldAllocation, field: str) -> HeldAllocation:
    uuids = list(message.gpu_uuids)
    if not 0 < len(uuids) <= GPUS_PER_NODE_MAX:
        raise Malformed(
            f"{field}.gpu_uuids", f"must be 1 to {GPUS_PER_NODE_MAX}, found {len(uuids)}"
        )
    limits.unique(uuids, f"{field}.gpu_uuids")
    memory_bytes = None
    if message.HasField("memory_bytes"):
        memory_bytes = limits.size(message.memory_bytes, f"{field}.memory_bytes")
        if len(uuids) > 1:
            raise Malformed(f"{field}.memory_bytes", "a share is of one GPU, found more")
    if len(message.mig_device_uuids) > GPUS_PER_NODE_MAX:
        found = len(message.mig_device_uuids)
        raise Malformed(f"{field}.mig_device_uuids", f"at most {GPUS_PER_NODE_MAX}, found {found}")
    mig_uuids = [
        _id(uuid, f"{field}.mig_device_uuids[{i}]")
        for i, uuid in enumerate(message.mig_device_uuids)
    ]
    limits.unique(mig_uuids, f"{field}.mig_device_uuids")
    if message.gang_nodes > limits.GANG_NODES_MAX:
        found = message.gang_nodes
        raise Malformed(f"{field}.gang_nodes", f"at most {limits.GANG_NODES_MAX}, found {found}")
    return HeldAllocation(
        id=_id(message.id, f"{field}.id"),
        gpu_uuids=tuple(uuids),
        memory_bytes=memory_bytes,
        holder=limits.text(message.holder, f"{field}.holder"),
        ttl_seconds=limits.number(
            message.ttl_seconds, f"{field}.ttl_seconds", 0.0, limits.TTL_SECONDS_MAX
        ),
        held_since=limits.finite(message.held_since, f"{field}.held_since"),
        is_leaving=message.is_leaving,
        mig_device_uuids=tuple(mig_uuids),
        compute_milli=_compute_milli(message, field),
        cpu_milli=_cpu_milli(message.cpu_milli, f"{field}.cpu_milli"),
        host_memory_bytes=_host_memory(message, field),
        gang_nodes=max(1, message.gang_nodes),
    )


def _compute_milli(message: agent_pb2.HeldAllocation, field: str) -> int | None:
    if not message.HasField("compute_milli"):
        return None
    if not 0 < message.compute_milli <= COMPUTE_MILLI:
        found = message.compute_milli
        raise Malformed(f"{field}.compute_milli", f"must be 1 to {COMPUTE_MILLI}, found {found}")
    return message.compute_milli


def _host_memory(message: agent_pb2.HeldAllocation, field: str) -> int:
    value, name = message.host_memory_bytes, f"{field}.host_memory_bytes"
    return limits.size(value, name) if value else 0


def _refusals(messages: Iterable[agent_pb2.HoldRefusal]) -> tuple[HoldRefusal, ...]:
    return tuple(
        HoldRefusal(
            _id(message.allocation_id, f"frame.refusals[{i}].allocation_id"),
            message.reason[: limits.REASON_BYTES_MAX],
        )
        for i, message in enumerate(messages)
    )
