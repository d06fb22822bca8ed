"""The ledger: each way a label can come, what it does, how it is counted, and what views show.

What a set of labels and retractions comes to, in any order, is tested in tests/faults/test_ledger_any_order.py.
"""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamlearn.errors import LogUnavailableError, StoreError
from streamlearn.ledger import Arrival, LabelState, LabelStatus
from streamlearn.ledger.ledger import Ledger
from streamlearn.ledger.rows import (
    EVER_TRAINED,
    KEPT_RECORDS,
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
from streamlearn.records import ERASED, RETRACTED, UNLABELLED, Array, Label, Position, Prediction, Sample, Schema

SCHEMA = Schema((2, 3), np.dtype(np.float32), ("ant", "bee", "cat"))


def payload(sample_id: str) -> Array:
    return np.full(SCHEMA.shape, sum(sample_id.encode()), np.float32)


def sample(sample_id: str, offset: int = 0, at_s: float = 100.0, label: int | None = None) -> Sample:
    return Sample(Position("samples", 1, offset), at_s, sample_id, payload(sample_id), label)


def label(sample_id: str, class_index: int, offset: int = 0, at_s: float = 130.0) -> Label:
    return Label(Position("labels", 1, offset), at_s, sample_id, class_index)


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
        """What was stored at arrival is scored: class, probabilities, version, student, delay by the log's clock."""
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
        """The teacher answered without looking at it."""
        (arrival,) = book.sample(sample("s", label=1))

        assert (arrival.state, arrival.class_index) == (LabelState.JOINED, 1)
        assert arrival.scored is not None
        assert (arrival.scored.delay_s, arrival.scored.class_index) == (0.0, 1)

    def test_is_not_scored_where_nobody_was_asked(self, book):
        """A sample that was passed by under overload is joined and learned."""
        nothing_said = Prediction(UNLABELLED, np.zeros(3, np.float32), 0)
        book.ledger.sample_arrived(sample("s"), nothing_said, UNLABELLED)

        arrival = book.label(label("s", 2))

        assert (arrival.state, arrival.scored) == (LabelState.JOINED, None)
        assert arrival.example is not None
        assert book.counts("joined", "scored") == {"joined": 1, "scored": 0}

    def test_that_repeats_is_a_duplicate_without_effect(self, book):
        """The same class in another record is counted and neither learned nor scored again."""
        book.sample(sample("s", label=1))

        arrival = book.label(label("s", 1))

        assert arrival == Arrival(LabelState.DUPLICATE, "s", 1, labelled_at_s=130.0)
        assert book.counts("read", "joined", "duplicate") == {"read": 2, "joined": 1, "duplicate": 1}

    def test_of_another_class_corrects_it_and_the_first_score_stands(self, book):
        """Policy `last`: the example comes again with the new class; it is not scored again."""
        book.sample(sample("s"))
        book.label(label("s", 0, offset=0))

        arrival = book.label(label("s", 2, offset=1))

        assert (arrival.state, arrival.class_index, arrival.correction) == (LabelState.CORRECTED, 2, True)
        assert arrival.example is not None
        assert (arrival.example.class_index, arrival.scored) == (2, None)
        assert book.counts("joined", "scored", "corrected") == {"joined": 1, "scored": 1, "corrected": 1}

    def test_in_time_scores_against_the_class_that_counts(self, book):
        """The first label counts here, and is older than the sample; the second is in time."""
        book.settings["corrections"] = "first"
        book.label(label("s", 0, at_s=90.0))
        (arrival,) = book.sample(sample("s"))
        assert arrival.scored is None

        scored = book.label(label("s", 2, 1)).scored

        assert scored is not None
        assert (scored.class_index, scored.delay_s) == (0, 30.0)

    def test_of_another_class_is_counted_and_ignored_under_first(self, book):
        """Policy `first`: the first class goes on counting."""
        book.settings["corrections"] = "first"
        book.sample(sample("s", label=0))

        arrival = book.label(label("s", 2))

        assert arrival == Arrival(LabelState.CORRECTED, "s", 0)
        assert book.label(label("s", 2, offset=1)).state is LabelState.DUPLICATE, "of the one before it"

    def test_corrects_the_memory_even_where_no_payload_is_left(self, book):
        """`correction` says so without an example, since the memory holds a payload of its own."""
        book.settings["payload_max_bytes"] = 1
        book.sample(sample("s", label=0))
        book.sample(sample("t"))
        book.next_step()

        arrival = book.label(label("s", 2))

        assert arrival == Arrival(LabelState.CORRECTED, "s", 2, correction=True, labelled_at_s=130.0)


class TestALabelBeforeItsSample:
    def test_waits_and_is_learned_but_never_scored(self, book):
        """A label from before the sample would prove nothing."""
        assert book.label(label("s", 2, at_s=99.0)) == Arrival(LabelState.WAITING, "s", 2)
        assert book.counts("waiting", "joined") == {"waiting": 1, "joined": 0}

        (arrival,) = book.sample(sample("s"))

        assert (arrival.state, arrival.scored) == (LabelState.JOINED, None)
        assert arrival.example is not None
        assert arrival.example.class_index == 2
        assert book.counts("read", "waiting", "joined", "scored") == {"read": 1, "waiting": 0, "joined": 1, "scored": 0}
        assert (len(book.table("labels")), book.table("early")) == (1, {}), "it has moved to its sample"

    def test_scores_where_it_is_younger_and_was_only_read_first(self, book):
        """Nothing can be learned of a label without its payload, so the prediction did not know it."""
        book.label(label("s", 2, at_s=130.0))

        (arrival,) = book.sample(sample("s", at_s=100.0))

        assert arrival.scored is not None
        assert (arrival.scored.class_index, arrival.scored.delay_s) == (2, 30.0)
        assert book.counts("scored") == {"scored": 1}

    def test_leaves_the_score_to_one_that_comes_in_time(self, book):
        """A later record of the same sample scores, once, against the class that counts then."""
        book.label(label("s", 2, offset=0, at_s=99.0))
        book.sample(sample("s", at_s=100.0))

        arrivals = [book.label(label("s", c, offset=1 + i)) for i, c in enumerate((1, 0))]

        scored = [arrival.scored for arrival in arrivals]
        assert scored[0] is not None
        assert (scored[0].class_index, scored[1]) == (1, None)

    def test_can_be_repeated_and_corrected_while_it_waits(self, book):
        """The records after the first are counted at once; the last class is what the sample is joined with."""
        states = [book.label(label("s", c, offset=i)).state for i, c in enumerate((0, 0, 1))]

        (arrival,) = book.sample(sample("s"))

        assert states == [LabelState.WAITING, LabelState.DUPLICATE, LabelState.CORRECTED]
        assert (arrival.state, arrival.class_index) == (LabelState.JOINED, 1)

    def test_comes_first_where_the_sample_brings_one_too(self, book):
        """The label inside is then a further record: a correction here, and in time to be scored."""
        book.label(label("s", 0, at_s=99.0))

        waited, inside = book.sample(sample("s", label=1))

        assert (waited.state, waited.class_index, waited.scored) == (LabelState.JOINED, 0, None)
        assert (inside.state, inside.class_index) == (LabelState.CORRECTED, 1)
        assert inside.example is not None
        assert inside.scored is not None

    def test_becomes_an_orphan_past_the_horizon_and_is_forgotten_one_later(self, book):
        """An orphan can still be asked for; the stream's own clock decides, not the wall's."""
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

    def test_may_come_again_after_it_became_an_orphan(self, book):
        """A new record for a forgotten label is a label like any other."""
        book.settings["horizon_s"] = 50.0
        book.label(label("s", 0))
        book.next_step(now_s=200.0)
        book.next_step(now_s=200.0)
        assert book.ledger.counts().orphan == 1

        assert book.label(label("s", 1, offset=1)).state is LabelState.WAITING
        assert [a.state for a in book.sample(sample("s", at_s=200.0))] == [LabelState.JOINED]
        counts = book.counts("read", "orphan", "joined", "waiting")
        assert counts == {"read": 2, "orphan": 1, "joined": 1, "waiting": 0}

    def test_leaves_the_longest_waiting_an_orphan_when_too_many_wait(self, book):
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
        """A label is known by its position: seen again it tells how far it has come, and is counted once."""
        book.sample(sample("s"))
        first, second = (book.label(label("s", 1)) for _ in range(2))
        book.ledger.trained(["s"])
        third = book.label(label("s", 1))

        assert first.example is not None
        assert second == Arrival(LabelState.SCORED, "s", 1)
        assert third == Arrival(LabelState.TRAINED, "s", 1)
        assert book.counts("read", "duplicate") == {"read": 1, "duplicate": 0}

    def test_is_known_even_after_others(self, book):
        """Not only the newest position is remembered."""
        book.sample(sample("s"))
        for offset, class_index in enumerate((0, 1, 0)):
            book.label(label("s", class_index, offset))

        again = [book.label(label("s", c, offset)).state for offset, c in enumerate((0, 1, 0))]

        assert again == [LabelState.SCORED] * 3
        assert book.counts("read", "corrected") == {"read": 3, "corrected": 2}

    def test_a_sample_is_known_by_its_id(self, book):
        """The caller asks first; an id that comes twice is its to refuse."""
        assert not book.ledger.is_known("s")
        book.sample(sample("s"))
        assert book.ledger.is_known("s")

        with pytest.raises(AssertionError, match="there already"):
            book.sample(sample("s", offset=1))


class TestPayloads:
    def test_past_the_bytes_are_read_back_from_the_log(self, book):
        """The ring forgets the oldest; its position finds it in the log."""
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
        """The sample is known, and there is nothing to learn from: counted, not scored."""
        book.settings["payload_max_bytes"] = SCHEMA.nbytes
        book.sample(sample("old"))
        book.sample(sample("new", offset=1))
        book.next_step()

        arrivals = [book.label(label(name, 0, offset=i)) for i, name in enumerate(("old", "new"))]

        assert arrivals[0] == Arrival(LabelState.EXPIRED, "old", 0)
        assert arrivals[1].state is LabelState.JOINED
        assert book.counts("read", "expired", "scored") == {"read": 2, "expired": 1, "scored": 1}

    def test_found_again_by_a_correction_make_it_a_label_to_learn(self, book):
        """The label is expired no more, and what the correction brings is learned."""
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

    def test_that_cannot_be_read_back_for_now_leave_all_as_it_was(self, book):
        """The log is away: the same label may be shown again, and is then taken as new."""
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
        """The ring's low mark moves at once, payloads go with `prune`, as the mark stood then; the rest stays."""
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


class TestBounds:
    def test_ids_are_forgotten_past_the_horizon_with_their_labels(self, book):
        """After it the id is new again, and a label for it waits."""
        book.settings["horizon_s"] = 20.0
        book.sample(sample("old", at_s=100.0, label=0))
        book.sample(sample("new", offset=1, at_s=119.0))
        book.next_step(now_s=121.0)
        book.next_step(now_s=121.0)

        assert [book.ledger.is_known(name) for name in ("old", "new")] == [False, True]
        assert book.ledger.counts().samples == 1
        assert not book.table("labels")
        assert book.label(label("old", 0, at_s=121.0)).state is LabelState.WAITING

    def test_payloads_are_not_kept_longer_than_their_ids(self, book):
        """Nobody could ask for them."""
        book.settings["horizon_s"] = 20.0
        book.sample(sample("old", at_s=100.0))
        book.next_step(now_s=121.0)
        book.next_step(now_s=121.0)

        assert book.ledger.counts().payload_bytes == 0

    def test_the_clock_never_goes_back(self, book):
        """A caller that names an earlier time than before changes nothing."""
        book.settings["horizon_s"] = 20.0
        book.next_step(now_s=121.0)
        book.next_step(now_s=0.0)
        book.sample(sample("old", at_s=100.0))
        book.next_step(now_s=0.0)

        assert not book.ledger.is_known("old")

    def test_ids_are_bounded_in_number(self, book):
        """The oldest go first, whatever their age."""
        book.settings["max_ids"] = 3
        for i in range(5):
            book.sample(sample(f"s{i}", offset=i))
        book.next_step()

        assert [book.ledger.is_known(f"s{i}") for i in range(5)] == [False, False, True, True, True]

    def test_a_long_silence_is_worked_off_in_bounded_steps(self, book, monkeypatch):
        """A step lets go of so many rows and no more, so it cannot stall; the next steps do the rest."""
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
        """A producer that repeats one label for ever does not grow its row."""
        book.sample(sample("s"))
        for offset in range(40):
            book.label(label("s", 0, offset))

        assert book.label(label("s", 0, 0)).state is LabelState.SCORED, "the first is never forgotten"
        assert book.label(label("s", 0, 39)).state is LabelState.SCORED, "nor the last"
        (data,) = book.table("labels").values()
        assert len(LabelRow.unpack(data).records) == 16


class TestManyRecordsOfOneSample:
    @pytest.mark.parametrize(("corrections", "expected"), [("last", (40, 1)), ("first", (0, 2))])
    @pytest.mark.parametrize("seed", range(5))
    def test_decide_by_the_last_or_the_first_of_all(self, book, seed, corrections, expected):
        """More than are kept, in any order: which counts is exact all the same, and every record is accounted for."""
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

    def test_compare_one_that_belongs_where_others_were_forgotten_with_the_first(self, book):
        """What stood on its other side is not known any more, and was counted already."""
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
        """As if it were labelled then: joined, learned, scored; counted apart, since no record said so."""
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
        """The record takes its place as a joined one; nothing is learned or scored again."""
        book.sample(sample("s"))
        book.next_step(now_s=151.0)
        book.ledger.implied()
        book.ledger.trained(["s"])

        arrival = book.label(label("s", 0, at_s=160.0))

        assert arrival == Arrival(LabelState.TRAINED, "s", 0, labelled_at_s=160.0)
        assert book.counts("implied", "joined", "read", "scored") == {"implied": 0, "joined": 1, "read": 1, "scored": 1}

    @pytest.mark.parametrize("corrections", ["last", "first"])
    def test_is_corrected_by_a_label_of_another_class_whatever_the_policy(self, book, corrections):
        """What was said counts over what was not, even where its time is earlier; the first score stands."""
        book.settings["corrections"] = corrections
        book.sample(sample("s"))
        book.next_step(now_s=151.0)
        book.ledger.implied()

        arrival = book.label(label("s", 2, at_s=120.0))

        assert (arrival.state, arrival.class_index, arrival.correction) == (LabelState.CORRECTED, 2, True)
        assert arrival.example is not None
        assert arrival.scored is None
        assert book.counts("implied", "joined", "corrected") == {"implied": 0, "joined": 1, "corrected": 0}

    def test_expires_where_the_payload_is_gone(self, book):
        """The sample has its class, and there is nothing to learn from."""
        book.settings["payload_max_bytes"] = SCHEMA.nbytes
        book.sample(sample("s"))
        book.sample(sample("t", offset=1, at_s=150.0))
        book.next_step(now_s=151.0)

        (arrival,) = book.ledger.implied()

        assert arrival == Arrival(LabelState.EXPIRED, "s", 0, implied=True)
        assert book.counts("implied", "expired", "scored") == {"implied": 1, "expired": 0, "scored": 0}

    def test_comes_before_the_sample_is_forgotten_where_both_times_are_one(self, book):
        """A horizon as long as the wait for labels loses no sample."""
        book.settings["horizon_s"] = 50.0
        book.sample(sample("s"))
        book.next_step(now_s=151.0)

        arrivals = book.ledger.implied()
        book.next_step(now_s=151.0)

        assert [arrival.sample_id for arrival in arrivals] == ["s"]
        assert book.ledger.implied() == []

    def test_is_given_in_bounded_steps(self, book, monkeypatch):
        """A silence that ends gives many at once: so many a step, the rest in the next."""
        monkeypatch.setattr("streamlearn.ledger.ledger.EXPIRE_PER_STEP", 2)
        for i in range(5):
            book.sample(sample(f"s{i}", offset=i))
        given = []
        for _ in range(4):
            book.next_step(now_s=1000.0)
            given.append([arrival.sample_id for arrival in book.ledger.implied()])

        assert given == [["s0", "s1"], ["s2", "s3"], ["s4"], []]

    def test_is_shown_as_what_it_is(self, book):
        """`GET /label` can tell that nobody said so."""
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
    """A label record without a class. Each is counted as one, whatever stands before it."""

    def test_withdraws_the_label_and_no_score(self, book):
        """The class that counted is gone, for the replay buffer too; the first score stands."""
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

    def test_twice_is_counted_twice_and_changes_nothing_more(self, book):
        """As two records; the very same record has no effect at all."""
        book.sample(sample("s"))
        book.label(label("s", 2))
        book.label(retraction("s"))

        again, same = book.label(retraction("s", 10)), book.label(retraction("s", 10))

        assert (again.state, again.correction) == (LabelState.RETRACTED, False)
        assert same.state is LabelState.RETRACTED
        assert book.counts("read", "joined", "retracted") == {"read": 3, "joined": 1, "retracted": 2}

    def test_is_undone_by_a_later_label_which_is_learned_again(self, book):
        """By the log's time and not by the order of reading."""
        book.sample(sample("s"))
        book.label(label("s", 2))
        book.ledger.trained(["s"])
        book.label(retraction("s"))

        arrival = book.label(label("s", 2, 10, at_s=150.0))

        assert (arrival.state, arrival.class_index, arrival.correction) == (LabelState.CORRECTED, 2, True)
        assert arrival.example is not None
        assert arrival.scored is None
        counted = {"read": 3, "joined": 1, "corrected": 1, "retracted": 1, "trained": 1}
        assert book.counts(*counted) == counted
        status = book.view().get("s")
        assert status is not None
        assert (status.state, status.class_index, status.first_trained_step) == (LabelState.SCORED, 2, None)

    def test_that_is_read_before_its_label_withdraws_it_all_the_same(self, book):
        """The label scores, since its time says so, and is not learned."""
        book.sample(sample("s"))
        assert book.label(retraction("s")).state is LabelState.RETRACTED
        assert book.counts("read", "joined", "retracted") == {"read": 1, "joined": 0, "retracted": 1}

        arrival = book.label(label("s", 2))

        assert (arrival.class_index, arrival.example, arrival.correction) == (RETRACTED, None, False)
        assert arrival.scored is not None
        assert arrival.scored.class_index == 2
        assert book.counts("read", "joined", "retracted") == {"read": 2, "joined": 1, "retracted": 1}

    def test_of_a_label_whose_payload_is_gone_counts_it_as_expired(self, book):
        """As it would be counted without the retraction."""
        book.settings["payload_max_bytes"] = SCHEMA.nbytes
        book.sample(sample("s"))
        book.sample(sample("t", 1))
        book.next_step()
        book.label(retraction("s"))

        book.label(label("s", 2))

        counted = {"read": 2, "joined": 0, "expired": 1, "retracted": 1, "scored": 0}
        assert book.counts(*counted) == counted

    def test_before_its_sample_keeps_the_waiting_label_from_being_learned(self, book):
        """The sample comes last."""
        book.label(label("s", 2))
        book.label(retraction("s"))
        assert book.counts("read", "waiting", "retracted") == {"read": 2, "waiting": 1, "retracted": 1}

        (arrival,) = book.sample(sample("s"))

        assert (arrival.class_index, arrival.example) == (RETRACTED, None)
        assert arrival.scored is not None
        assert book.counts("waiting", "joined", "retracted") == {"waiting": 0, "joined": 1, "retracted": 1}

    def test_is_no_label_in_time(self, book):
        """The label is older than its sample; the retraction is not, and has no class to score against."""
        book.label(label("s", 2, at_s=90.0))
        book.label(retraction("s"))

        (arrival,) = book.sample(sample("s"))

        assert arrival.scored is None
        assert book.counts("scored", "joined", "retracted") == {"scored": 0, "joined": 1, "retracted": 1}

    def test_of_an_unknown_id_waits_for_its_sample_and_is_forgotten_past_the_horizon(self, book):
        """It holds a place in the queue as a waiting label does; it is no orphan, since it was never a label."""
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
        """The time for a label has passed; it is not implied a second time."""
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
        """Somebody has said that there is no label."""
        book.settings |= {"implied_class": "ant", "implied_after_s": 60.0}
        book.sample(sample("s"))
        book.label(retraction("s"))

        book.next_step(now_s=200.0)

        assert book.ledger.implied() == []

    def test_withdraws_the_label_inside_the_sample(self, book):
        """It is a label record like others."""
        book.sample(sample("s", label=1))

        assert book.label(retraction("s")).correction

    def test_is_final_where_the_first_label_counts(self, book):
        """Later labels do not count there, so none can bring the sample back."""
        book.settings["corrections"] = "first"
        book.sample(sample("s"))
        book.label(label("s", 2))
        assert book.label(label("s", 1, 8, at_s=135.0)).class_index == 2

        assert book.label(retraction("s")).class_index == RETRACTED
        assert book.label(label("s", 2, 10, at_s=150.0)).class_index == RETRACTED
        assert book.counts("read", "joined", "corrected", "retracted") == {
            "read": 4,
            "joined": 1,
            "corrected": 2,
            "retracted": 1,
        }

    def test_gives_the_baselines_their_counts_back(self, book):
        """Without any label they have no answer."""
        book.label(label("s", 2))
        assert book.ledger.baselines == (2, 2)
        book.label(label("t", 1, 1))
        book.label(retraction("s"))
        assert book.ledger.baselines == (1, 1)
        book.label(retraction("t", 10))

        assert book.ledger.baselines == (None, None)

    def test_withdraws_a_held_label_once_its_class_is_known(self, book):
        """Its place in the order is before the retraction."""
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
        """More than a row keeps, in any order of reading: what counts is exact, and all are accounted for."""
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
    """A label record that withdraws all labels of its sample, and the payload."""

    def test_withdraws_the_label_for_good(self, book):
        """A later label has no effect, whatever the policy."""
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
        """Neither from the ring nor back from the log."""
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

    def test_twice_is_counted_twice_and_the_same_record_once(self, book):
        """Known by its position, as other labels."""
        book.sample(sample("s"))
        for offset in (9, 9, 10):
            assert book.label(erasure("s", offset)).state is LabelState.ERASED

        assert book.counts("read", "erased") == {"read": 2, "erased": 2}

    def test_of_an_unknown_id_refuses_its_sample_while_it_is_remembered(self, book):
        """As one that is known already: its payload is never stored."""
        book.settings["horizon_s"] = 50.0
        book.label(erasure("s"))
        book.label(retraction("t"))
        assert book.ledger.is_known("s")
        assert not book.ledger.is_known("t")

        for _ in range(2):
            book.next_step(now_s=500.0)

        assert not book.ledger.is_known("s")

    def test_keeps_the_payload_from_the_disk_once_no_rewind_can_need_it(self, book):
        """Until then a replay of the steps before learns from it again, bit for bit."""
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

    def test_is_forgotten_with_its_sample(self, book):
        """Past the horizon nothing is left of it: neither the row nor the note that it is erased."""
        book.settings["horizon_s"] = 50.0
        book.sample(sample("s"))
        book.label(erasure("s"))
        assert len(book.table("erased")) == 1

        for _ in range(2):
            book.next_step(now_s=500.0)

        assert book.table("erased") == {}
        assert not book.ledger.is_known("s")


class TestALabelOfAnUnknownClass:
    def unknown(self, sample_id: str, name: str, offset: int = 0, at_s: float = 130.0) -> Label:
        return Label(Position("labels", 1, offset), at_s, sample_id, UNLABELLED, class_name=name)

    def test_is_held_and_changes_nothing(self, book):
        """Counted by its name, once; a class that is known is joined as ever."""
        book.sample(sample("s"))
        arrivals = [book.label(self.unknown("s", "dog", 0)) for _ in range(2)]
        arrivals.append(book.label(self.unknown("t", "elk", 1)))
        arrivals.append(book.label(self.unknown("u", "dog", 2)))

        assert {(arrival.state, arrival.class_index) for arrival in arrivals} == {(LabelState.HELD, UNLABELLED)}
        assert book.ledger.held() == {"dog": 2, "elk": 1}
        assert book.label(label("s", 1, offset=3)).state is LabelState.JOINED
        assert book.counts("read", "held", "joined", "waiting") == {"read": 4, "held": 3, "joined": 1, "waiting": 0}

    def test_inside_a_sample_is_held_apart_from_it(self, book):
        """The sample is known, without a label, until another one comes."""
        inside = replace(sample("s", label=UNLABELLED), class_name="dog")

        (arrival,) = book.sample(inside)

        assert (arrival.state, arrival.example) == (LabelState.HELD, None)
        assert book.ledger.is_known("s")
        assert book.ledger.held() == {"dog": 1}
        assert book.label(label("s", 1)).state is LabelState.JOINED
        assert book.counts("read", "held", "joined") == {"read": 2, "held": 1, "joined": 1}

    def test_inside_a_sample_takes_a_spare_one_where_the_head_may_grow(self, book):
        """It is joined with the sample it came in; where no class is left, it is held."""
        book.schema, book.settings["unknown_class"] = replace(SCHEMA, spare=1), "grow"
        prediction = Prediction(0, np.full(4, 0.25, np.float32), 7)
        inside = [replace(sample(name, n, label=UNLABELLED), class_name=name) for n, name in enumerate(("dog", "elk"))]

        (dog,), (elk,) = (book.ledger.sample_arrived(record, prediction, 1) for record in inside)

        assert (dog.state, dog.class_index, elk.state) == (LabelState.JOINED, 3, LabelState.HELD)
        assert dog.example is not None
        assert book.ledger.class_names == [*SCHEMA.classes, "dog"]

    def test_that_is_delivered_again_once_its_class_is_known_is_still_held(self, book):
        """Before `release_held` has come to it: the very record must not be counted twice (I7)."""
        book.sample(sample("s"))
        book.label(self.unknown("s", "dog", 0))

        again = book.label(label("s", 1, offset=0))

        assert (again.state, again.class_index) == (LabelState.HELD, UNLABELLED)
        assert book.counts("read", "held", "joined") == {"read": 1, "held": 1, "joined": 0}

    def test_can_be_asked_for_with_its_name(self, book):
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

    def test_is_taken_up_once_the_schema_has_its_class(self, book):
        """With its own time and place: it scores and is learned as any other; the rest stays held."""
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
        """A step looks at so many held labels and no more."""
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
        """The oldest first, and accounted for (I6, I7)."""
        book.more = {"max_held": 2}
        for i in range(5):
            book.label(self.unknown(f"s{i}", f"class {i}", i))

        counts = book.counts("read", "held", "held_dropped")

        assert counts == {"read": 5, "held": 2, "held_dropped": 3}
        assert book.ledger.held() == {"class 3": 1, "class 4": 1}

    def test_is_dropped_past_the_horizon(self, book):
        """Its sample is forgotten by then."""
        book.settings["horizon_s"] = 20.0
        book.label(self.unknown("s", "dog"))
        book.next_step(now_s=119.0)
        early = book.ledger.held()
        book.next_step(now_s=121.0)

        counts = book.counts("held", "held_dropped")

        assert (early, counts) == ({"dog": 1}, {"held": 0, "held_dropped": 1})

    def test_is_bounded_for_one_sample(self, book):
        """A producer that repeats one unknown label for ever does not grow its list."""
        for offset in range(20):
            book.label(self.unknown("s", f"class {offset}", offset))

        assert book.counts("held", "held_dropped") == {"held": 16, "held_dropped": 4}
        assert set(book.ledger.held()) == {f"class {offset}" for offset in range(4, 20)}

    def test_keeps_the_implied_class_away(self, book):
        """Somebody has said what the sample is, and it is not that."""
        book.settings |= {"implied_class": "ant", "implied_after_s": 10.0}
        book.sample(sample("s"))
        book.label(self.unknown("s", "dog"))
        book.next_step(now_s=200.0)

        assert book.ledger.implied() == []


class TestTrained:
    def test_counts_a_sample_once_and_names_the_step_that_learned_its_class(self, book):
        """A correction is learned anew, by a later step; the counter counts samples."""
        book.sample(sample("s", label=0))
        book.ledger.trained(["s", "unknown"])
        book.next_step()
        book.ledger.trained(["s"])
        book.label(label("s", 1))
        book.next_step()
        book.ledger.trained(["s"])

        assert book.ledger.counts().trained == 1
        view = book.view()
        status = view.get("s")
        view.close()
        assert status is not None
        assert (status.state, status.first_trained_step, status.corrected) == (LabelState.TRAINED, 3, True)
        assert status.label_position == Position("labels", 1, 0), "of the label that counts"

    def test_is_of_the_sample_that_has_the_id_now(self, book):
        """An id that was forgotten comes anew: its label of before has gone with its sample."""
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
    """Of labels: the common one is packed shorter."""

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
        """Whatever the number of records, in the queue or not."""
        assert LabelRow.unpack(row.pack()) == row

        learned, first = trained_in(replace(row, state=LabelState.JOINED, trained_step=0).pack(), 9)
        assert first
        assert LabelRow.unpack(learned) == replace(
            row, state=LabelState.JOINED, trained_step=9, flags=row.flags | EVER_TRAINED
        )


class TestBaselines:
    def test_know_only_labels_received_before_the_sample(self, book):
        """Their answer is stored with the sample; labels that come later do not change it."""
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
        """The counts are those of the classes that count, so the order of reading does not matter."""
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
        """When the majority loses a label, all classes are compared anew."""
        for i, class_index in enumerate((1, 2, 2)):
            book.sample(sample(f"s{i}", i, label=class_index))

        book.label(label("s2", 0))

        assert book.ledger.baselines == (0, 0)


class TestReopening:
    def test_finds_everything_again(self, book):
        """Counters, ids, waiting labels and the baselines' knowledge are on disk."""
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
        """Payloads would be misread, or classes change their meaning."""
        book.sample(sample("s"))
        book.ledger.end()
        book.close()

        with pytest.raises(StoreError, match="another schema"):
            Ledger(book.path, schema, book.labels, read_back=lambda *_: None)

    def test_with_more_classes_goes_on(self, book):
        """Classes added at the end change the meaning of none."""
        book.sample(sample("s", label=1))
        book.ledger.end()
        book.close()

        more = Schema(SCHEMA.shape, SCHEMA.dtype, (*SCHEMA.classes, "dog"))
        ledger = Ledger(book.path, more, book.labels, read_back=lambda *_: None)
        ledger.begin(2, 130.0)
        assert ledger.label_arrived(label("s", 3)).state is LabelState.CORRECTED
        ledger.close()


class TestView:
    def test_tells_the_whole_story_of_a_label(self, book):
        """State, class, times, who predicted what, who learned it, and where both records stand in the log."""
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
        """Servers read beside the learner; they see whole flushes only."""
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
