"""Saving under load: it changes nothing, holds up nothing, and of two at once a whole newest file is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.hour import memory_mb
from streamlearn.app.adapters import Checkpoints

from streamlearn.app import learner as learning
from streamlearn.app.build import identity
from streamlearn.app.learner import _Wired
from streamlearn.app.log import make_codec
from streamlearn.config import Config, load_config
from streamlearn.records import Array, Offsets, TopicPartition
from streamlearn.state.checkpoint import Checkpoint, Saver, load_checkpoint, load_newest, path_of, steps_in
from streamlearn.state.files import Chunk, Files
from streamlearn.state.paths import StatePaths
from streamlearn.testing import MemoryLog

torch.set_num_threads(1)
S, L = TopicPartition("samples", 0), TopicPartition("labels", 0)
SAMPLES, FRESH = 320, 8
STEPS = SAMPLES // FRESH


def config_in(folder: Path, **overrides: Any) -> Config:
    settings = {
        "state.dir": str(folder),
        "state.checkpoint_every_s": 3600.0,
        "state.keep_checkpoints": 1000,
        "schema.shape": [4],
        "schema.classes": 3,
        "model.options": {"hidden": [8]},
        "batch.fresh": FRESH,
        "batch.labelled": 4,
        "batch.steps": 1,
        "batch.max_age_s": 3600.0,
        "batch.merge_wait_s": 60.0,
        "learn.threads": 1,
        "metrics.port": 0,
    }
    return load_config(environ={}, overrides={**settings, **overrides})


def filled(config: Config) -> MemoryLog:
    """Samples, a third of them labelled inside."""
    log, codec, rng = MemoryLog(), make_codec(config), np.random.default_rng(0)
    log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
    for n in range(SAMPLES):
        x = rng.normal(size=config.schema_.shape).astype(np.float32)
        log.append("samples", [codec.encode_sample(f"s{n}", x, label=n % 3 if n % 3 == 0 else None, timestamp_ms=n)])
    return log


def learn(config: Config) -> Checkpoint:
    learning.learn(config, threading.Event(), until_end=True, opened=filled(config))
    found = load_newest(StatePaths(config.state.dir).checkpoints)
    assert found is not None
    return found


def differences(a: Checkpoint, b: Checkpoint) -> list[str]:
    told = [name for name in ("step", "next_offsets", "extra") if getattr(a, name) != getattr(b, name)]
    names = sorted(a.arrays.keys() | b.arrays.keys())
    missing = [name for name in names if (name in a.arrays) != (name in b.arrays)]
    both = [name for name in names if name not in missing]
    return told + missing + [n for n in both if not np.array_equal(a.arrays[n], b.arrays[n], equal_nan=True)]


class TestChangesNothing:
    def test_a_run_that_saves_at_every_step_ends_with_the_same_bits(self, tmp_path: Path) -> None:
        """As one that saves at its end only: weights, optimizer, memory, scores, accounts."""
        often = learn(config_in(tmp_path / "often", **{"state.checkpoint_every_steps": 1}))
        never = learn(config_in(tmp_path / "never"))

        assert len(steps_in(tmp_path / "often" / "checkpoints")) > len(steps_in(tmp_path / "never" / "checkpoints"))
        assert differences(often, never) == []


class SlowFiles(Files):
    """A disk on which the first checkpoint waits until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.waiting = threading.Event()

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        self.waiting.set()
        assert self.go.wait(60)
        super().write(path, chunks)


class Remembered(Checkpoints):
    """Keeps what it was handed for the first save."""

    first: Checkpoint | None = None
    asked = 0

    def save(self, step: int, next_offsets: Offsets, arrays: Mapping[str, Array], extra: Mapping[str, Any]) -> bool:
        self.asked += 1
        if self.first is None:
            self.first = Checkpoint(step, next_offsets, arrays, {**extra, "identity": self._identity})
        return super().save(step, next_offsets, arrays, extra)


