"""What the processes have in common: the log, the codec, the layout of the state folder, port, log lines, signals.

No torch: the supervisor needs all of this, and lives as long as they all do.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import structlog

from streamlearn.config import Config
from streamlearn.errors import ConfigError, StateLockedError
from streamlearn.log.base import Log
from streamlearn.log.codec import Codec
from streamlearn.log.embedded import EmbeddedLog
from streamlearn.metrics import LearnerMetrics, MetricsServer, start_http


@dataclass(frozen=True)
class StatePaths:
    """Where everything is kept under `state.dir`."""

    root: Path

    @property
    def log(self) -> Path:
        """The embedded log's database."""
        return self.root / "log" / "log.sqlite3"

    @property
    def checkpoints(self) -> Path:
        """One file a checkpoint."""
        return self.root / "checkpoints"

    @property
    def journal(self) -> Path:
        """Which records formed which step."""
        return self.root / "journal"

    @property
    def store(self) -> Path:
        """Sample store and label ledger."""
        return self.root / "store"

    @property
    def scores(self) -> Path:
        """What is known about how good the model is."""
        return self.root / "scores.json"

    @property
    def label_requests(self) -> Path:
        """The active-learning queue."""
        return self.root / "label-requests.sqlite"

    @property
    def published(self) -> Path:
        """Teachers, and the pointer to the one that is served."""
        return self.root / "published"

    @property
    def heartbeat(self) -> Path:
        """What the learner says of itself, about once a second."""
        return self.root / "learner.json"

    @property
    def epoch(self) -> Path:
        """The number of the learner that may write here."""
        return self.root / "epoch"

    @property
    def processes(self) -> Path:
        """Where each server process says how to scrape it."""
        return self.root / "processes"


THREAD_DIED = 70
MOST_RECORD_BYTES = 64 << 20
"""What may be appended. More than `log.max_record_bytes`: a record too large to be read can be dead-lettered."""


def open_log(config: Config) -> Log:
    """The log that the config names. An embedded one is created; Kafka is asked at the first use."""
    if config.log.kind == "kafka":
        from streamlearn.log.kafka import KafkaLog  # noqa: PLC0415  kafka-python takes .2 s, needed here alone

        return KafkaLog(
            config.log.kafka.bootstrap_servers,
            group_id=config.log.kafka.group_id,
            replication_factor=config.log.kafka.replication_factor,
            options=config.log.kafka.options,
            max_record_bytes=MOST_RECORD_BYTES,
            fetch_bytes=config.log.max_record_bytes,
        )
    return EmbeddedLog(
        StatePaths(config.state.dir).log,
        max_age_s=config.log.embedded_max_age_s,
        max_bytes=config.log.embedded_max_bytes,
        max_record_bytes=MOST_RECORD_BYTES,
    )


def log_exists(config: Config) -> bool:
    """Whether there is a log to look into, for those who must change nothing: to open an embedded one creates it."""
    return config.log.kind == "kafka" or StatePaths(config.state.dir).log.exists()


def make_topics(log: Log, config: Config) -> None:
    """Create what is missing where that is allowed, and check what is there.

    Raises:
        ConfigError: a topic is missing, or samples and labels are not co-partitioned.
    """
    topics = config.log.topics
    wanted = {topics.samples: config.log.partitions, topics.labels: config.log.partitions, topics.dead_letters: 1}
    missing = {topic: count for topic, count in wanted.items() if log.partition_count(topic) == 0}
    if missing and not config.log.create_topics:
        msg = f"topics are missing: {', '.join(missing)}; create them, or set log.create_topics = true"
        raise ConfigError(msg)
    if missing:
        sides = {topics.samples, topics.labels} - missing.keys()
        for topic in missing.keys() & {topics.samples, topics.labels}:
            missing[topic] = log.partition_count(sides.copy().pop()) if sides else missing[topic]
        log.create_topics(missing)
    samples, labels = log.partition_count(topics.samples), log.partition_count(topics.labels)
    if samples != labels:
        msg = (
            f"{topics.samples} has {samples} partitions and {topics.labels} has {labels}: a label must be in the same "
            "partition as its sample; recreate one of them with as many"
        )
        raise ConfigError(msg)


def make_codec(config: Config) -> Codec:
    """Bytes to samples and labels, as the schema says."""
    return Codec(
        config.schema_.build(),
        payload=config.schema_.payload,
        max_record_bytes=config.log.max_record_bytes,
        unknown_class=config.labels.unknown_class,
    )


