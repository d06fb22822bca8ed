"""Fixtures that many tests share, and the rule that a skipped test can be made a failure.

STREAMLEARN_TEST_KAFKA=host:port names a broker to test against; without it the processes of the session share one.
STREAMLEARN_FORBID_SKIPS=1 fails the session when anything was skipped, and a test whose broker could not be had.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from harness.fakes import ManualClock
from harness.shared_broker import SharedBroker
from hypothesis import settings

from streamlearn.errors import ConfigError, LogUnavailableError

with warnings.catch_warnings():
    # on Python 3.11 and 3.12 kafka-python reads its schemas, when it is imported, by a call that is deprecated there
    warnings.simplefilter("ignore", DeprecationWarning)
    importlib.import_module("kafka")

# Processes of the tests share few cores, where threads of torch would mostly wait for each other. torch is imported
# later, and child processes inherit it.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
# a loaded machine is no error
settings.register_profile("streamlearn", deadline=None)
settings.load_profile("streamlearn")

PARENT = os.getppid()
SKIPS_FORBIDDEN = os.environ.get("STREAMLEARN_FORBID_SKIPS") == "1"
GOOD = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
NO_BROKER = "NO KAFKA: its tests did not run: "


@pytest.fixture(scope="session")
def kafka_broker(request: pytest.FixtureRequest) -> Iterator[str]:
    """`host:port` of a real Apache Kafka; all processes of the session share it, so topics need names of their own."""
    given = os.environ.get("STREAMLEARN_TEST_KAFKA")
    if given:
        yield given
        return
    broker = SharedBroker(session_folder(request.config))
    try:
        address = broker.address()
    except (ConfigError, LogUnavailableError) as error:
        if SKIPS_FORBIDDEN:
            pytest.fail(f"no Kafka to test against, and skips are forbidden: {error}")
        pytest.skip(f"{NO_BROKER}{error}")
    yield address
    if os.getppid() != PARENT:  # the process that would stop it was killed
        broker.end()


def session_folder(config: pytest.Config) -> Path:
    """The temporary folder of the session; those of the processes of pytest-xdist are inside."""
    own: Path = config._tmp_path_factory.getbasetemp()
    return own.parent if hasattr(config, "workerinput") else own


@pytest.fixture(autouse=True)
def logs_go_to_the_console() -> Iterator[None]:
    """A command that a test runs in this process sends its log to the test's own streams, which are closed after it."""
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A learner sets the number of threads for the process."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture
def clock() -> ManualClock:
    """A clock that moves only when the test says so."""
    return ManualClock()


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    """Where an embedded log may be."""
    return tmp_path / "log" / "log.sqlite3"


class Skips:
    """What was skipped. It hears of tests by their reports, which pytest-xdist brings from its workers."""

    def __init__(self) -> None:
        self._skipped: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember what was skipped; an expected failure is none."""
        if report.skipped and not hasattr(report, "wasxfail"):
            self._skipped[report.nodeid] = str(report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """The same for a file that is skipped whole."""
        if report.skipped:
            self._skipped[report.nodeid] = str(report.longrepr)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Where skips are forbidden, a skip is a failure."""
        if SKIPS_FORBIDDEN and self._skipped and session.exitstatus in GOOD:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say loudly, at the end, what did not run."""
        for reason in self._skipped.values():
            if NO_BROKER in reason:
                line = reason[reason.index(NO_BROKER) :].rstrip("')")
                terminalreporter.write_line(line, red=True, bold=True)
                break
        if SKIPS_FORBIDDEN and self._skipped:
            line = f"SKIPS ARE FORBIDDEN, and {len(self._skipped)} were skipped: {', '.join([*self._skipped][:5])}"
            terminalreporter.write_line(line, red=True, bold=True)


def pytest_configure(config: pytest.Config) -> None:
    """Listen where all reports come together."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips())


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the broker, once all processes of the session have ended, whatever their tests did."""
    if not hasattr(config, "workerinput"):
        SharedBroker(session_folder(config)).end()
