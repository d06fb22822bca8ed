"""The metrics: promtool's lint, closed sets that start at 0, and the merge of several processes."""

import math
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import streamlearn
from streamlearn.errors import REASONS
from streamlearn.metrics import (
    LEARNER_METRICS,
    PREFIX,
    SERVER_METRICS,
    Metrics,
    MetricsServer,
    ServerMetrics,
)
from streamlearn.serve.scrape import merge


def busy_learner() -> Metrics:
    """A learner whose every metric was updated."""
    metrics = Metrics(LEARNER_METRICS, version="1.2.3")
    for metric in LEARNER_METRICS:
        values = metric.series[0] if metric.series else tuple(metric.labels)
        if metric.kind == "counter":
            metrics.count(metric.name, 10, *values)
        elif metric.kind == "gauge":
            metrics.set(metric.name, 40.0, *values)
        else:
            metrics.observe(metric.name, 0.003, *values)
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
        found = samples(Metrics(LEARNER_METRICS, version="1").text())

        for reason in REASONS:
            assert found["streamlearn_dead_letters_total", (("reason", reason),)] == 0.0
        assert found["streamlearn_records_total", (("outcome", "orphan"), ("topic", "labels"))] == 0.0
        assert found["streamlearn_steps_skipped_total", ()] == 0.0

    def test_accuracy_is_nan_before_the_first_score(self):
        """An undefined score is not 0."""
        found = samples(Metrics(LEARNER_METRICS, version="1").text())

        assert math.isnan(
            found["streamlearn_prequential_accuracy_ratio", (("network", "teacher"), ("window", "windowed"))]
        )

    def test_each_update_changes_one_series(self):
        """And no other."""
        metrics = Metrics(LEARNER_METRICS, version="1.2.3")
        metrics.count("records_total", 7, "samples", "learned")
        metrics.observe("step_duration_seconds", 0.003)
        metrics.set("score", 0.25, "kappa", "faded")
        metrics.set("label_time_accuracy_ratio", 0.5, "teacher")
        metrics.set("label_time_accuracy_ratio", None, "teacher")
        metrics.set("guard_frozen", True)
        metrics.set("consumer_lag_records", 12, "clicks", "3")

        found = samples(metrics.text())

        assert found["streamlearn_records_total", (("outcome", "learned"), ("topic", "samples"))] == 7.0
        assert found["streamlearn_records_total", (("outcome", "trimmed"), ("topic", "samples"))] == 0.0
        assert found["streamlearn_step_duration_seconds_bucket", (("le", "0.005"),)] == 1.0
        assert found["streamlearn_step_duration_seconds_bucket", (("le", "0.002"),)] == 0.0
        assert found["streamlearn_score", (("score", "kappa"), ("window", "faded"))] == 0.25
        assert math.isnan(found["streamlearn_label_time_accuracy_ratio", (("network", "teacher"),)])
        assert found["streamlearn_guard_frozen", ()] == 1.0
        assert found["streamlearn_consumer_lag_records", (("partition", "3"), ("topic", "clicks"))] == 12.0
        assert found["streamlearn_build_info", (("version", "1.2.3"),)] == 1.0

    @pytest.mark.parametrize("update", [Metrics.count, Metrics.observe])
    def test_another_kind_of_metric_is_a_bug(self, update):
        """A gauge is set."""
        with pytest.raises(AssertionError, match="guard_frozen"):
            update(Metrics(LEARNER_METRICS, version="1"), "guard_frozen", 1.0)

    def test_the_code_updates_each_metric(self):
        """By its name."""
        folder = Path(streamlearn.__file__).parent
        source = (folder / "app" / "monitor.py").read_text() + (folder / "metrics.py").read_text().partition("class ")[
            2
        ]

        assert [m.name for m in (*LEARNER_METRICS, *SERVER_METRICS) if f'"{m.name}"' not in source] == []

    def test_a_value_outside_a_closed_set_is_a_bug(self):
        """Error texts and ids cannot become label values."""
        with pytest.raises(AssertionError, match="closed set"):
            Metrics(LEARNER_METRICS, version="1").count("dead_letters_total", 1, "it was Tuesday")

    def test_two_objects_in_one_process_are_independent(self):
        """There is no global registry."""
        one, other = Metrics(LEARNER_METRICS, version="1"), Metrics(LEARNER_METRICS, version="1")

        one.count("steps_total", 1)

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

    server = MetricsServer(metrics.registry, 0)
    port = server.port
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
            text = reply.read().decode()
    finally:
        server.close()

    assert samples(text)["streamlearn_published_step", ()] == 40.0
    again = MetricsServer(metrics.registry, port)
    again.close()
