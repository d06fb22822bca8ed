"""The learner's process on a log in memory: restarts, and what it refuses to start from."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harness.fakes import MemoryLog
from small_learner import L, S, config_in, filled_log, learn

from streamlearn.app import inspect as inspecting
from streamlearn.app import learner as learning
from streamlearn.app.log import make_codec
from streamlearn.errors import FROM_SCRATCH, ConfigError, OffsetOutOfRangeError, StateError, StateLockedError
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport
from streamlearn.state.checkpoint import path_of, save_checkpoint
from streamlearn.state.paths import StatePaths, state_lock
from streamlearn.state.publish import PublishedDir, load_arrays, teacher_path


class TestRestart:
    def test_continues_where_it_stopped(self, tmp_path: Path) -> None:
        """New records are learned once, and a new teacher is published."""
        config = config_in(tmp_path)
        log = filled_log(config, 16)
        first = learn(config, log)
        codec = make_codec(config)
        log.append("samples", [codec.encode_sample(f"more{n}", np.ones(4, np.float32)) for n in range(8)])

        second = learn(config, log)
        published = PublishedDir(StatePaths(tmp_path).published).newest()

        assert second.step == first.step + 1
        assert second.extra["accounts"]["samples_learned"] == 24
        assert published is not None
        assert published.step == second.step

    def test_a_lost_teacher_is_published_at_the_start(self, tmp_path: Path) -> None:
        """Without waiting for the next record."""
        config = config_in(tmp_path)
        log = filled_log(config, 16)
        step = learn(config, log).step
        shutil.rmtree(StatePaths(tmp_path).published)

        learn(config, log)
        published = PublishedDir(StatePaths(tmp_path).published).newest()

        assert published is not None
        assert published.step == step

    def test_an_unreadable_pointer_is_replaced(self, tmp_path: Path) -> None:
        """The learner has everything that is in it."""
        config = config_in(tmp_path)
        log = filled_log(config, 16)
        step = learn(config, log).step
        (StatePaths(tmp_path).published / "current.json").write_text("{")
        assert "not a pointer" in inspecting.state(config)["published"]["error"]

        learn(config, log)

        assert inspecting.state(config)["published"]["step"] == step

    def test_a_corrupt_teacher_is_published_again(self, tmp_path: Path) -> None:
        """No server can load it, and without new records nothing would replace it."""
        config = config_in(tmp_path)
        log = filled_log(config, 16)
        step = learn(config, log).step
        published = PublishedDir(StatePaths(tmp_path).published)
        path = teacher_path(published.folder, step)
        content = bytearray(path.read_bytes())
        content[-3] ^= 0x40
        path.write_bytes(content)

        learn(config, log)

        newest = published.newest()
        assert newest is not None
        assert newest.step == step
        load_arrays(newest)

    def test_without_an_election_the_teacher_is_served(self, tmp_path: Path) -> None:
        """Whatever was elected before: nothing would ever promote the teacher again."""
        log, served = filled_log(config_in(tmp_path), 16), []

        def elect(loop: TrainingLoop, _: StepReport) -> None:
            served.append(loop.learner.served)
            loop.learner.serve(1)

        for n, twin in enumerate(("elect", "elect", "measure")):
            config = config_in(tmp_path, **{"learn.twin": twin})
            log.append("samples", [make_codec(config).encode_sample(f"more{n}", np.ones(4, np.float32))])
            learn(config, log, on_step=elect)

        assert served == [0, 1, 1, 1, 0]

    def test_checkpoints_that_are_all_corrupt_are_refused_at_every_start(self, tmp_path: Path) -> None:
        """At the second start there is none, which is no reason to start from scratch."""
        config = config_in(tmp_path)
        log = filled_log(config, 16)
        learn(config, log)
        for path in StatePaths(tmp_path).checkpoints.glob("*.ckpt"):
            path.write_bytes(b"nothing")

        for _ in range(2):
            with pytest.raises(StateError, match=f"no checkpoint is valid; restore a backup, or {FROM_SCRATCH}"):
                learn(config, log)

    def test_a_checkpoint_from_before_the_class_scores_continues(self, tmp_path: Path) -> None:
        """Without the correction of the prior, rankings and calibration: they start empty."""
        config = config_in(tmp_path)
        log = filled_log(config, 24)
        saved = learn(config, log)
        new = ("learner.prior.", "board.calibration.", "board.prequential.ranking.", "board.oracle.ranking.")
        older = {name: array for name, array in saved.arrays.items() if not name.startswith(new)}
        assert len(older) < len(saved.arrays)
        save_checkpoint(StatePaths(tmp_path).checkpoints, replace(saved, arrays=older))
        log.append("samples", [make_codec(config).encode_sample("more", np.ones(4, np.float32))])

        again = learn(config, log)

        assert again.step > saved.step
        assert again.arrays.keys() == saved.arrays.keys()
        assert len(again.arrays["board.prequential.ranking.true"]) == 0

    def test_journaled_steps_are_repeated_whatever_the_batch_size_is_now(self, tmp_path: Path) -> None:
        """A crash and a larger `batch.fresh` give the same bits; a smaller one the same steps."""
        config = config_in(tmp_path)
        log = filled_log(config, 20)
        whole = learn(config, log)
        checkpoints = StatePaths(tmp_path).checkpoints

        path_of(checkpoints, whole.step).unlink()
        larger = learn(config_in(tmp_path, **{"batch.fresh": 64}), log)
        path_of(checkpoints, whole.step).unlink()
        smaller = learn(config_in(tmp_path, **{"batch.fresh": 2}), log)

        assert smaller.step == larger.step == whole.step
        assert smaller.extra["accounts"] == whole.extra["accounts"]
        assert all(np.array_equal(larger.arrays[name], whole.arrays[name]) for name in whole.arrays)

    def test_commits_its_offsets_before_it_reads(self, tmp_path: Path) -> None:
        """The embedded log must not trim unread records before the first save, or after a fallback."""
        config = config_in(tmp_path, **{"log.start": "latest"})
        log, stopped = filled_log(config), threading.Event()
        stopped.set()
        log.committed.update({S: 999})

        learning.learn(config, stopped, opened=log)

        assert log.committed == {S: 40, L: 18}

    def test_starts_at_the_end_of_the_log_if_set(self, tmp_path: Path) -> None:
        """`log.start = "latest"` applies to the first start only."""
        config = config_in(tmp_path, **{"log.start": "latest"})
        log = filled_log(config, 16)

        checkpoint = learn(config, log)
        log.append("samples", [make_codec(config).encode_sample("new", np.zeros(4, np.float32))])
        again = learn(config, log)

        assert checkpoint.step == 0
        assert again.extra["accounts"]["samples_read"] == 1


class TestRefusals:
    def test_another_model_is_refused(self, tmp_path: Path) -> None:
        """The message has the difference."""
        log = filled_log(config_in(tmp_path), 8)
        learn(config_in(tmp_path), log)

        with pytest.raises(ConfigError, match=r"model.options.hidden: checkpoint \[8\] → config \[16\]"):
            learn(config_in(tmp_path, **{"model.options": {"hidden": [16]}}), log)

    def test_a_log_that_ends_before_what_was_learned_is_refused(self, tmp_path: Path) -> None:
        """It is another log, or it lost records."""
        config = config_in(tmp_path)
        learn(config, filled_log(config, 16))

        with pytest.raises(StateError, match=r"samples\[0\] ends at 8"):
            learn(config, filled_log(config, 8))

    def test_a_recreated_log_is_refused(self, tmp_path: Path) -> None:
        """Even if it is longer: it has another sample at the same position. The same log, restored, is accepted."""
        config = config_in(tmp_path)
        learn(config, filled_log(config, 16))
        other = MemoryLog()
        other.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
        codec = make_codec(config)
        other.append("samples", [codec.encode_sample(f"other{n}", np.zeros(4, np.float32)) for n in range(40)])
        other.append("labels", [codec.labels.encode(f"other{n}", 1) for n in range(40)])

        with pytest.raises(StateError, match=r"samples\[0\]@15 holds the sample 'other15', and 's15' was learned"):
            learn(config, other)
        learn(config, filled_log(config, 24))

    def test_trimmed_records_stop_it_unless_they_may_be_skipped(self, tmp_path: Path) -> None:
        """`log.on_trimmed`; skipped records are counted."""
        config = config_in(tmp_path)
        log = filled_log(config, 16)
        learn(config, log)
        log.append("samples", [make_codec(config).encode_sample(f"t{n}", np.zeros(4, np.float32)) for n in range(8)])
        log.trim(S, 20)

        with pytest.raises(OffsetOutOfRangeError, match="on_trimmed"):
            learn(config, log)
        accounts = learn(config_in(tmp_path, **{"log.on_trimmed": "skip"}), log).extra["accounts"]

        assert accounts["samples_trimmed"] == 4
        assert accounts["samples_read"] == 20

    def test_a_second_learner_on_one_folder_is_refused(self, tmp_path: Path) -> None:
        """The lock is taken."""
        config = config_in(tmp_path)

        with state_lock(StatePaths(tmp_path)), pytest.raises(StateLockedError, match="owns this state folder"):
            learn(config, filled_log(config, 8))
