"""Runs the whole system for an hour at a steady rate and measures the growth of memory, open files and disk.

Real processes on an embedded log, with all bounds so small that they are reached within ten minutes: `streamlearn run`
(learner and servers), `streamlearn simulate` (samples and late labels), and clients in this process. A client requests
predictions; half of its samples are learned too, and labelled later. /proc is read every few seconds (Linux only).

    python -m harness.hour --minutes 60

Growth is the slope of a least-squares line after the warm-up, times its span. A leak has a slope; a saw tooth has none.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from streamlearn.lab.broker import free_port

SETTINGS = """
[schema]
shape = [64]
classes = 10
[model]
factory = "mlp"
[learn]
threads = 1
[batch]
fresh = 16
labelled = 16
[log]
kind = "embedded"
max_bytes = 4194304
on_trimmed = "skip"
[labels]
horizon_s = 240.0
payload_max_bytes = 524288  # late labels read their payload back from the log
replay_rows = 500
[state]
dir = "{folder}/state"
checkpoint_every_s = 5.0
[serve]
port = {port}
processes = 2
[metrics]
port = 0
"""
WARM_UP_S = 600.0
START_S = 120.0
STOP_S = 90.0
LABELLED_AFTER = 100
"""A client labels a sample after sending this many further ones."""
CLIENT_TIMEOUT_S = 30.0
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
_MB = float(1 << 20)


class HourError(AssertionError):
    """A process exited on its own, or the learner takes no steps."""


@dataclass
class Measurement:
    """One measurement of all processes."""

    at_s: float
    rss_mb: dict[str, float]
    """Resident memory by process name, including pages of mapped files."""
    anonymous_mb: dict[str, float]
    """The same without pages of mapped files, which the kernel may drop."""
    fds: dict[str, int]
    disk_mb: dict[str, float]
    """Allocated blocks: of the log, and of the rest of the state folder."""


@dataclass
class HourReport:
    """The measurements of one run."""

    minutes: float
    measurements: list[Measurement] = field(default_factory=list)
    steps: int = 0
    samples: int = 0
    predictions: int = 0
    labels: int = 0
    refused: int = 0
    """Requests answered with 429 or 503."""

    def growth(self, kind: str, names: tuple[str, ...] | None = None) -> float:
        """Growth of the sum over `names` (default: all) after the warm-up: slope times span."""
        after = [each for each in self.measurements if each.at_s >= self.warm_up_s]
        if len(after) < 2:
            return float("nan")
        at_s = np.array([each.at_s for each in after])
        values = [getattr(each, kind) for each in after]
        total = np.array([sum(v for name, v in each.items() if names is None or name in names) for each in values])
        slope = np.polyfit(at_s - at_s[0], total, 1)[0]
        return float(slope * (at_s[-1] - at_s[0]))

    @property
    def warm_up_s(self) -> float:
        """Ten minutes, or half of a short run."""
        return min(WARM_UP_S, self.minutes * 30.0)

    def as_dict(self) -> dict[str, Any]:
        """The JSON of the last line."""
        return {
            "minutes": round(self.minutes, 1),
            "rss_growth_mb": round(self.growth("rss_mb"), 2),
            "anonymous_growth_mb": round(self.growth("anonymous_mb"), 2),
            "fds_growth": round(self.growth("fds"), 2),
            "disk_growth_mb": round(self.growth("disk_mb"), 2),
            "samples": self.samples,
            "steps": self.steps,
            "predictions": self.predictions,
            "labels": self.labels,
            "refused": self.refused,
            "measurements": len(self.measurements),
        }


class Client(threading.Thread):
    """Requests predictions at a rate. Every other sample is learned too, and labelled some requests later."""

    def __init__(self, port: int, rate: float, report: HourReport, stopping: threading.Event, number: int) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self._port, self._rate, self._report, self._stopping = port, rate, report, stopping
        self._number = number
        self._to_label: deque[tuple[str, int]] = deque()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Request until `stopping` is set, or an error occurs."""
        try:
            self._request_continuously()
        except BaseException as error:  # raised by the main thread
            self.error = error

    def _request_continuously(self) -> None:
        digits = load_digits()
        draw, count = np.random.default_rng(self._number), 0
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self._port, timeout=CLIENT_TIMEOUT_S)
        ) as connection:
            while not self._stopping.wait(1.0 / self._rate):
                row = int(draw.integers(len(digits.target)))
                body: dict[str, Any] = {"x": digits.data[row].tolist()}
                if count % 2:
                    body |= {"id": f"client-{self._number}-{count}", "learn": True}
                if self._post(connection, "/predict", body):
                    self._report.predictions += 1
                    if "learn" in body:
                        self._to_label.append((body["id"], int(digits.target[row])))
                if len(self._to_label) > LABELLED_AFTER:
                    name, label = self._to_label.popleft()
                    self._report.labels += self._post(connection, "/label", {"id": name, "label": label})
                count += 1

    def _post(self, connection: http.client.HTTPConnection, route: str, body: dict[str, Any]) -> bool:
        try:
            connection.request("POST", route, json.dumps(body), {"content-type": "application/json"})
            with connection.getresponse() as reply:
                content = reply.read()
        except http.client.RemoteDisconnected:  # the server may close idle connections
            connection.close()
            return False
        if reply.status in (429, 503):
            self._report.refused += 1
            return False
        assert reply.status in (200, 202), (reply.status, content)
        return True


