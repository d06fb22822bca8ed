"""Recipes give the defaults that docs/learning.md reports, whatever the sections look like."""

from __future__ import annotations

from typing import Any

import pytest

from streamlearn.config import load_config
from streamlearn.learn.methods.settings import OPTIONS
from streamlearn.learn.settings import LearnConfig

IMAGE_ICT = {
    "consistency": "kl",
    "consistency_weight": 1.0,
    "align": "labels",
    "rampup_steps": 500,
    "rampup_labels": 50,
    "fade_labels": 50,
    "mixup_beta": 0.5,
    "contrast_weight": 0.3,
}
TABLE_MEAN_TEACHER = {
    "consistency": "mse",
    "consistency_weight": 5.0,
    "rampup_steps": 0,
    "rampup_labels": 100,
    "mixup_beta": 0.2,
}
MIXED, MIXED_ROWS = {"mixup_beta": 0.5}, {"mixup_beta": 0.2}
EXPECTED: dict[str, tuple[float, float, dict[str, dict[str, Any]]]] = {
    "image": (0.995, 0.1, {"ict": IMAGE_ICT, "mean_teacher": MIXED, "pi": MIXED, "supervised": MIXED}),
    "table": (
        0.8,
        0.1,
        {"ict": MIXED_ROWS, "mean_teacher": TABLE_MEAN_TEACHER, "pi": MIXED_ROWS, "supervised": MIXED_ROWS},
    ),
    "none": (0.995, 1.0, {}),
}
"""By recipe: alpha, share of steps in the average, and what differs from the defaults of each method's options."""
OF_PAPERS = {
    "consistency": "mse",
    "consistency_weight": 3.0,
    "rampup_steps": 500,
    "rampup_labels": 0,
    "fade_labels": 0,
    "align": "none",
    "gate": "none",
    "gate_threshold": 0.95,
    "temperature": 1.0,
    "target_momentum": 0.99,
    "teacher_mode": "eval",
    "mixup_beta": 0.0,
    "interpolation_beta": 0.5,
    "contrast_weight": 0.0,
    "ensemble_momentum": 0.6,
    "ensemble_slots": 65_536,
    "source_path": "x.npz",
    "source_rows": 32,
    "source_weight": 0.1,
    "source_margin": 1.0,
}
IMAGES = {"schema.shape": [1, 8, 8]}


def loaded(**overrides: Any) -> LearnConfig:
    return load_config(environ={}, overrides={key.replace("__", "."): value for key, value in overrides.items()}).learn


def defaults_of(method: str) -> dict[str, Any]:
    return {name: OF_PAPERS[name] for name in OPTIONS[method].model_fields}


@pytest.mark.parametrize("recipe", EXPECTED)
@pytest.mark.parametrize("method", OPTIONS)
def test_each_method_has_the_defaults_of_the_recipe(recipe: str, method: str) -> None:
    """All of them where the method is the recipe's own, else those of labelled rows."""
    source = {"learn__options__source_path": "x.npz"} if method == "dsne" else {}

    learn = loaded(learn__recipe=recipe, learn__method=method, **source)

    alpha, share, options = EXPECTED[recipe]
    assert (learn.ema_decay, learn.ema_share) == (alpha, share)
    assert learn.options.model_dump() == defaults_of(method) | options.get(method, {})
    assert (learn.optimizer, learn.learning_rate, learn.weight_decay) == ("adamw", 3e-3, 1e-4)


@pytest.mark.parametrize(
    ("settings", "recipe", "method"),
    [
        ({}, "table", "mean_teacher"),
        ({"schema.shape": [5, 7]}, "table", "mean_teacher"),
        (IMAGES, "image", "ict"),
        ({"learn.recipe": "image"}, "image", "ict"),
        (IMAGES | {"learn.recipe": "auto"}, "image", "ict"),
        (IMAGES | {"learn.recipe": "table"}, "table", "mean_teacher"),
        (IMAGES | {"learn.recipe": "none"}, "none", "mean_teacher"),
        (IMAGES | {"learn.method": "ict"}, "image", "ict"),
    ],
)
def test_auto_is_resolved_by_the_shape(settings: dict[str, object], recipe: str, method: str) -> None:
    """Images have three dimensions; everything else is a table."""
    learn = load_config(environ={}, overrides=settings).learn

    assert (learn.recipe, learn.method) == (recipe, method)
    assert learn.follows_recipe
    assert learn.options == OPTIONS[method](**defaults_of(method) | EXPECTED[recipe][2].get(method, {}))


@pytest.mark.parametrize(("shape", "noise"), [([4], "table"), ([1, 8, 8], "image")])
def test_auto_noise_is_resolved_by_the_shape(shape: list[int], noise: str) -> None:
    """A noise that is set stays."""
    assert load_config(environ={}, overrides={"schema.shape": shape}).learn.noise == noise
    assert load_config(environ={}, overrides={"schema.shape": shape, "learn.noise": "none"}).learn.noise == "none"


def test_a_setting_wins_over_the_recipe() -> None:
    """Each by itself."""
    learn = load_config(environ={}, overrides=IMAGES | {"learn.options.mixup_beta": 0.0, "learn.ema_decay": 0.9}).learn

    assert learn.options.model_dump() == defaults_of("ict") | IMAGE_ICT | {"mixup_beta": 0.0}
    assert learn.ema_decay == 0.9


@pytest.mark.parametrize("overrides", [{"learn.seed": 3}, {"learn.options.align": "uniform"}, {"learn.noise": "none"}])
def test_defaults_of_a_recipe_count_as_not_set(overrides: dict[str, object]) -> None:
    """`evaluate` builds the config again with the data set's shape, and only what was set may be passed on."""
    dumped = load_config(environ={}, overrides=overrides).model_dump(exclude_unset=True)

    assert load_config(environ={}, overrides=overrides) == load_config(environ={}, overrides=dumped)
    ((key, value),) = overrides.items()
    *tables, name = key.split(".")
    expected: dict[str, Any] = {name: value}
    for table in reversed(tables):
        expected = {table: expected}
    assert dumped == expected


def test_nothing_set_dumps_as_nothing() -> None:
    """Not even an empty [learn]."""
    assert load_config(environ={}).model_dump(exclude_unset=True) == {}
