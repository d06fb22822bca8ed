"""Simulated streams: order of samples and labels, plans, sending to a log."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness.fakes import ManualClock, MemoryLog

from streamlearn.errors import ConfigError, LogUnavailableError
from streamlearn.lab.datasets import Dataset
from streamlearn.lab.delays import parse_delay
from streamlearn.lab.drift import parse_drift
from streamlearn.lab.stream import MAX_BEHIND_S, Counts, Event, Stream, StreamPlan, simulate
from streamlearn.log.codec import Codec
from streamlearn.records import NewRecord, Position, Record, Schema

CLASSES = ("a", "b", "c")
ROWS = 12
DATASET = Dataset(
    "toy",
    np.arange(ROWS * 4, dtype=np.uint8).reshape(ROWS, 1, 2, 2),
    np.arange(ROWS, dtype=np.int64) * 7 % 3,
    CLASSES,
    suggested={"schema": {"shape": [1, 2, 2]}},
)
CODEC = Codec(DATASET.schema)


TOPICS = {"samples_topic": "samples", "labels_topic": "labels"}


def plan(**changes: Any) -> StreamPlan:
    return StreamPlan(**({"dataset": DATASET, "order": "file"} | changes))


def events(rate: float | None = None, **changes: Any) -> list[Event]:
    return list(Stream(plan(**changes), rate=rate))


def order_of(records: list[Event]) -> list[str]:
    """Samples by number, labels by number in brackets."""
    numbers = [(kind, (record.key or b"").decode().rpartition("-")[2]) for kind, record in records]
    return [number if kind == "sample" else f"({number})" for kind, number in numbers]


def as_read(record: NewRecord) -> Record:
    return Record(Position("t", 0, 0), record.timestamp_ms or 0, record.key, record.value, record.headers)


def rows_of(records: list[Event]) -> list[int]:
    """The data set's row of each sample."""
    samples = (CODEC.decode_sample(as_read(record)) for kind, record in records if kind == "sample")
    return [int(sample.x.ravel()[0]) // 4 for sample in samples]


def memory_log() -> MemoryLog:
    log = MemoryLog(clock=ManualClock())
    log.create_topics({"samples": 2, "labels": 2})
    return log


class SlowClock(ManualClock):
    """Time passes only by sleeping; every sleep is recorded."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.advance(seconds)


class TestOrderOfRecords:
    @pytest.mark.parametrize(
        ("delay", "expected"),
        [
            ("0", "0 (0) 1 (1) 2 (2) 3 (3)"),
            ("1", "0 1 (0) 2 (1) 3 (2) (3)"),
            ("2", "0 1 2 (0) 3 (1) (2) (3)"),
            ("9", "0 1 2 3 (0) (1) (2) (3)"),
        ],
    )
    def test_a_label_comes_after_delay_later_samples(self, delay: str, expected: str) -> None:
        """With delay 0 it follows its sample; labels not due at the end of the stream come at the end, in order."""
        dataset = Dataset("toy", DATASET.x[:4], DATASET.y[:4], CLASSES)

        assert order_of(events(dataset=dataset, delay=parse_delay(delay))) == expected.split()

    def test_labels_of_random_delays_overtake_each_other_but_never_their_sample(self) -> None:
        """Each label comes between the sample after which it is due and the next one."""
        records = order_of(events(delay=parse_delay("uniform:0:5"), passes=20))

        numbers = [int(entry.strip("()")) for entry in records if entry.startswith("(")]
        assert sorted(numbers) == list(range(20 * ROWS))
        assert numbers != sorted(numbers)
        assert all(records.index(f"({number})") > records.index(str(number)) for number in numbers)
        waits = [
            sum(not entry.startswith("(") for entry in records[records.index(str(n)) : records.index(f"({n})")])
            for n in numbers
        ]
        assert (min(waits), max(waits)) == (1, 6)

    def test_pending_labels_can_be_dropped_at_the_end(self) -> None:
        """They stay pending."""
        stream = Stream(plan(delay=parse_delay("9"), drop_pending=True))

        records = order_of(list(stream))

        assert records[-6:] == ["9", "(0)", "10", "(1)", "11", "(2)"]
        assert stream.pending == 9

    def test_a_prior_drift_resamples_rows_from_its_start(self) -> None:
        """Sample numbers continue over passes: here it starts in the middle of the second."""
        plain, changed = (
            rows_of(events(passes=2, drifts=parse_drift(drift))) for drift in ("none", f"prior:1000000@{ROWS + 6}")
        )

        assert changed[: ROWS + 6] == plain[: ROWS + 6]
        assert len({int(DATASET.y[row]) for row in changed[ROWS + 6 :]}) == 1

    def test_a_delay_in_time_is_converted_by_the_rate(self) -> None:
        """0.5 s at 4 samples per second are 2 samples; without a rate it is refused."""
        assert order_of(events(rate=4.0, delay=parse_delay("0.5s"))) == order_of(events(delay=parse_delay("2")))
        with pytest.raises(ConfigError, match="needs a rate"):
            Stream(plan(delay=parse_delay("0.5s")))

    def test_too_many_waiting_labels_are_an_error(self) -> None:
        """Memory is bounded, and no label is dropped silently."""
        with pytest.raises(ConfigError, match="more than 5 labels would wait"):
            list(Stream(plan(delay=parse_delay("100")), max_pending=5))


class TestPlan:
    def test_the_same_plan_gives_the_same_records(self) -> None:
        """Bit for bit: ids, order, payloads, labels, delays, noise."""
        changes: dict[str, Any] = {
            "order": "shuffle",
            "passes": 3,
            "label_share": 0.5,
            "delay": parse_delay("geometric:4"),
            "drifts": parse_drift("noise:1@10"),
        }

        assert events(**changes, seed=5) == events(**changes, seed=5)
        assert events(**changes, seed=5) != events(**changes, seed=6)

    def test_order_is_file_shuffled_or_class_sorted(self) -> None:
        """Each pass contains every row once and has its own order."""
        shuffled = rows_of(events(order="shuffle", passes=2))
        by_class = DATASET.y[rows_of(events(order="class-sorted"))].tolist()

        assert rows_of(events()) == list(range(ROWS))
        assert sorted(shuffled[:ROWS]) == sorted(shuffled[ROWS:]) == list(range(ROWS))
        assert len({tuple(shuffled[:ROWS]), tuple(shuffled[ROWS:]), tuple(range(ROWS))}) == 3
        assert by_class == sorted(by_class)

    @pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
    def test_a_share_of_the_samples_is_labelled(self, share: float) -> None:
        """Within four standard deviations; 0 and 1 are exact."""
        total = 200 * ROWS
        labels = sum(kind == "label" for kind, _ in events(passes=200, label_share=share))

        assert abs(labels - share * total) <= 4 * (total * share * (1 - share)) ** 0.5

    def test_another_delay_labels_the_same_samples(self) -> None:
        """A change of one setting does not affect the draws of the others."""
        chosen = [
            {
                entry
                for entry in order_of(events(passes=5, label_share=0.3, delay=parse_delay(delay)))
                if entry[0] == "("
            }
            for delay in ("0", "geometric:7")
        ]

        assert chosen[0] == chosen[1]

    def test_a_sample_carries_its_class_only_as_true_label(self) -> None:
        """The label record carries the same class for the learner."""
        records = events(delay=parse_delay("3"))
        samples = [CODEC.decode_sample(as_read(record)) for kind, record in records if kind == "sample"]
        labels = {
            label.sample_id: label for label in (CODEC.labels.decode(as_read(r)) for k, r in records if k == "label")
        }

        assert [sample.true_label for sample in samples] == DATASET.y.tolist()
        assert all(sample.label is None for sample in samples)
        assert all(labels[sample.sample_id].class_index == sample.true_label for sample in samples)
        assert {label.source for label in labels.values()} == {"simulate"}

    def test_drift_changes_sample_truth_and_label_together(self) -> None:
        """From its start on; a late label has the class of its sample."""
        records = events(drifts=parse_drift("permute-labels@4-8,rotate:180@6"), delay=parse_delay("5"))
        samples = [CODEC.decode_sample(as_read(record)) for kind, record in records if kind == "sample"]
        labels = {
            label.sample_id: label for label in (CODEC.labels.decode(as_read(r)) for k, r in records if k == "label")
        }

        moved = [sample.true_label != y for sample, y in zip(samples, DATASET.y.tolist(), strict=True)]
        turned = [not np.array_equal(sample.x, x) for sample, x in zip(samples, DATASET.x, strict=True)]
        assert moved == [4 <= number < 8 for number in range(ROWS)]
        assert turned == [number >= 6 for number in range(ROWS)]
        assert all(labels[sample.sample_id].class_index == sample.true_label for sample in samples)

    def test_records_are_in_the_schema_of_the_config(self) -> None:
        """Reshaped and cast, with the class names of the config; drift is applied to images."""
        schema = Schema((4,), np.dtype("float32"), ("x", "y", "z"))
        records = events(schema=schema, drifts=parse_drift("rotate:180"), id_prefix="p")
        codec = Codec(schema)

        sample, label = codec.decode_sample(as_read(records[0][1])), codec.labels.decode(as_read(records[1][1]))

        assert sample.x.tolist() == [3, 2, 1, 0]
        assert (sample.sample_id, label.sample_id, label.class_index) == ("p0", "p0", 0)
        assert b"x" in (records[1][1].value or b"")

    def test_timestamps_are_spaced_by_the_rate(self) -> None:
        """A label has the timestamp of the sample before it; without a start the log sets timestamps."""
        stamps = [record.timestamp_ms for _, record in events(rate=4.0, start_time_ms=1000, delay=parse_delay("1"))]

        assert stamps[:6] == [1000, 1250, 1250, 1500, 1500, 1750]
        assert stamps == sorted(stamps, key=lambda stamp: stamp or 0)
        assert {record.timestamp_ms for _, record in events()} == {None}
        assert events(start_time_ms=1000)[-1][1].timestamp_ms == 1011

    @pytest.mark.parametrize(
        "changes",
        [
            {"order": "random"},
            {"label_share": 1.1},
            {"label_share": float("nan")},
            {"passes": 0},
            {"seed": -1},
            {"start_time_ms": -1},
            {"schema": Schema((5,), np.dtype("uint8"), CLASSES)},
            {"schema": Schema((4,), np.dtype("uint8"), ("a", "b"))},
            {"schema": Schema((4,), np.dtype("int8"), CLASSES)},
            {"dataset": Dataset("t", np.zeros((2, 3)), np.array([0, 1]), CLASSES), "drifts": parse_drift("rotate:90")},
        ],
    )
    def test_an_invalid_plan_is_refused_on_construction(self, changes: dict[str, Any]) -> None:
        """Before a record is sent."""
        with pytest.raises(ConfigError):
            plan(**changes)

    @pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_rate_out_of_bounds_is_refused(self, rate: float) -> None:
        """It must be positive and finite."""
        with pytest.raises(ConfigError, match="rate"):
            Stream(plan(), rate=rate)


class TestSimulate:
    def test_the_log_holds_exactly_the_records_of_the_plan(self) -> None:
        """Each partition is in the order of the plan; a sample and its label have the same partition number."""
        log, stream = memory_log(), plan(label_share=0.5, delay=parse_delay("geometric:4"), passes=3)

        counts = simulate(log, stream, **TOPICS, batch=5)

        for topic, kind in (("samples", "sample"), ("labels", "label")):
            streamed = [(record.key, record.value) for of_kind, record in Stream(stream) if of_kind == kind]
            held = [[(r.key, r.value) for r in log.records(topic) if r.position.partition == p] for p in (0, 1)]
            assert all(held), "both partitions are used"
            assert held == [[pair for pair in streamed if pair in partition] for partition in held]
            assert len(streamed) == len(held[0]) + len(held[1])
        partition_of = {record.key: record.position.partition for record in log.records("samples")}
        assert all(partition_of[record.key] == record.position.partition for record in log.records("labels"))
        assert counts == Counts(3 * ROWS, len(log.records("labels")), labels_pending=0)

    def test_counts_cover_every_labelled_sample(self) -> None:
        """Its label is a record or pending."""
        changes = {"passes": 20, "delay": parse_delay("50"), "drop_pending": True}

        counts = simulate(memory_log(), plan(**changes), **TOPICS)

        assert counts.samples == 240
        assert counts.labels + counts.labels_pending == 240
        assert min(counts) > 0

    def test_a_label_is_never_in_the_log_before_its_sample(self) -> None:
        """If labels cannot be appended, their samples are in the log; the error is raised."""
        log = memory_log()
        log.fail("append", LogUnavailableError("away"), after=1)

        with pytest.raises(LogUnavailableError):
            simulate(log, plan(), **TOPICS, batch=6)

        assert (len(log.records("samples")), len(log.records("labels"))) == (3, 0)

    def test_stops_between_two_batches(self) -> None:
        """`stop` is checked before each batch; pending labels are not sent."""
        answers = iter([False, False, True])

        counts = simulate(memory_log(), plan(delay=parse_delay("100")), **TOPICS, batch=4, stop=lambda: next(answers))

        assert counts == Counts(samples=8, labels=0, labels_pending=8)

    def test_progress_is_reported_after_each_batch(self) -> None:
        """With the totals so far."""
        reported: list[tuple[int, int]] = []

        simulate(memory_log(), plan(), **TOPICS, batch=10, progress=lambda *counts: reported.append(counts))

        assert reported == [(5, 5), (10, 10), (12, 12)]

    @pytest.mark.parametrize(("rate", "batches"), [(5.0, 12), (40.0, 3)])
    def test_a_rate_spreads_small_batches_over_time(self, rate: float, batches: int) -> None:
        """At a slow rate samples are sent one by one, at a faster one a few per batch."""
        clock, reported = SlowClock(), []

        simulate(
            memory_log(),
            plan(label_share=0.0),
            **TOPICS,
            rate=rate,
            progress=lambda samples, _: reported.append((samples, clock())),
            clock=clock,
            sleep=clock.sleep,
        )

        assert clock() == pytest.approx(ROWS / rate)
        assert len(reported) == batches
        size = ROWS // batches
        assert reported == [
            (samples, pytest.approx((samples - size) / rate)) for samples in range(size, ROWS + 1, size)
        ]

    def test_a_slow_rate_never_sleeps_long_and_stops_while_it_waits(self) -> None:
        """The wait is split, so that a stop is noticed soon."""
        clock = SlowClock()

        counts = simulate(
            memory_log(),
            plan(),
            **TOPICS,
            rate=0.01,
            stop=lambda: clock() > 1.0,
            clock=clock,
            sleep=clock.sleep,
        )

        assert counts.samples == 1
        assert max(clock.slept) <= 0.2
        assert clock() < 1.5

    def test_a_stall_is_followed_by_a_bounded_burst(self) -> None:
        """After a minute without a log, at most `MAX_BEHIND_S` of the rate is sent at once."""
        clock, reported = SlowClock(), []

        def progress(samples: int, _: int) -> None:
            reported.append(clock())
            if samples == 20:
                clock.advance(60.0)

        simulate(
            memory_log(),
            plan(passes=10, label_share=0.0),
            **TOPICS,
            rate=10.0,
            progress=progress,
            clock=clock,
            sleep=clock.sleep,
        )

        burst = sum(at_s == reported[20] for at_s in reported[20:])
        assert 10 * MAX_BEHIND_S <= burst <= 10 * MAX_BEHIND_S + 2
        assert clock() == pytest.approx(60.0 + 10 * ROWS / 10.0 - MAX_BEHIND_S, abs=0.2)

    def test_an_empty_batch_is_refused(self) -> None:
        """It would loop endlessly."""
        with pytest.raises(ConfigError, match="batch"):
            simulate(memory_log(), plan(), **TOPICS, batch=0)
