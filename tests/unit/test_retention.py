"""Retention takes the log past a checkpoint: what was lost is known exactly, and the verifier demands just that."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.retention import Trimmed, trim
from harness.soak import write_config
from harness.verify import verify

from streamlearn.app import learner as learning
from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.records import Position, TopicPartition
from streamlearn.state.checkpoint import load_newest
from streamlearn.state.paths import StatePaths

torch.set_num_threads(1)


def send(config: Config, numbers: range) -> None:
    """Samples, every other one with a label."""
    codec, rng = make_codec(config), np.random.default_rng(numbers.start)
    with closing(open_log(config)) as log:
        make_topics(log, config)
        for number in numbers:
            log.append("samples", [codec.encode_sample(f"s{number}", rng.normal(size=8).astype(np.float32))])
            if number % 2:
                log.append("labels", [codec.encode_label(f"s{number}", number % 4)])


def learned(config: Config) -> dict[TopicPartition, int]:
    found = load_newest(StatePaths(config.state.dir).checkpoints)
    assert found is not None
    return dict(found.next_offsets)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A learner that has read all of 40 samples."""
    config = load_config(write_config(tmp_path, "one"), environ={})
    send(config, range(40))
    learning.learn(config, threading.Event(), until_end=True)
    return config


def test_what_was_learned_is_not_lost(config: Config) -> None:
    """Nothing is taken where there is nothing new."""
    assert not trim(config, learned(config), Trimmed())

    with closing(open_log(config)) as log:
        assert set(log.beginning_offsets("samples").values()) == {0}


def test_what_is_lost_is_counted_and_nothing_else_is_missing(config: Config) -> None:
    """Records between the checkpoint and the log's new beginning."""
    trimmed, before = Trimmed(), learned(config)
    send(config, range(40, 60))

    assert trim(config, before, trimmed)

    assert len(trimmed.lost) == 20 + 10
    send(config, range(60, 80))
    learning.learn(config, threading.Event(), until_end=True)
    assert verify(config, [], trimmed).told == []


@pytest.mark.parametrize("topic", ["samples", "labels"])
def test_the_verifier_sees_one_more_or_less(config: Config, topic: str) -> None:
    """The learner's own count, and what it knows, against ours."""
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


def test_a_log_that_was_trimmed_unseen_cannot_be_verified(config: Config) -> None:
    """Nobody can say what was in it."""
    before = learned(config)
    send(config, range(40, 60))
    trim(config, before, Trimmed())
    learning.learn(config, threading.Event(), until_end=True)

    with pytest.raises(AssertionError, match="nobody can say"):
        verify(config, [])
