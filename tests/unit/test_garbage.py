"""Passes of the cycle collector in long-lived processes."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from support import ask, until

from streamlearn.app.build import model_spec
from streamlearn.app.garbage import THRESHOLD, short_pauses
from streamlearn.app.ports import listen
from streamlearn.app.server import serve
from streamlearn.config import load_config
from streamlearn.models.build import build
from streamlearn.state.paths import StatePaths
from streamlearn.state.publish import Publisher


class Cycle:
    """Refers to itself."""

    freed = 0

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        Cycle.freed += 1


def test_the_threshold_is_restored() -> None:
    """Even after an error."""
    before, during = gc.get_threshold(), []

    def fail() -> None:
        during.append(gc.get_threshold()[0])
        raise KeyError

    with pytest.raises(KeyError), short_pauses():
        fail()
    assert during == [THRESHOLD]
    assert gc.get_threshold() == before


def test_cycles_are_freed() -> None:
    """There are never more than the threshold."""
    Cycle.freed = 0
    with short_pauses():
        for _ in range(2 * THRESHOLD):
            Cycle()
        assert Cycle.freed > THRESHOLD / 2


def test_a_server_with_a_teacher_visits_little_in_a_full_pass(tmp_path: Path) -> None:
    """Its length is what clients wait in the worst case. Everything imported would be some 300,000 objects."""
    overrides = {"state.dir": str(tmp_path), "serve.port": 0, "schema.shape": [4]}
    config = load_config(environ={}, overrides=overrides)
    visited = {"before": len(gc.get_objects())}
    listener = listen(config)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/predict"

    def client() -> None:
        try:
            spec = model_spec(config)
            weights = {name: tensor.numpy() for name, tensor in build(spec).state_dict().items()}
            publisher = Publisher(StatePaths(tmp_path).published, keep=2, clock=time.time)
            publisher.publish(1, weights, {"model_spec": spec.to_json()})
            until(lambda: answered(url) == 200, "an answer")
            visited["serving"] = len(gc.get_objects())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    thread = threading.Thread(target=client)
    try:
        thread.start()
        serve(config, name="server-0", listener=listener)
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)

    assert visited["before"] > 100_000
    assert visited["serving"] < 20_000
    assert gc.get_freeze_count() == 0


def answered(url: str) -> int:
    """The status of a prediction; 0 if nothing listens yet."""
    try:
        return ask(url, {"instances": [[0, 0, 0, 0]]})[0]
    except OSError:
        return 0
