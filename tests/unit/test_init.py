"""`streamlearn init` on topics of several kinds: the file that it writes is loaded, and decodes their records."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from fake_registry import FakeRegistry
from harness.fakes import MemoryLog

from streamlearn.app import init
from streamlearn.app.init import Written, infer, write_config
from streamlearn.config import load_config
from streamlearn.errors import ConfigError, RegistryUnavailableError
from streamlearn.records import NewRecord
from streamlearn.sources import merged, read_layers

COUNT, START_MS, DELAY_MS = 300, 1_772_700_000_000, 3_600_000
TOPICS = {"source.samples.topic": "sales", "source.labels.topic": "frauds", "log.kind": "kafka"}
Make = Callable[[int], Any]


def filled(sample: Make, label: Make, *, key: Make = lambda n: None, label_key: Make = lambda n: None) -> MemoryLog:
    """A topic of samples, one a minute, and of labels, one for every third sample, an hour later."""
    log = MemoryLog()
    log.create_topics({"sales": 3, "frauds": 2, "dead-letters": 1})
    for n in range(COUNT):
        log.append("sales", [NewRecord(key(n), encoded(sample(n)), (), START_MS + n * 60_000)])
        if n % 3 == 0:
            at_ms = START_MS + n * 60_000 + DELAY_MS
            log.append("frauds", [NewRecord(label_key(n), encoded(label(n)), (), at_ms)])
    return log


def encoded(value: Any) -> bytes | None:
    return value if value is None or isinstance(value, bytes) else json.dumps(value).encode()


def inferred(log: MemoryLog, count: int = 2000, **given: Any) -> Written:
    tree = merged(read_layers(None, {}, {**TOPICS, **given}))
    return infer(log, init.validated(tree), tree, count=count, path=Path("streamlearn.toml"))


def reloaded(written: Written, folder: Path) -> Any:
    """The config of the file: the same as the one that decoded the records."""
    path = folder / "written.toml"
    path.write_text(written.text)
    config = load_config(path, environ={})
    assert config == written.config
    return config


def said(written: Written, subject: str) -> list[str]:
    return [f"{finding.verdict}: {finding.text}" for finding in written.findings if finding.subject == subject]


def everything_decodes(written: Written) -> bool:
    report = written.report
    good = [topic.decoded + topic.skipped == topic.read > 0 for topic in (report.samples, report.labels)]
    return all(good) and report.join.found > 0


def sale(n: int) -> dict[str, Any]:
    rng = random.Random(n)
    return {
        "transaction_id": f"t-{n:05}",
        "amount": round(rng.lognormvariate(3, 1), 2),
        "balance": None if n % 5 == 0 else str(rng.randrange(10_000) / 100),
        "merchant": f"m{rng.randrange(40)}",
        "mcc": rng.choice([5411, 5812, 7995]),
        "card_present": rng.random() < 0.5,
        "currency": "EUR",
        "created_at": START_MS + n * 60_000,
        "device": {"os": rng.choice(["ios", "android"]), "age_days": rng.randrange(900)},
    }


def fraud(n: int) -> dict[str, Any]:
    return {"transaction_id": f"t-{n:05}", "is_fraud": n % 4 == 0}


class TestJson:
    def test_columns_ids_times_and_classes(self, tmp_path: Path) -> None:
        """All by path, with kinds; what is left out stays as a comment with a reason."""
        written = inferred(filled(sale, fraud, key=lambda n: b"customer-%d" % (n % 17)))
        config = reloaded(written, tmp_path)

        samples, labels = config.source.samples, config.source.labels
        assert (samples.format, samples.id, samples.time, samples.time_unit) == (
            "json", "transaction_id", "created_at", "ms",
        )  # fmt: skip
        assert (labels.id, labels.label) == ("transaction_id", "is_fraud")
        assert labels.values == {"true": "fraud", "false": "not_fraud"}
        assert config.schema_.classes == ("not_fraud", "fraud")
        assert {name: column.kind for name, column in config.columns.items()} == {
            "amount": "number", "balance": "number", "merchant": "category", "mcc": "category",
            "card_present": "boolean", "created_at": "timestamp", "device_os": "category", "device_age_days": "number",
        }  # fmt: skip
        assert config.columns["device_os"].from_ == "device.os"
        assert "# currency = " in written.text
        assert "always EUR" in written.text
        assert everything_decodes(written)
        assert {finding.verdict for finding in written.findings} == {"ok"}

    def test_an_object_that_is_null_in_some_records_is_not_left_out(self, tmp_path: Path) -> None:
        """Its fields are columns."""
        written = inferred(filled(lambda n: {**sale(n), **({"device": None} if n % 9 == 0 else {})}, fraud))

        assert reloaded(written, tmp_path).columns["device_os"].from_ == "device.os"
        assert "null in all" not in written.text
        assert everything_decodes(written)

    def test_records_with_the_same_fault_are_one_line(self) -> None:
        """Wherever in the record the parser stopped."""
        bad = [b'{"a": %s, "b": nan}' % (b"1" * n) for n in range(1, 31)]
        written = inferred(filled(lambda n: bad[n // 10] if n % 10 == 5 else sale(n), fraud))

        warnings = [text for text in said(written, "samples") if "cannot be read" in text]
        assert len(warnings) == 1
        assert "30 records cannot be read" in warnings[0]

    def test_the_users_own_classes_are_not_merged(self, tmp_path: Path) -> None:
        """Although they differ only in case."""
        outcome = lambda n: {"transaction_id": f"t-{n:05}", "outcome": "KEPT" if n % 6 else "kept"}  # noqa: E731
        written = inferred(filled(sale, outcome), **{"schema.classes": ["KEPT", "kept"]})
        merged_by_default = inferred(filled(sale, outcome))

        assert reloaded(written, tmp_path).source.labels.values == {}
        assert merged_by_default.config.source.labels.values == {"kept": "KEPT"}

    def test_labels_that_a_server_appended_decide_nothing(self, tmp_path: Path) -> None:
        """They are in streamlearn's form, with its header, next to those of the producers."""
        log = filled(sale, fraud)
        for n in range(9):
            own = {"id": f"t-{n:05}", "label": "fraud", "source": "http"}
            log.append("frauds", [NewRecord(None, encoded(own), (("streamlearn-id", b"t-%05d" % n),))])
        written = inferred(log)

        assert reloaded(written, tmp_path).source.labels.label == "is_fraud"
        assert written.config.schema_.classes == ("not_fraud", "fraud")
        assert everything_decodes(written)

    def test_what_becomes_of_a_repeated_id_is_said(self) -> None:
        """Of labels; no sample has its id twice."""
        log = filled(sale, fraud)
        log.append("frauds", [NewRecord(None, encoded(fraud(n))) for n in range(0, COUNT, 6)])

        (text,) = said(inferred(log), "id")
        assert "33.3% of labels repeat an id, and a later one corrects an earlier one" in text
        assert "of samples repeat" not in text

    def test_topics_are_a_list_if_there_are_several(self, tmp_path: Path) -> None:
        """Each is read."""
        log = filled(sale, fraud)
        log.create_topics({"web": 1})
        log.append("web", [NewRecord(None, encoded({**sale(n), "transaction_id": f"w{n}"})) for n in range(50)])

        written = inferred(log, **{"source.samples.topic": ["sales", "web"]})

        assert reloaded(written, tmp_path).source.samples.topics == ("sales", "web")
        assert written.report.samples.read == COUNT + 50

    def test_the_key_is_the_id_if_no_field_is(self, tmp_path: Path) -> None:
        """Quoted or not."""
        written = inferred(
            filled(
                lambda n: {"amount": n / 7},
                lambda n: {"verdict": "bad" if n % 4 == 0 else "good"},
                key=lambda n: b'"t%d"' % n,
                label_key=lambda n: b"t%d" % n,
            )
        )
        config = reloaded(written, tmp_path)

        assert (config.source.samples.id, config.source.labels.id) == ("key", "key")
        assert config.schema_.classes == ("good", "bad")
        assert everything_decodes(written)

    def test_plain_text_labels(self, tmp_path: Path) -> None:
        """A class name as the value, the id as the key."""
        written = inferred(filled(sale, lambda n: b"bad" if n % 4 == 0 else b"good", label_key=lambda n: b"t-%05d" % n))
        config = reloaded(written, tmp_path)

        assert (config.source.labels.id, config.source.labels.label) == ("key", None)
        assert config.schema_.classes == ("good", "bad")
        assert everything_decodes(written)

    def test_streamlearns_own_records(self, tmp_path: Path) -> None:
        """A tensor in `x` gives the shape; there are no columns."""
        written = inferred(
            filled(
                lambda n: {"id": f"d{n}", "x": np.zeros((1, 2, 3)).tolist()},
                lambda n: {"id": f"d{n}", "label": str(n % 2)},
                key=lambda n: b"d%d" % n,
            )
        )
        config = reloaded(written, tmp_path)

        assert config.schema_.shape == (1, 2, 3)
        assert (config.columns, config.source.samples.id) == ({}, None)
        assert everything_decodes(written)

    def test_null_values_and_garbage_are_reported(self, tmp_path: Path) -> None:
        """They do not stop it."""
        log = filled(sale, fraud)
        log.append("sales", [NewRecord(b"k", None), NewRecord(b"k", b"\xff")])

        written = inferred(log)

        assert any("1 records cannot be read" in text for text in said(written, "samples"))
        report = written.report.samples
        assert (report.decoded, report.skipped, report.bad["not_json"].count) == (COUNT, 1, 1)
        reloaded(written, tmp_path)

    def test_the_label_among_the_samples_is_left_out_and_leaks_are_warnings(self, tmp_path: Path) -> None:
        """A column that knows the answer makes every score look good."""

        def sample(n: int) -> dict[str, Any]:
            done = "closed" if n % 4 == 0 else "open"
            return {**sale(n), "is_fraud": n % 4 == 0, "truth": n % 4 == 0, "case_state": done}

        def truth(n: int) -> dict[str, Any]:
            return {"transaction_id": f"t-{n:05}", "is_fraud": n % 4 == 0}

        written = inferred(filled(sample, truth))

        columns = reloaded(written, tmp_path).columns
        assert "is_fraud" not in columns
        assert "case_state" in columns
        assert [text for text in said(written, "leak") if text.startswith("warning: case_state: each value has one")]

    def test_names_and_values_of_others_add_no_settings(self, tmp_path: Path) -> None:
        """A record is no config."""
        evil = 'x"\n[serve]\nport=1\n#'

        def sample(n: int) -> dict[str, Any]:
            return {**sale(n), evil: random.Random(n).choice([evil, "b", "c"]), "a.b": 1, "": 2}

        written = inferred(filled(sample, lambda n: {**fraud(n), "is_fraud": evil if n % 4 else "ok"}))
        config = reloaded(written, tmp_path)

        assert config.serve.port == 8080
        assert evil in config.columns
        assert set(config.schema_.classes) == {evil, "ok"}
        assert "# a.b: a name with a dot" in written.text


