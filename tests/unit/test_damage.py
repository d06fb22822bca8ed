"""Damage to a state folder: only to files that the promise covers."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from harness.damage import REFUSED, damage, last_step

from streamlearn.ledger.store_file import FILE
from streamlearn.records import TopicPartition
from streamlearn.state.checkpoint import Checkpoint, load_newest, path_of, save_checkpoint
from streamlearn.state.journal import Journal, read_journal
from streamlearn.state.paths import StatePaths

A = TopicPartition("samples", 0)


@pytest.fixture
def paths(tmp_path: Path) -> StatePaths:
    """Checkpoints of steps 2, 4 and 6, and a journal of 8 steps."""
    paths = StatePaths(tmp_path)
    paths.checkpoints.mkdir()
    for step in (2, 4, 6):
        save_checkpoint(paths.checkpoints, Checkpoint(step, {A: step}, {"w": np.ones(50)}, {}))
    journal = Journal(paths.journal, max_bytes=1 << 20)
    for step in range(1, 9):
        journal.append(step, {A: step})
    journal.close()
    return paths


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["checkpoint-bit", "checkpoint-end"])
def test_the_newest_checkpoint_is_damaged(paths: StatePaths, kind: str, seed: int) -> None:
    """The previous one stays whole."""
    assert damage(paths, kind, Random(seed))

    found = load_newest(paths.checkpoints)
    assert found is not None
    assert found.step == 4


def test_two_whole_checkpoints_stay(paths: StatePaths) -> None:
    """With fewer than three, nothing is damaged."""
    damage(paths, "checkpoint-bit", Random(1))

    assert not damage(paths, "checkpoint-end", Random(1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["journal-bit", "journal-end"])
def test_only_journal_lines_that_no_checkpoint_covers_are_damaged(paths: StatePaths, kind: str, seed: int) -> None:
    """The checkpoint is of step 6."""
    assert damage(paths, kind, Random(seed))

    assert [step for step, _ in read_journal(paths.journal, 0)] in ([*range(1, 7)], [*range(1, 8)])


def test_a_torn_line_does_not_hide_the_lines_before_it(paths: StatePaths) -> None:
    """A power cut leaves a torn line."""
    assert damage(paths, "journal-torn-line", Random(1))

    assert last_step(paths.journal) == 8


def test_an_empty_folder_cannot_be_damaged(tmp_path: Path) -> None:
    """There are no files yet."""
    assert not any(damage(StatePaths(tmp_path), kind, Random(1)) for kind in ("checkpoint-bit", "journal-end"))


def test_a_damaged_checkpoint_is_not_removed(paths: StatePaths) -> None:
    """The file stays, with other content."""
    damage(paths, "checkpoint-end", Random(1))

    assert path_of(paths.checkpoints, 6).exists()


def test_the_last_step_is_found_at_the_end_of_a_long_journal(paths: StatePaths) -> None:
    """Only the end of the file is read."""
    journal = Journal(paths.journal, max_bytes=1 << 20)
    journal.cut_after(8)
    for step in range(9, 501):
        journal.append(step, {A: step})
    journal.close()

    assert next(paths.journal.glob("*.log")).stat().st_size > 10_000
    assert last_step(paths.journal) == 500


def test_a_segment_that_is_removed_after_the_listing_is_no_error(
    paths: StatePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner removes old segments at any moment."""
    listing = Path.glob
    listed = iter([[paths.journal / "journal-000000000999-000001.log"]])
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: next(listed, None) or listing(folder, pattern))

    assert last_step(paths.journal) == 8


def test_a_store_loses_its_end_or_a_page(paths: StatePaths) -> None:
    """`store-garbage` changes one page, `store-end` the size."""
    paths.store.mkdir()
    data, content = paths.store / FILE, bytes(10 * 4096)
    data.write_bytes(content)

    assert damage(paths, "store-garbage", Random(1))

    found = data.read_bytes()
    assert len(found) == len(content)
    assert sum(found[at : at + 4096] != bytes(4096) for at in range(0, len(found), 4096)) == 1
    assert damage(paths, "store-end", Random(1))
    assert data.stat().st_size < len(content)


def test_a_store_without_a_page_cannot_be_damaged(paths: StatePaths) -> None:
    """All its pages are still in the write-ahead log."""
    paths.store.mkdir()
    (paths.store / FILE).write_bytes(bytes(100))

    assert not any(damage(paths, kind, Random(1)) for kind in REFUSED)


def test_a_missing_store_cannot_be_damaged(paths: StatePaths) -> None:
    """A learner may die before it creates one."""
    assert not any(damage(paths, kind, Random(1)) for kind in REFUSED)
