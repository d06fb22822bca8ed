"""Label delays: the grammar and the distributions."""

from __future__ import annotations

import numpy as np
import pytest

from streamlearn.errors import ConfigError
from streamlearn.lab.delays import MAX_DELAY, Delay, parse_delay


def draw(text: str, count: int = 20_000, seed: int = 0, rate: float | None = None) -> list[int]:
    delays: list[int] = parse_delay(text).draw(count, np.random.default_rng(seed), samples_per_s=rate).tolist()
    return delays


class TestGrammar:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("0", Delay("constant", 0, 0, "samples")),
            ("500", Delay("constant", 500, 500, "samples")),
            ("10s", Delay("constant", 10, 10, "seconds")),
            ("1.5m", Delay("constant", 90, 90, "seconds")),
            ("2d", Delay("constant", 172_800, 172_800, "seconds")),
            ("uniform:100:1000", Delay("uniform", 100, 1000, "samples")),
            ("uniform:0:1h", Delay("uniform", 0, 3600, "seconds")),
            ("uniform:0:0", Delay("uniform", 0, 0, "samples")),
            ("exponential:10s", Delay("exponential", 10, 10, "seconds")),
            (" exponential:0.5 ", Delay("exponential", 0.5, 0.5, "samples")),
            ("geometric:5000", Delay("geometric", 5000, 5000, "samples")),
        ],
    )
    def test_names_a_distribution(self, text: str, expected: Delay) -> None:
        """Numbers are samples unless a unit of time follows; zero fits both."""
        assert parse_delay(text) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "-1",
            "1.5",
            "x",
            "10ms",
            "1e3",
            "nan",
            "inf",
            "uniform",
            "uniform:1",
            "uniform:5:1",
            "uniform:1:2:3",
            "uniform:1:10s",
            "uniform:1.5:3",
            "geometric:0",
            "geometric:0.5",
            "geometric:10s",
            "exponential:",
            "exponential:1:2",
            "5:5",
            "constant:5",
            "2000000000",
            "99999d",
            "1_0",
            "٣",
        ],
    )
    def test_refuses_everything_else(self, text: str) -> None:
        """The message names the option."""
        with pytest.raises(ConfigError, match="label delay"):
            parse_delay(text)


class TestDraws:
    def test_a_constant_delay_is_constant(self) -> None:
        """All draws are equal."""
        assert set(draw("500")) == {500}

    def test_uniform_includes_both_bounds(self) -> None:
        """And nothing beyond them."""
        assert set(draw("uniform:3:6")) == {3, 4, 5, 6}

    @pytest.mark.parametrize(("text", "mean"), [("geometric:50", 50), ("exponential:50", 49.5), ("geometric:1", 1)])
    def test_memoryless_delays_have_the_given_mean(self, text: str, mean: float) -> None:
        """Within four standard errors; exponential delays are rounded down to samples."""
        delays = np.array(draw(text))

        assert abs(delays.mean() - mean) <= 4 * delays.std() / np.sqrt(len(delays))

    def test_geometric_is_at_least_one_sample(self) -> None:
        """A label never comes with its sample."""
        assert min(draw("geometric:2")) == 1

    @pytest.mark.parametrize(("text", "low", "high"), [("10s", 25, 25), ("0.1s", 1, 1), ("uniform:2s:4s", 5, 10)])
    def test_time_becomes_samples_by_the_rate(self, text: str, low: int, high: int) -> None:
        """10 s at 2.5 samples per second are 25 samples; fractions are rounded up."""
        delays = draw(text, rate=2.5)

        assert (min(delays), max(delays)) in ((low, high), (low + 1, high))

    def test_time_without_a_rate_is_refused(self) -> None:
        """It cannot be converted to samples."""
        with pytest.raises(ConfigError, match="needs a rate"):
            draw("10s")

    def test_a_number_too_long_for_a_float_is_refused(self) -> None:
        """It would be infinite."""
        with pytest.raises(ConfigError, match="label delay"):
            parse_delay("1" * 400)

    def test_the_same_seed_draws_the_same_delays(self) -> None:
        """Another seed draws other delays."""
        assert draw("geometric:500", seed=1) == draw("geometric:500", seed=1)
        assert draw("geometric:500", seed=1) != draw("geometric:500", seed=2)

    def test_no_draw_exceeds_the_bound(self) -> None:
        """Even for a long tail and a high rate."""
        assert max(draw("exponential:10000d", rate=1e6)) == MAX_DELAY
