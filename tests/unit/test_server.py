"""One server process: its port, its signals, and a log that opens late."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from structlog.testing import capture_logs
from support import ask, until

from streamlearn.app.ports import listen
from streamlearn.app.server import serve
from streamlearn.app.siblings import siblings_of
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError
from streamlearn.state.paths import StatePaths


def config_in(folder: Path, **overrides: object) -> Config:
    settings = {"state.dir": str(folder), "serve.port": 0, "schema.shape": [4]}
    return load_config(environ={}, overrides={**settings, **overrides})


class TestListen:
    def test_port_0_takes_a_free_one(self, tmp_path: Path) -> None:
        """On loopback. Connections queue before a server accepts them."""
        with listen(config_in(tmp_path)) as listener:
            host, port = listener.getsockname()

            assert host == "127.0.0.1"
            assert port > 0
            socket.create_connection((host, port), timeout=2).close()

    def test_a_taken_port_is_a_wrong_setting(self, tmp_path: Path) -> None:
        """The error has its value and the reason."""
        with listen(config_in(tmp_path)) as first:
            port = first.getsockname()[1]

            with pytest.raises(ConfigError, match=rf"serve\.port = {port}: Address already in use; choose another"):
                listen(config_in(tmp_path, **{"serve.port": port}))

    def test_a_port_that_is_left_soon_is_waited_for(self, tmp_path: Path) -> None:
        """By a supervisor: servers of one that was killed answer their requests first."""
        first = listen(config_in(tmp_path))
        port = first.getsockname()[1]
        leaving = threading.Timer(0.3, first.close)
        leaving.start()

        with capture_logs() as logged, listen(config_in(tmp_path, **{"serve.port": port}), wait_s=30.0) as second:
            assert second.getsockname()[1] == port

        leaving.join()
        assert [line["event"] for line in logged] == ["waiting_for_port"]

    def test_an_address_of_another_machine_is_a_wrong_setting(self, tmp_path: Path) -> None:
        """192.0.2.0/24 is reserved for documentation."""
        with pytest.raises(ConfigError, match=r"serve\.host = '192\.0\.2\.1'"):
            listen(config_in(tmp_path, **{"serve.host": "192.0.2.1", "serve.insecure": True}))

    def test_a_port_is_free_again_at_once(self, tmp_path: Path) -> None:
        """A restarted daemon gets its port although old connections linger."""
        with listen(config_in(tmp_path)) as first:
            port = first.getsockname()[1]
            client = socket.create_connection(("127.0.0.1", port), timeout=2)
            first.accept()[0].close()
        client.close()

        with listen(config_in(tmp_path, **{"serve.port": port})) as second:
            assert second.getsockname()[1] == port


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal_and_stops_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """It answers on the given socket. At the signal the card is removed, and `serve` returns.

    The signal is not raised again, so that the caller can close the rest.
    """
    config = config_in(tmp_path)
    listener = listen(config)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    replies: dict[str, Any] = {}
    reached: list[int] = []

    def seen(got: int, _: FrameType | None) -> None:
        reached.append(got)

    def client() -> None:
        try:
            replies["live"] = until(lambda: answered(f"{url}/health/live"), "an answer", 20.0)
            replies["predict"] = ask(f"{url}/predict", {"instances": [[0, 0, 0, 0]]})[0]
            replies["cards"] = [path.name for path in StatePaths(tmp_path).processes.iterdir()]
            replies["label"] = ask(f"{url}/label", {"id": "a", "label": "1"})[0]
            replies["sibling"] = siblings_of(StatePaths(tmp_path), "another")
            replies["metrics"] = ask(replies["sibling"]["server-0"])[1]
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

    assert (replies["live"], replies["predict"], replies["label"]) == (200, 503, 202)
    assert replies["cards"] == ["server-0.json"]
    assert "streamlearn_appended_records_total" in replies["metrics"]
    assert list(StatePaths(tmp_path).processes.iterdir()) == []
    assert reached == []


def answered(url: str) -> int:
    try:
        return ask(url)[0]
    except OSError:
        return 0


def test_predictions_do_not_need_a_log_that_opens(tmp_path: Path) -> None:
    """After a full disk, for example: /predict answers all the same, and /label once the log opens."""
    config = config_in(tmp_path)
    listener = listen(config)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    log = StatePaths(tmp_path).log
    log.mkdir(parents=True)  # SQLite cannot open a folder
    replies: dict[str, Any] = {}

    def client() -> None:
        try:
            replies["live"] = until(lambda: answered(f"{url}/health/live"), "an answer", 20.0)
            replies["predict"] = ask(f"{url}/predict", {"instances": [[0, 0, 0, 0]]})[0]
            replies["before"] = ask(f"{url}/label", {"id": "a", "label": "1"})[0]
            log.rmdir()
            replies["after"] = ask(f"{url}/label", {"id": "a", "label": "1"})[0]
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

    assert replies["live"] is not None
    assert (replies["predict"], replies["before"], replies["after"]) == (503, 503, 202), "there is no teacher yet"
