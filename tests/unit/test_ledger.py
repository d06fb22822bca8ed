"""The ledger: each way a label can come, what it does, how it is counted, and what views show.

What a set of labels and retractions comes to, in any order, is tested in tests/faults/test_ledger_any_order.py.
"""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamlearn.errors import ConfigError, LogUnavailableError
from streamlearn.ledger import Arrival, LabelState, LabelStatus
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.rows import (
    EVER_TRAINED,
    KEPT_RECORDS,
    PAYLOAD_AT,
    SCORED,
    LabelRecord,
    LabelRow,
    trained_in,
    unpack_answers,
    unpack_id,
)
from streamlearn.ledger.settings import LabelsConfig
from streamlearn.ledger.store_file import FILE
from streamlearn.ledger.view import LedgerView
from streamlearn.records import (
    ERASED,
    RETRACTED,
    UNLABELLED,
    Array,
    Column,
    Label,
    Position,
    Prediction,
    PublishedAnswer,
    Sample,
    Schema,
)

SCHEMA = Schema((2, 3), np.dtype(np.float32), ("ant", "bee", "cat"))


def payload(sample_id: str) -> Array:
    return np.full(SCHEMA.shape, sum(sample_id.encode()), np.float32)


def sample(sample_id: str, offset: int = 0, at_s: float = 100.0, label: int | None = None) -> Sample:
    return Sample(Position("samples", 1, offset), at_s, sample_id, payload(sample_id), label)


def label(sample_id: str, class_index: int, offset: int = 0, at_s: float = 130.0) -> Label:
    return Label(Position("labels", 1, offset), at_s, sample_id, class_index)


def published(sample_id: str, class_index: int = 0, offset: int = 0) -> PublishedAnswer:
    """An answer of version 5 to the sample at this offset."""
    answer = Prediction(class_index, np.array([0.5, 0.25, 0.25], np.float32), 5)
    return PublishedAnswer(Position("predictions", 0, 3), 101.0, sample_id, Position("samples", 1, offset), answer)


def prediction(class_index: int = 2, version: int = 7) -> Prediction:
    return Prediction(class_index, np.array([0.1, 0.2, 0.7], np.float32), version)


class Book:
    """A ledger with a step open, and shorthands. A test chooses the settings and what is read back from the log."""

    def __init__(self, path: Path, *, together: bool) -> None:
        self.path, self.together = path, together
        self.read_back: Callable[[Position, str], Array | None] = lambda *_: None
        self.settings: dict[str, Any] = {"horizon_s": 1e6}
        self.more: dict[str, Any] = {}
        self.schema = SCHEMA
        self._ledger: Ledger | None = None

    @property
    def labels(self) -> LabelsConfig:
        """Not validated: a test sets bounds that are met within a few steps."""
        return LabelsConfig.model_construct(**self.settings)

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            self._ledger = Ledger(
                self.path,
                self.schema,
                self.labels,
                read_back=self.read_back,
                **self.more,
            )
            self._ledger.begin(self._ledger.step + 1, 100.0)
        return self._ledger

    def sample(self, record: Sample) -> list[Arrival]:
        return self.ledger.sample_arrived(record, prediction(), 1)

    def label(self, record: Label) -> Arrival:
        if self.together:
            (arrival,) = self.ledger.labels_arrived([record])
            return arrival
        return self.ledger.label_arrived(record)

    def next_step(self, now_s: float = 130.0) -> None:
        ledger = self.ledger
        ledger.end()
        ledger.begin(ledger.step + 1, now_s)

    def counts(self, *names: str) -> dict[str, int]:
        """The named counters, after the end of the step has checked I7."""
        self.next_step()
        return {name: getattr(self.ledger.counts(), name) for name in names}

    def view(self) -> LedgerView:
        """What another process sees. No step is open after it."""
        self.ledger.end()
        self.ledger.flush()
        return LedgerView(self.path, SCHEMA)

    def status(self, sample_id: str) -> LabelStatus | None:
        """The same of one label, between two steps."""
        with closing(self.view()) as view:
            status = view.get(sample_id)
        self.ledger.begin(self.ledger.step + 1, 0.0)
        return status

    def table(self, name: str) -> dict[Any, Any]:
        """A table of the file, between two steps."""
        self.ledger.end()
        self.ledger.flush()
        self.ledger.begin(self.ledger.step + 1, 0.0)
        return self.read(name)

    def read(self, name: str) -> dict[Any, Any]:
        """A table of the file as of the last flush."""
        with closing(sqlite3.connect(self.path / FILE)) as db:
            return dict(db.execute(f"SELECT * FROM {name}").fetchall())

    def reopen(self, schema: Schema) -> None:
        """Restart with this schema."""
        self.ledger.end()
        self.close()
        self._ledger, self.schema = None, schema

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()


@pytest.fixture(params=[False, True], ids=["one", "many"])
def book(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Book]:
    """All rules hold for `label_arrived` and for `labels_arrived`."""
    book = Book(tmp_path / "ledger", together=request.param)
    yield book
    book.close()


class TestALabelAfterItsSample:
    def test_is_joined_and_scored_with_the_prediction_of_that_time(self, book):
        """The stored prediction is scored: class, probabilities, version, student's class, delay in log time."""
        book.sample(sample("s"))
        book.next_step()

        arrival = book.label(label("s", 2, at_s=130.0))

        assert arrival.state is LabelState.JOINED
        assert arrival.example is not None
        assert (arrival.example.sample_id, arrival.example.class_index) == ("s", 2)
        np.testing.assert_array_equal(arrival.example.x, payload("s"))
        scored = arrival.scored
        assert scored is not None
        assert (scored.prediction.class_index, scored.prediction.model_version) == (2, 7)
        np.testing.assert_array_equal(scored.prediction.probabilities_C, prediction().probabilities_C)
        assert (scored.student_class, scored.class_index, scored.delay_s) == (1, 2, 30.0)
        assert book.counts("read", "joined", "scored") == {"read": 1, "joined": 1, "scored": 1}

    def test_inside_the_sample_is_scored_as_well(self, book):
        """The prediction was made before the label was used."""
        (arrival,) = book.sample(sample("s", label=1))

        assert (arrival.state, arrival.class_index) == (LabelState.JOINED, 1)
        assert arrival.scored is not None
        assert (arrival.scored.delay_s, arrival.scored.class_index) == (0.0, 1)

    def test_of_a_sample_without_a_prediction_is_not_scored(self, book):
        """A sample without a prediction (load shedding) is joined and learned."""
        nothing_said = Prediction(UNLABELLED, np.zeros(3, np.float32), 0)
        book.ledger.sample_arrived(sample("s"), nothing_said, UNLABELLED)

        arrival = book.label(label("s", 2))

        assert (arrival.state, arrival.scored) == (LabelState.JOINED, None)
        assert arrival.example is not None
        assert book.counts("joined", "scored") == {"joined": 1, "scored": 0}

    def test_that_repeats_is_a_duplicate_without_effect(self, book):
        """Another record of the same class is counted. It is neither learned nor scored again."""
        book.sample(sample("s", label=1))

        arrival = book.label(label("s", 1))

        assert arrival == Arrival(LabelState.DUPLICATE, "s", 1, labelled_at_s=130.0)
        assert book.counts("read", "joined", "duplicate") == {"read": 2, "joined": 1, "duplicate": 1}

    def test_of_another_class_corrects_it_and_the_first_score_stands(self, book):
        """The example comes again with the new class; it is not scored again."""
        book.sample(sample("s"))
        book.label(label("s", 0, offset=0))

        arrival = book.label(label("s", 2, offset=1))

        assert (arrival.state, arrival.class_index, arrival.correction) == (LabelState.CORRECTED, 2, True)
        assert arrival.example is not None
        assert (arrival.example.class_index, arrival.scored) == (2, None)
        assert book.counts("joined", "scored", "corrected") == {"joined": 1, "scored": 1, "corrected": 1}

    def test_in_time_scores_against_the_class_that_counts(self, book):
        """With `first`, the first label counts and is older than the sample; the second label is not."""
        book.settings["corrections"] = "first"
        book.label(label("s", 0, at_s=90.0))
        (arrival,) = book.sample(sample("s"))
        assert arrival.scored is None

        scored = book.label(label("s", 2, 1)).scored

        assert scored is not None
        assert (scored.class_index, scored.delay_s) == (0, 30.0)

    def test_corrects_the_replay_buffer_even_without_a_payload(self, book):
        """`correction` is set without an example, since the replay buffer may hold the payload."""
        book.settings["payload_max_bytes"] = 1
        book.sample(sample("s", label=0))
        book.sample(sample("t"))
        book.next_step()

        arrival = book.label(label("s", 2))

        assert arrival == Arrival(LabelState.CORRECTED, "s", 2, correction=True, labelled_at_s=130.0)


