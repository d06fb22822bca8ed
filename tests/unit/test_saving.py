"""Saving under load: it changes no state, delays no step, and two processes at once leave a valid newest file."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_learner
from harness.fakes import MemoryLog
from harness.hour import memory_mb
from small_learner import S, empty_log, learn, loop_on

from streamlearn.app.log import make_codec
from streamlearn.config import Config
from streamlearn.state.checkpoint import Checkpoint, Saver, load_checkpoint, load_newest, path_of, steps_in
from streamlearn.state.files import Chunk, Files
from streamlearn.state.paths import StatePaths

SAMPLES, FRESH = 320, 8
STEPS = SAMPLES // FRESH


def config_in(folder: Path, **overrides: Any) -> Config:
    settings = {"state.checkpoint_every_s": 3600.0, "state.keep_checkpoints": 1000}
    return small_learner.config_in(folder, **{**settings, **overrides})


def filled(config: Config) -> MemoryLog:
    """Samples, a third of them labelled inside."""
    log, codec, rng = empty_log(), make_codec(config), np.random.default_rng(0)
    for n in range(SAMPLES):
        x = rng.normal(size=config.schema_.shape).astype(np.float32)
        log.append("samples", [codec.encode_sample(f"s{n}", x, label=n % 3 if n % 3 == 0 else None, timestamp_ms=n)])
    return log


def learned(config: Config, **more: Any) -> Checkpoint:
    return learn(config, filled(config), **more)


def differences(a: Checkpoint, b: Checkpoint) -> list[str]:
    other = [name for name in ("step", "next_offsets", "extra") if getattr(a, name) != getattr(b, name)]
    names = sorted(a.arrays.keys() | b.arrays.keys())
    missing = [name for name in names if (name in a.arrays) != (name in b.arrays)]
    both = [name for name in names if name not in missing]
    return other + missing + [n for n in both if not np.array_equal(a.arrays[n], b.arrays[n], equal_nan=True)]


class TestChangesNothing:
    def test_a_run_that_saves_after_every_step_ends_with_the_same_bits(self, tmp_path: Path) -> None:
        """As one that saves only at its end: weights, optimizer, replay buffer, scores, accounts."""
        often = learned(config_in(tmp_path / "often", **{"state.checkpoint_every_s": 1e-6}))
        never = learned(config_in(tmp_path / "never"))

        assert len(steps_in(tmp_path / "often" / "checkpoints")) > len(steps_in(tmp_path / "never" / "checkpoints"))
        assert differences(often, never) == []


class SlowFiles(Files):
    """A disk on which writes wait for `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.waiting = threading.Event()

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        self.waiting.set()
        assert self.go.wait(60)
        super().write(path, chunks)


class RecordedSaver(Saver):
    """Keeps the first checkpoint that it was handed, and counts the calls."""

    first: Checkpoint | None = None
    calls = 0

    def submit(self, checkpoint: Checkpoint) -> bool:
        self.calls += 1
        self.first = self.first or checkpoint
        return super().submit(checkpoint)


class TestUnderLoad:
    def test_steps_continue_and_the_save_is_of_the_step_at_which_it_started(self, tmp_path: Path) -> None:
        """The disk hangs for the whole stream. Later steps change nothing of what is handed over and then written."""
        config, disk = config_in(tmp_path, **{"state.checkpoint_every_s": 1e-6}), SlowFiles()
        folder = StatePaths(tmp_path).checkpoints
        saver = RecordedSaver(folder, keep=5, on_saved=lambda _: None, files=disk)
        with loop_on(config, filled(config), saver=saver) as loop:
            loop.run(threading.Event(), until_end=True)
            assert disk.waiting.is_set()
            assert steps_in(folder) == []
            assert saver.calls == 1, "all state was copied for a save that could not start"
            assert loop.learner.step >= STEPS
            disk.go.set()
        (saved,) = steps_in(folder)
        learned(config_in(tmp_path / "at-once", **{"state.checkpoint_every_s": 1e-6}))

        at_once = load_checkpoint(path_of(tmp_path / "at-once" / "checkpoints", saved))
        assert saver.first is not None
        assert differences(saver.first, at_once) == []
        assert differences(load_checkpoint(path_of(folder, saved)), at_once) == []

    def test_memory_is_bounded_by_a_few_copies(self, tmp_path: Path) -> None:
        """A model of some megabytes is saved as often as the disk allows: no save leaks."""
        sizes: list[int] = []
        resident_mb: list[float] = []
        big = {"model.options": {"hidden": [1024, 512]}, "state.keep_checkpoints": 2}
        config = config_in(tmp_path, **big, **{"state.checkpoint_every_s": 1e-6})

        def look(*_: object) -> None:
            for path in (tmp_path / "checkpoints").glob("*.ckpt"):
                with contextlib.suppress(FileNotFoundError):  # the saver's thread keeps two of them
                    sizes.append(path.stat().st_size)
            resident_mb.append(memory_mb(os.getpid())[1])

        learned(config, on_step=look)

        copy_mb = max(sizes) / 2**20
        first, rest = resident_mb[STEPS // 4], resident_mb[STEPS // 4 :]
        assert copy_mb > 10
        assert max(rest) - first < 4 * copy_mb


def _save_again_and_again(folder: Path, first: int, times: int, together: Barrier) -> None:
    saver = Saver(folder, keep=3, on_saved=lambda _: None)
    together.wait(100)  # a new saver removes leftovers of killed ones, and both must be alive
    for n in range(times):
        step = first + n
        array = np.full((256, 1024), step, np.float32)
        assert saver.submit(Checkpoint(step, {S: step}, {"w": array}, {}))
        assert saver.wait(60.0)
    saver.close(60.0)


@pytest.fixture
def processes() -> Iterator[list[multiprocessing.process.BaseProcess]]:
    """Started by the test, killed at its end."""
    started: list[multiprocessing.process.BaseProcess] = []
    yield started
    for process in started:
        process.kill()
        process.join(10)


class TestTwoAtOnce:
    def test_the_newest_file_is_valid(
        self, tmp_path: Path, processes: list[multiprocessing.process.BaseProcess]
    ) -> None:
        """Two processes save the same steps into one folder, and remove each other's old checkpoints."""
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
