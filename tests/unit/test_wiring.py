"""What the processes have in common: topics, the lock of the state folder, signals, log lines."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from streamlearn.app.network import model_spec
from streamlearn.app.wiring import (
    THREAD_DIED,
    Seldom,
    StatePaths,
    log_exists,
    make_topics,
    open_log,
    set_up_logs,
    state_lock,
    stop_signals,
)
from streamlearn.config import Config, load_config
from streamlearn.errors import ConfigError, StateLockedError
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.log.kafka import KafkaLog
from streamlearn.testing import MemoryLog


def config(**overrides: object) -> Config:
    return load_config(environ={}, overrides=overrides)


def counts(log: MemoryLog) -> list[int]:
    return [log.partition_count(topic) for topic in ("samples", "labels", "dead-letters")]


class TestTopics:
    def test_all_are_created_where_there_are_none(self) -> None:
        """Samples and labels with as many partitions, dead letters with one."""
        log = MemoryLog()

        make_topics(log, config(**{"log.partitions": 4}))

        assert counts(log) == [4, 4, 1]

    @pytest.mark.parametrize(("there", "wanted"), [("samples", [3, 3, 1]), ("labels", [3, 3, 1])])
    def test_the_missing_side_is_made_like_the_one_that_is_there(self, there: str, wanted: list[int]) -> None:
        """Whatever the config says: a label must be in the same partition as its sample."""
        log = MemoryLog()
        log.create_topics({there: 3})

        make_topics(log, config(**{"log.partitions": 8}))

        assert counts(log) == wanted

    def test_what_is_there_is_left_as_it_is(self) -> None:
        """A second call creates nothing, and other dead letters than one partition are fine."""
        log = MemoryLog()
        log.create_topics({"samples": 2, "labels": 2, "dead-letters": 5})

        make_topics(log, config(**{"log.create_topics": False}))

        assert counts(log) == [2, 2, 5]

    def test_missing_ones_are_named_where_none_may_be_created(self) -> None:
        """And nothing was created."""
        log = MemoryLog()
        log.create_topics({"samples": 1})

        with pytest.raises(ConfigError, match=r"missing: labels, dead-letters; .*log\.create_topics"):
            make_topics(log, config(**{"log.create_topics": False}))

        assert counts(log) == [1, 0, 0]

    def test_unequal_partitions_are_refused(self) -> None:
        """With both counts."""
        log = MemoryLog()
        log.create_topics({"samples": 2, "labels": 3})

        with pytest.raises(ConfigError, match="samples has 2 partitions and labels has 3"):
            make_topics(log, config())


class TestLog:
    def test_an_embedded_log_exists_once_it_was_opened(self, tmp_path: Path) -> None:
        """To ask creates nothing."""
        settings = config(**{"state.dir": str(tmp_path / "state")})

        assert not log_exists(settings)
        assert list(tmp_path.iterdir()) == []
        log = open_log(settings)
        log.close()

        assert isinstance(log, EmbeddedLog)
        assert log_exists(settings)

    def test_kafka_is_not_asked_before_the_first_use(self) -> None:
        """So a process may start while the broker is away."""
        settings = config(**{"log.kind": "kafka", "log.kafka.bootstrap_servers": "127.0.0.1:1"})

        log = open_log(settings)
        log.close()

        assert isinstance(log, KafkaLog)
        assert log_exists(settings)


def test_the_model_is_the_configs() -> None:
    """Factory, options, and what the schema says of its two ends."""
    spec = model_spec(
        config(
            **{
                "model.factory": "convnet",
                "model.normalise": False,
                "schema.shape": [1, 8, 8],
                "schema.classes": 7,
                "schema.scale": 0.5,
            }
        )
    )

    assert (spec.factory, spec.shape, spec.classes, spec.normalise, spec.scale) == ("convnet", (1, 8, 8), 7, False, 0.5)
    assert spec.options == {}


def test_a_norm_is_an_option_of_the_network() -> None:
    """So it is published with the weights; one that is left to the network is not, and older models stay the same."""
    spec = model_spec(config(**{"model.options": {"hidden": [8], "norm": "group"}}))

    assert spec.options == {"hidden": [8], "norm": "group"}
    assert model_spec(config(**{"model.options": {"hidden": [8]}})).options == {"hidden": [8]}


class TestLock:
    def test_a_second_owner_is_refused_by_the_pid_of_the_first(self, tmp_path: Path) -> None:
        """Until the first lets go."""
        paths = StatePaths(tmp_path / "new" / "state")

        with state_lock(paths):
            with pytest.raises(StateLockedError, match=f"pid {os.getpid()} owns"), state_lock(paths):
                pass
            with pytest.raises(StateLockedError), state_lock(paths):
                pass
        with state_lock(paths):
            pass

    def test_a_killed_owner_leaves_no_lock(self, tmp_path: Path) -> None:
        """Its file stays, with a pid that counts for nothing."""
        (tmp_path / "lock").write_text("1")

        with state_lock(StatePaths(tmp_path)):
            assert (tmp_path / "lock").read_text() == str(os.getpid())

    def test_a_folder_that_cannot_be_made_is_a_wrong_setting(self, tmp_path: Path) -> None:
        """Named with its value."""
        (tmp_path / "file").write_text("")

        with (
            pytest.raises(ConfigError, match=r"state\.dir = .*file/state"),
            state_lock(StatePaths(tmp_path / "file" / "state")),
        ):
            pass


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_the_first_sets_the_event_and_handlers_are_put_back(self, number: signal.Signals) -> None:
        """Nothing is interrupted where it stands."""
        before = signal.getsignal(number)

        with stop_signals() as stopping:
            assert not stopping.is_set()
            signal.raise_signal(number)
            assert stopping.is_set()

        assert signal.getsignal(number) is before

    def test_a_second_one_leaves_at_once(self) -> None:
        """With the code of a process that the signal ended; no clean-up runs."""
        program = (
            "import signal, sys\n"
            "from streamlearn.app.wiring import stop_signals\n"
            "with stop_signals():\n"
            "    try:\n"
            "        signal.raise_signal(signal.SIGTERM)\n"
            "        print('first', flush=True)\n"
            "        signal.raise_signal(signal.SIGINT)\n"
            "    finally:\n"
            "        print('cleaned up', flush=True)\n"
        )

        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)

        assert (done.returncode, done.stdout) == (128 + signal.SIGINT, b"first\n")


class TestDeath:
    def test_a_child_ends_when_its_parent_is_killed(self) -> None:
        """Or it would hold port and lock for nobody. Its end closes the pipe that is read here."""
        child = (
            "import sys, time\n"
            "from streamlearn.app.wiring import die_with\n"
            "die_with(int(sys.argv[1]))\n"
            "print('up', flush=True)\n"
            "time.sleep(15)\n"
            "print('lives on', flush=True)\n"
        )
        parent = (
            "import os, subprocess, sys\n"
            "subprocess.run([sys.executable, '-c', sys.argv[1], str(os.getpid())], check=False)\n"
        )
        with subprocess.Popen([sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"

            process.kill()

            assert process.stdout.read() == ""

    def test_an_error_in_any_thread_ends_the_process_loudly(self) -> None:
        """And whose parent died before it could ask for the signal gets it at once."""
        program = (
            "import os, threading, time\n"
            "from streamlearn.config import load_config\n"
            "from streamlearn.app.wiring import die_loudly, die_with, set_up_logs, stop_signals\n"
            "set_up_logs(load_config(environ={}))\n"
            "die_loudly()\n"
            "with stop_signals() as stopping:\n"
            "    die_with(os.getppid() + 1)\n"
            "    print(stopping.is_set(), flush=True)\n"
            "    threading.Thread(target=lambda: 1 / 0, name='feed').start()\n"
            "    time.sleep(15)\n"
        )

        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
        line = json.loads(done.stderr)

        assert (done.returncode, done.stdout) == (THREAD_DIED, b"True\n")
        assert (line["event"], line["thread"], line["level"]) == ("thread_died", "feed", "critical")
        assert "ZeroDivisionError" in line["exception"]


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """Puts back what `set_up_logs` changes in the process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("logs_as_before")
class TestLogLines:
    def test_each_is_one_json_object_the_libraries_own_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        """On stderr, with event, level and time; a stack trace is inside its line."""
        set_up_logs(config())

        structlog.get_logger().info("checkpoint_saved", step=12, duration_s=0.5)
        logging.getLogger("some.library").warning("slow %s", "disk")
        logging.getLogger("some.library").error("failed", exc_info=ValueError("why"))
        shown = capsys.readouterr()
        ours, theirs, failed = map(json.loads, shown.err.splitlines())

        assert shown.out == ""
        assert (ours["event"], ours["step"], ours["duration_s"], ours["level"]) == ("checkpoint_saved", 12, 0.5, "info")
        assert (theirs["event"], theirs["level"]) == ("slow disk", "warning")
        assert "ValueError: why" in failed["exception"]
        assert all(line["timestamp"].endswith("Z") for line in (ours, theirs, failed))

    def test_the_level_is_the_configs_and_chatter_of_libraries_is_not_shown(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Below it nothing is printed."""
        set_up_logs(config(**{"run.log_level": "error"}))

        structlog.get_logger().warning("passed_over")
        structlog.get_logger().error("shown")
        logging.getLogger("some.library").info("chatter")

        assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["shown"]

    def test_for_people_there_is_a_console_form(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Where it is asked for, terminal or not."""
        set_up_logs(config(**{"run.log_format": "console"}))

        structlog.get_logger().info("checkpoint_saved", step=12)
        line = capsys.readouterr().err

        assert "checkpoint_saved" in line
        assert not line.startswith("{")


class TestSeldom:
    """A library that says the same thing hundreds of times a minute."""

    def said(self, seldom: Seldom, name: str, message: str, *args: object, error: Exception | None = None) -> str:
        """What of it is shown."""
        exc_info = (type(error), error, None) if error else None
        record = logging.LogRecord(name, logging.WARNING, "", 0, message, args, exc_info)
        return record.getMessage() if seldom.filter(record) else ""

    def test_a_message_goes_through_once_a_minute_with_how_many_were_left_out(self) -> None:
        """Alike but for numbers, whether these are arguments or stand in the text."""
        now = [5.0]
        seldom = Seldom(60.0, now_s=lambda: now[0])

        assert self.said(seldom, "kafka", "node %s: timeout 17", 1) == "node 1: timeout 17"
        assert [self.said(seldom, "kafka", f"node %s: timeout {n}", n) for n in range(3)] == ["", "", ""]
        now[0] = 65.0
        assert self.said(seldom, "kafka", "node %s: timeout 9", 4) == "node 4: timeout 9 (and 3 more like it since)"
        now[0] = 125.0
        assert self.said(seldom, "kafka", "node %s: timeout 9", 4) == "node 4: timeout 9"

    def test_others_are_not_held_up_by_it(self) -> None:
        """Another text, another logger, another error under the same text."""
        seldom = Seldom(60.0)
        first = [("a", "x", None), ("a", "y", None), ("b", "x", None), ("a", "x", OSError()), ("a", "x", KeyError())]

        assert all(self.said(seldom, name, text, error=error) for name, text, error in first)
        assert not any(self.said(seldom, name, text, error=error) for name, text, error in first)

    def test_what_it_remembers_is_bounded(self) -> None:
        """A text that is never the same twice."""
        seldom = Seldom(60.0, most=10)

        assert all(self.said(seldom, "a", "x" * n) for n in range(1, 100))
        assert len(seldom._seen) <= 10

    @pytest.mark.usefixtures("logs_as_before")
    def test_it_is_asked_about_the_lines_of_libraries(self, capsys: pytest.CaptureFixture[str]) -> None:
        """And not about our own, each of which says something."""
        set_up_logs(config())

        for _ in range(3):
            logging.getLogger("kafka.cluster").error("No node available for metadata refresh")
            structlog.get_logger().warning("ours")

        events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
        assert sorted(events) == ["No node available for metadata refresh", "ours", "ours", "ours"]


def test_an_error_that_ends_a_thread_ends_the_process() -> None:
    """Half a daemon must not look like a whole one: a thread dies of a bug, and the process says so and ends."""
    program = (
        "import threading, time\n"
        "from streamlearn.app.wiring import die_loudly\n"
        "die_loudly()\n"
        "threading.Thread(target=lambda: 1 / 0, name='feed').start()\n"
        "time.sleep(20)\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)

    assert done.returncode == 70
    assert "thread_died" in done.stdout + done.stderr
    assert "ZeroDivisionError" in done.stdout + done.stderr
