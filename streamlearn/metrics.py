"""Every metric: name, unit, labels, help. The only importer of prometheus_client.

Each process has its own registry. Its counters start at 0 with the process, as Prometheus expects. Label values come
from closed sets, whose series exist at 0 from the start, or from the log's partitions and the API's routes: never an
id, a user or an error text. An update costs about a microsecond: once a micro-batch or a request, never once a record.
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

# A `_created` series for each counter and histogram would double the scrape for no use.
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
"""Roles of topics, whatever their names in the log."""
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
CLASS_SCORES = ("average_precision", "precision", "recall", "precision_at_k", "recall_at_k")
SELECTION_MEASURES = ("labelled_share", "confidence_gap", "class_mix_distance", "class_entropy")
GUARD_REASONS = ("nonfinite", "collapsed", "exploded", "stuck", "worse_than_twin")
GUARD_ACTIONS = ("keep_good", "roll_back", "adopt_twin", "accept")
DRIFTS = ("inputs", "disagreement", "uncertainty", "error")
REJECTIONS = ("queue_full", "body_too_large", "unauthorised", "timeout", "log_unavailable")

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table. `name` has no prefix and ends with its unit."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Labels = ()
    series: tuple[Labels, ...] = ()
    """The closed set of label values; empty where the set is open."""
    buckets: tuple[float, ...] = field(default=(), repr=False)
    unknown: bool = False
    """A gauge that is NaN before its first value, instead of 0."""


def _each(*values: str) -> tuple[Labels, ...]:
    return tuple((value,) for value in values)


_OUTCOMES = tuple((topic, outcome) for topic in TOPICS for outcome in OUTCOMES[topic])
_ACCURACIES = tuple((network, window) for network in NETWORKS for window in WINDOWS)
_SCORES = tuple((score, window) for score in SCORES for window in WINDOWS)

BUILD = Metric("build_info", "gauge", "Always 1; the version is in the label.", ("version",))

LEARNER_METRICS = (
    BUILD,
    Metric("records_read_total", "counter", "Records read from the log.", ("topic",), _each(*TOPICS)),
    Metric("records_total", "counter", "Records by outcome.", ("topic", "outcome"), _OUTCOMES),
    Metric("dead_letters_total", "counter", "Dead-lettered records by reason.", ("reason",), _each(*REASONS)),
    Metric("steps_total", "counter", "Steps, including skipped ones."),
    Metric("steps_skipped_total", "counter", "Steps that were not finite and changed no weights."),
    Metric("step_duration_seconds", "histogram", "Duration of a step, without the wait.", buckets=STEP_BUCKETS_S),
    Metric("step_phase_seconds_total", "counter", "Time by phase of the loop.", ("phase",), _each(*PHASES)),
    Metric("last_step_timestamp_seconds", "gauge", "When the last step ended, since the epoch; 0 before the first."),
    Metric("cost", "gauge", "Mean cost of recent steps.", ("term",), _each("classification", "consistency")),
    Metric("consistency_weight", "gauge", "w(t), the weight of the consistency cost."),
    Metric(
        "prequential_accuracy_ratio",
        "gauge",
        "Accuracy of first predictions on labelled samples; NaN before the first.",
        ("network", "window"),
        _ACCURACIES,
        unknown=True,
    ),
    Metric(
        "score",
        "gauge",
        "Other scores of the teacher's first predictions; NaN where undefined (docs/scores.md).",
        ("score", "window"),
        _SCORES,
        unknown=True,
    ),
    Metric(
        "pr_auc_ratio",
        "gauge",
        "Mean area under precision and recall of the classes in the window; NaN before the first label.",
        unknown=True,
    ),
    Metric(
        "class_score",
        "gauge",
        "Scores of single classes over the window, those of score.classes or score.thresholds; NaN where undefined.",
        ("class", "score"),
    ),
    Metric(
        "calibration_error_ratio",
        "gauge",
        "ECE when the label arrives, of the network's probabilities and of the corrected ones; NaN before the first.",
        ("probabilities",),
        _each("network", "corrected"),
        unknown=True,
    ),
    Metric(
        "label_time_accuracy_ratio",
        "gauge",
        "Accuracy when the label arrives, before it is learned; NaN before the first.",
        ("network",),
        _each("teacher", "twin"),
        unknown=True,
    ),
    Metric(
        "ssl_gain_ratio",
        "gauge",
        "Teacher minus label-only twin when the label arrives, with its 95 % interval; NaN before the first.",
        ("bound",),
        _each("low", "mean", "high"),
        unknown=True,
    ),
    Metric(
        "selection_bias",
        "gauge",
        "Labelled samples against all; NaN where undefined (docs/scores.md).",
        ("measure",),
        _each(*SELECTION_MEASURES),
        unknown=True,
    ),
    Metric("candidate_served", "gauge", "1 for the network that is published: teacher or twin.", ("candidate",)),
    Metric("guard_frozen", "gauge", "1 while no new teacher is published."),
    Metric("guard_reason", "gauge", "1 for each finding of the guard now.", ("reason",), _each(*GUARD_REASONS)),
    Metric("guard_actions_total", "counter", "Actions of the guard.", ("action",), _each(*GUARD_ACTIONS)),
    Metric("teacher_trust_ratio", "gauge", "Trust in the teacher by labels: a factor of w(t).", unknown=True),
    Metric("drift_alarms_total", "counter", "Drift alarms by source.", ("source",), _each(*DRIFTS)),
    Metric("label_delay_seconds", "histogram", "Scored labels by delay, in event time.", buckets=DELAY_BUCKETS_S),
    Metric("ledger_labels", "gauge", "Labels in the ledger by state.", ("state",), _each(*LABEL_STATES)),
    Metric("ledger_samples", "gauge", "Sample ids in the ledger."),
    Metric("store_payload_bytes", "gauge", "Payloads in the sample store, in bytes."),
    Metric("consumer_lag_records", "gauge", "Records in the log that are in no step yet.", ("topic", "partition")),
    Metric("log_available", "gauge", "0 while the log cannot be read; NaN before the first read.", unknown=True),
    Metric("published_step", "gauge", "Step of the published teacher; 0 before the first."),
    Metric("checkpoint_duration_seconds", "histogram", "Time to save a checkpoint.", buckets=SAVE_BUCKETS_S),
    Metric("checkpoint_last_success_timestamp_seconds", "gauge", "When the last one became durable; 0 before it."),
)

SERVER_METRICS = (
    BUILD,
    Metric(
        "http_request_duration_seconds",
        "histogram",
        "Duration of a request by route template, method and status.",
        ("route", "method", "status"),
        buckets=HTTP_BUCKETS_S,
    ),
    Metric("predict_batch_rows", "histogram", "Rows of one forward pass.", buckets=ROWS_BUCKETS),
    Metric("predict_forward_seconds", "histogram", "Time of one forward pass.", buckets=FORWARD_BUCKETS_S),
    Metric("predict_queue_length", "gauge", "Requests that wait for the model."),
    Metric("rejected_total", "counter", "Rejected requests by reason.", ("reason",), _each(*REJECTIONS)),
    Metric("model_version", "gauge", "Step of the served teacher; 0 before the first."),
    Metric("model_timestamp_seconds", "gauge", "When it was published, since the epoch; 0 before the first."),
    Metric("model_pinned", "gauge", "1 while an older teacher is pinned."),
    Metric("model_load_failures_total", "counter", "Published teachers that could not be loaded."),
    Metric("appended_records_total", "counter", "Records appended to the log.", ("topic",), _each(*TOPICS)),
    Metric("scrape_failed", "gauge", "1 where a sibling process could not be scraped.", ("target",)),
)

_Kind = TypeVar("_Kind", Counter, Gauge, Histogram)


class _Metrics:
    """The metrics of one table, in their own registry."""

    def __init__(self, table: tuple[Metric, ...], *, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        self._children: dict[tuple[str, Labels], Counter | Gauge | Histogram] = {}
        self._closed = {metric.name for metric in table if metric.series}
        for metric in table:
            self._metrics[metric.name] = self._make(metric)
            for values in metric.series or ((),) * (not metric.labels):
                child = self._add(metric.name, values)
                if metric.unknown:
                    assert isinstance(child, Gauge), metric.name
                    child.set(math.nan)
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
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()


class LearnerMetrics(_Metrics):
    """Metrics of the learner, updated by the loop's thread, at most once a step."""

    def __init__(self, *, version: str) -> None:
        super().__init__(LEARNER_METRICS, version=version)

    def read(self, topic: str, records: int) -> None:
        """Count records read from the log."""
        self._get(Counter, "records_read_total", topic).inc(records)

    def finished(self, topic: str, outcome: str, records: int = 1) -> None:
        """Count records with their outcome, one of `OUTCOMES[topic]`."""
        self._get(Counter, "records_total", topic, outcome).inc(records)

    def dead_lettered(self, topic: str, reason: str) -> None:
        """Count one dead-lettered record, by outcome and by reason."""
        self._get(Counter, "records_total", topic, "dead_lettered").inc()
        self._get(Counter, "dead_letters_total", reason).inc()

    def step(self, duration_s: float, now_s: float) -> None:
        """Count a step that ends now."""
        self._get(Counter, "steps_total").inc()
        self._get(Histogram, "step_duration_seconds").observe(duration_s)
        self._get(Gauge, "last_step_timestamp_seconds").set(now_s)

    def skipped(self, steps: int) -> None:
        """Count steps that changed no weights."""
        self._get(Counter, "steps_skipped_total").inc(steps)

    def phase(self, phase: str, duration_s: float) -> None:
        """Add time to one of `PHASES`."""
        self._get(Counter, "step_phase_seconds_total", phase).inc(duration_s)

    def costs(self, *, classification: float, consistency: float, weight: float) -> None:
        """Set the mean costs of recent steps, and the consistency weight."""
        self._get(Gauge, "cost", "classification").set(classification)
        self._get(Gauge, "cost", "consistency").set(consistency)
        self._get(Gauge, "consistency_weight").set(weight)

    def accuracy(self, network: str, window: str, ratio: float | None) -> None:
        """Set a prequential accuracy; None is undefined, here and below."""
        self._get(Gauge, "prequential_accuracy_ratio", network, window).set(_or_nan(ratio))

    def score(self, score: str, window: str, value: float | None) -> None:
        """Set another score of the first predictions."""
        self._get(Gauge, "score", score, window).set(_or_nan(value))

    def ranking(self, pr_auc: float | None) -> None:
        """Set the mean area under precision and recall."""
        self._get(Gauge, "pr_auc_ratio").set(_or_nan(pr_auc))

    def class_scores(self, name: str, **values: float | None) -> None:
        """Set scores of one class by `CLASS_SCORES`; its name is one that the config lists."""
        for score, value in values.items():
            self._get(Gauge, "class_score", name, score).set(_or_nan(value))

    def calibration(self, *, network: float | None, corrected: float | None) -> None:
        """Set the calibration errors when the label arrives."""
        self._get(Gauge, "calibration_error_ratio", "network").set(_or_nan(network))
        self._get(Gauge, "calibration_error_ratio", "corrected").set(_or_nan(corrected))

    def label_time(self, *, teacher: float | None, twin: float | None) -> None:
        """Set the accuracies when the label arrives."""
        self._get(Gauge, "label_time_accuracy_ratio", "teacher").set(_or_nan(teacher))
        self._get(Gauge, "label_time_accuracy_ratio", "twin").set(_or_nan(twin))

    def ssl_gain(self, *, low: float | None, mean: float | None, high: float | None) -> None:
        """Set teacher minus twin, and its interval."""
        for bound, ratio in (("low", low), ("mean", mean), ("high", high)):
            self._get(Gauge, "ssl_gain_ratio", bound).set(_or_nan(ratio))

    def selection_bias(self, **values: float | None) -> None:
        """Set values by `SELECTION_MEASURES`."""
        for measure, value in values.items():
            self._get(Gauge, "selection_bias", measure).set(_or_nan(value))

    def guard(self, *, frozen: bool, reasons: Collection[str]) -> None:
        """Set the state of the guard."""
        self._get(Gauge, "guard_frozen").set(frozen)
        for reason in GUARD_REASONS:
            self._get(Gauge, "guard_reason", reason).set(reason in reasons)

    def candidate(self, name: str, *, served: bool) -> None:
        """Set whether a candidate is served."""
        self._get(Gauge, "candidate_served", name).set(served)

    def guard_acted(self, action: str, times: int) -> None:
        """Count actions of the guard."""
        self._get(Counter, "guard_actions_total", action).inc(times)

    def trust(self, factor: float) -> None:
        """Set the trust in the teacher."""
        self._get(Gauge, "teacher_trust_ratio").set(factor)

    def drifted(self, source: str, times: int) -> None:
        """Count drift alarms."""
        self._get(Counter, "drift_alarms_total", source).inc(times)

    def scored(self, delay_s: float) -> None:
        """Count a label that scored a prediction, by its delay after the sample."""
        self._get(Histogram, "label_delay_seconds").observe(delay_s)

    def ledger(self, labels: Mapping[str, int], *, samples: int, payload_bytes: int) -> None:
        """Set the counts of the ledger: labels by `LABEL_STATES`, samples, and bytes of payloads."""
        for state, count in labels.items():
            self._get(Gauge, "ledger_labels", state).set(count)
        self._get(Gauge, "ledger_samples").set(samples)
        self._get(Gauge, "store_payload_bytes").set(payload_bytes)

    def lag(self, topic: str, partition: int, records: int) -> None:
        """Set the lag of one partition; `topic` is its name in the log."""
        self._get(Gauge, "consumer_lag_records", topic, str(partition)).set(records)

    def log_available(self, *, available: bool) -> None:
        """Set whether the log can be read. Lag does not show it: nothing counts the records of an absent log."""
        self._get(Gauge, "log_available").set(available)

    def published(self, step: int) -> None:
        """Set the step of the published teacher."""
        self._get(Gauge, "published_step").set(step)

    def checkpoint_saved(self, *, duration_s: float, now_s: float) -> None:
        """Count a checkpoint that became durable."""
        self._get(Histogram, "checkpoint_duration_seconds").observe(duration_s)
        self._get(Gauge, "checkpoint_last_success_timestamp_seconds").set(now_s)


