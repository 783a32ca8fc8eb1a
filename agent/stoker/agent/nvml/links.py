"""What a GPU's NVLinks lead to: other GPUs, by their PCI addresses, and NVSwitches.

Links are followed when the GPUs are looked for. One that goes down later leaves this picture as it
is: that it is down is told with the slow facts, and judged. When there are more than were followed,
as on a host whose fabric manager came up after the agent, the state has the GPUs looked for anew.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from stoker.agent.driver import DriverError, DriverUnavailable, GpuUnavailable
from stoker.agent.facts import Fact
from stoker.agent.nvml.facts import Told
from stoker.agent.nvml.fields import NVLINK_LINK_COUNT, link_state_field, value_of
from stoker.agent.nvml.plan import FIELD_VALUES, FieldBatch, Plan
from stoker.agent.nvml.session import Device, Session, if_told
from stoker.agent.nvml.table import FIELD_VALUE, NVLINK_MAX_LINKS, Code, Handle, NvlinkDevice
from stoker.agent.nvml.units import as_text
from stoker.agent.readings import GpuIdentity, NvlinkPeer

_STATE = "nvmlDeviceGetNvLinkState"
_REMOTE_TYPE = "nvmlDeviceGetNvLinkRemoteDeviceType"
_REMOTE_PCI = "nvmlDeviceGetNvLinkRemotePciInfo"


@dataclass(frozen=True, slots=True)
class Links:
    """The NVLinks of one GPU."""

    count: int  # active or not
    active: int = 0
    to_switches: int = 0  # active
    # Active ones that may lead to a GPU, by the normalised PCI address at the other end.
    to_addresses: Mapping[str, int] = field(default_factory=dict[str, int])


def follow_links(session: Session, device: Device) -> Links:
    """Return where the links lead; raises DriverUnavailable and GpuUnavailable.

    Drivers before R470 tell an address and not of what: it counts where it is that of a GPU.
    """
    count = _count_links(session, device)
    to_switches, to_addresses = 0, Counter[str]()
    active = _active_links(session, device, count)
    for link in active:
        kind = if_told(session, device, _REMOTE_TYPE, device.handle, link)
        # The unknown is what the host of a virtual machine keeps from it, and that is a switch.
        if kind in (NvlinkDevice.SWITCH, NvlinkDevice.UNKNOWN):
            to_switches += 1
        elif kind in (NvlinkDevice.GPU, None):  # None: only the address can tell
            address = read_bus_id(session, device, _REMOTE_PCI, link)
            if address is not None:
                to_addresses[normalised(address)] += 1
    return Links(count, len(active), to_switches, to_addresses)


def with_peers(gpus: Sequence[tuple[GpuIdentity, Links]]) -> tuple[GpuIdentity, ...]:
    """Return the identities with the GPUs among them that each is linked to, in their order."""
    addresses = {
        normalised(identity.pci_bus_id): identity.uuid
        for identity, _ in gpus
        if identity.pci_bus_id is not None
    }
    return tuple(
        replace(
            identity,
            nvlink_peers=tuple(
                NvlinkPeer(uuid, links.to_addresses[address])
                for address, uuid in addresses.items()
                if address in links.to_addresses and uuid != identity.uuid
            ),
            nvswitch_links=links.to_switches,
            nvlinks_active=links.active,
        )
        for identity, links in gpus
    )


def read_bus_id(session: Session, device: Device, function: str, *arguments: int) -> str | None:
    """Return the address in the PCI information that a function gives; None where it does not.

    Raises DriverUnavailable and GpuUnavailable.
    """

    # The struct decodes its text when that is read, so that belongs to the call.
    def bus_id(handle: Handle, *arguments: int) -> str | None:
        return as_text(session.find(function)(handle, *arguments).busId)

    try:
        return session.call(device, function, bus_id, device.handle, *arguments)
    except (DriverUnavailable, GpuUnavailable):
        raise
    except DriverError:
        return None


def normalised(bus_id: str) -> str:
    """Return a PCI address without the zeros before it: the driver writes four or eight digits."""
    return bus_id.lower().lstrip("0")


def _active_links(session: Session, device: Device, count: int) -> list[int]:
    """Return the links that are active, asked for as they will be with the slow facts."""
    told = Told(device.label)
    states = FieldBatch(session, device, map(link_state_field, range(count)))
    Plan(session, device, [states], ()).read(told)
    up = told.by_label.get(Fact.NVLINK_UP, {})
    return [link for link in range(count) if up.get(str(link))]


def _count_links(session: Session, device: Device) -> int:
    """Return how many NVLinks it has, active or not."""
    values = if_told(session, device, FIELD_VALUES, device.handle, [(NVLINK_LINK_COUNT, 0)])
    if values is not None:
        _, _, _, _, value_type, code, raw = FIELD_VALUE.unpack_from(values)
        links = value_of(value_type, raw) if code == Code.SUCCESS else None
        if links is not None and links <= NVLINK_MAX_LINKS:
            return int(links)
    for link in range(NVLINK_MAX_LINKS):
        try:
            session.ask(device, _STATE, device.handle, link)
        except (DriverUnavailable, GpuUnavailable):
            raise
        except DriverError:
            return link
    return NVLINK_MAX_LINKS
