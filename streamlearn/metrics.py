"""Every metric: name, unit, labels, help. The only importer of prometheus_client.

Each process has its own registry. Its counters start at 0 with the process, as Prometheus expects. Label values come
from closed sets, whose series exist at 0 from the start, or from the log's partitions and the API's routes: never an
id, a user or an error text. An update costs about a microsecond: once a micro-batch or a request, never once a record.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from socketserver import ThreadingMixIn
from typing import Literal, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    make_wsgi_app,
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

APPENDED = ("samples", "labels")
TOPICS = (*APPENDED, "predictions")
"""Roles of topics, whatever their names in the log."""
COLUMN_OUTCOMES = ("encoded", "missing", "invalid")
LABEL_OUTCOMES = ("joined", "duplicate", "corrected", "retracted", "erased", "expired", "orphan", "held_dropped")
"""Outcomes that the ledger counts."""
OUTCOMES = {
    "samples": ("learned", "thinned", "dead_lettered", "duplicate_id", "tombstone", "trimmed"),
    "labels": (*LABEL_OUTCOMES, "dead_lettered", "tombstone", "trimmed"),
    "predictions": ("taken", "late", "unknown", "skipped", "trimmed"),
}
STEP_OUTCOMES = tuple((topic, name) for topic in TOPICS for name in OUTCOMES[topic] if name not in LABEL_OUTCOMES)
"""Topics and outcomes that the loop counts. The ledger counts the others."""
LABEL_STATES = ("waiting", "scored", "scored_published", "trained", "held", "implied", *LABEL_OUTCOMES)
PHASES = ("wait", "assemble", "predict", "ledger", "learn", "guard", "save", "publish")
NETWORKS = ("teacher", "student", "majority", "no_change")
WINDOWS = ("windowed", "faded", "cumulative")
SCORES = ("balanced_accuracy", "kappa", "kappa_m", "kappa_t", "log_loss", "brier", "ece")
CLASS_SCORES = ("average_precision", "precision", "recall", "precision_at_k", "recall_at_k")
SELECTION_MEASURES = ("labelled_share", "confidence_gap", "class_mix_distance", "class_entropy")
GUARD_REASONS = ("nonfinite", "collapsed", "exploded", "stuck", "worse_than_twin")
GUARD_ACTIONS = ("keep_good", "roll_back", "adopt_twin", "accept")
DRIFTS = ("inputs", "disagreement", "uncertainty", "error")
SCORED = ("scored", "undecodable", "tombstone", "not_finite", "trimmed")
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
    Metric("column_values_total", "counter", "Values of a record's columns by outcome.", ("column", "outcome")),
    Metric("unknown_fields_total", "counter", "Fields of records that no setting names."),
    Metric("steps_total", "counter", "Steps, including skipped ones."),
    Metric("steps_skipped_total", "counter", "Steps that were not finite and changed no weights."),
    Metric("step_duration_seconds", "histogram", "Duration of a step, without the wait.", buckets=STEP_BUCKETS_S),
    Metric("step_phase_seconds_total", "counter", "Time by phase of the loop.", ("phase",), _each(*PHASES)),
    Metric("last_step_timestamp_seconds", "gauge", "When the last step ended, since the epoch; 0 before the first."),
    Metric(
        "cost", "gauge", "Mean cost of recent steps.", ("term",), _each("classification", "consistency", "auxiliary")
    ),
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

_TEACHER = (
    Metric("model_version", "gauge", "Step of the served teacher; 0 before the first."),
    Metric("model_timestamp_seconds", "gauge", "When it was published, since the epoch; 0 before the first."),
    Metric("model_pinned", "gauge", "1 while an older teacher is pinned."),
    Metric("model_load_failures_total", "counter", "Published teachers that could not be loaded."),
)

SCORER_METRICS = (
    BUILD,
    *_TEACHER,
    Metric("scored_records_total", "counter", "Records of samples by outcome.", ("outcome",), _each(*SCORED)),
    Metric(
        "score_age_seconds",
        "histogram",
        "Time from the arrival of the oldest sample of a write until its answer is durable.",
        buckets=HTTP_BUCKETS_S,
    ),
    Metric("scorer_lag_records", "gauge", "Records in the log without an answer yet.", ("topic", "partition")),
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
    *_TEACHER,
    Metric("appended_records_total", "counter", "Records appended to the log.", ("topic",), _each(*APPENDED)),
    Metric("scrape_failed", "gauge", "1 where a sibling process could not be scraped.", ("target",)),
)

_Kind = TypeVar("_Kind", Counter, Gauge, Histogram)


class Metrics:
    """The metrics of one table, in their own registry. Methods take a metric's name, and its label values last."""

    def __init__(self, table: tuple[Metric, ...], *, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._open: dict[str, Counter | Gauge | Histogram] = {}
        """Metrics whose label values are no closed set."""
        self._children: dict[tuple[str, Labels], Counter | Gauge | Histogram] = {}
        for metric in table:
            made = self._make(metric)
            if metric.labels and not metric.series:
                self._open[metric.name] = made
                continue
            for values in metric.series or ((),):
                self._children[metric.name, values] = made.labels(*values) if values else made
                if metric.unknown:
                    self.set(metric.name, None, *values)
        self.set("build_info", 1.0, version)

    def count(self, name: str, amount: float, *labels: str) -> None:
        """Add to a counter."""
        self._get(Counter, name, labels).inc(amount)

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """Set a gauge. None is undefined: NaN."""
        self._get(Gauge, name, labels).set(math.nan if value is None else value)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add one value to a histogram."""
        self._get(Histogram, name, labels).observe(value)

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram:
        name = PREFIX + metric.name
        if metric.kind == "histogram":
            return Histogram(name, metric.help, metric.labels, registry=self.registry, buckets=metric.buckets)
        kind = Counter if metric.kind == "counter" else Gauge
        return kind(name, metric.help, metric.labels, registry=self.registry)

    def _get(self, kind: type[_Kind], name: str, values: Labels) -> _Kind:
        child = self._children.get((name, values))
        if child is None:
            assert name in self._open, f"{name}: {values} is not in its closed set"
            child = self._children[name, values] = self._open[name].labels(*values)
        assert isinstance(child, kind), name
        return child


class TeacherMetrics(Metrics):
    """Metrics of a process that follows the published teacher."""

    def model(self, step: int, published_at_s: float, *, pinned: bool = False) -> None:
        """Set the served teacher."""
        self.set("model_pinned", pinned)
        self.set("model_version", step)
        self.set("model_timestamp_seconds", published_at_s)

    def model_load_failed(self) -> None:
        """Count a published teacher that could not be loaded."""
        self.count("model_load_failures_total", 1)


class ScorerMetrics(TeacherMetrics):
    """Metrics of one scorer process."""

    def __init__(self, *, version: str) -> None:
        super().__init__(SCORER_METRICS, version=version)


class ServerMetrics(TeacherMetrics):
    """Metrics of one server process, with a name for each event."""

    def __init__(self, *, version: str) -> None:
        super().__init__(SERVER_METRICS, version=version)

    def request(self, route: str, method: str, status: str, duration_s: float) -> None:
        """Count a request. `route` is a template, so that the set of values stays small."""
        self.observe("http_request_duration_seconds", duration_s, route, method, status)

    def forward(self, rows: int, duration_s: float) -> None:
        """Count a forward pass."""
        self.observe("predict_batch_rows", rows)
        self.observe("predict_forward_seconds", duration_s)

    def queue_length(self, requests: int) -> None:
        """Set the number of requests that wait for the model."""
        self.set("predict_queue_length", requests)

    def rejected(self, reason: str) -> None:
        """Count a rejected request; `reason` is one of `REJECTIONS`."""
        self.count("rejected_total", 1, reason)

    def appended(self, topic: str, records: int) -> None:
        """Count records that are durable in the log."""
        self.count("appended_records_total", records, topic)

    def scraped(self, target: str, *, failed: bool) -> None:
        """Set whether the last scrape of a sibling failed."""
        self.set("scrape_failed", failed, target)


_CLOSE_WITHIN_S = 0.05


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log no request."""


class MetricsServer:
    """An HTTP server of one registry on loopback, in a daemon thread.

    Raises:
        OSError: the port cannot be bound.
    """

    def __init__(self, registry: CollectorRegistry, port: int) -> None:
        """For port 0 a free one is taken."""
        self._server = make_server("127.0.0.1", port, make_wsgi_app(registry), _ThreadingServer, _SilentHandler)
        self.port = int(self._server.server_address[1])
        # With prometheus_client's own server a process would wait for half a second at its end.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_CLOSE_WITHIN_S,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and release the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)
