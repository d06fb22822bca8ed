"""The verifier: it is content with what was learned right, and sees each way in which it could be wrong."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.soak import write_config
from harness.verify import differences, verify

from streamlearn.app import learner as learning
from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.records import NewRecord, TopicPartition
from streamlearn.state.checkpoint import Checkpoint, load_newest, save_checkpoint
from streamlearn.state.fence import Fence
from streamlearn.state.journal import Journal
from streamlearn.state.paths import StatePaths

torch.set_num_threads(1)


def config_in(folder: Path, name: str = "one") -> Config:
    return load_config(write_config(folder, name), environ={})


def append(config: Config, topic: str, record: NewRecord) -> str:
    """Append one record; its note."""
    with closing(open_log(config)) as log:
        (position,) = log.append(topic, [record])
    return f"{position.topic} {position.partition} {position.offset}"


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a learner made of samples, of labels that are early, twice and corrected, and of junk."""
    folder = tmp_path_factory.mktemp("learned")
    config, rng = config_in(folder), np.random.default_rng(0)
    codec, notes = make_codec(config), []
    with closing(open_log(config)) as log:
        make_topics(log, config)
    notes.append(append(config, "labels", codec.encode_label("s7", 1)) + " s7 1")
    for number in range(30):
        record = codec.encode_sample(f"s{number}", rng.normal(size=8).astype(np.float32))
        notes.append(append(config, "samples", record) + f" s{number} -1")
    for name, class_index in (("s1", 0), ("s1", 0), ("s2", 1), ("s2", 3), ("nobody", 2)):
        notes.append(append(config, "labels", codec.encode_label(name, class_index)) + f" {name} {class_index}")
    append(config, "samples", codec.encode_sample("s3", np.zeros(8, np.float32)))
    append(config, "samples", NewRecord(b"junk", b"{"))
    learning.learn(config, threading.Event(), until_end=True)
    (folder / "notes").write_text("\n".join(notes) + "\nlabels 0 torn")
    return folder


@pytest.fixture
def folder(learned: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    shutil.copytree(learned, tmp_path / "copy")
    return tmp_path / "copy"


def told(folder: Path) -> list[str]:
    return verify(config_in(folder), [folder / "notes"]).told


def test_is_content_with_what_is_right(folder: Path) -> None:
    """And has looked at every note that is whole."""
    verdict = verify(config_in(folder), [folder / "notes"])

    assert verdict.told == []
    assert verdict.good
    assert verdict.acknowledged == 36


@pytest.mark.parametrize("note", ["labels 0 999 s1 0", "labels 1 999 s1 0", "labels 0 0 s1 3", "labels 0 0 other 1"])
def test_sees_an_acknowledged_label_that_is_not_in_the_log(folder: Path, note: str) -> None:
    """At another position, of another class, of another sample."""
    (folder / "notes").write_text(note + "\n")

    assert verify(config_in(folder), [folder / "notes"]).labels_lost == 1


def test_sees_a_label_that_was_not_learned(folder: Path) -> None:
    """It is in the log, and no step has it."""
    config = config_in(folder)
    append(config, "labels", make_codec(config).encode_label("s9", 1))

    verdict = verify(config, [])

    assert verdict.labels_lost > 0
    assert any("s9" in line for line in verdict.told)


def test_sees_a_sample_that_was_not_learned(folder: Path) -> None:
    """The same."""
    config = config_in(folder)
    append(config, "samples", make_codec(config).encode_sample("new", np.zeros(8, np.float32)))

    assert verify(config, []).samples_lost > 0


def test_sees_junk_without_a_dead_letter(folder: Path) -> None:
    """It was passed by."""
    append(config_in(folder), "samples", NewRecord(b"more", b"{"))

    assert verify(config_in(folder), []).dead_letters_lost == 1


def test_sees_a_step_that_goes_back(folder: Path) -> None:
    """Its records were in a step before."""
    config = config_in(folder)
    journal = Journal(StatePaths(config.state.dir).journal, max_bytes=1 << 20, fence=Fence(epoch=9))
    last = newest(config).step
    journal.cut_after(last)
    journal.append(last + 1, {TopicPartition("samples", 0): 1})
    journal.close()

    assert verify(config, []).learned_twice > 0


@pytest.mark.parametrize(("name", "by"), [("samples_learned", 1), ("labels_read", 1), ("samples_read", 2)])
def test_sees_what_was_counted_twice(folder: Path, name: str, by: int) -> None:
    """More than the log holds."""

    def more(checkpoint: Checkpoint) -> Checkpoint:
        accounts = checkpoint.extra["accounts"]
        return replace(checkpoint, extra={**checkpoint.extra, "accounts": {**accounts, name: accounts[name] + by}})

    change(config_in(folder), more)

    assert verify(config_in(folder), []).learned_twice == by


def test_sees_what_the_ledger_counted_twice(folder: Path) -> None:
    """By what the learner last said of itself."""
    heartbeat = StatePaths(config_in(folder).state.dir).heartbeat
    status = json.loads(heartbeat.read_bytes())
    status["ledger"]["trained"] += 1
    heartbeat.write_text(json.dumps(status))

    assert verify(config_in(folder), []).learned_twice == 1


class TestDifferences:
    def test_two_learners_of_the_same_cuts_have_none(self, folder: Path) -> None:
        """The journal says the cuts."""
        config, other = config_in(folder), config_in(folder, "two")
        for name in ("log", "journal"):
            shutil.copytree(config.state.dir / name, other.state.dir / name)

        learning.learn(other, threading.Event(), until_end=True)

        assert differences(config, other) == []

    def test_one_bit_is_seen(self, folder: Path) -> None:
        """Of any array; even the sign of a zero."""
        config, other = config_in(folder), config_in(folder, "two")
        shutil.copytree(config.state.dir, other.state.dir)

        def negative_zero(checkpoint: Checkpoint) -> Checkpoint:
            return replace(checkpoint, arrays={**checkpoint.arrays, "x": np.array([-0.0])})

        change(config, lambda it: replace(it, arrays={**it.arrays, "x": np.array([0.0])}))
        change(other, negative_zero)

        assert differences(config, other) == ["x"]

    def test_another_count_is_seen(self, folder: Path) -> None:
        """By its name."""
        config, other = config_in(folder), config_in(folder, "two")
        shutil.copytree(config.state.dir, other.state.dir)
        change(other, lambda it: replace(it, extra={**it.extra, "stream_time_s": 0.0}))

        assert [line.partition(":")[0] for line in differences(config, other)] == ["extra"]


def newest(config: Config) -> Checkpoint:
    found = load_newest(StatePaths(config.state.dir).checkpoints)
    assert found is not None
    return found


def change(config: Config, how: Callable[[Checkpoint], Checkpoint]) -> None:
    """Save the newest checkpoint as another."""
    save_checkpoint(StatePaths(config.state.dir).checkpoints, how(newest(config)))
