"""`streamlearn demo`: the whole system on one machine, without configuration.

Digits as an endless stream with 5 % late labels, an embedded log, a learner and servers. A terminal shows a live panel,
other outputs get plain lines. All files are in one folder, including the config, so that
`streamlearn run --config demo-state/streamlearn.toml` resumes the demo.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from streamlearn.app.logs import set_up_logs
from streamlearn.app.signals import stop_signals
from streamlearn.app.supervisor import Child, Supervisor
from streamlearn.config import load_config
from streamlearn.errors import ConfigError
from streamlearn.state.paths import StatePaths, state_lock
from streamlearn.state.status import read_status

_CONFIG_NAME = "streamlearn.toml"
_CONFIG = """\
# Written by `streamlearn demo`. All settings: deploy/streamlearn.example.toml

[schema]
shape = [1, 8, 8]
dtype = "uint8"
classes = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
scale = 0.0625

[model]
factory = "convnet"
normalise = false

[learn]
ema_decay = 0.98
threads = 1

[learn.noise_options]
shift_pixels = 1

[batch]
fresh = 16
labelled = 32

[score]
window = 200

[state]
dir = "{folder}"
checkpoint_every_s = 10.0

[serve]
port = {port}

[metrics]
port = 0
"""
_MARK = "# Written by `streamlearn demo`."
"""The config of a demo starts with this; its folder may be replaced."""
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_EVERY_S = 2.0
_LOOK_S = 0.25


def run_demo(*, seconds: float | None, port: int, rate: float, folder: Path) -> None:
    """Run until Ctrl-C, or for `seconds`.

    Raises:
        ConfigError: the folder holds other files, or the port is taken.
        StateLockedError: a demo still runs in this folder.
    """
    config_path = _make_folder(folder, port)
    config = load_config(config_path)
    set_up_logs()
    output = folder / "processes.log"
    supervisor = Supervisor(config, ["--config", str(config_path)])
    stream = f"digits --rate {rate} --label-share 0.05 --label-delay geometric:300 --passes 10000".split()
    command = [sys.executable, "-m", "streamlearn", "simulate", *stream, "--config", str(config_path)]
    supervisor.children.append(Child("simulator", [*command, "--parent", str(os.getpid())]))
    for child in supervisor.children:
        child.output = output
    view = _View(StatePaths(config.state.dir).heartbeat, supervisor.address, output)
    with stop_signals() as stopping:
        ends_at_s = time.monotonic() + seconds if seconds else float("inf")
        try:
            with view:
                while not stopping.is_set() and time.monotonic() < ends_at_s:
                    supervisor.look()
                    view.look()
                    stopping.wait(_LOOK_S)
        finally:
            supervisor.stop()
    view.print_end(config_path)


def _make_folder(folder: Path, port: int) -> Path:
    config_path = folder / _CONFIG_NAME
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not (config_path.is_file() and config_path.read_text(errors="replace").startswith(_MARK)):
            msg = f"--state {folder}: not empty, and not written by a demo; choose another folder"
            raise ConfigError(msg)
        paths = StatePaths(folder)
        with state_lock(paths, "daemon"), state_lock(paths):  # fails while a daemon or a learner runs
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config_path.write_text(_CONFIG.format(folder=folder.absolute(), port=port))
    return config_path


class _View:
    """A live panel on a terminal, else a line every two seconds."""

    def __init__(self, heartbeat: Path, address: str, output: Path) -> None:
        self._heartbeat, self._address, self._output = heartbeat, address, output
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._history: deque[float] = deque(maxlen=60)
        self._seen_step, self._printed_at_s, self._curls_printed = -1, 0.0, False
        self._status: dict[str, Any] = {}

    def __enter__(self) -> _View:
        self._console.print(f"Starting a learner and servers; their logs are in {self._output}")
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def look(self) -> None:
        """Read the heartbeat and update the output."""
        self._status = read_status(self._heartbeat) or self._status
        step = int(self._status.get("step", 0))
        teacher = self._accuracy("teacher")
        if step != self._seen_step and teacher is not None:
            self._seen_step = step
            self._history.append(teacher)
        if self._live:
            self._live.update(self._panel(), refresh=True)
        elif self._status and time.monotonic() - self._printed_at_s >= _PLAIN_EVERY_S:
            self._printed_at_s = time.monotonic()
            self._console.print(self._line(), soft_wrap=True)
            if not self._curls_printed and self._status.get("published_step"):
                self._curls_printed = True
                self._console.print(self._curls(), soft_wrap=True)

    def print_end(self, config_path: Path) -> None:
        """Print the last figures, and how to resume."""
        self._status = read_status(self._heartbeat) or self._status
        self._console.print(self._line(), soft_wrap=True)
        self._console.print(f"Stopped cleanly. To resume: streamlearn run --config {config_path}", soft_wrap=True)

    def _accuracy(self, network: str) -> float | None:
        scores = self._status.get("accuracy", {}).get("prequential", {}).get(network, {})
        ratio = scores.get("windowed")
        return None if ratio is None else float(ratio)

    def _line(self) -> str:
        accounts, ledger = self._status.get("accounts", {}), self._status.get("ledger", {})
        return (
            f"step {self._status.get('step', 0)}  samples {accounts.get('samples_learned', 0)}  "
            f"labels {ledger.get('joined', 0)}  accuracy teacher {_percent(self._accuracy('teacher'))} "
            f"student {_percent(self._accuracy('student'))}  lag {self._status.get('lag_records', 0)}  "
            f"served version {self._status.get('published_step', 0)}"
        )

    def _curls(self) -> str:
        curl = f"  curl -s http://{self._address}"
        json = "-H 'content-type: application/json' -d"
        return "\n".join(
            (
                "Try, in another terminal:",
                f'{curl}/predict {json} \'{{"ids": ["digits-7"]}}\'',
                f'{curl}/label {json} \'{{"id": "digits-7", "label": "3"}}\'',
                f"{curl}/metrics | grep accuracy",
            )
        )

    def _panel(self) -> Panel:
        accounts, ledger = self._status.get("accounts", {}), self._status.get("ledger", {})
        costs = self._status.get("costs", {})
        table = Table.grid(padding=(0, 2))
        for _ in range(4):
            table.add_column()
        table.add_row(
            "step", str(self._status.get("step", 0)), "served version", str(self._status.get("published_step", 0))
        )
        table.add_row("samples", str(accounts.get("samples_learned", 0)), "labels joined", str(ledger.get("joined", 0)))
        table.add_row(
            "lag", f"{self._status.get('lag_records', 0)} records", "labels waiting", str(ledger.get("waiting", 0))
        )
        table.add_row(
            "classification cost",
            _number(costs.get("classification")),
            "consistency cost",
            _number(costs.get("consistency")),
        )
        table.add_row("teacher", _percent(self._accuracy("teacher")), "student", _percent(self._accuracy("student")))
        bars = Text("".join(_BARS[min(7, int(ratio * 8))] for ratio in self._history), style="green")
        title = "prequential accuracy of the teacher (last 200 labels)"
        return Panel(Group(table, Text(), Text(title), bars, Text(), Text(self._curls())), title="streamlearn demo")


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{100 * ratio:.1f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