def children(pid: int) -> dict[str, int]:
    """Pids of a supervisor and its children, by name. May miss a child while another one exits."""
    found = {"supervisor": pid}
    listed = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    for child in chain.from_iterable(listed):
        arguments = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        if "--name" in arguments:
            found[arguments[arguments.index("--name") + 1]] = int(child)
        elif "learn" in arguments:
            found["learner"] = int(child)
    return found


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident memory of a process, with and without pages of mapped files."""
    resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    return resident * _PAGE_MB, (resident - shared) * _PAGE_MB


def measure(at_s: float, processes: dict[str, int], state: Path) -> Measurement:
    """Read /proc and the state folder.

    Raises:
        HourError: a process has exited.
    """
    rss_mb, anonymous_mb, fds = {}, {}, {}
    for name, pid in processes.items():
        try:
            rss_mb[name], anonymous_mb[name] = memory_mb(pid)
            fds[name] = len(os.listdir(f"/proc/{pid}/fd"))
        except OSError as error:
            raise HourError(f"the {name} (process {pid}) has exited") from error
    disk_mb = {"log": disk_use_mb(state / "log"), "state": disk_use_mb(state, without=state / "log")}
    return Measurement(at_s, rss_mb, anonymous_mb, fds, disk_mb)


def disk_use_mb(folder: Path, without: Path | None = None) -> float:
    """Allocated blocks of all files below `folder`; files removed meanwhile count as 0."""
    total = 0
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(path) / name != without]
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_blocks * 512
    return total / _MB


@contextlib.contextmanager
def command(arguments: list[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a streamlearn command; SIGTERM on exit."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "streamlearn", *arguments], stdout=file, stderr=file, env=environ
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        finally:
            process.kill()
            process.wait(STOP_S)


def heartbeat(state: Path) -> dict[str, Any]:
    """The learner's last heartbeat; empty if there is none."""
    try:
        found: dict[str, Any] = json.loads((state / "learner.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def wait_ready(port: int) -> None:
    """Wait until a teacher is served.

    Raises:
        HourError: timeout.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", "/health/ready")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise HourError(f"no teacher is served within {START_S} s")


def soak(
    folder: Path,
    *,
    minutes: float,
    rate: float,
    clients: int,
    client_rate: float,
    every_s: float,
    verbose: bool = False,
) -> HourReport:
    """Run for `minutes` and report.

    Raises:
        HourError: a process exited on its own, or the learner takes no steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, config, report = free_port("127.0.0.1"), folder / "streamlearn.toml", HourReport(minutes)
    config.write_text(SETTINGS.format(folder=folder, port=port))
    state, stopping = folder / "state", threading.Event()
    simulation = ["simulate", "digits", "-c", str(config), "--rate", str(rate), "--passes", "1000000"]
    simulation += ["--label-share", "0.2", "--label-delay", "exponential:30s"]
    with (
        command(["run", "-c", str(config)], folder / "run.log") as run,
        command(simulation, folder / "simulate.log") as producer,
    ):
        wait_ready(port)
        threads = [Client(port, client_rate, report, stopping, number) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            _watch(report, run, producer, threads, state, every_s=every_s, verbose=verbose)
        finally:
            stopping.set()
            for thread in threads:
                thread.join(CLIENT_TIMEOUT_S)
    if run.returncode != 0:
        raise HourError(f"streamlearn run exited with {run.returncode} on SIGTERM")
    status = heartbeat(state)
    report.steps, report.samples = status["step"], status["accounts"]["samples_learned"]
    return report


def _watch(
    report: HourReport,
    run: subprocess.Popen[bytes],
    producer: subprocess.Popen[bytes],
    clients: list[Client],
    state: Path,
    *,
    every_s: float,
    verbose: bool,
) -> None:
    processes, began_s, printed_s = children(run.pid), time.monotonic(), 0.0
    step, stepped_at_s = 0, began_s
    if not {"learner", "server-0"} <= set(processes):
        raise HourError(f"not all processes run, only {sorted(processes)}")
    while (at_s := time.monotonic() - began_s) < report.minutes * 60.0:
        report.measurements.append(now := measure(at_s, processes, state))
        if producer.poll() is not None:
            raise HourError(f"the simulation exited with {producer.returncode}")
        for client in clients:
            if client.error is not None:
                raise HourError(f"a client failed: {client.error!r}") from client.error
        if (newest := heartbeat(state).get("step", 0)) > step:
            step, stepped_at_s = newest, time.monotonic()
        elif time.monotonic() - stepped_at_s > START_S:
            raise HourError(f"no step after step {step} for {START_S} s")
        if verbose and at_s - printed_s >= 60.0:
            printed_s = at_s
            print(
                f"{at_s / 60:.0f} min, step {step}, lag {heartbeat(state).get('lag_records')}, RSS "
                f"{ {name: round(mb) for name, mb in now.rss_mb.items()} } MB, anonymous "
                f"{ {name: round(mb, 1) for name, mb in now.anonymous_mb.items()} } MB, files {now.fds}, disk "
                f"{ {name: round(mb, 1) for name, mb in now.disk_mb.items()} } MB",
                flush=True,
            )
        time.sleep(every_s)


def main() -> None:
    """Run it; print the growth per hour of each process and folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=60.0, help="samples per second of the simulation")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--client-rate", type=float, default=10.0, help="most requests per second of each client")
    parser.add_argument("--every-s", type=float, default=5.0, help="seconds between two measurements")
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary folder, kept after an error")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the started processes are stopped
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="streamlearn-hour-"))
    report = soak(
        folder,
        minutes=asked.minutes,
        rate=asked.rate,
        clients=asked.clients,
        client_rate=asked.client_rate,
        every_s=asked.every_s,
        verbose=True,
    )
    hours = (report.minutes * 60.0 - report.warm_up_s) / 3600.0
    for kind in ("rss_mb", "anonymous_mb", "fds", "disk_mb"):
        names = getattr(report.measurements[-1], kind)
        slopes = {name: round(report.growth(kind, (name,)) / hours, 2) for name in names}
        print(f"{kind} per hour, after {report.warm_up_s / 60:.1f} min: {slopes}")
    print(json.dumps(report.as_dict()))
    if asked.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
