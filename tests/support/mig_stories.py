"""Short words for stories of partitions: one small GPU, what is wished for it, who uses it."""

from tests.support.mig_memory import NOW, MemoryDriver, Stage, a_user

from stoker.agent.mig.comparing import layout_of
from stoker.agent.mig.in_the_way import GpuUsers, ProcessToEnd
from stoker.agent.mig.operations import Declared
from stoker.core.mig.boards import A30_24GB, Board
from stoker.core.mig.geometry import Layout, Placed, Wanted
from stoker.core.mig.layouts import describe
from stoker.core.mig.reports import InTheWay

WHOLE = (Placed(0, 4, "4g.24gb"),)
HALVES = Wanted(True, (("2g.12gb", 2),))
QUARTERS = Wanted(True, (("1g.6gb", 4),))
OFF = Wanted(False)


def a_stage(
    layout: Layout | None = WHOLE, board: Board = A30_24GB, gpus: int = 1, **options: bool
) -> Stage:
    """Return GPUs that are partitioned alike, MIG mode off without a layout, and an agent."""
    return Stage(
        [
            MemoryDriver(board, layout or (), index=index, is_enabled=layout is not None, **options)
            for index in range(gpus)
        ]
    ).start()


def shown(stage: Stage, index: int = 0) -> str:
    """Return the layout of a GPU in words."""
    return describe(layout_of(stage.drivers[index].gpu))


def a_process(stage: Stage, *names: str, index: int = 0) -> GpuUsers:
    """Return that the first instance of a GPU is used by these, foreign processes from PID 7 on."""
    gpu = stage.drivers[index].gpu
    id_ = gpu.instances[0].id
    return GpuUsers(
        {id_: tuple(a_user(gpu, name) for name in names)},
        foreign=tuple(ProcessToEnd(7 + each, NOW, id_) for each in range(len(names))),
    )


def an_allocation(stage: Stage) -> GpuUsers:
    """Return that the first instance is held by an allocation."""
    (instance, *_) = stage.gpu.instances
    user = InTheWay("allocation", "allocation a1 (alice, no process)", (), allocation_id="a1")
    return GpuUsers({instance.id: (user,)})


def declare(rig: Stage, wanted: Wanted = HALVES) -> Stage:
    """Start the agent with a configuration that declares this for every GPU."""
    rig.declared = {each.gpu.uuid: Declared(wanted, "site") for each in rig.drivers}
    return rig.start()
