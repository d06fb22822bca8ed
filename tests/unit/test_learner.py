"""The learner as the training loop uses it: predict, learn, read costs, save and load; one pass over real data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from structlog.testing import capture_logs

from streamlearn.errors import CheckpointError, ConfigError
from streamlearn.learn import build as learn_build
from streamlearn.learn.learner import Learner
from streamlearn.learn.settings import LearnConfig
from streamlearn.models.build import ModelSpec, build
from streamlearn.records import UNLABELLED, MicroBatch
from tests.support import learn_config

TABLE = ModelSpec("mlp", {"hidden": [16], "dropout": 0.3}, (5,), 3, normalise=True, scale=1.0)
IMAGES = ModelSpec("convnet", {"widths": [4, 6]}, (2, 6, 6), 3, normalise=False, scale=1 / 255)


def settings(spec: ModelSpec | None = None, /, **changed: Any) -> LearnConfig:
    """For a table, or for samples of this network."""
    noise = "image" if spec is not None and len(spec.shape) == 3 else "table"
    base: dict[str, Any] = {
        "method": "mean_teacher", "consistency_weight": 5.0, "rampup_steps": 10, "ema_decay": 0.9, "noise": noise,
        "pixel_noise_std": 0.05, "shift_pixels": 1, "flip": True, "seed": 7, "device": "cpu", "threads": 1,
    }  # fmt: skip
    return learn_config(base, **changed)


def batch(spec: ModelSpec, number: int, *, fresh: int = 6, labelled: int = 3, padding: float = 0.0) -> MicroBatch:
    """A micro-batch of 8 + 4 rows, some of them padding."""
    rng = np.random.default_rng(number)
    dtype = np.uint8 if len(spec.shape) == 3 else np.float32
    fresh_x = (rng.random((8, *spec.shape)) * 255).astype(dtype)
    labelled_x = (rng.random((4, *spec.shape)) * 255).astype(dtype)
    labelled_y = rng.integers(spec.classes, size=4)
    fresh_x[fresh:], labelled_x[labelled:], labelled_y[labelled:] = padding, padding, UNLABELLED
    return MicroBatch(fresh_x, fresh, labelled_x, labelled_y, labelled)


def batches(spec: ModelSpec, first: int, last: int) -> list[MicroBatch]:
    """Batches of a stream with gaps: some without labels, without fresh rows, of one row, of none."""
    sizes = [(6, 3), (8, 0), (0, 4), (1, 0), (0, 0), (8, 4), (2, 1)]
    return [
        batch(spec, number, fresh=sizes[number % 7][0], labelled=sizes[number % 7][1])
        for number in range(first, last + 1)
    ]


def after(spec: ModelSpec, of: LearnConfig, stream: list[MicroBatch]) -> Learner:
    learner = Learner(spec, of)
    for one in stream:
        learner.learn(one)
    return learner


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if one[name].dtype != other[name].dtype or not np.array_equal(one[name], other[name])]


@pytest.mark.parametrize(("cores", "spec", "expected"), [(4, IMAGES, 2), (1, IMAGES, 1), (4, TABLE, 1)])
def test_threads_are_half_of_the_cores_or_one_for_tables(cores, spec, expected, monkeypatch):
    """The rest is for those that read, decode and answer. A setting wins."""
    monkeypatch.setattr(learn_build, "_THREADS", cores)

    assert Learner(spec, settings(spec, threads=0)).describe()["threads"] == expected
    assert Learner(spec, settings(spec, threads=3)).describe()["threads"] == 3


class TestPrecision:
    """bfloat16 is for the passes of a step, and for nothing that is kept or answered."""

    @pytest.mark.parametrize("method", ["mean_teacher", "ict", "supervised", "pi"])
    @pytest.mark.parametrize("norm", ["batch", "robust_batch", "group", "none"])
    def test_bfloat16_learns_almost_the_same(self, method, norm):
        """After 20 steps the weights differ from those of float32 by a part of what they moved.

        It is not small, since AdamW magnifies small gradients.
        """
        spec = replace(IMAGES, options={"widths": [4, 6], "norm": norm})
        stream, first = batches(spec, 1, 20), Learner(spec, settings(spec)).state()

        exact, low = (
            after(spec, settings(spec, method=method, precision=precision), stream).state()
            for precision in ("float32", "bfloat16")
        )

        names = [name for name in first if name.startswith("student.net") and "num_batches" not in name]
        moved, apart = (
            np.sqrt(sum(float(np.square(exact[name] - other[name]).sum()) for name in names)) for other in (first, low)
        )
        assert 0.0 < apart < 0.4 * moved
        assert differing(exact, low) != []
        assert {array.dtype for array in low.values()} == {array.dtype for array in exact.values()}

    def test_answers_are_those_of_a_server(self):
        """Bit for bit, whatever the precision of the step."""
        learner = after(IMAGES, settings(IMAGES, precision="bfloat16"), batches(IMAGES, 1, 10))
        served = build(IMAGES).eval()
        served.load_state_dict({name: torch.from_numpy(array) for name, array in learner.teacher_state().items()})
        x = batch(IMAGES, 11).fresh_x

        answers = learner.predict(x).teacher_probs_BC

        with torch.inference_mode():
            assert np.array_equal(answers, served(torch.from_numpy(x)).softmax(dim=1).numpy())

    @pytest.mark.parametrize(
        ("spec", "has_amx", "expected"),
        [
            (IMAGES, True, torch.bfloat16),
            (IMAGES, False, torch.float32),
            (replace(IMAGES, options={"widths": [4, 6], "norm": "group"}), True, torch.float32),
            (TABLE, True, torch.float32),
        ],
    )
    def test_auto_is_bfloat16_where_it_is_faster(self, spec, has_amx, expected, monkeypatch):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)

        learner = Learner(spec, settings(spec, twin="measure", precision="auto"))

        for trainee in (learner.trainee, learner.twin):
            assert trainee.student.precision is trainee.teacher.precision is expected
        assert learner.describe()["precision"] == str(expected).removeprefix("torch.")

    @pytest.mark.usefixtures("spectrum")
    def test_a_network_that_fails_in_it_learns_in_float32(self, monkeypatch):
        """One of the user's own, with an operation that has no bfloat16; if it is asked for, it is an error."""
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        spec = replace(IMAGES, factory="of_spectrum:Net", options={})

        with capture_logs() as logs:
            learner = after(spec, settings(spec, precision="auto"), batches(spec, 1, 5))

        assert learner.describe()["precision"] == "float32"
        assert learner.read_costs().skipped_steps == 0
        assert [log["event"] for log in logs] == ["network_needs_float32"]
        with pytest.raises(ConfigError, match=r"learn.precision: Net fails in bfloat16, take float32"):
            Learner(spec, settings(spec, precision="bfloat16"))

    @pytest.fixture
    def spectrum(self, tmp_path, monkeypatch):
        (tmp_path / "of_spectrum.py").write_text(
            "import torch\n"
            "class Net(torch.nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.first, self.last = torch.nn.Conv2d(2, 4, 3), torch.nn.Linear(4, 3)\n"
            "    def forward(self, x):\n"
            "        h = self.first(x)\n"
            "        return self.last(torch.complex(h, h).abs().mean(dim=(2, 3)))\n"
        )
        monkeypatch.syspath_prepend(tmp_path)


