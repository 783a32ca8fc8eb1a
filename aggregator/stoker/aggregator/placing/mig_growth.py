"""What taking a MIG device loses of the places that its card has left.

Instances that nobody uses can be cut anew, so only those in use count as taken; what a place is
worth is for `mig_slices` to say.
"""

from collections.abc import Collection

from stoker.aggregator.model import MigDevice
from stoker.aggregator.placing.mig_slices import table_of
from stoker.aggregator.views import GpuView
from stoker.core.mig.layouts import instance_id


def growth(gpu: GpuView, device: MigDevice, beside: Collection[str] = ()) -> float:
    """Return what the worth of the card's places falls by when one of its free devices is taken.

    `beside`: devices that are to be taken too. Devices of one size compare. 0 where its GPU
    instance is in use already, and on cards whose places are not told.
    """
    mig = gpu.mig
    if mig is None or mig.layout is None or mig.geometry is None:
        return 0.0
    places = {instance_id(mig.geometry, each.size, each.start): each for each in mig.layout}
    free = {each.uuid for each in gpu.mig_free if each.uuid not in beside}
    in_use = {each.gpu_instance_id for each in gpu.gpu.mig_devices if each.uuid not in free}
    if device.gpu_instance_id in in_use or device.gpu_instance_id not in places:
        return 0.0
    taken = sum(placed.mask for id_, placed in places.items() if id_ in in_use)
    return table_of(mig.geometry).loss(taken, places[device.gpu_instance_id].mask)