class TestAPublishedAnswer:
    """It is scored in place of the learner's own prediction, if it is read before the label is joined."""

    SCORES = ("scored", "scored_published")

    @pytest.mark.parametrize("when", ["same step", "later step", "with its sample"])
    def test_is_scored(self, book, when):
        """Class, probabilities and version. The own prediction is still there, to compare with other arrivals."""
        if when == "with its sample":
            book.ledger.sample_arrived(sample("s"), prediction(), 1, published("s").prediction)
        else:
            book.sample(sample("s"))
            if when == "later step":
                book.next_step()
            assert book.ledger.answers_published([published("s")]) == ["taken"]
        book.next_step()

        scored = book.label(label("s", 2)).scored

        assert (scored.prediction.class_index, scored.prediction.model_version) == (0, 5)
        assert scored.prediction.probabilities_C.tolist() == [0.5, 0.25, 0.25]
        assert (scored.at_arrival.class_index, scored.at_arrival.model_version) == (2, 7)
        assert (scored.student_class, scored.class_index, scored.delay_s) == (1, 2, 30.0)
        assert book.counts(*self.SCORES) == {"scored": 1, "scored_published": 1}

    def test_is_scored_by_a_label_that_was_read_before_its_sample(self, book):
        """And by one inside the sample."""
        book.label(label("s", 2))
        (early,) = book.ledger.sample_arrived(sample("s"), prediction(), 1, published("s").prediction)
        inside = sample("t", 1, label=1)
        (within,) = book.ledger.sample_arrived(inside, prediction(), 1, published("t", offset=1).prediction)

        assert [arrival.scored.prediction.model_version for arrival in (early, within)] == [5, 5]
        assert book.counts(*self.SCORES) == {"scored": 2, "scored_published": 2}

    def test_that_comes_after_the_score_is_late(self, book):
        """The score stands, and so does the prediction that a view shows."""
        book.sample(sample("s"))
        scored = book.label(label("s", 2)).scored

        assert book.ledger.answers_published([published("s")]) == ["late"]

        assert scored.prediction.model_version == 7
        assert book.counts(*self.SCORES) == {"scored": 1, "scored_published": 0}
        assert book.status("s").model_version == 7

    def test_that_comes_twice_counts_once(self, book):
        """The first one, also among those that are read together."""
        book.sample(sample("s"))

        assert book.ledger.answers_published([published("s", 0), published("s", 1)]) == ["taken", "late"]
        assert book.ledger.answers_published([published("s", 2)]) == ["late"]
        assert book.label(label("s", 2)).scored.prediction.class_index == 0

    def test_to_another_sample_of_the_same_id_is_unknown(self, book):
        """The position identifies the sample: the second one of an id is a duplicate."""
        book.sample(sample("s", 0))

        assert book.ledger.answers_published([published("s", offset=1), published("new")]) == ["unknown", "unknown"]
        assert book.label(label("s", 2)).scored.prediction.model_version == 7

    def test_to_a_sample_that_was_shed_is_scored(self, book):
        """It had no prediction of the learner, but a client was answered."""
        book.ledger.sample_arrived(sample("s"), Prediction(UNLABELLED, np.zeros(3, np.float32), 0), UNLABELLED)
        book.ledger.answers_published([published("s")])

        scored = book.label(label("s", 2)).scored

        assert (scored.prediction.class_index, scored.at_arrival.class_index) == (0, UNLABELLED)

    def test_of_an_evicted_sample_is_scored(self, book):
        """The payload comes from the log."""
        book.settings["payload_max_bytes"] = 1
        book.read_back = lambda _position, sample_id: payload(sample_id)
        for n, name in enumerate("stu"):
            book.sample(sample(name, n))
        book.next_step()
        book.ledger.end()
        book.ledger.prune(book.ledger.step)
        book.ledger.begin(book.ledger.step + 1, 130.0)

        assert book.ledger.answers_published([published("s")]) == ["taken"]
        assert book.label(label("s", 2)).scored.prediction.model_version == 5

    def test_to_an_erased_sample_is_late(self, book):
        """It can never be scored."""
        book.sample(sample("s"))
        book.label(label("s", ERASED))

        assert book.ledger.answers_published([published("s")]) == ["late"]

    def test_expires_with_its_sample(self, book):
        """No row of it is left."""
        book.settings["max_ids"] = 1
        book.sample(sample("s"))
        book.ledger.answers_published([published("s")])
        assert len(book.table("answers")) == 1
        book.sample(sample("t", 1))

        assert book.table("answers") == {}
        assert book.ledger.answers_published([published("s")]) == ["unknown"]

    def test_is_found_after_a_restart(self, book):
        """A restart reads from the file whether there are any."""
        book.sample(sample("s"))
        book.ledger.answers_published([published("s")])
        book.reopen(SCHEMA)

        assert book.label(label("s", 2)).scored.prediction.model_version == 5

    def test_is_what_a_view_shows(self, book):
        """Class and version, before and after the score."""
        book.sample(sample("s"))
        book.ledger.answers_published([published("s")])

        before = book.status("s")
        book.label(label("s", 2))
        after = book.status("s")

        assert [(status.predicted_class, status.model_version) for status in (before, after)] == [(0, 5), (0, 5)]


