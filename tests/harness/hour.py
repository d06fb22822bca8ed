"""Runs everything for an hour at a steady pace, and says whether memory, open files and disk stay flat.

Real processes on an embedded log whose every bound is small, so that all of them are met within ten minutes:
`streamlearn run` (learner and servers), `streamlearn simulate` (samples, late labels), and clients in this process that
ask for predictions, half of them to be learned as well, and label those later. Every few seconds /proc is read (Linux).

    python -m harness.hour --minutes 60

Growth is the slope of a line through what was measured after the warm-up, times that span: a leak grows with time, a
saw tooth does not. The last line is JSON.
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
embedded_max_bytes = 4194304
embedded_max_age_s = 300.0
on_trimmed = "skip"
[labels]
horizon_s = 240.0
payload_max_bytes = 524288  # late labels read their payload back from the log
replay_rows = 500
[state]
dir = "{folder}/state"
checkpoint_every_s = 5.0
keep_published = 3
keep_history = 4
journal_max_bytes = 131072
[serve]
port = {port}
processes = 2
[metrics]
port = 0
[run]
log_format = "json"
"""
WARM_UP_S = 600.0
START_S = 120.0
STOP_S = 90.0
LABELLED_AFTER = 100
"""A client labels its sample when it has sent so many others to be learned."""
CLIENT_TIMEOUT_S = 30.0
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
_MB = float(1 << 20)


class HourError(AssertionError):
    """A process ended that nobody ended, or the learner stands still."""


@dataclass
class Seen:
    """What one look found."""

    at_s: float
    rss_mb: dict[str, float]
    """Of each process, by name; pages of mapped files count."""
    anonymous_mb: dict[str, float]
    """The same without pages of files, which the kernel may drop: of libraries."""
    fds: dict[str, int]
    disk_mb: dict[str, float]
    """Blocks on disk: of the log, and of the rest of the state folder."""


@dataclass
class Report:
    """What an hour came to."""

    minutes: float
    seen: list[Seen] = field(default_factory=list)
    steps: int = 0
    samples: int = 0
    predictions: int = 0
    labels: int = 0
    refused: int = 0
    """Requests answered by 429 or 503."""

    def growth(self, kind: str, names: tuple[str, ...] | None = None) -> float:
        """Of the sum over processes or folders, from the end of the warm-up to the end: slope times span."""
        after = [seen for seen in self.seen if seen.at_s >= self.warm_up_s]
        if len(after) < 2:
            return float("nan")
        at_s = np.array([seen.at_s for seen in after])
        values = [getattr(seen, kind) for seen in after]
        total = np.array([sum(v for name, v in each.items() if names is None or name in names) for each in values])
        slope = np.polyfit(at_s - at_s[0], total, 1)[0]
        return float(slope * (at_s[-1] - at_s[0]))

    @property
    def warm_up_s(self) -> float:
        """Ten minutes, or half of a short run."""
        return min(WARM_UP_S, self.minutes * 30.0)

    def as_dict(self) -> dict[str, Any]:
        """For the last line."""
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
            "looks": len(self.seen),
        }


