"""Simulated drift: changes of inputs, classes or class priors over a range of samples.

Grammar: KIND[:VALUE][@START[-END]], comma-separated, applied in the given order. START is the number of the first
changed sample (default 0), END of the first sample after the change (default: none).

    rotate:90@30000             rotate images by degrees, counter-clockwise
    noise:0.3@30000             add Gaussian noise, in standard deviations of the data set
    permute-labels@30000-60000  permute the classes, so that each one changes
    prior:10@30000              resample with unequal classes: the most frequent is 10 times the rarest
    none                        no change

A recurring concept is a drift with an END.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from streamlearn.errors import ConfigError
from streamlearn.lab.datasets import Classes, Dataset
from streamlearn.records import UNLABELLED, Array

MAX_DRIFTS = 100

_SPEC = re.compile(r"([a-z-]+?)(?::(-?[0-9]+(?:\.[0-9]+)?))?(?:@([0-9]{1,18})(?:-([0-9]{1,18}))?)?", re.ASCII)
_KINDS = ("rotate", "noise", "permute-labels", "prior")
_VALUES = {"rotate": (-360.0, 360.0), "noise": (0.0, 100.0), "prior": (1.0, 1e6)}
_WANTED = "wanted rotate:DEGREES, noise:STD, permute-labels, prior:RATIO or none, with @START or @START-END after it"


@dataclass(frozen=True, slots=True)
class Drift:
    """One change of the samples from number `start` up to but without `end`."""

    kind: Literal["rotate", "noise", "permute-labels", "prior"]
    value: float = 0.0
    start: int = 0
    end: int | None = None

    def holds_at(self, index: int) -> bool:
        """Whether sample `index` is changed."""
        return self.start <= index and (self.end is None or index < self.end)


def parse_drift(text: str) -> tuple[Drift, ...]:
    """Parse the grammar of this module.

    Raises:
        ConfigError: invalid syntax.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > MAX_DRIFTS:
        raise ConfigError(f"drift: wanted at most {MAX_DRIFTS}, got {len(parts)}")
    return tuple(drift for part in parts if (drift := _parse_one(part)) is not None)


def _parse_one(text: str) -> Drift | None:
    match = _SPEC.fullmatch(text)
    if match is None:
        raise ConfigError(f"drift {text!r:.80}: {_WANTED}")
    kind, value, start, end = match.groups()
    if text == "none":
        return None
    if kind not in _KINDS or (value is not None) != (kind in _VALUES):
        raise ConfigError(f"drift {text!r:.80}: {_WANTED}")
    number = float(value or 0)
    low, high = _VALUES.get(kind, (0.0, 0.0))
    if not low <= number <= high:
        raise ConfigError(f"drift {text!r:.80}: wanted a value from {low:g} to {high:g}")
    drift = Drift(cast(Literal["rotate"], kind), number, int(start or 0), None if end is None else int(end))
    if drift.end is not None and drift.end <= drift.start:
        raise ConfigError(f"drift {text!r:.80}: wanted an end after the start")
    return drift


