"""benchmarks/recovery.py: its measurements and its resets."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from streamlearn.judge.prequential import Prequential
from streamlearn.learn.learner import Learner
from streamlearn.records import Array, MicroBatch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
CHANGE_STEP, STEPS = 3, 40


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The benchmark, which is not in the package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("recovery")
    finally:
        sys.path.remove(str(BENCHMARKS))


def case(bench: ModuleType, contender: str = "constant", *, seed: int = 0, reset_every: int = 2) -> Any:
    stream = bench.Stream("digits", "permute", bench.DELAY, seed, CHANGE_STEP, STEPS)
    return bench.Case(stream, contender, reset_every)


def learning_of(bench: ModuleType, contender: str) -> Any:
    data = bench.read("digits", 0)
    return bench.Learning(data, 0, fresh=bench.FRESH, settings=bench.CONTENDERS[contender])


def learner_of(bench: ModuleType) -> Learner:
    made: Learner = bench.make_learner(learning_of(bench, "constant").config(Path()))
    return made


def taught(learner: Learner, steps: int) -> Learner:
    """Take `steps` steps on noise."""
    rng = np.random.default_rng(learner.step)
    for _ in range(steps):
        fresh_x = rng.random((4, *learner.spec.shape), np.float32)
        labelled_x, labelled_y = rng.random((2, *learner.spec.shape), np.float32), rng.integers(10, size=2)
        learner.learn(MicroBatch(fresh_x, 4, labelled_x, labelled_y, 2))
    return learner


def differing(one: dict[str, Array], other: dict[str, Array]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not np.array_equal(one[name], other[name])]


class TestUntilBack:
    def test_counts_to_the_end_of_the_first_sufficient_window(self, bench: ModuleType) -> None:
        """The first window wholly after the change ends 32 steps of 32 samples after it."""
        result = bench.Result(case(bench), 0.8, (0.1, 0.75, 0.77, 0.3), 0.5)

        assert result.lowest == 0.1
        assert result.back_after(0.8) == (32 + 2) * 32
        assert result.back_after(0.78) == (32 + 1) * 32

    def test_counts_all_samples_if_there_is_none(self, bench: ModuleType) -> None:
        """A lower bound."""
        result = bench.Result(case(bench), 0.8, (0.1, 0.2), 0.2)

        assert result.back_after(0.8) is None
        assert result.until_back(0.8) == (STEPS - CHANGE_STEP) * 32


class TestFollowing:
    def test_separates_before_from_after(self, bench: ModuleType) -> None:
        """Half of the answers are right up to the change, then none, then all."""
        oracle, following = Prequential(2, window=bench.WINDOW), bench.Following(case(bench))
        for step in range(1, STEPS + 1):
            for n in range(bench.FRESH):
                right = n % 2 == 0 if step <= CHANGE_STEP else step > CHANGE_STEP + bench.WHOLE_STEPS
                probabilities = np.array([0.5, 0.5], np.float32)
                oracle.update(
                    true_class=0,
                    teacher_class=int(not right),
                    student_class=1,
                    teacher_probabilities_C=probabilities,
                )
            following(oracle, step)

        result = following.result()

        later = STEPS - CHANGE_STEP - bench.WHOLE_STEPS
        assert result.before == 0.5
        assert result.after == pytest.approx(later / (STEPS - CHANGE_STEP))
        assert len(result.windows) == later + 1
        assert result.lowest == 0.0


class TestResetting:
    def test_restores_everything_except_the_step_number(self, bench: ModuleType) -> None:
        """The loop and the journal depend on the step number."""
        learner, resetting = learner_of(bench), bench.Resetting(2)
        resetting(taught(learner, 2), 2)
        kept = learner.state()
        resetting(taught(learner, 1), 3)
        between = learner.state()

        resetting(taught(learner, 1), 4)

        assert "student.net.layers.1.weight" in differing(kept, between)
        assert differing(kept, learner.state()) == ["learner.step"]
        assert learner.step == 4

    def test_a_restart_restores_the_initial_weights(self, bench: ModuleType) -> None:
        """Those of the same learner."""
        learner = learner_of(bench)
        beginning = learner.state()
        resetting = bench.make_resetting(case(bench, "restart"), learning_of(bench, "restart"))

        resetting(taught(learner, 2), 2)

        assert differing(beginning, learner.state()) == ["learner.step"]

    def test_only_two_contenders_reset(self, bench: ModuleType) -> None:
        """`reset` and `restart`."""
        made = {name: bench.make_resetting(case(bench, name), learning_of(bench, name)) for name in bench.CONTENDERS}

        assert {name for name, resetting in made.items() if resetting is not None} == {"reset", "restart"}


class TestContenders:
    def test_have_the_settings_of_their_description(self, bench: ModuleType) -> None:
        """All take one step per micro-batch."""
        made = {name: learning_of(bench, name).config(Path()) for name in bench.CONTENDERS}

        assert {config.batch.steps for config in made.values()} == {1}
        assert made["shipped"].guard.on
        assert made["shipped"].learn.twin == "elect"
        for name in ("constant", "reset", "restart"):
            assert not made[name].guard.on
            assert made[name].learn.twin == "measure"
        assert [made[name].drift.reaction for name in ("constant", "alarm", "shipped")] == ["alarm", "alarm", "renew"]

    @pytest.mark.parametrize("quick", [False, True])
    def test_learn_the_same_streams(self, bench: ModuleType, quick: bool) -> None:
        """The change is halfway between two resets, and two whole periods follow."""
        lengths = bench.QUICK_LENGTHS if quick else bench.LENGTHS
        cases = bench.cases([1, 2], lengths, quick=quick)

        streams = {name: [one.stream for one in cases if one.contender == name] for name in bench.CONTENDERS}
        assert all(some == streams["constant"] for some in streams.values())
        assert len(set(streams["constant"])) == 2 * (1 if quick else 5)
        for stream in streams["constant"]:
            assert stream.change_step % lengths.reset_every == lengths.reset_every // 2
            assert stream.steps - stream.change_step == 2 * lengths.reset_every


def test_the_summary_is_by_contender(bench: ModuleType) -> None:
    """Means over streams; the target is the contender's own accuracy before the change, or that of `constant`."""
    results = []
    for seed in (1, 2):
        for contender in bench.CONTENDERS:
            before = 0.4 if contender == "restart" else 0.8
            windows = (0.1, 0.4) if contender == "restart" else (0.1, 0.2, 0.8)
            windows = windows if seed == 1 else (0.1, 0.1, 0.1)
            results.append(bench.Result(case(bench, contender, seed=seed), before, windows, 0.25 * seed))
    results[0] = replace(results[0], after=0.5)

    summary = bench.summary(results)

    all_of_it = (STEPS - CHANGE_STEP) * 32
    assert summary["seeds"] == [1, 2]
    assert summary["samples_until_back"]["constant"] == (34 * 32 + all_of_it) / 2
    assert summary["samples_until_back"]["restart"] == (33 * 32 + all_of_it) / 2
    assert summary["samples_until_back_to_constant"]["restart"] == all_of_it
    assert summary["never"] == dict.fromkeys(bench.CONTENDERS, 1)
    assert summary["accuracy_after"]["constant"] == 0.5
    assert summary["accuracy_after"]["shipped"] == 0.375
    assert "-0.125 ± 0.125" in [str(cell) for column in bench.totals(results).columns for cell in column.cells]
    assert bench.table(results).row_count == len(bench.CONTENDERS)
