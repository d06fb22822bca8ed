"""Servers hand out label requests: once, within the budget, of every class, from any process."""

import multiprocessing
import sqlite3
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

from streamlearn.errors import StoreError
from streamlearn.ledger.request_queue import TURNS_REMEMBERED, RequestQueue, connect
from streamlearn.ledger.request_writer import RequestWriter
from streamlearn.records import Position

NOW_S = 1_000_000.5
HOUR_S = 3600.0


def file_of(path, classes, *, prefix="s"):
    """A file with one label request for each of these predicted classes."""
    writer = RequestWriter(path, 10_000)
    probs_BC = np.full((len(classes), 3), 0.2, np.float32)
    probs_BC[np.arange(len(classes)), classes] = 0.6
    positions = [Position("samples", 0, n) for n in range(len(classes))]
    writer.offer([f"{prefix}{n}" for n in range(len(classes))], positions, probs_BC, probs_BC, 5.0)
    writer.flush()
    return writer


def queue_of(path, *, per_hour=1000, again_after_s=86_400.0):
    return RequestQueue(path, per_hour=per_hour, again_after_s=again_after_s)


def ids_of(given):
    return [request.sample_id for request in given.items]


def take_ones(path, times):
    """Take one sample after another, as a server does."""
    queue = queue_of(path)
    return [sample_id for _ in range(times) for sample_id in ids_of(queue.take(1, NOW_S))]


class TestTaking:
    def test_before_any_learner_there_is_nothing(self, tmp_path):
        """The learner creates the file."""
        path = tmp_path / "label-requests.sqlite"

        given = queue_of(path, per_hour=7).take(3, NOW_S)

        assert (given.items, given.budget_left, path.exists()) == ([], 7, False)

    def test_a_file_without_tables_holds_nothing(self, tmp_path):
        """A server may read it before the transaction that creates the tables."""
        path = tmp_path / "label-requests.sqlite"
        path.touch()

        assert queue_of(path).take(3, NOW_S).items == []

    def test_returns_what_the_learner_wrote(self, tmp_path):
        """Position, class and ratings."""
        file_of(tmp_path / "label-requests.sqlite", [2])

        (request,) = queue_of(tmp_path / "label-requests.sqlite").take(1, NOW_S).items

        assert request.position == Position("samples", 0, 0)
        assert (request.sample_id, request.predicted_class, request.offered_at_s) == ("s0", 2, 5.0)
        assert request.utility == request.entropy == pytest.approx(0.8650, abs=1e-4)
        assert request.disagreement == pytest.approx(0.0, abs=1e-6)

    def test_the_best_of_a_class_comes_first(self, tmp_path):
        """Within a class, priority decides."""
        file_of(tmp_path / "label-requests.sqlite", [0] * 9)

        items = queue_of(tmp_path / "label-requests.sqlite").take(9, NOW_S).items

        assert len(items) == 9
        assert items == sorted(items, key=lambda request: request.priority, reverse=True)

    def test_hands_out_no_sample_twice(self, tmp_path):
        """A sample that was handed out is not in the queue."""
        file_of(tmp_path / "label-requests.sqlite", [0, 1, 2, 0, 1])
        queue = queue_of(tmp_path / "label-requests.sqlite")

        taken = [*ids_of(queue.take(3, NOW_S)), *ids_of(queue.take(9, NOW_S))]

        assert sorted(taken) == ["s0", "s1", "s2", "s3", "s4"]

    def test_a_sample_that_got_no_label_is_handed_out_again_later(self, tmp_path):
        """The reply may have been lost, or nobody labelled it."""
        file_of(tmp_path / "label-requests.sqlite", [0])
        queue = queue_of(tmp_path / "label-requests.sqlite", again_after_s=100.0)

        taken = [ids_of(queue.take(1, NOW_S + after_s)) for after_s in (0.0, 99.0, 100.0, 199.0)]

        assert taken == [["s0"], [], ["s0"], []]

    def test_a_peek_takes_nothing(self, tmp_path):
        """Neither a sample nor budget, and the budget does not limit it."""
        file_of(tmp_path / "label-requests.sqlite", [0, 1])
        queue = queue_of(tmp_path / "label-requests.sqlite", per_hour=1)

        seen = queue.take(2, NOW_S, peek=True)

        assert (len(seen.items), seen.budget_left) == (2, 1)
        assert ids_of(queue.take(1, NOW_S)) == ids_of(seen)[:1]

    def test_a_damaged_file_is_a_store_error(self, tmp_path):
        """The route answers 503."""
        path = tmp_path / "label-requests.sqlite"
        path.write_bytes(b"not a database" * 1000)

        with pytest.raises(StoreError, match=r"label-requests\.sqlite"):
            queue_of(path).take(1, NOW_S)


