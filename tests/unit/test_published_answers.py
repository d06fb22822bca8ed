"""The learner scores what scorers have published (D10), and learns the same as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_learner
from harness.fakes import MemoryLog
from small_learner import empty_log, learn, newest_checkpoint, status

from streamlearn.app.log import make_codec
from streamlearn.config import Config
from streamlearn.ledger.view import LedgerView
from streamlearn.log.predictions import encode_prediction
from streamlearn.loop.loop import TrainingLoop
from streamlearn.records import NewRecord, Position, Prediction, Sample, TopicPartition
from streamlearn.state.checkpoint import Checkpoint, path_of, steps_in
from streamlearn.state.paths import StatePaths

P = TopicPartition("predictions", 0)
NAMES = ("0", "1", "2")
SAMPLES = 48


def config_in(folder: Path, *, topic: str | None = "predictions", **overrides: Any) -> Config:
    return small_learner.config_in(folder, **{"source.predictions.topic": topic, **overrides})


def class_of(n: int) -> int:
    return n % 3


def published_class(n: int) -> int:
    """Right for three of four samples."""
    return class_of(n) if n % 4 else class_of(n + 1)


def answer(n: int, position: Position | None = None, version: int = 99) -> NewRecord:
    """Of version 99, which no learner here reaches."""
    sample = Sample(position or Position("samples", 0, n), 1e9, f"s{n}", np.zeros(4, np.float32))
    probabilities_C = np.full(3, 0.2, np.float32)
    probabilities_C[published_class(n)] = 0.6
    return encode_prediction(sample, Prediction(published_class(n), probabilities_C, version), NAMES, 0.0)


def filled_log(config: Config, *, answered: range = range(SAMPLES)) -> MemoryLog:
    """Samples, each answered two samples later, and labelled four samples later."""
    log, codec, rng = empty_log(), make_codec(config), np.random.default_rng(0)
    log.create_topics({"predictions": 1})
    for n in range(SAMPLES + 8):
        if n < SAMPLES:
            log.append("samples", [codec.encode_sample(f"s{n}", rng.normal(size=4).astype(np.float32))])
        if n - 2 in answered:
            log.append("predictions", [answer(n - 2)])
        if n - 4 in range(SAMPLES):
            log.append("labels", [codec.labels.encode(f"s{n - 4}", class_of(n - 4))])
    return log


def right(answered: range) -> int:
    return sum(class_of(n) == published_class(n) for n in answered)


def more(log: MemoryLog, config: Config, name: str = "more") -> None:
    """A further micro-batch."""
    encode = make_codec(config).encode_sample
    log.append("samples", [encode(f"{name}{n}", np.ones(4, np.float32)) for n in range(8)])


def predictions(checkpoint: Checkpoint) -> dict[str, int]:
    """The accounts of the predictions topic, without zeros."""
    found = checkpoint.extra["accounts"].items()
    return {name.removeprefix("predictions_"): n for name, n in found if name.startswith("predictions_") and n}


def same(a: Checkpoint, b: Checkpoint, prefix: str = "") -> bool:
    names = [name for name in a.arrays.keys() | b.arrays.keys() if name.startswith(prefix)]
    return bool(names) and all(np.array_equal(a.arrays[name], b.arrays[name], equal_nan=True) for name in names)


class TestScore:
    def test_is_that_of_the_published_answers(self, tmp_path: Path) -> None:
        """Accuracy and log loss, from the predictions topic alone."""
        config, boards = config_in(tmp_path), []

        def note(loop: TrainingLoop, _: object) -> None:
            boards.append(loop.board.report().at_arrival.cumulative)

        learn(config, filled_log(config), on_step=note)

        assert boards[-1].accuracy["teacher"] == right(range(SAMPLES)) / SAMPLES
        losses = [-np.log(0.6 if class_of(n) == published_class(n) else 0.2) for n in range(SAMPLES)]
        assert boards[-1].log_loss == pytest.approx(np.mean(losses), rel=1e-6)
        ledger = status(config)["ledger"]
        assert (ledger["scored"], ledger["scored_published"]) == (SAMPLES, SAMPLES)

    def test_falls_back_to_the_own_prediction(self, tmp_path: Path) -> None:
        """Where no answer was published, or only after the label; the share is in the ledger's counts."""
        never, late = config_in(tmp_path / "never"), config_in(tmp_path / "late")
        log = filled_log(never, answered=range(0))
        own = learn(never, log)
        learn(late, log)
        log.append("predictions", [answer(n) for n in range(SAMPLES)])
        more(log, never)

        of_late = learn(late, log)

        assert predictions(own) == {}
        assert predictions(of_late) == {"read": SAMPLES, "late": SAMPLES}
        assert [status(config)["ledger"]["scored_published"] for config in (never, late)] == [0, 0]
        assert same(own, of_late, "board.prequential.")

    def test_counts_each_kind_of_answer(self, tmp_path: Path) -> None:
        """I7: taken, late, unknown, skipped."""
        config = config_in(tmp_path)
        log = filled_log(config, answered=range(40))
        log.append("predictions", [NewRecord(b"s1", b"{"), NewRecord(b"s1", None), answer(3), answer(700)])
        log.append("predictions", [answer(41, Position("samples", 0, 2)), answer(41, Position("elsewhere", 0, 2))])
        log.append("samples", [make_codec(config).encode_sample("last", np.zeros(4, np.float32))])

        checkpoint = learn(config, log)

        assert predictions(checkpoint) == {"read": 46, "taken": 40, "late": 1, "unknown": 2, "skipped": 3}
        ledger = status(config)["ledger"]
        assert (ledger["scored"], ledger["scored_published"]) == (SAMPLES, 40)
        assert log.records("dead-letters") == []

    def test_is_in_the_state_of_a_label(self, tmp_path: Path) -> None:
        """Version and class are those of the published answer."""
        config = config_in(tmp_path)
        learn(config, filled_log(config, answered=range(4)))

        view = LedgerView(StatePaths(config.state.dir).store, config.schema_.build())
        found = view.get("s0"), view.get("s5")
        view.close()

        assert found[0] is not None
        assert (found[0].predicted_class, found[0].model_version) == (published_class(0), 99)
        assert found[1] is not None
        assert found[1].model_version != 99

    def test_the_published_answer_goes_before_that_of_a_client(self, tmp_path: Path) -> None:
        """Both were answered; the published one is of every sample."""
        config, log = config_in(tmp_path), empty_log()
        log.create_topics({"predictions": 1})
        codec = make_codec(config)
        to_client = Prediction(2, np.array([0.1, 0.1, 0.8], np.float32), 7)
        log.append("samples", [codec.encode_sample(f"s{n}", np.zeros(4, np.float32), answer=to_client) for n in (0, 1)])
        log.append("predictions", [answer(0)])
        log.append("labels", [codec.labels.encode(f"s{n}", 2) for n in (0, 1)])
        versions: list[int] = []

        def note(_: TrainingLoop, report: Any) -> None:
            versions.extend(arrival.scored.prediction.model_version for arrival in report.arrivals)

        learn(config, log, on_step=note)

        assert versions == [99, 7]


