"""One server process: its port, its card for the others, and an end in order."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support import ask, until

from streamlearn.app.ports import listen
from streamlearn.app.server import _registered, _settings, _siblings, serve
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError
from streamlearn.metrics import LearnerMetrics, start_http
from streamlearn.serve.scrape import fetch
from streamlearn.state.paths import StatePaths
from streamlearn.state.status import write_status

torch.set_num_threads(1)


def config_in(folder: Path, **overrides: object) -> Config:
    settings = {"state.dir": str(folder), "serve.port": 0, "serve.threads": 1, "schema.shape": [4]}
    return load_config(environ={}, overrides={**settings, **overrides})


def dead_pid() -> int:
    """Of a process that was, a moment ago."""
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", ""]) as process:
        process.wait(10)
    return process.pid


class TestListen:
    def test_port_0_takes_a_free_one(self, tmp_path: Path) -> None:
        """On loopback, and connections queue at once, before anybody accepts."""
        with listen(config_in(tmp_path)) as listener:
            host, port = listener.getsockname()

            assert host == "127.0.0.1"
            assert port > 0
            socket.create_connection((host, port), timeout=2).close()

    def test_a_taken_port_is_a_wrong_setting(self, tmp_path: Path) -> None:
        """Named with its value and the reason."""
        with listen(config_in(tmp_path)) as first:
            port = first.getsockname()[1]

            with pytest.raises(ConfigError, match=rf"serve\.port = {port}: Address already in use; choose another"):
                listen(config_in(tmp_path, **{"serve.port": port}))

    def test_an_address_of_another_machine_is_a_wrong_setting(self, tmp_path: Path) -> None:
        """It cannot be had here (192.0.2.0/24 is for documentation)."""
        with pytest.raises(ConfigError, match=r"serve\.host = '192\.0\.2\.1'"):
            listen(config_in(tmp_path, **{"serve.host": "192.0.2.1", "serve.insecure": True}))

    def test_a_port_is_free_again_at_once(self, tmp_path: Path) -> None:
        """A restarted daemon gets the port of the one before, whose connections may still linger."""
        with listen(config_in(tmp_path)) as first:
            port = first.getsockname()[1]
            client = socket.create_connection(("127.0.0.1", port), timeout=2)
            first.accept()[0].close()
        client.close()

        with listen(config_in(tmp_path, **{"serve.port": port})) as second:
            assert second.getsockname()[1] == port


class TestSiblings:
    def test_the_learner_and_the_other_servers_are_found_by_their_cards(self, tmp_path: Path) -> None:
        """Not oneself, nobody dead, nobody without a port, and no card that cannot be read."""
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

        assert _siblings(paths, "server-0") == {
            "learner": "http://127.0.0.1:9109/metrics",
            "server-1": "http://127.0.0.1:1001/metrics",
        }

    @pytest.mark.parametrize(
        ("host", "asked"),
        [
            ("10.0.0.7", "10.0.0.7"),
            ("0.0.0.0", "127.0.0.1"),
            ("::", "[::1]"),
            ("::1", "[::1]"),
            ("fe80::7%eth0", "[fe80::7%25eth0]"),
            ("localhost", "localhost"),
            ("", "127.0.0.1"),
        ],
    )
    def test_a_learner_is_asked_where_it_listens(self, tmp_path: Path, host: str, asked: str) -> None:
        """Whatever `metrics.host` is; one that listens everywhere is asked on loopback of that family."""
        paths = StatePaths(tmp_path)
        write_status(paths.heartbeat, {"pid": os.getpid(), "metrics_host": host, "metrics_port": 9109})

        assert _siblings(paths, "server-0") == {"learner": f"http://{asked}:9109/metrics"}

    def test_a_learner_beside_loopback_answers(self, tmp_path: Path) -> None:
        """It listens on an address that is not 127.0.0.1, and on that one alone."""
        paths = StatePaths(tmp_path)
        exposed, port = start_http(LearnerMetrics(version="1").registry, "127.0.0.2", 0)
        with contextlib.closing(exposed):
            write_status(paths.heartbeat, {"pid": os.getpid(), "metrics_host": "127.0.0.2", "metrics_port": port})
            text = fetch(_siblings(paths, "server-0")["learner"])

        assert text is not None
        assert "streamlearn_steps_total 0.0" in text

    def test_a_dead_learner_is_asked_where_nobody_answers(self, tmp_path: Path) -> None:
        """Its heartbeat outlives it; its port may be another's now, and its absence must show as a failed scrape."""
        paths = StatePaths(tmp_path)
        write_status(paths.heartbeat, {"pid": dead_pid(), "metrics_port": 9109})

        assert _siblings(paths, "server-0") == {"learner": "http://127.0.0.1:0/metrics"}

    def test_a_process_of_another_user_counts_as_alive(self, tmp_path: Path) -> None:
        """Process 1 may not be signalled by everybody, and is there all the same."""
        paths = StatePaths(tmp_path)
        write_status(paths.heartbeat, {"pid": 1, "metrics_port": 9109})

        assert _siblings(paths, "server-0") == {"learner": "http://127.0.0.1:9109/metrics"}

    def test_an_empty_folder_has_no_servers(self, tmp_path: Path) -> None:
        """A server may be the first to start; the learner is missed from the beginning."""
        found = _siblings(StatePaths(tmp_path / "nowhere"), "server-0")

        assert found == {"learner": "http://127.0.0.1:0/metrics"}


