"""Every metric: name, unit, labels, help. The only importer of prometheus_client.

Each process has one object of its own (no global registry); its counters start at 0 with the process, as Prometheus
expects. Labels are closed sets, whose series exist at 0 from the start, or sets bounded by the log's partitions and
the API's routes: never an id, a user, or an error text. An update costs about a microsecond: once a micro-batch or
a request, never once a record in a loop.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    start_http_server,
)

from streamlearn.errors import REASONS

# A `_created` series beside each counter and histogram would double what is scraped and say nothing that is asked for.
disable_created_metrics()  # type: ignore[no-untyped-call]

PREFIX = "streamlearn_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

STEP_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
FORWARD_BUCKETS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)
HTTP_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SAVE_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
DELAY_BUCKETS_S = (0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 6 * 3600.0, 86400.0, 3 * 86400.0, 7 * 86400.0, 30 * 86400.0)
ROWS_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)

TOPICS = ("samples", "labels")
"""The part a topic plays, whatever its name in the log."""
OUTCOMES = {
    "samples": ("learned", "thinned", "dead_lettered", "duplicate_id", "trimmed"),
    "labels": (
        "joined",
        "duplicate",
        "corrected",
        "retracted",
        "erased",
        "expired",
        "orphan",
        "held_dropped",
        "dead_lettered",
        "trimmed",
    ),
}
LABEL_STATES = (
    "waiting",
    "joined",
    "scored",
    "trained",
    "duplicate",
    "corrected",
    "retracted",
    "erased",
    "expired",
    "orphan",
    "held",
    "held_dropped",
    "implied",
)
PHASES = ("wait", "assemble", "predict", "ledger", "learn", "guard", "save", "publish")
NETWORKS = ("teacher", "student", "majority", "no_change")
WINDOWS = ("windowed", "faded", "cumulative")
SCORES = ("balanced_accuracy", "kappa", "kappa_m", "kappa_t", "log_loss", "brier", "ece")
INTERVAL = ("low", "mean", "high")
GUARD_REASONS = ("nonfinite", "collapsed", "exploded", "stuck", "worse_than_twin")
GUARD_ACTIONS = ("keep_good", "roll_back", "adopt_twin", "accept")
DRIFTS = ("inputs", "disagreement", "uncertainty", "error")
REJECTIONS = ("queue_full", "body_too_large", "unauthorised", "timeout", "log_unavailable")

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table: `name` has no prefix and says the unit; `series` are the label values that exist."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Labels = ()
    series: tuple[Labels, ...] = ()
    buckets: tuple[float, ...] = field(default=(), repr=False)


def _each(*values: str) -> tuple[Labels, ...]:
    return tuple((value,) for value in values)


_OUTCOMES = tuple((topic, outcome) for topic in TOPICS for outcome in OUTCOMES[topic])
_ACCURACIES = tuple((network, window) for network in NETWORKS for window in WINDOWS)
_SCORES = tuple((score, window) for score in SCORES for window in WINDOWS)

BUILD = Metric("build_info", "gauge", "Always 1; the version is in the label.", ("version",))

LEARNER_METRICS = (
    BUILD,
    Metric("records_read_total", "counter", "Records read from the log.", ("topic",), _each(*TOPICS)),
    Metric("records_total", "counter", "Records by what became of them.", ("topic", "outcome"), _OUTCOMES),
    Metric("records_waiting", "gauge", "Records read and in no finished step yet.", ("topic",), _each(*TOPICS)),
    Metric("dead_letters_total", "counter", "Dead-lettered records by reason.", ("reason",), _each(*REASONS)),
    Metric("trimmed_records_total", "counter", "Records that retention took unread.", ("topic",), _each(*TOPICS)),
    Metric("steps_total", "counter", "Steps taken, skipped ones included."),
    Metric("steps_skipped_total", "counter", "Steps that left the weights alone.", ("reason",), _each("nonfinite")),
    Metric("rows_skipped_total", "counter", "Rows of skipped steps.", ("reason",), _each("nonfinite")),
    Metric("step_duration_seconds", "histogram", "Time of one step, all phases but the wait.", buckets=STEP_BUCKETS_S),
    Metric("step_phase_seconds_total", "counter", "Time by phase of the loop.", ("phase",), _each(*PHASES)),
    Metric("last_step_timestamp_seconds", "gauge", "When the last step ended, since the epoch; 0 before the first."),
    Metric("cost", "gauge", "Mean cost of recent steps.", ("term",), _each("classification", "consistency")),
    Metric("consistency_weight", "gauge", "w(t), the weight of the consistency cost."),
    Metric("learning_rate", "gauge", "Learning rate of the last step."),
    Metric(
        "prequential_accuracy_ratio",
        "gauge",
        "Share of labelled samples whose prediction on arrival was right; NaN before the first.",
        ("network", "window"),
        _ACCURACIES,
    ),
    Metric(
        "oracle_accuracy_ratio",
        "gauge",
        "The same over all samples, by the truth that only a simulation knows; NaN without one.",
        ("network", "window"),
        _ACCURACIES,
    ),
    Metric(
        "score",
        "gauge",
        "The teacher's first predictions by another measure; NaN where it is not defined (docs/scores.md).",
        ("score", "window"),
        _SCORES,
    ),
    Metric(
        "label_time_accuracy_ratio",
        "gauge",
        "The same labels, asked again when they came and before they were learned; NaN before the first.",
        ("network",),
        _each("teacher", "twin"),
    ),
    Metric(
        "ssl_gain_ratio",
        "gauge",
        "Teacher minus label-only twin at label time, with its 95 % interval; NaN before the first.",
        ("bound",),
        _each(*INTERVAL),
    ),
    Metric("labelled_share_ratio", "gauge", "Labels to samples of late; NaN before the first sample."),
    Metric("label_confidence_gap_ratio", "gauge", "Mean confidence of labelled samples minus that of all."),
    Metric("label_class_mix_distance_ratio", "gauge", "Total variation of the answers: labelled samples to all."),
    Metric("prediction_entropy_ratio", "gauge", "Of the answers to all samples: 0 is one class, 1 all alike."),
    Metric(
        "candidate_accuracy_ratio",
        "gauge",
        "Of what could be served, over the newest labels: the teacher, averages of other horizons, the twin.",
        ("candidate",),
    ),
    Metric("candidate_served", "gauge", "1 for the candidate that answers and is published.", ("candidate",)),
    Metric("guard_frozen", "gauge", "1 while no new teacher is published."),
    Metric(
        "guard_reason",
        "gauge",
        "1 for each thing that is wrong with the model now.",
        ("reason",),
        _each(*GUARD_REASONS),
    ),
    Metric("guard_actions_total", "counter", "What the guard has done.", ("action",), _each(*GUARD_ACTIONS)),
    Metric("teacher_trust_ratio", "gauge", "How far labels say that the teacher may be believed: a factor of w(t)."),
    Metric("drift_alarms_total", "counter", "Drift alarms by what raised them.", ("source",), _each(*DRIFTS)),
    Metric("labelled_predictions_total", "counter", "Predictions scored by a label."),
    Metric("label_delay_seconds", "histogram", "From a sample to its label, stream time.", buckets=DELAY_BUCKETS_S),
    Metric("ledger_labels", "gauge", "Labels in the ledger by state.", ("state",), _each(*LABEL_STATES)),
    Metric("ledger_samples", "gauge", "Sample ids that the ledger knows."),
    Metric("store_payload_bytes", "gauge", "Payloads in the sample store, in bytes."),
    Metric("memory_rows", "gauge", "Rows of the replay buffer."),
    Metric("consumer_lag_records", "gauge", "Records in the log that are not read yet.", ("topic", "partition")),
    Metric("log_available", "gauge", "0 while the log cannot be read; NaN before the first look."),
    Metric("published_step", "gauge", "Step of the published teacher; 0 before the first."),
    Metric("published_timestamp_seconds", "gauge", "When it was published, since the epoch; 0 before the first."),
    Metric("checkpoint_duration_seconds", "histogram", "Time to save a checkpoint.", buckets=SAVE_BUCKETS_S),
    Metric("checkpoint_size_bytes", "gauge", "Size of the last checkpoint."),
    Metric("checkpoint_last_success_timestamp_seconds", "gauge", "When the last one became durable; 0 before it."),
    Metric("checkpoint_step", "gauge", "Step of the last durable checkpoint."),
)

SERVER_METRICS = (
    BUILD,
    Metric(
        "http_request_duration_seconds",
        "histogram",
        "Time of a request by route template, method and status.",
        ("route", "method", "status"),
        buckets=HTTP_BUCKETS_S,
    ),
    Metric("predict_rows_total", "counter", "Rows predicted."),
    Metric("predict_batch_rows", "histogram", "Rows of one forward pass.", buckets=ROWS_BUCKETS),
    Metric("predict_forward_seconds", "histogram", "Time of one forward pass.", buckets=FORWARD_BUCKETS_S),
    Metric("predict_queue_length", "gauge", "Requests waiting for the model."),
    Metric("rejected_total", "counter", "Requests turned away by reason.", ("reason",), _each(*REJECTIONS)),
    Metric("model_version", "gauge", "Step of the teacher that answers; 0 before the first."),
    Metric("model_timestamp_seconds", "gauge", "When it was published, since the epoch; 0 before the first."),
    Metric("model_pinned", "gauge", "1 while an older teacher is served on purpose."),
    Metric("model_load_failures_total", "counter", "Published teachers that could not be loaded."),
    Metric("appended_records_total", "counter", "Records appended to the log.", ("topic",), _each(*TOPICS)),
    Metric("scrape_failed", "gauge", "1 where a sibling process could not be scraped.", ("target",)),
)

_Kind = TypeVar("_Kind", Counter, Gauge, Histogram)


class _Metrics:
    """The metrics of one table, in a registry of their own. Children are made once and kept."""

    def __init__(self, table: tuple[Metric, ...], *, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        self._children: dict[tuple[str, Labels], Counter | Gauge | Histogram] = {}
        self._closed = {metric.name for metric in table if metric.series}
        for metric in table:
            self._metrics[metric.name] = self._make(metric)
            for values in metric.series or ((),) * (not metric.labels):
                self._add(metric.name, values)
        self._get(Gauge, "build_info", version).set(1.0)

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram:
        name = PREFIX + metric.name
        if metric.kind == "histogram":
            return Histogram(name, metric.help, metric.labels, registry=self.registry, buckets=metric.buckets)
        kind = Counter if metric.kind == "counter" else Gauge
        return kind(name, metric.help, metric.labels, registry=self.registry)

    def _add(self, name: str, values: Labels) -> Counter | Gauge | Histogram:
        metric = self._metrics[name]
        child = metric.labels(*values) if values else metric
        self._children[name, values] = child
        return child

    def _get(self, kind: type[_Kind], name: str, *values: str) -> _Kind:
        child = self._children.get((name, values))
        if child is None:
            assert name not in self._closed, f"{name}: {values} is not in its closed set"
            child = self._add(name, values)
        assert isinstance(child, kind), name
        return child

    def text(self) -> str:
        """The exposition, in Prometheus' text format."""
        return generate_latest(self.registry).decode()


