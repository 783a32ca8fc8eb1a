"""What the aggregator counts of its own doings: counters and histograms that the exporter shows."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

# From a fast disk's fsync to one that is about to fail.
_COMMIT_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
# From "at once" to a day in the queue.
_WAIT_BUCKETS = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 21600.0, 86400.0)


class Meters:
    """One set per aggregator. Safe to use from any thread."""

    def __init__(self) -> None:
        # The time a counter was made says nothing here, and doubles the page.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "stoker_allocation_requests",
            "Answers to Allocate: granted, queued, refused, invalid, repeated (a known idempotency "
            "key), failed (the store).",
            ["outcome"],
            registry=self.registry,
        )
        self.wait_seconds = Histogram(
            "stoker_allocation_wait_seconds",
            "Time from the request to the grant.",
            buckets=_WAIT_BUCKETS,
            registry=self.registry,
        )
        self.holds_refused = Counter(
            "stoker_allocation_holds_refused",
            "Grants that a node said it cannot hold; they end.",
            registry=self.registry,
        )
        self.commits = Counter(
            "stoker_ledger_commits",
            "Transactions made durable; each is one fsync of the log.",
            registry=self.registry,
        )
        self.events = Counter(
            "stoker_ledger_events", "Events made durable.", registry=self.registry
        )
        self.commit_seconds = Histogram(
            "stoker_ledger_commit_seconds",
            "Time of one transaction, its fsync included.",
            buckets=_COMMIT_BUCKETS,
            registry=self.registry,
        )
        self.store_failures = Counter(
            "stoker_ledger_failures",
            "Writes that the store refused.",
            registry=self.registry,
        )
        self.frames = Counter("stoker_frames", "Frames of agents taken in.", registry=self.registry)
        self.frames_repeated = Counter(
            "stoker_frames_repeated",
            "Frames that had been taken in before and were left aside.",
            registry=self.registry,
        )
        self.frames_gap = Counter(
            "stoker_frames_gap",
            "Frames that never came: their number was passed over.",
            registry=self.registry,
        )
        self.samples_unknown = Counter(
            "stoker_frame_samples_unknown",
            "Samples of GPUs that were no longer in their node's inventory.",
            registry=self.registry,
        )
        self.streams_refused = Counter(
            "stoker_agent_streams_refused",
            "Streams of agents that were closed for what they said, by status code.",
            ["code"],
            registry=self.registry,
        )
        self.commands = Counter(
            "stoker_agent_commands", "Commands sent to agents.", ["command"], registry=self.registry
        )
        self.rounds = Counter(
            "stoker_control_rounds",
            "Rounds of the control loop that decided something or looked for it.",
            registry=self.registry,
        )
        self.partitions = Counter(
            "stoker_partitions_by_demand",
            "GPUs that were to be partitioned for requests that wait, by what their node answered.",
            ["outcome"],
            registry=self.registry,
        )
        self.partitions_proposed = Gauge(
            "stoker_partitions_proposed",
            "GPUs that had better be partitioned otherwise for what waits, as of the last look.",
            registry=self.registry,
        )
        self.is_compiled = Gauge(
            "stoker_placement_compiled",
            "Whether the loops of placement run compiled: 0 in a small fleet, and until it is "
            "done.",
            registry=self.registry,
        )
        for outcome in ("granted", "queued", "refused", "invalid", "repeated", "failed"):
            self.requests.labels(outcome)  # a counter that is not there yet cannot be alerted on

        for outcome in ("begun", "refused"):
            self.partitions.labels(outcome)

    def committed(self, events: int, seconds: float) -> None:
        """Count one transaction of the store."""
        self.commits.inc()
        self.events.inc(events)
        self.commit_seconds.observe(seconds)
