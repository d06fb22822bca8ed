"""The training loop on a log in memory: outcomes of records, replay, cadence, labels withdrawn and erased."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.fakes import ManualClock
from small_learner import L, Reports, S, config_in, empty_log, filled_log, learn, loop_on, newest_checkpoint, run_loop
from structlog.testing import capture_logs

from streamlearn.app.log import make_codec
from streamlearn.errors import LogError, LogUnavailableError
from streamlearn.learn.batching import MicroBatcher
from streamlearn.ledger import LabelState
from streamlearn.ledger.view import LedgerView
from streamlearn.loop.guarding import Guarding
from streamlearn.loop.log_access import LogAccess
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport
from streamlearn.records import RETRACTED, NewRecord, Position, Prediction, Record
from streamlearn.state import checkpoint, journal
from streamlearn.state.checkpoint import Checkpoint, path_of
from streamlearn.state.files import write_whole
from streamlearn.state.journal import Journal
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import PublishedDir


def ids_in(arrays: dict[str, Any]) -> set[str]:
    """Ids of the rows of a saved replay buffer."""
    ends = arrays["memory.id_offsets"].tolist()
    return {arrays["memory.ids"].tobytes()[a:b].decode() for a, b in itertools.pairwise(ends)}


class TestOutcomes:
    def test_every_record_has_one_outcome(self, tmp_path: Path) -> None:
        """Learned, duplicate id, dead-lettered; labels likewise (I7)."""
        config = config_in(tmp_path, **{"labels.unknown_class": "refuse"})
        log, codec = filled_log(config), make_codec(config)
        log.append("samples", [codec.encode_sample("s3", np.zeros(4, np.float32))])
        log.append("samples", [NewRecord(b"bad", b"{"), NewRecord(b"nan", b'{"x": [1, 2, NaN, 4]}')])
        log.append(
            "labels", [codec.labels.encode("s0", 2), codec.labels.encode("unseen", 1), NewRecord(b"s1", b"wolf")]
        )

        loop = run_loop(config, log)

        accounts, counts = loop.accounts, loop.ledger.counts()
        samples = (accounts.samples_learned, accounts.samples_duplicate_id, accounts.samples_dead_lettered)
        assert (accounts.samples_read, samples) == (43, (40, 1, 2))
        assert (accounts.labels_read, accounts.labels_dead_lettered) == (21, 1)
        assert (counts.joined, counts.corrected, counts.waiting) == (18, 1, 1)

    def test_a_label_of_an_unknown_class_is_held(self, tmp_path: Path) -> None:
        """By default it is no dead letter, because the class may get a name later."""
        config = config_in(tmp_path)
        log = filled_log(config)
        log.append("labels", [NewRecord(b"s1", b"wolf")])

        loop = run_loop(config, log)

        assert (loop.ledger.counts().held, loop.ledger.held()) == (1, {"wolf": 1})

    @pytest.mark.parametrize(("policy", "held"), [("hold", {"wolf": 1}), ("grow", {}), ("refuse", {})])
    def test_a_sample_is_kept_if_the_label_inside_is_unknown(
        self, tmp_path: Path, policy: str, held: dict[str, int]
    ) -> None:
        """The label is held, or takes a spare class. Only where labels are refused the record is a dead letter."""
        config = config_in(tmp_path, **{"schema.max_classes": 5, "labels.unknown_class": policy})
        log = filled_log(config, 8)
        log.append("samples", [NewRecord(b"new", b'{"x": [1, 2, 3, 4], "label": "wolf"}')])

        loop = run_loop(config, log)

        kept = policy != "refuse"
        assert (loop.accounts.samples_learned, len(log.records("dead-letters"))) == (8 + kept, 1 - kept)
        assert (loop.accounts.labels_inline, loop.ledger.held()) == (kept, held)
        assert loop.ledger.counts().joined == 2 + (policy == "grow")

    @pytest.mark.parametrize("room", [4, 5])
    def test_held_labels_are_learned_once_their_class_has_a_name(self, tmp_path: Path, room: int) -> None:
        """The operator adds the name to schema.classes and restarts; even the last spare class can be named."""
        config = config_in(tmp_path, **{"schema.max_classes": room})
        log = filled_log(config)
        log.append("labels", [NewRecord(b"s1", b"wolf")])
        learn(config, log)

        named = config_in(tmp_path, **{"schema.classes": ["0", "1", "2", "wolf"], "schema.max_classes": room})
        log.append("samples", [make_codec(named).encode_sample("more", np.zeros(4, np.float32))])
        counts: list[Any] = []
        learn(named, log, on_step=lambda loop, _: counts.append(loop.ledger.counts()))

        assert (counts[-1].held, counts[-1].joined, counts[-1].trained) == (0, 19, 19)

    def test_a_new_class_takes_a_spare_output(self, tmp_path: Path) -> None:
        """With `grow` it is learned and published; a restart knows its name. Without a spare output it is held."""
        config = config_in(tmp_path, **{"schema.max_classes": 5, "labels.unknown_class": "grow"})
        log = filled_log(config)
        log.append("labels", [NewRecord(f"s{n}".encode(), b"wolf") for n in (1, 3)] + [NewRecord(b"s5", b"bear")])
        log.append("labels", [NewRecord(b"s7", b"no spare class is left")])
        learn(config, log)
        log.append("samples", [make_codec(config).encode_sample("more", np.zeros(4, np.float32))])
        seen: list[tuple[int, dict[str, int]]] = []

        learn(config, log, on_step=lambda loop, _: seen.append((loop.ledger.counts().trained, loop.ledger.held())))

        published = PublishedDir(StatePaths(tmp_path).published).newest()
        assert published is not None
        assert json.loads(published.metadata["classes"]) == ["0", "1", "2", "wolf", "bear"]
        assert seen[-1] == (21, {"no spare class is left": 1})

    def test_a_sample_sent_again_with_its_label_is_a_label(self, tmp_path: Path) -> None:
        """The sample is a duplicate, but the label is new."""
        config = config_in(tmp_path)
        log = filled_log(config, 8)
        log.append("samples", [make_codec(config).encode_sample("s7", np.zeros(4, np.float32), label=1)])

        loop = run_loop(config, log)

        assert (loop.accounts.samples_duplicate_id, loop.ledger.counts().joined) == (1, 3)

    def test_a_record_without_key_and_value_is_dead_lettered(self, tmp_path: Path) -> None:
        """Other clients can write one. Its letter is empty."""
        config = config_in(tmp_path)
        log = filled_log(config, 8)
        log.put(Record(Position("samples", 0, 8), 1_700_000_000_000, None, None))

        loop = run_loop(config, log)

        assert loop.accounts.samples_dead_lettered == 1
        (letter,) = log.records("dead-letters")
        assert letter.value == b""

    def test_a_step_is_not_journaled_before_its_dead_letters_are_durable(self, tmp_path: Path) -> None:
        """So a restart forms the step again, and writes them."""
        config = config_in(tmp_path)
        log = filled_log(config, 7)
        log.append("samples", [NewRecord(b"k", b"junk")])
        log.fail("append", LogUnavailableError("away"))
        impatient = LogAccess(
            log, make_codec(config), dead_letters="dead-letters", stopping=threading.Event(), retry_s=()
        )

        with loop_on(config, log, log=impatient) as loop, pytest.raises(LogError, match="will not be dropped"):
            loop.run(threading.Event(), until_end=True)

        assert list(journal.read_journal(StatePaths(tmp_path).journal, 0)) == []


class TestPredictions:
    def test_the_guard_gets_every_label_of_a_known_sample(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the version that answered the sample, which is older than the label."""
        config, seen = config_in(tmp_path, **{"batch.fresh": 2}), list[int]()
        monkeypatch.setattr(Guarding, "compared", lambda _, *, right, version: seen.append(version))

        loop = run_loop(config, filled_log(config))

        assert len(seen) == 18
        assert all(0 <= version < loop.learner.step for version in seen)
        assert len(set(seen)) > 5

    def test_a_sample_without_a_finite_answer_is_not_scored(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its step is skipped. Its label is joined, and does not stop the learner."""
        (tmp_path / "of_counts.py").write_text(
            "import torch\n"
            "class Net(torch.nn.Module):\n"
            "    def __init__(self):\n        super().__init__(); self.inner = torch.nn.Linear(4, 3)\n"
            "    def forward(self, x):\n        return self.inner(torch.log1p(x))\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        overrides = {"model.factory": "of_counts:Net", "model.options": {}, "model.normalise": False}
        config = config_in(tmp_path / "state", **overrides, **{"learn.noise": "none"})
        log, codec = empty_log(), make_codec(config)
        for n in range(24):
            x = np.full(4, -2.0 if n == 9 else n / 24, np.float32)
            log.append("samples", [codec.encode_sample(f"s{n}", x, true_label=n % 3)])
        log.append("labels", [codec.labels.encode(f"s{n}", n % 3) for n in range(24)])

        loop = run_loop(config, log)

        counts = loop.ledger.counts()
        assert (counts.joined, counts.scored, loop.accounts.samples_learned) == (24, 23, 24)

    def test_the_answer_that_a_client_got_is_scored(self, tmp_path: Path) -> None:
        """Half of the samples have a pinned version's confident answer, and only these get labels."""
        config = config_in(tmp_path, **{"learn.learning_rate": 0.1})
        log, codec, rng = empty_log(), make_codec(config), np.random.default_rng(0)
        pinned = Prediction(2, np.array([0.0, 0.01, 0.99], np.float32), 1000)
        for n in range(400):
            x, answer = rng.normal(size=4).astype(np.float32), pinned if n % 2 else None
            log.append("samples", [codec.encode_sample(f"s{n}", x, answer=answer)])
            if n % 4 == 1:
                log.append("labels", [codec.labels.encode(f"s{n}", n % 3)])

        traffic = run_loop(config, log).board.report().traffic

        assert (traffic.labelled, traffic.compared) == (100, 100)
        assert (traffic.confidence_gap, traffic.class_mix_distance) == (pytest.approx(0.0), 0.0)
        assert traffic.confidence < 0.9, "the other half has the learner's own answers"

    def test_the_correction_of_the_prior_changes_answers_and_not_weights(self, tmp_path: Path) -> None:
        """Targets, costs and averages are the same, bit by bit; the teacher's header has the offsets."""
        states, logs = {}, {}
        for on in (True, False):
            overrides = {"learn.correct_prior": on, "learn.twin": "measure", "schema.classes": 2}
            config = config_in(tmp_path / str(on), **overrides)
            log, codec, rng = empty_log(), make_codec(config), np.random.default_rng(0)
            for n in range(800):
                y = int(rng.random() < 0.1)
                x = (rng.normal(size=4) + 0.5 * y).astype(np.float32)
                log.append("samples", [codec.encode_sample(f"s{n}", x, label=y)])
            loop = run_loop(config, log)
            states[on], logs[on] = loop.learner.state(), loop.board.report()
            published = PublishedDir(StatePaths(config.state.dir).published).newest()
            assert published is not None
            header = json.loads(published.metadata.get("log_offsets", "[0, 0]"))
            assert header == pytest.approx(loop.learner.log_offsets.tolist())
            assert loop.learner.log_offsets.any() == on

        assert all(np.array_equal(array, states[False][name], equal_nan=True) for name, array in states[True].items())
        with_it, without = logs[True].at_arrival.cumulative, logs[False].at_arrival.cumulative
        assert with_it.log_loss < without.log_loss
        assert logs[True].calibration == logs[False].calibration

    def test_a_threshold_decides_the_class_that_is_scored(self, tmp_path: Path) -> None:
        """A threshold that is always reached: one class is always answered."""
        config = config_in(tmp_path, **{"score.thresholds": {"2": 1e-6}})

        found = run_loop(config, filled_log(config)).board.report().at_arrival.windowed

        assert [one.recall for one in found.by_class] == [0.0, 0.0, 1.0]

    def test_a_promotion_resets_the_baselines_of_the_drift_monitor(self, tmp_path: Path) -> None:
        """The answers of one candidate are no baseline for those of another. No other step resets them."""
        config = config_in(tmp_path, **{"guard.on": False, "drift.reaction": "alarm"})
        served, reset = [0], list[int]()

        def look(loop: TrainingLoop, report: StepReport) -> None:
            served.append(loop.learner.served)
            if report.step == 1:
                loop.guarding.another_answers = lambda: reset.append(loop.learner.step + 1)  # type: ignore[method-assign]
                loop.election.update = lambda *_: 1 - loop.learner.served  # type: ignore[method-assign]

        learn(config, filled_log(config, 48), on_step=look)

        changed = [step for step in range(2, len(served)) if served[step] != served[step - 1]]
        assert changed
        assert reset == changed


class TestReplayBuffer:
    def test_an_outlier_is_not_replayed(self, tmp_path: Path) -> None:
        """Without input statistics: at each draw it would dominate the batch statistics."""
        config = config_in(tmp_path, **{"model.normalise": False})
        log, codec = empty_log(), make_codec(config)
        for n in range(24):
            x = np.full(4, 1e19 if n == 9 else n / 24, np.float32)
            log.append("samples", [codec.encode_sample(f"s{n}", x)])
        log.append("labels", [codec.labels.encode(f"s{n}", n % 3) for n in range(24)])

        arrays = run_loop(config, log).arrays()

        assert arrays["memory.x"].max() < 1.0
        assert len(arrays["memory.x"]) == 23
        assert all(np.isfinite(a).all() for name, a in arrays.items() if name.startswith("learner."))

    def test_a_retracted_label_leaves_it(self, tmp_path: Path) -> None:
        """Of 18 labels three are retracted and one is given again. A run stopped in between ends the same."""
        whole, stopped = config_in(tmp_path / "whole"), config_in(tmp_path / "stopped")
        log, codec = filled_log(whole), make_codec(whole)
        for name, label in (("s0", RETRACTED), ("s2", RETRACTED), ("s4", RETRACTED), ("s4", 1), ("new", RETRACTED)):
            log.append("labels", [codec.labels.encode(name, label)])
        stopping = threading.Event()

        def stop(_: TrainingLoop, report: StepReport) -> None:
            if report.step == 3:
                stopping.set()

        expected = learn(whole, log)
        assert learn(stopped, log, stopping=stopping, on_step=stop).step == 3
        found = learn(stopped, log)

        assert ids_in(expected.arrays) == {"s4", *(f"s{n}" for n in range(6, 36, 2))}
        assert expected.extra["accounts"]["labels_read"] == 18 + 5
        for name in ("memory.ids", "memory.y", "memory.labelled_at_s"):
            np.testing.assert_array_equal(found.arrays[name], expected.arrays[name])

    def test_an_erased_sample_leaves_it_and_the_recent_samples(self, tmp_path: Path) -> None:
        """Its payload is in no array of the checkpoint, and a later label expires.

        A replay from an older checkpoint learns from it in the steps before, and ends with the same bits.
        """
        config = config_in(tmp_path, **{"batch.steps": 2, "state.checkpoint_every_s": 1e-6})
        log, codec = filled_log(config), make_codec(config)
        payloads = {
            name: codec.decode_sample(log.read(S, n, 1)[0]).x.tobytes() for n, name in ((6, "s6"), (7, "s7"), (8, "s8"))
        }
        first = learn(config, log)
        assert all(payload in first.arrays["recent.x"].tobytes() for payload in payloads.values())
        assert payloads["s6"] in first.arrays["memory.x"].tobytes()
        for name in ("s6", "s7", "never"):
            log.append("labels", [codec.labels.encode_erasure(name)])
        for n in range(40, 80):
            log.append("samples", [codec.encode_sample(f"s{n}", np.full(4, n, np.float32))])
        log.append("samples", [codec.encode_sample("never", np.full(4, 99, np.float32), label=1)])
        log.append("labels", [codec.labels.encode("s7", 2), codec.labels.encode("s6", 2)])

        second = learn(config, log)
        path_of(StatePaths(tmp_path).checkpoints, second.step).unlink()
        again = learn(config, log)

        for saved in (second, again):
            held = b"".join(saved.arrays[name].tobytes() for name in ("memory.x", "recent.x"))
            assert [payload in held for payload in payloads.values()] == [False, False, True]
            assert np.full(4, 99, np.float32).tobytes() not in held
        assert differences(again, second) == []
        view = LedgerView(StatePaths(tmp_path).store, config.schema_.build())
        found = {name: (label.state, view.payload(name)) for name in payloads if (label := view.get(name))}
        view.close()
        assert found["s6"] == found["s7"] == (LabelState.ERASED, None)
        assert found["s8"][0] is LabelState.TRAINED


def differences(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Names of what differs between two checkpoints, bit by bit."""
    other = [name for name in ("step", "next_offsets", "extra") if getattr(a, name) != getattr(b, name)]
    if a.arrays.keys() != b.arrays.keys():
        return [*other, "arrays"]
    return other + [n for n in a.arrays if not np.array_equal(a.arrays[n], b.arrays[n], equal_nan=True)]


class TestWatermark:
    @pytest.mark.parametrize("fresh", [1, 8])
    def test_one_clock_that_is_years_ahead_lets_nothing_expire(self, tmp_path: Path, fresh: int) -> None:
        """Alone in its step or among others, twice. What comes later expires in its turn."""
        settings = {"labels.implied_class": "0", "labels.implied_after_s": 10.0, "labels.horizon_s": 1000.0}
        config = config_in(tmp_path, **settings, **{"batch.fresh": fresh})
        log, codec = empty_log(), make_codec(config)
        for n in range(64):
            at_s = 1_700_000_000 + n + (3e8 if n in {20, 40} else 0)
            log.append(
                "samples", [codec.encode_sample(f"s{n}", np.zeros(4, np.float32), timestamp_ms=int(at_s * 1000))]
            )

        loop = run_loop(config, log)

        now_s, counts = loop.extra()["stream_time_s"], loop.ledger.counts()
        assert 1_700_000_050 < now_s < 1_700_000_064
        assert counts.samples == 64
        assert counts.implied == now_s - 1_700_000_000 - 10 - 2, "all older than 10 s, except the two"


class TestFurtherSteps:
    """Steps of a micro-batch after its first, which have no records (`batch.steps`)."""

    def test_with_until_end_each_micro_batch_has_all_of_them(self, tmp_path: Path) -> None:
        """So `evaluate` gives the same result every time."""
        config, reports = config_in(tmp_path, **{"batch.steps": 4}), Reports()

        run_loop(config, filled_log(config, 32), observer=reports)

        counts = [report.counts for report in reports.steps]
        assert [bool(c.samples_read + c.labels_read) for c in counts] == [True, False, False, False] * 4

    @pytest.mark.parametrize("max_labels", [1000, 2])
    def test_none_are_taken_while_a_micro_batch_can_be_closed(self, tmp_path: Path, max_labels: int) -> None:
        """A fast stream is not slowed down, nor are many labels in a row."""
        config, reports = config_in(tmp_path, **{"batch.steps": 4, "batch.max_age_s": 0.05}), Reports()
        batcher = MicroBatcher({S: 0, L: 0}, sample_topics=("samples",), fresh=8, max_labels=max_labels, max_age_s=0.05)
        stopping = threading.Event()
        with loop_on(config, filled_log(config, 64), observer=reports, batcher=batcher) as loop:
            turns = Counter[int]()

            def stop() -> None:
                turns[len(reports.steps)] += 1  # since the last step
                accounts = loop.accounts
                if (accounts.samples_read, accounts.labels_read) == (64, 30) and turns[len(reports.steps)] == 10:
                    stopping.set()

            reports.turn_done = stop  # type: ignore[method-assign]
            loop.run(stopping)

        found = [report.counts.samples_read + report.counts.labels_read for report in reports.steps]
        first = found.index(0)
        assert sum(found[:first]) >= 64 + 30 - 7 - max_labels, "everything that fills a micro-batch comes first"
        assert sum(found) == 64 + 30

    def test_recent_samples_have_keys_whatever_the_method(self, tmp_path: Path) -> None:
        """A method that wants keys may be chosen at the next start."""
        config = config_in(tmp_path, **{"batch.steps": 2})

        keys = run_loop(config, filled_log(config)).arrays()["recent.keys"]

        assert len(set(keys.tolist())) == len(keys) == 40


class TestReplay:
    def test_stops_between_two_steps(self, tmp_path: Path) -> None:
        """A replay may take longer than a supervisor waits. What it reached is saved; nothing is published."""
        config = config_in(tmp_path, **{"state.publish_every_s": 0.01})
        log, whole = filled_log(config, 400), config_in(tmp_path / "whole")
        expected = learn(whole, log)
        steps = list(journal.read_journal(StatePaths(whole.state.dir).journal, 0))
        reports, stopping = Reports(), threading.Event()

        with loop_on(config, log, observer=reports) as loop:
            for step, next_offsets in steps:
                loop.journal.append(step, next_offsets)
            reports.turn_done = lambda: stopping.set() if loop.learner.step == 5 else None  # type: ignore[method-assign]
            loop.replay_journal(steps, stopping)
            loop.run(stopping)
            loop.close()

        assert reports.published_steps == []
        assert newest_checkpoint(config).step == 5
        assert differences(learn(config, log), expected) == []


class TestCadence:
    @pytest.mark.parametrize(
        ("labels", "samples", "expected"),
        [(1, 10, 5.0), (0, 10, 8.0), (1, 16, 8.0)],
        ids=["labels", "no labels", "labels while records wait"],
    )
    def test_a_teacher_with_new_labels_is_published_sooner(
        self, labels: int, samples: int, expected: float, tmp_path: Path
    ) -> None:
        """After a quarter of the time between others, unless records wait. Labels are rare, and users wait for them.

        A turn takes half a second, with a step or without. The first teacher is published after 4 seconds, the label
        is learned a second later.
        """
        config = config_in(tmp_path, **{"state.publish_every_s": 4.0, "batch.fresh": 1, "batch.steps": 1})
        log, clock, reports = empty_log(), ManualClock(), Reports()
        codec, stopping = make_codec(config), threading.Event()
        for n in range(samples):
            log.append("samples", [codec.encode_sample(f"s{n}", np.full(4, n, np.float32))])
            if n == 8 and labels:
                log.append("labels", [codec.labels.encode("s1", 1)])
        published_s: list[float] = []
        reports.published = lambda _: published_s.append(clock())  # type: ignore[method-assign]

        def turn_done() -> None:
            clock.advance(0.5)
            if len(published_s) == 2:
                stopping.set()

        reports.turn_done = turn_done  # type: ignore[method-assign]
        with loop_on(config, log, observer=reports, clock=clock) as loop:
            began_s = clock()
            loop.run(stopping)

        first_s, second_s = (at_s - began_s for at_s in published_s)
        assert first_s == 4.0
        assert second_s == pytest.approx(expected, abs=1.0)

    def test_a_teacher_that_is_not_finite_is_not_published(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even with the guard off. Here a network spoils its own buffer in evaluation."""
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

        loop = run_loop(config, filled_log(config))

        assert not np.isfinite(loop.arrays()["learner.teacher.net.seen"]).any()
        assert PublishedDir(StatePaths(config.state.dir).published).newest() is None

    def test_label_requests_are_shown_while_the_guard_holds_back_the_teacher(self, tmp_path: Path) -> None:
        """As often as teachers are published: labels are needed most then."""
        config = config_in(tmp_path, **{"state.publish_every_s": 0.01})
        log, clock, reports = empty_log(), ManualClock(), Reports()
        encode = make_codec(config).encode_sample
        log.append("samples", [encode(f"s{n}", np.full(4, n, np.float32)) for n in range(40)])
        shown: list[int] = []
        with loop_on(config, log, observer=reports, clock=clock) as loop:
            flush = loop.requests.flush

            def note() -> None:
                flush()
                shown.append(loop.accounts.samples_read)

            loop.requests.flush = note  # type: ignore[method-assign]
            reports.turn_done = lambda: clock.advance(0.006)  # type: ignore[method-assign]
            state = loop.guarding.state()
            state["guard.unhealthy_looks"] = np.array(1)
            loop.guarding.load(state)
            loop.run(threading.Event(), until_end=True)

        assert reports.published_steps == []
        assert shown == [24, 40]

    def test_a_slow_save_slows_the_loop_and_keeps_the_journal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The journal stays within its bound, and has all steps since the oldest kept checkpoint."""
        monkeypatch.setattr(journal, "SEGMENT_BYTES", 2000)
        config, paths, reports = config_in(tmp_path, **{"batch.fresh": 1}), StatePaths(tmp_path), Reports()
        loads, while_full = [0.0], list[int]()
        written = Journal(paths.journal, max_bytes=8000)

        def slowly(path: Path, *args: Any, **more: Any) -> None:
            while not while_full:
                threading.Event().wait(0.01)
                if loads[-1] >= 1.0:
                    steps = len(loads)
                    threading.Event().wait(0.5)
                    while_full.append(len(loads) - steps)
            write_whole(path, *args, **more)

        monkeypatch.setattr(checkpoint, "write_whole", slowly)
        with (
            capture_logs() as lines,
            loop_on(config, filled_log(config, 400), observer=reports, journal=written) as loop,
        ):

            def look(report: StepReport) -> None:
                loads.append(written.load)
                oldest = loop.saver.oldest_step()
                found = [step for step, _ in journal.read_journal(paths.journal, oldest)]
                assert found == list(range(oldest + 1, report.step + 1))

            reports.step_done = look  # type: ignore[method-assign]
            loop.run(threading.Event(), until_end=True)
            loop.close()

        assert while_full == [0]
        assert max(loads) < 1.1, "one more step per save"
        assert loads[-1] < 1.0, "saved again, until the oldest checkpoint was removed"
        assert sum(path.stat().st_size for path in paths.journal.iterdir()) < 1.1 * 8000 + 2000
        assert [line["log_level"] for line in lines if line["event"] == "journal_full"] == ["warning"]


def test_a_replay_does_not_depend_on_what_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal has the cuts, so the size of the queues decides nothing."""
    config, again = config_in(tmp_path / "a"), config_in(tmp_path / "b")
    log = filled_log(config, 100)
    expected = learn(config, log)
    steps = list(journal.read_journal(StatePaths(config.state.dir).journal, 0))
    monkeypatch.setattr("streamlearn.log.feed.PREFETCH_BYTES", 1)

    with loop_on(again, log) as loop:
        loop.replay_journal(steps, threading.Event())
        loop.close()

    assert differences(newest_checkpoint(again), expected) == []