def listen(config: Config) -> socket.socket:
    """Bind the public port; server processes share the socket.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.serve.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.serve.host, config.serve.port))
    except OSError as error:
        listener.close()
        msg = f"serve.host = {config.serve.host!r}, serve.port = {config.serve.port}: {error.strerror}; choose another"
        raise ConfigError(msg) from error
    listener.listen(2048)
    return listener


def expose(config: Config, metrics: LearnerMetrics) -> tuple[MetricsServer, int]:
    """The learner's own /metrics, and its port.

    Raises:
        ConfigError: the address cannot be had.
    """
    host, port = config.metrics.host, config.metrics.port
    try:
        return start_http(metrics.registry, host, port)
    except OSError as error:
        msg = f"metrics.host = {host!r}, metrics.port = {port}: {error.strerror or error}; choose another, or 0"
        raise ConfigError(msg) from error


class Seldom(logging.Filter):
    """Lets each message of a library through once in `every_s`, then with how many like it were left out.

    kafka-python writes some 650 lines a minute while its broker is away, most of them one and the same but for numbers:
    a night of that fills a disk. Messages are alike by logger, level, template and kind of exception.
    """

    def __init__(self, every_s: float = 60.0, *, most: int = 1000, now_s: Callable[[], float] = time.monotonic) -> None:
        """At most so many messages are remembered."""
        super().__init__()
        self._every_s, self._most, self._now_s = every_s, most, now_s
        self._seen: dict[tuple[str, int, str, str], tuple[float, int]] = {}
        """When it was let through, and how many were not since."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it goes through."""
        error = record.exc_info[0] if record.exc_info else None
        template = re.sub(r"\d+", "0", str(record.msg))
        key = (record.name, record.levelno, template, error.__name__ if error else "")
        now_s = self._now_s()
        said_s, left_out = self._seen.get(key, (-math.inf, 0))
        if now_s - said_s < self._every_s:
            self._seen[key] = (said_s, left_out + 1)
            return False
        if len(self._seen) >= self._most:
            self._seen.clear()
        self._seen[key] = (now_s, 0)
        if left_out:
            record.msg, record.args = f"{record.getMessage()} (and {left_out} more like it since)", None
        return True


def set_up_logs(config: Config) -> None:
    """Structured lines on stderr, libraries' own lines too, seldom: for people on a terminal, JSON elsewhere."""
    to_terminal = config.run.log_format == "console" or (config.run.log_format == "auto" and sys.stderr.isatty())
    renderer = structlog.dev.ConsoleRenderer() if to_terminal else structlog.processors.JSONRenderer()
    shared: list[structlog.types.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendered: list[structlog.types.Processor] = [structlog.processors.format_exc_info, renderer]
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, *shared, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.run.log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Seldom())
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[remove_meta, *rendered])
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def die_loudly() -> None:
    """Let an error that ends any thread end the process: half a daemon must not look like a whole one."""

    def report(args: threading.ExceptHookArgs) -> None:
        error = (args.exc_type, args.exc_value, args.exc_traceback)
        name = args.thread.name if args.thread else "?"
        structlog.get_logger(__name__).critical("thread_died", thread=name, exc_info=error)
        os._exit(THREAD_DIED)

    threading.excepthook = report


def die_with(parent: int) -> None:
    """Have the kernel send us SIGTERM when the parent dies, so that nobody holds port and lock for nobody (Linux)."""
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """SIGTERM and SIGINT set the event; a second one leaves at once (the last checkpoint stands)."""
    stopping = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def state_lock(paths: StatePaths, owner: Literal["learner", "daemon"] = "learner") -> Iterator[None]:
    """Own the state folder, as its one learner or as the one daemon whose processes work on it.

    Raises:
        ConfigError: it cannot be made or written.
        StateLockedError: another one owns it.
    """
    try:
        paths.root.mkdir(parents=True, exist_ok=True)
        opened = (paths.root / ("lock" if owner == "learner" else f"{owner}.lock")).open("a+")
    except OSError as error:
        msg = f"state.dir = {str(paths.root)!r}: {error.strerror or error}; name a folder that can be written"
        raise ConfigError(msg) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            pid = file.read().strip() or "?"
            msg = f"{paths.root}: the {owner} with pid {pid} owns this state folder; stop it first"
            raise StateLockedError(msg) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
