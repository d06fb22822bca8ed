"""Measures where the learner's time goes: microseconds per sample by stage, on a table stream and an image stream.

The streams and settings are those of `pipeline.py` on the embedded log: one step per micro-batch of 64; no servers.
Stages of the loop are by its own clock, as `streamlearn_phase_seconds` exports them; `publish`, `save` and `wait` are
between steps. `feed` is CPU time of the thread that reads and decodes, beside the loop. The limit in the same run is
`learn` + `predict`: what the same work takes without anything around it.

    NAME.us_per_sample          by stage
    NAME.step_share             share of the loop's time in `learn` and `predict`

Run: python benchmarks/stages.py [--quick]. The last line is JSON.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import structlog
from common import arguments, figures, finish, tell, write_config
from pipeline import LABEL_DELAY, LABEL_SHARE, WARM_UP, send_records, write_table_config

from streamlearn.app.learner import learn
from streamlearn.config import load_config
from streamlearn.loop.loop import TrainingLoop
from streamlearn.loop.report import StepReport

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


class Stages:
    """Called after each step: sums the time of each stage after the warm-up."""

    def __init__(self) -> None:
        self.spent_s: Counter[str] = Counter()
        self.samples = 0
        self.began_s = self.ended_s = self._feed_before_s = 0.0

    def __call__(self, loop: TrainingLoop, report: StepReport) -> None:
        """Count a step; from the end of the warm-up on, listen to what the monitor hears of phases."""
        if report.step < WARM_UP:
            return
        self.ended_s = time.perf_counter()
        if report.step == WARM_UP:
            self.began_s, self._feed_before_s = self.ended_s, feed_s()
            told = loop.observer.phase_done

            def phase_done(phase: str, duration_s: float) -> None:
                self.spent_s[phase] += duration_s
                told(phase, duration_s)

            loop.observer.phase_done = phase_done  # type: ignore[method-assign]
            return
        self.samples += report.counts.samples_learned
        self.spent_s["feed"] = feed_s() - self._feed_before_s

    def figures(self) -> dict[str, object]:
        """Microseconds per sample, and the share of the step."""
        loop_s = self.ended_s - self.began_s
        stages = {name: 1e6 * value / self.samples for name, value in self.spent_s.most_common()}
        step_s = self.spent_s["learn"] + self.spent_s["predict"]
        return {
            "us_per_sample": {name: round(value, 1) for name, value in stages.items()},
            "loop_us_per_sample": round(1e6 * loop_s / self.samples, 1),
            "step_share": round(step_s / loop_s, 3),
        }


def feed_s() -> float:
    """CPU time of the feed's thread."""
    ids = [thread.native_id for thread in threading.enumerate() if thread.name == "feed"]
    total_s = 0.0
    for thread_id in ids:
        fields = Path(f"/proc/self/task/{thread_id}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        total_s += (int(fields[11]) + int(fields[12])) * _TICK_S
    return total_s


def side(path: Path) -> None:
    """Learn the stream of this config; print the figures."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    stages = Stages()
    learn(load_config(path), threading.Event(), until_end=True, on_step=stages)
    print(json.dumps(stages.figures()))


def main() -> None:
    """Print the figures of both streams, each learned in a process of its own."""
    if "--side" in sys.argv:
        side(Path(sys.argv[-1]))
        return
    quick = arguments(__doc__ or "").quick
    images, records = (3_200, 10_000) if quick else (12_800, 60_000)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        table = write_table_config(Path(name) / "table" / "streamlearn.toml", kind="embedded")
        send_records(load_config(table), records)
        image = write_config(Path(name) / "image" / "streamlearn.toml", kind="embedded", steps=1)
        plan = ("--label-share", LABEL_SHARE, "--label-delay", f"geometric:{LABEL_DELAY}")
        finish("simulate", "fashion-mnist", "--limit", images, *plan, "--config", image)
        for stream, path in (("table", table), ("image", image)):
            given = [sys.executable, __file__, "--side", str(path)]
            printed = subprocess.run(given, check=True, capture_output=True).stdout
            found[stream] = json.loads(printed.splitlines()[-1])
            tell(f"{stream}: {found[stream]}")
    figures(**found)


if __name__ == "__main__":
    main()