class TestALabelBeforeItsSample:
    def test_waits_and_is_learned_but_never_scored(self, book):
        """Such a label may have been known when the prediction was made."""
        assert book.label(label("s", 2, at_s=99.0)) == Arrival(LabelState.WAITING, "s", 2)
        assert book.counts("waiting", "joined") == {"waiting": 1, "joined": 0}

        (arrival,) = book.sample(sample("s"))

        assert (arrival.state, arrival.scored) == (LabelState.JOINED, None)
        assert arrival.example is not None
        assert arrival.example.class_index == 2
        assert book.counts("read", "waiting", "joined", "scored") == {"read": 1, "waiting": 0, "joined": 1, "scored": 0}
        assert (len(book.table("labels")), book.table("early")) == (1, {}), "it has moved to its sample"

    def test_becomes_an_orphan_past_the_horizon_and_is_removed_one_later(self, book):
        """An orphan is shown for one more horizon. The watermark decides, not the wall clock."""
        book.settings["horizon_s"] = 50.0
        book.label(label("s", 0))
        book.next_step(now_s=149.0)
        book.next_step(now_s=151.0)
        waiting = book.ledger.counts()
        book.next_step(now_s=201.0)
        orphaned, shown = book.ledger.counts(), book.status("s")
        book.next_step(now_s=202.0)

        assert (waiting.waiting, waiting.orphan) == (1, 0)
        assert (orphaned.waiting, orphaned.orphan) == (0, 1)
        assert shown is not None
        assert shown.state is LabelState.ORPHAN
        assert (book.table("early"), book.table("queue")) == ({}, {})
        assert book.ledger.counts().orphan == 1

    def test_that_is_an_orphan_is_not_joined(self, book):
        """Its sample comes too late. It stays counted as an orphan."""
        book.settings["horizon_s"] = 50.0
        book.label(label("s", 0))
        book.next_step(now_s=151.0)
        book.next_step(now_s=151.0)

        assert book.sample(sample("s", at_s=150.0)) == []
        counts = book.counts("read", "orphan", "joined", "waiting")
        assert counts == {"read": 1, "orphan": 1, "joined": 0, "waiting": 0}
        assert book.table("early") == {}

    def test_may_come_again_after_it_became_an_orphan(self, book):
        """A new record for an orphan's sample is like any other label."""
        book.settings["horizon_s"] = 50.0
        book.label(label("s", 0))
        book.next_step(now_s=200.0)
        book.next_step(now_s=200.0)
        assert book.ledger.counts().orphan == 1

        assert book.label(label("s", 1, offset=1)).state is LabelState.WAITING
        assert [a.state for a in book.sample(sample("s", at_s=200.0))] == [LabelState.JOINED]
        counts = book.counts("read", "orphan", "joined", "waiting")
        assert counts == {"read": 2, "orphan": 1, "joined": 1, "waiting": 0}

    def test_is_an_orphan_when_too_many_wait_the_oldest_first(self, book):
        """Labels without samples are bounded in number as well (I6)."""
        book.settings["max_ids"] = 2
        for i in range(5):
            book.label(label(f"s{i}", 0, offset=i))
        book.next_step()

        counts = book.counts("waiting", "orphan")
        arrivals = [len(book.sample(sample(f"s{i}", offset=i))) for i in range(5)]

        assert counts == {"waiting": 2, "orphan": 3}
        assert arrivals == [0, 0, 0, 1, 1]


class TestOneRecordTwice:
    def test_has_no_effect(self, book):
        """A label record is known by its position. Delivered again, it reports the state and is counted once."""
        book.sample(sample("s"))
        first, second = (book.label(label("s", 1)) for _ in range(2))
        book.ledger.trained(["s"])
        third = book.label(label("s", 1))

        assert first.example is not None
        assert second == Arrival(LabelState.SCORED, "s", 1)
        assert third == Arrival(LabelState.TRAINED, "s", 1)
        assert book.counts("read", "duplicate") == {"read": 1, "duplicate": 0}

    def test_a_sample_is_known_by_its_id(self, book):
        """The caller must check: a second sample of a known id is refused."""
        assert not book.ledger.known(["s"])
        book.sample(sample("s"))
        assert book.ledger.known(["s"])

        with pytest.raises(AssertionError, match="there already"):
            book.sample(sample("s", offset=1))


class TestPayloads:
    def test_past_the_bytes_are_read_back_from_the_log(self, book):
        """The oldest payload is evicted, and read back by its position."""
        asked = []
        book.read_back = lambda *asked_for: asked.append(asked_for) or payload("s0")
        book.settings["payload_max_bytes"] = 2 * SCHEMA.nbytes
        for i in range(3):
            book.sample(sample(f"s{i}", offset=i))
        book.next_step()

        arrivals = [book.label(label(f"s{i}", 0, offset=i)) for i in range(3)]

        assert [a.state for a in arrivals] == [LabelState.JOINED] * 3
        assert asked == [(Position("samples", 1, 0), "s0")]
        assert book.ledger.counts().payload_bytes == 2 * SCHEMA.nbytes

    def test_evicted_and_trimmed_from_the_log_let_the_label_expire(self, book):
        """There is nothing to learn from. The label is counted and not scored."""
        book.settings["payload_max_bytes"] = SCHEMA.nbytes
        book.sample(sample("old"))
        book.sample(sample("new", offset=1))
        book.next_step()

        arrivals = [book.label(label(name, 0, offset=i)) for i, name in enumerate(("old", "new"))]

        assert arrivals[0] == Arrival(LabelState.EXPIRED, "old", 0)
        assert arrivals[1].state is LabelState.JOINED
        assert book.counts("read", "expired", "scored") == {"read": 2, "expired": 1, "scored": 1}

    def test_found_by_a_correction_are_learned_from(self, book):
        """The label becomes joined, and the corrected class is learned."""
        log: list[Array] = []
        book.settings["payload_max_bytes"] = 1
        book.read_back = lambda *_: log[0] if log else None
        for i in range(2):
            book.sample(sample(f"s{i}", offset=i))
        book.next_step()
        book.label(label("s0", 0, offset=0))
        log.append(payload("s0"))

        arrival = book.label(label("s0", 1, offset=1))
        book.ledger.trained(["s0"])

        assert (arrival.state, arrival.example is not None) == (LabelState.CORRECTED, True)
        counts = book.counts("expired", "joined", "corrected", "trained")
        assert counts == {"expired": 0, "joined": 1, "corrected": 1, "trained": 1}

    def test_that_cannot_be_read_back_now_change_nothing(self, book):
        """Nothing has changed, so the same record may be delivered again."""
        away = [True]

        def read_back(_position: Position, _sample_id: str) -> Array | None:
            if away:
                raise LogUnavailableError
            return payload("s0")

        book.settings["payload_max_bytes"] = 1
        book.read_back = read_back
        for i in range(2):
            book.sample(sample(f"s{i}", offset=i))
        book.next_step()
        with pytest.raises(LogUnavailableError):
            book.label(label("s0", 0))
        away.clear()

        assert book.label(label("s0", 0)).state is LabelState.JOINED
        assert book.counts("read", "joined") == {"read": 1, "joined": 1}

    def test_leave_the_disk_only_when_no_rewind_can_need_them(self, book):
        """Eviction is immediate; `prune(step)` deletes the payloads that were evicted at that step."""
        book.settings["payload_max_bytes"] = 2 * SCHEMA.nbytes
        ledger = book.ledger
        for i in range(6):
            book.sample(sample(f"s{i}", offset=i))
            book.next_step()
        before = [*book.table("samples")], [*book.table("evicted")]

        ledger.end()
        ledger.prune(4)  # row 3 is of step 4: the ring then held rows 2 and 3
        ledger.flush()

        assert before == ([0, 1, 2, 3, 4, 5], [])
        whole, evicted = book.read("samples"), book.read("evicted")
        assert ([*whole], [*evicted]) == ([2, 3, 4, 5], [0, 1])
        assert [unpack_id(row) for row in (evicted | whole).values()] == [f"s{i}" for i in range(6)]
        with closing(LedgerView(book.path, SCHEMA)) as view:
            status = view.get("s0")
            assert status is not None
            assert (status.sample_position, view.payload("s0")) == (Position("samples", 1, 0), None)

    def test_of_fewer_columns_are_completed(self, book):
        """Rows of the store keep their size, in the ring, evicted, erased and in the view of other processes."""
        columns = Column("a", "number"), Column("b", "category", 5)
        old, new = (
            Schema((width,), np.dtype(np.float32), SCHEMA.classes, columns=columns[:n]) for n, width in ((1, 2), (2, 3))
        )
        book.settings["payload_max_bytes"] = 5 * new.nbytes
        book.schema = old
        for i in range(4):
            book.sample(replace(sample(f"s{i}", offset=i), x=np.array([i, 1.0], np.float32)))
        book.next_step()
        book.reopen(replace(old, columns=(Column("other", "number"),)))
        with pytest.raises(ConfigError, match="another schema"):
            book.label(label("s0", 0))
        book.schema = new
        for i in range(4, 7):
            book.sample(replace(sample(f"s{i}", offset=i), x=np.array([i, 1.0, 3.0], np.float32)))
        book.next_step()
        book.read_back = lambda position, _: np.array([position.offset, 1.0, 0.0], np.float32)

        arrivals = [book.label(label(f"s{i}", 0, offset=i)) for i in (2, 3, 4)]
        book.label(replace(label("s3", ERASED, offset=5)))
        book.ledger.end()
        book.ledger.prune(book.ledger.step)
        book.ledger.flush()

        assert [a.example.x.tolist() for a in arrivals] == [[2.0, 1.0, 0.0], [3.0, 1.0, 0.0], [4.0, 1.0, 3.0]]
        assert [a.scored.prediction.model_version for a in arrivals] == [7] * 3
        whole, evicted = book.read("samples"), book.read("evicted")
        assert [*evicted] == [0, 1]
        assert [unpack_id(row) for row in (evicted | whole).values()] == [f"s{i}" for i in range(7)]
        assert unpack_answers(evicted[0], 0)[2].probabilities_C.tolist() == prediction().probabilities_C.tolist()
        assert not np.frombuffer(whole[3][PAYLOAD_AT : PAYLOAD_AT + old.nbytes], np.uint8).any()
        with closing(LedgerView(book.path, new)) as view:
            assert view.payload("s2").tolist() == [2.0, 1.0, 0.0]
            assert view.payload("s6").tolist() == [6.0, 1.0, 3.0]


