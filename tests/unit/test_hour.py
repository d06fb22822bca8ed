"""The hour of steady work: its measurements, and a run of some seconds."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.hour import HourError, HourReport, Measurement, children, disk_use_mb, measure, memory_mb, soak
from support import until


def measured(at_s: float, mb: float) -> Measurement:
    return Measurement(at_s, {"a": mb, "b": 100.0}, {"a": 0.0}, {"a": 7}, {"log": 1.0})


class TestGrowth:
    def test_is_the_slope_after_the_warm_up_times_the_span(self) -> None:
        """2 MB per minute over the second half of ten minutes; the warm-up does not count."""
        report = HourReport(10.0, [measured(60.0 * n, 500.0 - 100 * n if n < 5 else 2.0 * n) for n in range(11)])

        assert report.growth("rss_mb") == pytest.approx(10.0)
        assert report.growth("rss_mb", ("b",)) == pytest.approx(0.0)
        assert report.growth("fds") == pytest.approx(0.0)
        assert report.as_dict()["rss_growth_mb"] == 10.0

    def test_a_saw_tooth_is_no_growth(self) -> None:
        """A log that is trimmed periodically does not grow."""
        report = HourReport(100.0, [measured(30.0 * n, float(n % 5)) for n in range(200)])

        assert abs(report.growth("rss_mb")) < 0.2

    def test_the_warm_up_of_an_hour_is_ten_minutes(self) -> None:
        """The warm-up of a short run is half of it."""
        assert (HourReport(60.0).warm_up_s, HourReport(4.0).warm_up_s) == (600.0, 120.0)


class TestMeasure:
    def test_memory_and_open_files_are_those_of_the_process(self, tmp_path: Path) -> None:
        """/proc shows the memory and the files that this process adds."""
        (tmp_path / "log").mkdir()
        before = measure(0.0, {"me": os.getpid()}, tmp_path)
        files = [(tmp_path / str(n)).open("w") for n in range(5)]
        # Mapped by itself: an allocation may fit into memory that this process has freed and not returned.
        taken = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(64):
            taken.write(os.urandom(1 << 20))

        after = measure(0.0, {"me": os.getpid()}, tmp_path)

        for file in files:
            file.close()
        assert after.fds["me"] - before.fds["me"] == len(files)
        assert after.rss_mb["me"] - before.rss_mb["me"] == pytest.approx(len(taken) / 2**20, abs=8)
        assert memory_mb(os.getpid())[1] < memory_mb(os.getpid())[0]

    def test_disk_is_counted_in_blocks_and_the_log_separately(self, tmp_path: Path) -> None:
        """A sparse file takes no blocks."""
        (tmp_path / "log").mkdir()
        (tmp_path / "log" / "log.db").write_bytes(os.urandom(2 << 20))
        with (tmp_path / "sparse").open("wb") as file:
            file.truncate(1 << 30)
        (tmp_path / "checkpoint").write_bytes(os.urandom(1 << 20))

        assert disk_use_mb(tmp_path / "log") == pytest.approx(2.0, abs=0.1)
        assert disk_use_mb(tmp_path, without=tmp_path / "log") == pytest.approx(1.0, abs=0.1)

    def test_a_process_that_has_exited_is_an_error(self, tmp_path: Path) -> None:
        """It does not count as a process without memory."""
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait(20)

        with pytest.raises(HourError, match=r"the learner .* has exited"):
            measure(0.0, {"learner": process.pid}, tmp_path)

    def test_children_are_found_by_their_command_lines(self) -> None:
        """The name is the argument of --name."""
        program = "import time; time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", program, "serve", "--name", "server-3"]) as child:
            try:
                until(lambda: children(os.getpid()).get("server-3") == child.pid, "the child")
            finally:
                child.kill()


@pytest.mark.slow
@pytest.mark.timeout(300)
class TestSoak:
    def test_runs_everything_and_counts_what_was_done(self, tmp_path: Path) -> None:
        """Six seconds: steps, samples, predictions; no request is refused, and all processes exit cleanly."""
        report = soak(tmp_path, minutes=0.1, rate=60.0, clients=2, client_rate=20.0, every_s=0.5)

        figures = report.as_dict()
        assert set(report.measurements[-1].fds) == {"supervisor", "learner", "server-0", "server-1"}
        assert min(figures["steps"], figures["samples"], figures["predictions"]) > 10
        assert figures["refused"] == 0
        assert figures["measurements"] >= 5
