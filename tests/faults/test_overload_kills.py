"""Killed during load shedding: the restarted learner sheds the same samples, and ends with the same bits."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from harness.fork_server import ForkServer
from support import finish, journaled_steps, newest_checkpoint, until, write_config

PLAN = ("digits", "--passes", 12, "--label-share", 0.2, "--label-delay", "geometric:200", "--seed", 3)
SHED = ("--set", "log.shed_above_records=1500")
SAMPLES = 12 * 1297
KILLED_AT = (2, 4, 6)
"""Steps in the journal. The first six or seven are of 2048 samples, of which 32 are learned."""
START_S = 90.0


def learn(nursery: ForkServer, folder: Path, *, kill_at: int | None = None) -> int:
    """Learn to the end of the log, or until `kill_at` steps are in the journal; the exit code."""
    arguments = ["learn", "--until-end", "--config", str(folder / "streamlearn.toml"), *SHED]
    pid = nursery.start(arguments, folder / "learner.log")
    if kill_at is not None:
        until(lambda: journaled_steps(folder) >= kill_at or nursery.poll(pid) is not None, f"{kill_at} steps", START_S)
        if nursery.poll(pid) is None:
            os.kill(pid, signal.SIGKILL)
    return int(until(lambda: (code := nursery.poll(pid)) is not None and (code,), "the learner's end", START_S)[0])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_while_shedding_changes_no_bit(tmp_path: Path) -> None:
    """As in a run that was never killed, over the same log and journal (I3)."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        write_config(folder, checkpoint_every_s=0.1, max_age_s=3600.0)
    finish("simulate", *PLAN, "--config", killed / "streamlearn.toml")

    with ForkServer() as nursery:
        codes = [learn(nursery, killed, kill_at=steps) for steps in KILLED_AT] + [learn(nursery, killed)]
        for name in ("log", "journal"):
            shutil.copytree(killed / "state" / name, whole / "state" / name)
        codes.append(learn(nursery, whole))

    a, b = newest_checkpoint(killed), newest_checkpoint(whole)
    accounts = a.extra["accounts"]
    assert codes == [-signal.SIGKILL] * len(KILLED_AT) + [0, 0]
    assert accounts["samples_thinned"] > 1500
    assert accounts["samples_learned"] + accounts["samples_thinned"] == SAMPLES
    assert (a.step, a.next_offsets, a.extra) == (b.step, b.next_offsets, b.extra)
    assert [name for name in a.arrays if not np.array_equal(a.arrays[name], b.arrays[name], equal_nan=True)] == []
