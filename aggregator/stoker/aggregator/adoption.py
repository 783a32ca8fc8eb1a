"""What a node holds and the ledger does not know: as devices, where nobody else has them."""

from collections.abc import Mapping, Sequence

from stoker.aggregator.model import (
    MIG_ANY,
    Claim,
    Device,
    Gpu,
    HeldAllocation,
    NodeFacts,
    Request,
)

Claims = Mapping[str, tuple[Claim, ...]]


def adoptable(held: HeldAllocation, facts: NodeFacts, claims: Claims) -> tuple[Device, ...] | None:
    """Return what the node holds as devices; None when they are not there or not free.

    `claims` are by GPU UUID.
    """
    gpus = {gpu.uuid: gpu for gpu in facts.gpus}
    if not held.gpu_uuids or len(set(held.gpu_uuids)) < len(held.gpu_uuids):
        return None
    if held.memory_bytes is not None and (held.memory_bytes <= 0 or len(held.gpu_uuids) > 1):
        return None
    if held.mig_device_uuids:
        return _mig_devices(held, gpus, claims)
    is_whole = held.memory_bytes is None
    if is_whole and held.compute_milli is not None:
        return None
    devices: list[Device] = []
    for uuid in held.gpu_uuids:
        gpu = gpus.get(uuid)
        if gpu is None or not _has_room(held, gpu, claims.get(uuid, ())):
            return None
        devices.append(
            Device(
                uuid,
                gpu.model,
                gpu.index,
                gpu.memory_total_bytes if held.memory_bytes is None else held.memory_bytes,
                exclusive=is_whole,
                compute_milli=None if is_whole else held.compute_milli,
            )
        )
    return tuple(devices)


def is_answer(devices: Sequence[Device], request: Request) -> bool:
    """Whether one node with these devices is what `request` asks for: so many, of that kind."""
    kinds = {(device.exclusive, bool(device.mig_device_uuid)) for device in devices}
    wanted = (request.is_whole, request.mig_profile is not None)
    return request.nodes == 1 and len(devices) == request.gpus and kinds == {wanted}


def profile_of(devices: Sequence[Device]) -> str | None:
    """Return the MIG profile that a request for these would name; None: they are no such."""
    profiles = {device.mig_profile for device in devices}
    return (profiles.pop() if len(profiles) == 1 else MIG_ANY) or None


def _mig_devices(
    held: HeldAllocation, gpus: Mapping[str, Gpu], claims: Claims
) -> tuple[Device, ...] | None:
    wanted = set(held.mig_device_uuids)
    devices: list[Device] = []
    for uuid in held.gpu_uuids:
        taken = {claim.mig_device_uuid for claim in claims.get(uuid, ())}
        gpu = gpus.get(uuid)
        if gpu is None or "" in taken or not wanted.isdisjoint(taken):
            return None
        mine = [
            Device(
                uuid,
                gpu.model,
                gpu.index,
                each.memory_total_bytes,
                exclusive=False,
                mig_device_uuid=each.uuid,
                mig_profile=each.profile,
            )
            for each in gpu.mig_devices
            if each.uuid in wanted
        ]
        if not mine:
            return None
        devices += mine
    is_whole_list = len(devices) == len(held.mig_device_uuids) == len(wanted)
    return tuple(devices) if is_whole_list else None


def _has_room(held: HeldAllocation, gpu: Gpu, claims: tuple[Claim, ...]) -> bool:
    if held.memory_bytes is None:
        return not claims
    taken = held.memory_bytes
    for claim in claims:
        if claim.memory_bytes is None or claim.mig_device_uuid:
            return False
        taken += claim.memory_bytes
    return taken <= gpu.memory_total_bytes