class TestRestart:
    @pytest.mark.parametrize("spec", [TABLE, IMAGES], ids=["mlp", "convnet"])
    @pytest.mark.parametrize("changed", [{}, {"optimizer": "sgd"}, {"method": "supervised"}, {"precision": "bfloat16"}])
    def test_equals_no_restart(self, spec, changed):
        """I3: twenty steps in a row, or ten, a restart, and ten more: every array is bit-equal."""
        of = settings(spec, **changed)

        whole = after(spec, of, batches(spec, 1, 20))
        half = after(spec, of, batches(spec, 1, 10)).state()
        torch.manual_seed(1234)
        resumed = Learner(spec, of)
        resumed.load_state(half)
        for one in batches(spec, 11, 20):
            resumed.learn(one)

        assert differing(whole.state(), resumed.state()) == []
        assert resumed.step == 20

    def test_equals_no_restart_from_step_zero(self):
        """State can be taken before the first step, and has the same names then."""
        fresh = Learner(TABLE, settings()).state()
        resumed = Learner(TABLE, settings(seed=7))
        resumed.load_state(fresh)

        resumed.learn(batch(TABLE, 1))

        assert differing(after(TABLE, settings(), [batch(TABLE, 1)]).state(), resumed.state()) == []

    def test_works_from_state_without_a_sample_of_inputs(self):
        """A checkpoint of an earlier version: one row hardly moves centre and scale."""
        old = after(TABLE, settings(), batches(TABLE, 1, 10)).state()
        resumed = Learner(TABLE, settings())

        resumed.load_state({name: array for name, array in old.items() if not name.startswith("inputs.")})

        assert np.array_equal(resumed.state()["student.normalise.centre"], old["student.normalise.centre"])
        resumed.learn(batch(TABLE, 11, fresh=1))
        centre, scale = (resumed.state()[f"student.normalise.{name}"] for name in ("centre", "scale"))
        assert (np.abs(centre - old["student.normalise.centre"]) < 0.2 * scale).all()
        np.testing.assert_allclose(scale, old["student.normalise.scale"], rtol=0.2)
        for one in batches(TABLE, 11, 20):
            resumed.learn(one)
        assert differing(after(TABLE, settings(), batches(TABLE, 1, 20)).state(), resumed.state()) != []
        assert resumed.read_costs().skipped_steps == 0

    def test_works_from_state_without_weights_of_squares(self):
        """A checkpoint of an earlier version: they are zero, so no answer changes, and then they are learned."""
        old = after(TABLE, settings(twin="measure"), batches(TABLE, 1, 10))
        with torch.no_grad():
            for network in (old.trainee.student, old.trainee.teacher, old.twin.student, old.twin.teacher):
                network.net.squares.weight.zero_()
        state = {name: array for name, array in old.state().items() if "squares" not in name}
        resumed = Learner(TABLE, settings(twin="measure"))

        resumed.load_state(state)

        x = batch(TABLE, 11).fresh_x
        assert np.array_equal(resumed.predict(x).teacher_probs_BC, old.predict(x).teacher_probs_BC)
        for one in batches(TABLE, 11, 14):
            resumed.learn(one)
        assert resumed.state()["teacher.net.squares.weight"].any()
        assert resumed.read_costs().skipped_steps == 0

    def test_state_is_a_copy(self):
        """A checkpoint does not change while it is written in the background."""
        learner = after(TABLE, settings(), batches(TABLE, 1, 3))
        state = learner.state()
        kept = {name: array.copy() for name, array in state.items()}

        learner.learn(batch(TABLE, 4))

        assert differing(state, kept) == []
        assert "student.net.layers.1.weight" in differing(state, learner.state())

    def test_loads_read_only_arrays(self):
        """A mapped or decoded checkpoint is often read-only."""
        state = after(TABLE, settings(), batches(TABLE, 1, 3)).state()
        for array in state.values():
            array.flags.writeable = False
        learner = Learner(TABLE, settings())

        learner.load_state(state)

        assert differing(learner.state(), state) == []

    @pytest.mark.parametrize(
        ("spec", "changed", "said"),
        [
            (TABLE, {"optimizer": "sgd"}, "momentum_buffer: expected nothing, found float32"),
            (
                ModelSpec("mlp", {"hidden": [17]}, (5,), 3, normalise=True, scale=1.0),
                {},
                r"expected .*16.*, found .*17",
            ),
            (ModelSpec("mlp", {"hidden": [16, 16]}, (5,), 3, normalise=True, scale=1.0), {}, "and [0-9]+ more"),
        ],
    )
    def test_from_another_models_state_is_refused_and_changes_nothing(self, spec, changed, said):
        """The error names what differs."""
        learner = after(TABLE, settings(), batches(TABLE, 1, 3))
        before = learner.state()

        with pytest.raises(CheckpointError, match=said):
            learner.load_state(Learner(spec, settings(spec, **changed)).state())

        assert differing(before, learner.state()) == []


