"""Messages of the agents' door to values and back; raises Malformed with the field's path."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stoker.aggregator import limits
from stoker.aggregator.inventories import Inventory, named, with_inventory
from stoker.aggregator.limits import Malformed
from stoker.aggregator.model import (
    Command,
    DriverState,
    Frame,
    Gpu,
    GpuSample,
    HeldAllocation,
    HoldRefusal,
    MissingGpu,
    NodeFacts,
)
from stoker.aggregator.wire_health import read_health, read_processes
from stoker.core.gpu_models import GPUS_PER_NODE_MAX
from stoker.v1 import agent_pb2

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
            inventory = Inventory(known.driver_version, known.cuda_version, known.gpus)
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
    gpus = tuple(_gpu(gpu, f"{field}.gpus[{i}]") for i, gpu in enumerate(message.gpus))
    for name, values in (
        ("number", [str(gpu.number) for gpu in gpus]),
        ("uuid", [gpu.uuid for gpu in gpus]),
    ):
        limits.unique(values, f"{field}.gpus[].{name}")
    if len(message.missing) > GPUS_PER_NODE_MAX:
        found = len(message.missing)
        raise Malformed(f"{field}.missing", f"at most {GPUS_PER_NODE_MAX}, found {found}")
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
    return Frame(
        sequence=message.sequence,
        at=limits.finite(message.at, "frame.at"),
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
    )
    hold = agent_pb2.Hold(allocation=held)
    return agent_pb2.AggregatorMessage(command=agent_pb2.Command(id=command.id, hold=hold))


# --- helpers


def _id(value: str, field: str) -> str:
    return limits.text(value, field, limits.ID_BYTES_MAX, required=True)


def _gpu(message: agent_pb2.Gpu, field: str) -> Gpu:
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
    )


def _refusals(messages: Iterable[agent_pb2.HoldRefusal]) -> tuple[HoldRefusal, ...]:
    return tuple(
        HoldRefusal(
            _id(message.allocation_id, f"frame.refusals[{i}].allocation_id"),
            message.reason[: limits.REASON_BYTES_MAX],
        )
        for i, message in enumerate(messages)
    )
