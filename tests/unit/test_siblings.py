"""Cards of processes: which metrics a server scrapes besides its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from streamlearn.app.siblings import registered, siblings_of
from streamlearn.metrics import LEARNER_METRICS, Metrics, MetricsServer
from streamlearn.serve.scrape import fetch
from streamlearn.state.paths import StatePaths
from streamlearn.state.status import write_status


def dead_pid() -> int:
    """The id of a process that has exited."""
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", ""]) as process:
        process.wait(10)
    return process.pid


class TestSiblings:
    def test_the_learner_and_the_other_servers_are_found_by_their_cards(self, tmp_path: Path) -> None:
        """Not this process, no dead process, none without a port, and no unreadable card."""
        paths, alive = StatePaths(tmp_path), os.getpid()
        paths.processes.mkdir()
        cards: dict[str, dict[str, Any]] = {
            "server-0": {"pid": alive, "metrics_port": 1000},
            "server-1": {"pid": alive, "metrics_port": 1001},
            "server-2": {"pid": dead_pid(), "metrics_port": 1002},
            "server-3": {"pid": alive, "metrics_port": 0},
            "server-4": {"pid": "1", "metrics_port": 1004},
            "server-5": {"pid": -1, "metrics_port": 1005},
            "server-6": {"metrics_port": 1006},
        }
        for name, card in cards.items():
            write_status(paths.processes / f"{name}.json", card)
        (paths.processes / "server-7.json").write_text('{"pid":')
        write_status(paths.heartbeat, {"pid": alive, "metrics_port": 9109, "state": "learning"})

        assert siblings_of(paths, "server-0") == {
            "learner": "http://127.0.0.1:9109/metrics",
            "server-1": "http://127.0.0.1:1001/metrics",
        }

    def test_a_learner_can_be_scraped(self, tmp_path: Path) -> None:
        """By the port in its heartbeat."""
        paths = StatePaths(tmp_path)
        with contextlib.closing(MetricsServer(Metrics(LEARNER_METRICS, version="1").registry, 0)) as exposed:
            write_status(paths.heartbeat, {"pid": os.getpid(), "metrics_port": exposed.port})
            text = fetch(siblings_of(paths, "server-0")["learner"])

        assert text is not None
        assert "streamlearn_steps_total 0.0" in text

    def test_the_url_of_a_dead_learner_fails(self, tmp_path: Path) -> None:
        """Its old port may belong to another process, and its absence must show as a failed scrape."""
        paths = StatePaths(tmp_path)
        write_status(paths.heartbeat, {"pid": dead_pid(), "metrics_port": 9109})

        assert siblings_of(paths, "server-0") == {"learner": "http://127.0.0.1:0/metrics"}

    def test_a_process_of_another_user_counts_as_alive(self, tmp_path: Path) -> None:
        """Process 1 exists, but may not be signalled."""
        paths = StatePaths(tmp_path)
        write_status(paths.heartbeat, {"pid": 1, "metrics_port": 9109})

        assert siblings_of(paths, "server-0") == {"learner": "http://127.0.0.1:9109/metrics"}

    def test_an_empty_folder_has_no_servers(self, tmp_path: Path) -> None:
        """The learner is included all the same."""
        found = siblings_of(StatePaths(tmp_path / "nowhere"), "server-0")

        assert found == {"learner": "http://127.0.0.1:0/metrics"}


class TestCard:
    def test_exists_while_the_process_serves(self, tmp_path: Path) -> None:
        """It is removed after an error too."""
        paths = StatePaths(tmp_path)
        card = paths.processes / "server-3.json"

        with contextlib.suppress(KeyError), registered(paths, "server-3", 4711):
            assert json.loads(card.read_bytes()) == {"pid": os.getpid(), "metrics_port": 4711}
            raise KeyError

        assert list(paths.processes.iterdir()) == []