class TestIds:
    def test_more_samples_are_read_if_no_label_is_found(self, tmp_path: Path) -> None:
        """Labels that are days late belong to samples between the oldest and the newest."""
        log = MemoryLog()
        log.create_topics({"sales": 1, "frauds": 1, "dead-letters": 1})
        for n in range(COUNT):
            log.append("sales", [NewRecord(None, encoded(sale(n)), (), START_MS + n * 60_000)])
        log.append("frauds", [NewRecord(None, encoded(fraud(n)), (), START_MS) for n in range(100, 120)])

        written = inferred(log, count=40)

        assert reloaded(written, tmp_path).source.samples.id == "transaction_id"
        assert said(written, "id") == [
            "ok: transaction_id of samples is transaction_id of labels: 20 of 20 ids of labels are among 300 samples"
        ]

    def test_without_a_common_id_the_equal_name_is_taken_with_a_warning(self, tmp_path: Path) -> None:
        """The labels of another week."""
        written = inferred(filled(sale, lambda n: {"transaction_id": f"old-{n}", "is_fraud": n % 4 == 0}))

        assert reloaded(written, tmp_path).source.labels.id == "transaction_id"
        assert said(written, "id")[0].startswith("warning: transaction_id, not verified")

    def test_without_any_the_candidates_are_comments(self, tmp_path: Path) -> None:
        """Nothing is guessed."""
        written = inferred(filled(sale, lambda n: {"ref": f"old-{n}", "is_fraud": n % 4 == 0}))

        assert reloaded(written, tmp_path).source.labels.id is None
        assert '# id = "ref"' in written.text
        assert '# id = "transaction_id"' in written.text
        assert said(written, "id")[0].startswith("warning: not decided")

    def test_an_empty_labels_topic(self, tmp_path: Path) -> None:
        """Columns are inferred all the same."""
        log = MemoryLog()
        log.create_topics({"sales": 1, "frauds": 1, "dead-letters": 1})
        log.append("sales", [NewRecord(None, encoded(sale(n)), (), START_MS + n) for n in range(50)])

        written = inferred(log)

        assert "amount" in reloaded(written, tmp_path).columns
        assert said(written, "id")[0].startswith("warning: not decided")
        assert said(written, "label")[0].startswith("warning: not decided")

    def test_an_empty_samples_topic(self, tmp_path: Path) -> None:
        """The file says so."""
        log = MemoryLog()
        log.create_topics({"sales": 1, "frauds": 1, "dead-letters": 1})
        log.append("frauds", [NewRecord(None, encoded(fraud(n))) for n in range(50)])

        written = inferred(log)

        assert reloaded(written, tmp_path).columns == {}
        assert "no record was there" in written.text