class TestPredict:
    @pytest.mark.parametrize("spec", [TABLE, IMAGES], ids=["mlp", "convnet"])
    def test_is_pure(self, spec):
        """I8: state, input and random state are as before, and so is the next step."""
        learner, quiet = (after(spec, settings(spec), batches(spec, 1, 5)) for _ in range(2))
        x = batch(spec, 50).fresh_x
        state, x_before, random_before = learner.state(), x.copy(), torch.get_rng_state()

        learner.predict(x)

        assert differing(state, learner.state()) == []
        assert np.array_equal(x, x_before)
        assert torch.equal(random_before, torch.get_rng_state())
        for one in (learner, quiet):
            one.learn(batch(spec, 6))
        assert differing(learner.state(), quiet.state()) == []

    @pytest.mark.parametrize("spec", [TABLE, IMAGES], ids=["mlp", "convnet"])
    def test_is_what_a_server_answers_with_the_published_teacher(self, spec):
        """`teacher_state` loaded into `build(spec)` gives the same probabilities, bit for bit."""
        learner = after(spec, settings(spec), batches(spec, 1, 5))
        server = build(spec, seed=99)
        server.load_state_dict({name: torch.from_numpy(array) for name, array in learner.teacher_state().items()})
        x = batch(spec, 50).fresh_x

        with torch.inference_mode():
            served = server.eval()(torch.from_numpy(x)).softmax(dim=1).numpy()

        predictions = learner.predict(x)
        assert np.array_equal(predictions.teacher_probs_BC, served)
        assert predictions.teacher_probs_BC.dtype == np.float32
        assert predictions.student_probs_BC.dtype == np.float32

    def test_of_no_samples_is_empty(self):
        """With the usual shape, so callers need no special case."""
        predictions = Learner(TABLE, settings()).predict(np.zeros((0, 5), np.float32))

        assert predictions.teacher_probs_BC.shape == (0, 3)
        assert predictions.student_probs_BC.shape == predictions.teacher_probs_BC.shape

    def test_takes_read_only_arrays(self):
        """Payloads decoded from a record's bytes are read-only."""
        x = np.frombuffer(np.ones(10, np.float32).tobytes(), np.float32).reshape(2, 5)

        assert Learner(TABLE, settings()).predict(x).teacher_probs_BC.sum(axis=1) == pytest.approx([1.0, 1.0])


