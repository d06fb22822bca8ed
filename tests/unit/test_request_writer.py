"""The learner rates samples and keeps the best in the queue, whatever happens to the file."""

import contextlib
import sqlite3

import numpy as np
import pytest
from structlog.testing import capture_logs

from streamlearn.ledger.request_queue import RequestQueue, connect
from streamlearn.ledger.request_writer import FADING_LABELS, HANDED_PER_ROW, RequestWriter, age_of, gumbel_of, rate
from streamlearn.records import Position

NOW_S = 1_000_000.0
SURE, UNSURE, TORN = [0.98, 0.01, 0.01], [0.4, 0.3, 0.3], [0.01, 0.98, 0.01]


def offer(writer, ids, probs=UNSURE, *, student=None, now_s=5.0):
    """Offer samples with equal predictions."""
    teacher_BC = np.tile(np.float32(probs), (len(ids), 1))
    student_BC = np.tile(np.float32(probs if student is None else student), (len(ids), 1))
    writer.offer(ids, [Position("samples", 0, n) for n in range(len(ids))], teacher_BC, student_BC, now_s)


def offer_mixed(writer, *groups):
    """Offer groups of (ids, teacher's probabilities, student's probabilities) in one batch."""
    ids = [name for names_, _, _ in groups for name in names_]
    teacher_BC = np.float32([probs for names_, probs, _ in groups for _ in names_])
    student_BC = np.float32([probs for names_, _, probs in groups for _ in names_])
    writer.offer(ids, [Position("samples", 0, n) for n in range(len(ids))], teacher_BC, student_BC, 5.0)


def names(prefix, n):
    return [f"{prefix}{k}" for k in range(n)]


def requests(path, n=1000):
    """Label requests that a server could hand out now, by id."""
    queue = RequestQueue(path, per_hour=1, again_after_s=1e9)
    return {request.sample_id: request for request in queue.take(n, NOW_S, peek=True).items}


def waiting(path):
    return {*requests(path)}


def take(path, n, now_s=NOW_S):
    queue = RequestQueue(path, per_hour=10_000, again_after_s=50.0)
    return [request.sample_id for request in queue.take(n, now_s).items]


def worth(request):
    """Its priority without the noise."""
    return request.priority - gumbel_of(request.sample_id)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "label-requests.sqlite"