class Drifts:
    """Applies drifts to a data set. A pure function of (seed, sample number, sample)."""

    def __init__(self, dataset: Dataset, drifts: Sequence[Drift], *, seed: int) -> None:
        self._drifts = tuple(drifts)
        self._seed = seed
        shape = dataset.x.shape[1:]
        for drift in self._drifts:
            if drift.kind in ("rotate", "noise") and dataset.records is not None and dataset.records.have_columns:
                raise ConfigError(
                    f"drift {drift.kind}: wanted permute-labels or prior, since rows of [columns] also hold flags and"
                    " codes, which it would change"
                )
            if drift.kind == "rotate":
                _check_rotation(drift, shape)
        self._permutation = _cycle(len(dataset.classes), seed)
        if any(drift.kind == "noise" for drift in self._drifts):
            self._std = float(dataset.x.std(dtype=np.float64))
            self._low, self._high = float(dataset.x.min()), float(dataset.x.max())

    def show(self, index: int, x: Array, y: int) -> tuple[Array, int]:
        """The sample and its class as number `index` of the stream. `x` is not changed in place."""
        for drift in self._drifts:
            if not drift.holds_at(index):
                continue
            if drift.kind == "rotate":
                x = rotate(x, drift.value)
            elif drift.kind == "noise":
                x = self._with_noise(x, drift.value, index)
            elif drift.kind == "permute-labels" and y != UNLABELLED:
                y = int(self._permutation[y])
        return x, y

    def rows(self, rows_N: npt.NDArray[np.int64], y: Classes, *, first: int) -> npt.NDArray[np.int64]:
        """Rows shown as the samples from number `first` on: those given, or resampled under a `prior` drift.

        `prior` draws a class by `prior_of`, then a row of it, with replacement. A class without rows never occurs, nor
        does a row without a class.
        """
        shown_N = rows_N
        for drift in self._drifts:
            if drift.kind != "prior":
                continue
            generator = np.random.default_rng((self._seed, 103, first))
            weight_C = prior_of(len(self._permutation), drift.value, seed=self._seed)
            counts_C = np.bincount(y[y != UNLABELLED], minlength=len(weight_C))
            weight_M = np.where(y != UNLABELLED, weight_C[y] / np.maximum(counts_C[y], 1), 0.0)
            drawn_N = generator.choice(len(y), len(rows_N), p=weight_M / weight_M.sum())
            numbers = np.arange(first, first + len(rows_N))
            holds_N = (numbers >= drift.start) & (numbers < (np.inf if drift.end is None else drift.end))
            shown_N = np.where(holds_N, drawn_N, shown_N)
        return shown_N

    def _with_noise(self, x: Array, amount: float, index: int) -> Array:
        generator = np.random.default_rng((self._seed, 101, index))
        noisy = x.astype(np.float64) + generator.normal(0.0, amount * self._std, x.shape)
        return _as_dtype(noisy, x.dtype, self._low, self._high)


def prior_of(classes: int, ratio: float, *, seed: int) -> npt.NDArray[np.float64]:
    """Shares of C classes, falling geometrically; the most frequent is `ratio` times the rarest.

    The profile of long-tailed benchmarks (Cui et al. 2019). The seed orders the classes.
    """
    places_C = np.random.default_rng((seed, 104)).permutation(classes)
    weight_C = np.float64(ratio) ** (-places_C / max(classes - 1, 1))
    shares_C: npt.NDArray[np.float64] = weight_C / weight_C.sum()
    return shares_C


def rotate(x: Array, degrees: float) -> Array:
    """Rotate an image, (H, W) or (C, H, W), counter-clockwise; pixels from outside are zero.

    Multiples of 90 degrees are exact. Other angles are bilinear, per channel.
    """
    if degrees % 90 == 0:
        return np.ascontiguousarray(np.rot90(x, int(degrees // 90) % 4, axes=(-2, -1)))
    height, width = x.shape[-2:]
    planes = [
        np.asarray(Image.fromarray(plane).rotate(degrees, Image.Resampling.BILINEAR))
        for plane in x.reshape(-1, height, width).astype(np.float32)
    ]
    turned = np.stack(planes).reshape(x.shape).astype(np.float64)
    return _as_dtype(turned, x.dtype, float(turned.min()), float(turned.max()))


def _check_rotation(drift: Drift, shape: tuple[int, ...]) -> None:
    if len(shape) not in (2, 3):
        raise ConfigError(
            f"drift rotate: wanted images, (height, width) or (channels, height, width), got {list(shape)}"
        )
    if drift.value % 180 == 90 and shape[-1] != shape[-2]:
        raise ConfigError(f"drift rotate:{drift.value:g}: wanted square images for a quarter turn, got {list(shape)}")


def _as_dtype(
    values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], dtype: np.dtype[np.generic], low: float, high: float
) -> Array:
    """Cast; integers are rounded and clipped."""
    if dtype.kind == "f":
        return values.astype(dtype)
    return np.clip(np.rint(values), low, high).astype(dtype)


def _cycle(classes: int, seed: int) -> Classes:
    """A permutation with a single cycle, so that every class changes."""
    order = np.random.default_rng((seed, 102)).permutation(classes)
    permutation = np.empty(classes, np.int64)
    permutation[order] = np.roll(order, -1)
    return permutation
