"""The plot of an evaluation: drawn from the defined scores, reproducible byte for byte."""

from __future__ import annotations

import io
import sys
from dataclasses import fields
from typing import Any

import pytest
from PIL import Image

from streamlearn.errors import ConfigError
from streamlearn.lab.curves import CurvePoint
from streamlearn.lab.plots import check_can_plot, draw

NAMES = ("oracle", "observed", "observed_since", "at_label_teacher", "at_label_twin", "majority", "no_change")
GAIN = {"ssl_gain": 0.1, "ssl_gain_low": -0.1, "ssl_gain_high": 0.3}


def point(samples: int, **values: float | None) -> CurvePoint:
    undefined = dict.fromkeys(field.name for field in fields(CurvePoint))
    return CurvePoint(**{**undefined, "samples": samples, "oracle": 0.5, **values})  # type: ignore[arg-type]


def drawn(*points: CurvePoint, **changes: Any) -> bytes:
    options = {"title": "digits", "subtitle": "seed 0", "window": 10, "test_accuracy": None, "drifts_at": []}
    return draw(points, **{**options, **changes})


def height(png: bytes) -> int:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        image.load()
        return image.height


def test_one_point_is_enough() -> None:
    """A stream of one window without labels."""
    assert height(drawn(point(10))) > 300


def test_the_gain_has_its_own_panel_if_there_is_a_twin() -> None:
    """Below the accuracies."""
    without, with_twin = drawn(point(10), point(20)), drawn(point(10), point(20, at_label_twin=0.4, **GAIN))

    assert height(with_twin) > height(without)


def test_the_same_curves_give_the_same_bytes() -> None:
    """No date, no version, no state of an earlier plot."""
    curves = (point(10), point(20, observed=0.3, **GAIN))

    assert drawn(*curves) == drawn(*curves)


@pytest.mark.parametrize("name", NAMES)
def test_each_curve_is_drawn(name: str) -> None:
    """A plot with the curve differs from one without."""
    assert drawn(point(10), point(20)) != drawn(point(10, **{name: 0.4}), point(20, **{name: 0.9}))


@pytest.mark.parametrize("changes", [{"test_accuracy": 0.7}, {"drifts_at": [15]}, {"title": "moons"}, {"window": 20}])
def test_other_elements_are_drawn(changes: dict[str, Any]) -> None:
    """Held-out test, drifts, title, window."""
    assert drawn(point(10), point(20)) != drawn(point(10), point(20), **changes)


def test_a_drift_that_was_not_reached_is_not_drawn() -> None:
    """The stream ends before it."""
    assert drawn(point(10), point(20), drifts_at=[0, 21]) == drawn(point(10), point(20))


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the option to go without."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(ConfigError, match=r"pip install 'streamlearn\[lab\]'.*--no-plot"):
        check_can_plot()