class TestBounds:
    def test_ids_expire_past_the_horizon_with_their_labels(self, book):
        """After that the id is new, and a label for it waits."""
        book.settings["horizon_s"] = 20.0
        book.sample(sample("old", at_s=100.0, label=0))
        book.sample(sample("new", offset=1, at_s=119.0))
        book.next_step(now_s=121.0)
        book.next_step(now_s=121.0)

        assert book.ledger.known(["old", "new"]) == {"new"}
        assert book.ledger.counts().samples == 1
        assert not book.table("labels")
        assert book.label(label("old", 0, at_s=121.0)).state is LabelState.WAITING

    def test_payloads_expire_with_their_ids(self, book):
        """Without its id, a payload cannot be found."""
        book.settings["horizon_s"] = 20.0
        book.sample(sample("old", at_s=100.0))
        book.next_step(now_s=121.0)
        book.next_step(now_s=121.0)

        assert book.ledger.counts().payload_bytes == 0

    def test_the_clock_never_goes_back(self, book):
        """An earlier watermark has no effect."""
        book.settings["horizon_s"] = 20.0
        book.next_step(now_s=121.0)
        book.next_step(now_s=0.0)
        book.sample(sample("old", at_s=100.0))
        book.next_step(now_s=0.0)

        assert not book.ledger.known(["old"])

    def test_ids_are_bounded_in_number(self, book):
        """The oldest are removed first, whatever their age."""
        book.settings["max_ids"] = 3
        for i in range(5):
            book.sample(sample(f"s{i}", offset=i))
        book.next_step()

        assert book.ledger.known([f"s{i}" for i in range(5)]) == {"s2", "s3", "s4"}

    def test_the_end_of_a_long_silence_expires_in_bounded_steps(self, book, monkeypatch):
        """A step expires a bounded number of rows, so it cannot stall. The next steps continue."""
        monkeypatch.setattr("streamlearn.ledger.ledger.EXPIRE_PER_STEP", 2)
        book.settings["horizon_s"] = 10.0
        for i in range(5):
            book.sample(sample(f"s{i}", offset=i))
        book.next_step(now_s=1000.0)
        sizes = []
        for _ in range(4):
            sizes.append(book.ledger.counts().samples)
            book.next_step(now_s=1000.0)

        assert sizes == [5, 3, 1, 0]

    def test_positions_of_one_sample_are_bounded(self, book):
        """A producer that repeats a label indefinitely does not grow its row."""
        book.sample(sample("s"))
        for offset in range(40):
            book.label(label("s", 0, offset))

        assert book.label(label("s", 0, 0)).state is LabelState.SCORED, "the first record is kept"
        assert book.label(label("s", 0, 39)).state is LabelState.SCORED, "so is the last"
        (data,) = book.table("labels").values()
        assert len(LabelRow.unpack(data).records) == 16


class TestManyRecordsOfOneSample:
    @pytest.mark.parametrize(("corrections", "expected"), [("last", (40, 1)), ("first", (0, 2))])
    @pytest.mark.parametrize("seed", range(5))
    def test_decide_by_the_last_or_the_first_of_all(self, book, seed, corrections, expected):
        """In any order, and more than are kept: the record that counts is exact, and every record is counted."""
        book.settings["corrections"] = corrections
        book.sample(sample("s"))
        classes = [2, *[0] * 39, 1]
        offsets = random.Random(seed).sample(range(41), 41)

        arrivals = [book.label(label("s", classes[offset], offset)) for offset in offsets]

        status = book.status("s")
        assert status is not None
        assert status.label_position is not None
        offset, class_index = expected
        assert (status.label_position.offset, status.class_index, arrivals[-1].class_index) == (
            offset,
            class_index,
            class_index,
        )
        counts = book.counts("read", "joined", "duplicate", "corrected")
        assert (counts["joined"], counts["duplicate"] + counts["corrected"]) == (1, 40)
        assert min(counts.values()) >= 0

    def test_compare_a_record_that_belongs_where_others_were_dropped_with_the_first(self, book):
        """The record on its other side was dropped, and is counted already."""
        book.sample(sample("s"))
        for offset, class_index in ((0, 0), (10, 1), *((offset, 0) for offset in range(20, 35))):
            book.label(label("s", class_index, offset))
        before = book.counts("duplicate", "corrected")

        arrival = book.label(label("s", 1, offset=15))

        assert before == {"duplicate": 14, "corrected": 2}
        assert (arrival.state, arrival.class_index) == (LabelState.CORRECTED, 0)
        assert book.counts("duplicate", "corrected") == {"duplicate": 14, "corrected": 3}


