"""The learner's process, run in this one on a log in memory: accounts, dead letters, restarts, refusals."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from streamlearn.app import adapters
from streamlearn.app import build as making
from streamlearn.app import inspect as inspecting
from streamlearn.app import learner as learning
from streamlearn.app.build import MOST_RECENT_BYTES, make_recent
from streamlearn.app.wiring import StatePaths, make_codec, state_lock
from streamlearn.config import Config, load_config
from streamlearn.errors import (
    ConfigError,
    LogError,
    LogUnavailableError,
    OffsetOutOfRangeError,
    StateError,
    StateLockedError,
)
from streamlearn.ledger import LabelState
from streamlearn.ledger.view import LedgerView
from streamlearn.log.codec import read_dead_letter
from streamlearn.log.feed import PREFETCH_BYTES
from streamlearn.loop.guarding import Guarding
from streamlearn.loop.parts import Parts, StepReport
from streamlearn.records import RETRACTED, NewRecord, Position, Prediction, Record, TopicPartition
from streamlearn.state import checkpoint, journal
from streamlearn.state.checkpoint import Checkpoint, load_newest, path_of
from streamlearn.state.publish import PublishedDir, load_arrays, teacher_path
from streamlearn.state.status import read_status
from streamlearn.testing import MemoryLog

torch.set_num_threads(1)
S = TopicPartition("samples", 0)


def config_in(folder: Path, **overrides: Any) -> Config:
    settings = {
        "state.dir": str(folder),
        "schema.shape": [4],
        "schema.classes": 3,
        "model.options": {"hidden": [8]},
        "batch.fresh": 8,
        "batch.labelled": 4,
        "batch.max_age_s": 3600.0,
        "batch.steps": 1,
        "learn.threads": 1,
        "metrics.port": 0,
    }
    return load_config(environ={}, overrides={**settings, **overrides})


def filled(config: Config, samples: int = 40) -> MemoryLog:
    # Records are merged by time: of a real clock some have the same millisecond, on a busy machine others.
    ticking = itertools.count(int(time.time()) - 60, 1 / 256).__next__  # exact in binary
    log, codec, rng = MemoryLog(clock=ticking), make_codec(config), np.random.default_rng(0)
    log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
    for n in range(samples):
        log.append("samples", [codec.encode_sample(f"s{n}", rng.normal(size=4).astype(np.float32), true_label=n % 3)])
        if n >= 4 and n % 2 == 0:
            log.append("labels", [codec.encode_label(f"s{n - 4}", n % 3)])
    return log


def learn(config: Config, log: MemoryLog) -> Checkpoint:
    copy = MemoryLog()
    copy._shared = log._shared  # the same log, opened once more
    try:
        learning.learn(config, threading.Event(), until_end=True, opened=copy)
    finally:
        log._shared.closed = False
    found = load_newest(StatePaths(config.state.dir).checkpoints)
    assert found is not None
    return found


class TestAccounts:
    def test_every_record_ends_in_one_place(self, tmp_path: Path) -> None:
        """Learned, duplicate id, dead-lettered; labels likewise (I7)."""
        config = config_in(tmp_path, **{"labels.unknown_class": "refuse"})
        log = filled(config)
        codec = make_codec(config)
        log.append("samples", [codec.encode_sample("s3", np.zeros(4, np.float32))])
        log.append("samples", [NewRecord(b"bad", b"{"), NewRecord(b"nan", b'{"x": [1, 2, NaN, 4]}')])
        log.append("labels", [codec.encode_label("s0", 2), codec.encode_label("nobody", 1), NewRecord(b"s1", b"wolf")])

        accounts = learn(config, log).extra["accounts"]
        status = read_status(StatePaths(tmp_path).heartbeat)

        assert accounts["samples_read"] == 43
        assert (accounts["samples_learned"], accounts["samples_duplicate_id"], accounts["samples_dead_lettered"]) == (
            40,
            1,
            2,
        )
        assert (accounts["labels_read"], accounts["labels_dead_lettered"]) == (21, 1)
        assert status is not None
        assert (status["ledger"]["joined"], status["ledger"]["corrected"], status["ledger"]["waiting"]) == (18, 1, 1)
        assert status["state"] == "stopped"

    def test_a_label_of_an_unknown_class_is_held_and_named(self, tmp_path: Path) -> None:
        """By default it is no dead letter: the class may come to be known."""
        config = config_in(tmp_path)
        log = filled(config)
        log.append("labels", [NewRecord(b"s1", b"wolf")])

        learn(config, log)

        status = read_status(StatePaths(tmp_path).heartbeat)
        assert status is not None
        assert status["ledger"]["held"] == 1
        assert status["held_classes"] == {"wolf": 1}

    @pytest.mark.parametrize(("policy", "held"), [("hold", {"wolf": 1}), ("grow", {}), ("refuse", {})])
    def test_a_sample_is_not_lost_with_an_unknown_label_inside(
        self, tmp_path: Path, policy: str, held: dict[str, int]
    ) -> None:
        """Held or grown into, the label is accounted for apart; only where labels are refused it is a dead letter."""
        config = config_in(tmp_path, **{"schema.max_classes": 5, "labels.unknown_class": policy})
        log = filled(config, 8)
        log.append("samples", [NewRecord(b"new", b'{"x": [1, 2, 3, 4], "label": "wolf"}')])

        learn(config, log)

        status = read_status(StatePaths(tmp_path).heartbeat)
        assert status is not None
        kept = policy != "refuse"
        assert (status["accounts"]["samples_learned"], len(log.records("dead-letters"))) == (8 + kept, 1 - kept)
        assert (status["accounts"]["labels_inline"], status["held_classes"]) == (kept, held)
        assert status["ledger"]["joined"] == 2 + (policy == "grow")

    @pytest.mark.parametrize("room", [4, 5])
    def test_held_labels_are_learned_once_their_class_has_its_name(self, tmp_path: Path, room: int) -> None:
        """An operator names a spare class, be it the last one, and starts again: no label was lost."""
        config = config_in(tmp_path, **{"schema.max_classes": room})
        log = filled(config)
        log.append("labels", [NewRecord(b"s1", b"wolf")])
        learn(config, log)

        named = config_in(tmp_path, **{"schema.classes": ["0", "1", "2", "wolf"], "schema.max_classes": room})
        log.append("samples", [make_codec(named).encode_sample("more", np.zeros(4, np.float32))])
        learn(named, log)

        status = read_status(StatePaths(tmp_path).heartbeat)
        assert status is not None
        assert (status["ledger"]["held"], status["held_classes"]) == (0, {})
        assert status["ledger"]["joined"] == 19
        assert status["ledger"]["trained"] == 19

    def test_trust_hears_of_every_label_of_a_known_sample(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the version that answered its sample, which is older than the label."""
        heard: list[tuple[int, int]] = []

        def compared(self: Guarding, *, right: bool, version: int) -> None:
            assert isinstance(right, bool)
            heard.append((version, self._learner.step))

        monkeypatch.setattr(Guarding, "compared", compared)
        learn(config_in(tmp_path, **{"batch.fresh": 2}), filled(config_in(tmp_path)))

        assert len(heard) == 18
        assert all(0 <= version <= step for version, step in heard)
        assert len({version for version, _ in heard}) > 5

    def test_a_head_grows_by_the_labels_it_is_sent(self, tmp_path: Path) -> None:
        """With `grow` the name takes a spare class at once, and is published; a restart knows it too."""
        overrides = {"schema.max_classes": 5, "labels.unknown_class": "grow"}
        config = config_in(tmp_path, **overrides)
        log = filled(config)
        log.append("labels", [NewRecord(f"s{n}".encode(), b"wolf") for n in (1, 3)] + [NewRecord(b"s5", b"bear")])
        log.append("labels", [NewRecord(b"s7", b"there is no room for a third")])

        learn(config, log)
        log.append("samples", [make_codec(config).encode_sample("more", np.zeros(4, np.float32))])
        learn(config, log)

        published = PublishedDir(StatePaths(tmp_path).published).newest()
        status = read_status(StatePaths(tmp_path).heartbeat)
        assert published is not None
        assert status is not None
        assert json.loads(published.metadata["classes"]) == ["0", "1", "2", "wolf", "bear"]
        assert status["ledger"]["trained"] == 21
        assert status["held_classes"] == {"there is no room for a third": 1}

    def test_dead_letters_carry_the_record_and_the_reason(self, tmp_path: Path) -> None:
        """Untouched bytes, and where they were."""
        config = config_in(tmp_path)
        log = filled(config, 8)
        log.append("samples", [NewRecord(b"k\xff", b"\x00junk", (("content-type", b"text/html"),))])

        learn(config, log)
        (letter,) = [read_dead_letter(record) for record in log.records("dead-letters")]

        assert letter.reason == "bad_content_type"
        assert (letter.record.key, letter.record.value) == (b"k\xff", b"\x00junk")
        assert str(letter.record.position) == "samples[0]@8"

    def test_a_sample_sent_again_with_its_label_is_a_label(self, tmp_path: Path) -> None:
        """The sample is a duplicate, the label is news."""
        config = config_in(tmp_path)
        log = filled(config, 8)
        log.append("samples", [make_codec(config).encode_sample("s7", np.zeros(4, np.float32), label=1)])

        learn(config, log)
        status = read_status(StatePaths(tmp_path).heartbeat)

        assert status is not None
        assert status["accounts"]["samples_duplicate_id"] == 1
        assert status["ledger"]["joined"] == 3