class TestLearn:
    @pytest.mark.parametrize("spec", [TABLE, IMAGES], ids=["mlp", "convnet"])
    @pytest.mark.parametrize("method", ["mean_teacher", "supervised"])
    def test_sees_nothing_of_padding(self, spec, method):
        """Values beyond the counts change no cost, statistic or weight."""
        zeros, others = (
            after(
                spec,
                settings(spec, method=method),
                [batch(spec, number, fresh=5, labelled=2, padding=padding) for number in range(3)],
            )
            for padding in (0.0, 99.0)
        )

        assert differing(zeros.state(), others.state()) == []

    def test_changes_neither_batch_nor_its_rows(self):
        """Learning is pure in its inputs."""
        one, same = batch(IMAGES, 1), batch(IMAGES, 1)

        after(IMAGES, settings(IMAGES), [one])

        for name in ("fresh_x", "labelled_x", "labelled_y"):
            assert np.array_equal(getattr(one, name), getattr(same, name))

    def test_without_rows_only_counts(self):
        """An empty step is legal and changes no weight."""
        learner = after(TABLE, settings(), batches(TABLE, 1, 3))
        before = learner.state()

        learner.learn(batch(TABLE, 4, fresh=0, labelled=0))

        assert learner.step == 4
        assert differing(before, learner.state()) == ["learner.step"]

    def test_observes_fresh_rows_once_and_labelled_rows_never(self):
        """Input statistics are those of the stream: a labelled row was in it, and is replayed many times."""
        stream = [batch(TABLE, number, fresh=5, labelled=4) for number in range(4)]
        seen = np.concatenate([one.fresh_x[:5] for one in stream])

        state = after(TABLE, settings(), stream).state()

        assert state["inputs.rows"] == 20
        np.testing.assert_array_equal(state["inputs.sample"][:20, :, 0], seen)
        assert not state["inputs.sample"][20:].any()

    @pytest.mark.parametrize("spec", [TABLE, IMAGES], ids=["mlp", "convnet"])
    def test_is_a_function_of_the_seed(self, spec):
        """Same seed, same weights; another seed, others."""
        states = [after(spec, settings(spec, seed=seed), batches(spec, 1, 5)).state() for seed in (1, 1, 2)]

        assert differing(states[0], states[1]) == []
        assert len(differing(states[0], states[2])) > 5

    def test_skips_a_step_whose_loss_is_not_finite(self):
        """I4: only counts and the sample of input rows change, and the skip is counted."""
        learner = after(TABLE, settings(), batches(TABLE, 1, 5))
        learner.read_costs()
        before, bad = learner.state(), batch(TABLE, 6)
        bad.fresh_x[0, 0] = np.nan

        learner.learn(bad)

        assert sorted(differing(before, learner.state())) == [
            "inputs.kept",
            "inputs.rows",
            "inputs.sample",
            "learner.skipped_in_a_row",
            "learner.step",
        ]
        assert learner.read_costs().skipped_steps == 1

    def test_with_labels_out_of_range_fails_before_it_changes_anything(self):
        """A caller's bug is not learned."""
        bad = batch(TABLE, 1)
        bad.labelled_y[0] = 3

        learner = Learner(TABLE, settings())
        before = learner.state()

        with pytest.raises(AssertionError, match="labels out of range"):
            learner.learn(bad)

        assert differing(before, learner.state()) == []

    def test_schedules_of_supervised_start_with_its_first_label(self):
        """Labels come late: the average starts at the first update, not at the current step."""
        late = after(TABLE, settings(method="supervised"), [batch(TABLE, n, labelled=0) for n in range(30)])
        before = late.state()

        students = [before]
        for number in (31, 32):
            late.learn(batch(TABLE, number))
            students.append(late.state())

        mean = sum(state["student.net.layers.1.weight"] for state in students) / 3
        np.testing.assert_allclose(students[-1]["teacher.net.layers.1.weight"], mean, rtol=1e-5, atol=1e-7)


