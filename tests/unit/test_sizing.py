"""The memory of the processes: bounded parts and networks."""

from __future__ import annotations

import pytest

from streamlearn.app.build import REPLAY_BYTES, make_learner
from streamlearn.app.sizing import activation_bytes, learner_parts, server_parts
from streamlearn.config import Config, load_config
from streamlearn.learn.recent import RECENT_BYTES
from streamlearn.log.base import POLL_BYTES
from streamlearn.log.feed import PREFETCH_BYTES


def config_in(**overrides: object) -> Config:
    settings = {"schema.shape": [4], "schema.classes": 3, "model.options": {"hidden": [8]}, "learn.device": "cpu"}
    return load_config(environ={}, overrides={**settings, **overrides})


def test_with_large_rows_each_part_is_within_its_bytes() -> None:
    """The name shows how many rows fit."""
    rows = {"schema.shape": [3, 224, 224], "schema.dtype": "float32", "batch.steps": 4}
    config = config_in(**rows)

    parts = {part.name: part.size_bytes for part in learner_parts(config, make_learner(config))}

    assert parts["replay buffer (891 of 5,000 rows)"] <= REPLAY_BYTES
    assert parts["recent samples (111 of 2,048 rows)"] <= RECENT_BYTES
    assert parts["read ahead (445 of 2,048 rows)"] <= PREFETCH_BYTES + POLL_BYTES


def test_with_small_rows_all_rows_fit() -> None:
    """Then the name has no number of rows."""
    config = config_in()

    parts = {part.name: part.size_bytes for part in learner_parts(config, make_learner(config))}

    assert parts["replay buffer"] == config.labels.replay_rows * 4 * 4


def test_networks_are_counted() -> None:
    """Student with gradient, teacher, two moments of AdamW; the same of the twin. The projector has no teacher."""
    wide = {"model.options": {"hidden": [1000, 1000]}}
    config = config_in(**wide, **{"learn.twin": "elect"})
    without = config_in(**wide, **{"learn.twin": "off"})
    contrast = config_in(**wide, **{"learn.twin": "off", "learn.options.contrast_weight": 0.3})
    weights = 4 * (4 * 1000 + 1000 + 1000 * 1000 + 1000 + 1000 * 3 + 3)
    projector = 4 * (1000 * 64 + 64 + 64 * 32 + 32)

    for chosen, expected in ((config, 10 * weights), (without, 5 * weights), (contrast, 5 * weights + 4 * projector)):
        parts = {part.name: part.size_bytes for part in learner_parts(chosen, make_learner(chosen))}
        assert parts["networks, averages, optimizer, gradients"] == pytest.approx(expected, rel=0.01)
        assert parts["good teachers of the guard"] == pytest.approx(3 * weights, rel=0.01)

    servers = {part.name: part.size_bytes for part in server_parts(config, make_learner(config))}
    assert servers["teachers"] == pytest.approx(3 * weights, rel=0.01)


def test_activations_are_the_outputs_of_all_layers() -> None:
    """Of one row, in float32."""
    wide, narrow = (activation_bytes(config_in(**{"model.options": {"hidden": [size]}})) for size in (1000, 100))

    assert wide - narrow == pytest.approx(4 * 900 * 2, rel=0.5), "a linear layer and what follows it"
