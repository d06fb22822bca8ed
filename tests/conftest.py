"""Fixtures that many tests share, and the rule that a skipped test can be made a failure.

STREAMLEARN_TEST_KAFKA=host:port names a broker to test against; without it one is started for the session.
STREAMLEARN_FORBID_SKIPS=1 fails the session when anything was skipped, and a test whose broker could not be had.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from streamlearn.broker import Broker
from streamlearn.errors import ConfigError, LogUnavailableError
from streamlearn.testing import ManualClock

with warnings.catch_warnings():
    # on Python 3.11 and 3.12 kafka-python reads its schemas, when it is imported, by a call that is deprecated there
    warnings.simplefilter("ignore", DeprecationWarning)
    importlib.import_module("kafka")

SKIPS_FORBIDDEN = os.environ.get("STREAMLEARN_FORBID_SKIPS") == "1"
GOOD = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
SKIPPED = pytest.StashKey[list[str]]()
NO_BROKER = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def kafka_broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a real Apache Kafka; tests of one session share it, so their topics need names of their own."""
    given = os.environ.get("STREAMLEARN_TEST_KAFKA")
    if given:
        yield given
        return
    broker = Broker(tmp_path_factory.mktemp("kafka"))
    try:
        broker.start()
    except (ConfigError, LogUnavailableError) as error:
        request.config.stash[NO_BROKER] = str(error)
        if SKIPS_FORBIDDEN:
            pytest.fail(f"no Kafka to test against, and skips are forbidden: {error}")
        pytest.skip(f"NO KAFKA, its tests do not run: {error}")
    try:
        yield broker.bootstrap_servers
    finally:
        broker.stop()


@pytest.fixture
def clock() -> ManualClock:
    """A clock that moves only when the test says so."""
    return ManualClock()


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    """Where an embedded log may be."""
    return tmp_path / "log" / "log.sqlite3"


def pytest_configure(config: pytest.Config) -> None:
    """Start the list of what was skipped."""
    config.stash[SKIPPED] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember what was skipped; an expected failure is none."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        item.config.stash[SKIPPED].append(report.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a file that is skipped whole."""
    report = yield
    if report.skipped:
        collector.config.stash[SKIPPED].append(report.nodeid)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where skips are forbidden, a skip is a failure."""
    if SKIPS_FORBIDDEN and session.config.stash[SKIPPED] and session.exitstatus in GOOD:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say loudly, at the end, what did not run."""
    skipped = config.stash[SKIPPED]
    if NO_BROKER in config.stash:
        terminalreporter.write_line(f"NO KAFKA: its tests did not run: {config.stash[NO_BROKER]}", red=True, bold=True)
    if SKIPS_FORBIDDEN and skipped:
        line = f"SKIPS ARE FORBIDDEN, and {len(skipped)} were skipped: {', '.join(skipped[:5])}"
        terminalreporter.write_line(line, red=True, bold=True)