class TestFirstStepsSkipped:
    """Averages start with the first step that is taken, without initial values."""

    OF: ClassVar[dict[str, Any]] = {"noise": "none"}

    @classmethod
    def state_after(cls, first: list[MicroBatch], **changed: Any) -> dict[str, Any]:
        return after(
            IMAGES, settings(IMAGES, **cls.OF, **changed), [*first, *(batch(IMAGES, k) for k in (1, 2, 3))]
        ).state()

    @pytest.mark.parametrize("skipped", [1, 3])
    @pytest.mark.parametrize("host_may_ask", [True, False])
    def test_leave_no_trace_in_student_teacher_and_twin(self, skipped: int, host_may_ask: bool) -> None:
        """Otherwise running statistics would keep a share of their initial values, and the teacher a larger one."""
        states = []
        for count in (0, skipped):
            learner = Learner(IMAGES, settings(**self.OF, twin="measure"), host_may_ask=host_may_ask)
            for number in range(count + 3):
                one = batch(IMAGES, 1 + (number - count) % 9)
                if number < count:
                    one = replace(
                        one, fresh_x=one.fresh_x * np.float32("nan"), labelled_x=one.labelled_x * np.float32("nan")
                    )
                learner.learn(one)
            states.append(learner.state())
            assert learner.read_costs().skipped_steps == count

        changed = [name for name in differing(*states) if name not in ("learner.step", "learner.skipped_in_a_row")]
        assert changed == []
        assert states[1]["learner.updates"] == 3
        assert states[1]["learner.twin_updates"] == 3

    def test_of_one_row_have_no_batch_statistics_either(self) -> None:
        """Such a step runs in eval mode; the first batch after it still replaces the initial statistics."""
        alone = self.state_after([batch(IMAGES, 8, fresh=1, labelled=0)], learning_rate=1e-9)
        without = self.state_after([], learning_rate=1e-9)

        for name in (name for name in alone if name.startswith("student.") and "running" in name):
            np.testing.assert_allclose(alone[name], without[name], rtol=1e-3, atol=1e-5)


