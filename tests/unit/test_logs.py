"""Log lines: JSON or console, levels, and the rate limit of libraries."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest
import structlog

from streamlearn.app.logs import MAX_MESSAGES, RateLimit, set_up_logs


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """Restore what `set_up_logs` changes in the process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("logs_as_before")
class TestSetUpLogs:
    def test_each_line_is_one_json_object(self, capsys: pytest.CaptureFixture[str]) -> None:
        """On stderr, with event, level and time, also for libraries; a stack trace is inside its line."""
        set_up_logs()

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

    def test_lines_below_the_level_are_not_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Neither our own nor those of libraries."""
        set_up_logs(logging.ERROR)

        structlog.get_logger().warning("hidden")
        structlog.get_logger().error("shown")
        logging.getLogger("some.library").info("chatter")

        assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["shown"]

    def test_slow_tasks_inside_kafka_python_are_not_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        """A busy machine has them; its other warnings are printed."""
        set_up_logs()

        selector = logging.getLogger("kafka.net.selector")
        selector.warning("Task <Task> ran for 0.118s (>0.100s threshold). It is blocking the event loop")
        selector.warning("Wakeup socket returned empty. Rebuilding.")

        events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
        assert events == ["Wakeup socket returned empty. Rebuilding."]

    def test_lines_on_a_terminal_are_no_json(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are for people."""
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        set_up_logs()

        structlog.get_logger().info("checkpoint_saved", step=12)
        line = capsys.readouterr().err

        assert "checkpoint_saved" in line
        assert not line.startswith("{")


class TestRateLimit:
    def passed(self, limit: RateLimit, name: str, message: str, *args: object, error: Exception | None = None) -> str:
        """The message as it is passed, or nothing."""
        exc_info = (type(error), error, None) if error else None
        record = logging.LogRecord(name, logging.WARNING, "", 0, message, args, exc_info)
        return record.getMessage() if limit.filter(record) else ""

    def test_a_message_is_passed_once_a_minute_with_the_count_of_dropped_ones(self) -> None:
        """Numbers do not tell messages apart, whether in the arguments or in the text."""
        now = [5.0]
        limit = RateLimit(now_s=lambda: now[0])

        assert self.passed(limit, "kafka", "node %s: timeout 17", 1) == "node 1: timeout 17"
        assert [self.passed(limit, "kafka", f"node %s: timeout {n}", n) for n in range(3)] == ["", "", ""]
        now[0] = 65.0
        assert self.passed(limit, "kafka", "node %s: timeout 9", 4) == "node 4: timeout 9 (and 3 more like it since)"
        now[0] = 125.0
        assert self.passed(limit, "kafka", "node %s: timeout 9", 4) == "node 4: timeout 9"

    def test_other_messages_are_not_limited_by_it(self) -> None:
        """Another text, another logger, another error under the same text."""
        limit = RateLimit()
        first = [("a", "x", None), ("a", "y", None), ("b", "x", None), ("a", "x", OSError()), ("a", "x", KeyError())]

        assert all(self.passed(limit, name, text, error=error) for name, text, error in first)
        assert not any(self.passed(limit, name, text, error=error) for name, text, error in first)

    def test_its_memory_is_bounded(self) -> None:
        """After `MAX_MESSAGES` others a message is new again."""
        limit = RateLimit()

        assert all(self.passed(limit, "a", "x" * n) for n in range(1, MAX_MESSAGES + 2))
        assert self.passed(limit, "a", "x"), "forgotten"

    @pytest.mark.usefixtures("logs_as_before")
    def test_it_applies_to_libraries_only(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Our own lines are all printed."""
        set_up_logs()

        for _ in range(3):
            logging.getLogger("kafka.cluster").error("No node available for metadata refresh")
            structlog.get_logger().warning("ours")

        events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
        assert sorted(events) == ["No node available for metadata refresh", "ours", "ours", "ours"]
