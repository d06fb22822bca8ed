"""The metrics: promtool's lint, closed sets that start at 0, and the merge of several processes."""

import math
import shutil
import subprocess
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamlearn.errors import REASONS
from streamlearn.metrics import (
    LEARNER_METRICS,
    PREFIX,
    SERVER_METRICS,
    LearnerMetrics,
    ServerMetrics,
    start_http,
)
from streamlearn.serve.scrape import merge


def busy_learner() -> LearnerMetrics:
    """A learner whose every method was called."""
    metrics = LearnerMetrics(version="1.2.3")
    metrics.read("samples", 10)
    metrics.finished("samples", "learned", 7)
    metrics.dead_lettered("labels", "unknown_class")
    metrics.finished("samples", "trimmed", 4)
    metrics.step(0.003, 1000.0)
    metrics.skipped(1)
    metrics.phase("learn", 0.002)
    metrics.costs(classification=0.5, consistency=0.1, weight=3.0)
    metrics.accuracy("teacher", "windowed", 0.75)
    metrics.accuracy("student", "windowed", None)
    metrics.score("kappa", "faded", 0.25)
    metrics.ranking(0.4)
    metrics.class_scores("fraud", average_precision=0.3, precision=None)
    metrics.calibration(network=0.1, corrected=None)
    metrics.label_time(teacher=0.5, twin=None)
    metrics.ssl_gain(low=-0.1, mean=0.0, high=0.1)
    metrics.selection_bias(labelled_share=0.5, confidence_gap=None)
    metrics.candidate("twin", served=True)
    metrics.guard(frozen=True, reasons=["collapsed"])
    metrics.guard_acted("roll_back", 2)
    metrics.trust(0.5)
    metrics.drifted("inputs", 3)
    metrics.scored(30.0)
    metrics.ledger({"waiting": 3, "joined": 5}, samples=9, payload_bytes=700)
    metrics.lag("clicks", 3, 12)
    metrics.log_available(available=True)
    metrics.published(40)
    metrics.checkpoint_saved(duration_s=0.1, now_s=1002.0)
    return metrics


def busy_server() -> ServerMetrics:
    """A server whose every method was called."""
    metrics = ServerMetrics(version="1.2.3")
    metrics.request("/predict", "POST", "200", 0.002)
    metrics.forward(4, 0.0004)
    metrics.queue_length(2)
    metrics.rejected("queue_full")
    metrics.model(40, 1001.0)
    metrics.model_load_failed()
    metrics.appended("labels", 3)
    metrics.scraped("learner", failed=True)
    return metrics


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All samples of an exposition by name and labels, parsed by prometheus_client."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class TestTables:
    @pytest.mark.parametrize("table", [LEARNER_METRICS, SERVER_METRICS])
    def test_names_are_unique(self, table):
        """Each metric has one row."""
        names = [metric.name for metric in table]

        assert len(names) == len(set(names))

    @pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
    @pytest.mark.parametrize("text", [busy_learner().text(), busy_server().text()], ids=["learner", "server"])
    def test_pass_promtools_lint(self, text):
        """Names, units and help follow Prometheus' conventions."""
        done = subprocess.run(["promtool", "check", "metrics"], input=text.encode(), capture_output=True, check=False)

        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    def test_have_no_created_series(self):
        """They would double the scrape."""
        assert "_created" not in busy_learner().text()

    @pytest.mark.parametrize(("table", "text"), [(LEARNER_METRICS, busy_learner()), (SERVER_METRICS, busy_server())])
    def test_equal_the_exposition(self, table, text):
        """Table and exposition have the same metrics."""
        found = {family.name for family in text_string_to_metric_families(text.text())}
        expected = {PREFIX + metric.name.removesuffix("_total") for metric in table}

        assert {name for name in found if name.startswith(PREFIX)} == expected