class ServerMetrics(_Metrics):
    """Metrics of one server process."""

    def __init__(self, *, version: str) -> None:
        super().__init__(SERVER_METRICS, version=version)

    def request(self, route: str, method: str, status: str, duration_s: float) -> None:
        """Count a request. `route` is a template, so that the set of values stays small."""
        self._get(Histogram, "http_request_duration_seconds", route, method, status).observe(duration_s)

    def forward(self, rows: int, duration_s: float) -> None:
        """Count a forward pass."""
        self._get(Histogram, "predict_batch_rows").observe(rows)
        self._get(Histogram, "predict_forward_seconds").observe(duration_s)

    def queue_length(self, requests: int) -> None:
        """Set the number of requests that wait for the model."""
        self._get(Gauge, "predict_queue_length").set(requests)

    def rejected(self, reason: str) -> None:
        """Count a rejected request; `reason` is one of `REJECTIONS`."""
        self._get(Counter, "rejected_total", reason).inc()

    def model(self, step: int, published_at_s: float, *, pinned: bool = False) -> None:
        """Set the served teacher."""
        self._get(Gauge, "model_pinned").set(pinned)
        self._get(Gauge, "model_version").set(step)
        self._get(Gauge, "model_timestamp_seconds").set(published_at_s)

    def model_load_failed(self) -> None:
        """Count a published teacher that could not be loaded."""
        self._get(Counter, "model_load_failures_total").inc()

    def appended(self, topic: str, records: int) -> None:
        """Count records that are durable in the log."""
        self._get(Counter, "appended_records_total", topic).inc(records)

    def scraped(self, target: str, *, failed: bool) -> None:
        """Set whether the last scrape of a sibling failed."""
        self._get(Gauge, "scrape_failed", target).set(failed)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


class MetricsServer:
    """An HTTP server of one registry, in a daemon thread."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread
        self.port = int(server.server_address[1])

    def close(self) -> None:
        """Stop, and release the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)


def start_http(registry: CollectorRegistry, host: str, port: int) -> tuple[MetricsServer, int]:
    """Serve a registry, and return the port: for port 0 a free one.

    Raises:
        OSError: the address cannot be bound.
    """
    server, thread = start_http_server(port, host, registry)
    started = MetricsServer(server, thread)
    return started, started.port
