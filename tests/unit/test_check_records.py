"""`streamlearn check --sample`: what the config makes of records, counted and explained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from harness.fakes import MemoryLog
from rich.console import Console

from streamlearn.app import check_records as module
from streamlearn.app.check_records import RecordsReport, check_records
from streamlearn.cli.topics import _columns, _print_json
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError
from streamlearn.records import NewRecord

START_MS, MINUTE_MS = 1_772_700_000_000, 60_000


def config_in(folder: Path, **overrides: Any) -> Config:
    settings = {
        "log.kind": "kafka",
        "state.dir": str(folder),
        "source.samples": {"topic": "sales", "id": "tx"},
        "source.labels": {"topic": "frauds", "id": "tx", "label": "bad", "values": {"true": "fraud", "false": "ok"}},
        "columns": {
            "amount": "number",
            "shop": {"kind": "category", "buckets": 64},
            "at": {"kind": "timestamp", "unit": "ms"},
        },
        "schema.classes": ["ok", "fraud"],
        "labels.horizon_s": 86_400.0,
    }
    return load_config(environ={}, overrides={**settings, **overrides})


def sale(n: int, **fields: Any) -> bytes:
    found = {"tx": f"t{n}", "amount": n / 2, "shop": f"s{n % 5}", "at": START_MS + n * MINUTE_MS, "extra": 1}
    return orjson.dumps({**found, **fields})


def report(
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    samples: Sequence[bytes | None],
    labels: Sequence[bytes | None] = (),
    *,
    delay_ms: int = MINUTE_MS,
    count: int = 1000,
) -> RecordsReport:
    log = MemoryLog()
    log.create_topics({"sales": 2, "frauds": 1})
    for topic, values, later in (("sales", samples, 0), ("frauds", labels, delay_ms)):
        for n, value in enumerate(values):
            log.append(topic, [NewRecord(b"%d" % (n % 7), value, (), START_MS + n * MINUTE_MS + later)])
    monkeypatch.setattr(module, "open_log", lambda _: log)
    return check_records(config, count)


def lines(found: RecordsReport) -> dict[str, tuple[str, str]]:
    return {finding.subject: (finding.verdict, finding.text) for finding in found.findings()}


GOOD = [sale(n) for n in range(100)]
LABELS = [orjson.dumps({"tx": f"t{n}", "bad": n % 4 == 0}) for n in range(100)]


class TestDecoding:
    def test_all_is_well(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every line is ok."""
        found = report(monkeypatch, config_in(tmp_path), GOOD, LABELS)

        assert {verdict for verdict, _ in lines(found).values()} == {"ok"}
        assert (found.samples.held, found.samples.read, found.samples.decoded, found.samples.partitions) == (
            100, 100, 100, 2,
        )  # fmt: skip
        assert found.join.found == found.join.of == 100
        assert found.classes == {"ok": 75, "fraud": 25}
        assert "100 of 100 labels belong to all samples" in lines(found)["ids"][1]

    def test_reasons_have_an_example_each(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Null values are skipped; the rest says where it is."""
        found = report(monkeypatch, config_in(tmp_path), [*GOOD, b"\xff", b"{", None, b'{"amount": 1}'], LABELS)

        assert (found.samples.decoded, found.samples.skipped) == (100, 1)
        assert {reason: bad.count for reason, bad in found.samples.bad.items()} == {"not_json": 2, "no_id": 1}
        verdict, text = lines(found)["samples: no_id"]
        assert verdict == "warning"
        assert "1 records, such as sales[" in text
        assert "expected an id at tx" in text
        assert "97.1% of them decode" in lines(found)["samples"][1]

    def test_nothing_decodes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """That is an error."""
        found = report(monkeypatch, config_in(tmp_path), [b"\xff"] * 5)

        assert lines(found)["samples"][0] == "error"
        assert lines(found)["samples: not_json"][0] == "error"
        assert lines(found)["labels"][0] == "warning"

    def test_a_topic_that_is_not_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its name."""
        with pytest.raises(ConfigError, match="no topic 'other'"):
            report(monkeypatch, config_in(tmp_path, **{"source.labels": {"topic": "other"}}), GOOD)

    def test_an_embedded_log_that_is_not_there(self, tmp_path: Path) -> None:
        """It is not created."""
        with pytest.raises(ConfigError, match="there is no log yet"):
            check_records(config_in(tmp_path, **{"log.kind": "embedded"}), 10)
        assert list(tmp_path.iterdir()) == []


class TestLabels:
    def test_no_label_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The most frequent mistake: an id of each shows why."""
        labels = [orjson.dumps({"tx": f"T-{n}", "bad": True}) for n in range(10)]

        verdict, text = lines(report(monkeypatch, config_in(tmp_path), GOOD, labels))["ids"]

        assert verdict == "warning"
        assert "A label has the id 'T-0', a sample 't" in text

    def test_of_a_part_of_the_samples_it_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The others may be in the rest."""
        found = report(monkeypatch, config_in(tmp_path), GOOD, LABELS[:10], count=20)

        assert found.join.found < 10
        assert "the 20 samples read; the others' may be in the rest" in lines(found)["ids"][1]

    def test_delays_beyond_the_horizon(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Such labels would expire."""
        found = report(monkeypatch, config_in(tmp_path), GOOD, LABELS, delay_ms=3 * 86_400_000)

        assert found.join.delay_s["50%"] == pytest.approx(3 * 86_400.0)
        verdict, text = lines(found)["label delay"]
        assert verdict == "warning"
        assert "by the log's time: min 3 d, 10% 3 d" in text
        assert "longer than labels.horizon_s = 24 h" in text

    def test_delays_are_of_event_times_where_both_have_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As the learner has them."""
        config = config_in(
            tmp_path,
            **{
                "source.samples": {"topic": "sales", "id": "tx", "time": "at", "time_unit": "ms"},
                "source.labels": {"topic": "frauds", "id": "tx", "label": "bad", "time": "when"},
            },
        )
        labels = [orjson.dumps({"tx": f"t{n}", "bad": "ok", "when": START_MS / 1000 + n * 60 + 7}) for n in range(10)]

        found = report(monkeypatch, config, GOOD, labels)

        assert found.join.by == "event time"
        assert found.join.delay_s == dict.fromkeys(["min", "10%", "50%", "90%", "99%", "max"], pytest.approx(7.0))

    def test_classes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Unknown ones with their names, unseen ones, retractions."""
        values = [True, "chargeback", "chargeback", None]
        labels = [orjson.dumps({"tx": f"t{n}", "bad": value}) for n, value in enumerate(values)]

        found = report(monkeypatch, config_in(tmp_path), GOOD, labels)

        assert (found.classes, found.unknown_classes, found.retracted) == (
            {"ok": 0, "fraud": 1}, {"chargeback": 2}, 1,
        )  # fmt: skip
        assert lines(found)["classes"] == ("warning", "ok 0, fraud 1; not seen: ok")
        assert lines(found)["unknown classes"][1].startswith("'chargeback' 2: not in schema.classes")
        assert lines(found)["retractions"][0] == "ok"


class TestColumns:
    def test_shares_ranges_and_distinct_values(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the values that the learner would encode."""
        samples = [*GOOD, *(sale(n, amount="N/A") for n in range(20)), *(sale(n, shop=None) for n in range(5))]

        found = report(monkeypatch, config_in(tmp_path), samples, LABELS)
        amount, shop, at = found.columns

        assert (amount.missing, amount.invalid, amount.low, amount.high) == (0.0, 20 / 125, 0.0, 49.5)
        assert (shop.missing, shop.invalid, shop.distinct) == (5 / 125, 0.0, 5)
        assert (at.low, at.high) == ("2026-03-05T08:40:00+00:00", "2026-03-05T10:19:00+00:00")
        assert found.unknown_fields == {"extra": 125}
        assert lines(found)["column amount"] == (
            "warning", "16% of the values are no number, and are encoded as missing",
        )  # fmt: skip
        assert lines(found)["unused fields"] == ("ok", "1 that no setting names: extra")

    def test_a_column_that_is_never_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A path with a typing error."""
        config = config_in(tmp_path, columns={"amount": "number", "merchnt": "category"})

        assert lines(report(monkeypatch, config, GOOD, LABELS))["column merchnt"] == (
            "warning", "missing in all samples: is its path right?",
        )  # fmt: skip

    def test_tensors_have_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without [columns]."""
        config = load_config(
            environ={},
            overrides={
                "log.kind": "kafka",
                "state.dir": str(tmp_path),
                "source.samples.topic": "sales",
                "source.labels.topic": "frauds",
                "schema.shape": [2],
            },
        )
        samples = [orjson.dumps({"id": f"t{n}", "x": [0, 1]}) for n in range(5)]

        found = report(monkeypatch, config, samples)

        assert (found.columns, found.unknown_fields) == ([], {})


class TestRate:
    def test_disk_for_the_horizon(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One sample a minute, for a day."""
        found = report(monkeypatch, config_in(tmp_path), GOOD, LABELS)

        assert found.samples.rate == pytest.approx(100 / (99 * 60))
        assert found.horizon_samples == pytest.approx(86_400 * 100 / (99 * 60))
        assert set(found.horizon_bytes) == {"ids and their history", "payloads"}
        assert "about 0.0168 samples/s and 0.0168 labels/s; 24 h hold 1,455 samples" in lines(found)["rate"][1]

    def test_more_samples_than_ids_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Labels would come too late."""
        found = report(monkeypatch, config_in(tmp_path, **{"labels.max_ids": 1000}), GOOD, LABELS)

        verdict, text = lines(found)["rate"]
        assert verdict == "warning"
        assert "More than labels.max_ids = 1,000" in text

    def test_one_record_has_no_rate(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And no line."""
        assert "rate" not in lines(report(monkeypatch, config_in(tmp_path), GOOD[:1]))


def test_it_is_json_for_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, in plain values."""
    found = report(monkeypatch, config_in(tmp_path), [*GOOD, b"\xff"], LABELS)

    _print_json(found.findings(), found)
    shown = json.loads(capsys.readouterr().out)

    assert shown["records"]["samples"]["bad"]["not_json"]["count"] == 1
    assert shown["records"]["columns"][0]["name"] == "amount"
    assert {finding["verdict"] for finding in shown["findings"]} == {"ok", "warning"}


def test_the_table_has_a_row_per_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of the user may have brackets, which rich would take for markup."""
    config = config_in(tmp_path, columns={"[bold]amount": {"kind": "number", "from": "amount"}, "shop": "category"})

    console = Console(width=100, record=True)
    console.print(_columns(report(monkeypatch, config, GOOD, LABELS)))
    text = console.export_text()

    assert "[bold]amount" in text
    assert "0 to 49.5" in text
    assert "s0, s1, s2" in text
