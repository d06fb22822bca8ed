"""`predict_file`: the answers are those of the teacher, bad records cost only themselves, and no output is partial."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from streamlearn.app import predict
from streamlearn.app.answers import WRITERS
from streamlearn.app.build import model_spec
from streamlearn.app.log import make_codec
from streamlearn.app.predict import CHUNK_ROWS, Outcome, predict_file
from streamlearn.app.versions import pin_version
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError, NotPublishedError, StreamlearnError
from streamlearn.models.build import build
from streamlearn.schema.files import MAX_REPORTED
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import Publisher

CLASSES = ("legitimate", "fraud")


def config_in(folder: Path, **overrides: Any) -> Config:
    """Records with two columns and a mapped id, and teachers of steps 10 and 20."""
    settings = {
        "state.dir": str(folder / "state"),
        "schema.classes": list(CLASSES),
        "columns": {"amount": "number", "shop": {"kind": "category", "buckets": 50}},
        "source.samples.id": "transaction",
        "model.options": {"hidden": [8]},
    }
    config = load_config(environ={}, overrides={**settings, **overrides})
    publisher = Publisher(StatePaths(config.state.dir).published)
    for step in (10, 20):
        publisher.publish(step, arrays_of(config, step), {"model_spec": model_spec(config).to_json()})
    return config


def arrays_of(config: Config, step: int) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in build(model_spec(config), seed=step).state_dict().items()}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_in(tmp_path)


def expected(config: Config, step: int, records: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """Probabilities computed without `predict`."""
    rows = make_codec(config).rows
    assert rows is not None
    network = build(model_spec(config), seed=step).eval()
    with torch.inference_mode():
        x = torch.from_numpy(np.stack([rows.encode(record) for record in records]))
        found: np.ndarray[Any, Any] = network(x).softmax(dim=1).numpy()
    return found


def records(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"transaction": f"t{n}", "amount": None if n % 7 == 0 else float(rng.normal()), "shop": f"s{n % 5}"}
        for n in range(count)
    ]


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    """The records as a file of this suffix."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(found), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return path


def run(config: Config, source: Path | str, out: Path | None = None, **options: Any) -> tuple[Outcome, list[str]]:
    """The outcome, and what was reported."""
    reported: list[str] = []
    return predict_file(config, str(source), out=out, report=reported.append, **options), reported


def answers(path: Path) -> list[dict[str, Any]]:
    """The answers in a file of any format, in one form."""
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()  # type: ignore[no-any-return]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return [
                {
                    "line": int(row["line"]),
                    "id": row["id"] or None,
                    "class": row["class"],
                    "probabilities": [float(row[f"probability_{name}"]) for name in CLASSES],
                    "model_version": int(row["model_version"]),
                }
                for row in csv.DictReader(file)
            ]
    return [{"id": None, **json.loads(line)} for line in path.read_text().splitlines()]


class TestAnswers:
    @pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
    @pytest.mark.parametrize("out", WRITERS)
    def test_are_those_of_the_teacher(self, config: Config, tmp_path: Path, suffix: str, out: str) -> None:
        """From each format to each format, over several chunks."""
        given = records(2 * CHUNK_ROWS + 3)
        source = write(tmp_path / f"new{suffix}", given)

        outcome, _ = run(config, source, tmp_path / f"answers{out}")

        found, probs_BC = answers(tmp_path / f"answers{out}"), expected(config, 20, given)
        assert outcome.answered == len(found) == len(given)
        assert [row["id"] for row in found] == [record["transaction"] for record in given]
        first = 2 if suffix == ".csv" else 1
        assert [row["line"] for row in found] == list(range(first, first + len(given)))
        assert np.abs(np.array([row["probabilities"] for row in found]) - probs_BC).max() < 1e-6
        assert [row["class"] for row in found] == [CLASSES[winner] for winner in probs_BC.argmax(axis=1)]
        assert {row["model_version"] for row in found} == {20}

    @pytest.mark.parametrize("out", WRITERS)
    def test_have_the_class_that_thresholds_choose(self, tmp_path: Path, out: str) -> None:
        """As those of /predict."""
        config, target = config_in(tmp_path, **{"score.thresholds": {"legitimate": 1e-6}}), tmp_path / f"answers{out}"

        run(config, write(tmp_path / "new.jsonl", records(50)), target)

        assert {row["class"] for row in answers(target)} == {"legitimate"}
        assert any(row["probabilities"][1] > 0.5 for row in answers(target))

    def test_of_standard_input_go_to_standard_output(
        self, config: Config, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        """Both as JSON lines; a record without an id has its line only."""
        text = b'{"amount": 1}\n\n{"amount": 2, "transaction": 7}\n'
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))

        run(config, "-")

        found = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
        assert [(row["line"], row.get("id")) for row in found] == [(1, None), (3, "7")]

    @pytest.mark.parametrize("name", ["x.npz", "x.jsonl", "x.parquet"])
    def test_without_columns_the_tensor_is_in_x(self, tmp_path: Path, name: str) -> None:
        """Nested or flat; with the field id."""
        settings = {"columns": {}, "schema.shape": [2, 3], "schema.dtype": "uint8", "source": {}}
        config, x = config_in(tmp_path, **settings), np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
        if name == "x.npz":
            np.savez(tmp_path / name, x=x, id=np.array(["a", "b", "c", "d"]))
        else:
            write(tmp_path / name, [{"id": "abcd"[n], "x": row} for n, row in enumerate(x.tolist())])

        run(config, tmp_path / name, tmp_path / "answers.jsonl")

        found = answers(tmp_path / "answers.jsonl")
        with torch.inference_mode():
            probs_BC = build(model_spec(config), seed=20).eval()(torch.from_numpy(x)).softmax(dim=1).numpy()
        assert [row["id"] for row in found] == ["a", "b", "c", "d"]
        assert np.abs(np.array([row["probabilities"] for row in found]) - probs_BC).max() < 1e-6

    def test_are_of_the_pinned_version_or_of_the_one_that_is_named(self, config: Config, tmp_path: Path) -> None:
        """As servers answer, unless --version names another."""
        source = write(tmp_path / "new.jsonl", records(1))
        pin_version(config, 10)

        assert run(config, source, tmp_path / "a.jsonl")[0].model_version == 10
        assert run(config, source, tmp_path / "a.jsonl", version=20)[0].model_version == 20
        with pytest.raises(ConfigError, match="version 30 does not exist; existing versions: 10, 20"):
            run(config, source, version=30)

    def test_without_a_teacher_there_are_none(self, tmp_path: Path) -> None:
        """The message has the folder."""
        with pytest.raises(NotPublishedError, match=r"published: no teacher is published yet"):
            run(load_config(environ={}, overrides={"state.dir": str(tmp_path)}), "new.csv")


