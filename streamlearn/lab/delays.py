"""Delays from samples to their labels, drawn per label.

Grammar, in samples of the stream or, with a unit (s, m, h, d), in time:

    0                       no delay
    500       10s           constant
    uniform:100:1000        whole samples from 100 to 1000, both included; uniform:1s:1m
    exponential:5000        exponential with this mean; exponential:10m
    geometric:5000          geometric with this mean, at least one sample; samples only

Time is event time: samples are evenly spaced by the rate of the stream.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from streamlearn.errors import ConfigError

MAX_DELAY = 1e9
"""Bound of every number in the grammar and of every draw, in samples or seconds."""

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)?", re.ASCII)
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_ARGUMENTS = {"uniform": 2, "exponential": 1, "geometric": 1}
_WANTED = (
    "wanted 0, 500, 10s, uniform:100:1000, exponential:10s or geometric:5000 (units s, m, h, d; no unit means samples)"
)


@dataclass(frozen=True, slots=True)
class Delay:
    """A distribution of label delays. With one parameter, `low` is the mean."""

    kind: Literal["constant", "uniform", "exponential", "geometric"]
    low: float
    high: float
    unit: Literal["samples", "seconds"]

    def draw(
        self, count: int, generator: np.random.Generator, *, samples_per_s: float | None = None
    ) -> npt.NDArray[np.int64]:
        """Draw `count` delays in whole samples; times are converted with the rate and rounded up.

        Raises:
            ConfigError: the delay is in time and `samples_per_s` is None.
        """
        self.check_rate(samples_per_s)
        if self.kind == "constant":
            drawn = np.full(count, self.low)
        elif self.kind == "uniform" and self.unit == "samples":
            drawn = generator.integers(int(self.low), int(self.high), count, endpoint=True).astype(np.float64)
        elif self.kind == "uniform":
            drawn = generator.uniform(self.low, self.high, count)
        elif self.kind == "exponential":
            drawn = generator.exponential(self.low, count)
        else:
            drawn = generator.geometric(1.0 / self.low, count).astype(np.float64)
        if self.unit == "seconds" and samples_per_s is not None:
            drawn = np.ceil(drawn * samples_per_s)
        delays: npt.NDArray[np.int64] = np.minimum(drawn, MAX_DELAY).astype(np.int64)
        return delays

    def check_rate(self, samples_per_s: float | None) -> None:
        """Check that the delay can be converted to samples.

        Raises:
            ConfigError: the delay is in time and `samples_per_s` is None.
        """
        if self.unit == "seconds" and samples_per_s is None:
            raise ConfigError("label delay: a delay in time needs a rate; give a rate, or a delay in samples")


def parse_delay(text: str) -> Delay:
    """Parse the grammar of this module.

    Raises:
        ConfigError: invalid syntax, out of bounds, or samples and time mixed.
    """
    kind, *arguments = text.strip().split(":")
    if not arguments and _QUANTITY.fullmatch(kind):
        kind, arguments = "constant", [kind]
    elif _ARGUMENTS.get(kind) != len(arguments):
        raise ConfigError(f"label delay {text!r:.80}: {_WANTED}")
    quantities, units = _quantities(text, arguments)
    low, high = quantities[0], quantities[-1]
    in_time = units.pop()
    whole = in_time or all(quantity.is_integer() for quantity in quantities)
    if units or high < low or high > MAX_DELAY or (not whole and kind in ("constant", "uniform")):
        raise ConfigError(
            f"label delay {text!r:.80}: wanted ascending numbers of one unit, whole if samples, up to 1e9"
        )
    if kind == "geometric" and (in_time or low < 1):
        raise ConfigError(f"label delay {text!r:.80}: wanted a mean of at least 1, in samples")
    return Delay(kind, low, high, "seconds" if in_time else "samples")  # type: ignore[arg-type]


def _quantities(text: str, arguments: Sequence[str]) -> tuple[list[float], set[bool]]:
    """The numbers (times in seconds) and the kinds of units seen: False is samples, True is time. 0 fits both."""
    quantities, units = [], set()
    for argument in arguments:
        match = _QUANTITY.fullmatch(argument)
        if match is None:
            raise ConfigError(f"label delay {text!r:.80}: {_WANTED}")
        quantity = float(match[1]) * _SECONDS.get(match[2], 1.0)
        if not math.isfinite(quantity):
            raise ConfigError(f"label delay {text!r:.80}: {_WANTED}")
        quantities.append(quantity)
        if match[2] or quantity or len(arguments) == 1:
            units.add(match[2] is not None)
    return quantities, units or {False}
