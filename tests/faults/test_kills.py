"""The short form of `make soak`: after SIGKILLs and bad disks nothing is lost and nothing is learned twice (I1 to I3).

Half of the kills come at kill points around durable operations, the others at random times. Processes are forked
(`harness.fork_server`), so a start takes a third of a second. Ten more start with the real command line and are killed
during the start (`harness.startups`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.report import SoakReport
from harness.soak import soak

KILLS, STARTUP_KILLS, SEED = 30, 10, 250
"""The faults of this seed include each kind asserted below, with and without a disk that can be filled."""


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestKills:
    def test_nothing_is_lost_or_learned_twice_and_no_bit_differs(self, tmp_path: Path) -> None:
        """Compared with the log alone, and with a learner that was never killed and takes the same steps."""
        report = soak(tmp_path, kills=KILLS + STARTUP_KILLS, startup_kills=STARTUP_KILLS, seed=SEED, rate=80.0)

        assert report.audit.problems + report.different == [], f"seed {SEED}"
        assert report.formed_otherwise == 0, f"seed {SEED}"
        assert report.refusals == [], f"seed {SEED}"
        self.assert_faults_occurred(report)

    @staticmethod
    def assert_faults_occurred(report: SoakReport) -> None:
        """Faults of all kinds happened, and there were records to lose."""
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
        assert report.audit.acknowledged > 500
        assert report.steps > 50
