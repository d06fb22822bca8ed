"""Log lines: structured, on stderr, for a terminal or as JSON; those of libraries at a limited rate."""

from __future__ import annotations

import logging
import math
import re
import sys
import time
from collections.abc import Callable

import structlog

EVERY_S = 60.0
MAX_MESSAGES = 1000
"""Different ones that are remembered."""


class RateLimit(logging.Filter):
    """Passes each message of a library once a minute, with the count of similar messages since the last one.

    kafka-python writes about 650 lines a minute while its broker is away. Messages are similar if logger, level,
    template without its numbers, and kind of exception are equal.
    """

    def __init__(self, *, now_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now_s = now_s
        self._seen: dict[tuple[str, int, str, str], tuple[float, int]] = {}
        """When the message was passed, and how often it was dropped since."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is passed."""
        if record.name == "kafka.net.selector" and "blocking the event loop" in str(record.msg):
            return False  # advice to developers of kafka-python, on any busy machine
        error = record.exc_info[0] if record.exc_info else None
        template = re.sub(r"\d+", "0", str(record.msg))
        key = (record.name, record.levelno, template, error.__name__ if error else "")
        now_s = self._now_s()
        passed_s, dropped = self._seen.get(key, (-math.inf, 0))
        if now_s - passed_s < EVERY_S:
            self._seen[key] = (passed_s, dropped + 1)
            return False
        if len(self._seen) >= MAX_MESSAGES:
            self._seen.clear()
        self._seen[key] = (now_s, 0)
        if dropped:
            record.msg, record.args = f"{record.getMessage()} (and {dropped} more like it since)", None
        return True


def set_up_logs(level: int = logging.INFO) -> None:
    """Configure structlog, from `level` on, and the standard library's logging, from warnings on."""
    renderer = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    shared: list[structlog.types.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendered: list[structlog.types.Processor] = [structlog.processors.format_exc_info, renderer]
    structlog.configure(
        processors=[*shared, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RateLimit())
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[remove_meta, *rendered])
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
