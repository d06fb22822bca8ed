"""How long a label takes to come, drawn at random for each label from a seed.

Grammar, in samples of the stream or, with a unit s, m, h or d after the number, in time:

    0                       with its sample
    500       10s           always the same
    uniform:100:1000        any whole number of samples from 100 to 1000; uniform:1s:1m any time between
    exponential:5000        memoryless with this mean; exponential:10m
    geometric:5000          memoryless with this mean, at least one sample; samples only

Time is the time of the stream, in which samples are evenly spaced by its rate.
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
"""In samples, or in seconds: the bound of every number in the grammar, and of every draw."""

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)?", re.ASCII)
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_ARGUMENTS = {"uniform": 2, "exponential": 1, "geometric": 1}
_WANTED = "wanted 0, 500, 10s, uniform:100:1000, exponential:10s or geometric:5000 (units s, m, h, d; none is samples)"


@dataclass(frozen=True, slots=True)
class Delay:
    """A distribution of label delays. `low` is the mean where there is one parameter."""

    kind: Literal["constant", "uniform", "exponential", "geometric"]
    low: float
    high: float
    unit: Literal["samples", "seconds"]

    def draw(
        self, count: int, generator: np.random.Generator, *, samples_per_s: float | None = None
    ) -> npt.NDArray[np.int64]:
        """`count` delays in whole samples, rounded up from time by the rate.

        Raises:
            ConfigError: the delay is in time and there is no rate.
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
        """Whether the delay can be told in samples.

        Raises:
            ConfigError: it is in time and there is no rate.
        """
        if self.unit == "seconds" and samples_per_s is None:
            raise ConfigError("label delay: a delay in time wants a rate; give one, or a delay in samples")


def parse_delay(text: str) -> Delay:
    """The distribution that a text of the module's grammar names.

    Raises:
        ConfigError: it is not of the grammar, out of bounds, or mixes samples and time.
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
        raise ConfigError(f"label delay {text!r:.80}: wanted rising numbers of one unit, whole if samples, up to 1e9")
    if kind == "geometric" and (in_time or low < 1):
        raise ConfigError(f"label delay {text!r:.80}: a geometric delay wants a mean of at least 1, in samples")
    return Delay(kind, low, high, "seconds" if in_time else "samples")  # type: ignore[arg-type]


def _quantities(text: str, arguments: Sequence[str]) -> tuple[list[float], set[bool]]:
    """The numbers, times in seconds, and which of {samples: False, time: True} were met. Zero is of either kind."""
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