class TestBadRecords:
    def test_are_reported_with_line_and_reason_and_the_others_answered(self, config: Config, tmp_path: Path) -> None:
        """Values that a column cannot take are missing, and counted."""
        source = tmp_path / "new.csv"
        source.write_text("transaction,amount,shop\nt1,1,a\nt2,1\nt3,n/a,\n")

        outcome, reported = run(config, source, tmp_path / "answers.jsonl")

        assert [row["id"] for row in answers(tmp_path / "answers.jsonl")] == ["t1", "t3"]
        assert (outcome.answered, outcome.bad) == (2, {"bad_shape": 1})
        assert reported == [
            "line 3: bad_shape: expected 3 fields, as in the first line, got 2",
            "2 records answered by version 20; 1 could not be read: 1 bad_shape",
            "invalid values, taken as missing: amount 1",
            "missing values: shop 1",
        ]

    def test_only_the_first_are_reported_one_by_one(self, config: Config, tmp_path: Path) -> None:
        """All are counted."""
        source = tmp_path / "new.jsonl"
        source.write_text('{"amount": 1}\n' + "{\n" * (MAX_REPORTED + 30))

        outcome, reported = run(config, source, tmp_path / "answers.jsonl")

        assert outcome.bad == {"not_json": MAX_REPORTED + 30}
        assert sum(line.startswith("line ") for line in reported) == MAX_REPORTED

    def test_that_the_model_cannot_answer_are_among_them(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A probability that is not finite is no answer."""
        real = predict.load

        def load(*arguments: Any, **options: Any) -> Any:
            model = real(*arguments, **options)

            def probabilities(x: Any) -> Any:
                probs_BC = model.probabilities(x).copy()
                probs_BC[1] = np.nan
                return probs_BC

            return SimpleNamespace(step=model.step, classes=model.classes, probabilities=probabilities)

        monkeypatch.setattr(predict, "load", load)
        outcome, reported = run(config, write(tmp_path / "new.jsonl", records(3)), tmp_path / "answers.jsonl")

        assert [row["line"] for row in answers(tmp_path / "answers.jsonl")] == [1, 3]
        assert outcome.bad == {"not_finite": 1}
        assert reported[0].startswith("line 2: not_finite")

    @pytest.mark.parametrize("out", WRITERS)
    @pytest.mark.parametrize(
        ("text", "message"),
        [("{\n[]\n", "none of 2 records could be read; line 1: not_json"), ("\n", "it holds no records")],
    )
    def test_if_there_are_no_others_it_is_an_error(
        self, config: Config, tmp_path: Path, text: str, message: str, out: str
    ) -> None:
        """Exit code 1; nothing is written."""
        (tmp_path / "new.jsonl").write_text(text)

        with pytest.raises(StreamlearnError, match=message) as raised:
            run(config, tmp_path / "new.jsonl", tmp_path / f"answers{out}")

        assert raised.value.exit_code == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["new.jsonl", "state"]


class TestOutput:
    @pytest.mark.parametrize("out", WRITERS)
    @pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError, MemoryError])
    def test_an_interrupted_run_leaves_the_old_file(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], out: str
    ) -> None:
        """And no temporary one."""
        (tmp_path / f"answers{out}").write_text("old")
        given = list(predict.read_records(write(tmp_path / "new.jsonl", records(CHUNK_ROWS + 1)), max_bytes=10_000))

        def broken(*_: object, **__: object) -> Iterator[Any]:
            yield from given
            raise error

        monkeypatch.setattr(predict, "read_records", broken)
        with pytest.raises(error):
            run(config, "new.jsonl", tmp_path / f"answers{out}")

        assert (tmp_path / f"answers{out}").read_text() == "old"
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"answers{out}", "new.jsonl", "state"]

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            ("answers.txt", r"ends in \.jsonl"),
            ("nowhere/answers.csv", "No such file"),
            ("new.jsonl", "is the file that is read"),
        ],
    )
    def test_a_name_that_cannot_be_used_is_a_sentence(
        self, config: Config, tmp_path: Path, out: str, message: str
    ) -> None:
        """With the option."""
        write(tmp_path / "new.jsonl", records(1))

        with pytest.raises(ConfigError, match=f"--out .*{message}"):
            run(config, tmp_path / "new.jsonl", tmp_path / out)

    def test_progress_counts_the_records(self, config: Config, tmp_path: Path) -> None:
        """After each chunk."""
        seen: list[int] = []
        source = write(tmp_path / "new.jsonl", records(CHUNK_ROWS + 5))

        run(config, source, tmp_path / "answers.csv", progress=seen.append)

        assert seen == [CHUNK_ROWS, CHUNK_ROWS + 5]