class TestRating:
    def test_of_two_that_agree_is_their_entropy(self):
        """In units of log C. There is no disagreement."""
        probs_BC = np.float32([[1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])

        ratings = rate(probs_BC, probs_BC)

        expected_B = [1.0, np.log(2) / np.log(3), 0.0]
        np.testing.assert_allclose(ratings.utility_B, expected_B, atol=1e-6)
        np.testing.assert_allclose(ratings.entropy_B, expected_B, atol=1e-6)
        np.testing.assert_allclose(ratings.disagreement_B, 0.0, atol=1e-6)

    def test_of_two_that_are_sure_of_different_things_is_their_disagreement(self):
        """The entropy of each is 0. Their mean has two equally likely classes."""
        ratings = rate(np.float32([[1.0, 0.0, 0.0]]), np.float32([[0.0, 1.0, 0.0]]))

        assert ratings.entropy_B == pytest.approx(0.0)
        assert ratings.disagreement_B == pytest.approx(1.0)
        assert ratings.utility_B == pytest.approx(np.log(2) / np.log(3))

    def test_disagreement_excludes_the_entropy_of_each(self):
        """By hand: m is (3/4, 1/4), H(m) .5623, H(teacher) ln 2, H(student) 0, so JS is .2158 of ln 2."""
        ratings = rate(np.float32([[0.5, 0.5]]), np.float32([[1.0, 0.0]]))

        assert ratings.disagreement_B == pytest.approx(0.3113, abs=1e-4)

    def test_stays_within_its_bounds(self):
        """From 0 to 1, in spite of rounding."""
        rng = np.random.default_rng(0)
        teacher_BC = rng.dirichlet(np.full(7, 0.05), 500).astype(np.float32)
        student_BC = rng.dirichlet(np.full(7, 0.05), 500).astype(np.float32)

        for rated_B in rate(teacher_BC, student_BC):
            assert rated_B.min() >= 0.0
            assert rated_B.max() <= 1.0

    def test_noise_is_standard_gumbel_and_a_function_of_the_id(self):
        """Mean 0.577, variance pi^2 / 6."""
        drawn = np.array([gumbel_of(name) for name in names("n", 20_000)])

        assert gumbel_of("n7") == drawn[7]
        assert drawn.mean() == pytest.approx(0.5772, abs=0.03)
        assert drawn.var() == pytest.approx(np.pi**2 / 6, rel=0.05)

    def test_half_the_labels_are_half_the_weight(self):
        """Up to the fading horizon. Past it, one horizon of labels is a factor of e."""
        assert age_of(200) - age_of(100) == pytest.approx(np.log(2))
        assert age_of(9 * FADING_LABELS) - age_of(8 * FADING_LABELS) == pytest.approx(1.0)
        assert age_of(0) == age_of(1) == 0.0


class TestKeeping:
    def test_offers_are_written_by_a_flush(self, path):
        """Not before: the loop does no I/O within a step."""
        writer = RequestWriter(path, 10)
        offer(writer, ["a", "b"])

        before = waiting(path)
        writer.flush()

        assert (before, waiting(path)) == (set(), {"a", "b"})

    def test_the_unsure_are_kept_before_the_sure(self, path):
        """The pool is bounded. The order is random in part."""
        writer = RequestWriter(path, 100)
        offer_mixed(writer, (names("sure", 500), SURE, SURE), (names("unsure", 100), UNSURE, UNSURE))
        writer.flush()

        kept = waiting(path)

        assert len(kept) == len(writer) == 100
        assert sum(name.startswith("unsure") for name in kept) >= 45

    def test_disagreement_raises_the_rating(self, path):
        """Teacher and student are sure of different classes: one of them is wrong."""
        writer = RequestWriter(path, 100)
        offer_mixed(writer, (names("same", 500), SURE, SURE), (names("torn", 100), SURE, TORN))
        writer.flush()

        assert sum(name.startswith("torn") for name in waiting(path)) >= 45

    def test_some_are_kept_that_the_network_is_sure_of(self, path):
        """A class that it has never seen may look like one that it knows."""
        writer = RequestWriter(path, 100)
        sure = [1.0, 0.0, 0.0]
        offer_mixed(writer, (names("sure", 900), sure, sure), (names("unsure", 100), UNSURE, UNSURE))
        writer.flush()

        assert 5 <= sum(name.startswith("sure") for name in waiting(path)) <= 60

    def test_every_predicted_class_is_kept(self, path):
        """A rare class is not displaced by a class with high uncertainty."""
        writer = RequestWriter(path, 30)
        offer(writer, names("common", 200), UNSURE)
        offer(writer, names("rare", 10), [0.0, 0.0, 1.0])
        writer.flush()

        assert sum(name.startswith("rare") for name in waiting(path)) == 10

    def test_ratings_from_before_most_labels_fade(self, path):
        """An untrained network is unsure of everything."""
        writer = RequestWriter(path, 50)
        offer(writer, names("old", 50), UNSURE)
        writer.labelled(names("other", 500))
        offer(writer, names("new", 50), [0.9, 0.05, 0.05])
        writer.flush()

        assert sum(name.startswith("new") for name in waiting(path)) >= 45

    def test_ratings_are_relative_to_recent_samples(self, path):
        """Moderate uncertainty among confident predictions is worth more than high uncertainty among uncertain ones."""
        writer = RequestWriter(path, 10_000)
        offer(writer, names("before", 300), UNSURE)
        offer(writer, names("sure", 1500), SURE)
        offer(writer, ["after"], [0.9, 0.05, 0.05])

        writer.flush()

        written = requests(path, 10_000)
        assert worth(written["after"]) > worth(written["before0"]) + 1.0

    def test_memory_is_bounded_between_two_flushes(self, path):
        """However many samples are offered."""
        writer = RequestWriter(path, 10)

        sizes = []
        for step in range(50):
            offer(writer, names(f"{step}-", 7))
            sizes.append(len(writer))

        assert max(sizes) < 20

    def test_non_finite_rows_are_skipped(self, path):
        """A diverged network gives no ratings."""
        writer = RequestWriter(path, 10)
        offer(writer, ["bad"], [np.nan, np.nan, np.nan])
        offer(writer, ["good"])
        writer.flush()

        assert waiting(path) == {"good"}

    def test_no_rows_are_accepted(self, path):
        """A step may have no fresh samples."""
        writer = RequestWriter(path, 10)
        writer.offer([], [], np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), 5.0)

        assert len(writer) == 0