class TestUndecidedLabel:
    def test_equal_candidates_are_comments(self, tmp_path: Path) -> None:
        """With their values."""
        written = inferred(filled(sale, lambda n: {"transaction_id": f"t-{n:05}", "a": n % 2 == 0, "b": n % 4 == 0}))
        config = reloaded(written, tmp_path)

        assert (config.source.labels.label, config.schema_.classes) == (None, 10)
        assert '# label = "a"  # values: ' in written.text
        assert said(written, "label")[0].startswith("warning: not decided")

    def test_the_user_decides(self, tmp_path: Path) -> None:
        """By --set."""
        log = filled(sale, lambda n: {"transaction_id": f"t-{n:05}", "a": n % 2 == 0, "b": n % 4 == 0})

        written = inferred(log, **{"source.labels.label": "b"})

        assert reloaded(written, tmp_path).schema_.classes == ("not_b", "b")
        assert everything_decodes(written)

    def test_classes_of_the_user_are_kept(self, tmp_path: Path) -> None:
        """Values are mapped where the names agree, and asked for where they do not."""
        written = inferred(filled(sale, fraud), **{"schema.classes": ["legitimate", "fraud"]})
        config = reloaded(written, tmp_path)

        assert config.schema_.classes == ("legitimate", "fraud")
        assert config.source.labels.values == {"true": "fraud"}
        assert '# false = "not_fraud"  # which of your classes is it?' in written.text