class TestUnderLoad:
    def test_steps_go_on_and_the_save_is_of_the_step_at_which_it_began(self, tmp_path: Path) -> None:
        """The disk hangs for all of the stream; later steps change nothing of what was handed over, and then written.

        Both are as another run saved them at once.
        """
        config, disk = config_in(tmp_path, **{"state.checkpoint_every_steps": 3}), SlowFiles()
        paths, log = StatePaths(tmp_path), filled(config)
        paths.checkpoints.mkdir(parents=True)
        log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
        with closing(log), _Wired(config, log, paths, {S: 0, L: 0}, stopping=threading.Event()) as wired:
            saver = Saver(paths.checkpoints, keep=5, on_saved=lambda _: None, files=disk)
            wired.parts.checkpoints = remembered = Remembered(saver, paths, identity(config))
            wired.start()
            wired.pipeline.run(threading.Event(), until_end=True)
            taken = wired.parts.learner.step
            assert disk.waiting.is_set()
            assert steps_in(paths.checkpoints) == []
            assert remembered.asked == 1, "all state was copied for a save that could not begin"
            disk.go.set()
            saver.close(60.0)
        (saved,) = steps_in(paths.checkpoints)
        learn(config_in(tmp_path / "at-once", **{"state.checkpoint_every_steps": 3}))

        at_once = load_checkpoint(path_of(tmp_path / "at-once" / "checkpoints", 3))
        assert (saved, taken >= STEPS) == (3, True)
        assert differences(load_checkpoint(path_of(paths.checkpoints, 3)), at_once) == []
        assert remembered.first is not None
        assert differences(remembered.first, at_once) == []

    def test_memory_is_bounded_by_a_few_copies(self, tmp_path: Path) -> None:
        """Of a model of some megabytes, saved as often as the disk takes it: no save leaves anything behind."""
        sizes: list[int] = []
        resident_mb: list[float] = []
        big = {"model.options": {"hidden": [1024, 512]}, "state.keep_checkpoints": 2}
        config = config_in(tmp_path, **big, **{"state.checkpoint_every_steps": 1})

        def look(*_: object) -> None:
            for path in (tmp_path / "checkpoints").glob("*.ckpt"):
                with contextlib.suppress(FileNotFoundError):  # the saver's thread keeps two of them
                    sizes.append(path.stat().st_size)
            resident_mb.append(memory_mb(os.getpid())[1])

        learning.learn(config, threading.Event(), until_end=True, opened=filled(config), watching=look)

        copy_mb = max(sizes) / 2**20
        first, rest = resident_mb[STEPS // 4], resident_mb[STEPS // 4 :]
        assert copy_mb > 10
        assert max(rest) - first < 4 * copy_mb


def _save_again_and_again(folder: Path, first: int, times: int, together: Barrier) -> None:
    saver = Saver(folder, keep=3, on_saved=lambda _: None)
    together.wait(100)  # a saver that is made removes what a killed one has left, and both live
    for n in range(times):
        step = first + n
        array = np.full((256, 1024), step, np.float32)
        assert saver.submit(Checkpoint(step, {S: step}, {"w": array}, {}))
        assert saver.wait(60.0)
    saver.close(60.0)


@pytest.fixture
def processes() -> Iterator[list[multiprocessing.process.BaseProcess]]:
    """Started by the test; ended, whatever comes."""
    started: list[multiprocessing.process.BaseProcess] = []
    yield started
    for process in started:
        process.kill()
        process.join(10)


class TestTwoAtOnce:
    def test_a_whole_newest_file_is_left(
        self, tmp_path: Path, processes: list[multiprocessing.process.BaseProcess]
    ) -> None:
        """Two processes save into one folder, the same steps at the same time, and remove each other's old ones."""
        spawn = multiprocessing.get_context("spawn")
        together = spawn.Barrier(2)
        for first in (1, 6):
            processes.append(spawn.Process(target=_save_again_and_again, args=(tmp_path, first, 40, together)))
            processes[-1].start()
        for process in processes:
            process.join(100)

        newest = load_newest(tmp_path)

        assert [process.exitcode for process in processes] == [0, 0]
        assert newest is not None
        assert newest.step == 45
        assert np.array_equal(newest.arrays["w"], np.full((256, 1024), 45, np.float32))
        assert all(load_checkpoint(path_of(tmp_path, step)).step == step for step in steps_in(tmp_path))
        assert not list(tmp_path.glob("*.corrupt"))