class TestProjector:
    """Contrast's own layers, which no remedy restores."""

    @pytest.mark.parametrize("remedy", ["roll_back", "adopt_twin"])
    def test_starts_without_moments_after_a_remedy(self, remedy: str) -> None:
        """Those of a student that diverged would move it away at once."""
        learner = after(TABLE, settings(contrast_weight=0.3, twin="measure"), batches(TABLE, 1, 30))
        learner.keep_good()
        moments = [name for name in learner.state() if name.startswith("method.optimizer.projector") and "exp" in name]
        assert len(moments) == 8
        assert all(learner.state()[name].any() for name in moments)
        with torch.no_grad():
            for parameter in learner.trainee.student.parameters():
                parameter.mul_(1e4)

        assert getattr(learner, remedy)()

        assert not any(learner.state()[name].any() for name in moments)


class TestOutliers:
    """A table model on three separated classes, with one sentinel value in one row of the stream."""

    STEPS, FRESH = 200, 64

    @pytest.fixture(scope="class")
    @classmethod
    def clean(cls) -> float:
        return cls.accuracy(None, row=0)

    @classmethod
    def accuracy(cls, sentinel: float | None, *, row: int, constant: bool = False) -> float:
        """Final accuracy of the teacher. `constant`: half of the features are 0 in the first half of steps."""
        spec = ModelSpec("mlp", {"hidden": [32]}, (6,), 3, normalise=True, scale=1.0)
        of = settings(rampup_steps=50, ema_decay=0.98, std=0.1)
        rng = np.random.default_rng(0)
        centres_C6 = np.random.default_rng(3).normal(0.0, 1.5, (3, 6))
        centres_C6[:, :3] /= 3.0 if constant else 1.0

        def draw(count: int, step: int) -> tuple[Any, Any]:
            y = rng.integers(3, size=count)
            x = (centres_C6[y] + rng.normal(0.0, 0.6, (count, 6))).astype(np.float32)
            if constant and step <= cls.STEPS // 2:
                x[:, 3:] = 0.0
            return x, y

        learner = Learner(spec, of)
        for step in range(1, cls.STEPS + 1):
            fresh_x, _ = draw(cls.FRESH, step)
            first = (step - 1) * cls.FRESH
            if sentinel is not None and first <= row < first + cls.FRESH:
                fresh_x[row - first, 3 if constant else 0 :] = sentinel
            labelled_x, labelled_y = draw(16, step)
            learner.learn(MicroBatch(fresh_x, cls.FRESH, labelled_x, labelled_y, 16))
        x, y = draw(2000, cls.STEPS)
        return float((learner.predict(x).teacher_probs_BC.argmax(axis=1) == y).mean())

    @pytest.mark.parametrize("sentinel", [-999_999.0, 1e9, 1e15])
    @pytest.mark.parametrize("row", [0, 49])
    def test_one_in_the_first_rows_costs_less_than_a_point(self, clean: float, sentinel: float, row: int) -> None:
        """If the sentinel set the deviation, the model would stay at chance for tens of thousands of rows."""
        assert clean > 0.95
        assert self.accuracy(sentinel, row=row) > clean - 0.01

    @pytest.mark.parametrize("sentinel", [-999_999.0, 1e9, 1e15])
    def test_one_in_features_that_were_constant_costs_less_than_a_point(self, sentinel: float) -> None:
        """The same, with half of the information in features that change only later."""
        assert self.accuracy(sentinel, row=6000, constant=True) > self.accuracy(None, row=0, constant=True) - 0.01