class TestUsersSettings:
    def test_are_kept_and_written(self, tmp_path: Path) -> None:
        """Columns too; the rest is inferred."""
        given = {"columns": {"amount": "category", "os": {"kind": "category", "from": "device.os"}}, "serve.port": 0}

        config = reloaded(inferred(filled(sale, fraud), **given), tmp_path)

        assert config.serve.port == 0
        assert config.columns["amount"].kind == "category"
        assert [*config.columns][:2] == ["amount", "os"]
        assert "device_os" not in config.columns
        assert "merchant" in config.columns

    def test_a_chosen_id_is_the_only_candidate(self, tmp_path: Path) -> None:
        """Here another field would fit as well."""
        log = filled(lambda n: {**sale(n), "order": f"t-{n:05}"}, fraud)

        assert reloaded(inferred(log, **{"source.samples.id": "order"}), tmp_path).source.samples.id == "order"

    def test_the_environment_is_used_and_not_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Secrets live there."""
        monkeypatch.setenv("STREAMLEARN_LOG__KAFKA__OPTIONS__SASL_PLAIN_PASSWORD", "hunter2")

        written = inferred(filled(sale, fraud), **{"log.kafka.options": {"sasl_mechanism": "PLAIN"}})

        assert written.config.log.kafka.options["sasl_plain_password"] == "hunter2"
        assert "hunter2" not in written.text


AVRO = {
    "type": "record",
    "name": "Sale",
    "fields": [
        {"name": "id", "type": "long"},
        {"name": "amount", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "shop", "type": ["null", "string"]},
    ],
}


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as fake:
        fake.add(1, AVRO)
        fake.add(2, "{}", kind="JSON")
        yield fake


def avro(n: int) -> bytes:
    body = io.BytesIO()
    value = {"id": n * 31, "amount": n * 50, "at": (START_MS + n * 60_000) * 1000, "shop": f"s{n % 9}"}
    plain: Mapping[str, Any] = {**AVRO, "fields": [{**f, "type": f["type"]} for f in AVRO["fields"]]}  # type: ignore[union-attr]
    plain["fields"][1] = {"name": "amount", "type": "bytes"}
    plain["fields"][2] = {"name": "at", "type": "long"}
    fastavro.schemaless_writer(body, fastavro.parse_schema(plain), {**value, "amount": (n * 50).to_bytes(4, "big")})
    return b"\0\0\0\0\1" + body.getvalue()


class TestFramed:
    def test_avro_samples_and_json_schema_labels(self, registry: FakeRegistry, tmp_path: Path) -> None:
        """The registry says which is which; logical types are times and numbers."""
        log = filled(avro, lambda n: b"\0\0\0\0\2" + json.dumps({"sale": n * 31, "ok": n % 4 > 0}).encode())

        written = inferred(log, **{"source.registry.url": registry.url})
        config = reloaded(written, tmp_path)

        assert (config.source.samples.format, config.source.labels.format) == ("avro", "json_schema")
        assert (config.source.samples.id, config.source.labels.id) == ("id", "sale")
        assert (config.source.samples.time, config.source.samples.time_unit) == ("at", "s")
        assert {name: column.kind for name, column in config.columns.items()} == {
            "amount": "number", "at": "timestamp", "shop": "category",
        }  # fmt: skip
        assert everything_decodes(written)

    def test_a_frame_without_a_registry(self, registry: FakeRegistry) -> None:
        """The option is named."""
        with pytest.raises(ConfigError, match="--registry"):
            inferred(filled(avro, fraud))

    def test_a_registry_that_is_away(self, registry: FakeRegistry) -> None:
        """The command ends; it is for a person at a terminal."""
        registry.broken = (503, b"")

        with pytest.raises(RegistryUnavailableError):
            inferred(filled(avro, fraud), **{"source.registry.url": registry.url})

    def test_protobuf_needs_the_class(self, registry: FakeRegistry) -> None:
        """Which the registry does not have."""
        registry.add(3, "message", kind="PROTOBUF")

        with pytest.raises(ConfigError, match=r"package\.module:Message"):
            inferred(filled(lambda n: b"\0\0\0\0\3x", fraud), **{"source.registry.url": registry.url})


class TestDebezium:
    @pytest.mark.parametrize("wrap", [False, True])
    def test_rows_below_after(self, tmp_path: Path, wrap: bool) -> None:
        """Nested, with deletes, in both topics."""

        def change(row: dict[str, Any], n: int) -> dict[str, Any]:
            deleted = n % 50 == 49
            found = {
                "before": row if deleted else None,
                "after": None if deleted else row,
                "op": "d" if deleted else "c",
                "source": {"ts_ms": START_MS + n * 60_000, "db": "shop"},
                "ts_ms": START_MS + n * 60_000 + 5,
            }
            return {"schema": {"type": "struct"}, "payload": found} if wrap else found

        def without_time(n: int) -> dict[str, Any]:
            return {name: value for name, value in sale(n).items() if name != "created_at"}

        written = inferred(filled(lambda n: change(without_time(n), n), lambda n: change(fraud(n), n)))
        config = reloaded(written, tmp_path)

        above = "payload." if wrap else ""
        assert config.source.samples.id == f"{above}after.transaction_id"
        assert config.source.samples.time == f"{above}source.ts_ms"
        assert config.source.samples.time_unit == "ms"
        assert config.source.labels.label == f"{above}after.is_fraud"
        assert config.columns["device_os"].from_ == f"{above}after.device.os"
        assert not [column for column in config.columns.values() if "source" in str(column.from_)]
        assert everything_decodes(written)
        assert written.report.samples.skipped == COUNT // 50


class TestRefused:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (b"\x93NUMPY", "tensors or images"),
            (b"\xff\xfe", "none of 300 records could be read as json"),
            (None, "null"),
        ],
    )
    def test_records_without_fields(self, value: bytes | None, message: str) -> None:
        """One sentence, with the way out."""
        with pytest.raises(ConfigError, match=message):
            inferred(filled(lambda n: value, fraud, key=lambda n: b"k"))

    def test_an_existing_file_is_not_overwritten(self, tmp_path: Path) -> None:
        """Before anything is read."""
        out = tmp_path / "streamlearn.toml"
        out.write_text("mine")

        with pytest.raises(ConfigError, match=f"{out} exists"):
            write_config(out, None, TOPICS, count=10)
        assert out.read_text() == "mine"


class TestWriteConfig:
    @pytest.fixture(autouse=True)
    def log(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(init, "open_log", lambda _: filled(sale, fraud))

    def test_it_is_written_whole(self, tmp_path: Path) -> None:
        """With --force over an older one; settings of --config are in it."""
        base, out = tmp_path / "base.toml", tmp_path / "streamlearn.toml"
        base.write_text("[state]\ndir = 'elsewhere'\n")
        out.write_text("old")

        written = write_config(out, base, {name: TOPICS[name] for name in list(TOPICS)[:2]}, count=500, force=True)

        assert out.read_text() == written.text
        assert load_config(out, environ={}).log.kind == "kafka"
        assert str(load_config(out, environ={}).state.dir) == "elsewhere"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base.toml", "streamlearn.toml"]

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        """One sentence."""
        with pytest.raises(ConfigError, match="cannot be written: No such file"):
            write_config(tmp_path / "no" / "streamlearn.toml", None, TOPICS, count=100)