class TestTheImpliedClass:
    @pytest.fixture
    def book(self, book):
        book.settings |= {"implied_class": "ant", "implied_after_s": 50.0}
        return book

    def test_is_given_to_a_sample_without_any_label_once_its_time_has_passed(self, book):
        """It is joined, learned and scored with that time. It is counted apart, since there is no record."""
        book.sample(sample("s", at_s=100.0))
        book.sample(sample("labelled", offset=1, at_s=100.0, label=1))
        book.sample(sample("young", offset=2, at_s=101.0))
        book.next_step(now_s=150.0)
        early = book.ledger.implied()
        book.next_step(now_s=151.0)

        (arrival,) = book.ledger.implied()

        assert early == []
        assert (arrival.sample_id, arrival.state, arrival.class_index) == ("s", LabelState.JOINED, 0)
        assert arrival.implied
        assert arrival.example is not None
        np.testing.assert_array_equal(arrival.example.x, payload("s"))
        assert arrival.example.labelled_at_s == 150.0
        assert arrival.scored is not None
        assert (arrival.scored.class_index, arrival.scored.delay_s) == (0, 50.0)
        assert book.counts("implied", "read", "joined", "scored") == {"implied": 1, "read": 1, "joined": 1, "scored": 2}

    def test_is_confirmed_by_a_label_of_the_same_class(self, book):
        """The record is the first label, and nothing is learned or scored again."""
        book.sample(sample("s"))
        book.next_step(now_s=151.0)
        book.ledger.implied()
        book.ledger.trained(["s"])

        arrival = book.label(label("s", 0, at_s=160.0))

        assert arrival == Arrival(LabelState.TRAINED, "s", 0, labelled_at_s=160.0)
        assert book.counts("implied", "joined", "read", "scored") == {"implied": 0, "joined": 1, "read": 1, "scored": 1}

    @pytest.mark.parametrize("corrections", ["last", "first"])
    def test_is_corrected_by_a_label_of_another_class_whatever_the_policy(self, book, corrections):
        """A record counts over the implied class, even with an earlier time. The first score stands."""
        book.settings["corrections"] = corrections
        book.sample(sample("s"))
        book.next_step(now_s=151.0)
        book.ledger.implied()

        arrival = book.label(label("s", 2, at_s=120.0))

        assert (arrival.state, arrival.class_index, arrival.correction) == (LabelState.CORRECTED, 2, True)
        assert arrival.example is not None
        assert arrival.scored is None
        assert book.counts("implied", "joined", "corrected") == {"implied": 0, "joined": 1, "corrected": 0}
        status = book.status("s")
        assert status is not None
        assert status.corrected

    def test_expires_without_a_payload(self, book):
        """The sample has the class, but there is nothing to learn from."""
        book.settings["payload_max_bytes"] = SCHEMA.nbytes
        book.sample(sample("s"))
        book.sample(sample("t", offset=1, at_s=150.0))
        book.next_step(now_s=151.0)

        (arrival,) = book.ledger.implied()

        assert arrival == Arrival(LabelState.EXPIRED, "s", 0, implied=True)
        assert book.counts("implied", "expired", "scored") == {"implied": 1, "expired": 0, "scored": 0}

    def test_is_given_before_the_sample_expires_at_the_same_time(self, book):
        """With a horizon as long as `implied_after_s`, no sample is lost."""
        book.settings["horizon_s"] = 50.0
        book.sample(sample("s"))
        book.next_step(now_s=151.0)

        arrivals = book.ledger.implied()
        book.next_step(now_s=151.0)

        assert [arrival.sample_id for arrival in arrivals] == ["s"]
        assert book.ledger.implied() == []

    def test_is_given_in_bounded_steps(self, book, monkeypatch):
        """The end of a silence implies many at once: a bounded number per step."""
        monkeypatch.setattr("streamlearn.ledger.ledger.EXPIRE_PER_STEP", 2)
        for i in range(5):
            book.sample(sample(f"s{i}", offset=i))
        given = []
        for _ in range(4):
            book.next_step(now_s=1000.0)
            given.append([arrival.sample_id for arrival in book.ledger.implied()])

        assert given == [["s0", "s1"], ["s2", "s3"], ["s4"], []]

    def test_is_shown_as_implied(self, book):
        """`GET /label` shows that there is no record."""
        book.sample(sample("s"))
        book.next_step(now_s=151.0)
        book.ledger.implied()

        view = book.view()
        status = view.get("s")
        view.close()

        assert status is not None
        assert (status.state, status.class_index, status.implied) == (LabelState.SCORED, 0, True)
        assert (status.label_position, status.label_time_s) == (None, None)


def retraction(sample_id: str, offset: int = 9, at_s: float = 140.0) -> Label:
    return label(sample_id, RETRACTED, offset, at_s)


class TestARetraction:
    """A label record without a class. Each is counted as retracted."""

    def test_withdraws_the_label_and_no_score(self, book):
        """No class counts, and the replay buffer drops the example. The first score stands."""
        book.sample(sample("s"))
        assert book.label(label("s", 2)).scored is not None

        arrival = book.label(retraction("s"))

        assert (arrival.state, arrival.class_index) == (LabelState.RETRACTED, RETRACTED)
        assert (arrival.correction, arrival.example, arrival.scored) == (True, None, None)
        assert book.counts("read", "joined", "retracted", "scored") == {
            "read": 2,
            "joined": 1,
            "retracted": 1,
            "scored": 1,
        }
        status = book.view().get("s")
        assert status is not None
        assert (status.state, status.class_index, status.scored) == (LabelState.RETRACTED, None, True)
        assert status.label_position == Position("labels", 1, 9)

    def test_of_a_label_whose_payload_is_gone_counts_it_as_expired(self, book):
        """As without the retraction."""
        book.settings["payload_max_bytes"] = SCHEMA.nbytes
        book.sample(sample("s"))
        book.sample(sample("t", 1))
        book.next_step()
        book.label(retraction("s"))

        book.label(label("s", 2))

        counted = {"read": 2, "joined": 0, "expired": 1, "retracted": 1, "scored": 0}
        assert book.counts(*counted) == counted

    def test_of_an_unknown_id_waits_for_its_sample_and_expires(self, book):
        """It is queued like a waiting label. It is not counted as an orphan, since it is not a label."""
        book.settings["horizon_s"] = 50.0
        book.label(retraction("s"))
        book.label(retraction("t"))
        assert book.sample(sample("s")) == []
        assert book.counts("read", "waiting", "retracted") == {"read": 2, "waiting": 0, "retracted": 2}

        book.next_step(now_s=500.0)
        book.next_step(now_s=500.0)

        assert book.counts("read", "orphan", "retracted") == {"read": 2, "orphan": 0, "retracted": 2}
        assert book.table("queue") == {}
        assert book.status("t") is None

    def test_of_the_implied_class_withdraws_it_for_good(self, book):
        """The class is not implied a second time."""
        book.settings |= {"implied_class": "ant", "implied_after_s": 60.0}
        book.sample(sample("s"))
        book.next_step(now_s=200.0)
        (implied,) = book.ledger.implied()
        assert implied.class_index == 0

        arrival = book.label(retraction("s", at_s=210.0))

        assert (arrival.state, arrival.class_index, arrival.correction) == (LabelState.RETRACTED, RETRACTED, True)
        counted = {"read": 1, "implied": 0, "joined": 0, "retracted": 1, "scored": 1}
        assert book.counts(*counted) == counted
        book.next_step(now_s=400.0)
        assert book.ledger.implied() == []
        later = book.label(label("s", 1, 20, at_s=410.0))
        assert later.example is not None
        assert later.scored is None, "a sample is scored once"
        assert book.counts("read", "joined", "retracted") == {"read": 2, "joined": 1, "retracted": 1}

    def test_keeps_the_implied_class_away(self, book):
        """A record says that there is no label."""
        book.settings |= {"implied_class": "ant", "implied_after_s": 60.0}
        book.sample(sample("s"))
        book.label(retraction("s"))

        book.next_step(now_s=200.0)

        assert book.ledger.implied() == []

    def test_gives_the_baselines_their_counts_back(self, book):
        """Without any label, they predict nothing."""
        book.label(label("s", 2))
        assert book.ledger.baselines == (2, 2)
        book.label(label("t", 1, 1))
        book.label(retraction("s"))
        assert book.ledger.baselines == (1, 1)
        book.label(retraction("t", 10))

        assert book.ledger.baselines == (None, None)

    def test_withdraws_a_held_label_once_its_class_is_known(self, book):
        """Its log time is before the retraction."""
        book.sample(sample("s"))
        book.label(Label(Position("labels", 1, 0), 130.0, "s", UNLABELLED, class_name="dog"))
        book.label(retraction("s"))
        book.reopen(replace(SCHEMA, classes=(*SCHEMA.classes, "dog")))

        (arrival,) = book.ledger.release_held()

        assert (arrival.class_index, arrival.example) == (RETRACTED, None)
        assert book.counts("read", "held", "joined", "retracted") == {"read": 2, "held": 0, "joined": 1, "retracted": 1}

    @pytest.mark.parametrize("corrections", ["last", "first"])
    @pytest.mark.parametrize("seed", range(10))
    def test_decides_among_any_number_of_records(self, book, seed, corrections):
        """More than a row keeps, in any order: what counts is exact, and every record is counted."""
        rng = random.Random(seed)
        book.settings["corrections"] = corrections
        classes = [rng.choice((0, 1, 2, RETRACTED) if rng.random() < 0.3 else (0, 1, 2)) for _ in range(60)]
        records = [label("s", class_index, n, at_s=130.0 + n) for n, class_index in enumerate(classes)]
        book.sample(sample("s"))

        for record in rng.sample(records, len(records)):
            arrival = book.label(record)

        withdrawn = classes[-1] if corrections == "last" else RETRACTED if RETRACTED in classes else classes[0]
        assert arrival.class_index == withdrawn
        counts = book.counts("read", "joined", "duplicate", "corrected", "retracted")
        assert counts.pop("read") == 60 == sum(counts.values())
        assert counts["joined"] == 1
        assert counts["retracted"] == classes.count(RETRACTED)
        assert min(counts.values()) >= 0