class TestOff:
    def test_nothing_is_kept_and_no_file_is_created(self, path):
        """With rows = 0 the loop calls all methods as usual."""
        writer = RequestWriter(path, 0)
        offer(writer, ["a"])
        writer.labelled(["a"])
        writer.flush()
        writer.close()

        assert (len(writer), path.exists()) == (0, False)


class TestLeaving:
    @pytest.mark.parametrize("flushed", [False, True])
    def test_a_labelled_sample_is_removed(self, path, flushed):
        """Whether it is in the file already or not."""
        writer = RequestWriter(path, 10)
        offer(writer, ["a", "b"])
        if flushed:
            writer.flush()
        writer.labelled(["a"])
        writer.flush()

        assert waiting(path) == {"b"}

    @pytest.mark.parametrize("seen", [False, True])
    def test_a_labelled_sample_is_not_handed_out_again(self, path, seen):
        """Whether the learner has read the hand-out before the label or not."""
        writer = RequestWriter(path, 10)
        offer(writer, ["a"])
        writer.flush()
        take(path, 1)
        if seen:
            writer.flush()
        writer.labelled(["a"])
        writer.flush()

        assert take(path, 1, NOW_S + 1000.0) == []

    def test_old_requests_are_removed(self, path):
        """From pool and file, handed out or not: the payload may be evicted."""
        writer = RequestWriter(path, 10, keep_s=10.0)
        offer(writer, ["handed", "old"], now_s=5.0)
        writer.flush()
        take(path, 1)
        offer(writer, ["older"], now_s=4.0)
        offer(writer, ["young"], now_s=6.0)
        offer(writer, ["newest"], now_s=16.0)
        writer.flush()

        assert len(writer) == 2
        assert sorted(take(path, 9, NOW_S + 1000.0)) == ["newest", "young"]

    def test_handed_out_samples_make_room_and_are_not_taken_again(self, path):
        """A replay after a crash offers the same samples again."""
        writer = RequestWriter(path, 4)
        offer(writer, names("a", 4))
        writer.flush()
        taken = take(path, 4)
        writer.flush()
        room = len(writer)
        offer(writer, [*taken, "b"])
        writer.flush()

        assert room == 0
        assert waiting(path) == {"b"}

    def test_hand_outs_are_read_after_earlier_ones_were_labelled(self, path):
        """Rows of labelled samples leave the file; turns of later hand-outs must still be larger."""
        writer = RequestWriter(path, 4)
        for step in range(3):
            offer(writer, names(f"{step}-", 4))
            writer.flush()
            taken = take(path, 4)
            writer.flush()
            room = len(writer)
            writer.labelled(taken)
            writer.flush()

            assert sorted(taken) == sorted(names(f"{step}-", 4))
            assert room == 0

    def test_the_memory_of_hand_outs_is_bounded(self, path):
        """The oldest are removed from the file."""
        writer = RequestWriter(path, 2)
        for step in range(3 * HANDED_PER_ROW):
            offer(writer, names(f"{step}-", 2))
            writer.flush()
            take(path, 2)
        writer.flush()

        with contextlib.closing(connect(path, wait_s=1.0)) as db:
            ids = {row[0] for row in db.execute("SELECT id FROM samples")}
        assert len(ids) == 2 * HANDED_PER_ROW
        assert f"{3 * HANDED_PER_ROW - 1}-0" in ids


