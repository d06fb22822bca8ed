"""Two real learners on one state folder: locks lost, the older one given up for dead, and then it wakes up."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from support import until

from streamlearn.config import Config, load_config
from streamlearn.daemon.wiring import StatePaths, make_codec, make_topics, open_log
from streamlearn.state.points import VARIABLE
from streamlearn.testing.damage import last_step
from streamlearn.testing.nursery import Nursery
from streamlearn.testing.soak import write_config
from streamlearn.testing.verify import verify

REFUSED = 3
NO_COMMIT = {"STREAMLEARN_STATE__CHECKPOINT_EVERY_STEPS": "1000"}
"""Of a learner that is going to be stopped: a commit of offsets follows a checkpoint in a thread of its own, and a
process that is stopped in the middle of it holds the log's write lock for as long as it stands."""


@dataclass
class Room:
    """A state folder, and the learners that were started on it."""

    folder: Path
    nursery: Nursery
    config: Config = field(init=False)
    sent: int = 0

    def __post_init__(self) -> None:
        self.config = load_config(write_config(self.folder, "shared"), environ={})
        self.paths = StatePaths(self.config.state.dir)

    @property
    def output(self) -> Path:
        return self.folder / "learner.log"

    def send(self, samples: int) -> None:
        """Append samples, every other one with a label."""
        codec, rng = make_codec(self.config), np.random.default_rng(self.sent)
        with closing(open_log(self.config)) as log:
            make_topics(log, self.config)
            for number in range(self.sent, self.sent + samples):
                log.append("samples", [codec.encode_sample(f"s{number}", rng.normal(size=8).astype(np.float32))])
                if number % 2:
                    log.append("labels", [codec.encode_label(f"s{number}", number % 4)])
        self.sent += samples

    def start(self, *flags: str, environ: Mapping[str, str] | None = None) -> int:
        """Its process id."""
        return self.nursery.start(
            ["learn", "--config", str(self.folder / "shared.toml"), *flags], self.output, dict(environ or {})
        )

    @staticmethod
    def stands_still(pid: int) -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def code(self, pid: int) -> int:
        until(lambda: self.nursery.poll(pid) is not None, "the end of a learner", 60.0)
        found = self.nursery.poll(pid)
        assert found is not None
        return found

    def lose_locks(self) -> None:
        """As when a folder was moved, or lies where locks do not reach."""
        for path in (self.paths.root / "lock", self.paths.store / "writer.lock", self.paths.store / "lock.mdb"):
            path.unlink()

    def content(self) -> dict[str, bytes]:
        """All that only a learner writes: not the log, nor what is wanted, which SQLite tidies up when it is closed."""
        files = [path for path in sorted(self.paths.root.rglob("*")) if path.is_file()]
        shared = [path for path in files if self.paths.log.parent in path.parents or path.name.startswith("wanted")]
        return {str(path): path.read_bytes() for path in files if path not in shared}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """Starts learners without a wait for imports."""
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def room(tmp_path: Path, nursery: Nursery) -> Room:
    return Room(tmp_path, nursery)


def test_a_learner_that_wakes_up_after_its_successor_writes_nothing(room: Room) -> None:
    """SIGSTOP, the locks lost, another learner started and ended; then SIGCONT: exit code 3, and no byte changed."""
    room.send(60)
    older = room.start(environ=NO_COMMIT)
    until(lambda: last_step(room.paths.journal) >= 4, "the first learner to learn", 60.0)
    os.kill(older, signal.SIGSTOP)
    room.lose_locks()
    room.send(40)
    assert room.code(room.start("--until-end")) == 0, room.output.read_text()
    before = room.content()

    room.send(40)
    os.kill(older, signal.SIGCONT)

    assert room.code(older) == REFUSED, room.output.read_text()
    assert "has taken this state folder over" in room.output.read_text()
    assert room.content() == before
    # What the successor left is whole: a third one reads on, and all is learned once.
    assert room.code(room.start("--until-end")) == 0, room.output.read_text()
    assert verify(room.config, []).told == []


@pytest.mark.parametrize("stopped_at", ["ledger-flush.begin:4", "ledger-flush.begin:6", "journal-append.end:5"])
def test_what_an_older_learner_has_not_flushed_yet_never_reaches_the_store(room: Room, stopped_at: str) -> None:
    """It stops between the sync of its journal and the flush of its ledger, or in the middle of a step.

    Steps are in its memory, and stay there, though it may read pages that are its successor's by now.
    """
    room.send(60)
    older = room.start(environ={**NO_COMMIT, VARIABLE: f"{stopped_at}:stop"})
    until(lambda: room.stands_still(older), "the first learner to stop", 60.0)
    assert last_step(room.paths.journal) >= 1, "there is something to flush"
    room.lose_locks()
    room.send(40)
    assert room.code(room.start("--until-end")) == 0, room.output.read_text()
    before = room.content()

    os.kill(older, signal.SIGCONT)

    assert room.code(older) == REFUSED, room.output.read_text()
    assert room.content() == before
    assert room.code(room.start("--until-end")) == 0, room.output.read_text()
    assert verify(room.config, []).told == []


def test_a_second_learner_is_refused_while_the_first_lives(room: Room) -> None:
    """By the lock, before it takes an epoch: the first one is not disturbed."""
    room.send(20)
    first = room.start()
    until(lambda: last_step(room.paths.journal) >= 2, "the first learner to learn", 60.0)

    assert room.code(room.start("--until-end")) == REFUSED

    os.kill(first, signal.SIGTERM)
    assert room.code(first) == 0
    assert room.paths.epoch.read_bytes() == b"1\n"


def test_an_older_learner_ends_though_nothing_comes_to_be_learned(room: Room) -> None:
    """Its heartbeat finds out: a stream that is silent hides no second learner."""
    room.send(20)
    older = room.start()
    until(lambda: last_step(room.paths.journal) >= 2, "the first learner to learn", 60.0)

    room.paths.epoch.write_bytes(b"2\n")

    assert room.code(older) == REFUSED