def erasure(sample_id: str, offset: int = 9, at_s: float = 140.0) -> Label:
    return label(sample_id, ERASED, offset, at_s)


class TestAnErasure:
    """A label record that withdraws all labels of its sample, and deletes the payload."""

    def test_withdraws_the_label_for_good(self, book):
        """A later label has no effect."""
        book.sample(sample("s"))
        book.label(label("s", 2))

        arrival = book.label(erasure("s"))
        later = book.label(label("s", 1, 10, at_s=150.0))

        assert (arrival.state, arrival.class_index, arrival.correction) == (LabelState.ERASED, ERASED, True)
        assert (later.class_index, later.example, later.correction) == (ERASED, None, False)
        counted = {"read": 3, "joined": 1, "corrected": 1, "erased": 1, "scored": 1}
        assert book.counts(*counted) == counted
        view = book.view()
        status = view.get("s")
        assert status is not None
        assert (status.state, status.class_index) == (LabelState.ERASED, None)
        assert view.payload("s") is None

    @pytest.mark.parametrize("in_ring", [True, False])
    def test_lets_the_first_label_expire_without_reading_the_payload(self, book, in_ring):
        """Neither from the ring nor from the log."""
        asked = []
        book.read_back = lambda position, name: asked.append(name) or payload(name)
        book.settings["payload_max_bytes"] = SCHEMA.nbytes
        book.sample(sample("s"))
        if not in_ring:
            book.sample(sample("t", 1))
        book.next_step()
        book.label(erasure("s"))

        arrival = book.label(label("s", 2, 10, at_s=150.0))

        assert (arrival.class_index, arrival.example, arrival.scored) == (ERASED, None, None)
        assert asked == []
        counted = {"read": 2, "joined": 0, "expired": 1, "erased": 1, "scored": 0}
        assert book.counts(*counted) == counted

    def test_of_an_unknown_id_refuses_its_sample_while_it_is_remembered(self, book):
        """It is refused as known, so its payload is never stored."""
        book.settings["horizon_s"] = 50.0
        book.label(erasure("s"))
        book.label(retraction("t"))
        assert book.ledger.known(["s"])
        assert not book.ledger.known(["t"])

        for _ in range(2):
            book.next_step(now_s=500.0)

        assert not book.ledger.known(["s"])

    def test_keeps_the_payload_from_the_disk_once_no_rewind_can_need_it(self, book):
        """Until then, a replay of earlier steps learns from it again, bit for bit."""
        book.sample(sample("s"))
        book.sample(sample("t", 1))
        book.next_step()
        book.label(erasure("s"))
        book.next_step()
        ledger, step, kept = book.ledger, book.ledger.step - 1, payload("s").tobytes()
        ledger.end()

        ledger.prune(step - 1)
        ledger.rewind(step - 1)
        rewound = book.read("samples")
        ledger.begin(step, 130.0)
        book.label(erasure("s"))
        ledger.end()
        ledger.prune(step)
        ledger.flush()
        pruned = book.read("samples")

        assert kept in rewound[0]
        assert kept not in pruned[0]
        assert unpack_answers(pruned[0], SCHEMA.nbytes)[:2] == (100.0, 1)
        assert pruned[1] == rewound[1], "the other sample is untouched"
        ledger.begin(step + 1, 130.0)

    @pytest.mark.parametrize(("seed", "corrections"), [(0, "last"), (1, "first"), (2, "last")])
    def test_is_never_dropped_among_many_records(self, book, seed, corrections):
        """It is the second of more records than a row keeps, in any order."""
        rng = random.Random(seed)
        book.settings["corrections"] = corrections
        book.sample(sample("s"))
        classes = [ERASED if n == 1 else rng.choice((0, 1, 2, RETRACTED)) for n in range(50)]
        records = [label("s", class_index, n, at_s=130.0 + n) for n, class_index in enumerate(classes)]

        for record in rng.sample(records, len(records)):
            arrival = book.label(record)

        assert arrival.class_index == ERASED
        counts = book.counts("read", "joined", "duplicate", "corrected", "retracted", "erased", "expired")
        assert counts.pop("read") == 50 == sum(counts.values())
        assert counts["erased"] == 1

    def test_expires_with_its_sample(self, book):
        """After the horizon, neither the row nor the entry in `erased` is left."""
        book.settings["horizon_s"] = 50.0
        book.sample(sample("s"))
        book.label(erasure("s"))
        assert len(book.table("erased")) == 1

        for _ in range(2):
            book.next_step(now_s=500.0)

        assert book.table("erased") == {}
        assert not book.ledger.known(["s"])


