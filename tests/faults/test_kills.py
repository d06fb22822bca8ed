"""The short form of `make soak`: real processes, real SIGKILLs, bad disks, and nothing is lost or learned twice.

Each of the kills is a SIGKILL to a real process: half of them at a named place around a durable operation, the rest at
some time. Processes are forked from a warm one (`harness.fork_server`), so a life costs a third of a second;
the last learner and the one that is never killed are started by hand. Ten more are started by hand and killed while
they start (`harness.startups`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.report import Report
from harness.soak import soak

KILLS, STARTUP_KILLS, SEED = 30, 10, 250
"""This seed's faults are of each kind that is asked for below, with a disk that can be filled and without."""


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestKills:
    def test_nothing_is_lost_or_learned_twice_and_no_bit_differs(self, tmp_path: Path) -> None:
        """Against the log alone, and against a learner that was never killed, over the same cuts."""
        report = soak(tmp_path, kills=KILLS + STARTUP_KILLS, startup_kills=STARTUP_KILLS, seed=SEED, rate=80.0)

        assert report.verdict.told + report.different == [], f"seed {SEED}"
        assert report.formed_otherwise == 0, f"seed {SEED}"
        assert report.refusals == [], f"seed {SEED}"
        self.assert_that_it_was_hard(report)

    @staticmethod
    def assert_that_it_was_hard(report: Report) -> None:
        """Kills happened, at places and elsewhere; there was something to lose."""
        assert report.kills >= KILLS + STARTUP_KILLS
        assert report.startup_kills == STARTUP_KILLS
        assert report.points.total() >= KILLS / 3
        assert report.by["learner-kill"] > 0
        assert report.by["point-not-met"] <= 2
        assert report.by["producer-hold"] > 0
        assert report.by["damage-store-end"] > 0
        assert report.by["damage-store-garbage"] > 0
        assert report.by["damage-log-trim"] > 0
        assert report.lost > 0
        assert report.by["disk-fill"] > 0 or report.by["disk-cannot-be-filled"] > 0
        assert report.verdict.acknowledged > 500
        assert report.steps > 50