class TestSettings:
    def test_each_token_reaches_the_server_as_text(self, tmp_path: Path) -> None:
        """None and an empty one are none."""
        config = config_in(tmp_path, **{"serve.label_token": "tell", "serve.admin_token": "rule", "serve.token": ""})

        told = _settings(config, "server-0")

        assert (told.token, told.predict_token, told.label_token, told.admin_token) == (None, None, "tell", "rule")

    @pytest.mark.parametrize("insecure", [False, True])
    def test_insecure_reaches_the_server(self, tmp_path: Path, insecure: bool) -> None:
        """Without a token it decides about Host and Origin."""
        assert _settings(config_in(tmp_path, **{"serve.insecure": insecure}), "server-0").insecure is insecure


class TestCard:
    def test_stands_while_the_process_serves_and_is_removed_at_its_end(self, tmp_path: Path) -> None:
        """At an end by an error too."""
        paths = StatePaths(tmp_path)
        card = paths.processes / "server-3.json"

        with contextlib.suppress(KeyError), _registered(paths, "server-3", 4711):
            assert json.loads(card.read_bytes()) == {"pid": os.getpid(), "metrics_port": 4711}
            raise KeyError

        assert list(paths.processes.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal_and_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    """Answers on the socket it was given; at the signal the card is removed, and `serve` returns.

    The signal goes no further, so whoever called it can close what is left.
    """
    config = config_in(tmp_path)
    listener = listen(config)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    told: dict[str, Any] = {}
    reached: list[int] = []

    def seen(got: int, _: FrameType | None) -> None:
        reached.append(got)

    def client() -> None:
        try:
            told["live"] = until(lambda: answered(f"{url}/health/live"), "an answer", 20.0)
            told["predict"] = ask(f"{url}/predict", {"instances": [[0, 0, 0, 0]]})[0]
            told["cards"] = [path.name for path in StatePaths(tmp_path).processes.iterdir()]
            told["label"] = ask(f"{url}/label", {"id": "a", "label": "1"})[0]
            told["sibling"] = _siblings(StatePaths(tmp_path), "another")
            told["metrics"] = ask(told["sibling"]["server-0"])[1]
        finally:
            os.kill(os.getpid(), number)

    before = signal.signal(number, seen)
    asker = threading.Thread(target=client)
    try:
        asker.start()
        serve(config, name="server-0", listener=listener)
    finally:
        asker.join()
        signal.signal(number, before)

    assert (told["live"], told["predict"], told["label"]) == (200, 503, 202)
    assert told["cards"] == ["server-0.json"]
    assert "streamlearn_appended_records_total" in told["metrics"]
    assert list(StatePaths(tmp_path).processes.iterdir()) == []
    assert reached == []


def answered(url: str) -> int:
    try:
        return ask(url)[0]
    except OSError:
        return 0


def test_a_log_that_cannot_be_opened_yet_keeps_no_prediction(tmp_path: Path) -> None:
    """A full disk, or a damaged one: /predict answers all the same, and /label once it can be opened."""
    config = config_in(tmp_path)
    listener = listen(config)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    log = StatePaths(tmp_path).log
    log.mkdir(parents=True)  # SQLite cannot open a folder
    told: dict[str, Any] = {}

    def client() -> None:
        try:
            told["live"] = until(lambda: answered(f"{url}/health/live"), "an answer", 20.0)
            told["predict"] = ask(f"{url}/predict", {"instances": [[0, 0, 0, 0]]})[0]
            told["before"] = ask(f"{url}/label", {"id": "a", "label": "1"})[0]
            log.rmdir()
            told["after"] = ask(f"{url}/label", {"id": "a", "label": "1"})[0]
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=client)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        thread.start()
        serve(config, name="server-0", listener=listener)
        thread.join(30)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert told["live"] is not None
    assert (told["predict"], told["before"], told["after"]) == (503, 503, 202), "there is no teacher yet"