class TestFaults:
    def test_a_dead_letter_that_cannot_be_written_stops_the_learner(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing is passed by that is not durable elsewhere; after the restart it is written."""
        monkeypatch.setattr(adapters, "TRIES_S", (0.0, 0.0))
        config = config_in(tmp_path)
        log = filled(config, 8)
        log.append("samples", [NewRecord(b"k", b"junk")])
        log.fail("append", LogUnavailableError("away"), times=3)

        with pytest.raises(LogError, match="will not be dropped"):
            learn(config, log)
        accounts = learn(config, log).extra["accounts"]

        assert accounts["samples_dead_lettered"] == 1
        assert len(log.records("dead-letters")) == 1

    def test_a_record_of_neither_key_nor_value_is_passed_by(self, tmp_path: Path) -> None:
        """Other clients may write one, and nothing of it can be written back as it was."""
        config = config_in(tmp_path)
        log = filled(config, 8)
        held = log._shared.partition(TopicPartition("samples", 0))
        held.records.append(Record(Position("samples", 0, len(held.records)), 1_700_000_000_000, None, None))

        accounts = learn(config, log).extra["accounts"]

        assert accounts["samples_dead_lettered"] == 1
        (letter,) = [read_dead_letter(record) for record in log.records("dead-letters")]
        assert (letter.reason, letter.record.value) == ("no_value", b"")

    def test_a_dead_letter_that_is_refused_for_good_leaves_its_contents_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One too large for the topic would end the learner at every start; the others of its step are whole."""
        config = config_in(tmp_path)
        log = filled(config, 8)
        log.append("samples", [NewRecord(b"k", b"junk"), NewRecord(b"l", b"x" * 5000), NewRecord(b"m", b"junk")])
        append = MemoryLog.append

        def small(self: MemoryLog, topic: str, records: Sequence[NewRecord], timeout_s: float = 10.0) -> list[Position]:
            if topic == "dead-letters" and any(len(record.value or b"") > 1000 for record in records):
                raise LogError("too large")
            return append(self, topic, records, timeout_s)

        monkeypatch.setattr(MemoryLog, "append", small)

        accounts = learn(config, log).extra["accounts"]

        assert accounts["samples_dead_lettered"] == 3
        letters = [read_dead_letter(record) for record in log.records("dead-letters")]
        assert [(letter.record.key, letter.record.value) for letter in letters] == [
            (b"k", b"junk"),
            (None, b""),
            (b"m", b"junk"),
        ]
        assert str(letters[1].record.position) == "samples[0]@9"

    def test_a_short_absence_is_waited_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The letter is written at the next try."""
        monkeypatch.setattr(adapters, "TRIES_S", (0.0, 0.0))
        config = config_in(tmp_path)
        log = filled(config, 8)
        log.append("samples", [NewRecord(b"k", b"junk")])
        log.fail("append", LogUnavailableError("away"), times=2)

        learn(config, log)

        assert len(log.records("dead-letters")) == 1

    def test_a_teacher_that_is_not_finite_is_not_published(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever made it so, and with the guard off: here a network that spoils its own buffer in evaluation."""
        (tmp_path / "of_spoiled.py").write_text(
            "import torch\n"
            "class Net(torch.nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__(); self.inner = torch.nn.Linear(4, 3)\n"
            "        self.register_buffer('seen', torch.zeros(1))\n"
            "    def forward(self, x):\n"
            "        if not self.training and x.any():\n"
            "            self.seen += float('inf')\n"
            "        return self.inner(x)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        spoiled = {"model.factory": "of_spoiled:Net", "model.options": {}, "guard.on": False}
        config = config_in(tmp_path / "state", **spoiled)

        checkpoint = learn(config, filled(config))

        assert not np.isfinite(checkpoint.arrays["learner.teacher.net.seen"]).any()
        assert PublishedDir(StatePaths(config.state.dir).published).newest() is None

    def test_a_labelled_value_beyond_the_bound_is_not_replayed(self, tmp_path: Path) -> None:
        """Without input statistics: it would determine the batch statistics at each draw."""
        config = config_in(tmp_path, **{"model.normalise": False})
        log, codec = MemoryLog(clock=itertools.count(int(time.time()) - 60, 1 / 256).__next__), make_codec(config)
        log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
        for n in range(24):
            x = np.full(4, 1e19 if n == 9 else n / 24, np.float32)
            log.append("samples", [codec.encode_sample(f"s{n}", x)])
        log.append("labels", [codec.encode_label(f"s{n}", n % 3) for n in range(24)])

        checkpoint = learn(config, log)

        assert checkpoint.arrays["memory.x"].max() < 1.0
        assert len(checkpoint.arrays["memory.x"]) == 23
        assert all(np.isfinite(a).all() for name, a in checkpoint.arrays.items() if name.startswith("learner."))

    def test_a_sample_that_a_network_has_no_answer_to_is_not_scored(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The step that it is in is skipped; its label, when it comes, must not end the learner at every start."""
        (tmp_path / "of_counts.py").write_text(
            "import torch\n"
            "class Net(torch.nn.Module):\n"
            "    def __init__(self):\n        super().__init__(); self.inner = torch.nn.Linear(4, 3)\n"
            "    def forward(self, x):\n        return self.inner(torch.log1p(x))\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        overrides = {"model.factory": "of_counts:Net", "model.options": {}, "model.normalise": False}
        config = config_in(tmp_path / "state", **overrides, **{"learn.noise": "none"})
        log, codec = MemoryLog(clock=itertools.count(int(time.time()) - 60, 1 / 256).__next__), make_codec(config)
        log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
        for n in range(24):
            x = np.full(4, -2.0 if n == 9 else n / 24, np.float32)
            log.append("samples", [codec.encode_sample(f"s{n}", x, true_label=n % 3)])
        log.append("labels", [codec.encode_label(f"s{n}", n % 3) for n in range(24)])

        learn(config, log)
        status = read_status(StatePaths(config.state.dir).heartbeat)

        assert status is not None
        assert (status["ledger"]["joined"], status["ledger"]["scored"]) == (24, 23)
        assert status["accounts"]["samples_learned"] == 24

    @pytest.mark.parametrize("fresh", [1, 8])
    def test_one_clock_that_is_years_ahead_stops_nothing(self, tmp_path: Path, fresh: int) -> None:
        """Alone in its step or among others, twice: nothing expires by it, and what came after it has its turn."""
        settings = {"labels.implied_class": "0", "labels.implied_after_s": 10.0, "labels.horizon_s": 1000.0}
        config = config_in(tmp_path, **settings, **{"batch.fresh": fresh})
        log, codec = MemoryLog(), make_codec(config)
        log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
        for n in range(64):
            at_s = 1_700_000_000 + n + (3e8 if n in {20, 40} else 0)
            log.append(
                "samples", [codec.encode_sample(f"s{n}", np.zeros(4, np.float32), timestamp_ms=int(at_s * 1000))]
            )

        found = learn(config, log)
        status = read_status(StatePaths(tmp_path).heartbeat)

        assert status is not None
        now_s = found.extra["stream_time_s"]
        assert 1_700_000_050 < now_s < 1_700_000_064
        assert status["ledger"]["samples"] == 64
        assert status["ledger"]["implied"] == now_s - 1_700_000_000 - 10 - 2, "all older than 10 s but the two"

    @pytest.mark.parametrize("labels", [3, 40])
    @pytest.mark.parametrize("among", [False, True])
    def test_labels_take_the_time_nowhere(self, tmp_path: Path, labels: int, *, among: bool) -> None:
        """One who labels by a clock that is a year ahead, many at once, alone in a step or more than its samples are.

        What is known stays, and what comes joins.
        """
        config = config_in(tmp_path, **{"batch.fresh": 4, "batch.max_labels": 8})
        log, codec = MemoryLog(), make_codec(config)
        log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
        start_s = 1_700_000_000

        def sample(n: int, at_s: float) -> None:
            log.append(
                "samples", [codec.encode_sample(f"s{n}", np.zeros(4, np.float32), timestamp_ms=int(at_s * 1000))]
            )

        for n in range(64):
            sample(n, start_s + n)
            if among and n < labels:
                log.append("labels", [codec.encode_label(f"s{n}", 1, timestamp_ms=int((start_s + 3e7) * 1000))])
        learn(config, log)
        for n in range(0 if among else labels):
            log.append("labels", [codec.encode_label(f"s{n}", 1, timestamp_ms=int((start_s + 3e7) * 1000))])
        learn(config, log)
        for n in range(64, 96):
            sample(n, start_s + n)
        log.append("labels", [codec.encode_label("s80", 1, timestamp_ms=(start_s + 90) * 1000)])

        found = learn(config, log)
        status = read_status(StatePaths(tmp_path).heartbeat)

        assert status is not None
        assert found.extra["stream_time_s"] < start_s + 100
        assert (status["ledger"]["samples"], status["ledger"]["joined"]) == (96, labels + 1)

    @pytest.mark.parametrize("fresh", [1, 8])
    def test_after_days_of_silence_times_are_as_they_are(self, tmp_path: Path, fresh: int) -> None:
        """What comes then is young, and its labels are as late as they are."""
        settings = {"labels.implied_class": "0", "labels.implied_after_s": 3600.0, "log.start": "earliest"}
        config = config_in(tmp_path, **settings, **{"batch.fresh": fresh})
        log, codec = MemoryLog(), make_codec(config)
        log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
        start = 1_700_000_000
        for n, at_s in enumerate([*range(start, start + 12), *range(start + 5 * 86_400, start + 5 * 86_400 + 20)]):
            log.append("samples", [codec.encode_sample(f"s{n}", np.zeros(4, np.float32), timestamp_ms=at_s * 1000)])
        for n in range(12, 32):
            log.append("labels", [codec.encode_label(f"s{n}", 1, timestamp_ms=(start + 5 * 86_400 + 60 + n) * 1000)])
        delays = list[float]()

        def hear(_: Parts, report: StepReport) -> None:
            delays.extend(
                arrival.scored.delay_s for arrival in report.arrivals if arrival.scored and not arrival.implied
            )

        copy = MemoryLog()
        copy._shared = log._shared
        learning.learn(config, threading.Event(), until_end=True, opened=copy, watching=hear)
        status = read_status(StatePaths(tmp_path).heartbeat)

        assert status is not None
        assert (status["ledger"]["joined"], status["ledger"]["implied"]) == (20, 12)
        assert delays == [72.0] * 20


class TestRestart:
    def test_goes_on_where_it_stopped(self, tmp_path: Path) -> None:
        """More records later are learned once, and the served teacher moves on."""
        config = config_in(tmp_path)
        log = filled(config, 16)
        first = learn(config, log)
        codec = make_codec(config)
        log.append("samples", [codec.encode_sample(f"more{n}", np.ones(4, np.float32)) for n in range(8)])

        second = learn(config, log)
        published = PublishedDir(StatePaths(tmp_path).published).newest()

        assert second.step == first.step + 1
        assert second.extra["accounts"]["samples_learned"] == 24
        assert published is not None
        assert published.step == second.step

    def test_what_is_wanted_is_shown_while_the_guard_keeps_the_teacher_back(self, tmp_path: Path) -> None:
        """On the cadence of publishing, in a run that publishes nothing: labels are wanted most exactly then."""
        config = config_in(tmp_path, **{"state.publish_every_s": 0.01, "guard.look_every_steps": 1000})
        log = filled(config, 0)
        encode = make_codec(config).encode_sample
        log.append("samples", [encode(f"s{n}", np.full(4, n, np.float32)) for n in range(40)])
        shown: list[int] = []

        def freeze_and_look(parts: Parts, _: StepReport) -> None:
            state = parts.guarding.state()
            state["guard.unhealthy_looks"] = np.array(1)
            parts.guarding.load(state)
            time.sleep(0.011)  # the least time between two showings
            with contextlib.closing(sqlite3.connect(StatePaths(tmp_path).wanted)) as file:
                has_table = file.execute("SELECT count(*) FROM sqlite_master WHERE name = 'samples'").fetchone()[0]
                shown.append(file.execute("SELECT count(*) FROM samples").fetchone()[0] if has_table else 0)

        learning.learn(config, threading.Event(), until_end=True, opened=log, watching=freeze_and_look)

        assert PublishedDir(StatePaths(tmp_path).published).newest() is None
        assert shown == [0, 8, 16, 24, 32]

    def test_a_teacher_that_servers_do_not_have_is_published_at_once(self, tmp_path: Path) -> None:
        """Where the folder of teachers was lost, nobody waits for the next record."""
        config = config_in(tmp_path)
        log = filled(config, 16)
        step = learn(config, log).step
        shutil.rmtree(StatePaths(tmp_path).published)

        learn(config, log)
        published = PublishedDir(StatePaths(tmp_path).published).newest()

        assert published is not None
        assert published.step == step

    def test_a_pointer_that_cannot_be_read_is_written_anew(self, tmp_path: Path) -> None:
        """It says only what is published, and the learner is the one who knows."""
        config = config_in(tmp_path)
        log = filled(config, 16)
        step = learn(config, log).step
        (StatePaths(tmp_path).published / "current.json").write_text("{")
        assert "wanted the pointer" in inspecting.state(config)["published"]["error"]

        learn(config, log)

        assert inspecting.state(config)["published"]["step"] == step

    def test_a_published_teacher_that_is_corrupt_is_published_again(self, tmp_path: Path) -> None:
        """No server could load it, and without new records nothing else would replace it."""
        config = config_in(tmp_path)
        log = filled(config, 16)
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

    def test_no_election_serves_the_teacher_whoever_was_elected_before(self, tmp_path: Path) -> None:
        """`bank.serve = "teacher"` says so, and nobody would ever elect another."""
        log, served = filled(config_in(tmp_path), 16), []

        def elect(parts: Parts, _: StepReport) -> None:
            served.append(parts.learner.served)
            parts.learner.serve(1)

        for n, bank in enumerate(("elected", "elected", "teacher")):
            config = config_in(tmp_path, **{"bank.serve": bank})
            log.append("samples", [make_codec(config).encode_sample(f"more{n}", np.ones(4, np.float32))])
            learning.learn(config, threading.Event(), until_end=True, opened=log, watching=elect)
            log._shared.closed = False

        assert served == [0, 1, 1, 1, 0]

    def test_checkpoints_that_are_all_corrupt_are_refused_at_every_start(self, tmp_path: Path) -> None:
        """The second start finds none, and must not take that for a first one."""
        config = config_in(tmp_path)
        log = filled(config, 16)
        learn(config, log)
        for path in StatePaths(tmp_path).checkpoints.glob("*.ckpt"):
            path.write_bytes(b"nothing")

        for _ in range(2):
            with pytest.raises(StateError, match="no checkpoint is whole; restore a backup, or begin anew"):
                learn(config, log)

    def test_journaled_steps_are_formed_again_whatever_the_batch_size_is_now(self, tmp_path: Path) -> None:
        """A smaller `batch.fresh` after a crash is no reason to crash again, and the result is the same."""
        config = config_in(tmp_path)
        log = filled(config, 20)
        whole = learn(config, log)
        path_of(StatePaths(tmp_path).checkpoints, whole.step).unlink()

        again = learn(config_in(tmp_path, **{"batch.fresh": 2}), log)

        assert again.step == whole.step
        assert all(np.array_equal(again.arrays[name], whole.arrays[name]) for name in whole.arrays)

    def test_stops_in_the_middle_of_a_replay(self, tmp_path: Path) -> None:
        """A replay may take longer than a supervisor waits. What it came to is saved; what is shown is newer."""
        overrides = {"state.checkpoint_every_s": 3600.0, "state.publish_every_s": 0.01}
        whole, config = config_in(tmp_path / "whole", **overrides), config_in(tmp_path / "killed", **overrides)
        log, stopping, steps = filled(whole, 400), threading.Event(), list[int]()
        expected = learn(whole, log)

        class Killed(BaseException):
            pass

        def kill(_: Parts, report: StepReport) -> None:
            if report.step == 20:
                raise Killed

        def stop(_: Parts, report: StepReport) -> None:
            steps.append(report.step)
            if report.step == 5:
                stopping.set()

        for watching, event in ((kill, threading.Event()), (stop, stopping)):
            copy = MemoryLog()
            copy._shared = log._shared
            with contextlib.suppress(Killed):
                learning.learn(config, event, until_end=True, opened=copy, watching=watching)
            log._shared.closed = False
            shown = PublishedDir(StatePaths(config.state.dir).published).newest()
            assert shown is not None
            assert shown.step > 10
        saved = load_newest(StatePaths(config.state.dir).checkpoints)
        found = learn(config, log)

        assert steps == [1, 2, 3, 4, 5]
        assert saved is not None
        assert saved.step == 5
        assert found.step == expected.step
        assert found.arrays.keys() == expected.arrays.keys()
        assert all(np.array_equal(found.arrays[name], expected.arrays[name]) for name in expected.arrays)

    def test_commits_where_it_begins_before_it_reads(self, tmp_path: Path) -> None:
        """So that the embedded log trims nothing unread: before the first save, and after a fallback."""
        config = config_in(tmp_path, **{"log.start": "latest"})
        log, stopped = filled(config), threading.Event()
        stopped.set()
        log.committed.update({S: 999})

        learning.learn(config, stopped, opened=log)

        assert log.committed == {S: 40, TopicPartition("labels", 0): 18}

    def test_a_slow_save_slows_the_loop_and_keeps_the_journal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The journal stays within its bound, and a restart from the oldest kept checkpoint finds all steps."""
        monkeypatch.setattr(journal, "SEGMENT_BYTES", 2000)
        config = config_in(tmp_path, **{"batch.fresh": 1})
        state = config.state.model_copy(update={"journal_max_bytes": 8000})
        config = config.model_copy(update={"state": state})
        paths, loads, while_full = StatePaths(tmp_path), [0.0], []

        def look(parts: Parts, report: StepReport) -> None:
            loads.append(parts.journal.load)
            oldest = parts.checkpoints.oldest_step()
            found = [step for step, _ in journal.read_journal(paths.journal, oldest)]
            assert found == list(range(oldest + 1, report.step + 1))

        def write(path: Path, *args: Any, **more: Any) -> None:
            deadline = time.monotonic() + 60.0
            while path != path_of(paths.checkpoints, 0) and not while_full and time.monotonic() < deadline:
                time.sleep(0.01)
                if loads[-1] >= 1.0:
                    steps = len(loads)
                    time.sleep(0.5)
                    while_full.append(len(loads) - steps)
            write_whole(path, *args, **more)

        write_whole = checkpoint.write_whole
        monkeypatch.setattr(checkpoint, "write_whole", write)
        with capture_logs() as lines:
            learning.learn(config, threading.Event(), until_end=True, opened=filled(config, 400), watching=look)

        assert while_full == [0]
        assert max(loads) < 1.1, "one step more for each save"
        assert loads[-1] < 1.0, "saved again at once, until the oldest was removed"
        assert sum(path.stat().st_size for path in paths.journal.iterdir()) < 1.1 * 8000 + 2000
        assert [line["log_level"] for line in lines if line["event"] == "journal_full"] == ["warning"]

    def test_begins_at_the_end_where_that_is_set(self, tmp_path: Path) -> None:
        """`log.start = "latest"` is decided once, and remembered."""
        config = config_in(tmp_path, **{"log.start": "latest"})
        log = filled(config, 16)

        checkpoint = learn(config, log)
        log.append("samples", [make_codec(config).encode_sample("new", np.zeros(4, np.float32))])
        again = learn(config, log)

        assert checkpoint.step == 0
        assert again.extra["accounts"]["samples_read"] == 1


class TestRefusals:
    def test_another_model_is_refused_with_the_difference(self, tmp_path: Path) -> None:
        """Weights mean nothing to another network."""
        log = filled(config_in(tmp_path), 8)
        learn(config_in(tmp_path), log)

        with pytest.raises(ConfigError, match=r"model.options.hidden: checkpoint \[8\] → config \[16\]"):
            learn(config_in(tmp_path, **{"model.options": {"hidden": [16]}}), log)

    def test_a_log_that_ends_before_what_was_learned_is_refused(self, tmp_path: Path) -> None:
        """It is another log."""
        config = config_in(tmp_path)
        learn(config, filled(config, 16))

        with pytest.raises(StateError, match=r"samples\[0\] ends at 8"):
            learn(config, filled(config, 8))

    def test_a_log_that_was_made_anew_and_has_grown_since_is_refused(self, tmp_path: Path) -> None:
        """It would be gone on from the old one's end; the same one, restored by other means, is taken."""
        config = config_in(tmp_path)
        learn(config, filled(config, 16))
        other = MemoryLog()
        other.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
        codec = make_codec(config)
        other.append("samples", [codec.encode_sample(f"other{n}", np.zeros(4, np.float32)) for n in range(40)])
        other.append("labels", [codec.encode_label(f"other{n}", 1) for n in range(40)])

        with pytest.raises(StateError, match=r"samples\[0\]@15 holds the sample 'other15', and 's15' was learned"):
            learn(config, other)
        learn(config, filled(config, 24))

    def test_trimmed_records_stop_it_unless_skipping_is_set(self, tmp_path: Path) -> None:
        """Loud by default; counted where accepted."""
        config = config_in(tmp_path)
        log = filled(config, 16)
        learn(config, log)
        log.append("samples", [make_codec(config).encode_sample(f"t{n}", np.zeros(4, np.float32)) for n in range(8)])
        log.trim(S, 20)

        with pytest.raises(OffsetOutOfRangeError, match="on_trimmed"):
            learn(config, log)
        accounts = learn(config_in(tmp_path, **{"log.on_trimmed": "skip"}), log).extra["accounts"]

        assert accounts["samples_trimmed"] == 4
        assert accounts["samples_read"] == 20

    def test_a_second_learner_on_one_folder_is_refused(self, tmp_path: Path) -> None:
        """By name of the first."""
        config = config_in(tmp_path)

        with state_lock(StatePaths(tmp_path)), pytest.raises(StateLockedError, match="owns this state folder"):
            learn(config, filled(config, 8))

    def test_topics_that_are_not_co_partitioned_are_refused(self, tmp_path: Path) -> None:
        """A label must be in the same partition as its sample."""
        log = MemoryLog()
        log.create_topics({"samples": 2, "labels": 1, "dead-letters": 1})

        with pytest.raises(ConfigError, match="2 partitions and labels has 1"):
            learn(config_in(tmp_path), log)


class TestElection:
    def test_who_is_served_next_is_not_measured_by_what_the_one_before_said(self, tmp_path: Path) -> None:
        """At each change the drift monitor is told to forget the answers, and at no other step."""
        config = config_in(
            tmp_path,
            **{
                "bank.alpha": 1.0,
                "guard.on": False,
                "drift.reaction": "alarm",
                "learn.recipe": "none",
                "learn.learning_rate": 0.1,
                "learn.ema_decay": 0.99,
                "learn.options.consistency_weight": 100.0,
            },
        )
        # The classes are permuted in the middle. Consistency holds the student to the old teacher; the twin is free.
        log, codec = MemoryLog(clock=itertools.count(int(time.time()) - 60, 1 / 256).__next__), make_codec(config)
        log.create_topics({"samples": 1, "labels": 1, "dead-letters": 1})
        for n in range(2000):
            x = np.eye(3, 4, dtype=np.float32)[(n + n // 1000) % 3]
            log.append("samples", [codec.encode_sample(f"s{n}", x)])
            log.append("labels", [codec.encode_label(f"s{n}", n % 3)])
        served, forgotten = [0], []

        def look(parts: Parts, report: StepReport) -> None:
            served.append(parts.learner.served)
            if report.step == 1:
                forget = parts.guarding.another_answers

                def note() -> None:
                    forgotten.append(parts.learner.step + 1)
                    forget()

                parts.guarding.another_answers = note  # type: ignore[method-assign]

        learning.learn(config, threading.Event(), until_end=True, opened=log, watching=look)

        changed = [step for step in range(2, len(served)) if served[step] != served[step - 1]]
        assert changed
        assert forgotten == changed


class TestRetraction:
    def test_takes_the_example_out_of_the_replay_buffer_and_is_accounted_for(self, tmp_path: Path) -> None:
        """Of 18 labels three are retracted, one of them brought back; a run that is cut in the middle ends the same."""
        log, codec = filled(config_in(tmp_path)), make_codec(config_in(tmp_path))
        for name, label in (("s0", RETRACTED), ("s2", RETRACTED), ("s4", RETRACTED), ("s4", 1), ("new", RETRACTED)):
            log.append("labels", [codec.encode_label(name, label)])

        whole = learn(config_in(tmp_path / "whole"), log)
        accounts: list[tuple[int, int]] = []

        def stop(parts: Parts, report: StepReport) -> None:
            accounts.append((parts.accounts.labels_read, parts.ledger.counts().retracted))
            if report.step == 3:
                stopping.set()

        stopping = threading.Event()
        learning.learn(config_in(tmp_path / "cut"), stopping, opened=log, watching=stop)
        log._shared.closed = False
        cut = learn(config_in(tmp_path / "cut"), log)

        arrays = whole.arrays
        ends = arrays["memory.id_offsets"].tolist()
        names = {arrays["memory.ids"].tobytes()[a:b].decode() for a, b in itertools.pairwise(ends)}
        assert names == {"s4", *(f"s{n}" for n in range(6, 36, 2))}
        assert whole.extra["accounts"]["labels_read"] == 18 + 5
        assert accounts[-1] < (23, 4)
        for name in ("memory.ids", "memory.y", "memory.labelled_at_s"):
            np.testing.assert_array_equal(cut.arrays[name], arrays[name])


class TestErasure:
    def test_holds_over_a_restart_and_a_replay(self, tmp_path: Path) -> None:
        """The example and the recent sample are gone from the checkpoint, and a later label has expired.

        A replay from an older checkpoint learns from the sample in the steps before, and ends bit for bit the same.
        """
        settings = {"batch.steps": 2, "state.checkpoint_every_steps": 2}
        config = config_in(tmp_path, **settings)
        log, codec = filled(config), make_codec(config)
        payloads = {
            name: codec.decode_sample(log.read(S, n, 1)[0]).x.tobytes() for n, name in ((6, "s6"), (7, "s7"), (8, "s8"))
        }
        steps: list[int] = []
        first = learn(config, log)
        assert all(payload in first.arrays["recent.x"].tobytes() for payload in payloads.values())
        assert payloads["s6"] in first.arrays["memory.x"].tobytes()

        for name in ("s6", "s7", "never"):
            log.append("labels", [codec.encode_erasure(name)])
        for n in range(40, 80):
            log.append("samples", [codec.encode_sample(f"s{n}", np.full(4, n, np.float32))])
        log.append("samples", [codec.encode_sample("never", np.full(4, 99, np.float32), label=1)])
        log.append("labels", [codec.encode_label("s7", 2), codec.encode_label("s6", 2)])
        second = learn(config, log)

        def look(parts: Parts, report: StepReport) -> None:
            steps.append(report.step)

        saved = StatePaths(tmp_path).checkpoints
        path_of(saved, second.step).unlink()
        learning.learn(config, threading.Event(), until_end=True, opened=log, watching=look)
        log._shared.closed = False
        again = load_newest(saved)

        assert again is not None
        assert len(steps) >= 1, "steps were replayed"
        for saved in (second, again):
            held = b"".join(saved.arrays[name].tobytes() for name in ("memory.x", "recent.x"))
            assert [payload in held for payload in payloads.values()] == [False, False, True]
            assert np.full(4, 99, np.float32).tobytes() not in held
            assert checkpoint.extra["accounts"]["samples_duplicate_id"] == 1
        assert again.step == second.step
        for name, array in second.arrays.items():
            np.testing.assert_array_equal(again.arrays[name], array, err_msg=name)
        view = LedgerView(StatePaths(tmp_path).store, config.schema_.build())
        found = {name: (status.state, view.payload(name)) for name in payloads if (status := view.get(name))}
        view.close()
        assert found["s6"] == found["s7"] == (LabelState.ERASED, None)
        assert found["s8"][0] is LabelState.TRAINED


class TestTraffic:
    def test_a_pinned_version_is_compared_with_itself(self, tmp_path: Path) -> None:
        """Clients got answers of another version, sure of one class. Their samples alone get labels."""
        config = config_in(tmp_path, **{"learn.learning_rate": 0.1})
        log, codec, rng = filled(config, 0), make_codec(config), np.random.default_rng(0)
        pinned = Prediction(2, np.array([0.0, 0.01, 0.99], np.float32), 1000)
        for n in range(400):
            x, answer = rng.normal(size=4).astype(np.float32), pinned if n % 2 else None
            log.append("samples", [codec.encode_sample(f"s{n}", x, answer=answer)])
            if n % 4 == 1:
                log.append("labels", [codec.encode_label(f"s{n}", n % 3)])
        found: list[dict[str, Any]] = []

        def look(parts: Parts, _: StepReport) -> None:
            found.append(parts.board.report()["traffic"])

        learning.learn(config, threading.Event(), until_end=True, opened=log, watching=look)

        assert found[-1]["labelled"] == 100
        assert found[-1]["compared"] == 100
        assert found[-1]["confidence_gap"] == pytest.approx(0.0)
        assert found[-1]["class_mix_distance"] == 0.0
        assert found[-1]["confidence"] < 0.9, "half of all arrivals have the learner's own answers"


class TestFurtherSteps:
    """Steps of a micro-batch after its first, which have no records (`batch.steps`)."""

    def records(self, config: Config, samples: int, *, until_end: bool) -> list[int]:
        """How many each step had, until as many further steps as one micro-batch has were taken at the end."""
        found: list[int] = []
        stopping = threading.Event()

        def look(parts: Parts, report: StepReport) -> None:
            found.append(report.samples + report.labels)
            if not until_end and parts.accounts.samples_read == samples and found[-3:] == [0, 0, 0]:
                stopping.set()

        learning.learn(config, stopping, until_end=until_end, opened=filled(config, samples), watching=look)
        return found

    def test_each_micro_batch_has_them_where_nothing_but_the_end_is_waited_for(self, tmp_path: Path) -> None:
        """So that `evaluate` does the same every time."""
        found = self.records(config_in(tmp_path, **{"batch.steps": 4, "batch.fresh": 8}), 32, until_end=True)

        assert [bool(count) for count in found] == [True, False, False, False] * 4

    @pytest.mark.parametrize("max_labels", [1000, 2])
    def test_none_are_taken_while_another_micro_batch_waits(self, tmp_path: Path, max_labels: int) -> None:
        """A stream that is faster than four steps is no reason to fall behind, nor are labels that come in a row."""
        settings = {"batch.steps": 4, "batch.fresh": 8, "batch.max_labels": max_labels, "batch.max_age_s": 0.05}
        found = self.records(config_in(tmp_path, **settings), 64, until_end=False)

        further = found.index(0)
        assert sum(found[:further]) >= 64 + 30 - 7 - max_labels, "all that fills a micro-batch comes first"
        assert found[-3:] == [0, 0, 0]

    def test_recent_samples_have_their_keys_whatever_the_method(self, tmp_path: Path) -> None:
        """Or another method, for which they are remembered by their keys, would take them all for one."""
        keys = learn(config_in(tmp_path, **{"batch.steps": 2}), filled(config_in(tmp_path))).arrays["recent.keys"]

        assert len(set(keys.tolist())) == len(keys) == 40


def test_recent_samples_are_bounded_in_bytes() -> None:
    """They are in every checkpoint: of large images a few must do, but no fewer than a micro-batch."""
    image = {"schema.shape": [3, 1024, 1024], "schema.dtype": "uint8", "batch.fresh": 4}
    recent = make_recent(load_config(environ={}, overrides=image))

    assert recent is not None
    assert 4 <= recent.capacity == MOST_RECENT_BYTES // (3 << 20)


def test_the_replay_buffer_and_a_wide_batch_are_bounded_in_bytes() -> None:
    """Of large images a few must do, but no fewer than a micro-batch; of small rows as many as the settings say."""
    large = load_config(environ={}, overrides={"schema.shape": [3, 224, 224], "schema.dtype": "float32"})
    larger = load_config(environ={}, overrides={"schema.shape": [3, 8192, 8192], "schema.dtype": "float32"})
    small = load_config(environ={}, overrides={"schema.shape": [64]})
    row_bytes = 4 * 3 * 224 * 224

    memories = [making.make_memory(config).capacity for config in (large, small)]
    wide = [making.make_batcher(config, {})._wide for config in (large, larger, small)]

    assert memories == [making.MOST_MEMORY_BYTES // row_bytes, small.labels.memory_rows]
    assert wide == [PREFETCH_BYTES // row_bytes, larger.batch.fresh, small.batch.prefetch_records]
    assert large.schema_.build().rows_within(5000, row_bytes - 1, least=32) == 32


@pytest.mark.parametrize("prefetch_bytes", [1, 1 << 28])
def test_a_replay_is_the_same_whatever_is_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefetch_bytes: int
) -> None:
    """The journal says how steps were cut: how much fits in the queues decides nothing."""
    config, again = config_in(tmp_path / "a"), config_in(tmp_path / "b")
    log = filled(config, 100)
    wanted = learn(config, log)
    shutil.copytree(StatePaths(config.state.dir).journal, StatePaths(again.state.dir).journal)
    monkeypatch.setattr("streamlearn.log.feed.PREFETCH_BYTES", prefetch_bytes)

    found = learn(again, log)

    assert found.step == wanted.step
    assert found.next_offsets == wanted.next_offsets
    assert found.arrays.keys() == wanted.arrays.keys()
    assert all(np.array_equal(found.arrays[name], wanted.arrays[name], equal_nan=True) for name in wanted.arrays)
