"""What Prometheus sees of a process: one `Metrics` for each, with a registry of its own. docs/metrics.md is made from this file.

A step is reported with one call, `Metrics.observe_step`, which costs about 1 microsecond an event: label children are looked up once, and
what can be worked out at the scrape is. One thread reports; the scrape comes from another.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from streaming.events import REASONS

if TYPE_CHECKING:
    from streaming.store.held import Held

Stage = Literal["poll", "decode", "support", "adapt", "gradient", "memory", "encode", "commit", "observe", "fold", "adopt"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""The stages of a step: reading, decoding, support sets, adaptation and scores, query gradients, memory writes, encoding, the commit,
metrics; the trainer's fold; the worker's taking on of a version."""

GROUPS = ("all", "0", "1-5", "1-20", "21+")
"""Groups of events by how many earlier events their user had. They overlap, as those of the report do."""

HALF_LIFE = 500
"""Events of a group after which an error counts half in the running error."""

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_WAITS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Described(NamedTuple):
    """A metric as docs/metrics.md lists it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one committed step of a worker did.

    ``events`` counts the records consumed. For each event that was scored, in one order: ``errors`` is score minus rating, ``earlier``
    how many events its user had before, ``appended`` when it was appended, in seconds since the epoch. ``adaptations`` counts
    those of them that were scored, ``memory_writes`` the users whose write went out, ``dead_letters`` the refused records by reason.
    """

    partition: int
    events: int
    errors: Sequence[float] = ()
    earlier: Sequence[int] = ()
    appended: Sequence[float] = ()
    adaptations: int = 0
    memory_writes: int = 0
    unknown_fields: int = 0
    dead_letters: Mapping[str, int] = field(default_factory=dict)


class RunningError:
    """MAE and RMSE of the recent past: means that decay by half every `HALF_LIFE` events.

    A plain exponential mean starts at its first value and keeps it for long. This one starts at zero and is divided by the weight it
    has gathered, 1 - (1 - f)^n, so that it is the weighted mean of exactly the n values seen.
    """

    __slots__ = ("_absolute", "_fading", "_squared", "n")

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self._fading = 1 - 0.5 ** (1 / half_life)
        self._absolute = self._squared = 0.0
        self.n = 0

    def update(self, error: float) -> None:
        """Take in one score minus its rating."""
        self._absolute += self._fading * (abs(error) - self._absolute)
        self._squared += self._fading * (error * error - self._squared)
        self.n += 1

    def mae(self) -> float:
        """Mean absolute error, NaN before the first event."""
        return self._absolute / self._weight() if self.n else math.nan

    def rmse(self) -> float:
        """Root of the mean squared error, NaN before the first event."""
        return math.sqrt(self._squared / self._weight()) if self.n else math.nan

    def _weight(self) -> float:
        return -math.expm1(self.n * math.log1p(-self._fading))


class _Counts:
    """How often a duration came, by the bounds of a histogram, and their sum: what a step adds here is made a metric at the scrape.

    A tenth of what one `observe` of prometheus-client for each would cost.
    """

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        edges = ["+Inf" if math.isinf(bound) else str(float(bound)) for bound in (*self._bounds, math.inf)]
        return list(zip(edges, itertools.accumulate(map(float, self._counts)), strict=True))


class _Waits(Collector):
    """A histogram that takes many durations at once."""

    def __init__(self, described: Described, bounds: Sequence[float]) -> None:
        self._described = described
        self._counts = _Counts(bounds)

    def observe_all(self, values: Sequence[float]) -> None:
        for value in values:
            self._counts.add(value)

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        yield HistogramMetricFamily(self._described.name, self._described.help, buckets=counts.buckets(), sum_value=counts.total)


class StageTimer:
    """Times the stage of a step, used with ``with``. It cannot be entered again while it runs.

    Beside the time by the clock it counts that of the processor, of the thread that it is used on: the difference is waiting.
    """

    __slots__ = ("_busy", "_start", "busy_seconds", "counts")

    def __init__(self) -> None:
        self.counts = _Counts(_SECONDS)
        self.busy_seconds = 0.0
        self._start = self._busy = 0.0

    def __enter__(self) -> None:
        self._busy = time.thread_time()
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.counts.add(time.perf_counter() - self._start)
        self.busy_seconds += time.thread_time() - self._busy

    @property
    def seconds(self) -> float:
        """The time by the clock."""
        return self.counts.total


class _Stages(Collector):
    """The timers of all stages, as the histogram and the counter that they are."""

    def __init__(self, times: Described, busy: Described, timers: Mapping[Stage, StageTimer]) -> None:
        self._times = times
        self._busy = busy
        self._timers = timers

    def collect(self) -> Iterator[Metric]:
        times = HistogramMetricFamily(self._times.name, self._times.help, labels=self._times.labels)
        busy = CounterMetricFamily(self._busy.name, self._busy.help, labels=self._busy.labels)
        for stage, timer in self._timers.items():
            times.add_metric([stage], timer.counts.buckets(), timer.seconds)
            busy.add_metric([stage], timer.busy_seconds)
        yield times
        yield busy


