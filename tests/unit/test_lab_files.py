"""Files of records as data sets: what `evaluate` learns and `simulate` sends are the user's records."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from streamlearn.app.log import make_codec, open_log
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError, StreamlearnError
from streamlearn.lab.datasets import Dataset
from streamlearn.lab.evaluate import Evaluation, EvaluationPlan, evaluate
from streamlearn.lab.files import open_dataset
from streamlearn.lab.records import put, without
from streamlearn.lab.simulate import run_simulation
from streamlearn.lab.stream import Counts
from streamlearn.records import UNLABELLED, Label, Record, Sample, TopicPartition
from streamlearn.schema.paths import Path as FieldPath

ROOT = Path(__file__).parent.parent.parent
COLUMNS = {"amount": "number", "shop": {"kind": "category", "buckets": 64}, "known": "boolean"}
MAPPED = {
    "source.samples.id": "tid",
    "source.labels.id": "tid",
    "source.labels.label": "is_fraud",
    "source.labels.values": {"true": "fraud", "false": "ok"},
}
SUFFIXES = (".csv", ".jsonl", ".parquet")


def config_in(folder: Path, **overrides: Any) -> Config:
    settings = {
        "state.dir": str(folder / "state"),
        "columns": COLUMNS,
        "schema.classes": ["ok", "fraud"],
        "model.options": {"hidden": [16]},
        "learn.threads": 1,
        "batch.fresh": 20,
        "batch.steps": 1,
        **MAPPED,
    }
    return load_config(environ={}, overrides=settings | overrides)


def records(count: int) -> list[dict[str, Any]]:
    """Amounts and shops tell the class most of the time. Some values are missing, also of the class."""
    rng = np.random.default_rng(0)
    found = []
    for n in range(count):
        fraud = bool(rng.random() < 0.3)
        found.append(
            {
                "tid": f"t{n}",
                "amount": None if n % 9 == 8 else float(np.float32(rng.normal() + 3 * fraud)),
                "shop": f"s{rng.integers(3) + 3 * (fraud and rng.random() < 0.5)}",
                "known": n % 2 == 0,
                "is_fraud": None if n % 20 == 19 else fraud,
                "other": n,
            }
        )
    return found


def write(path: Path, found: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(found), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return str(path)


def opened(config: Config, path: str, **options: Any) -> Dataset:
    return open_dataset(config, path, threading.Event(), **options)


def simulated(config: Config, path: str, **changes: Any) -> Counts:
    plan: dict[str, Any] = {
        "rate": None,
        "label_delay": "3",
        "drift": "none",
        "limit": None,
        "order": "file",
        "seed": 0,
    }
    return run_simulation(config, path, threading.Event(), **plan | changes)


def sent(config: Config) -> tuple[list[tuple[Record, Sample]], list[tuple[Record, Label]]]:
    """The records in the log, with what a learner decodes."""
    codec = make_codec(config)
    with contextlib.closing(open_log(config)) as log:
        samples = log.read(TopicPartition("samples", 0), 0, 10_000)
        labels = log.read(TopicPartition("labels", 0), 0, 10_000)
    return [(r, codec.decode_sample(r)) for r in samples], [(r, codec.labels.decode(r)) for r in labels]


class TestOpen:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_rows_are_those_of_the_log(self, tmp_path: Path, suffix: str) -> None:
        """Bit by bit, whatever the format; a record without a class has no label."""
        config, given, reported = config_in(tmp_path), records(50), []

        dataset = opened(config, write(tmp_path / f"a{suffix}", given), report=reported.append)

        rows = make_codec(config).rows
        assert rows is not None
        assert np.array_equal(dataset.x, np.stack([rows.encode(record) for record in given]))
        classes = [UNLABELLED if record["is_fraud"] is None else int(record["is_fraud"]) for record in given]
        assert dataset.y.tolist() == classes
        assert dataset.classes == ("ok", "fraud")
        assert reported == ["2 records have no class: they get no label", "missing values: amount 5"]

    def test_bad_records_are_reported_and_left_out(self, tmp_path: Path) -> None:
        """Those without an id where one is mapped, and those of an unknown class, too."""
        path, reported = tmp_path / "a.jsonl", []
        good = '{"tid": 1, "amount": 1, "is_fraud": true}\n'
        path.write_text(
            good + '{\n{"amount": 1, "is_fraud": true}\n{"tid": 2, "amount": 1, "is_fraud": "frod"}\n' + good
        )

        dataset = opened(config_in(tmp_path), str(path), report=reported.append)

        assert len(dataset.y) == 2
        assert [line.split(": ")[:2] for line in reported[:3]] == [
            ["line 2", "not_json"],
            ["line 3", "no_id"],
            ["line 4", "unknown_class"],
        ]
        assert reported[3] == f"{path}: 3 could not be read: 1 not_json, 1 no_id, 1 unknown_class"

    def test_limit_reads_no_more(self, tmp_path: Path) -> None:
        """Of a large file the beginning is enough."""
        path = write(tmp_path / "a.csv", records(50))

        assert len(opened(config_in(tmp_path), path, limit=7).y) == 7

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_without_columns_the_tensor_is_in_x(self, tmp_path: Path, suffix: str) -> None:
        """With its class in `label`."""
        settings = {"columns": {}, "source": {}, "schema.shape": [2, 2], "schema.dtype": "uint8", "model.options": {}}
        config = load_config(environ={}, overrides={"schema.classes": ["ok", "fraud"], **settings})
        given = [{"id": f"i{n}", "x": [[n, 1], [2, 3]], "label": ("ok", "fraud")[n % 2]} for n in range(6)]

        dataset = opened(config, write(tmp_path / f"a{suffix}", given))

        assert dataset.x.tolist() == [record["x"] for record in given]
        assert dataset.y.tolist() == [0, 1, 0, 1, 0, 1]

    @pytest.mark.parametrize(
        ("changes", "options", "message"),
        [
            ({"columns": COLUMNS | {"is_fraud": "boolean"}}, {}, "columns.is_fraud is at is_fraud, which is the class"),
            ({}, {"label": "nothing"}, "no record has a class at nothing.*the first record has tid, amount, shop"),
            ({}, {"label": "key"}, "which records of a file do not have"),
            ({}, {"label": "a..b"}, "--label a..b"),
            ({"columns": {}, "model.options": {}}, {}, r"set \[columns\] in the config"),
            ({"schema.classes": ["fraud", "no"], "source.labels.values": {"true": "fraud"}}, {}, "none of 10 records"),
        ],
    )
    def test_what_cannot_be_used_is_a_sentence(
        self, tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
    ) -> None:
        """Nothing is learned or sent."""
        given = [record | {"is_fraud": False} for record in records(10)]

        with pytest.raises(ConfigError, match=message):
            opened(config_in(tmp_path, **changes), write(tmp_path / "a.csv", given), **options)

    def test_a_label_option_is_for_records_only(self) -> None:
        """Data sets by name have their classes."""
        with pytest.raises(ConfigError, match="only files of records have fields"):
            opened(load_config(environ={}), "digits", label="y")

    def test_a_stop_ends_the_reading(self, tmp_path: Path) -> None:
        """The file may be large."""
        stopping = threading.Event()
        stopping.set()

        with pytest.raises(StreamlearnError, match="stopped while it was read"):
            open_dataset(config_in(tmp_path), write(tmp_path / "a.jsonl", records(1001)), stopping)


class TestSimulate:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_the_records_are_unchanged_but_for_their_class(self, tmp_path: Path, suffix: str) -> None:
        """They decode to their ids, rows and classes; the labels have the form of [source.labels]."""
        config, given = config_in(tmp_path), records(60)

        counts = simulated(config, write(tmp_path / f"a{suffix}", given))
        samples, labels = sent(config)

        rows = make_codec(config).rows
        assert rows is not None
        assert counts == Counts(60, 57, 0)
        assert [sample.sample_id for _, sample in samples] == [record["tid"] for record in given]
        assert all(np.array_equal(s.x, rows.encode(g)) for (_, s), g in zip(samples, given, strict=True))
        truths = {record["tid"]: record["is_fraud"] for record in given}
        assert {sample.sample_id: sample.true_label for _, sample in samples} == truths
        assert {sample.label for _, sample in samples} == {None}
        assert {label.sample_id: label.class_index for _, label in labels} == {
            name: int(fraud) for name, fraud in truths.items() if fraud is not None
        }
        for (record, _), fields in zip(samples, given, strict=True):
            expected = {name: value for name, value in fields.items() if name != "is_fraud"}
            if suffix == ".csv":
                expected = {name: None if value is None else str(value) for name, value in expected.items()}
            assert json.loads(record.value or b"") == expected
            assert "streamlearn-id" not in dict(record.headers), "the learner reads the id as it is mapped"
        for record, label in labels:
            fields = json.loads(record.value or b"")
            assert fields.keys() == {"tid", "is_fraud"}
            assert fields["tid"] == label.sample_id

    @pytest.mark.parametrize(
        "source",
        [
            {},
            {"source.samples.id": "key", "source.labels.id": "key", "source.labels.label": "is_fraud"},
            {"source.samples.id": "header:name", "source.labels.id": "after.tid", "source.labels.label": "after.fraud"},
            {"source.labels.id": "tid", "source.labels.label": "header:class"},
            {"source.samples.format": "json_schema", "source.labels.format": "json_schema"},
            {
                "source.samples.format": "avro",
                "source.labels.format": "avro",
                "source.labels.id": "tid",
                "source.labels.label": "is_fraud",
                "source.registry.url": "http://127.0.0.1:1",
            },
        ],
    )
    def test_a_record_without_an_id_is_numbered(self, tmp_path: Path, source: dict[str, Any]) -> None:
        """Wherever the config has ids and classes, samples and labels agree."""
        config = config_in(tmp_path, **{name: None for name in MAPPED if "values" not in name} | source)
        path = write(tmp_path / "mine.jsonl", records(30))

        simulated(config, path, label="is_fraud", passes=2, id_prefix="mine-")
        samples, labels = sent(config)

        assert [sample.sample_id for _, sample in samples] == [f"mine-{n}" for n in range(60)]
        truths = {sample.sample_id: sample.true_label for _, sample in samples}
        assert len(labels) == 58
        assert all(truths[label.sample_id] == label.class_index for _, label in labels)

    def test_permuted_classes_are_in_the_labels(self, tmp_path: Path) -> None:
        """By a value of the file that names the other class."""
        config = config_in(tmp_path)

        simulated(config, write(tmp_path / "a.jsonl", records(30)), drift="permute-labels")
        samples, labels = sent(config)

        truths = {record["tid"]: record["is_fraud"] for record in records(30)}
        assert {label.sample_id: label.class_index for _, label in labels} == {
            name: 1 - int(fraud) for name, fraud in truths.items() if fraud is not None
        }
        assert {json.loads(record.value or b"")["is_fraud"] for record, _ in labels} == {True, False}
        assert samples[19][1].true_label is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"drift": "noise:0.1"}, "wanted permute-labels or prior"),
            ({"drift": "rotate:90"}, "wanted permute-labels or prior"),
            ({"drift": "prior:5"}, "its records have ids"),
            ({"passes": 2}, "its records have ids"),
        ],
    )
    def test_what_makes_no_sense_for_records_is_refused(
        self, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        """Before a log is created."""
        config = config_in(tmp_path)

        with pytest.raises(ConfigError, match=message):
            simulated(config, write(tmp_path / "a.csv", records(30)), **changes)

        assert not config.state.dir.exists()


class TestEvaluate:
    def run(self, config: Config, path: str, **changes: Any) -> Evaluation:
        plan = {"dataset": path, "label_probability": 0.5, "delay": "20", "window": 200, "order": "file"}
        return evaluate(config, EvaluationPlan(**{**plan, **changes}), threading.Event())

    def test_it_learns_from_a_csv(self, tmp_path: Path) -> None:
        """More than the majority class; mapped ids and values of classes are as in the config."""
        found = self.run(config_in(tmp_path), write(tmp_path / "a.csv", records(1000)))

        assert found.samples == 1000
        assert 400 < found.labels < 500
        assert found.scores.oracle is not None
        accuracy = found.scores.oracle.windowed.accuracy
        assert (accuracy["teacher"] or 0) > (accuracy["majority"] or 1) + 0.1
        assert found.scores.oracle.cumulative.count == 950, "the others have no class"
        assert found.as_json()["settings"]["columns"]["shop"]["buckets"] == 64

    def test_all_formats_give_the_same_numbers(self, tmp_path: Path) -> None:
        """The rows are equal bit by bit, also with several passes and an unequal prior."""
        found = [
            self.run(config_in(tmp_path), write(tmp_path / f"a{suffix}", records(100)), passes=2, drift="prior:3")
            for suffix in SUFFIXES
        ]

        results = [{**one.as_json(), "protocol": None} for one in found]
        assert results[0] == results[1] == results[2]

    def test_noise_is_refused(self, tmp_path: Path) -> None:
        """It would change codes and flags."""
        with pytest.raises(ConfigError, match="wanted permute-labels or prior"):
            self.run(config_in(tmp_path), write(tmp_path / "a.csv", records(30)), drift="noise:1")


def test_the_config_of_the_docs_works_with_the_file_that_they_describe(tmp_path: Path) -> None:
    """As it is in docs/files.md."""
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "files.md").read_text(), re.DOTALL)
    (tmp_path / "streamlearn.toml").write_text(text)
    (tmp_path / "history.csv").write_text(
        "transaction_id,amount,merchant,created_at,is_fraud\nt1,12.5,m7,1772733600000,True\nt2,,m8,,False\n"
    )

    dataset = opened(load_config(tmp_path / "streamlearn.toml", environ={}), str(tmp_path / "history.csv"))

    assert dataset.y.tolist() == [1, 0]
    assert (dataset.x != 0).sum(axis=1).tolist() == [5, 1], "all columns of the first, the merchant of the second"


class TestPaths:
    def test_without_leaves_the_record_as_it_is(self) -> None:
        """Only what is at the path is left out, of a copy."""
        fields = {"after": {"a": 1, "b": 2}, "c": 3}

        assert without(fields, FieldPath.in_value("after.b")) == {"after": {"a": 1}, "c": 3}
        assert without(fields, FieldPath.in_value("after.d")) == fields
        assert without(fields, FieldPath.in_value("c.d")) == fields
        assert without(fields, FieldPath.in_value("d")) == fields
        assert fields == {"after": {"a": 1, "b": 2}, "c": 3}

    def test_put_makes_what_find_finds(self) -> None:
        """Next to what is there."""
        fields: dict[str, Any] = {}
        for text in ("after.id", "after.label", "op"):
            put(fields, FieldPath.in_value(text), text)

        assert fields == {"after": {"id": "after.id", "label": "after.label"}, "op": "op"}