class TestBudget:
    def test_is_shared_by_all_servers(self, tmp_path):
        """Two queues of one file have one budget."""
        file_of(tmp_path / "label-requests.sqlite", [0] * 20)
        queues = [queue_of(tmp_path / "label-requests.sqlite", per_hour=5) for _ in range(2)]

        given = [queues[n % 2].take(3, NOW_S + n) for n in range(3)]

        assert [(len(one.items), one.budget_left) for one in given] == [(3, 2), (2, 0), (0, 0)]

    @pytest.mark.parametrize("start_s", [0.0, 0.001, 0.5, 0.999])
    def test_holds_for_any_hour(self, tmp_path, start_s):
        """The window slides: hand-outs at the end of one hour count in the next."""
        file_of(tmp_path / "label-requests.sqlite", [0] * 40)
        queue = queue_of(tmp_path / "label-requests.sqlite", per_hour=4)
        times = [NOW_S + start_s + 313.7 * n for n in range(40)]

        taken_s = [at_s for at_s in times for _ in queue.take(2, at_s).items]

        assert max(sum(at_s - HOUR_S < other_s <= at_s for other_s in taken_s) for at_s in times) == 4
        assert len(taken_s) >= 12

    def test_the_last_second_of_an_hour_counts_as_a_whole(self, tmp_path):
        """Hand-outs are counted by second."""
        file_of(tmp_path / "label-requests.sqlite", [0] * 9)
        queue = queue_of(tmp_path / "label-requests.sqlite", per_hour=1)

        counts = [len(queue.take(1, NOW_S + after_s).items) for after_s in (0.0, HOUR_S - 0.1, HOUR_S + 1.0)]

        assert counts == [1, 0, 1]

    def test_a_wrong_clock_does_not_block_it(self, tmp_path):
        """Hand-outs a year ahead do not count."""
        file_of(tmp_path / "label-requests.sqlite", [0] * 20)
        queue = queue_of(tmp_path / "label-requests.sqlite", per_hour=5)
        queue.take(5, NOW_S + 365 * 86_400.0)

        assert len(queue.take(5, NOW_S).items) == 5

    def test_its_record_is_bounded_by_the_hour(self, tmp_path):
        """Older seconds are deleted."""
        file_of(tmp_path / "label-requests.sqlite", [0] * 40)
        queue = queue_of(tmp_path / "label-requests.sqlite")

        for n in range(40):
            queue.take(1, NOW_S + n * HOUR_S)

        with connect(tmp_path / "label-requests.sqlite", wait_s=1.0) as db:
            assert db.execute("SELECT count(*) FROM spent").fetchone()[0] <= 2


class TestClasses:
    @pytest.mark.parametrize("at_once", [30, 1])
    def test_a_rare_one_has_more_than_its_share(self, tmp_path, at_once):
        """Its share of 30 would be 12 / 612, less than one. Counts persist between hand-outs."""
        file_of(tmp_path / "label-requests.sqlite", [0] * 300 + [1] * 300 + [2] * 12)
        queue = queue_of(tmp_path / "label-requests.sqlite")

        classes = [
            request.predicted_class for _ in range(0, 30, at_once) for request in queue.take(at_once, NOW_S).items
        ]

        assert classes.count(2) >= 3, classes

    def test_a_new_one_does_not_get_everything(self, tmp_path):
        """Old hand-outs fade, so a new class has little to catch up with."""
        writer = file_of(tmp_path / "label-requests.sqlite", [0] * 1000)
        queue = queue_of(tmp_path / "label-requests.sqlite")
        queue.take(500, NOW_S)
        probs_BC = np.tile(np.float32([0.2, 0.6, 0.2]), (500, 1))
        writer.offer(
            [f"new{n}" for n in range(500)], [Position("samples", 0, n) for n in range(500)], probs_BC, probs_BC, 6.0
        )
        writer.flush()

        classes = [request.predicted_class for request in queue.take(200, NOW_S).items]

        assert classes.count(0) > 20
        with connect(tmp_path / "label-requests.sqlite", wait_s=1.0) as db:
            assert db.execute("SELECT sum(samples) FROM taken").fetchone()[0] == pytest.approx(2 * TURNS_REMEMBERED)


class TestManyAtOnce:
    def test_processes_never_get_the_same_sample(self, tmp_path):
        """Each hand-out is one write transaction."""
        path = tmp_path / "label-requests.sqlite"
        file_of(path, [0, 1, 2] * 60).close()

        with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
            taken = [one for part in pool.map(take_ones, [path] * 3, [50] * 3) for one in part]

        assert len(taken) == len(set(taken)) == 150

    def test_threads_take_while_the_learner_writes(self, tmp_path):
        """Neither blocks the other, and no sample is handed out twice, even if it is offered again."""
        path = tmp_path / "label-requests.sqlite"
        writer = file_of(path, [0, 1, 2] * 20)
        probs_BC = np.full((60, 3), 1 / 3, np.float32)
        begin = threading.Barrier(4)

        def take(_):
            begin.wait(10)
            return take_ones(path, 15)

        with ThreadPoolExecutor(3) as pool:
            parts = [pool.submit(take, n) for n in range(3)]
            begin.wait(10)
            while not all(part.done() for part in parts):
                writer.offer(
                    [f"s{n}" for n in range(60)],
                    [Position("samples", 0, n) for n in range(60)],
                    probs_BC,
                    probs_BC,
                    6.0,
                )
                writer.flush()

        taken = [one for part in parts for one in part.result()]
        assert len(taken) == len(set(taken)) == 45


class TestFile:
    def test_of_another_format_is_refused(self, tmp_path):
        """It is not misread; the learner replaces it."""
        path = tmp_path / "label-requests.sqlite"
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE samples (id)")
        db.close()

        with pytest.raises(sqlite3.DatabaseError, match="expected version 2"):
            connect(path, wait_s=1.0)
