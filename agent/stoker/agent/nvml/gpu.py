"""One GPU that was found: what it is, what it is asked at each rate, and what became of it."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from stoker.agent.driver import (
    DriverError,
    DriverUnavailable,
    GpuLost,
    GpuUnavailable,
    InventoryChanged,
    NoPermission,
    NotAvailable,
    NotFound,
)
from stoker.agent.facts import Fact, Rate
from stoker.agent.nvml.events import Events
from stoker.agent.nvml.facts import MEMORY, QUESTIONS, Question, Told, fan_questions
from stoker.agent.nvml.fields import Field, fields_at, link_fields
from stoker.agent.nvml.gpm import Gpm, GpmMetrics
from stoker.agent.nvml.links import follow_links, read_bus_id
from stoker.agent.nvml.mig import MigDevices, ask_mig_mode
from stoker.agent.nvml.plan import FieldBatch, Plan
from stoker.agent.nvml.processes import ProcessLists, ProcessNames
from stoker.agent.nvml.samples import SampleRings
from stoker.agent.nvml.session import Device, InvalidArgument, Prepared, Session, if_told
from stoker.agent.nvml.table import AFFINITY_SCOPE_NODE
from stoker.agent.nvml.units import Release, as_text, only_node, watts
from stoker.agent.readings import (
    WHOLE_GPU,
    GpuIdentity,
    GpuReading,
    MigDeviceReading,
    ProcessReading,
    ReadFailure,
    XidSeen,
)

_NUMA_NODE_WORDS = 16  # of 64 bits: 1024 nodes, the kernel's limit
# More than any card has; a number beyond is none.
_FANS_MAX: Final = 32


class NvmlGpu:
    """A GPU that answers for itself; made when the GPUs are looked for, closed before the next."""

    def __init__(
        self,
        session: Session,
        device: Device,
        metrics: GpmMetrics | None,
        xids: deque[XidSeen],
        now: Callable[[], float],
        release: Release | None = None,
    ) -> None:
        """Find out what it is and what it can be asked; raises DriverError when it is not told."""
        self.device, self.uuid = device, device.label
        self.lost: GpuLost | None = None
        self._session, self._xids, self._now = session, xids, now
        self._release = release
        self.identity = self._identify()
        self.links = follow_links(session, device)
        mig_enabled = self.identity.mig_enabled is True
        self._processes = ProcessLists(session, device, mig_enabled=mig_enabled)
        self._plans = {
            Rate.FAST: self._plan(Rate.FAST, (), ()),
            Rate.SLOW: self._plan(
                Rate.SLOW,
                tuple(link_fields(self.links.count)),
                fan_questions(self._count_fans()),
            ),
        }
        self._samples = SampleRings(session, device, mig_enabled=mig_enabled)
        self._gpm: Gpm | None = None
        self._mig: MigDevices | None = None
        self._events = Events(session, device, xids, mig_enabled=mig_enabled)
        try:
            self._gpm = Gpm.of(session, device, metrics)
            if mig_enabled:
                most = self.identity.memory_total_bytes
                self._mig = MigDevices(session, device, self._gpm, memory_max_bytes=most)
                self.identity = replace(self.identity, mig_devices=self._mig.identities)
        except DriverError:
            self.close()
            raise

    def read(self, rates: Sequence[Rate], *, profiling: bool) -> GpuReading:
        """Return what it tells; a GPU that cannot be read tells nothing but that.

        Raises DriverUnavailable and InventoryChanged.
        """
        at = self._now()
        told = Told(self.uuid, self.identity.memory_total_bytes)
        mig_devices: tuple[MigDeviceReading, ...] = ()
        try:
            if self.lost:
                raise self.lost
            if Rate.FAST in rates:
                # Events come first, so that an error is told even when the GPU went with it.
                self._collect(told, at)
            for rate in rates:
                self._plans[rate].read(told)
            if Rate.SLOW in rates:
                self._check(told)
            if Rate.FAST in rates:
                self._samples.read(told)
                self._profile(told, profiling=profiling)
                mig_devices = self._read_mig(told, rates, profiling=profiling)
        except GpuUnavailable as error:
            self.remember_loss(error)
            failure = ReadFailure(WHOLE_GPU, error.kind, error.what)
            xids = tuple(self._xids)
            return GpuReading(self.uuid, at, tuple(rates), xids=xids, failures=(failure,))
        return GpuReading(
            uuid=self.uuid,
            at=at,
            rates=tuple(rates),
            facts=told.facts,
            by_label=told.by_label,
            extents=told.extents,
            xids=tuple(self._xids),
            mig_devices=mig_devices,
            failures=tuple(told.failures.values()),
        )

    def read_processes(self, names: ProcessNames) -> Sequence[ProcessReading]:
        """Return who uses it; raises DriverError.

        What all MIG devices are used for is told to those with privileges only; others ask each.
        """
        if self.lost:
            raise self.lost
        try:
            return self._processes.read(self.uuid, names)
        except NoPermission:
            if self._mig is None:
                raise
        try:
            return self._read_parts(self._mig, names)
        except (GpuUnavailable, NotFound, InvalidArgument) as error:
            # So answers a MIG device that is no more; the GPU itself has answered just now.
            raise InventoryChanged(error.what, gpu=self.uuid) from error

    def collect_last(self) -> None:
        """Collect events that nobody will be able to collect later; raises DriverUnavailable."""
        try:
            if not self.lost:
                self._events.collect(Told(self.uuid), self._now())
        except GpuUnavailable as error:
            self.remember_loss(error)

    def delivered(self) -> None:
        """Forget the Xids: the readings that told them are on their way."""
        self._xids.clear()

    def remember_loss(self, error: DriverError) -> None:
        """Ask no more when it is lost: it answers nothing, and some drivers slowly."""
        if isinstance(error, GpuLost):
            self.lost = error

    def close(self) -> None:
        """Let go of what the driver keeps for it."""
        self._events.close()
        if self._gpm is not None:
            self._gpm.close()

    def _read_parts(self, mig: MigDevices, names: ProcessNames) -> Sequence[ProcessReading]:
        parts = mig.devices()
        lists = [
            (identity.gpu_instance_id, ProcessLists(self._session, device, mig_enabled=True))
            for identity, device in parts
        ]
        found = ProcessLists.read_parts(self.uuid, lists, names)
        if mig.devices() != parts:
            raise InventoryChanged("its MIG devices changed meanwhile", gpu=self.uuid)
        return found

    def _collect(self, told: Told, at: float) -> None:
        if not self._events.collect(told, at):
            return
        if self._mig is not None:
            self._mig.have_changed()
        self._check_mode(ask_mig_mode(self._session, self.device))

    def _check(self, told: Told) -> None:
        """Raise InventoryChanged when it is not the GPU that was found."""
        mode = told.facts.get(Fact.MIG_MODE)
        if mode is not None:
            self._check_mode(mode == 1)
        try:
            uuid = self._session.ask(self.device, "nvmlDeviceGetUUID", self.device.handle)
        except (DriverUnavailable, GpuUnavailable):
            raise
        except DriverError as error:
            raise InventoryChanged(f"it does not tell its UUID: {error}", gpu=self.uuid) from error
        if uuid != self.uuid:
            raise InventoryChanged(f"in its place is {uuid}", gpu=self.uuid)

    def _check_mode(self, mig_enabled: bool | None) -> None:
        found = self.identity.mig_enabled
        if mig_enabled is not None and mig_enabled != found:
            words = {True: "on", False: "off", None: "not there"}
            raise InventoryChanged(
                f"MIG mode was {words[found]}, is {words[mig_enabled]}", gpu=self.uuid
            )

    def _profile(self, told: Told, *, profiling: bool) -> None:
        if self._gpm is None:
            return
        if profiling:
            self._gpm.read(told, self._now())
        else:
            self._gpm.forget()

    def _read_mig(
        self, told: Told, rates: Sequence[Rate], *, profiling: bool
    ) -> tuple[MigDeviceReading, ...]:
        if self._mig is None:
            return ()
        if Rate.SLOW in rates:
            self._mig.may_have_changed(is_told=self._events.tells_mig_changes)
        return self._mig.read(told, self._now(), profiling=profiling)

    def _plan(
        self, rate: Rate, links: Sequence[Field | Question], more: Sequence[Question]
    ) -> Plan:
        session, device = self._session, self.device
        batches = [FieldBatch(session, device, fields_at(rate, self._release))]
        if links:
            fields = [each for each in links if isinstance(each, Field)]
            batches.append(FieldBatch(session, device, fields))
        whole = self.identity.mig_enabled is not True
        questions = [each for each in QUESTIONS[rate] if whole or not each.of_whole_gpu_only]
        functions = [each for each in links if isinstance(each, Question)]
        return Plan(session, device, batches, [*questions, *more, *functions])

    def _count_fans(self) -> int:
        fans: int | None = self._if_told("nvmlDeviceGetNumFans")
        if fans is None:
            return 1  # the first form of the function knows one fan, if any
        return fans if fans <= _FANS_MAX else 0

    def _identify(self) -> GpuIdentity:
        """Return what the GPU is; raises DriverError when model or memory is not told."""
        session, device = self._session, self.device
        model = as_text(session.ask(device, "nvmlDeviceGetName", device.handle))
        told = Told(self.uuid)
        MEMORY.tell(told, Prepared(session, device, MEMORY).answer())
        memory_total = told.facts.get(Fact.MEMORY_TOTAL_BYTES)
        if model is None or memory_total is None:
            raise NotAvailable("model or size of memory is not told", gpu=device.label)
        capability = self._if_told("nvmlDeviceGetCudaComputeCapability")
        return GpuIdentity(
            index=device.index,
            uuid=self.uuid,
            model=model,
            memory_total_bytes=int(memory_total),
            pci_bus_id=read_bus_id(session, device, "nvmlDeviceGetPciInfo"),
            serial=as_text(self._if_told("nvmlDeviceGetSerial")),
            board_part_number=as_text(self._if_told("nvmlDeviceGetBoardPartNumber")),
            vbios_version=as_text(self._if_told("nvmlDeviceGetVbiosVersion")),
            minor_number=self._if_told("nvmlDeviceGetMinorNumber"),
            compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
            power_limit_watts=watts(self._if_told("nvmlDeviceGetEnforcedPowerLimit")),
            mig_enabled=ask_mig_mode(session, device),
            numa_node=only_node(
                self._if_told("nvmlDeviceGetMemoryAffinity", _NUMA_NODE_WORDS, AFFINITY_SCOPE_NODE)
            ),
        )

    def _if_told(self, function: str, *arguments: Any) -> Any:
        """Return the answer, or None when this one thing cannot be had."""
        return if_told(self._session, self.device, function, self.device.handle, *arguments)
