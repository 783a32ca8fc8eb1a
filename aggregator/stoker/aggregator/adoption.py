"""What a node holds and the ledger does not know: as devices, where nobody else has them."""

from collections.abc import Mapping, Sequence

from stoker.aggregator.model import Claim, Device, Gpu, HeldAllocation, NodeFacts, Request

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
        return _mig_device(held, gpus, claims)
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


def _mig_device(
    held: HeldAllocation, gpus: Mapping[str, Gpu], claims: Claims
) -> tuple[Device, ...] | None:
    if len(held.gpu_uuids) != 1 or len(held.mig_device_uuids) != 1:
        return None
    (uuid,), (wanted,) = held.gpu_uuids, held.mig_device_uuids
    taken = {claim.mig_device_uuid for claim in claims.get(uuid, ())}
    gpu = gpus.get(uuid)
    if gpu is None or "" in taken or wanted in taken:
        return None
    return next(
        (
            (
                Device(
                    uuid,
                    gpu.model,
                    gpu.index,
                    each.memory_total_bytes,
                    exclusive=False,
                    mig_device_uuid=each.uuid,
                    mig_profile=each.profile,
                ),
            )
            for each in gpu.mig_devices
            if each.uuid == wanted
        ),
        None,
    )


def _has_room(held: HeldAllocation, gpu: Gpu, claims: tuple[Claim, ...]) -> bool:
    if held.memory_bytes is None:
        return not claims
    taken = held.memory_bytes
    for claim in claims:
        if claim.memory_bytes is None or claim.mig_device_uuid:
            return False
        taken += claim.memory_bytes
    return taken <= gpu.memory_total_bytes
