"""Predictions as a stream: 500 samples/s while learner, scorers and broker are killed; read by a foreign client.

Prints the latency from arrival to prediction outside faults, as a consumer of confluent-kafka sees it, how long each
fault made samples late (shortest and longest), duplicates and losses. Ten minutes with 20 kills; --minutes changes
that, with a kill every 30 s.

Run: python benchmarks/score.py [--quick] [--minutes 10]. The last line is JSON. Exits with 1 if a sample was lost or
answered twice.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from common import figures, tell
from harness.stream_out import run

RATE = 500.0
KILL_EVERY_S = 30.0
ORDER = ("scorer", "learner", "scorer", "broker")


def main() -> None:
    """Run, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one minute with three kills")
    parser.add_argument("--minutes", type=float, default=10.0)
    given = parser.parse_args()
    seconds = 60.0 if given.quick else given.minutes * 60.0
    kills = [*ORDER[1:]] if given.quick else [ORDER[n % 4] for n in range(max(1, int(seconds / KILL_EVERY_S)))]
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder), kills, seconds=seconds, rate=RATE, say=tell)
    p50, p99 = report.quantile_s(0.5), report.quantile_s(0.99)
    figures(
        samples=report.sent,
        seconds=seconds,
        kills=dict(report.kills),
        lost=report.lost,
        duplicates=report.duplicates,
        without_version=report.without_version,
        versions=report.versions,
        p50_s=p50 and round(p50, 3),
        p99_s=p99 and round(p99, 3),
        recovery_s={what: [round(min(took), 1), round(max(took), 1)] for what, took in report.recoveries_s.items()},
        measured_outside_faults=len(report.latencies_s),
        worst_s=round(report.worst_s, 1),
    )
    sys.exit(1 if report.lost or report.duplicates or report.without_version else 0)


if __name__ == "__main__":
    main()
