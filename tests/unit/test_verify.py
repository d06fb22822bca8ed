"""The audit: no problem with a correct learner, and a problem for each way to be wrong."""

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
from harness.site import write_config
from harness.verify import differences, verify

from streamlearn.app import learner as learning
from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.records import NewRecord, TopicPartition
from streamlearn.state.checkpoint import Checkpoint, load_newest, save_checkpoint
from streamlearn.state.fence import Fence
from streamlearn.state.journal import Journal
from streamlearn.state.paths import StatePaths


def config_in(folder: Path, name: str = "one") -> Config:
    return load_config(write_config(folder, name), environ={})


def append(config: Config, topic: str, record: NewRecord) -> str:
    """Append one record; return its note."""
    with closing(open_log(config)) as log:
        (position,) = log.append(topic, [record])
    return f"{position.topic} {position.partition} {position.offset}"


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State of a learner after samples, early, repeated and corrected labels, and an undecodable record."""
    folder = tmp_path_factory.mktemp("learned")
    config, rng = config_in(folder), np.random.default_rng(0)
    codec, notes = make_codec(config), []
    with closing(open_log(config)) as log:
        make_topics(log, config)
    notes.append(append(config, "labels", codec.labels.encode("s7", 1)) + " s7 1")
    for number in range(30):
        record = codec.encode_sample(f"s{number}", rng.normal(size=8).astype(np.float32))
        notes.append(append(config, "samples", record) + f" s{number} -1")
    for name, class_index in (("s1", 0), ("s1", 0), ("s2", 1), ("s2", 3), ("nobody", 2)):
        notes.append(append(config, "labels", codec.labels.encode(name, class_index)) + f" {name} {class_index}")
    append(config, "samples", codec.encode_sample("s3", np.zeros(8, np.float32)))
    append(config, "samples", NewRecord(b"junk", b"{"))
    learning.learn(config, threading.Event(), until_end=True)
    (folder / "notes").write_text("\n".join(notes) + "\nlabels 0 torn")
    return folder


@pytest.fixture
def folder(learned: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(learned, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_correct_learner_has_no_problems(folder: Path) -> None:
    """Every whole note is checked."""
    audit = verify(config_in(folder), [folder / "notes"])

    assert audit.problems == []
    assert audit.good
    assert audit.acknowledged == 36


@pytest.mark.parametrize("note", ["labels 0 999 s1 0", "labels 1 999 s1 0", "labels 0 0 s1 3", "labels 0 0 other 1"])
def test_finds_an_acknowledged_label_that_is_not_in_the_log(folder: Path, note: str) -> None:
    """Another position, another class, another sample."""
    (folder / "notes").write_text(note + "\n")

    assert verify(config_in(folder), [folder / "notes"]).labels_lost == 1


def test_finds_a_label_that_was_not_learned(folder: Path) -> None:
    """It is in the log but in no step."""
    config = config_in(folder)
    append(config, "labels", make_codec(config).labels.encode("s9", 1))

    audit = verify(config, [])

    assert audit.labels_lost > 0
    assert any("s9" in line for line in audit.problems)


def test_finds_a_sample_that_was_not_learned(folder: Path) -> None:
    """It is in the log but in no step."""
    config = config_in(folder)
    append(config, "samples", make_codec(config).encode_sample("new", np.zeros(8, np.float32)))

    assert verify(config, []).samples_lost > 0


def test_finds_an_undecodable_record_without_a_dead_letter(folder: Path) -> None:
    """It was skipped silently."""
    append(config_in(folder), "samples", NewRecord(b"more", b"{"))

    assert verify(config_in(folder), []).dead_letters_lost == 1


def test_finds_a_step_whose_offsets_fall(folder: Path) -> None:
    """Its records were in an earlier step."""
    config = config_in(folder)
    journal = Journal(StatePaths(config.state.dir).journal, max_bytes=1 << 20, files=Fence(epoch=9))
    last = newest(config).step
    journal.cut_after(last)
    journal.append(last + 1, {TopicPartition("samples", 0): 1})
    journal.close()

    assert verify(config, []).learned_twice > 0


@pytest.mark.parametrize(("name", "by"), [("samples_learned", 1), ("labels_read", 1), ("samples_read", 2)])
def test_finds_accounts_that_are_too_large(folder: Path, name: str, by: int) -> None:
    """The log holds fewer records."""

    def more(checkpoint: Checkpoint) -> Checkpoint:
        accounts = checkpoint.extra["accounts"]
        return replace(checkpoint, extra={**checkpoint.extra, "accounts": {**accounts, name: accounts[name] + by}})

    change(config_in(folder), more)

    assert verify(config_in(folder), []).learned_twice == by


def test_finds_a_ledger_count_that_is_too_large(folder: Path) -> None:
    """The count is in the heartbeat."""
    heartbeat = StatePaths(config_in(folder).state.dir).heartbeat
    status = json.loads(heartbeat.read_bytes())
    status["ledger"]["trained"] += 1
    heartbeat.write_text(json.dumps(status))

    assert verify(config_in(folder), []).learned_twice == 1


class TestDifferences:
    def test_two_learners_with_the_same_journal_are_equal(self, folder: Path) -> None:
        """The journal determines the records of each step."""
        config, other = config_in(folder), config_in(folder, "two")
        for name in ("log", "journal"):
            shutil.copytree(config.state.dir / name, other.state.dir / name)

        learning.learn(other, threading.Event(), until_end=True)

        assert differences(config, other) == []

    def test_one_bit_is_found(self, folder: Path) -> None:
        """In any array, even the sign of a zero."""
        config, other = config_in(folder), config_in(folder, "two")
        shutil.copytree(config.state.dir, other.state.dir)

        def negative_zero(checkpoint: Checkpoint) -> Checkpoint:
            return replace(checkpoint, arrays={**checkpoint.arrays, "x": np.array([-0.0])})

        change(config, lambda it: replace(it, arrays={**it.arrays, "x": np.array([0.0])}))
        change(other, negative_zero)

        assert differences(config, other) == ["x"]

    def test_another_count_is_found(self, folder: Path) -> None:
        """The difference has the name of the field."""
        config, other = config_in(folder), config_in(folder, "two")
        shutil.copytree(config.state.dir, other.state.dir)
        change(other, lambda it: replace(it, extra={**it.extra, "stream_time_s": 0.0}))

        assert [line.partition(":")[0] for line in differences(config, other)] == ["extra"]


def newest(config: Config) -> Checkpoint:
    found = load_newest(StatePaths(config.state.dir).checkpoints)
    assert found is not None
    return found


def change(config: Config, how: Callable[[Checkpoint], Checkpoint]) -> None:
    """Replace the newest checkpoint."""
    save_checkpoint(StatePaths(config.state.dir).checkpoints, how(newest(config)))