class LearnerMetrics(_Metrics):
    """What the learner exports. Called by the pipeline, once a step at most."""

    def __init__(self, *, version: str) -> None:
        super().__init__(LEARNER_METRICS, version=version)
        unknown: tuple[str, ...] = (
            "prequential_accuracy_ratio",
            "oracle_accuracy_ratio",
            "score",
            "label_time_accuracy_ratio",
            "teacher_trust_ratio",
            "log_available",
        )
        unknown += ("ssl_gain_ratio", "labelled_share_ratio", "label_confidence_gap_ratio")
        unknown += ("label_class_mix_distance_ratio", "prediction_entropy_ratio")
        for metric in LEARNER_METRICS:
            for values in (metric.series or ((),)) if metric.name in unknown else ():
                self._get(Gauge, metric.name, *values).set(float("nan"))

    def read(self, topic: str, records: int) -> None:
        """Records came from the log."""
        self._get(Counter, "records_read_total", topic).inc(records)

    def finished(self, topic: str, outcome: str, records: int = 1) -> None:
        """Records came to their end; `outcome` is one of `OUTCOMES[topic]`."""
        self._get(Counter, "records_total", topic, outcome).inc(records)

    def waiting(self, topic: str, records: int) -> None:
        """So many records are read and in no finished step."""
        self._get(Gauge, "records_waiting", topic).set(records)

    def dead_lettered(self, topic: str, reason: str) -> None:
        """One record was set aside: counts its outcome and its reason."""
        self._get(Counter, "records_total", topic, "dead_lettered").inc()
        self._get(Counter, "dead_letters_total", reason).inc()

    def trimmed(self, topic: str, records: int) -> None:
        """Retention took records before they were read."""
        self._get(Counter, "trimmed_records_total", topic).inc(records)
        self._get(Counter, "records_total", topic, "trimmed").inc(records)

    def step(self, duration_s: float, now_s: float) -> None:
        """A step ended now."""
        self._get(Counter, "steps_total").inc()
        self._get(Histogram, "step_duration_seconds").observe(duration_s)
        self._get(Gauge, "last_step_timestamp_seconds").set(now_s)

    def skipped(self, steps: int, rows: int, reason: str = "nonfinite") -> None:
        """Steps of so many rows in all left the weights alone."""
        self._get(Counter, "steps_skipped_total", reason).inc(steps)
        self._get(Counter, "rows_skipped_total", reason).inc(rows)

    def phase(self, phase: str, duration_s: float) -> None:
        """Time went into one of `PHASES`."""
        self._get(Counter, "step_phase_seconds_total", phase).inc(duration_s)

    def costs(self, *, classification: float, consistency: float, weight: float, learning_rate: float) -> None:
        """Mean costs of recent steps, and the schedules where they stand."""
        self._get(Gauge, "cost", "classification").set(classification)
        self._get(Gauge, "cost", "consistency").set(consistency)
        self._get(Gauge, "consistency_weight").set(weight)
        self._get(Gauge, "learning_rate").set(learning_rate)

    def accuracy(self, network: str, window: str, ratio: float | None) -> None:
        """Prequential accuracy; None is left as it is."""
        if ratio is not None:
            self._get(Gauge, "prequential_accuracy_ratio", network, window).set(ratio)

    def oracle_accuracy(self, network: str, window: str, ratio: float | None) -> None:
        """Accuracy by a simulation's truth; None is left as it is."""
        if ratio is not None:
            self._get(Gauge, "oracle_accuracy_ratio", network, window).set(ratio)

    def score(self, score: str, window: str, value: float | None) -> None:
        """Another measure of the first predictions; None is not defined."""
        self._get(Gauge, "score", score, window).set(_or_nan(value))

    def label_time(self, network: str, ratio: float | None) -> None:
        """Accuracy when the label came."""
        self._get(Gauge, "label_time_accuracy_ratio", network).set(_or_nan(ratio))

    def ssl_gain(self, bound: str, ratio: float | None) -> None:
        """Teacher minus twin, or one end of its interval."""
        self._get(Gauge, "ssl_gain_ratio", bound).set(_or_nan(ratio))

    def traffic(
        self,
        *,
        labelled_share: float | None,
        confidence_gap: float | None,
        class_mix_distance: float | None,
        class_entropy: float | None,
    ) -> None:
        """Whether the labelled samples are like the others."""
        self._get(Gauge, "labelled_share_ratio").set(_or_nan(labelled_share))
        self._get(Gauge, "label_confidence_gap_ratio").set(_or_nan(confidence_gap))
        self._get(Gauge, "label_class_mix_distance_ratio").set(_or_nan(class_mix_distance))
        self._get(Gauge, "prediction_entropy_ratio").set(_or_nan(class_entropy))

    def guard(self, *, frozen: bool, reasons: Collection[str]) -> None:
        """How the guard sees the model."""
        self._get(Gauge, "guard_frozen").set(frozen)
        for reason in GUARD_REASONS:
            self._get(Gauge, "guard_reason", reason).set(reason in reasons)

    def candidate(self, name: str, *, served: bool, accuracy: float | None) -> None:
        """What could be served, and whether it is."""
        self._get(Gauge, "candidate_served", name).set(served)
        self._get(Gauge, "candidate_accuracy_ratio", name).set(math.nan if accuracy is None else accuracy)

    def guard_acted(self, action: str, times: int) -> None:
        """The guard did something."""
        self._get(Counter, "guard_actions_total", action).inc(times)

    def trust(self, factor: float) -> None:
        """How far the teacher is believed."""
        self._get(Gauge, "teacher_trust_ratio").set(factor)

    def drifted(self, source: str, times: int) -> None:
        """A drift alarm was raised."""
        self._get(Counter, "drift_alarms_total", source).inc(times)

    def scored(self, delay_s: float) -> None:
        """A label scored its sample's prediction, so long after the sample."""
        self._get(Counter, "labelled_predictions_total").inc()
        self._get(Histogram, "label_delay_seconds").observe(delay_s)

    def ledger(self, labels: Mapping[str, int], *, samples: int, payload_bytes: int) -> None:
        """The ledger's own counts: labels by `LABEL_STATES`, samples, and bytes of payloads."""
        for state, count in labels.items():
            self._get(Gauge, "ledger_labels", state).set(count)
        self._get(Gauge, "ledger_samples").set(samples)
        self._get(Gauge, "store_payload_bytes").set(payload_bytes)

    def memory(self, rows: int) -> None:
        """Rows of the replay buffer."""
        self._get(Gauge, "memory_rows").set(rows)

    def lag(self, topic: str, partition: int, records: int) -> None:
        """Records of one partition that are not read yet; `topic` is its name in the log."""
        self._get(Gauge, "consumer_lag_records", topic, str(partition)).set(records)

    def log_available(self, *, available: bool) -> None:
        """Whether the log can be read: lag does not tell, since nobody counts what an absent log holds."""
        self._get(Gauge, "log_available").set(available)

    def published(self, step: int, published_at_s: float) -> None:
        """A teacher became what servers answer with."""
        self._get(Gauge, "published_step").set(step)
        self._get(Gauge, "published_timestamp_seconds").set(published_at_s)

    def checkpoint_saved(self, step: int, *, duration_s: float, size_bytes: int, now_s: float) -> None:
        """A checkpoint is durable."""
        self._get(Histogram, "checkpoint_duration_seconds").observe(duration_s)
        self._get(Gauge, "checkpoint_size_bytes").set(size_bytes)
        self._get(Gauge, "checkpoint_last_success_timestamp_seconds").set(now_s)
        self._get(Gauge, "checkpoint_step").set(step)


