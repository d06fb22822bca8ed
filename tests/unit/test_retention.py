"""Retention trims the log past a checkpoint: the lost records are known exactly, and the audit demands just those."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from harness.retention import Trimmed, trim
from harness.site import write_config
from harness.verify import verify

from streamlearn.app import learner as learning
from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.records import Position, TopicPartition
from streamlearn.state.checkpoint import load_newest
from streamlearn.state.paths import StatePaths


def send(config: Config, numbers: range) -> None:
    """Samples, every other one with a label."""
    codec, rng = make_codec(config), np.random.default_rng(numbers.start)
    with closing(open_log(config)) as log:
        make_topics(log, config)
        for number in numbers:
            log.append("samples", [codec.encode_sample(f"s{number}", rng.normal(size=8).astype(np.float32))])
            if number % 2:
                log.append("labels", [codec.labels.encode(f"s{number}", number % 4)])


def learned(config: Config) -> dict[TopicPartition, int]:
    found = load_newest(StatePaths(config.state.dir).checkpoints)
    assert found is not None
    return dict(found.next_offsets)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The config of a learner that has read all 40 samples."""
    config = load_config(write_config(tmp_path, "one"), environ={})
    send(config, range(40))
    learning.learn(config, threading.Event(), until_end=True)
    return config


def test_without_new_records_nothing_is_trimmed(config: Config) -> None:
    """All records are learned already."""
    assert not trim(config, learned(config), Trimmed())

    with closing(open_log(config)) as log:
        assert set(log.beginning_offsets("samples").values()) == {0}


def test_lost_records_are_counted_as_trimmed_and_no_others_are_missing(config: Config) -> None:
    """They lie between the checkpoint and the new beginning of the log."""
    trimmed, before = Trimmed(), learned(config)
    send(config, range(40, 60))

    assert trim(config, before, trimmed)

    assert len(trimmed.lost) == 20 + 10
    send(config, range(60, 80))
    learning.learn(config, threading.Event(), until_end=True)
    assert verify(config, [], trimmed).problems == []


@pytest.mark.parametrize("topic", ["samples", "labels"])
def test_the_audit_finds_one_lost_record_more_or_less(config: Config, topic: str) -> None:
    """The learner's count and labels must match the trimmed records exactly."""
    trimmed, before = Trimmed(), learned(config)
    send(config, range(40, 60))
    trim(config, before, trimmed)
    learning.learn(config, threading.Event(), until_end=True)
    of_topic = sorted(position for position in trimmed.lost if position.topic == topic)

    trimmed.lost.remove(of_topic[0])
    assert not verify(config, [], trimmed).good
    trimmed.lost.add(of_topic[0])
    trimmed.lost.add(Position(topic, of_topic[0].partition, 0))
    assert not verify(config, [], trimmed).good


def test_a_log_trimmed_without_a_copy_cannot_be_audited(config: Config) -> None:
    """The trimmed records are unknown."""
    before = learned(config)
    send(config, range(40, 60))
    trim(config, before, Trimmed())
    learning.learn(config, threading.Event(), until_end=True)

    with pytest.raises(AssertionError, match="records are unknown"):
        verify(config, [])
