"""Which candidate is served: hysteresis, ties, bounds, and what a restart keeps."""

from __future__ import annotations

import numpy as np
import pytest

from streamlearn.judge.election import Election


def votes(election: Election, *rows: list[int], times: int = 1) -> None:
    for _ in range(times):
        for row in rows:
            election.update(np.array(row, bool))


def election(**changed: object) -> Election:
    options = {"window": 100, "z": 1.64, "least": 10}
    return Election(("teacher", "ema 0.9", "twin"), **(options | changed))


class TestWinner:
    def test_is_the_one_in_office_before_there_are_enough_labels(self):
        """Nine of ten."""
        one = election()
        votes(one, [0, 1, 1], times=9)

        assert one.winner(0) == 0

    def test_is_the_challenger_with_a_clear_lead(self):
        """Twenty labels that only the twin had right."""
        one = election()
        votes(one, [0, 0, 1], times=20)

        assert one.winner(0) == 2
        assert one.winner(1) == 2
        assert one.winner(2) == 2

    def test_is_the_clearest_of_several(self):
        """Both lead; the one with more errors behind it wins."""
        one = election()
        votes(one, [0, 1, 1], [1, 1, 1], [0, 0, 1], [0, 1, 1], times=5)

        assert one.winner(0) == 2

    def test_needs_more_standard_errors_than_chance_gives(self):
        """B = 6, c = 4 of 20: 2 / sqrt(10 - 4/20) = 0.64 errors. Less than 1.64, more than 0.6."""
        only, missed, both = [[0, 1, 0]] * 6, [[1, 0, 1]] * 4, [[1, 1, 1]] * 10
        for z, wanted in ((1.64, 0), (0.65, 0), (0.63, 1)):
            one = election(z=z)
            votes(one, *only, *missed, *both)
            assert one.winner(0) == wanted

    def test_equals_never_change_places(self):
        """Whoever is in office, with a z of 0 too."""
        one = election(z=0.0)
        votes(one, [1, 0, 1], [0, 1, 1], [1, 1, 0], times=20)

        assert [one.winner(n) for n in range(3)] == [0, 1, 2]

    def test_forgets_what_left_the_window(self):
        """A lead of long ago does not count."""
        one = election(window=20)
        votes(one, [0, 0, 1], times=50)
        votes(one, [1, 0, 0], times=20)

        assert one.winner(2) == 0

    @pytest.mark.parametrize("seed", range(20))
    def test_seldom_moves_between_equals_by_luck(self, seed):
        """Three coins of equal worth: what is served changes hands a few times in 5,000 labels, not hundreds."""
        rng, one, served, moves = np.random.default_rng(seed), election(z=2.6, window=500, least=30), 0, 0
        for _ in range(5000):
            one.update(rng.random(3) < 0.8)
            moves += (winner := one.winner(served)) != served
            served = winner

        assert moves <= 12


class TestState:
    def test_goes_on_as_if_there_had_been_no_restart(self):
        """The window is all there is."""
        one, other = election(), election()
        rng = np.random.default_rng(0)
        for _ in range(130):
            one.update(rng.random(3) < 0.7)
        other.load(one.state())

        assert other.accuracies() == one.accuracies()
        assert [other.winner(n) for n in range(3)] == [one.winner(n) for n in range(3)]

    def test_of_other_candidates_is_left_behind(self):
        """One changes the bank in the config: the new candidates have no record."""
        one, other = election(), Election(("teacher", "twin"), window=100, z=1.0, least=1)
        votes(one, [0, 1, 1], times=20)

        other.load(one.state())

        assert other.accuracies() == {"teacher": None, "twin": None}
        assert other.winner(0) == 0
