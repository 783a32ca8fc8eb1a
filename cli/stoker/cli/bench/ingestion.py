"""`stoker bench ingest`: what it costs to take in the frames of a fleet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker.cli.bench.children import Child, Children
from stoker.cli.bench.figures import (
    IngestReport,
    Spread,
    agents_objections,
    merge_agents,
    ratio,
)
from stoker.cli.bench.machine import describe_machine, utc_text
from stoker.cli.bench.progress import Progress
from stoker.cli.bench.rig import Measured, Rig, Server
from stoker.cli.bench.visibility import Look, frames_seen, seconds_until_shown
from stoker.testing.load import AgentsReport


@dataclass(frozen=True, slots=True)
class IngestOptions:
    """What to measure."""

    nodes: int
    gpus: int
    hz: float
    seconds: float
    bare: bool  # whether to measure the bare server too
    seed: int


async def measure_ingestion(
    options: IngestOptions, folder: Path, progress: Progress
) -> IngestReport:
    """Measure and report; raises ChildFailed and ClientError."""
    # One server after the other, so that each has the machine to itself.
    async with Children(folder) as children:
        rig = Rig(children, folder, progress)
        server = await rig.start_aggregator()
        generators = await _start_agents(rig, server, options)
        window = options.seconds
        measured = await rig.measure("measuring the aggregator", window, server, generators)
        looks, sends = await rig.look(server, generators)
    agents = merge_agents(measured.agents)
    # As many acknowledgements as the aggregator sent: the same messages both ways.
    frames_per_ack = max(1, round(agents.frames_acked / max(1, agents.acks)))
    bare: Measured | None = None
    if options.bare:
        async with Children(folder) as children:
            rig = Rig(children, folder, progress)
            server = await rig.start_bare(frames_per_ack)
            generators = await _start_agents(rig, server, options)
            bare = await rig.measure("measuring the bare server", window, server, generators)
    return _report(options, folder, measured, bare, _Visible.of(looks, agents, sends, options))


async def _start_agents(rig: Rig, server: Server, options: IngestOptions) -> Sequence[Child]:
    return await rig.start_agents(
        server.target, nodes=options.nodes, gpus=options.gpus, hz=options.hz, seed=options.seed
    )


@dataclass(frozen=True, slots=True)
class _Visible:
    """What a client was shown."""

    p50_seconds: float | None
    p99_seconds: float | None
    nodes: int  # whose newest acknowledged sample, or a later one, was shown

    @classmethod
    def of(
        cls,
        looks: Sequence[Look],
        before: AgentsReport,
        meanwhile: AgentsReport,
        options: IngestOptions,
    ) -> "_Visible":
        """Work it out of looks that followed the window `before`."""
        interval_seconds = 1 / options.hz
        seen = [
            each for look in looks for each in frames_seen(look, meanwhile.sends, interval_seconds)
        ]
        shown = looks[0].sampled_at
        nodes = sum(
            (shown.get(name) or 0.0) > sampled_at - interval_seconds / 2
            for name, sampled_at in before.sampled_at.items()
        )
        return cls(seconds_until_shown(seen, 0.5), seconds_until_shown(seen, 0.99), nodes)


def _report(
    options: IngestOptions,
    folder: Path,
    measured: Measured,
    bare: Measured | None,
    visible: _Visible,
) -> IngestReport:
    agents = merge_agents(measured.agents)
    ack, lag = Spread.of_micros(agents.ack_micros), Spread.of_micros(agents.lag_micros)
    objections = agents_objections(agents, options.nodes)
    cpu_per_frame = ratio(measured.server.cpu_seconds, agents.frames_sent)
    bare_cpu_per_frame = bare_acks_per_frame = bare_ack_p99 = None
    if bare is not None:
        bare_agents = merge_agents(bare.agents)
        bare_cpu_per_frame = ratio(bare.server.cpu_seconds, bare_agents.frames_sent)
        bare_acks_per_frame = ratio(bare_agents.acks, bare_agents.frames_acked)
        bare_ack_p99 = Spread.of_micros(bare_agents.ack_micros).p99
        bare_objections = agents_objections(bare_agents, options.nodes)
        objections += [f"on the bare server, {each}" for each in bare_objections]
    return IngestReport(
        nodes=options.nodes,
        gpus=options.gpus,
        hz=options.hz,
        seconds=options.seconds,
        connections=agents.connections,
        frames_sent=agents.frames_sent,
        frames_acked=agents.frames_acked,
        dropped=agents.frames_dropped + agents.frames_sent - agents.frames_acked,
        disconnects=agents.disconnects,
        frames_per_second=agents.frames_sent / options.seconds,
        bytes_per_frame=ratio(agents.message_bytes, agents.frames_sent),
        stream_bytes_per_frame=ratio(agents.stream_bytes, agents.frames_sent),
        acks_per_frame=ratio(agents.acks, agents.frames_acked),
        ack_p50_seconds=ack.p50,
        ack_p90_seconds=ack.p90,
        ack_p99_seconds=ack.p99,
        ack_max_seconds=ack.max,
        visible_p50_seconds=visible.p50_seconds,
        visible_p99_seconds=visible.p99_seconds,
        nodes_visible=visible.nodes,
        cpu_seconds_per_frame=cpu_per_frame,
        aggregator_cores=measured.server.cores,
        aggregator_rss_bytes=measured.server.rss_bytes,
        bare_cpu_seconds_per_frame=bare_cpu_per_frame,
        bare_acks_per_frame=bare_acks_per_frame,
        bare_ack_p99_seconds=bare_ack_p99,
        cpu_ratio_to_bare=ratio(cpu_per_frame, bare_cpu_per_frame),
        generator_cores=measured.agents_used.cores,
        generator_lag_p99_seconds=lag.p99,
        valid=not objections,
        invalid_reasons=tuple(objections),
        at=utc_text(measured.began_at),
        machine=describe_machine(folder),
    )