class TestLearning:
    def test_is_the_same_with_and_without_the_topic(self, tmp_path: Path) -> None:
        """Same steps, same weights, same replay buffer: a scorer changes nothing but scores."""
        plain, scored = config_in(tmp_path / "plain", topic=None), config_in(tmp_path / "scored")

        log = filled_log(plain)

        a, b = learn(plain, log), learn(scored, log)

        assert a.step == b.step
        assert all(same(a, b, prefix) for prefix in ("learner.", "memory.", "board.traffic.", "board.calibration."))
        assert not same(a, b, "board.prequential.")
        assert {tp: offset for tp, offset in b.next_offsets.items() if tp != P} == a.next_offsets

    def test_ends_whatever_is_in_the_topic(self, tmp_path: Path) -> None:
        """More answers than a step takes, to samples that never come; and none of a scorer that hangs."""
        config = config_in(tmp_path)
        log = filled_log(config, answered=range(0))
        log.append("predictions", [answer(n) for n in range(10_000, 18_000)])

        checkpoint = learn(config, log)

        assert checkpoint.extra["accounts"]["samples_learned"] == SAMPLES
        assert set(predictions(checkpoint)) <= {"read", "unknown"}

    def test_a_trimmed_topic_stops_nothing(self, tmp_path: Path) -> None:
        """Between two runs, and in a replay. What is gone is not scored."""
        config = config_in(tmp_path)
        log = filled_log(config)
        learn(config, log)
        log.trim(P, 20)
        forget_checkpoints(config)

        replayed = learn(config, log)

        assert replayed.extra["accounts"]["samples_learned"] == SAMPLES
        assert predictions(replayed) == {"read": SAMPLES - 20, "taken": SAMPLES - 20, "trimmed": 20}


def forget_checkpoints(config: Config) -> None:
    """Remove all but that of step 0: the journal is replayed from the start, as after kill -9."""
    folder = StatePaths(config.state.dir).checkpoints
    for step in steps_in(folder):
        if step:
            path_of(folder, step).unlink()


class TestRestart:
    def test_a_replay_ends_the_same(self, tmp_path: Path) -> None:
        """Scores, accounts and weights, bit by bit (I3)."""
        config = config_in(tmp_path)
        log = filled_log(config, answered=range(30))
        whole = learn(config, log)
        forget_checkpoints(config)

        replayed = learn(config, log)

        assert same(whole, replayed)
        assert (replayed.step, replayed.extra, replayed.next_offsets) == (whole.step, whole.extra, whole.next_offsets)

    def test_the_topic_may_be_set_and_unset(self, tmp_path: Path) -> None:
        """What is not read any more is left out of the offsets, also in a replay."""
        plain, scored = config_in(tmp_path, topic=None), config_in(tmp_path)
        log = filled_log(scored)

        learn(plain, log)
        more(log, plain, "a")
        with_topic = learn(scored, log)
        more(log, plain, "b")
        forget_newest(scored)
        without = learn(plain, log)

        assert with_topic.next_offsets[P] == SAMPLES
        assert predictions(with_topic) == {"read": SAMPLES, "late": SAMPLES}
        assert without.next_offsets.keys() == plain_partitions(log)
        assert without.extra["accounts"]["samples_learned"] == SAMPLES + 16


def forget_newest(config: Config) -> None:
    folder = StatePaths(config.state.dir).checkpoints
    path_of(folder, newest_checkpoint(config).step).unlink()


def plain_partitions(log: MemoryLog) -> set[TopicPartition]:
    return {*log.end_offsets("samples"), *log.end_offsets("labels")}