class TestRestart:
    def test_restores_the_file(self, path):
        """Requests, hand-outs and the number of labels."""
        writer = RequestWriter(path, 10)
        writer.labelled(names("other", 50))
        offer(writer, names("a", 6))
        writer.flush()
        taken = take(path, 2)
        writer.close()

        again = RequestWriter(path, 10)
        offer(again, [*taken, "b"])
        again.flush()

        assert waiting(path) == {*names("a", 6), "b"} - set(taken)
        with contextlib.closing(connect(path, wait_s=1.0)) as db:
            assert db.execute("SELECT labels FROM writer").fetchone() == (50,)

    def test_rates_as_without_a_restart(self, path, tmp_path):
        """The mean that ratings are relative to is restored too."""
        whole_path = tmp_path / "whole.sqlite"
        stopped, whole = RequestWriter(path, 1000), RequestWriter(whole_path, 1000)
        for writer in (stopped, whole):
            offer(writer, names("a", 60), SURE)
            offer(writer, names("b", 250), UNSURE)
        stopped.flush()
        stopped.close()
        stopped = RequestWriter(path, 1000)
        for writer in (stopped, whole):
            offer(writer, ["c"], TORN)
            writer.flush()

        assert requests(path)["c"].priority == pytest.approx(requests(whole_path)["c"].priority, rel=1e-12)

    def test_a_smaller_pool_keeps_the_best(self, path):
        """The setting may change between two runs."""
        offer(writer := RequestWriter(path, 10), names("a", 10))
        writer.flush()
        writer.close()

        RequestWriter(path, 3).flush()

        assert len(waiting(path)) == 3


class TestBadFile:
    def test_a_damaged_file_is_replaced(self, path):
        """Learning continues. One log event reports the failure, one the recovery."""
        path.write_bytes(b"not a database" * 1000)

        with capture_logs() as logs:
            writer = RequestWriter(path, 10)
            offer(writer, ["a"])
            writer.flush()
            writer.flush()

        assert waiting(path) == {"a"}
        assert [line["event"] for line in logs] == ["label_requests_failed", "label_requests_recovered"]

    def test_damage_while_it_is_open_loses_no_request(self, path):
        """The pool is in memory."""
        writer = RequestWriter(path, 10)
        offer(writer, ["a"])
        writer.flush()
        with contextlib.closing(connect(path, wait_s=1.0)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        path.write_bytes(b"\0" * path.stat().st_size)
        writer.close()

        offer(writer, ["b"])
        writer.flush()
        writer.flush()

        assert waiting(path) == {"a", "b"}

    def test_hand_outs_of_the_new_file_are_read(self, path):
        """Their turns start at 1 again."""
        writer = RequestWriter(path, 10)
        offer(writer, names("a", 4))
        writer.flush()
        take(path, 3)
        writer.flush()
        writer.close()
        path.write_bytes(b"not a database" * 1000)
        writer.flush()
        writer.flush()

        take(path, 1)
        writer.flush()

        assert len(writer) == 0

    def test_a_deleted_file_is_replaced(self, path):
        """An operator may delete it."""
        writer = RequestWriter(path, 10)
        offer(writer, ["a"])
        writer.flush()
        for left in path.parent.iterdir():
            left.unlink()

        writer.flush()

        assert waiting(path) == {"a"}

    def test_a_file_of_another_format_is_replaced(self, path):
        """After a downgrade."""
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version = 99")

        writer = RequestWriter(path, 10)
        offer(writer, ["a"])
        writer.flush()

        assert waiting(path) == {"a"}

    def test_a_locked_file_is_written_at_the_next_flush(self, path):
        """The loop waits for a moment, continues, and logs it once."""
        writer = RequestWriter(path, 10)
        offer(writer, ["a"])
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other, capture_logs() as logs:
            other.execute("BEGIN IMMEDIATE")
            writer.flush()
            writer.flush()
            other.execute("ROLLBACK")
            held = waiting(path)
            writer.flush()

        assert (held, waiting(path)) == (set(), {"a"})
        assert [line["event"] for line in logs] == ["label_requests_failed", "label_requests_recovered"]
        assert not logs[0]["replaced"]

    def test_a_missing_folder_stops_nothing(self, tmp_path):
        """The file is created when the folder is back."""
        path = tmp_path / "away" / "label-requests.sqlite"
        writer = RequestWriter(path, 10)
        offer(writer, ["a"])
        writer.flush()
        path.parent.mkdir()
        writer.flush()

        assert waiting(path) == {"a"}
