"""The short form of `make soak`: real processes, real SIGKILLs, and nothing is lost or learned twice.

Each of the kills is a SIGKILL to a real process: half of them at a named place around a durable operation, the rest at
some time. Processes are forked from a warm one (`streamlearn.testing.nursery`), so a life costs a third of a second;
the last learner and the one that is never killed are started by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from streamlearn.testing.soak import Report, soak

KILLS, SEED = 30, 3


@pytest.mark.slow
@pytest.mark.timeout(240)
class TestKills:
    def test_nothing_is_lost_or_learned_twice_and_no_bit_differs(self, tmp_path: Path) -> None:
        """Against the log alone, and against a learner that was never killed, over the same cuts."""
        report = soak(tmp_path, kills=KILLS, seed=SEED)

        assert report.verdict.told + report.different == [], f"seed {SEED}"
        assert report.formed_otherwise == 0, f"seed {SEED}"
        self.assert_that_it_was_hard(report)

    @staticmethod
    def assert_that_it_was_hard(report: Report) -> None:
        """Kills happened, at places and elsewhere; there was something to lose."""
        assert report.kills >= KILLS
        assert report.points.total() >= KILLS / 3
        assert report.by["learner-kill"] > 0
        assert report.by["point-not-met"] <= 2
        assert report.verdict.acknowledged > 500
        assert report.steps > 50