class Metrics:
    """The metrics of one process. What has no method of its own is set through the attribute, a metric of prometheus-client."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        self.described: list[Described] = []
        self._events = self._counter("events_total", "Records of interactions consumed and committed.", "partition")
        self._scores = self._counter("scores_total", "Scores committed.")
        self._adaptations = self._counter("adaptations_total", "Local adaptations: one for each event scored.")
        self._meta_updates = self._counter("meta_updates_total", "Updates folded into the model, from queries or rehearsal.", "kind")
        self._memory_writes = self._counter("memory_writes_total", "Memory writes, one for a user and step at most.")
        self._dead_letters = self._counter("dead_letters_total", "Records refused, by reason.", "reason")
        self._unknown_fields = self._counter("unknown_fields_total", "Fields that no contract names; they are ignored.")
        self.commits = self._counter("commits_total", "Transactions committed.")
        self.aborted = self._counter("transactions_aborted_total", "Transactions given up; their step was done again or fell to another.")
        self.fenced = self._counter("fenced_total", "Times that another instance had taken over.")
        self.dropped = self._counter(
            "updates_dropped_total",
            "Updates not folded: older than trainer.max_staleness, or with a value that is not finite or not below 1e15.",
        )
        self.events_lost = self._counter(
            "events_lost_total", "Offsets of interactions that retention removed before they were scored, passed over by worker.skip_lost."
        )
        self.lost = self._counter(
            "updates_lost_total", "Offsets of updates that retention removed before they were folded: topics.updates_bytes is too small."
        )
        self.weighted = self._counter("updates_weighted_total", "Updates folded at less than full weight, by trainer.staleness_half_life.")
        self._requests = self._counter("requests_total", "Requests answered.")
        self._histories = self._counter(
            "histories_total", "Support sets looked at, by whether they were as they had been left, or had to be read.", "result"
        )
        self._of_histories = {result: self._histories.labels(result) for result in ("unchanged", "read")}
        self._stale = self._counter("requests_stale_total", "Requests answered without all interactions before them: the deadline passed.")
        self.forgotten = self._counter("forgotten_total", "Users forgotten because their profile became null.")
        self._micro_batch = self._histogram("micro_batch_events", "Events scored in one step.", _SIZES)
        self._timers: dict[Stage, StageTimer] = {stage: StageTimer() for stage in STAGES}
        times = self._describe("step_stage_seconds", "histogram", "Time of one step's stage.", "stage")
        busy = self._describe(
            "stage_processor_seconds_total",
            "counter",
            "Processor time of a stage, of the step's own thread: without what it waited for.",
            "stage",
        )
        self.registry.register(_Stages(times, busy, self._timers))
        self.transactions = self._histogram(
            "transaction_seconds",
            "Time of a transaction, of a step or several. The next is computed meanwhile: what it waits is the stage `commit`.",
            _SECONDS,
        )
        waits = self._describe(
            "event_to_score_seconds",
            "histogram",
            "From an event's append to the log to the commit of its score, time in the topic included.",
        )
        self._waits = _Waits(waits, _WAITS)
        self.registry.register(self._waits)
        answers = self._describe(
            "request_to_answer_seconds",
            "histogram",
            "From a request's append to the log to the commit of its answer, all waiting included.",
        )
        self._answers = _Waits(answers, _WAITS)
        self.registry.register(self._answers)
        self._lag = self._gauge("lag_events", "Records of a partition not consumed yet.", "partition")
        self._error = self._gauge(
            "running_error",
            f"Error of recent scores by the user's earlier events; halves its memory every {HALF_LIFE} events of the group.",
            "earlier",
            "metric",
        )
        self._version = self._gauge("model_version", "Model version in use.")
        self._age = self._gauge("model_version_age_seconds", "Since the version in use was made.")
        self._attention = self._gauge(
            "attention_spread",
            "How different memory attention is over users (mean share to move), and M_P over rows (1 - mean cosine); dead near 0.",
            "over",
        )
        self.users_held = self._gauge("users_held", "Users with a support set in this process.")
        self._restored = self._gauge("restored_share", "Of a partition being restored, the share that is; none while none is.", "partition")
        self._behind = self._gauge("store_behind_users", "Users whose last change is not in the local store yet.")
        self._full = self._gauge("stores_full", "Local stores that had no room for their last write.")
        self.stores_set_aside = self._counter("stores_set_aside_total", "Local stores that could not be used and were rebuilt.")

        self.running = {group: RunningError() for group in GROUPS}
        for group, error in self.running.items():
            self._error.labels(group, "mae").set_function(error.mae)
            self._error.labels(group, "rmse").set_function(error.rmse)
        self._of_kind = {kind: self._meta_updates.labels(kind) for kind in ("query", "rehearsal")}
        self._of_partition: dict[int, prometheus.Counter] = {}
        self._lag_of: dict[int, prometheus.Gauge] = {}
        self._made_at = math.nan
        self._version.set(math.nan)
        self.watch_attention(lambda: (math.nan, math.nan))
        for reason in sorted(REASONS):
            # A series that begins with its first letter hides that letter from increase() and rate().
            self._dead_letters.labels(reason)
        self._age.set_function(lambda: time.time() - self._made_at)
        prometheus.ProcessCollector(registry=self.registry)

    def stage(self, stage: Stage) -> StageTimer:
        """The timer of a stage: ``with metrics.stage("decode"): ...``."""
        return self._timers[stage]

    @property
    def stage_seconds(self) -> dict[Stage, float]:
        """Seconds spent in each stage since the process began, for the run journal."""
        return {stage: timer.seconds for stage, timer in self._timers.items()}

    def observe_step(self, step: StepReport, committed: float) -> None:
        """Take in a worker's step, which was committed at this time, in seconds since the epoch."""
        events = self._of_partition.get(step.partition)
        if events is None:
            events = self._of_partition[step.partition] = self._events.labels(str(step.partition))
        events.inc(step.events)
        if step.errors:
            self._scores.inc(len(step.errors))
            self._micro_batch.observe(len(step.errors))
            self._waits.observe_all([max(0.0, committed - appended) for appended in step.appended])
            self._observe_errors(step.errors, step.earlier)
        self._adaptations.inc(step.adaptations)
        self._memory_writes.inc(step.memory_writes)
        if step.unknown_fields:
            self._unknown_fields.inc(step.unknown_fields)
        for reason, count in step.dead_letters.items():
            self._dead_letters.labels(reason).inc(count)

    def observe_histories(self, *, unchanged: int, read: int) -> None:
        """Count support sets that were looked at: of those unchanged, what they had come to before was still at hand."""
        self._of_histories["unchanged"].inc(unchanged)
        self._of_histories["read"].inc(read)

    def observe_answers(self, waits: Sequence[float], *, stale: int, dead_letters: Sequence[str] = ()) -> None:
        """Take in committed answers: the seconds from each request to its answer, how many are stale, and why others were refused."""
        self.commits.inc()
        self._requests.inc(len(waits))
        self._stale.inc(stale)
        self._answers.observe_all(waits)
        for reason in dead_letters:
            self._dead_letters.labels(reason).inc()

    def _observe_errors(self, errors: Sequence[float], earlier: Sequence[int]) -> None:
        running = self.running
        all_events, first, early, initial, later = (running[group] for group in GROUPS)
        for error, before in zip(errors, earlier, strict=True):
            all_events.update(error)
            if before == 0:
                first.update(error)
            elif before > 20:
                later.update(error)
            else:
                initial.update(error)
                if before <= 5:
                    early.update(error)

    def observe_fold(self, *, query: int, rehearsal: int = 0, dropped: int = 0, weighted: int = 0) -> None:
        """Take in a trainer's committed round: how many updates of each kind it folded, how many of them at less weight, and dropped."""
        self.commits.inc()
        self._of_kind["query"].inc(query)
        self._of_kind["rehearsal"].inc(rehearsal)
        self.dropped.inc(dropped)
        self.weighted.inc(weighted)

    def observe_version(self, version: int, made_at: int) -> None:
        """Take in that this process now uses ``version``, made at ``made_at`` (milliseconds since the epoch)."""
        self._version.set(version)
        self._made_at = made_at / 1000

    def watch_attention(self, spread: Callable[[], tuple[float, float]]) -> None:
        """Ask ``spread`` for that of memory attention over users and over rows, whenever somebody looks."""
        self._attention.labels("users").set_function(lambda: spread()[0])
        self._attention.labels("rows").set_function(lambda: spread()[1])

    def observe_restore(self, partition: int, share: float, *, done: bool) -> None:
        """Set how much of a partition is restored; one that is ``done`` is not listed any more."""
        self._restored.labels(str(partition)).set(share)
        if done:
            self._restored.remove(str(partition))

    def observe_stores(self, stores: Iterable[Held]) -> None:
        """Take in how far the local stores are behind."""
        behind = full = 0
        for store in stores:
            behind += store.behind
            full += bool(store.full)
        self._behind.set(behind)
        self._full.set(full)

    def observe_lag(self, lag: Mapping[int, int]) -> None:
        """Set how many records of each partition are not consumed yet; partitions that are not named any more are no longer ours."""
        for partition in self._lag_of.keys() - lag.keys():
            del self._lag_of[partition]
            self._lag.remove(str(partition))
        for partition, events in lag.items():
            if partition not in self._lag_of:
                self._lag_of[partition] = self._lag.labels(str(partition))
            self._lag_of[partition].set(events)

    def _describe(self, name: str, kind: str, text: str, *labels: str) -> Described:
        described = Described(f"coldstream_{name}", kind, labels, text)
        self.described.append(described)
        return described

    def _counter(self, name: str, text: str, *labels: str) -> prometheus.Counter:
        return prometheus.Counter(self._describe(name, "counter", text, *labels).name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> prometheus.Gauge:
        return prometheus.Gauge(self._describe(name, "gauge", text, *labels).name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, bounds: Sequence[float], *labels: str) -> prometheus.Histogram:
        return prometheus.Histogram(
            self._describe(name, "histogram", text, *labels).name, text, labels, buckets=bounds, registry=self.registry
        )
