"""What several processes build from the config."""

from __future__ import annotations

from streamlearn.app.build import REPLAY_BYTES, model_spec, recent_rows, replay_rows, wide_rows
from streamlearn.config import Config, load_config
from streamlearn.learn.recent import RECENT_BYTES, RECENT_ROWS
from streamlearn.log.feed import PREFETCH_BYTES, PREFETCH_RECORDS


def config(**overrides: object) -> Config:
    return load_config(environ={}, overrides=overrides)


def test_the_model_spec_follows_the_config() -> None:
    """Factory, options, and the shapes of input and output."""
    spec = model_spec(
        config(
            **{
                "model.factory": "convnet",
                "model.normalise": False,
                "schema.shape": [1, 8, 8],
                "schema.classes": 7,
                "schema.scale": 0.5,
            }
        )
    )

    assert (spec.factory, spec.shape, spec.classes, spec.normalise, spec.scale) == ("convnet", (1, 8, 8), 7, False, 0.5)
    assert spec.options == {}


def test_a_norm_is_an_option_of_the_network() -> None:
    """It is published with the weights. The default norm is not an option, so that older models stay equal."""
    spec = model_spec(config(**{"model.options": {"hidden": [8], "norm": "group"}}))

    assert spec.options == {"hidden": [8], "norm": "group"}
    assert model_spec(config(**{"model.options": {"hidden": [8]}})).options == {"hidden": [8]}


class TestBounds:
    """Of images a buffer holds fewer rows than the settings allow, but never less than a micro-batch."""

    SMALL, LARGE, HUGE = [64], [3, 224, 224], [3, 8192, 8192]

    def shaped(self, shape: list[int], **overrides: object) -> Config:
        return config(**{"schema.shape": shape, "batch.steps": 2, **overrides})

    def test_recent_samples(self) -> None:
        """They are in each checkpoint."""
        rows = [recent_rows(self.shaped(shape)) for shape in (self.SMALL, self.LARGE, self.HUGE)]

        assert rows == [RECENT_ROWS, RECENT_BYTES // (4 * 3 * 224 * 224), 64]

    def test_no_recent_samples_are_kept_if_no_step_uses_them(self) -> None:
        """One step per micro-batch, or a method without unlabelled samples."""
        assert recent_rows(self.shaped(self.SMALL, **{"batch.steps": 1})) == 0
        assert recent_rows(self.shaped(self.SMALL, **{"learn.method": "supervised"})) == 0

    def test_replay_buffer(self) -> None:
        """It is in each checkpoint."""
        rows = [replay_rows(self.shaped(shape)) for shape in (self.SMALL, self.LARGE, self.HUGE)]

        assert rows == [config().labels.replay_rows, REPLAY_BYTES // (4 * 3 * 224 * 224), 32]

    def test_micro_batch_under_overload(self) -> None:
        """Everything that is read ahead."""
        rows = [wide_rows(self.shaped(shape)) for shape in (self.SMALL, self.LARGE, self.HUGE)]

        assert rows == [PREFETCH_RECORDS, PREFETCH_BYTES // (4 * 3 * 224 * 224), 64]