class ServerMetrics(_Metrics):
    """What one server process exports."""

    def __init__(self, *, version: str) -> None:
        super().__init__(SERVER_METRICS, version=version)

    def request(self, route: str, method: str, status: str, duration_s: float) -> None:
        """A request was answered. `route` is a template, so the set stays small."""
        self._get(Histogram, "http_request_duration_seconds", route, method, status).observe(duration_s)

    def forward(self, rows: int, duration_s: float) -> None:
        """A forward pass answered so many rows."""
        self._get(Counter, "predict_rows_total").inc(rows)
        self._get(Histogram, "predict_batch_rows").observe(rows)
        self._get(Histogram, "predict_forward_seconds").observe(duration_s)

    def queue_length(self, requests: int) -> None:
        """So many requests wait for the model."""
        self._get(Gauge, "predict_queue_length").set(requests)

    def rejected(self, reason: str) -> None:
        """A request was turned away; `reason` is one of `REJECTIONS`."""
        self._get(Counter, "rejected_total", reason).inc()

    def model(self, step: int, published_at_s: float, *, pinned: bool = False) -> None:
        """A teacher began to answer."""
        self._get(Gauge, "model_pinned").set(pinned)
        self._get(Gauge, "model_version").set(step)
        self._get(Gauge, "model_timestamp_seconds").set(published_at_s)

    def model_load_failed(self) -> None:
        """A published teacher could not be loaded."""
        self._get(Counter, "model_load_failures_total").inc()

    def appended(self, topic: str, records: int) -> None:
        """Records are durable in the log."""
        self._get(Counter, "appended_records_total", topic).inc(records)

    def scraped(self, target: str, *, failed: bool) -> None:
        """A sibling was asked for its metrics."""
        self._get(Gauge, "scrape_failed", target).set(failed)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


class MetricsServer:
    """A /metrics of its own port, behind one daemon thread."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread
        self.port = int(server.server_address[1])

    def close(self) -> None:
        """Stop answering and let go of the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)


def start_http(registry: CollectorRegistry, host: str, port: int) -> tuple[MetricsServer, int]:
    """Serve a registry on its own port (0 takes a free one), and say which.

    Raises:
        OSError: the address cannot be bound.
    """
    server, thread = start_http_server(port, host, registry)
    started = MetricsServer(server, thread)
    return started, started.port
