"""What has to hold of partitioned GPUs, after every event and once the faults have stopped, one
function per promise; its docstring is it.
"""

from collections import defaultdict
from typing import TYPE_CHECKING

from stoker.agent.mig.comparing import is_as_wanted, layout_of
from stoker.agent.partitions import GpuPartitions
from stoker.aggregator.model import AllocationState
from stoker.core.mig.geometry import MigState
from stoker.testing.broken import Broken

if TYPE_CHECKING:
    from stoker.testing.agent_process import AgentProcess
    from stoker.testing.world import World

_HAS = (AllocationState.GRANTED, AllocationState.RELEASING)


def what_a_node_holds_was_not_destroyed(world: "World") -> None:
    """By its journal no node holds a MIG device that a step has ended: also what was about to be
    held when the step was decided on is left alone.
    """
    if world.partitions is None:
        return
    destroyed = world.partitions.witness.destroyed
    for agent in world.agents:
        for held in agent.held:
            if not destroyed.isdisjoint(held.mig_device_uuids):
                raise Broken(what_a_node_holds_was_not_destroyed, node=agent.name, held=held)


def mig_devices_have_one_tenant(world: "World") -> None:
    """By the ledger, and by the nodes' journals, a MIG device is in one allocation at most."""
    granted: dict[str, list[str]] = defaultdict(list)
    for allocation in world.aggregator.fleet.allocations.values():
        if allocation.state in _HAS:
            for device in allocation.devices:
                if device.mig_device_uuid:
                    granted[device.mig_device_uuid].append(allocation.id)
    held: dict[str, list[str]] = defaultdict(list)
    for agent in world.agents:
        for each in agent.held:
            for uuid in each.mig_device_uuids:
                held[uuid].append(each.id)
    for uuid, tenants in (*granted.items(), *held.items()):
        if len(tenants) > 1:
            raise Broken(mig_devices_have_one_tenant, device=uuid, tenants=tenants)


# --- once the faults have stopped


def every_gpu_says_how_it_is(world: "World") -> None:
    """Every GPU is in the old layout or the new, with nothing half made; its status is a final one
    and says which, to the aggregator too. One whose mode is pending waits for its reset.
    """
    for agent in world.agents:
        if agent.mig_node is not None:
            for gpu in agent.mig_node.cards.gpus:
                _check(world, agent, agent.mig_node.cards.partitions(gpu.uuid))


def _check(world: "World", agent: "AgentProcess", gpu: GpuPartitions) -> None:
    assert agent.mig_node is not None
    assert world.partitions is not None
    life = agent.partitions
    told = (world.aggregator.fleet.status(agent.name).mig or {}).get(gpu.uuid)
    assert life is not None, "it was found to be up"
    status = next((each for each in life.keeper.statuses() if each.gpu_uuid == gpu.uuid), None)
    known = life.keeper.book.of(gpu.uuid)
    operation = known.operation

    def refuse(why: str) -> None:
        raise Broken(
            every_gpu_says_how_it_is,
            why=why,
            node=agent.name,
            gpu=gpu.uuid,
            layout=layout_of(gpu),
            instances=gpu.instances,
            status=status and (status.state, status.reason, status.layout),
            operation=operation,
        )

    if status is None:
        return refuse("nothing is said of it")
    if status.state is MigState.REBOOT_REQUIRED:
        if gpu.is_enabled == gpu.is_pending:
            refuse("no mode is pending")
        return None
    is_final = status.state in (None, MigState.SUCCESS, MigState.FAILED)
    # What was declared waits for those who use the GPU, as long as they like.
    waits = status.state is MigState.PENDING and bool(status.reason)
    if not is_final and not waits:
        refuse("it is still under way")
    if operation is not None and operation.is_stuck:
        refuse("it is neither as before nor as wanted")
    is_half_made = any(not each.compute_instances for each in gpu.instances)
    if is_half_made and gpu.uuid not in world.partitions.witness.lost_books:
        refuse("something is half made")
    if status.layout != layout_of(gpu):
        refuse("its layout is another")
    wanted = known.declared.wanted if known.declared else None
    if status.state is MigState.SUCCESS and wanted and not is_as_wanted(gpu, wanted):
        refuse("it is not as declared")
    if agent.mig_node.noted(gpu.uuid).operation != operation:
        refuse("something else is on the disk")
    if told is None or (told.state, told.is_withheld) != (status.state, status.is_withheld):
        refuse(f"the aggregator was told {told}")
    return None