class TestLearnerMetrics:
    def test_closed_sets_exist_at_zero_from_the_start(self):
        """An alert on a rate needs the series before the first event."""
        found = samples(LearnerMetrics(version="1").text())

        for reason in REASONS:
            assert found["streamlearn_dead_letters_total", (("reason", reason),)] == 0.0
        assert found["streamlearn_records_total", (("outcome", "orphan"), ("topic", "labels"))] == 0.0
        assert found["streamlearn_steps_skipped_total", ()] == 0.0

    def test_accuracy_is_nan_before_the_first_score(self):
        """An undefined score is not 0."""
        found = samples(LearnerMetrics(version="1").text())

        assert math.isnan(
            found["streamlearn_prequential_accuracy_ratio", (("network", "teacher"), ("window", "windowed"))]
        )

    def test_each_method_updates_its_series(self):
        """And no other."""
        found = samples(busy_learner().text())

        assert found["streamlearn_records_read_total", (("topic", "samples"),)] == 10.0
        assert found["streamlearn_records_total", (("outcome", "learned"), ("topic", "samples"))] == 7.0
        assert found["streamlearn_records_total", (("outcome", "dead_lettered"), ("topic", "labels"))] == 1.0
        assert found["streamlearn_dead_letters_total", (("reason", "unknown_class"),)] == 1.0
        assert found["streamlearn_records_total", (("outcome", "trimmed"), ("topic", "samples"))] == 4.0
        assert found["streamlearn_step_duration_seconds_bucket", (("le", "0.005"),)] == 1.0
        assert found["streamlearn_step_duration_seconds_bucket", (("le", "0.002"),)] == 0.0
        assert found["streamlearn_cost", (("term", "consistency"),)] == 0.1
        assert found["streamlearn_consistency_weight", ()] == 3.0
        assert found["streamlearn_score", (("score", "kappa"), ("window", "faded"))] == 0.25
        assert found["streamlearn_label_time_accuracy_ratio", (("network", "teacher"),)] == 0.5
        assert found["streamlearn_ssl_gain_ratio", (("bound", "low"),)] == -0.1
        assert found["streamlearn_selection_bias", (("measure", "labelled_share"),)] == 0.5
        assert found["streamlearn_candidate_served", (("candidate", "twin"),)] == 1.0
        assert found["streamlearn_guard_frozen", ()] == 1.0
        assert found["streamlearn_guard_reason", (("reason", "collapsed"),)] == 1.0
        assert found["streamlearn_guard_actions_total", (("action", "roll_back"),)] == 2.0
        assert found["streamlearn_teacher_trust_ratio", ()] == 0.5
        assert found["streamlearn_drift_alarms_total", (("source", "inputs"),)] == 3.0
        assert found["streamlearn_label_delay_seconds_sum", ()] == 30.0
        assert found["streamlearn_ledger_labels", (("state", "joined"),)] == 5.0
        assert found["streamlearn_consumer_lag_records", (("partition", "3"), ("topic", "clicks"))] == 12.0
        assert found["streamlearn_checkpoint_last_success_timestamp_seconds", ()] == 1002.0
        assert found["streamlearn_build_info", (("version", "1.2.3"),)] == 1.0

    def test_a_value_outside_a_closed_set_is_a_bug(self):
        """Error texts and ids cannot become label values."""
        with pytest.raises(AssertionError, match="closed set"):
            LearnerMetrics(version="1").dead_lettered("samples", "it was Tuesday")

    def test_two_objects_in_one_process_are_independent(self):
        """There is no global registry."""
        one, other = LearnerMetrics(version="1"), LearnerMetrics(version="1")

        one.step(0.1, 1.0)

        assert samples(other.text())["streamlearn_steps_total", ()] == 0.0


class TestMerge:
    def test_labels_each_sample_with_its_process(self):
        """Series of the same name stay separate."""
        one, other = ServerMetrics(version="1"), ServerMetrics(version="1")
        one.forward(3, 0.1)
        other.forward(4, 0.1)

        found = samples(merge({"server-0": one.text(), "server-1": other.text()}))

        assert found["streamlearn_predict_batch_rows_sum", (("process", "server-0"),)] == 3.0
        assert found["streamlearn_predict_batch_rows_sum", (("process", "server-1"),)] == 4.0

    def test_writes_each_family_once(self):
        """HELP and TYPE appear once, before all samples of the family."""
        merged = merge(
            {"learner": busy_learner().text(), "server-0": busy_server().text(), "server-1": busy_server().text()}
        )

        lines = [line for line in merged.split("\n") if line.startswith("# TYPE")]
        assert len(lines) == len(set(lines))
        assert len({line.split()[2] for line in lines}) == len(lines)
        assert len(samples(merged)) == sum(
            len(samples(text)) for text in (busy_learner().text(), *[busy_server().text()] * 2)
        )

    @pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
    def test_passes_promtools_lint(self):
        """Prometheus accepts the merged text."""
        merged = merge({"learner": busy_learner().text(), "server-0": busy_server().text()})

        done = subprocess.run(["promtool", "check", "metrics"], input=merged.encode(), capture_output=True, check=False)

        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    @pytest.mark.parametrize("value", ['a"b', "a\\b", "a\\nb", "a\nb", "a}b", "a\u2028b", "a b,c", "ÄΩ"])
    def test_keeps_special_characters_in_label_values(self, value):
        """In the text and in the process's name."""
        metrics = ServerMetrics(version="1")
        metrics.scraped(value, failed=True)

        found = samples(merge({value: metrics.text()}))

        assert found["streamlearn_scrape_failed", (("process", value), ("target", value))] == 1.0

    @pytest.mark.parametrize(
        "text", ["<html>no</html>", "# HELP a b\n{} 3\n", "orphan 1\n", "# TYPE a counter\na{ 3\n"]
    )
    def test_refuses_other_formats(self, text):
        """Output of another program on the port must not enter our metrics."""
        with pytest.raises(ValueError, match="server-0: line"):
            merge({"server-0": text})


def test_the_http_server_serves_the_registry():
    """And releases the port when closed."""
    metrics = busy_learner()

    server, port = start_http(metrics.registry, "127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
            text = reply.read().decode()
    finally:
        server.close()

    assert samples(text)["streamlearn_published_step", ()] == 40.0
    again, _ = start_http(metrics.registry, "127.0.0.1", port)
    again.close()
