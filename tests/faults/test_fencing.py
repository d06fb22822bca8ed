"""A zombie writer: the locks are lost, a second learner starts, and the first one wakes up."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from harness.damage import last_step
from harness.fork_server import ForkServer
from harness.site import write_config
from harness.verify import verify
from support import until

from streamlearn.app.log import make_codec, make_topics, open_log
from streamlearn.config import Config, load_config
from streamlearn.ledger.store_file import FILE
from streamlearn.state.journal import parse_line, read_journal
from streamlearn.state.kill_points import VARIABLE
from streamlearn.state.paths import StatePaths

REFUSED = 3
ONE_THREAD = {"STREAMLEARN_STATE__CHECKPOINT_EVERY_S": "1000", "STREAMLEARN_STATE__PUBLISH_EVERY_S": "1000"}
"""For a learner that is stopped at a kill point: no other thread of it may be stopped during a write, or during the
commit of offsets that follows a checkpoint and holds the log's write lock."""
FLUSHES = {**ONE_THREAD, "STREAMLEARN_STATE__PUBLISH_EVERY_S": "0.05"}
"""The ledger is flushed before each publication; by then the publication before is complete."""


@dataclass
class Room:
    """A state folder, and the learners started on it."""

    folder: Path
    nursery: ForkServer
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
                    log.append("labels", [codec.labels.encode(f"s{number}", number % 4)])
        self.sent += samples

    def start(self, *flags: str, environ: Mapping[str, str] | None = None) -> int:
        """Start a learner; its process id."""
        return self.nursery.start(
            ["learn", "--config", str(self.folder / "shared.toml"), *flags], self.output, dict(environ or {})
        )

    @staticmethod
    def is_stopped(pid: int) -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def code(self, pid: int) -> int:
        until(lambda: self.nursery.poll(pid) is not None, "the end of a learner", 60.0)
        found = self.nursery.poll(pid)
        assert found is not None
        return found

    def lose_locks(self) -> None:
        """As when the folder is moved, or on a disk without locks."""
        for path in (self.paths.root / "lock", self.paths.store / "writer.lock"):
            path.unlink()

    def content(self) -> dict[str, bytes]:
        """Everything that only a learner writes: not the log, nor the label requests, which SQLite changes on close.

        The store by its rows, for the same reason. The journal by its valid steps: a learner that is stopped between
        the check of the fence and the write appends one line when it wakes up, with an epoch that is too old.
        """
        files = [path for path in sorted(self.paths.root.rglob("*")) if path.is_file()]
        apart = [self.paths.log.parent, self.paths.journal, self.paths.store]
        own = [path for path in files if not {*apart} & {*path.parents} and not path.name.startswith("label-requests")]
        steps = repr(list(read_journal(self.paths.journal, 0))).encode()
        with closing(sqlite3.connect(f"{(self.paths.store / FILE).as_uri()}?mode=ro", uri=True)) as db:
            tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema")]
            rows = repr([db.execute(f"SELECT * FROM {name}").fetchall() for name in tables]).encode()
        return {"journal": steps, "store": rows} | {str(path): path.read_bytes() for path in own}

    def journal_bytes(self) -> bytes:
        return b"".join(path.read_bytes() for path in sorted(self.paths.journal.iterdir()))


@pytest.fixture(scope="module")
def nursery() -> Iterator[ForkServer]:
    """Starts learners without importing everything again."""
    with ForkServer() as nursery:
        yield nursery


@pytest.fixture
def room(tmp_path: Path, nursery: ForkServer) -> Room:
    return Room(tmp_path, nursery)


@pytest.mark.parametrize(
    ("stopped_at", "environ"),
    [("ledger-flush.begin:4", FLUSHES), ("ledger-flush.begin:6", FLUSHES), ("journal-append.end:5", ONE_THREAD)],
)
def test_a_zombie_writes_nothing(room: Room, stopped_at: str, environ: dict[str, str]) -> None:
    """Both learners exit with code 3 and change nothing.

    The older one is stopped between the sync of its journal and the flush of its ledger, or during a step. It holds
    SQLite's lock on the store, so the newer one is refused, but it has taken the next epoch.
    """
    room.send(60)
    older = room.start(environ={**environ, VARIABLE: f"{stopped_at}:stop"})
    until(lambda: room.is_stopped(older), "the first learner to stop", 60.0)
    assert last_step(room.paths.journal) >= 1, "there is something to flush"
    room.lose_locks()
    room.send(40)
    assert room.code(room.start("--until-end")) == REFUSED, room.output.read_text()
    assert "another learner holds the write lock of this store" in room.output.read_text()
    before = room.content(), room.journal_bytes()

    os.kill(older, signal.SIGCONT)

    assert room.code(older) == REFUSED, room.output.read_text()
    assert "has taken over this state folder" in room.output.read_text()
    assert (room.content(), room.journal_bytes()) == before
    # The state is valid: a third one continues, and everything is learned once.
    room.send(40)
    assert room.code(room.start("--until-end")) == 0, room.output.read_text()
    assert verify(room.config, []).problems == []


def test_a_late_journal_line_has_no_effect(room: Room) -> None:
    """The learner is stopped after the check of the fence. Its late line has the old epoch, and nothing follows."""
    room.send(60)
    older = room.start(environ={**ONE_THREAD, VARIABLE: "journal-append.begin:5:stop"})
    until(lambda: room.is_stopped(older), "the first learner to stop", 60.0)
    room.lose_locks()
    room.send(40)
    assert room.code(room.start("--until-end")) == REFUSED, room.output.read_text()
    before = room.content()

    os.kill(older, signal.SIGCONT)

    assert room.code(older) == REFUSED, room.output.read_text()
    assert room.content()["store"] == before["store"]
    segment = next(room.paths.journal.glob("*-000001.log"))
    late = parse_line(segment.read_bytes().splitlines(keepends=True)[-1])
    assert late is not None, "it was stopped during a write"
    assert (late.step, late.epoch) == (5, 1)
    room.send(40)
    assert room.code(room.start("--until-end")) == 0, room.output.read_text()
    assert verify(room.config, []).problems == []


def test_a_second_learner_is_refused_while_the_first_lives(room: Room) -> None:
    """By the lock, before it takes an epoch, so the first one is not fenced."""
    room.send(20)
    first = room.start()
    until(lambda: last_step(room.paths.journal) >= 2, "the first learner to learn", 60.0)

    assert room.code(room.start("--until-end")) == REFUSED

    os.kill(first, signal.SIGTERM)
    assert room.code(first) == 0
    assert room.paths.epoch.read_bytes() == b"1\n"


def test_a_zombie_exits_without_new_records(room: Room) -> None:
    """Its heartbeat checks the fence, so a silent stream hides no second learner."""
    room.send(20)
    older = room.start()
    until(lambda: last_step(room.paths.journal) >= 2, "the first learner to learn", 60.0)

    room.paths.epoch.write_bytes(b"2\n")

    assert room.code(older) == REFUSED