class TestALabelOfAnUnknownClass:
    def unknown(self, sample_id: str, name: str, offset: int = 0, at_s: float = 130.0) -> Label:
        return Label(Position("labels", 1, offset), at_s, sample_id, UNLABELLED, class_name=name)

    def test_is_held_and_changes_nothing(self, book):
        """It is counted once, by its class name. A label of a known class is joined."""
        book.sample(sample("s"))
        arrivals = [book.label(self.unknown("s", "dog", 0)) for _ in range(2)]
        arrivals.append(book.label(self.unknown("t", "elk", 1)))
        arrivals.append(book.label(self.unknown("u", "dog", 2)))

        assert {(arrival.state, arrival.class_index) for arrival in arrivals} == {(LabelState.HELD, UNLABELLED)}
        assert book.ledger.held() == {"dog": 2, "elk": 1}
        assert book.label(label("s", 1, offset=3)).state is LabelState.JOINED
        assert book.counts("read", "held", "joined", "waiting") == {"read": 4, "held": 3, "joined": 1, "waiting": 0}

    def test_inside_a_sample_is_held_apart_from_it(self, book):
        """The sample is known and has no label until another one comes."""
        inside = replace(sample("s", label=UNLABELLED), class_name="dog")

        (arrival,) = book.sample(inside)

        assert (arrival.state, arrival.example) == (LabelState.HELD, None)
        assert book.ledger.known(["s"])
        assert book.ledger.held() == {"dog": 1}
        assert book.label(label("s", 1)).state is LabelState.JOINED
        assert book.counts("read", "held", "joined") == {"read": 2, "held": 1, "joined": 1}

    def test_inside_a_sample_takes_a_spare_output_under_grow(self, book):
        """It is joined with its sample. If no spare output is left, it is held."""
        book.schema, book.settings["unknown_class"] = replace(SCHEMA, spare=1), "grow"
        prediction = Prediction(0, np.full(4, 0.25, np.float32), 7)
        inside = [replace(sample(name, n, label=UNLABELLED), class_name=name) for n, name in enumerate(("dog", "elk"))]

        (dog,), (elk,) = (book.ledger.sample_arrived(record, prediction, 1) for record in inside)

        assert (dog.state, dog.class_index, elk.state) == (LabelState.JOINED, 3, LabelState.HELD)
        assert dog.example is not None
        assert book.ledger.class_names == [*SCHEMA.classes, "dog"]

    def test_that_is_delivered_again_once_its_class_is_known_is_still_held(self, book):
        """The same record must not be counted twice (I7)."""
        book.sample(sample("s"))
        book.label(self.unknown("s", "dog", 0))

        again = book.label(label("s", 1, offset=0))

        assert (again.state, again.class_index) == (LabelState.HELD, UNLABELLED)
        assert book.counts("read", "held", "joined") == {"read": 1, "held": 1, "joined": 0}

    def test_is_shown_with_its_class_name(self, book):
        """Unless another label of the sample counts."""
        book.sample(sample("s"))
        book.sample(sample("both", offset=1, label=1))
        for i, name in enumerate(("s", "both", "no sample")):
            book.label(self.unknown(name, "dog", 7 + i))

        view = book.view()
        held, both, unseen = (view.get(name) for name in ("s", "both", "no sample"))
        view.close()

        assert held is not None
        assert (held.state, held.class_name, held.class_index) == (LabelState.HELD, "dog", None)
        assert (held.label_position, held.label_time_s) == (Position("labels", 1, 7), 130.0)
        assert held.sample_position is not None
        assert both is not None
        assert (both.state, both.class_name) == (LabelState.SCORED, None)
        assert unseen is not None
        assert (unseen.state, unseen.sample_position) == (LabelState.HELD, None)

    def test_is_released_once_the_schema_has_its_class(self, book):
        """With its own position and log time. It is scored and learned like any other; the rest stays held."""
        book.sample(sample("s"))
        book.sample(sample("t", offset=1, label=0, at_s=120.0))
        for i, (sample_id, name) in enumerate((("s", "dog"), ("s", "elk"), ("t", "dog"))):
            book.label(self.unknown(sample_id, name, i, at_s=110.0))
        book.reopen(Schema(SCHEMA.shape, SCHEMA.dtype, (*SCHEMA.classes, "dog")))

        first, second = book.ledger.release_held()

        assert (first.state, first.class_index) == (LabelState.JOINED, 3)
        assert first.scored is not None
        assert (second.state, second.class_index) == (LabelState.SCORED, 0)
        assert not second.correction, "a later label says otherwise"
        assert book.ledger.release_held() == []
        assert book.ledger.held() == {"elk": 1}
        counts = book.counts("read", "held", "joined", "corrected")
        assert counts == {"read": 4, "held": 1, "joined": 2, "corrected": 1}

    def test_is_released_in_bounded_steps(self, book, monkeypatch):
        """A step checks a bounded number of held labels."""
        monkeypatch.setattr("streamlearn.ledger.ledger.EXPIRE_PER_STEP", 3)
        for i in range(8):
            book.label(self.unknown(f"s{i}", ("dog", "elk")[i % 2], i))
        book.reopen(Schema(SCHEMA.shape, SCHEMA.dtype, (*SCHEMA.classes, "dog")))
        released = []
        for _ in range(4):
            released.append([arrival.sample_id for arrival in book.ledger.release_held()])
            book.next_step()

        assert released == [["s0", "s2"], ["s4"], ["s6"], []]

    def test_is_dropped_when_too_many_are_held(self, book):
        """The oldest first, and counted (I6, I7)."""
        book.more = {"max_held": 2}
        for i in range(5):
            book.label(self.unknown(f"s{i}", f"class {i}", i))

        counts = book.counts("read", "held", "held_dropped")

        assert counts == {"read": 5, "held": 2, "held_dropped": 3}
        assert book.ledger.held() == {"class 3": 1, "class 4": 1}

    def test_is_dropped_past_the_horizon(self, book):
        """By then its sample has expired."""
        book.settings["horizon_s"] = 20.0
        book.label(self.unknown("s", "dog"))
        book.next_step(now_s=119.0)
        early = book.ledger.held()
        book.next_step(now_s=121.0)

        counts = book.counts("held", "held_dropped")

        assert (early, counts) == ({"dog": 1}, {"held": 0, "held_dropped": 1})

    def test_is_bounded_for_one_sample(self, book):
        """A producer that repeats an unknown label indefinitely does not grow its list."""
        for offset in range(20):
            book.label(self.unknown("s", f"class {offset}", offset))

        assert book.counts("held", "held_dropped") == {"held": 16, "held_dropped": 4}
        assert set(book.ledger.held()) == {f"class {offset}" for offset in range(4, 20)}

    def test_keeps_the_implied_class_away(self, book):
        """There is a label, and its class is another one."""
        book.settings |= {"implied_class": "ant", "implied_after_s": 10.0}
        book.sample(sample("s"))
        book.label(self.unknown("s", "dog"))
        book.next_step(now_s=200.0)

        assert book.ledger.implied() == []


class TestTrained:
    def test_counts_a_sample_once_and_names_the_step_that_learned_its_class(self, book):
        """A correction is learned by a later step. The counter counts samples."""
        book.sample(sample("s", label=0))
        book.ledger.trained(["s", "unknown"])
        book.next_step()
        book.ledger.trained(["s"])
        book.label(label("s", 1))
        for _ in range(2):
            book.next_step()
            book.ledger.trained(["s"])

        assert book.ledger.counts().trained == 1
        view = book.view()
        status = view.get("s")
        view.close()
        assert status is not None
        assert (status.state, status.first_trained_step, status.corrected) == (LabelState.TRAINED, 3, True)
        assert status.label_position == Position("labels", 1, 0), "of the label that counts"

    def test_is_of_the_present_sample_of_an_id(self, book):
        """After an id has expired, the same id is a new sample, without the old label."""
        book.settings["horizon_s"] = 20.0
        book.sample(sample("s", at_s=100.0))
        book.label(label("s", 0, at_s=101.0))
        book.ledger.trained(["s"])
        for _ in range(2):
            book.next_step(now_s=121.0)
        book.sample(sample("s", offset=1, at_s=121.0, label=1))
        book.ledger.trained(["s"])

        assert book.counts("joined", "trained") == {"joined": 2, "trained": 2}
        view = book.view()
        status = view.get("s")
        view.close()
        assert status is not None
        assert (status.class_index, status.first_trained_step) == (1, 3)


RECORD = LabelRecord(130.5, 1, 2, 1 << 40, 7)


class TestRows:
    """Label rows: the common case has a shorter layout."""

    @pytest.mark.parametrize(
        "row",
        [
            LabelRow(LabelState.JOINED, 7, [RECORD], SCORED, trained_step=1 << 50),
            LabelRow(LabelState.EXPIRED, 7, [RECORD]),
            LabelRow(LabelState.WAITING, 7, [RECORD], queue_row=1 << 60),
            LabelRow(LabelState.ORPHAN, 7, [RECORD], queue_row=0),
            LabelRow(LabelState.JOINED, 7),
            *[LabelRow(LabelState.JOINED, 7, [RECORD] * many, counting=many - 1) for many in (2, KEPT_RECORDS)],
        ],
    )
    def test_come_back_as_they_were(self, row):
        """With any number of records, in the queue or not."""
        assert LabelRow.unpack(row.pack()) == row

        learned, first = trained_in(replace(row, state=LabelState.JOINED, trained_step=0).pack(), 9)
        assert first
        assert LabelRow.unpack(learned) == replace(
            row, state=LabelState.JOINED, trained_step=9, flags=row.flags | EVER_TRAINED
        )


