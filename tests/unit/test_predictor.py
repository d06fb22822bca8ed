"""The predictor: always one whole teacher, never one of another schema or network."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from streamlearn.errors import NotPublishedError, StateError
from streamlearn.metrics import ServerMetrics
from streamlearn.models.build import ModelSpec, build
from streamlearn.records import Schema
from streamlearn.serve.predictor import RETRY_S, Predictor
from streamlearn.state.publish import PIN, POINTER, PublishedDir, Publisher, pin, teacher_path, unpin
from tests.tables import COLUMNS, rows, table_spec, width_of

SCHEMA = Schema((4,), np.dtype(np.float32), ("a", "b", "c"))
SPEC = ModelSpec("mlp", {"hidden": (5,)}, (4,), 3, normalise=True, scale=1.0)


class Stage:
    """A published folder and a predictor that follows it, with a manual clock."""

    def __init__(self, folder) -> None:
        self.now_s = 0.0
        self.folder = folder
        self.publisher = Publisher(folder, keep=3, clock=lambda: 1000.0 + self.now_s)
        self.metrics = ServerMetrics(version="1")
        self.predictor = Predictor(PublishedDir(folder), SCHEMA, self.metrics, clock=lambda: self.now_s)

    def publish(self, step, *, arrays=None, spec=SPEC, **metadata):
        """Publish a teacher whose weights are a function of the step."""
        arrays = weights(step) if arrays is None else arrays
        return self.publisher.publish(step, arrays, {"model_spec": spec.to_json(), **metadata})

    @property
    def failures(self):
        line = next(line for line in self.metrics.text().split("\n") if line.startswith("streamlearn_model_load_f"))
        return float(line.split()[1])


def weights(seed):
    return {name: tensor.numpy() for name, tensor in build(SPEC, seed=seed).state_dict().items()}


@pytest.fixture
def stage(tmp_path):
    stage = Stage(tmp_path / "published")
    yield stage
    stage.predictor.close()


def test_a_teacher_of_an_earlier_version_is_served(stage):
    """With mean and variance of inputs, and without squares."""
    arrays = weights(1)
    centre, scale = arrays.pop("normalise.centre"), arrays.pop("normalise.scale")
    del arrays["net.squares.weight"]
    moments = {"mean": centre + 2.0, "var": scale * 9.0, "count": np.array(5.0, np.float32)}
    stage.publish(1, arrays=arrays | {f"normalise.{name}": array for name, array in moments.items()})
    x = np.array([[1.0, 2.0, 3.0, 30.0]], np.float32)

    assert stage.predictor.refresh()

    layers = build(SPEC, seed=1).net.layers
    expected = layers(torch.from_numpy((x - 2.0) / 3.0).asinh()).softmax(dim=1).detach().numpy()
    np.testing.assert_allclose(stage.predictor.current().probabilities(x), expected, rtol=1e-5)


class TestAnswers:
    def test_without_a_teacher_there_is_an_error(self, stage):
        """It names the cause."""
        assert not stage.predictor.refresh()

        with pytest.raises(NotPublishedError, match="no teacher is published yet"):
            stage.predictor.current()

    def test_equal_those_of_the_published_network_bit_for_bit(self, stage):
        """Served equals computed."""
        stage.publish(7)
        stage.predictor.refresh()
        x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)

        model = stage.predictor.current()
        probs = model.probabilities(x)

        with torch.inference_mode():
            expected = build(SPEC, seed=7).eval()(torch.from_numpy(x)).softmax(dim=1).numpy()
        np.testing.assert_array_equal(probs, expected)
        assert probs.dtype == np.float32
        assert (model.step, model.published_at_s) == (7, 1000.0)

    @pytest.mark.parametrize("offsets", ["[0, 0]", "[0, 0, NaN]", "[0, 0, 1e999]", '"x"', "{", "[[0, 0, 0]]"])
    def test_offsets_that_do_not_fit_are_refused(self, stage, offsets):
        """The answer would be wrong. A version without them is served as it is."""
        stage.publish(7)
        stage.predictor.refresh()
        stage.publish(8, log_offsets=offsets)
        stage.predictor.refresh()

        assert stage.predictor.current().step == 7
        assert stage.failures == 1

    def test_accept_read_only_rows_and_do_not_change_them(self, stage):
        """Decoded bodies are views of bytes. torch does not warn."""
        stage.publish(7)
        stage.predictor.refresh()
        x = np.frombuffer(np.ones(8, np.float32).tobytes(), np.float32).reshape(2, 4)

        probs = stage.predictor.current().probabilities(x)

        assert probs.shape == (2, 3)
        assert (x == 1).all()

    def test_come_from_one_whole_teacher_while_others_are_published(self, stage):
        """I5: every answer equals that of its own version, never a mixture."""
        stage.publish(1)
        stage.predictor.refresh()
        x = np.ones((2, 4), np.float32)
        with torch.inference_mode():
            expected = {s: build(SPEC, seed=s).eval()(torch.from_numpy(x)).softmax(dim=1).numpy() for s in range(1, 21)}
        stopping = threading.Event()
        seen, wrong = set(), []

        def ask():
            while not stopping.is_set():
                model = stage.predictor.current()
                probs = model.probabilities(x)
                seen.add(model.step)
                if not np.array_equal(probs, expected[model.step]):
                    wrong.append(model.step)

        thread = threading.Thread(target=ask)
        thread.start()
        for step in range(2, 21):
            stage.publish(step)
            stage.predictor.refresh()
        stopping.set()
        thread.join(timeout=5.0)

        assert not wrong
        assert len(seen) > 1


class TestFollowing:
    def test_a_newer_teacher_replaces_the_old_one(self, stage):
        """The version is exported too."""
        stage.publish(1)
        stage.predictor.refresh()
        stage.publish(2)

        assert stage.predictor.refresh()

        assert stage.predictor.current().step == 2
        assert "streamlearn_model_version 2.0" in stage.metrics.text()

    def test_an_unchanged_pointer_loads_nothing(self, stage):
        """The teacher stays the same object."""
        stage.publish(1)
        stage.predictor.refresh()
        held = stage.predictor.current()

        assert not stage.predictor.refresh()

        assert stage.predictor.current() is held

    def test_the_same_step_published_again_is_loaded(self, stage):
        """After a rollback of the learner a step may be published twice, with other weights."""
        stage.publish(1)
        stage.predictor.refresh()
        stage.now_s = 1.0
        stage.publish(1, arrays=weights(99))

        assert stage.predictor.refresh()

    def test_the_watcher_loads_a_teacher(self, stage):
        """Soon after the first publication."""
        swapped = threading.Event()

        class Notifying(ServerMetrics):
            def model(self, step, published_at_s, *, pinned=False):
                super().model(step, published_at_s, pinned=pinned)
                swapped.set()

        predictor = Predictor(PublishedDir(stage.folder), SCHEMA, Notifying(version="1"))
        predictor.start()
        stage.publish(3)
        swapped.wait(5.0)
        predictor.close()

        assert predictor.current().step == 3


class TestRefusals:
    @pytest.mark.parametrize(
        "publish",
        [
            lambda stage: stage.publish(2, arrays={"net.nothing": np.zeros(3, np.float32)}),
            lambda stage: stage.publish(2, arrays={**weights(2), first(weights(2)): np.zeros((1, 1), np.float32)}),
            lambda stage: stage.publish(2, arrays={**weights(2), **nan(weights(2))}),
            lambda stage: stage.publish(2, spec=ModelSpec("mlp", {}, (9,), 3, normalise=True, scale=1.0)),
            lambda stage: stage.publish(2, spec=ModelSpec("mlp", {}, (4,), 2, normalise=True, scale=1.0)),
            lambda stage: stage.publish(2, spec=ModelSpec("mlp", {"no": 1}, (4,), 3, normalise=True, scale=1.0)),
            lambda stage: stage.publish(2, classes='["b", "a", "c"]'),
            lambda stage: stage.publish(2, classes="{"),
            lambda stage: stage.publish(2, dtype="uint8"),
            lambda stage: stage.publisher.publish(2, weights(2), {}),
            lambda stage: stage.publisher.publish(2, weights(2), {"model_spec": "[]"}),
            lambda stage: stage.publish(2).path.write_bytes(b"torn"),
            lambda stage: stage.publish(2).path.unlink(),
            lambda stage: (stage.folder / POINTER).write_text("{"),
        ],
        ids=[
            "no such weights",
            "weights of another shape",
            "NaN",
            "inputs of another shape",
            "fewer classes",
            "no such option",
            "classes in another order",
            "classes that cannot be read",
            "another dtype",
            "no spec",
            "a spec that is none",
            "a torn file",
            "a file that is gone",
            "a torn pointer",
        ],
    )
    def test_a_teacher_that_cannot_be_served_is_counted_and_the_old_one_stays(self, stage, publish):
        """A bad publication stops neither serving nor the watcher."""
        stage.publish(1)
        stage.predictor.refresh()
        held = stage.predictor.current()

        publish(stage)
        swapped = stage.predictor.refresh()

        assert not swapped
        assert stage.predictor.current() is held
        assert stage.failures == 1.0

    def test_a_bad_file_is_retried_after_a_delay(self, stage):
        """A shared volume may have shown only part of it."""
        path = stage.publish(2).path
        whole = path.read_bytes()
        path.write_bytes(b"torn")

        stage.predictor.refresh()
        path.write_bytes(whole)

        for stage.now_s, swapped in ((0.2, False), (RETRY_S - 0.1, False), (RETRY_S, True)):
            assert stage.predictor.refresh() is swapped
        assert stage.failures == 1.0

    def test_a_file_that_stays_bad_is_counted_at_each_retry(self, stage):
        """For the alert; it is logged once."""
        stage.publish(2).path.write_bytes(b"torn")

        with capture_logs() as logged:
            for stage.now_s in (0.0, 0.2, RETRY_S, RETRY_S + 0.2):
                stage.predictor.refresh()

        assert stage.failures == 2.0
        assert [line["event"] for line in logged] == ["model_load_failed"]

    def test_a_valid_teacher_after_a_bad_one_is_served(self, stage):
        """The failure is cleared."""
        stage.publish(1).path.write_bytes(b"torn")
        stage.predictor.refresh()
        stage.publish(2)

        assert stage.predictor.refresh()

        assert stage.predictor.current().step == 2


class TestFallingBack:
    @pytest.fixture
    def broken(self, stage):
        """Versions 1 and 2 are valid, 3 is not finite; no server has run yet."""
        for step in (1, 2):
            stage.publish(step)
            stage.now_s += 1.0
        stage.publish(3, arrays={name: np.full_like(array, np.nan) for name, array in weights(3).items()})
        return stage

    def test_at_start_the_newest_loadable_version_is_served(self, broken):
        """Log and notes have the refused version and the reason."""
        with capture_logs() as logged:
            assert broken.predictor.refresh()

        held = broken.predictor.current()
        assert (held.step, held.pinned, broken.predictor.newest_version) == (2, False, 3)
        assert broken.failures == 1.0
        failed, older = logged
        assert (failed["event"], failed["step"]) == ("model_load_failed", 3)
        assert (older["event"], older["step"], older["refused_step"]) == ("older_model_served", 2, 3)
        (note,) = broken.predictor.notes()
        assert note.startswith("the newest version cannot be loaded, version 2 answers: ")
        assert "not finite" in note

    def test_a_flipped_bit_is_refused(self, stage):
        """The digest is checked on load."""
        stage.publish(1)
        stage.now_s += 1.0
        path = stage.publish(2).path
        content = bytearray(path.read_bytes())
        content[-3] ^= 0x40
        path.write_bytes(content)

        stage.predictor.refresh()

        assert stage.predictor.current().step == 1
        assert "digest" in stage.predictor.notes()[0]

    def test_a_running_server_keeps_its_teacher(self, stage):
        """Even if another version is newer than it, and older than the refused one."""
        stage.publish(1)
        stage.predictor.refresh()
        stage.publish(2)
        stage.publish(3).path.write_bytes(b"torn")

        assert not stage.predictor.refresh()

        assert stage.predictor.current().step == 1
        assert stage.predictor.notes()[0].startswith("the newest version cannot be loaded, version 1 answers: ")

    def test_several_broken_versions_are_skipped(self, broken):
        """Each is counted and logged once."""
        teacher_path(broken.folder, 2).write_bytes(teacher_path(broken.folder, 2).read_bytes()[:-4] + b"\0\0\0\0")

        with capture_logs() as logged:
            broken.predictor.refresh()

        assert broken.predictor.current().step == 1
        failed = [line["step"] for line in logged if line["event"] == "model_load_failed"]
        assert failed == [3, 2]

    def test_if_no_version_can_be_loaded_the_error_has_the_reason(self, stage):
        """The folder is searched every few seconds, and logged once."""
        for step in (1, 2):
            stage.publish(step, classes='["b", "a", "c"]')
            stage.now_s += 1.0
        with capture_logs() as logged:
            for _ in range(3):
                stage.predictor.refresh()
        with pytest.raises(NotPublishedError, match=r"no published teacher can be loaded; the newest: .*class names"):
            stage.predictor.current()
        assert stage.failures == 2.0

        stage.now_s += RETRY_S
        with capture_logs() as logged_later:
            stage.predictor.refresh()

        assert stage.failures == 4.0
        assert [line["step"] for line in logged] == [2, 1]
        assert logged_later == []

    def test_the_next_valid_version_is_served(self, broken):
        """There are no notes then."""
        broken.predictor.refresh()
        broken.publish(4)

        assert broken.predictor.refresh()

        assert broken.predictor.current().step == 4
        assert broken.predictor.notes() == []

    def test_with_an_unreadable_pointer_the_newest_version_is_served(self, stage):
        """It is found in the folder."""
        stage.publish(1)
        (stage.folder / POINTER).write_bytes(b"torn")

        assert stage.predictor.refresh()

        assert stage.predictor.current().step == 1

    def test_with_a_broken_pin_an_older_version_is_served(self, broken):
        """In order: pinned, newest, older ones."""
        (broken.folder / PIN).write_bytes(b"torn")

        broken.predictor.refresh()

        assert broken.predictor.current().step == 2
        assert [note.split(" cannot")[0] for note in broken.predictor.notes()] == [
            "the pinned version",
            "the newest version",
        ]


class TestPinned:
    @pytest.fixture
    def pinned(self, stage):
        """Versions 1 to 3 are published; 2 is pinned and answers."""
        for step in (1, 2, 3):
            stage.publish(step)
        pin(stage.folder, 2)
        stage.predictor.refresh()
        return stage

    def test_an_older_teacher_replaces_a_newer_one(self, stage):
        """A rollback."""
        for step in (1, 2):
            stage.publish(step)
        stage.predictor.refresh()
        assert stage.predictor.current().step == 2

        pin(stage.folder, 1)

        assert stage.predictor.refresh()
        held = stage.predictor.current()
        assert (held.step, held.pinned, stage.predictor.newest_version) == (1, True, 2)
        assert "streamlearn_model_version 1.0" in stage.metrics.text()

    def test_a_version_published_later_does_not_answer(self, pinned):
        """It is `newest_version`, and in the notes."""
        pinned.publish(4)

        assert not pinned.predictor.refresh()

        assert (pinned.predictor.current().step, pinned.predictor.newest_version) == (2, 4)
        assert pinned.predictor.notes() == ["version 2 is pinned, the newest is 4"]

    def test_without_the_pin_the_newest_answers_again(self, pinned):
        """There are no notes then."""
        unpin(pinned.folder)

        assert pinned.predictor.refresh()

        assert (pinned.predictor.current().step, pinned.predictor.current().pinned) == (3, False)
        assert pinned.predictor.notes() == []

    def test_pinning_the_served_version_loads_nothing(self, stage):
        """The network stays the same object; only `pinned` changes, both ways."""
        stage.publish(1)
        stage.predictor.refresh()
        network = stage.predictor.current().network

        pin(stage.folder, 1)
        stage.predictor.refresh()
        while_pinned = stage.predictor.current()
        unpin(stage.folder)
        stage.predictor.refresh()

        assert while_pinned.network is stage.predictor.current().network is network
        assert (while_pinned.pinned, stage.predictor.current().pinned) == (True, False)

    @pytest.mark.parametrize("content", [b"torn", "NaN"], ids=["torn", "not finite"])
    def test_a_pin_that_cannot_be_loaded_leaves_the_newest(self, stage, content):
        """It is counted, noted, and logged once."""
        nan_in_all = {name: np.full_like(array, np.nan) for name, array in weights(1).items()}
        stage.publish(1, arrays=nan_in_all)
        pin(stage.folder, 1)
        if content == b"torn":
            (stage.folder / PIN).write_bytes(content)

        with capture_logs() as logged:
            for step in (2, 3):
                stage.publish(step)
                assert stage.predictor.refresh()

        assert (stage.predictor.current().step, stage.predictor.current().pinned) == (3, False)
        assert stage.failures == 1.0
        (error,) = (line for line in logged if line["log_level"] == "error")
        assert (error["event"], error["pinned"]) == ("model_load_failed", True)
        assert stage.predictor.notes()[0].startswith("the pinned version cannot be loaded, version 3 answers: ")

    def test_a_loaded_pin_stays_when_its_file_breaks(self, pinned):
        """The operator has rejected the newest."""
        (pinned.folder / PIN).write_bytes(b"torn")
        pinned.publish(4)

        assert not pinned.predictor.refresh()

        assert pinned.predictor.current().step == 2
        assert pinned.predictor.notes()[0].startswith("the pinned version cannot be loaded, version 2 answers: ")

    def test_a_removed_pin_clears_its_failure(self, stage):
        """There are no notes then."""
        stage.publish(1)
        (stage.folder / PIN).write_bytes(b"torn")
        stage.predictor.refresh()
        assert stage.predictor.notes()

        unpin(stage.folder)
        stage.predictor.refresh()

        assert stage.predictor.notes() == []

    def test_without_its_pin_a_version_stays_while_no_other_can_be_loaded(self, pinned):
        """It is no longer `pinned`."""
        teacher_path(pinned.folder, 3).write_bytes(b"torn")
        unpin(pinned.folder)

        pinned.predictor.refresh()

        assert (pinned.predictor.current().step, pinned.predictor.current().pinned) == (2, False)

    def test_following_and_leaving_a_pin_are_logged(self, stage):
        """By each server."""
        for step in (1, 2):
            stage.publish(step)
        with capture_logs() as logged:
            stage.predictor.refresh()
            pin(stage.folder, 1)
            stage.predictor.refresh()
            unpin(stage.folder)
            stage.predictor.refresh()

        reported = [(line["event"], line["step"]) for line in logged if line["log_level"] == "info"]
        assert reported == [("pin_followed", 1), ("pin_left", 2)]


class TestLoad:
    def test_raises_if_a_teacher_cannot_be_served(self, stage):
        """Without serving it."""
        good = stage.publish(1)
        bad = stage.publish(2, classes='["b", "a", "c"]')

        stage.predictor.load(good)
        with pytest.raises(StateError, match="class names"):
            stage.predictor.load(bad)

        with pytest.raises(NotPublishedError):
            stage.predictor.current()


class TestLearnedOffsets:
    def test_are_read_from_the_teachers_header(self, stage):
        """For requests that wait for a label."""
        stage.publish(1, learned_offsets='{"labels:0": 7}')
        stage.predictor.refresh()

        assert stage.predictor.current().learned_offsets == {"labels:0": 7}


def first(arrays):
    return next(name for name, array in arrays.items() if array.ndim == 2)


def nan(arrays):
    name = first(arrays)
    broken = arrays[name].copy()
    broken[0, 0] = np.nan
    return {name: broken}


class TestColumns:
    """A server that was restarted with a column that the teacher does not have yet."""

    @staticmethod
    def follow(stage, columns) -> Predictor:
        schema = Schema((width_of(columns),), np.dtype(np.float32), ("a", "b", "c"), columns=columns)
        return Predictor(stage.predictor.published, schema, stage.metrics, factory="table")

    @staticmethod
    def publish(stage, columns):
        spec = table_spec(columns)
        network = build(spec, seed=3).eval()
        stage.publish(1, spec=spec, arrays={name: tensor.numpy() for name, tensor in network.state_dict().items()})
        return network

    @pytest.mark.parametrize("added", [0, 2])
    def test_a_teacher_without_added_columns_answers_as_before(self, stage, added):
        """They are left out."""
        columns = COLUMNS[: len(COLUMNS) - added]
        network, predictor = self.publish(stage, columns), self.follow(stage, COLUMNS)
        x = rows(COLUMNS, 5)

        assert predictor.refresh()

        with torch.inference_mode():
            expected = network(torch.from_numpy(x[:, : width_of(columns)].copy())).softmax(dim=1).numpy()
        np.testing.assert_array_equal(predictor.current().probabilities(x), expected)

    @pytest.mark.parametrize(
        "columns",
        [COLUMNS[:-1], COLUMNS[::-1], (replace(COLUMNS[0], name="price"), *COLUMNS[1:]), ()],
        ids=["fewer", "another order", "another name", "none"],
    )
    def test_a_teacher_of_other_columns_is_refused(self, stage, columns):
        """It would read each place as something else."""
        self.publish(stage, COLUMNS)
        schema = Schema((width_of(columns or COLUMNS),), np.dtype(np.float32), ("a", "b", "c"), columns=columns)
        predictor = Predictor(stage.predictor.published, schema, stage.metrics)

        assert not predictor.refresh()
        with pytest.raises(NotPublishedError, match="expected columns"):
            predictor.current()
