"""`run_simulation`: a data set into the log of the config."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from streamlearn.app.log import open_log
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError
from streamlearn.lab.simulate import run_simulation
from streamlearn.lab.stream import Counts
from streamlearn.records import TopicPartition


def config_in(folder: Path, **overrides: object) -> Config:
    settings = {"state.dir": str(folder / "state"), "schema.shape": [1, 8, 8], "schema.dtype": "uint8"}
    return load_config(environ={}, overrides={**settings, **overrides})


def run(config: Config, stopping: threading.Event | None = None, **changes: Any) -> Counts:
    plan: dict[str, Any] = {
        "rate": None,
        "label_delay": "10",
        "drift": "none",
        "limit": 40,
        "label_share": 0.5,
        "order": "shuffle",
        "passes": 2,
        "seed": 1,
    }
    return run_simulation(config, "digits", stopping or threading.Event(), **plan | changes)


def held(config: Config) -> list[int]:
    """Number of sample and label records in the log."""
    with contextlib.closing(open_log(config)) as log:
        return [sum(log.end_offsets(topic).values()) for topic in config.source.topics]


def test_all_passes_are_in_the_log_and_the_counts_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Topics are created; the output goes to stderr."""
    config = config_in(tmp_path, **{"source.samples.topic": "in", "log.partitions": 2})

    counts = run(config)
    shown = capsys.readouterr()

    assert counts.samples == 80
    assert 20 < counts.labels < 60
    assert held(config) == [80, counts.labels]
    assert f"80 samples, {counts.labels} labels sent; 0 labels were not due yet" in shown.err
    assert "digits to the embedded log" in shown.err
    assert shown.out == ""


def test_a_stop_counts_the_labels_that_were_not_due(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle of a stream with a rate; sent records stay in the log."""
    config, stopping = config_in(tmp_path), threading.Event()
    timer = threading.Timer(0.3, stopping.set)
    timer.start()

    counts = run(config, stopping, rate=100.0, limit=1000, label_delay="900", label_share=1.0)
    timer.join()

    assert 0 < counts.samples < 200
    assert (counts.labels, counts.labels_pending) == (0, counts.samples)
    assert held(config) == [counts.samples, 0]
    assert f"{counts.samples} labels were not due yet" in capsys.readouterr().err


def test_a_stop_before_the_start_sends_nothing(tmp_path: Path) -> None:
    """Not the first batch either."""
    stopping = threading.Event()
    stopping.set()

    assert run(config_in(tmp_path), stopping) == Counts(0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_delay": "soon"}, "soon"),
        ({"drift": "rotate:x"}, "rotate:x"),
        ({"order": "random"}, "order: wanted"),
    ],
)
def test_an_invalid_plan_is_refused_before_a_log_is_created(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """The message contains the invalid value."""
    with pytest.raises(ConfigError, match=message):
        run(config_in(tmp_path), **changes)

    assert list(tmp_path.iterdir()) == []


def test_a_data_set_that_does_not_fit_the_schema_is_refused(tmp_path: Path) -> None:
    """Its records would become dead letters."""
    with pytest.raises(ConfigError, match="shape"):
        run(config_in(tmp_path, **{"schema.shape": [3, 5]}))

    assert list(tmp_path.iterdir()) == []


def test_other_rows_get_other_ids(tmp_path: Path) -> None:
    """Ids number the samples, so seed, order and drift are part of the prefix."""
    plans: list[dict[str, Any]] = [{}, {"seed": 7}, {"seed": 8}, {"drift": "prior:5@9"}, {"order": "file"}]
    plans += [{"order": "file", "drift": "prior:5@9"}, {"id_prefix": "mine-"}]
    config = config_in(tmp_path)

    for plan in plans:
        run(config, limit=2, passes=1, **{"seed": 0} | plan)

    with contextlib.closing(open_log(config)) as log:
        ids = [str(record.key and record.key.decode()) for record in log.read(TopicPartition("samples", 0), 0, 100)]
    assert len(set(ids)) == len(ids) == 14
    assert [*ids[:4], *ids[-2:]] == ["digits-0", "digits-1", "digits-seed7-0", "digits-seed7-1", "mine-0", "mine-1"]


def test_a_log_that_holds_records_gives_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples with the same ids are duplicates."""
    config = config_in(tmp_path)

    run(config)
    first = capsys.readouterr().err
    run(config)

    assert "already" not in first
    assert "samples holds 80 records already" in " ".join(capsys.readouterr().err.split())