class TestBaselines:
    def test_predict_from_labels_read_before_the_sample(self, book):
        """Their prediction is stored with the sample. Later labels do not change it."""
        first = book.sample(sample("a", 0, label=1))[0].scored
        book.sample(sample("b", 1, label=1))
        book.sample(sample("late", 2))
        book.sample(sample("c", 3, label=0))
        second = book.sample(sample("d", 4, label=0))[0].scored
        late = book.label(label("late", 2)).scored

        assert first is not None
        assert (first.majority_class, first.no_change_class) == (None, None)
        assert second is not None
        assert (second.majority_class, second.no_change_class) == (1, 0)
        assert late is not None
        assert (late.majority_class, late.no_change_class) == (1, 1)

    def test_follow_corrections_and_prefer_the_first_of_equal_classes(self, book):
        """They count the class of each sample that counts, so the order of reading does not matter."""
        book.sample(sample("a", 0, label=2))
        book.sample(sample("b", 1, label=1))
        tied = book.sample(sample("c", 2, label=2))[0].scored
        for i, name in enumerate(("a", "c")):
            book.label(label(name, 0, offset=i))
        corrected = book.sample(sample("d", 3, label=0))[0].scored

        assert tied is not None
        assert tied.majority_class == 1
        assert corrected is not None
        assert (corrected.majority_class, corrected.no_change_class) == (0, 0)

    def test_prefer_the_first_of_equal_classes_after_a_correction_too(self, book):
        """When the majority class loses a label, all classes are compared."""
        for i, class_index in enumerate((1, 2, 2)):
            book.sample(sample(f"s{i}", i, label=class_index))

        book.label(label("s2", 0))

        assert book.ledger.baselines == (0, 0)


class TestReopening:
    def test_restores_everything(self, book):
        """Counters, ids, waiting labels and baselines are on disk."""
        book.sample(sample("s", label=1))
        book.label(label("w", 2))
        book.ledger.end()
        before = book.ledger.counts()
        book.close()
        book._ledger = None

        ledger = Ledger(book.path, SCHEMA, book.labels, read_back=lambda *_: None)
        counts, step = ledger.counts(), ledger.step
        ledger.begin(2, 130.0)
        (waited,) = ledger.sample_arrived(sample("w", 1), prediction(), 0)
        (scored,) = ledger.sample_arrived(sample("x", 2, label=0), prediction(), 0)
        ledger.close()

        assert (counts, step) == (before, 1)
        assert waited.state is LabelState.JOINED
        assert scored.scored is not None
        assert (scored.scored.majority_class, scored.scored.no_change_class) == (1, 2)

    @pytest.mark.parametrize(
        "schema",
        [
            Schema((3, 2), SCHEMA.dtype, SCHEMA.classes),
            Schema(SCHEMA.shape, np.dtype(np.int32), SCHEMA.classes),
            Schema(SCHEMA.shape, SCHEMA.dtype, ("bee", "ant", "cat")),
            Schema(SCHEMA.shape, SCHEMA.dtype, ("ant", "bee")),
        ],
    )
    def test_under_another_schema_is_refused(self, book, schema):
        """Payloads would be misread, or classes would change their meaning."""
        book.sample(sample("s"))
        book.ledger.end()
        book.close()

        with pytest.raises(ConfigError, match="another schema"):
            Ledger(book.path, schema, book.labels, read_back=lambda *_: None)

    @pytest.mark.parametrize(("added", "error"), [("dog", None), ("elk", "class 3 was learned as 'dog'")])
    def test_a_grown_class_must_be_added_under_its_name(self, book, added, error):
        """Labels were learned as this class."""
        book.schema, book.settings["unknown_class"] = replace(SCHEMA, spare=1), "grow"
        book.label(Label(Position("labels", 1, 0), 130.0, "s", UNLABELLED, class_name="dog"))
        book.reopen(replace(SCHEMA, classes=(*SCHEMA.classes, added)))

        with pytest.raises(ConfigError, match=error) if error else nullcontext():
            assert book.ledger.class_names == [*SCHEMA.classes, "dog"]

    def test_with_more_classes_works(self, book):
        """A class that is added at the end does not change the others."""
        book.sample(sample("s", label=1))
        book.ledger.end()
        book.close()

        more = Schema(SCHEMA.shape, SCHEMA.dtype, (*SCHEMA.classes, "dog"))
        ledger = Ledger(book.path, more, book.labels, read_back=lambda *_: None)
        ledger.begin(2, 130.0)
        assert ledger.label_arrived(label("s", 3)).state is LabelState.CORRECTED
        ledger.close()


class TestView:
    def test_shows_everything_about_a_label(self, book):
        """State, class, times, prediction, first learning step, and the positions of both records."""
        book.sample(sample("s", offset=4, at_s=100.0))
        book.label(label("s", 1, offset=9, at_s=130.0))
        book.ledger.trained(["s"])
        book.sample(sample("plain", offset=5))
        book.label(label("early", 2))

        view = book.view()
        status, plain, early, unknown = (view.get(name) for name in ("s", "plain", "early", "nobody"))

        assert status is not None
        assert (status.state, status.class_index, status.scored) == (LabelState.TRAINED, 1, True)
        assert (status.sample_position, status.sample_time_s) == (Position("samples", 1, 4), 100.0)
        assert (status.label_position, status.label_time_s) == (Position("labels", 1, 9), 130.0)
        assert (status.predicted_class, status.model_version, status.first_trained_step) == (2, 7, 1)
        assert plain is not None
        assert (plain.state, plain.class_index) == (LabelState.UNLABELLED, None)
        assert early is not None
        assert (early.state, early.sample_position) == (LabelState.WAITING, None)
        assert unknown is None
        np.testing.assert_array_equal(view.payload("s"), payload("s"))
        assert view.payload("early") is None
        view.close()

    def test_knows_nothing_before_there_is_a_ledger(self, tmp_path):
        """A server may start before the learner has ever run."""
        view = LedgerView(tmp_path / "none", SCHEMA)

        assert view.get("s") is None
        assert view.payload("s") is None
        view.close()

    def test_sees_what_was_flushed_from_another_process_while_the_learner_writes(self, book):
        """Other processes see whole flushes only."""
        script = (
            "import sys; from pathlib import Path; import numpy as np\n"
            "from streamlearn.ledger.view import LedgerView; from streamlearn.records import Schema\n"
            "view = LedgerView(Path(sys.argv[1]), Schema((2, 3), np.dtype(np.float32), ('ant', 'bee', 'cat')))\n"
            "print([view.get(name) is not None for name in ('flushed', 'open')], view.payload('flushed').sum())\n"
        )
        book.sample(sample("flushed"))
        book.ledger.end()
        book.ledger.flush()
        book.ledger.begin(2, 130.0)
        book.sample(sample("open", offset=1))

        out = subprocess.run(
            [sys.executable, "-c", script, str(book.path)], capture_output=True, text=True, check=True, timeout=60
        )

        assert out.stdout.strip() == f"[True, False] {payload('flushed').sum()}"
