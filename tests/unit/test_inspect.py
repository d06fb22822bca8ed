"""`streamlearn inspect`: state folder and log."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from streamlearn.app import inspect as inspecting
from streamlearn.app.learner import learn
from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError, OffsetOutOfRangeError
from streamlearn.records import NewRecord, Position, Record
from streamlearn.state.checkpoint import path_of, steps_in
from streamlearn.state.paths import StatePaths


def config_in(folder: Path, **overrides: object) -> Config:
    settings = {
        "state.dir": str(folder / "state"),
        "schema.shape": [4],
        "schema.classes": 3,
        "model.options": {"hidden": [8]},
        "batch.fresh": 4,
        "labels.unknown_class": "refuse",
        "learn.threads": 1,
        "metrics.port": 0,
    }
    return load_config(environ={}, overrides={**settings, **overrides})


def fill(config: Config) -> None:
    """Nine samples, two labels, and two records that cannot be read."""
    log, codec = open_log(config), make_codec(config)
    make_topics(log, config)
    log.append("samples", [codec.encode_sample(f"s{n}", np.zeros(4, np.float32)) for n in range(9)])
    log.append("samples", [NewRecord(b"bad\xff", b"\x00" * 500, (("content-type", b"text/html"),))])
    log.append("labels", [codec.labels.encode("s1", 2), codec.labels.encode("s2", 0), NewRecord(b"s3", b"wolf")])
    log.close()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A learned log, for reading only."""
    config = config_in(tmp_path_factory.mktemp("learned"))
    fill(config)
    learn(config, threading.Event(), until_end=True)
    return config


class TestState:
    def test_has_heartbeat_checkpoints_and_the_published_teacher(self, learned: Config) -> None:
        """As JSON values."""
        found = json.loads(json.dumps(inspecting.state(learned)))
        newest = found["checkpoints"][-1]

        assert found["state_dir"] == str(learned.state.dir)
        assert (found["learner"]["state"], found["learner"]["step"]) == ("stopped", newest["step"])
        assert found["published"]["step"] == newest["step"]
        assert newest["next_offsets"] == {"labels[0]": 3, "samples[0]": 10}
        assert newest["accounts"]["samples_dead_lettered"] == 1
        assert newest["size_bytes"] == path_of(StatePaths(learned.state.dir).checkpoints, newest["step"]).stat().st_size

    def test_an_empty_folder_stays_empty(self, tmp_path: Path) -> None:
        """Inspecting creates nothing."""
        found = inspecting.state(config_in(tmp_path))

        assert (found["learner"], found["published"], found["checkpoints"]) == (None, None, [])
        assert list(tmp_path.iterdir()) == []

    def test_a_corrupt_checkpoint_is_listed_with_its_error(self, tmp_path: Path) -> None:
        """Next to the others. The file is left in place."""
        config = config_in(tmp_path)
        fill(config)
        learn(config, threading.Event(), until_end=True)
        checkpoints = StatePaths(config.state.dir).checkpoints
        newest = path_of(checkpoints, steps_in(checkpoints)[-1])
        newest.write_bytes(newest.read_bytes()[:-1])

        first, *_, last = inspecting.state(config)["checkpoints"]

        assert first["step"] == 0
        assert "error" not in first
        assert "torn or corrupt" in last["error"]
        assert newest.exists()


class TestRecords:
    def test_the_last_ones_are_shown_without_an_offset(self, learned: Config) -> None:
        """In order, up to the requested count."""

        def offsets(count: int) -> list[int]:
            found = inspecting.records(learned, "samples", partition=0, offset=None, count=count)
            return [record.position.offset for record in found]

        assert offsets(3) == [7, 8, 9]
        assert offsets(100) == list(range(10))

    def test_an_offset_is_where_to_start(self, learned: Config) -> None:
        """Nothing at the end; an error beyond it."""

        def offsets(offset: int) -> list[int]:
            found = inspecting.records(learned, "samples", partition=0, offset=offset, count=2)
            return [record.position.offset for record in found]

        assert offsets(4) == [4, 5]
        assert offsets(10) == []
        with pytest.raises(OffsetOutOfRangeError):
            offsets(11)

    @pytest.mark.parametrize(("topic", "partition"), [("nonsense", 0), ("samples", 1)])
    def test_an_unknown_topic_or_partition_is_an_error(self, learned: Config, topic: str, partition: int) -> None:
        """The message lists the topics."""
        with pytest.raises(
            ConfigError, match=rf"no {topic}\[{partition}\] in the log; topics are samples, labels, dead"
        ):
            list(inspecting.records(learned, topic, partition=partition, offset=None, count=1))

    def test_a_missing_log_is_an_error(self, tmp_path: Path) -> None:
        """None is created."""
        with pytest.raises(ConfigError, match="there is no log yet"):
            list(inspecting.records(config_in(tmp_path), "samples", partition=0, offset=None, count=1))

        assert list(tmp_path.iterdir()) == []


class TestDescribed:
    def test_a_label_is_shown_unchanged(self, learned: Config) -> None:
        """Position, time, key, value and headers, as plain values."""
        (record,) = inspecting.records(learned, "labels", partition=0, offset=2, count=1)

        shown = json.loads(json.dumps(inspecting.described(learned, record)))

        assert (shown["position"], shown["key"], shown["value"]) == ("labels[0]@2", "s3", "wolf")
        assert shown["value_bytes"] == 4
        assert shown["timestamp_ms"] > 0
        assert "reason" not in shown

    def test_a_dead_letter_is_shown_with_reason_and_origin(self, learned: Config) -> None:
        """Bytes that are not text are in base64; long ones are cut, with their size."""
        letters = [
            inspecting.described(learned, record)
            for record in inspecting.records(learned, "dead-letters", partition=0, offset=None, count=10)
        ]
        (bad,) = [letter for letter in letters if letter["was"] == "samples[0]@9"]

        assert {letter["reason"] for letter in letters} == {"bad_content_type", "unknown_class"}
        assert "text/html" in bad["message"]
        assert (bad["key"], bad["value_bytes"]) == ({"base64": "YmFk/w=="}, 500)
        assert (len(bad["value"]), bad["value_shown_bytes"]) == (200, 200)
        assert bad["headers"]["content-type"] == "text/html"

    @pytest.mark.parametrize(
        ("value", "whole", "shown"),
        [
            ("ä".encode() * 150, False, "ä" * 100),
            (b"x" + "ä".encode() * 150, False, "x" + "ä" * 99),
            ("ä".encode() * 150, True, "ä" * 150),
            (b"\xff" * 3, False, {"base64": "////"}),
            (b"\xff" * 300, True, {"base64": "////" * 100}),
        ],
    )
    def test_bytes_can_be_recovered(self, tmp_path: Path, value: bytes, whole: bool, shown: object) -> None:
        """Text as text, cut between characters; anything else in base64."""
        record = Record(Position("samples", 0, 1), 5, b"k", value)

        assert inspecting.described(config_in(tmp_path), record, whole=whole)["value"] == shown

    def test_a_foreign_record_among_dead_letters_is_shown_unchanged(self, tmp_path: Path) -> None:
        """Any client may write to the topic; a tombstone has no value."""
        config = config_in(tmp_path)
        log = open_log(config)
        make_topics(log, config)
        log.append("dead-letters", [NewRecord(b"k", None)])
        log.close()
        (record,) = inspecting.records(config, "dead-letters", partition=0, offset=None, count=1)

        shown = inspecting.described(config, record)

        assert (shown["key"], shown["value"], shown["value_bytes"]) == ("k", None, None)
        assert "reason" not in shown