class TestReadCosts:
    def test_are_means_since_the_last_reading(self):
        """Two steps read together are the mean of the two read separately; reading resets the sums."""
        together, apart = Learner(TABLE, settings()), Learner(TABLE, settings())

        read = []
        for number in (1, 2):
            apart.learn(batch(TABLE, number))
            together.learn(batch(TABLE, number))
            read.append(apart.read_costs())

        both = together.read_costs()
        assert both.steps == 2
        assert both.classification == pytest.approx((read[0].classification + read[1].classification) / 2)
        assert both.consistency == pytest.approx((read[0].consistency + read[1].consistency) / 2)
        assert both.classification > 0.0
        assert both.consistency > 0.0
        assert together.read_costs().steps == 0

    def test_exclude_skipped_steps(self):
        """A NaN is counted, not averaged."""
        spec = ModelSpec("torch.nn:Linear", {"in_features": 5, "out_features": 3}, (5,), 3, normalise=False, scale=1.0)
        bad = batch(spec, 2)
        bad.fresh_x[:] = np.nan

        costs = after(spec, settings(spec), [batch(spec, 1), bad]).read_costs()

        assert costs.classification == after(spec, settings(spec), [batch(spec, 1)]).read_costs().classification
        assert (costs.steps, costs.skipped_steps) == (2, 1)
        assert costs.skipped_rows == bad.fresh_count + bad.labelled_count

    def test_show_the_schedules(self):
        """W(t) and the learning rate of the last update."""
        costs = after(TABLE, settings(rampup_steps=2), [batch(TABLE, n) for n in range(3)]).read_costs()

        assert (costs.consistency_weight, costs.learning_rate) == (5.0, 3e-3)


class TestSettings:
    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"noise": "loud"}, "learn.noise"),
            ({"device": "cuda:63"}, "learn.device"),
        ],
    )
    def test_that_cannot_be_built_are_config_errors(self, changed, said):
        """The message names the key."""
        with pytest.raises(ConfigError, match=said):
            Learner(TABLE, settings(**changed))

    def test_of_a_network_without_parameters_are_a_config_error(self):
        """There would be nothing to learn."""
        spec = ModelSpec("torch.nn:Identity", {}, (3,), 3, normalise=False, scale=1.0)

        with pytest.raises(ConfigError, match="no trainable parameters"):
            Learner(spec, settings(spec))

    def test_are_shown_by_describe(self):
        """Parameters, device and threads, for the log."""
        described = Learner(TABLE, settings()).describe()

        assert described["parameters"] == 2 * 5 * 16 + 16 + 16 * 3 + 3  # inputs and their squares
        assert (described["device"], described["threads"]) == ("cpu", 1)


class TestOnDigits:
    """One pass over the 1,797 digits of scikit-learn as a stream, one label in five, then the last 300."""

    @pytest.mark.parametrize(
        "changed",
        [
            {"consistency": "mse", "consistency_weight": 2.0},
            {"consistency": "kl", "consistency_weight": 2.0},
            {"method": "supervised"},
        ],
    )
    def test_both_networks_learn_far_past_chance(self, changed):
        """Chance is 0.1."""
        x, y = load_digits(return_X_y=True)
        x, y = x.astype(np.float32), y.astype(np.int64)
        of = ModelSpec("mlp", {"hidden": [64]}, (64,), 10, normalise=True, scale=1.0)
        learner = Learner(of, settings(**changed, ema_decay=0.95))
        rng = np.random.default_rng(0)

        for first in range(0, 1497, 16):
            known = np.arange(0, first + 16, 5)
            picked = rng.choice(known, 16)
            learner.learn(MicroBatch(x[first : first + 16], len(x[first : first + 16]), x[picked], y[picked], 16))

        predictions = learner.predict(x[-300:])
        assert np.mean(predictions.teacher_probs_BC.argmax(axis=1) == y[-300:]) > 0.7
        assert np.mean(predictions.student_probs_BC.argmax(axis=1) == y[-300:]) > 0.7