class Client(threading.Thread):
    """Asks for predictions at a rate; every other sample is to be learned, and is labelled some requests later."""

    def __init__(self, port: int, rate: float, report: Report, stopping: threading.Event, number: int) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self._port, self._rate, self._report, self._stopping = port, rate, report, stopping
        self._number = number
        self._to_label: deque[tuple[str, int]] = deque()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Until told to stop, or something is wrong."""
        try:
            self._ask_for_ever()
        except BaseException as error:  # told by whoever waits for this thread
            self.error = error

    def _ask_for_ever(self) -> None:
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
        except http.client.RemoteDisconnected:  # an idle connection was ended by the server, as it may
            connection.close()
            return False
        if reply.status in (429, 503):
            self._report.refused += 1
            return False
        assert reply.status in (200, 202), (reply.status, content)
        return True


def children(pid: int) -> dict[str, int]:
    """The processes of a supervisor by name, itself among them. While others end, the kernel may leave one out."""
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
    """What of a process is in memory: all of it, and without pages of files."""
    resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    return resident * _PAGE_MB, (resident - shared) * _PAGE_MB


def look(at_s: float, processes: dict[str, int], state: Path) -> Seen:
    """Read /proc and the folder.

    Raises:
        HourError: a process is gone.
    """
    rss_mb, anonymous_mb, fds = {}, {}, {}
    for name, pid in processes.items():
        try:
            rss_mb[name], anonymous_mb[name] = memory_mb(pid)
            fds[name] = len(os.listdir(f"/proc/{pid}/fd"))
        except OSError as error:
            raise HourError(f"the {name} (process {pid}) is gone") from error
    disk_mb = {"log": disk_use_mb(state / "log"), "state": disk_use_mb(state, without=state / "log")}
    return Seen(at_s, rss_mb, anonymous_mb, fds, disk_mb)


def disk_use_mb(folder: Path, without: Path | None = None) -> float:
    """Blocks of all files below; what vanishes meanwhile is none."""
    total = 0
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(path) / name != without]
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_blocks * 512
    return total / _MB


@contextlib.contextmanager
def command(arguments: list[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A streamlearn command, ended by SIGTERM."""
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
    """What the learner last said of itself."""
    try:
        found: dict[str, Any] = json.loads((state / "learner.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def wait_ready(port: int) -> None:
    """Until a teacher is served.

    Raises:
        HourError: it takes too long.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", "/health/ready")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise HourError(f"no teacher is served after {START_S} s")


def soak(
    folder: Path, *, minutes: float, rate: float, clients: int, client_rate: float, every_s: float, say: bool = False
) -> Report:
    """Run so long, and report.

    Raises:
        HourError: a process ended, or the learner stands still.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, config, report = free_port("127.0.0.1"), folder / "streamlearn.toml", Report(minutes)
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
            _watch(report, run, producer, threads, state, every_s=every_s, say=say)
        finally:
            stopping.set()
            for thread in threads:
                thread.join(CLIENT_TIMEOUT_S)
    if run.returncode != 0:
        raise HourError(f"the run was asked to end, and ended with {run.returncode}")
    told = heartbeat(state)
    report.steps, report.samples = told["step"], told["accounts"]["samples_learned"]
    return report


def _watch(
    report: Report,
    run: subprocess.Popen[bytes],
    producer: subprocess.Popen[bytes],
    clients: list[Client],
    state: Path,
    *,
    every_s: float,
    say: bool,
) -> None:
    processes, began_s, told_s = children(run.pid), time.monotonic(), 0.0
    step, stepped_at_s = 0, began_s
    if not {"learner", "server-0"} <= set(processes):
        raise HourError(f"only {sorted(processes)} run")
    while (at_s := time.monotonic() - began_s) < report.minutes * 60.0:
        report.seen.append(seen := look(at_s, processes, state))
        if producer.poll() is not None:
            raise HourError(f"the producer ended with {producer.returncode}")
        for client in clients:
            if client.error is not None:
                raise HourError(f"a client was refused: {client.error!r}") from client.error
        if (now := heartbeat(state).get("step", 0)) > step:
            step, stepped_at_s = now, time.monotonic()
        elif time.monotonic() - stepped_at_s > START_S:
            raise HourError(f"no step after {step} for {START_S} s")
        if say and at_s - told_s >= 60.0:
            told_s = at_s
            print(
                f"{at_s / 60:.0f} min, step {step}, lag {heartbeat(state).get('lag_records')}, RSS "
                f"{ {name: round(mb) for name, mb in seen.rss_mb.items()} } MB, anonymous "
                f"{ {name: round(mb, 1) for name, mb in seen.anonymous_mb.items()} } MB, files {seen.fds}, disk "
                f"{ {name: round(mb, 1) for name, mb in seen.disk_mb.items()} } MB",
                flush=True,
            )
        time.sleep(every_s)


def main() -> None:
    """Run it; print what each process and folder grew by an hour."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=60.0, help="samples a second of the simulation")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--client-rate", type=float, default=10.0, help="requests a second of each client, at most")
    parser.add_argument("--every-s", type=float, default=5.0, help="between two looks")
    parser.add_argument("--folder", type=Path, help="kept; else a temporary one, kept where something went wrong")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="streamlearn-hour-"))
    report = soak(
        folder,
        minutes=asked.minutes,
        rate=asked.rate,
        clients=asked.clients,
        client_rate=asked.client_rate,
        every_s=asked.every_s,
        say=True,
    )
    hours = (report.minutes * 60.0 - report.warm_up_s) / 3600.0
    for kind in ("rss_mb", "anonymous_mb", "fds", "disk_mb"):
        names = getattr(report.seen[-1], kind)
        slopes = {name: round(report.growth(kind, (name,)) / hours, 2) for name in names}
        print(f"{kind} an hour, after {report.warm_up_s / 60:.1f} min: {slopes}")
    print(json.dumps(report.as_dict()))
    if asked.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
